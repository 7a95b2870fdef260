import numpy as np
import pytest

from simulations.paper_figures import ARMS, EARLIER, METRICS, PRINTED, summarise


def test_the_interval_of_a_mean_is_students() -> None:
    values = [0.60, 0.62, 0.67]
    scores = [{arm: dict.fromkeys(METRICS, value) for arm in ARMS} for value in values]
    row = next(row for row in summarise(scores) if (row.arm, row.metric) == ("released", "f1"))
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)  # 97.5 % quantile of t with 2 degrees of freedom
    assert row.value == pytest.approx(0.63)
    assert (row.low, row.high) == pytest.approx((0.63 - half, 0.63 + half), abs=1e-6)
    assert (row.n, row.earlier, row.printed) == (3, 0.560, 0.613)


def test_known_figures_belong_to_arms_and_metrics_that_exist() -> None:
    assert set(EARLIER) | set(PRINTED) <= set(ARMS)
    assert all(len(figures) == len(METRICS) for figures in EARLIER.values())
    assert all(set(figures) <= set(METRICS) for figures in PRINTED.values())

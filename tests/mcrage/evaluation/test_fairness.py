"""Gaps are fairlearn's; the share of a gap closed has an interval that covers, and none where there is no gap."""

import numpy as np
import pytest
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

from mcrage.evaluation.fairness import gap_closed, group_gaps, verdict
from mcrage.evaluation.metrics import metrics, sums


@pytest.mark.parametrize("seed", range(4))
def test_gaps_equal_fairlearns(seed: int) -> None:
    draw = np.random.default_rng(seed)
    event, scores, group = draw.random(300) < 0.4, draw.random(300), draw.integers(0, 3, 300)
    values = np.stack(
        [
            metrics(sums(event[group == g], scores[None, group == g], np.array([0.5]), np.ones((sum(group == g), 1))))
            for g in range(3)
        ],
        axis=1,
    )
    parity, odds = group_gaps(values)[0, :, 0]
    named = {"y_true": event, "y_pred": scores >= 0.5, "sensitive_features": group}
    assert parity == pytest.approx(demographic_parity_difference(**named))
    assert odds == pytest.approx(equalized_odds_difference(**named))


def test_the_share_is_1_where_the_arm_equals_pooled_and_0_where_it_equals_local() -> None:
    draw = np.random.default_rng(0)
    local = np.concatenate([[0.6], 0.6 + 0.01 * draw.normal(size=400)])
    pooled = local + 0.1
    arms = np.stack([local, pooled, (local + pooled) / 2, local - 0.05])
    found, is_gap = gap_closed(arms, local[None], pooled[None])
    np.testing.assert_allclose(found[:, 0], [0, 1, 0.5, -0.5], atol=1e-12)
    np.testing.assert_allclose(found[:, 1], found[:, 2], atol=1e-9)
    assert is_gap.all()


@pytest.mark.parametrize("gap", [0.0, 0.01, -0.1])
def test_there_is_no_share_where_pooled_is_not_better_beyond_its_interval(gap: float) -> None:
    draw = np.random.default_rng(0)
    local, pooled = (np.concatenate([[m], m + 0.01 * draw.normal(size=400)])[None] for m in (0.6, 0.6 + gap))
    found, is_gap = gap_closed(pooled, local, pooled)
    assert not is_gap.any()
    assert np.isnan(found).all()


def share_coverage(*, spread: float) -> float:
    """Share of 600 experiments whose interval holds the true share, .6, with replicates ``spread`` times as wide."""
    draw = np.random.default_rng(3)
    deviation = np.array([[0.012, 0.0], [0.006, 0.012]])
    hits = 0
    for _ in range(600):
        centre = np.array([0.06, 0.10]) + deviation @ draw.normal(size=2)
        replicates = centre[:, None] + spread * deviation @ draw.normal(size=(2, 400))
        gain, gap = np.concatenate([centre[:, None], replicates], axis=1)
        found, _ = gap_closed(gain, np.zeros_like(gain), gap)
        hits += bool(found[1] <= 0.6 <= found[2])
    return hits / 600


def test_the_interval_of_the_share_covers_at_its_level() -> None:
    # true coverage .95 leaves [.92, .98] once in 1,400 runs; the seed is fixed
    assert 0.92 <= share_coverage(spread=1.0) <= 0.98


def test_replicates_of_half_the_spread_would_not_cover() -> None:
    assert share_coverage(spread=0.5) < 0.8


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.02, "helps"), (-0.01, 0.02, "no evidence"), (-0.02, -0.01, "harms"), (0.0, 0.0, "no evidence")],
)
def test_the_verdict_follows_the_interval(low: float, high: float, said: str) -> None:
    assert verdict(low, high) == said

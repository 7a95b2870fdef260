"""The table of the collapse experiment has the truth that it states, and its distances tell groups apart."""

import numpy as np
import pytest

from benchmarks.collapse import DEATH, MAJORITY, MINORITY, SCHEMA, distances, hospitals, patients, statistics, truths
from mcrage.data.transform import check_table


def test_sites_have_the_rows_that_were_asked_for_and_follow_the_schema() -> None:
    tables = hospitals(seed=0, num_sites=3, rows=500, minority_rows=50).tables
    for table in tables.values():
        check_table(table, SCHEMA)
        assert (table["group"] == MINORITY).sum() == 50
        assert len(table) == 500
    assert not tables["site-01"].equals(tables["site-02"])


@pytest.mark.parametrize("group", [MAJORITY, MINORITY])
def test_the_stated_truth_is_what_many_rows_have(group: str) -> None:
    errors = distances(patients(group, 400_000, np.random.default_rng(0)), group, num_rows=400_000)
    assert set(errors) == set(truths(group))
    # sixteen normal draws: one beyond 4.5 in 10,000 runs; rounding shifts a mean by less
    assert max(map(abs, errors.values())) < 4.5


def test_real_rows_are_within_two_standard_errors_in_95_percent_and_majority_rows_are_not() -> None:
    draw = np.random.default_rng(0)
    real = [distances(patients(MINORITY, 800, draw), MINORITY, num_rows=800) for _ in range(100)]
    within = np.mean([[abs(error) <= 2 for error in errors.values()] for errors in real])
    assert within == pytest.approx(0.95, abs=0.02)
    collapsed = distances(patients(MAJORITY, 8000, draw), MINORITY, num_rows=800)
    assert np.mean([abs(error) <= 2 for error in collapsed.values()]) < 0.2
    assert collapsed["heart_rate"] < -15
    assert collapsed["died"] < -5


def test_rows_in_which_nobody_died_have_no_heart_rate_of_the_dead() -> None:
    rows = patients(MINORITY, 300, np.random.default_rng(0))
    found = statistics(rows[~rows["died"].to_numpy(dtype=bool)])
    assert np.isnan(found["heart_rate of the dead"])
    assert found["died"] == 0 < DEATH[MINORITY]

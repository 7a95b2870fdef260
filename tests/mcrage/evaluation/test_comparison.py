from typing import Any

import pytest

from mcrage.evaluation.comparison import (
    answer,
    compare,
    count_words,
    headline_comparisons,
    other_comparisons,
    site_comparisons,
)
from mcrage.evaluation.report import RunResults

RUN = {
    "config": {},
    "seed": 1,
    "dataset": "cohort",
    "sites": ["A"],
    "minority_groups": ["race=B", "race=C"],
    "engine": "in-process",
    "versions": {},
    "seconds": 1,
    "peak_memory_mb": 1,
}
LIMITS = {"helps": (0.01, 0.03), "no evidence": (-0.01, 0.03), "harms": (-0.03, -0.01)}


def results_of(words: dict[tuple[str, str], str]) -> RunResults:
    """Verdicts by (site, group), each with the values of three arms."""
    rows, verdicts = [], []
    for (site, group), word in words.items():
        for arm, value in (("local", 0.6), ("smote", 0.62), ("oversampling", 0.61), ("federated_target", 0.65)):
            rows.append(row(site, group, arm, value if word in LIMITS else None))
        if word in LIMITS:
            low, high = LIMITS[word]
            names = {"site": site, "group": group, "arm": "federated_target", "model": "custom"}
            verdicts.append(names | {"verdict": word, "difference": (low + high) / 2, "low": low, "high": high})
    return RunResults.parse({"schema_version": 1, "run": RUN, "rows": rows, "verdicts": verdicts})


def row(site: str, group: str, arm: str, value: float | None) -> dict[str, Any]:
    names = {"site": site, "group": group, "arm": arm, "model": "custom", "metric": "auroc"}
    if value is None:
        return names | {"value": None, "low": None, "high": None, "n": None, "reason": "insufficient: too few"}
    return names | {"value": value, "low": value - 0.02, "high": value + 0.02, "n": 100, "reason": ""}


@pytest.mark.parametrize(
    ("black", "asian", "expected"),
    [
        ("helps", "helps", "yes"),
        ("helps", "no evidence", "in part"),
        ("helps", "insufficient", "in part"),
        ("helps", "harms", "mixed"),
        ("no evidence", "harms", "harms"),
        ("no evidence", "no evidence", "no evidence"),
        ("no evidence", "insufficient", "no evidence"),
        ("insufficient", "insufficient", "unknown"),
    ],
)
def test_the_answer_says_no_more_than_the_weakest_verdict_allows(black: str, asian: str, expected: str) -> None:
    results = results_of({("all", "race=B"): black, ("all", "race=C"): asian})
    assert answer(headline_comparisons(results)) == expected


def test_comparisons_are_told_apart_by_group_and_site() -> None:
    words = {("all", "all"): "harms", ("all", "race=B"): "helps", ("A", "race=B"): "no evidence"}
    results = results_of(words)
    assert [each.word for each in headline_comparisons(results)] == ["helps", "insufficient"]
    assert [each.word for each in other_comparisons(results)] == ["harms"]
    assert count_words(site_comparisons(results)) == {"helps": 0, "no evidence": 1, "harms": 0, "insufficient": 1}


def test_the_best_local_baseline_is_the_one_with_the_highest_value() -> None:
    (comparison,) = compare(results_of({("all", "race=B"): "helps"}), site="all", group="race=B")
    assert comparison.baseline is not None
    assert comparison.baseline.arm == "smote"
    assert comparison.beats_baseline is True
    assert comparison.n == 100


def test_what_is_missing_has_a_reason() -> None:
    results = results_of({("all", "race=B"): "insufficient"})
    (small,) = compare(results, site="all", group="race=B")
    (absent,) = compare(results, site="all", group="race=C")
    assert (small.word, small.reason) == ("insufficient", "insufficient: too few")
    assert (absent.word, absent.reason) == ("insufficient", "not evaluated")
    assert small.baseline is small.beats_baseline is absent.n is None

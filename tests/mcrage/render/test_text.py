import re
from collections.abc import Callable
from typing import Any

import pytest

from mcrage.evaluation.report import RunResults
from mcrage.render.text import (
    WIDTH,
    answer_word,
    estimate,
    headline,
    interval,
    number,
    percent,
    printable,
    remarks,
    signed,
    summary_table,
)

Documents = Callable[..., dict[str, Any]]
MODELS = ("logistic_regression", "hist_gradient_boosting")


@pytest.mark.parametrize(
    ("value", "plain", "with_sign", "share"),
    [
        (0.7461, ".746", "+.746", "75"),
        (-0.012, "−.012", "−.012", "−1"),
        (1.0, "1.000", "+1.000", "100"),
        (0.9999, "1.000", "+1.000", "100"),
        (-0.0001, ".000", ".000", "0"),
        (0.0, ".000", ".000", "0"),
        (-1.25, "−1.250", "−1.250", "−125"),
    ],
)
def test_numbers_have_one_typography(value: float, plain: str, with_sign: str, share: str) -> None:
    assert (number(value), signed(value), percent(value)) == (plain, with_sign, share)


def test_intervals_stand_in_brackets_and_are_empty_where_there_is_none() -> None:
    assert interval(0.721, 0.77) == "[.721, .770]"
    assert interval(-0.01, 0.02, style="signed") == "[−.010, +.020]"
    assert interval(0.5, 1.1, style="percent") == "[50, 110]"
    assert interval(None, None) == ""


def small(
    verdicts: dict[tuple[str, str], tuple[float, float, float] | None], gaps: dict[Any, Any] | None = None
) -> RunResults:
    """Verdicts of the target arm by (group, model) over the federation, and shares of the gap by the same key."""
    rows, said, shares = [], [], []
    for (group, model), limits in verdicts.items():
        for arm, value in (("local", 0.6), ("smote", 0.61), ("federated_target", 0.7), ("pooled", 0.72)):
            names = {"site": "all", "group": group, "arm": arm, "model": model}
            found = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 50, "reason": ""}
            hidden = {"value": None, "low": None, "high": None, "n": None, "reason": "insufficient: too few"}
            rows.append(names | {"metric": "auroc"} | (found if limits else hidden))
        names = {"site": "all", "group": group, "arm": "federated_target", "model": model}
        if limits:
            difference, low, high = limits
            word = "helps" if low > 0 else "harms" if high < 0 else "no evidence"
            said.append(names | {"verdict": word, "difference": difference, "low": low, "high": high})
        value, low_share, high_share = (gaps or {}).get((group, model), (None, None, None))
        reason = "no gap: pooled rows are no better" if value is None else "" if high_share else "no interval"
        share = {"metric": "auroc", "value": value, "low": low_share, "high": high_share, "reason": reason}
        shares.append(names | share)
    run = {
        "config": {},
        "seed": 1,
        "dataset": "cohort",
        "sites": ["A", "B"],
        "minority_groups": list(dict.fromkeys(group for group, _ in verdicts if group != "all")),
        "engine": "in-process",
        "versions": {},
        "seconds": 1,
        "peak_memory_mb": 1,
    }
    rows += [row | {"site": site, "group": "all"} for row in rows[:1] for site in ("A", "B")]
    return RunResults.parse({"schema_version": 1, "run": run, "rows": rows, "verdicts": said, "gap_closed": shares})


def test_one_group_that_gains_is_named_with_its_numbers() -> None:
    results = small({("race=B", "custom"): (0.1, 0.05, 0.15)}, {("race=B", "custom"): (0.8, 0.5, 1.1)})
    assert answer_word(results) == "Yes."
    assert headline(results) == (
        "Records sampled from the model that 2 hospitals trained helped race=B with every downstream model: "
        "AUROC changed by +.100 (95 % interval from +.050 to +.150); of the gap to pooled real rows this closes 80 % "
        "(interval from 50 to 110)."
    )


def test_harm_is_named_and_the_range_covers_every_interval() -> None:
    verdicts = {
        ("race=B", MODELS[0]): (0.1, 0.05, 0.15),
        ("race=B", MODELS[1]): (-0.1, -0.2, -0.05),
        ("race=C", MODELS[0]): (0.0, -0.1, 0.1),
        ("race=C", MODELS[1]): None,
    }
    results = small(verdicts, {("race=B", MODELS[0]): (0.8, None, None)})
    assert answer_word(results).startswith("Mixed")
    assert headline(results) == (
        "Records sampled from the model that 2 hospitals trained helped in 1 of 4 comparisons (2 minority groups × 2 "
        "downstream models), showed no evidence of help or harm in 1, harmed in 1 (race=B with gradient boosting) and "
        "could not be judged in 1: AUROC changed by −.100 to +.100 (95 % intervals from −.200 to +.150); of the gap to "
        "pooled real rows, which 1 of 4 comparisons show, this closes 80 %."
    )


@pytest.mark.parametrize(
    ("limits", "opening"),
    [((0.05, -0.01, 0.11), "No evidence that they did."), ((-0.05, -0.1, -0.01), "No, they did harm.")],
)
def test_without_a_verdict_of_help_no_help_is_claimed(limits: tuple[float, float, float], opening: str) -> None:
    results = small({("race=B", "custom"): limits})
    assert answer_word(results) == opening
    assert "helped in 0 of 1 comparison (1 minority group × 1 downstream model)" in headline(results)
    assert "no share of it is given" in headline(results)


def test_groups_too_small_to_judge_and_no_groups_at_all_are_said() -> None:
    hidden = small({("race=B", "custom"): None})
    assert answer_word(hidden) == "This run cannot say."
    assert "none has enough held-out patients to judge records sampled" in headline(hidden)
    nobody = small({("all", "custom"): (0.0, -0.1, 0.1)})
    assert headline(nobody) == "No group of this run counts as a minority, so there is nothing to compare."
    assert "minority group  " not in summary_table(nobody)


def test_remarks_name_who_else_is_harmed() -> None:
    results = small({("race=B", "custom"): (0.1, 0.05, 0.15), ("all", "custom"): (-0.02, -0.03, -0.01)})
    assert remarks(results) == [
        "Everybody else: harms in 1 (of 1 comparison). Harmed: all with custom.",
        "Minority groups hospital by hospital: 2 too small to judge (of 2 comparisons).",
        "Against the best that a hospital can do alone: higher AUROC in 1 of 1 comparison (values only, no interval).",
    ]


def test_an_estimate_that_is_missing_is_its_reason() -> None:
    results = small({("race=B", "custom"): None})
    assert estimate(results.rows[0]) == "insufficient: too few"
    assert estimate(None) == "not evaluated"


def test_the_table_is_narrow_and_has_a_line_per_group_and_model(document: Documents) -> None:
    results = RunResults.parse(document())
    table = summary_table(results)
    assert max(map(len, table.splitlines())) <= WIDTH
    share = r"−?\d+ % \[−?\d+, −?\d+\]"
    pattern = rf"(logistic regression|gradient boosting) +\.\d{{3}}  \.\d{{3}} +\.\d{{3}} +{share} +(helps|no e|harms)"
    assert len(re.findall(pattern, table)) == len(results.minority_groups) * len(results.models)
    assert "race=Native" in table
    assert "2,400" in table


def test_the_table_shows_dashes_and_short_reasons_where_there_is_no_number() -> None:
    table = summary_table(small({("race=" + 40 * "long ", "custom"): None}))
    assert re.search(r" - +custom +- +- +- +no gap +insufficient\n", table)
    assert max(map(len, table.splitlines())) <= WIDTH


def test_names_from_data_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b[31mb\n") == "a?[31mb?"
    assert "\x1b" not in summary_table(small({("race=\x1b[2J", "custom"): (0.1, 0.05, 0.15)}))


@pytest.mark.parametrize(("count", "whom"), [(1, "race=0"), (2, "both minority groups"), (3, "all 3 minority groups")])
def test_every_group_that_gains_is_counted(count: int, whom: str) -> None:
    results = small({(f"race={position}", "custom"): (0.1, 0.05, 0.15) for position in range(count)})
    assert f"trained helped {whom} with every downstream model" in headline(results)

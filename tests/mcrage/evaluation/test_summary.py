"""Rows of results.json: right numbers with paired intervals, nothing of small groups, and a reason for every null."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError
from mcrage.evaluation.arms import SiteScores
from mcrage.evaluation.report import RunResults
from mcrage.evaluation.summary import NO_GAP, NO_INTERVAL, TOO_FEW_GROUPS, Summary, summarise

SCHEMA = TableSchema(
    columns=(
        Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
        Column(name="race", kind="categorical", role="sensitive", categories=("Black", "White"), nullable=False),
        Column(name="died", kind="boolean", role="target", nullable=False),
    )
)
ARMS = ("local", "threshold", "federated_target", "pooled")


def site(name: str, seed: int, *, n: int = 600, black: float = 0.3, gain: float = 1.0) -> SiteScores:
    """Scores that tell less in the local arm than in the others: noise of 2 against 2 − gain."""
    draw = np.random.default_rng(seed)
    event = draw.random(n) < 0.4
    noise = draw.normal(size=n)
    local, better = (1 / (1 + np.exp(-(event - 0.5 + spread * noise))) for spread in (2.0, 2.0 - gain))
    return SiteScores(
        site=name,
        event=event,
        patients=np.arange(n),
        codes=np.stack([draw.integers(0, 2, n), (draw.random(n) > black).astype(int)], axis=1),
        arms=ARMS,
        models=("logistic_regression",),
        scores=np.stack([local, local, better, better])[:, None],
        thresholds=np.array([[0.5], [0.4], [0.5], [0.5]]),
        reasons={},
    )


def frame(rows: list[dict]) -> pd.DataFrame:
    keys = ["site", "group", "arm", "metric"]
    return pd.DataFrame(rows).astype({"site": str}).set_index(keys).sort_index()


@pytest.fixture(scope="module")
def sites() -> list[SiteScores]:
    return [site("North", 1, n=900), site("South", 2), site("Small", 3, n=90, black=0.1)]


@pytest.fixture(scope="module")
def summary(sites: list[SiteScores]) -> Summary:
    return summarise(sites, SCHEMA, num_replicates=200)


def test_values_are_those_of_the_groups_test_rows(summary: Summary, sites: list[SiteScores]) -> None:
    rows = frame(summary.rows)
    north = sites[0]
    black = north.codes[:, 1] == 0
    found = rows.loc[("North", "race=Black", "local", "auroc")]
    assert found["value"] == pytest.approx(roc_auc_score(north.event[black], north.scores[0, 0, black]), abs=1e-6)
    assert found["low"] < found["value"] < found["high"]
    assert found["n"] == black.sum()
    assert rows.loc[("all", "all", "local", "auroc"), "n"] == 900 + 600 + 90


def test_every_row_has_a_value_and_an_interval_or_a_reason(summary: Summary) -> None:
    for row in [*summary.rows, *summary.gap_closed]:
        complete = None not in (row["value"], row["low"], row["high"])
        assert complete == (row["reason"] == "")


def test_the_records_are_what_results_json_takes(summary: Summary) -> None:
    run = {
        "config": {}, "seed": 0, "dataset": "none", "sites": ["North", "South", "Small"], "engine": "none",
        "versions": {}, "seconds": 0.0, "peak_memory_mb": 0.0,
    }  # fmt: skip
    tables = {"rows": summary.rows, "gap_closed": summary.gap_closed, "verdicts": summary.verdicts}
    results = RunResults.parse({"run": run, **tables})
    assert len(results.rows) == len(summary.rows)
    assert results.sites == ("North", "South", "Small")


def test_differences_are_paired(summary: Summary) -> None:
    rows = frame(summary.rows)
    threshold = rows.loc[("North", "all", "threshold")]
    assert tuple(threshold.loc["auroc_difference", ["value", "low", "high"]]) == (0, 0, 0)
    gain = rows.loc[("North", "all", "federated_target", "auroc_difference")]
    alone = [rows.loc[("North", "all", arm, "auroc")] for arm in ("local", "federated_target")]
    assert gain["value"] == pytest.approx(alone[1]["value"] - alone[0]["value"], abs=2e-6)
    assert gain["high"] - gain["low"] < np.hypot(*(each["high"] - each["low"] for each in alone))
    assert not (rows.index.get_level_values("metric").str.endswith("auroc_difference") & (
        rows.index.get_level_values("arm") == "local")).any()  # fmt: skip


def test_verdicts_say_what_the_difference_of_auroc_says(summary: Summary) -> None:
    verdicts = pd.DataFrame(summary.verdicts).set_index(["site", "group", "arm"])["verdict"]
    assert verdicts["North", "all", "federated_target"] == "helps"
    assert verdicts["North", "all", "threshold"] == "no evidence"
    worse = [replace(each, scores=each.scores[::-1].copy()) for each in (site("A", 1), site("B", 2))]
    turned = pd.DataFrame(summarise(worse, SCHEMA, num_replicates=200).verdicts).set_index(["site", "group", "arm"])
    assert turned.loc[("all", "all", "pooled"), "verdict"] == "harms"


def test_the_gap_is_closed_by_an_arm_that_scores_like_pooled(summary: Summary) -> None:
    gaps = frame(summary.gap_closed)
    for where in ("North", "all"):
        assert gaps.loc[(where, "all", "federated_target", "auroc"), "value"] == pytest.approx(1)
        assert gaps.loc[(where, "all", "threshold", "auroc"), "value"] == pytest.approx(0)
    assert set(gaps.index.get_level_values("arm")) == {"threshold", "federated_target"}


def test_without_a_gap_there_is_no_share_and_without_pooled_rows_no_table() -> None:
    gaps = frame(summarise([site("North", 1, gain=0.0)], SCHEMA, num_replicates=100).gap_closed)
    assert gaps["value"].isna().all()
    assert gaps.loc[("North", "all", "threshold", "auroc"), "reason"] == NO_GAP
    one = site("North", 1)
    local = replace(one, arms=("local",), scores=one.scores[:1], thresholds=one.thresholds[:1])
    assert summarise([local], SCHEMA, num_replicates=50).gap_closed == []


def test_small_groups_have_neither_value_nor_n_and_a_larger_one_goes_with_them(summary: Summary) -> None:
    rows = frame(summary.rows).loc["Small"]
    for group in ("race=Black", "race=White"):
        found = rows.loc[group]
        assert found["value"].isna().all()
        assert found["n"].isna().all()
        assert found["reason"].str.startswith("insufficient: fewer than 11 patients").all()
    gap = rows.loc[("race", "local", "demographic_parity_difference")]
    assert gap["reason"] == TOO_FEW_GROUPS
    assert {row["group"] for row in summary.verdicts if row["site"] == "Small"}.isdisjoint({"race=Black", "race=White"})


def test_public_data_may_be_shown_from_a_lower_number(sites: list[SiteScores]) -> None:
    rows = frame(summarise(sites, SCHEMA, num_replicates=50, minimum=1).rows).loc["Small"]
    assert rows.loc["race=White", "value"].notna().all()


def test_gaps_compare_the_shown_groups_of_each_feature_and_of_all_together(summary: Summary) -> None:
    rows = frame(summary.rows)
    rates = [rows.loc[("North", f"sex={sex}", "local", "selection_rate"), "value"] for sex in "FM"]
    gap = rows.loc[("North", "sex", "local", "demographic_parity_difference")]
    assert gap["value"] == pytest.approx(abs(rates[0] - rates[1]), abs=2e-6)
    assert gap["n"] == 900
    assert rows.loc[("North", "sex × race", "local", "equalized_odds_difference"), "value"] >= 0


def test_a_group_that_a_hospital_lacks_comes_from_the_others() -> None:
    rows = frame(summarise([site("North", 1), site("White", 2, black=0.0)], SCHEMA, num_replicates=50).rows)
    assert rows.loc[("White", "race=Black"), "value"].isna().all()
    assert rows.loc[("all", "race=Black", "local", "auroc"), "value"] > 0.5


def test_an_arm_without_scores_has_its_reason_in_every_row(sites: list[SiteScores]) -> None:
    scores = sites[0].scores.copy()
    scores[3] = np.nan
    broken = replace(sites[0], scores=scores, reasons={("pooled", "logistic_regression"): "no rows"})
    summary = summarise([broken, sites[1]], SCHEMA, num_replicates=50)
    rows = frame(summary.rows)
    assert set(rows.loc[("North", "all", "pooled"), "reason"]) == {"no rows"}
    assert set(rows.loc[("all", "all", "pooled"), "reason"]) == {"North: no rows"}
    assert rows.loc[("North", "sex", "pooled", "demographic_parity_difference"), "reason"] == "no rows"
    assert rows.loc[("South", "all", "pooled"), "value"].notna().all()
    gaps = frame(summary.gap_closed)
    assert gaps.loc[("North", "all", "threshold", "auroc"), "reason"] == "no rows"


def test_a_common_test_set_counts_its_patients_once_and_draws_them_together() -> None:
    one = site("North", 1)
    summary = summarise([one, replace(one, site="South")], SCHEMA, num_replicates=100, common_test=True)
    rows = frame(summary.rows)
    for where in ("North", "South"):
        pd.testing.assert_frame_equal(rows.loc[where], rows.loc["all"])


def test_the_same_seed_gives_the_same_rows_and_a_site_does_not_depend_on_the_others(sites: list[SiteScores]) -> None:
    one, two, other = (summarise(sites[:2], SCHEMA, num_replicates=50, seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert one != other
    alone = summarise(sites[:1], SCHEMA, num_replicates=50, seed=1)
    assert [row for row in alone.rows if row["site"] == "North"] == [r for r in one.rows if r["site"] == "North"]


def test_hospitals_that_differ_widen_the_federations_share() -> None:
    def width(other: Callable[[SiteScores], SiteScores]) -> float:
        sites = [site("A", 1), other(site("B", 2)), site("C", 3), other(site("D", 4))]
        gaps = frame(summarise(sites, SCHEMA, num_replicates=300).gap_closed)
        found = gaps.loc[("all", "all", "federated_target", "auroc")]
        return found["high"] - found["low"]

    def useless(one: SiteScores) -> SiteScores:
        scores = one.scores.copy()
        scores[2] = scores[0]
        return replace(one, scores=scores)

    assert width(useless) > width(lambda one: one) + 0.3


def test_a_group_too_small_for_the_bootstrap_has_a_value_without_an_interval() -> None:
    one = site("North", 1, n=400)
    codes = one.codes.copy()
    codes[:, 1] = 1
    codes[[np.flatnonzero(one.event)[0], np.flatnonzero(~one.event)[0]], 1] = 0
    rows = frame(summarise([replace(one, codes=codes)], SCHEMA, num_replicates=100, minimum=1).rows)
    found = rows.loc[("North", "race=Black", "local", "auroc")]
    assert found["reason"] == NO_INTERVAL
    assert np.isnan(found["low"])
    assert found["value"] in (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sites: [], "no site"),
        (lambda sites: [sites[0], sites[0]], "site names must differ"),
        (lambda sites: [replace(sites[0], site="all")], "site names must differ"),
        (lambda sites: [replace(sites[0], arms=("a", "b", "c", "d"))], "arm 'local'"),
        (lambda sites: [sites[0], replace(sites[1], models=("custom",))], "same arms and models"),
    ],
)
def test_sites_that_do_not_belong_together_are_refused(change, message: str, sites: list[SiteScores]) -> None:
    with pytest.raises(ConfigError, match=message):
        summarise(change(sites), SCHEMA)


def test_a_common_test_set_must_be_one(sites: list[SiteScores]) -> None:
    with pytest.raises(ConfigError, match="not tested on the same rows"):
        summarise(sites, SCHEMA, common_test=True)

"""The simulated cohort: shapes, independence of hospitals, an exact truth, and the gap that it is made for."""

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mcrage.errors import ConfigError
from simulations.cohort import Cohort, CohortConfig
from simulations.truth import MINORITY, SCHEMA, TARGET, matches

Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def cohort() -> Cohort:
    return Cohort(CohortConfig(seed=1))


@pytest.fixture(scope="module")
def fresh(cohort: Cohort) -> pd.DataFrame:
    return cohort.fresh(40_000, races={MINORITY: 0.5, "White": 0.5})


def test_tables_have_the_schemas_columns_and_dtypes(cohort: Cohort) -> None:
    table = cohort.site_table(0)
    assert len(table) == 700
    assert list(table.columns) == [column.name for column in SCHEMA.columns]
    for column in SCHEMA.columns:
        assert str(table[column.name].dtype) == column.pandas_dtype


def test_numbers_stay_within_the_public_bounds_and_are_rounded_as_the_schema_says(fresh: pd.DataFrame) -> None:
    for column in SCHEMA.modelled:
        if column.kind in ("continuous", "integer"):
            values = fresh[column.name].dropna().to_numpy(dtype=float)
            assert column.low <= values.min()
            assert values.max() <= column.high
            np.testing.assert_array_equal(values, values.round(column.decimals or 0))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(cohort: Cohort) -> None:
    pd.testing.assert_frame_equal(Cohort(CohortConfig(seed=1)).site_table(2), cohort.site_table(2))
    assert not Cohort(CohortConfig(seed=2)).site_table(2).equals(cohort.site_table(2))


def test_adding_a_hospital_changes_no_other_hospitals_rows(cohort: Cohort) -> None:
    larger = Cohort(CohortConfig(seed=1, num_sites=9))
    for site in (0, 7):
        pd.testing.assert_frame_equal(larger.site_table(site), cohort.site_table(site))


def test_the_minority_has_its_share_and_every_hospital_its_own_case_mix(cohort: Cohort) -> None:
    tables = [cohort.fresh(5_000, site=site) for site in range(8)]
    shares = [(table["race"] == MINORITY).mean() for table in tables]
    assert np.mean(shares) == pytest.approx(0.03, abs=0.006)
    ages = [table["age"].mean() for table in tables]
    # The standard error of each mean is 0.2 years.
    assert np.ptp(ages) > 2


def test_an_average_hospital_has_the_prevalence_of_the_truth() -> None:
    many = Cohort(CohortConfig(num_sites=40, patients_per_site=500, seed=3))
    assert many.fresh(40_000)[TARGET].mean() == pytest.approx(many.truth.prevalence, abs=0.02)


def test_results_are_missing_more_often_in_the_minority_and_at_different_rates_by_site(cohort: Cohort) -> None:
    table = pd.concat([cohort.fresh(4_000, site=site, races={MINORITY: 0.5, "White": 0.5}) for site in range(8)])
    missing = table["lactate"].isna()
    assert missing[table["race"] == MINORITY].mean() > missing[table["race"] == "White"].mean() + 0.05
    by_site = missing.groupby(table["hospital"]).mean()
    assert by_site.max() - by_site.min() > 0.1
    panel = table[["apol1_alleles", "duffy_null", "g6pd"]].isna()
    assert (panel.all(axis=1) == panel.any(axis=1)).all()


def _miscalibration(outcome: NDArray[np.bool_], risk: Floats) -> float:
    """p-value of Σ (observed − expected)² / variance over tenths of the risk; chi-square with 10 degrees of freedom."""
    tenth = np.argsort(np.argsort(risk)) * 10 // len(risk)
    gaps = np.bincount(tenth, outcome - risk) ** 2 / np.bincount(tenth, risk * (1 - risk))
    return float(chi2.sf(gaps.sum(), df=10))


@pytest.mark.parametrize("race", [MINORITY, "White"])
def test_the_true_risk_is_the_share_that_deteriorates(cohort: Cohort, fresh: pd.DataFrame, race: str) -> None:
    rows = fresh[fresh["race"] == race]
    outcome, risk = rows[TARGET].to_numpy(dtype=bool), cohort.true_risk(rows)
    # False alarms: 1 in 1,000 seeds, and the seed is fixed.
    assert _miscalibration(outcome, risk) > 1e-3
    log_odds = np.log(risk / (1 - risk))
    assert _miscalibration(outcome, 1 / (1 + np.exp(-1.15 * log_odds))) < 1e-3


def test_true_risk_needs_no_complete_row(cohort: Cohort) -> None:
    row = cohort.site_table(0).head(1).copy()
    for column in SCHEMA.features:
        if column.nullable:
            row[column.name] = pd.Series([None], dtype=row[column.name].dtype)
    assert 0 < cohort.true_risk(row)[0] < 0.5


def test_no_model_is_told_to_rank_better_than_the_truth(cohort: Cohort, fresh: pd.DataFrame) -> None:
    best = cohort.best_auroc(fresh)
    assert set(best) == {"all", "race=Black", "race=White"}
    rows = fresh[fresh["race"] == MINORITY]
    single = roc_auc_score(rows[TARGET].to_numpy(dtype=bool), matches(rows["apol1_alleles"], "2"))
    assert single < best["race=Black"] < 0.9


def test_fresh_patients_are_in_no_hospitals_table(cohort: Cohort) -> None:
    known = {patient for site in range(8) for patient in cohort.site_table(site)["patient_id"]}
    assert len(known) == 8 * 700
    assert known.isdisjoint(cohort.fresh(1_000)["patient_id"])
    assert set(cohort.fresh(100, site=3)["hospital"]) == {"site-04"}


def test_a_patient_may_have_several_admissions_with_the_same_genotype_and_other_findings() -> None:
    table = Cohort(CohortConfig(encounters_per_patient=2.5, patients_per_site=400)).site_table(0)
    patients = table.groupby("patient_id")
    assert len(table) / patients.ngroups == pytest.approx(2.5, abs=0.2)
    for name in ("age", "sex", "race", "apol1_alleles", "duffy_null"):
        assert patients[name].nunique().max() == 1
    assert patients["admitted"].nunique().max() > 1


def test_another_rule_is_another_truth_and_the_same_rule_seed_the_same(cohort: Cohort) -> None:
    one, again, other = (Cohort(CohortConfig(seed=1, rule_seed=seed)) for seed in (5, 5, 6))
    assert one.truth == again.truth
    rows = cohort.site_table(0)
    np.testing.assert_array_equal(one.true_risk(rows), again.true_risk(rows))
    for different in (cohort, other):
        assert np.abs(one.true_risk(rows) - different.true_risk(rows)).max() > 0.05
        assert one.truth.apol1 != different.truth.apol1


@pytest.mark.parametrize(
    "settings",
    [{"num_sites": 0}, {"patients_per_site": 0}, {"minority_share": 0.6}, {"encounters_per_patient": 0.5}],
)
def test_a_setting_out_of_range_is_named(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        CohortConfig(**settings)


def test_hospitals_come_with_a_common_test_set_of_the_asked_mix(cohort: Cohort) -> None:
    hospitals = cohort.hospitals(test_patients=2_000, test_races={MINORITY: 1.0})
    assert list(hospitals.tables) == [f"site-{number:02d}" for number in range(1, 9)]
    assert hospitals.test is not None
    assert len(hospitals.test) == 2_000
    assert set(hospitals.test["race"]) == {MINORITY}
    assert cohort.hospitals(test_patients=0).test is None


def _encoded(table: pd.DataFrame) -> Floats:
    """One-hot levels, numbers about standardised by the bounds, and an indicator of each missing number."""
    parts = []
    for column in SCHEMA.features:
        if column.kind in ("integer", "continuous"):
            values = table[column.name].to_numpy(dtype=float, na_value=np.nan)
            values = np.log(values) if column.scale == "log" else values
            parts += [np.nan_to_num((values - np.nanmean(values)) / np.nanstd(values)), np.isnan(values)]
        elif column.kind != "date":
            levels = (False, True) if column.kind == "boolean" else column.levels
            parts += [matches(table[column.name], level) for level in levels]
    return np.stack(parts, axis=1).astype(float)


def _auroc(train: pd.DataFrame, test: pd.DataFrame) -> float:
    model = LogisticRegression(max_iter=300).fit(_encoded(train), train[TARGET].to_numpy(dtype=bool))
    return float(roc_auc_score(test[TARGET].to_numpy(dtype=bool), model.predict_proba(_encoded(test))[:, 1]))


def test_one_hospital_does_not_teach_the_minoritys_rule_and_all_together_do() -> None:
    gaps = []
    for seed in range(3):
        cohort = Cohort(CohortConfig(seed=seed))
        tables = [cohort.site_table(site) for site in range(8)]
        test = cohort.fresh(6_000, races={MINORITY: 1.0})
        local = np.mean([_auroc(table, test) for table in tables])
        gaps.append(_auroc(pd.concat(tables), test) - local)
    assert np.mean(gaps) > 0.05

"""Effects from rows: real ones show the truth, rows whose label was dealt anew or whose minority was lost do not."""

import numpy as np
import pandas as pd
import pytest

from simulations.cohort import Cohort, CohortConfig
from simulations.effects import Effects, effects_within, logistic, standard_errors
from simulations.truth import MARKERS, MINORITY, TARGET, Floats, findings

SEEDS = range(6)
MIXED = {MINORITY: 0.5, "White": 0.3, "Hispanic": 0.2}


@pytest.fixture(scope="module")
def real() -> pd.DataFrame:
    return Cohort().fresh(30_000, races=MIXED)


def both_groups(table: pd.DataFrame, cohort: Cohort, real: pd.DataFrame) -> dict[bool, Effects]:
    return {minority: effects_within(table, cohort, real=real, minority=minority) for minority in (True, False)}


def relabelled(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same rows, the outcomes dealt anew within each race: every marginal stays and every effect is gone."""
    draw = np.random.default_rng(seed)
    return table.assign(
        **{
            TARGET: table.groupby("race", observed=True)[TARGET].transform(
                lambda y: y.to_numpy()[draw.permutation(len(y))]
            )
        }
    )


def test_true_coefficients_give_the_true_risk() -> None:
    cohort = Cohort(CohortConfig(rule_seed=3))
    for race in (MINORITY, "White"):
        rows = cohort.fresh(200, races={race: 1.0})
        beta = cohort.coefficients(minority=race == MINORITY)
        log_odds = beta["intercept"] + sum(beta[name] * values for name, values in findings(rows).items())
        np.testing.assert_allclose(1 / (1 + np.exp(-log_odds)), cohort.true_risk(rows))


def test_real_rows_are_within_two_standard_errors_and_relabelled_rows_are_not(real: pd.DataFrame) -> None:
    within: dict[str, list[float]] = {"real": [], "relabelled": []}
    for seed in SEEDS:
        cohort = Cohort(CohortConfig(seed=seed + 100))
        table = cohort.fresh(6_000, races=MIXED)
        within["real"] += [effects.share_within for effects in both_groups(table, cohort, real).values()]
        within["relabelled"] += [e.share_within for e in both_groups(relabelled(table, seed), cohort, real).values()]
    # 12 sets of about 15 coefficients: a mean of .95 has a standard error of about .017; the bound is four away.
    assert np.mean(within["real"]) == pytest.approx(0.95, abs=0.07)
    assert max(within["relabelled"]) < 0.5


def test_the_minority_with_everybody_elses_effects_is_found(real: pd.DataFrame) -> None:
    cohort = Cohort()
    table = cohort.fresh(16_000, races=MIXED)
    minority = effects_within(table, cohort, real=real, minority=True)
    collapsed = table.assign(race=pd.Categorical([MINORITY] * len(table), table["race"].cat.categories))
    collapsed = collapsed[table["race"] != MINORITY]
    lost = effects_within(collapsed, cohort, real=real, minority=True, num_rows=minority.num_rows)
    assert minority.share_within > 0.8
    assert lost.names == minority.names
    assert lost.share_within < 0.6


def test_a_finding_that_was_lost_counts_as_missed_and_one_that_is_rare_in_truth_does_not(real: pd.DataFrame) -> None:
    cohort = Cohort()
    rows = cohort.fresh(4_000, races=MIXED)
    full = effects_within(rows, cohort, real=real, minority=True)
    assert set(MARKERS) < set(full.names)
    without = rows.assign(apol1_alleles=pd.Categorical(["0"] * len(rows), rows["apol1_alleles"].cat.categories))
    lost = effects_within(without, cohort, real=real, minority=True)
    assert np.isinf(lost.errors[lost.names.index("apol1_high_risk")])
    assert lost.share_within < full.share_within
    majority = effects_within(rows, cohort, real=real, minority=False)
    assert "apol1_high_risk" not in majority.names


def test_standard_errors_shrink_with_the_rows_that_they_are_for(real: pd.DataFrame) -> None:
    cohort = Cohort()
    rows = cohort.fresh(4_000, races=MIXED)
    few, many = (effects_within(rows, cohort, real=real, minority=True, num_rows=n) for n in (500, 2_000))
    common = [many.names.index(name) for name in few.names]
    np.testing.assert_allclose(few.estimate, many.estimate[common])
    assert few.standard_error[0] == pytest.approx(2 * many.standard_error[0], rel=0.1)
    assert few.share_within >= many.share_within


def one_column(rows: int, seed: int) -> tuple[Floats, np.ndarray]:
    draw = np.random.default_rng(seed)
    design = np.stack([np.ones(rows), draw.normal(size=rows)], axis=1)
    return design, draw.random(rows) < 1 / (1 + np.exp(-(design @ np.array([-1.0, 0.7]))))


def test_estimates_scatter_by_their_standard_error() -> None:
    estimates = np.array([logistic(*one_column(400, seed)) for seed in range(300)])
    errors = standard_errors(one_column(20_000, 9)[0], np.array([-1.0, 0.7]), num_rows=400)
    # the standard deviation of 300 draws has a standard error of 4 %
    np.testing.assert_allclose(estimates.std(axis=0), errors, rtol=0.16)
    assert np.abs(estimates.std(axis=0) / (2 * errors) - 1).min() > 0.3, "twice the rows' error would be noticed"


def test_what_separates_the_outcomes_has_no_estimate() -> None:
    design, _ = one_column(200, 0)
    assert np.isnan(logistic(design, design[:, 1] > 0)).any()
    assert np.isnan(logistic(design, np.zeros(200, dtype=bool))).all()
    twice = np.column_stack([design, design[:, 1]])
    assert np.isnan(logistic(twice, one_column(200, 0)[1])).all()

"""The truth of the simulated cohort: what a finding is, and what a new draw of the rule may change."""

import numpy as np
import pandas as pd
import pytest

from simulations.cohort import Cohort, CohortConfig
from simulations.truth import MARKERS, MINORITY, PUBLISHED, SCHEMA, findings, redrawn


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return Cohort(CohortConfig(patients_per_site=4_000)).fresh(4_000, races={MINORITY: 0.5, "White": 0.5})


def test_every_finding_has_an_effect_and_every_effect_a_finding(table: pd.DataFrame) -> None:
    assert set(findings(table)) == set(PUBLISHED.effects)
    assert set(MARKERS) < set(PUBLISHED.effects)


def test_a_missing_cell_is_unremarkable(table: pd.DataFrame) -> None:
    empty = table.head(3).copy()
    for column in SCHEMA.features:
        if column.nullable:
            empty[column.name] = pd.Series([None] * 3, dtype=empty[column.name].dtype, index=empty.index)
    for name, values in findings(empty).items():
        if name not in ("age", "male", "year"):
            np.testing.assert_array_equal(values, 0)


def test_the_markers_hardly_occur_outside_the_minority(table: pd.DataFrame) -> None:
    minority = (table["race"] == MINORITY).to_numpy()
    for name in MARKERS:
        present = findings(table)[name] > 0
        assert present[minority].mean() > 0.1
        assert present[~minority].mean() < 0.03


@pytest.mark.parametrize("rule_seed", range(5))
def test_a_new_draw_keeps_directions_and_stays_within_its_ranges(rule_seed: int) -> None:
    truth = redrawn(rule_seed)
    assert truth == redrawn(rule_seed)
    assert 0.15 <= truth.prevalence <= 0.30
    for name, effect in truth.effects.items():
        assert 0.65 <= effect.log_odds / PUBLISHED.effects[name].log_odds <= 1.35
        assert 0.2 <= effect.in_minority <= 1.4
    for carriers in (truth.apol1, truth.duffy_null, truth.g6pd_deficient):
        assert 0 < carriers[MINORITY] < 1

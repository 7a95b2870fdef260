"""Groups are everybody, every level and every intersection; their patients add up."""

import numpy as np
import pandas as pd
import pytest

from mcrage.data.groups import group_codes
from mcrage.data.schema import Column, TableSchema
from mcrage.evaluation.strata import Strata


def test_groups_come_in_the_schemas_order_with_the_rows_they_name(clinic_schema: TableSchema, clinic_rows) -> None:
    table = clinic_rows(300, 0)
    codes = group_codes(table, clinic_schema.sensitive)
    strata = Strata([codes], clinic_schema)
    names = [str(group) for group in strata.groups]
    assert names[:6] == ["all", "age=under 65", "age=65 and over", "age=missing", "sex=F", "sex=M"]
    assert len(names) == 6 + 3 * 2
    rows = dict(zip(names, strata.rows(codes), strict=True))
    assert rows["sex=F"].tolist() == np.flatnonzero(table["sex"] == "F").tolist()
    assert rows["age=missing, sex=M"].tolist() == np.flatnonzero(table["age"].isna() & (table["sex"] == "M")).tolist()
    assert {name: len(members) for name, members in strata.by.items()} == {"age": 3, "sex": 2, "age × sex": 6}


def test_a_cell_that_no_level_covers_is_called_missing() -> None:
    column = Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False)
    strata = Strata([np.array([[0], [-1]])], TableSchema(columns=(column,)))
    assert [str(group) for group in strata.groups] == ["all", "sex=F", "sex=missing"]


def test_without_sensitive_features_everybody_is_the_only_group() -> None:
    schema = TableSchema(columns=(Column(name="x", kind="boolean"),))
    codes = group_codes(pd.DataFrame({"x": [True, False]}), schema.sensitive)
    strata = Strata([codes], schema)
    assert [str(group) for group in strata.groups] == ["all"]
    assert strata.rows(codes)[0].tolist() == [0, 1]
    assert strata.by == {}
    assert len(strata.cells([strata.patients(codes, np.array([True, False]), np.arange(2))]).families) == 0


def test_patients_are_counted_once_per_label(clinic_schema: TableSchema) -> None:
    codes = np.array([[0, 0], [0, 0], [0, 0], [1, 1]])
    strata = Strata([codes], clinic_schema)
    counts = strata.patients(codes, np.array([True, True, False, False]), np.array([0, 0, 0, 1]))
    assert counts.tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("num_sets", [1, 3])
def test_in_every_family_the_children_add_up_to_the_parent(num_sets: int, clinic_schema: TableSchema) -> None:
    draw = np.random.default_rng(0)
    codes = [np.stack([draw.integers(0, 3, 80), draw.integers(0, 2, 80)], axis=1) for _ in range(num_sets)]
    strata = Strata(codes, clinic_schema)
    cells = strata.cells([strata.patients(each, draw.random(80) < 0.4, np.arange(80)) for each in codes])
    assert len(cells.membership) == len(strata.groups) * (num_sets + (num_sets > 1))
    assert len(cells.families) > 0
    for parent, children in cells.families:
        assert (cells.totals[children].sum(axis=0) == cells.totals[parent]).all()

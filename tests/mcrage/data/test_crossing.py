"""What is counted is what a loop over the rows would count."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from mcrage.data.crossing import Axes, Axis, check_axes, exact_counts, from_json, shape, split_counts, to_json
from mcrage.data.marginals import num_cells
from mcrage.data.schema import TableSchema
from mcrage.errors import MessageError

Rows = Callable[..., pd.DataFrame]

WARD = Axis("ward", (0, 0, 1, 2))  # medical and surgical, elsewhere, missing
TABLES: list[Axes] = [(Axis("sex"), Axis("died")), (Axis("age"), WARD), (WARD,), ()]


def test_cells_are_those_of_a_loop_over_rows(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    rows = clinic_rows(300, 1)
    rows.loc[:20, "ward"] = np.nan
    counts = exact_counts(rows, TABLES, clinic_schema)
    by_sex, by_age, by_ward, total = split_counts(counts.astype(float), TABLES, clinic_schema)
    assert [each.shape for each in (by_sex, by_age, by_ward, total)] == [(2, 2), (3, 3), (3,), ()]
    assert total == 300
    for place, sex in enumerate(("F", "M")):
        for label, died in enumerate(("no", "yes")):
            assert by_sex[place, label] == ((rows["sex"] == sex) & (rows["died"] == died)).sum()
    merged = rows["ward"].astype(object).map({"medical": 0, "surgical": 0, "elsewhere": 1}).fillna(2)
    ages = np.select([rows["age"].isna(), (rows["age"] < 65).fillna(False)], [2, 0], 1)
    for age in range(3):
        for ward in range(3):
            assert by_age[age, ward] == ((ages == age) & (merged == ward)).sum()
    np.testing.assert_array_equal(by_ward, by_age.sum(axis=0))


def test_a_row_that_is_in_no_cell_of_a_column_is_not_in_that_table(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    rows = clinic_rows(10, 1).assign(sex="X")
    by_sex, by_age, *_ = split_counts(exact_counts(rows, TABLES, clinic_schema).astype(float), TABLES, clinic_schema)
    assert (by_sex.sum(), by_age.sum()) == (0, 10)


def test_no_tables_have_no_counts(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    assert len(exact_counts(clinic_rows(3, 1), [], clinic_schema)) == 0


@pytest.mark.parametrize(
    "axis",
    [
        Axis("patient"),
        Axis("nobody"),
        Axis("ward", (0, 1)),
        Axis("ward", (0, 0, 2, 2)),
        Axis("ward", (-1, 0, 1, 2)),
        Axis("ward", (0, 0.5, 1, 2)),  # type: ignore[arg-type]
        Axis("ward", (0, True, 1, 2)),
    ],
    ids=["not modelled", "unknown", "too short", "gap", "negative", "fraction", "boolean"],
)
def test_what_is_no_merging_of_a_column_is_refused(axis: Axis, clinic_schema: TableSchema) -> None:
    check_axes(TABLES, clinic_schema)
    with pytest.raises(MessageError, match=r"modelled|merging"):
        check_axes([(Axis("sex"), axis)], clinic_schema)


def test_a_column_cannot_be_crossed_with_itself(clinic_schema: TableSchema) -> None:
    with pytest.raises(MessageError, match="different columns"):
        check_axes([(Axis("sex"), Axis("sex"))], clinic_schema)


def test_shapes_and_texts_follow_the_axes(clinic_schema: TableSchema) -> None:
    assert [shape(axes, clinic_schema) for axes in TABLES] == [(2, 2), (3, 3), (3,), ()]
    assert len(WARD.merged) == num_cells(clinic_schema.column("ward")) + 1
    assert shape((Axis.whole(clinic_schema.column("ward")),), clinic_schema) == (4,)
    assert to_json(TABLES[1:3]) == '[[["age", []], ["ward", [0, 0, 1, 2]]], [["ward", [0, 0, 1, 2]]]]'


def test_tables_come_back_from_their_text_and_nothing_else_does() -> None:
    assert from_json(to_json(TABLES)) == tuple(TABLES)
    for text in ("", "[1]", '[[["age", [0, 1]]] ]', '[[["age"]]]', "[[[1, []]]]", '[[["age", 3]]]', "[" * 100_000):
        with pytest.raises(MessageError, match="not the text of tables of counts"):
            from_json(text)

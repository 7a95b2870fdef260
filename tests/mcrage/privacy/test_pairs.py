"""Tables of counts that leave a site: one cell per patient and table, stated noise on every cell, noise by key."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2

from mcrage.data.crossing import Axes, Axis, exact_counts
from mcrage.data.marginals import num_cells
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import MessageError, PrivacyError
from mcrage.privacy.counts import MOST_CELLS, patient_rows
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive
from mcrage.privacy.pairs import MOST_CELLS_IN_ALL, NoisyTables, noisy_tables, tables_event

KEY = bytes(range(32))
FALSE_ALARMS = 1e-6
Rows = Callable[..., pd.DataFrame]
Release = Callable[[pd.DataFrame, TableSchema], list[NDArray[np.float64]]]

TABLES: list[Axes] = [
    (Axis("sex"), Axis("died"), Axis("frailty", (0, 1, 2, 3))),
    (Axis("age"), Axis("died"), Axis("smoker", (0, 1, 2))),
    (Axis("frailty", (0, 1, 1, 2)), Axis("smoker", (0, 1, 1))),
]


def released(table: pd.DataFrame, schema: TableSchema) -> list[NDArray[np.float64]]:
    return noisy_tables(table, schema, TABLES, noise=5.0, key=KEY).arrays


def counts_every_row(table: pd.DataFrame, schema: TableSchema) -> list[NDArray[np.float64]]:
    """A broken release: a patient is in it with all rows."""
    no_ids = schema.model_copy(update={"columns": schema.columns[1:]})
    return noisy_tables(table, no_ids, TABLES, noise=5.0, key=KEY).arrays


def follows_the_table(table: pd.DataFrame, schema: TableSchema) -> list[NDArray[np.float64]]:
    """A broken release: a column's cells are merged by what the rows are, so that one patient can move the others."""
    common = table["frailty"].mode()[0]
    merged = tuple(int(level == common) for level in (*schema.column("frailty").levels, None))
    return noisy_tables(table, schema, [(Axis("frailty", merged),)], noise=5.0, key=KEY).arrays


def changes(release: Release, schema: TableSchema, clinic_rows: Rows) -> list[float]:
    """How far, in L2, each table moves if one patient with many rows joins; the noise is the same and cancels."""
    moved = []
    for seed in range(20):
        table = clinic_rows(60, 1)
        rare = table["frailty"].value_counts().idxmin()
        newcomer = clinic_rows(60, 100 + seed).assign(patient="newcomer", frailty=rare)
        pair = zip(release(table, schema), release(pd.concat([table, newcomer]), schema), strict=True)
        moved += [float(np.linalg.norm(after - before)) for before, after in pair]
    return moved


def test_one_patient_changes_each_table_by_at_most_1(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    assert changes(released, clinic_schema, clinic_rows) == [1.0] * 60


@pytest.mark.parametrize("broken", [counts_every_row, follows_the_table], ids=["rows", "cells of the rows"])
def test_the_same_test_fails_if_rows_count_or_cells_follow_from_rows(
    broken: Release, clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    assert max(changes(broken, clinic_schema, clinic_rows)) > 1


def noise_of(sigma: float) -> NDArray[np.float64]:
    """The noise on 40,000 cells of nobody."""
    levels = tuple(f"l{number}" for number in range(100))
    schema = TableSchema(
        columns=tuple(Column(name=name, kind="categorical", categories=levels, nullable=False) for name in "ab")
    )
    axes = tuple(Axis(name, (*range(100), 99)) for name in "ab")
    nobody = pd.DataFrame({"a": [], "b": []})
    drawn = [noisy_tables(nobody, schema, [axes], noise=sigma, key=derive(KEY, part)).arrays[0] for part in range(4)]
    return np.concatenate([each.ravel() for each in drawn])


@pytest.mark.parametrize("sigma", [3.0, 37.5])
def test_noise_has_the_stated_spread(sigma: float) -> None:
    """A chi-squared test with a false alarm in 10⁶; a spread that is 5 % off is told."""
    noise = noise_of(sigma)

    def p_value(spread: float) -> float:
        total = float((noise**2).sum() / spread**2)
        return float(2 * min(chi2.cdf(total, len(noise)), chi2.sf(total, len(noise))))

    assert p_value(sigma) > FALSE_ALARMS
    assert max(p_value(1.05 * sigma), p_value(0.95 * sigma)) < FALSE_ALARMS
    assert abs(noise.mean()) < 5 * sigma / len(noise) ** 0.5


def test_the_key_decides_the_noise_and_every_release_has_its_own(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = clinic_rows(50, 1)

    def release(tables: list[Axes] = TABLES, noise: float = 5.0, key: bytes = KEY) -> NDArray[np.float64]:
        exact = exact_counts(table.iloc[patient_rows(table, clinic_schema, key=key)], tables, clinic_schema)
        noisy = noisy_tables(table, clinic_schema, tables, noise=noise, key=key)
        return np.asarray(noisy.counts.values - exact, dtype=np.float64)

    first = release()
    np.testing.assert_array_equal(first, release())
    for other in (release(key=derive(KEY, "other")), release(noise=5.5), release([*TABLES[::-1]])):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.8
        assert not np.array_equal(np.sign(first), np.sign(other))


def test_arrays_are_the_counts_in_the_shape_of_each_table(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = clinic_rows(5000, 1)
    noisy = noisy_tables(table, clinic_schema, TABLES, noise=0.5, key=KEY)
    assert isinstance(noisy, NoisyTables)
    assert [array.shape for array in noisy.arrays] == [(2, 2, 4), (3, 2, 3), (3, 2)]
    assert all(abs(array.sum() - 5000) < 20 for array in noisy.arrays)
    np.testing.assert_array_equal(np.concatenate([array.ravel() for array in noisy.arrays]), noisy.counts.values)


def test_the_event_comes_first_and_says_what_the_release_is(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    event = tables_event(clinic_schema, TABLES, noise=5.0)
    assert event == PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=5.0, steps=3)
    assert noisy_tables(clinic_rows(9, 1), clinic_schema, TABLES, noise=5.0, key=KEY).counts.event == event


def wide_schema(levels: int) -> TableSchema:
    categories = tuple(f"l{number}" for number in range(levels))
    return TableSchema(
        columns=tuple(Column(name=name, kind="categorical", categories=categories, nullable=False) for name in "ab")
    )


def test_what_would_be_noise_alone_or_take_for_ever_is_refused_before_rows_are_read() -> None:
    table: Axes = (Axis("a"), Axis("b"))
    with pytest.raises(PrivacyError, match=r"20,164 cells of a, b would hold noise alone"):
        tables_event(wide_schema(142), [table], noise=5.0)
    assert MOST_CELLS >= 141**2
    many = [table] * (MOST_CELLS_IN_ALL // 141**2 + 1)
    with pytest.raises(PrivacyError, match="cells were asked for; at most 2,000,000"):
        noisy_tables(pd.DataFrame(), wide_schema(141), many, noise=5.0, key=KEY)
    with pytest.raises(PrivacyError, match="no table"):
        tables_event(wide_schema(2), [], noise=5.0)


@pytest.mark.parametrize("noise", [0.0, -1.0, 0.2, float("nan"), float("inf")])
def test_too_little_noise_is_refused(noise: float, clinic_schema: TableSchema) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        tables_event(clinic_schema, TABLES, noise=noise)


def test_a_merging_that_is_none_of_the_schema_is_refused(clinic_schema: TableSchema) -> None:
    cells = num_cells(clinic_schema.column("frailty"))
    with pytest.raises(MessageError, match="'frailty'"):
        tables_event(clinic_schema, [(Axis("frailty", tuple(range(cells))),)], noise=5.0)

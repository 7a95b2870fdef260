from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.data.coding import (
    NumericCoding,
    cell_edges,
    has_cell_per_value,
    in_cells,
    is_coded,
    kept,
    scale_position,
    spread,
    unscale_position,
)
from mcrage.data.marginals import cell_codes, exact_cells
from mcrage.data.schema import Column
from mcrage.data.series import numeric_series

COLUMNS = [
    Column(name="linear", kind="continuous", minimum=-5, maximum=5),
    Column(name="log", kind="continuous", minimum=0, maximum=5000, decimals=1, scale="log"),
    Column(name="grid", kind="continuous", minimum=0, maximum=100, scale="quantile", grid=(1, 2, 4, 30)),
    Column(name="count", kind="integer", minimum=0, maximum=76, scale="log"),
]


@given(share=st.floats(0, 1), position=st.sampled_from(range(len(COLUMNS))))
def test_scales_are_invertible_within_the_bounds(share: float, position: int) -> None:
    column = COLUMNS[position]
    value = np.array([column.low + share * (column.high - column.low)])
    there = scale_position(value, column)
    assert 0 <= there[0] <= 1
    assert unscale_position(there, column)[0] == pytest.approx(value[0], abs=1e-6 * (column.high - column.low))


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_model_numbers_rise_with_values(column: Column) -> None:
    values = np.linspace(column.low, column.high, 200)
    density = np.random.default_rng(0).random(len(cell_edges(column)) - 1)
    for coding in (NumericCoding(column), NumericCoding(column, density)):
        assert (np.diff(coding.encode(values)) >= 0).all()


def test_few_integers_are_levels_but_not_when_groups_are_made_of_them() -> None:
    few = Column(name="x", kind="integer", minimum=0, maximum=9)
    assert is_coded(few)
    assert not is_coded(few.model_copy(update={"maximum": 90}))
    assert not is_coded(Column(name="x", kind="integer", minimum=0, maximum=9, role="sensitive", bins=(5,)))


def test_a_zero_inflated_count_comes_back_with_its_share_of_zeros() -> None:
    column = COLUMNS[3]
    draw = np.random.default_rng(0)
    values = np.where(draw.random(5000) < 0.85, 0, draw.integers(1, 20, 5000)).astype(float)
    density = np.bincount(values.astype(int), minlength=77).astype(float)
    coding = NumericCoding(column, density)
    # the model sees a standard normal; rows drawn from one decode to the same share of zeros
    z = coding.encode(values, draw.uniform(-0.5, 0.5, 5000))
    assert abs(z.std() - 1) < 0.05
    drawn = coding.decode(draw.normal(size=20_000))
    assert (drawn == 0).mean() == pytest.approx(0.85, abs=0.02)


DTYPES = {
    "integer": ["Int64", "int64", "float64", "Int16"],
    "continuous": ["float64", "float32", "Float64"],
    "date": ["datetime64[s]", "datetime64[ns]"],
}


@st.composite
def columns(draw: st.DrawFn) -> Column:
    """Any numeric column: with few or many values, rounded or not, on every scale."""
    kind: Any = draw(st.sampled_from([*DTYPES]))
    low, span = draw(st.integers(-1000, 1000)), draw(st.sampled_from([1, 9, 40, 255, 256, 5000]))
    fields: dict[str, Any] = {"minimum": low, "maximum": low + span, "dtype": draw(st.sampled_from(DTYPES[kind]))}
    if kind == "date":
        fields |= {"minimum": "1999-12-31", "maximum": str(np.datetime64("1999-12-31") + span)}
    if kind == "continuous":
        fields["decimals"] = draw(st.sampled_from([None, 0, 1, 3]))
    scale = draw(st.sampled_from(["linear", "log", "quantile"]))
    column = Column(name="x", kind=kind, **fields)
    grid = (column.low, column.low + 0.1 * span, column.high) if scale == "quantile" else ()
    return Column(name="x", kind=kind, scale=scale, grid=grid, **fields)


@settings(max_examples=300, deadline=None)
@given(column=columns(), released=st.booleans(), seed=st.integers(0, 1000))
def test_any_model_number_becomes_a_value_as_the_schema_says(column: Column, released: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    cells = draw.integers(0, 50, len(cell_edges(column)) - 1).astype(float)
    coding = NumericCoding(column, cells if released else None)
    z = np.concatenate([draw.normal(size=40) * 2, [-9.0, 9.0, 0.0]])
    values = coding.decode(z)
    assert ((column.low <= values) & (values <= column.high)).all()
    if column.step:
        assert (np.round(values, column.decimals or 0) == values).all()
    missing = draw.random(len(z)) < 0.3 if column.dtype != "int64" else None
    series = numeric_series(values, missing, column)
    assert str(series.dtype) == column.dtype
    assert series.isna().tolist() == ([False] * len(z) if missing is None else missing.tolist())


@settings(max_examples=300, deadline=None)
@given(column=columns(), seed=st.integers(0, 1000))
def test_values_come_back_from_the_cells_of_their_histogram_and_bounds_exactly(column: Column, seed: int) -> None:
    draw = np.random.default_rng(seed)
    values = column.low + draw.random(60) ** 3 * (column.high - column.low)
    values[:20], values[20:35] = column.low, column.high
    values = np.round(values, column.decimals or 0) if column.step else values
    coding = NumericCoding(column, exact_cells(pd.Series(numbers_of(values, column)), column)[:-1])
    jitter = draw.uniform(-0.499, 0.499, 60)
    back = coding.decode(coding.encode(values, jitter))
    at_bound = np.isin(values, (column.low, column.high))
    assert (back[at_bound] == values[at_bound]).all()
    assert np.allclose(back, values, atol=1e-3 * (column.high - column.low) if not column.step else 0)
    # every value lies inside the cell that counts it, wherever in its rounding interval
    edges = cell_edges(column)
    cell = np.searchsorted(edges, spread(values, column), side="right") - 1
    moved = np.searchsorted(edges, spread(values, column, jitter), side="right") - 1
    assert (moved[at_bound | bool(column.step)] == cell[at_bound | bool(column.step)]).all()
    assert (np.diff(edges) > 0).all()


def numbers_of(values: Any, column: Column) -> Any:
    return np.datetime64("1970-01-01") + values.astype("timedelta64[D]") if column.kind == "date" else values


SATURATION = Column(name="x", kind="continuous", minimum=50, maximum=100)
COST = Column(name="x", kind="continuous", minimum=0, maximum=5000, decimals=2, scale="log")


@pytest.mark.parametrize(("column", "bound"), [(SATURATION, 100.0), (COST, 0.0)], ids=["at maximum", "zero-inflated"])
def test_rows_at_a_bound_keep_their_share_however_fine_the_column_is(column: Column, bound: float) -> None:
    draw = np.random.default_rng(0)
    inside = column.low + draw.beta(2, 5, 20_000) * (column.high - column.low)
    values = np.where(draw.random(20_000) < 0.2, bound, inside)
    coding = NumericCoding(column, exact_cells(pd.Series(values), column)[:-1])
    z = coding.encode(values, draw.uniform(-0.5, 0.5, len(values)))
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
    drawn = coding.decode(draw.normal(size=20_000))
    assert (drawn == bound).mean() == pytest.approx(0.2, abs=0.01)
    assert not has_cell_per_value(column)


def test_cells_that_cut_a_rounding_interval_would_not_keep_it() -> None:
    draw = np.random.default_rng(0)
    values = np.where(draw.random(20_000) < 0.2, 0.0, 1 + draw.integers(0, 4000, 20_000))
    column = Column(name="x", kind="integer", minimum=0, maximum=5000, scale="log")
    even = unscale_position(np.linspace(0, 1, 257), column)
    cells, _ = np.histogram(values, even)
    cumulative = np.concatenate([[0], np.cumsum(cells)]) / len(values)
    drawn = np.interp(draw.random(20_000), cumulative, even).round().clip(0, 5000)
    assert abs((drawn == 0).mean() - 0.2) < 0.01  # decoding alone is fine; encoding is not
    probability = np.interp(values + draw.uniform(-0.5, 0.5, 20_000), even, cumulative)
    assert (probability[values == 0] < 1e-6).mean() > 0.3


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_value_at_a_place_in_a_cell_is_in_that_cell_and_as_the_column_keeps_it(column: Column) -> None:
    cells = np.arange(len(cell_edges(column)) - 1)
    for place in (0.001, 0.5, 0.999):
        values = in_cells(cells, np.full(len(cells), place), column)
        assert ((column.low <= values) & (values <= column.high)).all()
        np.testing.assert_array_equal(cell_codes(pd.Series(values), column), cells)
        np.testing.assert_array_equal(values, kept(values, column))

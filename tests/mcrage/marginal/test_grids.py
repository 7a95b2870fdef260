"""Columns in few cells, each large enough to stand out, none of them chosen by rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mcrage.data.schema import Column
from mcrage.marginal.grids import MOST_CELLS, Grid, affordable, affordable_square, grid

NUMBER = Column(name="x", kind="integer", minimum=0, maximum=99)
LEVELS = Column(name="x", kind="categorical", categories=("a", "b", "c", "d", "e", "f"))
SCORE = Column(name="x", kind="ordinal", categories=("0", "1", "2"))


def sums(of: Grid, cells: NDArray[np.float64]) -> list[float]:
    return [float(value) for value in of.sums(cells)]


@given(
    cells=st.lists(st.integers(0, 400), min_size=7, max_size=7),
    most=st.integers(2, 8),
    smallest=st.sampled_from([1.0, 30.0, 500.0]),
    ordered=st.booleans(),
)
def test_merged_cells_are_numbered_hold_everything_and_stand_out(
    cells: list[int], most: int, smallest: float, ordered: bool
) -> None:
    column = Column(name="x", kind="ordinal", categories=LEVELS.categories) if ordered else LEVELS
    released = np.array(cells, dtype=float)
    made = grid(released, column, most=most, smallest=smallest)
    assert set(made.merged) == set(range(made.size))
    assert made.sums(released).sum() == released.sum()
    assert made.size == 1 or made.sums(released).min() >= smallest
    shares = np.bincount(made.merged, weights=made.shares)
    np.testing.assert_allclose(shares, 1.0)
    if ordered:
        assert (np.diff(made.merged[:-1]) >= 0).all()
        assert made.size <= max(2 * most, 2)
    else:
        assert made.size <= most


def test_numbers_have_cells_of_equal_rows_where_there_are_many_and_of_equal_width_at_the_ends() -> None:
    cells = np.append(np.exp(-0.5 * ((np.arange(100) - 30) / 5) ** 2) * 1000 + 2, 0.0)
    made = grid(cells, NUMBER, most=16, smallest=1.0)
    by_rows = made.sums(cells)
    assert made.size <= 17
    assert by_rows.max() < 0.25 * cells.sum()
    assert made.merged[99] != made.merged[60], "rare high numbers are apart from usual ones"


def test_a_large_cell_is_alone_and_few_levels_stay_as_they_are() -> None:
    cells = np.array([50.0, *([5.0] * 10), 900.0, *([5.0] * 88), 0.0])
    made = grid(cells, NUMBER, most=8, smallest=20.0)
    assert made.merged.count(made.merged[11]) == 1
    rare = np.array([9700.0, 280.0, 20.0, 0.0])
    assert grid(rare, SCORE, most=4, smallest=15.0).merged == (0, 1, 2, 2)
    assert grid(rare, SCORE, most=4, smallest=30.0).merged == (0, 1, 1, 1)


def test_small_levels_are_together_and_stand_out_together() -> None:
    cells = np.array([500.0, 3.0, 200.0, 4.0, 2.0, 90.0, 0.0])
    made = grid(cells, LEVELS, most=10, smallest=50.0)
    assert sums(made, cells) == [500.0, 200.0, 99.0]
    assert made.merged == (0, 2, 1, 2, 2, 2, 2)
    assert made.shares[5] == pytest.approx(90 / 99)
    assert sums(grid(cells, LEVELS, most=2, smallest=5.0), cells) == [500.0, 299.0]
    assert sums(grid(cells, LEVELS, most=10, smallest=5.0), cells) == [500.0, 200.0, 90.0, 9.0]


@pytest.mark.parametrize("column", [NUMBER, LEVELS], ids=["number", "levels"])
def test_missing_rows_are_apart_unless_they_are_few(column: Column) -> None:
    levels = 100 if column is NUMBER else 6
    many, few = (np.array([*([60.0] * levels), missing]) for missing in (70.0, 7.0))
    apart = grid(many, column, most=9, smallest=50.0)
    assert apart.merged.count(apart.merged[-1]) == 1
    joined = grid(few, column, most=9, smallest=50.0)
    assert joined.merged.count(joined.merged[-1]) > 1
    assert joined.shares[-1] == pytest.approx(7 / joined.sums(few)[joined.merged[-1]])


def test_a_column_of_which_nothing_was_released_has_one_cell_of_equal_shares() -> None:
    made = grid(np.zeros(7), LEVELS, most=4, smallest=3.0)
    assert made.size == 1
    np.testing.assert_allclose(made.shares, 1 / 7)


def test_more_noise_affords_fewer_cells() -> None:
    assert affordable(7000, 0.0, 8) == affordable_square(7000, 0.0) == MOST_CELLS
    assert affordable(7000, 50.0, 8) == 5
    assert affordable_square(7000, 50.0) == 6
    assert affordable(7e6, 50.0, 8) == affordable_square(7e6, 50.0) == MOST_CELLS
    assert affordable(7000, float("inf"), 8) == affordable_square(7000, float("inf")) == 0

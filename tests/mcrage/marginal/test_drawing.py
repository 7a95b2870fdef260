"""Drawn cells and values have the model's probabilities, and are what was asked for."""

import numpy as np
import pandas as pd
import pytest

from mcrage.data.marginals import Marginals, cell_codes
from mcrage.data.schema import Column, TableSchema
from mcrage.marginal.drawing import draw_conditions, draw_rows, draw_values
from mcrage.marginal.grids import Grid
from mcrage.marginal.model import ColumnModel, MarginalModel

AGE = Column(name="age", kind="integer", role="sensitive", minimum=0, maximum=99, bins=(50,))
LAB = Column(name="lab", kind="continuous", minimum=0, maximum=20, decimals=1)
WARD = Column(name="ward", kind="categorical", categories=("a", "b", "c"))
ILL = Column(name="ill", kind="boolean", role="target", nullable=False)
SCHEMA = TableSchema(columns=(LAB, AGE, WARD, ILL))


def model() -> MarginalModel:
    """Ages of a bin are all alike; the ward follows the group, the lab the ward."""
    ages = np.zeros(101)
    ages[[10, 20, 60]] = [30.0, 10.0, 40.0]
    wards, labs = np.array([30.0, 10.0, 0.0, 40.0]), np.zeros(202)
    labs[[5, 15, 150, 201]] = [20.0, 60.0, 10.0, 10.0]
    marginals = Marginals({"age": ages, "lab": labs, "ward": wards, "ill": np.array([70.0, 30.0, 0.0])})
    ward = Grid.of(WARD, (0, 0, 1, 1), wards)
    lab = Grid.of(LAB, tuple(np.repeat([0, 1], [100, 102]).tolist()), labs)
    groups = np.array([[0.2, 0.2], [0.3, 0.2], [0.1, 0.0]], dtype=np.float32)
    given = np.array([[[0.9, 0.1]] * 2, [[0.2, 0.8]] * 2, [[1.0, 0.0]] * 2], dtype=np.float32)
    after = np.broadcast_to(np.array([[0.7, 0.3], [0.0, 1.0]], dtype=np.float32), (3, 2, 2, 2))
    return MarginalModel(marginals, groups, (ColumnModel(ward, -1, given), ColumnModel(lab, 0, after)))


def drawn(rows: int, asked: tuple[int, int] = (-1, -1)) -> pd.DataFrame:
    return draw_rows(model(), np.array([asked] * rows), SCHEMA, np.random.default_rng(0))


def test_rows_have_the_probabilities_of_the_model() -> None:
    model().check(SCHEMA)
    rows = drawn(40_000)
    assert list(rows.columns) == ["lab", "age", "ward", "ill"]
    assert rows["age"].isna().mean() == pytest.approx(0.1, abs=0.01)
    assert (rows["age"] < 50).mean() == pytest.approx(0.4 / 0.9, abs=0.01)
    assert rows["ill"].mean() == pytest.approx(0.4, abs=0.01)
    young = rows[(rows["age"] < 50).fillna(False)]
    assert (young["ward"] == "a").mean() == pytest.approx(0.9 * 0.75, abs=0.015), (
        "within a cell the released rows decide"
    )
    assert set(young["ward"].dropna()) == {"a", "b"}, "the level that nobody has is drawn nowhere"
    assert young["ward"].isna().mean() == pytest.approx(0.1, abs=0.01)
    of_a = rows[rows["ward"] == "a"]
    assert (of_a["lab"] < 10).mean() == pytest.approx(0.7, abs=0.01)
    others = rows[rows["ward"].isna()]
    assert set(others["lab"].dropna()) == {15.0}
    assert others["lab"].isna().mean() == pytest.approx(0.5, abs=0.02)


def test_numbers_lie_in_their_bin_as_the_histogram_has_them() -> None:
    young, old = (drawn(2000, (code, -1))["age"] for code in (0, 1))
    assert young.between(0, 49).all()
    assert old.between(50, 99).all()
    assert (young == 10).mean() == pytest.approx(0.75, abs=0.03)
    assert (old == 60).mean() > 0.99
    assert drawn(20, (2, -1))["age"].isna().all()


def test_numbers_of_which_nothing_was_released_are_spread_over_their_bin() -> None:
    empty = Marginals(dict(model().marginals) | {"age": np.zeros(101)})
    nothing = MarginalModel(empty, model().groups, model().columns)
    rows = draw_rows(nothing, np.array([(1, -1)] * 500), SCHEMA, np.random.default_rng(0))
    assert rows["age"].between(50, 99).all()
    assert rows["age"].nunique() > 30


def test_open_attributes_follow_from_those_that_were_asked_for() -> None:
    groups = model().groups
    asked = np.array([(-1, 1)] * 3000 + [(0, -1)] * 3000 + [(2, 1)] * 5)
    conditions = draw_conditions(groups, asked, np.random.default_rng(0))
    levels = np.stack(np.unravel_index(conditions, groups.shape), axis=1)
    assert np.array_equal(levels[asked >= 0], asked[asked >= 0])
    np.testing.assert_allclose(np.bincount(levels[:3000, 0], minlength=3) / 3000, [0.5, 0.5, 0.0], atol=0.03)
    assert levels[3000:6000, 1].mean() == pytest.approx(0.5, abs=0.03)


def test_values_are_in_the_cells_that_were_drawn() -> None:
    grid = model().columns[1].grid
    cells = np.repeat([0, 1], 500)
    values = draw_values(grid, cells, np.random.default_rng(0))
    np.testing.assert_array_equal(np.array(grid.merged)[cell_codes(values, LAB)], cells)


def test_no_rows_are_drawn_where_none_were_asked_for() -> None:
    rows = draw_rows(model(), np.zeros((0, 2), dtype=np.int64), SCHEMA, np.random.default_rng(0))
    assert rows.shape == (0, 4)
    assert rows.dtypes.to_dict() == drawn(3).dtypes.to_dict()

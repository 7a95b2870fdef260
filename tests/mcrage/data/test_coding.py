import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrage.data.coding import NumericCoding, cell_edges, is_coded, scale_position, unscale_position
from mcrage.data.schema import Column

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

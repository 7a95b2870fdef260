import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.data.marginals import Marginals, exact_cells, merge_small_cells, num_cells
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import MessageError

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "age", "kind": "integer", "minimum": 0, "maximum": 120},
            {"name": "race", "kind": "categorical", "categories": ["a", "b", "c"]},
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 10},
        ]
    }
)
LEVELS = Column(name="x", kind="categorical", categories=("a", "b", "c", "d", "e"))
NUMBER = Column(name="x", kind="integer", minimum=0, maximum=4)


def make_table(rows: int, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "age": pd.array(draw.integers(0, 121, rows), dtype="Int64"),
            "race": pd.Categorical.from_codes(draw.integers(0, 3, rows), categories=["a", "b", "c"]),
            "lab": np.where(draw.random(rows) < 0.1, np.nan, draw.random(rows) * 10),
        }
    )


@settings(max_examples=300)
@given(counts=st.lists(st.integers(0, 40), min_size=6, max_size=6), is_number=st.booleans())
def test_no_released_cell_stands_for_one_to_ten_rows(counts: list[int], is_number: bool) -> None:
    cells = np.array(counts, dtype=float)
    merged = merge_small_cells(cells, NUMBER if is_number else LEVELS, 11)
    # equal neighbours in the release are one merged cell: each such sum is 0 or at least 11, or all are the same 5
    # that stands for every small level beside a large one
    for value in set(merged[:-1]) - {0.0}:
        assert value * (merged[:-1] == value).sum() >= 11 - 1e-9 or value == 5
    assert merged[-1] == 0 or merged[-1] >= 11
    assert merged.sum() == pytest.approx(cells.sum()) or cells.sum() - merged.sum() < 11 * 2


@settings(max_examples=300)
@given(
    large=st.integers(21, 400),
    small=st.integers(1, 10),
    moved=st.integers(1, 10),
    kind=st.sampled_from(["categorical", "ordinal"]),
)
def test_how_small_a_small_level_is_cannot_be_told_from_the_release(
    large: int, small: int, moved: int, kind: str
) -> None:
    column = Column(name="x", kind=kind, categories=("a", "b"))  # type: ignore[arg-type]
    one = merge_small_cells(np.array([large - small, small, 0.0]), column, 11)
    other = merge_small_cells(np.array([large - moved, moved, 0.0]), column, 11)
    assert one.tolist() == other.tolist() == [large - 5, 5, 0]


@given(counts=st.lists(st.integers(11, 400), min_size=6, max_size=6))
def test_large_cells_are_released_as_they_are(counts: list[int]) -> None:
    cells = np.array(counts, dtype=float)
    assert merge_small_cells(cells, LEVELS, 11).tolist() == counts


def test_a_table_with_fewer_rows_than_a_cell_may_have_releases_nothing() -> None:
    marginals = Marginals.of(make_table(10), SCHEMA)
    assert all(cells.sum() == 0 for cells in marginals.values())


def test_histograms_of_sites_add_up_to_about_the_histogram_of_their_pool() -> None:
    sites = [make_table(700, seed) for seed in range(8)]
    summed = Marginals.of(sites[0], SCHEMA)
    for table in sites[1:]:
        summed = summed + Marginals.of(table, SCHEMA)
    pool = pd.concat(sites)
    for column in SCHEMA.modelled:
        exact = exact_cells(pool[column.name], column)
        difference = np.abs(np.cumsum(summed[column.name]) - np.cumsum(exact)).max()
        assert difference / len(pool) < 0.02, column.name


def test_the_wire_form_gives_the_same_histograms() -> None:
    marginals = Marginals.of(make_table(300), SCHEMA)
    back = Marginals.from_wire(marginals.to_wire(), SCHEMA)
    assert all((back[name] == marginals[name]).all() for name in marginals)
    assert len(back["lab"]) == num_cells(SCHEMA.column("lab")) + 1


@pytest.mark.parametrize("cells", [[1.0], [float("nan")] * 4, [-1.0, 5, 5, 5], [float("inf")] * 4])
def test_histograms_of_another_shape_or_with_impossible_counts_are_refused(cells: list[float]) -> None:
    wire = Marginals.of(make_table(300), SCHEMA).to_wire() | {"race": cells}
    with pytest.raises(MessageError, match="histogram of column 'race'"):
        Marginals.from_wire(wire, SCHEMA)


def test_histograms_of_other_columns_are_refused() -> None:
    with pytest.raises(MessageError, match="expected histograms of 3 columns"):
        Marginals.from_wire({"age": []}, SCHEMA)
    with pytest.raises(MessageError, match="cannot be added"):
        _ = Marginals({"a": np.zeros(2)}) + Marginals({"b": np.zeros(2)})


def test_the_tail_of_a_number_falls_on_instead_of_reaching_the_bound() -> None:
    column = Column(name="x", kind="integer", minimum=0, maximum=100)
    visits = pd.Series(np.random.default_rng(0).geometric(0.7, 700) - 1)
    cells = exact_cells(visits, column)
    merged = merge_small_cells(cells, column, 11)
    values = np.arange(101)
    mean = (merged[:-1] * values).sum() / merged.sum()
    spread = np.sqrt((merged[:-1] * (values - mean) ** 2).sum() / merged.sum())
    assert mean == pytest.approx(visits.mean(), rel=0.1)
    assert spread == pytest.approx(visits.std(), rel=0.2)
    assert merged.sum() == pytest.approx(700)


def test_how_a_tail_falls_depends_on_released_numbers_alone() -> None:
    column = Column(name="x", kind="integer", minimum=0, maximum=50)
    tails = [np.zeros(52), np.zeros(52)]
    for cells, places in zip(tails, ((2, 3, 4, 40), (20, 21, 22, 23)), strict=True):
        cells[:2] = 300, 60
        cells[2] += 12  # the last cell that may be shown on its own
        for place in places:
            cells[place] += 2
    released = [merge_small_cells(cells, column, 11) for cells in tails]
    first_run = [cells[2] for cells in tails]
    assert first_run == [14, 12]
    # runs differ where the cell that closes them differs; everything behind it is the same sum, shared the same way
    assert released[0][3:].sum() + released[0][2] == pytest.approx(released[1][3:].sum() + released[1][2])
    assert (np.diff(released[0][2:-1]) <= 0).all()
    assert (np.diff(released[1][2:-1]) <= 0).all()


FINE = [
    Column(name="x", kind="continuous", minimum=0, maximum=10),
    Column(name="x", kind="integer", minimum=0, maximum=90_000, scale="log"),
    Column(name="x", kind="integer", minimum=0, maximum=60),
]


@pytest.mark.parametrize("column", FINE, ids=["unrounded", "fine", "a cell per value"])
def test_a_large_bound_keeps_its_rows_beside_cells_that_hardly_anybody_is_in(column: Column) -> None:
    for bound in (0, -2):  # the first cell, and the last before that of the missing rows
        cells = np.zeros(num_cells(column) + 1)
        cells[20:23] = 100
        cells[[5, -8]] = 4
        cells[bound] = 300
        merged = merge_small_cells(cells, column, 11)
        assert abs(merged[bound] - 300) <= 10
        assert merged.sum() == pytest.approx(cells.sum())


def test_the_cell_of_a_bound_alone_is_released_as_empty_when_it_is_small() -> None:
    cells = np.zeros(num_cells(FINE[0]) + 1)
    cells[[0, -2]] = 4
    cells[[3, -6]] = 12
    merged = merge_small_cells(cells, FINE[0], 11)
    assert merged[0] == merged[-2] == 0
    assert merged.sum() == pytest.approx(32)


@given(
    small=st.integers(1, 10),
    other=st.integers(1, 10),
    large=st.integers(40, 400),
    side=st.sampled_from(["before", "after"]),
    column=st.sampled_from(FINE),
)
def test_how_many_rows_lie_beside_a_large_cell_cannot_be_told_from_the_release(
    small: int, other: int, large: int, side: str, column: Column
) -> None:
    place = 9 if side == "before" else num_cells(column) - 3
    released = []
    for few in (small, other):
        cells = np.zeros(num_cells(column) + 1)
        cells[place - 2 if side == "before" else place + 1] = few
        cells[place] = large - few
        released.append(merge_small_cells(cells, column, 11))
    assert released[0].tolist() == released[1].tolist()
    assert released[0][place] == large - 5

"""No hidden cell of 1 to minimum − 1 patients follows from what is shown: checked by listing every possible table."""

from collections.abc import Iterator

import numpy as np
import pytest

from mcrage.data.schema import Column, TableSchema
from mcrage.evaluation.strata import Strata
from mcrage.evaluation.suppression import Cells, hidden_cells

MINIMUM = 4


def cells(shape: tuple[int, ...], draw: np.random.Generator, *, highest: int, num_sets: int = 1) -> Cells:
    """Random counts over one or two sensitive features at one or more hospitals."""
    columns = tuple(
        Column(name=f"f{i}", kind="categorical", role="sensitive", categories=tuple(map(str, range(k))), nullable=False)
        for i, k in enumerate(shape)
    )
    codes = np.stack([axis.ravel() for axis in np.indices(shape)], axis=1)
    strata = Strata([codes], TableSchema(columns=columns))
    return strata.cells([draw.integers(0, highest, (len(codes), 2)) for _ in range(num_sets)])


def tables(membership: np.ndarray, totals: np.ndarray) -> Iterator[np.ndarray]:
    """Every table of counts ≥ 0 that has these totals, by depth-first search."""
    num_atoms = membership.shape[1]
    last = [np.flatnonzero(row).max(initial=-1) for row in membership]
    table = np.zeros(num_atoms, dtype=int)

    def fill(atom: int, left: np.ndarray) -> Iterator[np.ndarray]:
        if atom == num_atoms:
            yield table.copy()
            return
        limits = left[membership[:, atom]]
        # a count that nothing shown bounds is tried up to 2: two values are enough
        for count in range(limits.min() + 1 if len(limits) else 3):
            rest = left - count * membership[:, atom]
            if not any(end == atom and rest[i] for i, end in enumerate(last)):
                table[atom] = count
                yield from fill(atom + 1, rest)

    return fill(0, totals)


def solved(found: Cells, hidden: np.ndarray) -> int:
    """Small hidden cells that have one value in every table that agrees with what is shown."""
    count = 0
    known = found.membership[~hidden]
    for label in (0, 1):
        small = hidden & (found.totals[:, label] > 0) & (found.totals[:, label] < MINIMUM)
        ranges = {cell: set() for cell in np.flatnonzero(small)}
        for table in tables(known, known @ found.counts[:, label]):
            for cell, values in ranges.items():
                values.add(int(found.membership[cell] @ table))
            if all(len(values) > 1 for values in ranges.values()):
                break
        count += sum(len(values) == 1 for values in ranges.values())
    return count


CASES = [
    ((4,), 1, 120),
    ((3,), 2, 60),
    ((2, 2), 1, 120),
    ((2, 3), 1, 60),
    ((3, 3), 1, 9),
    ((2,), 3, 60),
    ((2, 2), 2, 9),
]


@pytest.mark.parametrize(("shape", "num_sets", "trials"), CASES)
def test_no_small_cell_can_be_solved_for(shape: tuple[int, ...], num_sets: int, trials: int) -> None:
    draw = np.random.default_rng(11)
    for trial in range(trials):
        found = cells(shape, draw, highest=(5, 8, 14)[trial % 3], num_sets=num_sets)
        assert solved(found, hidden_cells(found, minimum=MINIMUM)) == 0


def test_hiding_small_cells_alone_could_be_solved() -> None:
    draw = np.random.default_rng(11)
    exposed = 0
    for _ in range(60):
        found = cells((2, 3), draw, highest=14)
        exposed += solved(found, (found.totals < MINIMUM).any(axis=1)) > 0
    assert exposed > 20


def one_feature(*counts: tuple[int, int]) -> Cells:
    codes = np.arange(len(counts))[:, None]
    names = tuple(map(str, range(len(counts))))
    column = Column(name="race", kind="categorical", role="sensitive", categories=names, nullable=False)
    return Strata([codes], TableSchema(columns=(column,))).cells([np.array(counts)])


def test_large_groups_are_all_shown() -> None:
    assert not hidden_cells(one_feature((50, 60), (11, 300), (40, 11))).any()


def test_a_single_small_group_takes_the_next_smallest_with_it() -> None:
    hidden = hidden_cells(one_feature((500, 600), (40, 30), (100, 90), (4, 50)))
    assert hidden.tolist() == [False, False, True, False, True]


def test_few_patients_without_the_event_hide_a_group_too() -> None:
    assert hidden_cells(one_feature((500, 600), (40, 30), (500, 10))).tolist() == [False, False, True, True]


def test_small_groups_that_add_up_to_a_small_number_take_another_with_them() -> None:
    hidden = hidden_cells(one_feature((500, 600), (40, 30), (3, 50), (4, 50)))
    assert hidden.tolist() == [False, False, True, True, True]


def test_zero_may_be_worked_out() -> None:
    assert hidden_cells(one_feature((500, 600), (400, 300), (0, 40))).tolist() == [False, False, False, True]


def test_a_hospital_that_alone_hides_groups_takes_the_smallest_other_one_with_it() -> None:
    draw = np.random.default_rng(0)
    found = cells((2,), draw, highest=5, num_sets=3)
    large = Cells(counts=found.counts * 0 + [[50, 50], [5, 50], [50, 50], [30, 30], [50, 50], [40, 40]],
                  membership=found.membership, families=found.families, num_blocks=4)  # fmt: skip
    hidden = hidden_cells(large).reshape(4, 3)
    assert hidden.tolist() == [[False, True, True], [False, True, True], [False, False, False], [False, False, False]]


def test_linear_combinations_across_families_are_found() -> None:
    # two cells a + b and b + c with a + b + c give every one of the three away, though no family does
    membership = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    found = Cells(counts=np.array([[30, 30], [4, 40], [30, 30]]), membership=membership, families=())
    hidden = hidden_cells(found)
    assert hidden[4]
    assert np.linalg.matrix_rank(membership[~hidden]) < np.linalg.matrix_rank(membership[~hidden | (np.arange(6) == 4)])

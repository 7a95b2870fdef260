"""One-way histograms of a site's table: the one statistic that sites release so that numbers can be spread well.

No count from 1 to 10 is in the release, nor can one be worked out: small cells are merged until at least
:data:`~mcrage.data.groups.MINIMUM_CELL` rows stand behind what is said of them, and the sum is shared out by a rule
that everybody knows. Sums over sites are histograms again. Nothing else about single columns ever leaves a site.

Shape: per modelled column one vector of cells: the levels or the numeric cells, then the missing rows.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.coding import cell_edges, has_cell_per_value, is_coded, spread
from mcrage.data.groups import MINIMUM_CELL, level_codes, numbers
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import MessageError

Floats = NDArray[np.float64]


class Marginals(Mapping[str, Floats]):
    """Rows per cell, by column name."""

    def __init__(self, cells: Mapping[str, Floats]) -> None:
        self._cells = {name: np.asarray(counts, dtype=np.float64) for name, counts in cells.items()}

    @classmethod
    def of(cls, table: pd.DataFrame, schema: TableSchema, *, minimum: int = MINIMUM_CELL) -> "Marginals":
        """Histograms of a table in which cells of fewer than ``minimum`` rows are merged."""
        return cls({c.name: merge_small_cells(exact_cells(table[c.name], c), c, minimum) for c in schema.modelled})

    def __add__(self, other: "Marginals") -> "Marginals":
        if {n: len(v) for n, v in self.items()} != {n: len(v) for n, v in other.items()}:
            raise MessageError("histograms of different schemas cannot be added")
        return Marginals({name: cells + other[name] for name, cells in self.items()})

    def to_wire(self) -> dict[str, list[float]]:
        """Plain lists, by column name."""
        return {name: [float(count) for count in cells] for name, cells in self.items()}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any], schema: TableSchema, *, noisy: bool = False) -> "Marginals":
        """Checks every name, length and sign; noisy counts may be negative.

        Raises:
            MessageError: If the histograms are not those of ``schema``.
        """
        expected = {column.name: num_cells(column) + 1 for column in schema.modelled}
        if set(wire) != set(expected):
            raise MessageError(f"expected histograms of {len(expected)} columns of the schema, got {len(wire)}")
        cells = {}
        for name, length in expected.items():
            counts = np.asarray(wire[name], dtype=np.float64)
            if counts.shape != (length,) or not np.isfinite(counts).all() or (not noisy and (counts < 0).any()):
                sign = "" if noisy else " of at least 0"
                raise MessageError(f"histogram of column '{name}': expected {length} finite counts{sign}")
            cells[name] = counts
        return cls(cells)

    def __getitem__(self, name: str) -> Floats:
        return self._cells[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


def num_cells(column: Column) -> int:
    """Number of cells of a column, without that of the missing rows."""
    return len(coded_levels(column)) if is_coded(column) else len(cell_edges(column)) - 1


def coded_levels(column: Column) -> tuple[str, ...]:
    """Levels of a column that is modelled as levels, without *missing*."""
    if column.is_numeric:
        return tuple(str(value) for value in range(int(column.low), int(column.high) + 1))
    return column.levels


def cell_codes(values: pd.Series, column: Column) -> NDArray[np.int64]:
    """Cell of each row; missing rows get the last code."""
    missing = num_cells(column)
    if not column.is_numeric:
        return level_codes(values, column, missing)
    floats = numbers(values, column)
    present = np.clip(np.nan_to_num(floats, nan=column.low), column.low, column.high)
    if is_coded(column):
        codes = np.round(present - column.low).astype(np.int64)
    else:
        inside = np.searchsorted(cell_edges(column), spread(present, column), side="right") - 1
        codes = np.clip(inside, 0, missing - 1)
    return np.where(np.isnan(floats), missing, codes)


def exact_cells(values: pd.Series, column: Column) -> Floats:
    """Exact rows per cell. For use inside a site or on generated rows: this is what must not leave."""
    return np.bincount(cell_codes(values, column), minlength=num_cells(column) + 1).astype(np.float64)


def without_negatives(cells: NDArray[np.integer] | Floats) -> Floats:
    """The nearest cells, in squares, that are not negative and have the same sum, or 0 (Duchi et al., 2008)."""
    total = max(int(cells.sum()), 0)
    falling = np.sort(cells)[::-1]
    shifts = (np.cumsum(falling) - total) / np.arange(1, len(cells) + 1)
    shift = shifts[np.flatnonzero(falling > shifts)[-1]] if total else falling[0]
    return np.asarray(np.maximum(cells - shift, 0.0))


def readable(
    noisy: NDArray[np.integer] | Floats, column: Column, *, deviation: float, minimum: int = MINIMUM_CELL
) -> Floats:
    """Noisy cells of a column as a histogram: no negative ones, small ones merged.

    Negative counts become 0 and all others of the column lose the same, so that its total stays. Numbers are merged
    until a cell has three times the noise: of hundreds of cells most say less than nothing.

    Args:
        noisy: Its cells, whole numbers.
        column: The column.
        deviation: Standard deviation of the noise on each cell; 0 for none.
        minimum: Cells with fewer, by their noisy counts, are merged.
    """
    smallest = max(minimum, math.ceil(3 * deviation)) if column.is_numeric else minimum
    return merge_small_cells(without_negatives(noisy), column, smallest)


def merge_small_cells(cells: Floats, column: Column, minimum: int) -> Floats:
    """Merges cells until each merged one stands for ``minimum`` rows, and shares its rows out.

    Cells of numbers and of ordered levels merge with their neighbours; levels without order with those nearest in size.
    Numbers are given equal shares, but the last cells of a number fall on from the cell before them: even shares up to
    the bound would make a dozen admissions a year as common as three, and the cell of a bound alone is given nothing
    unless it is large. What is small and had to be merged with a large cell is given half of ``minimum``, and the
    large one the rest: equal shares would call a rare finding a common one. If the missing rows are too few to show,
    they join the largest run. A table with fewer rows than ``minimum`` gives zeros.
    """
    present, missing = cells[:-1], float(cells[-1])
    has_order = column.is_numeric or column.kind == "ordinal"
    runs = _runs(present, np.arange(len(present)) if has_order else np.argsort(present, kind="stable"), minimum)
    sums = [float(present[run].sum()) for run in runs]
    if missing < minimum:
        sums[int(np.argmax(sums))] += missing
        missing = 0.0
    merged = np.zeros(len(cells))
    for run, rows in zip(runs, sums, strict=True):
        if rows < minimum:
            continue
        if is_coded(column):
            merged[run] = _shared(rows, present[run] < minimum, minimum)
        else:
            open_, is_tail = _open_cells(run, present, column, minimum), len(present) - 1 in run
            before = merged[open_[0] - 1] if is_tail and open_[0] else 0.0
            merged[open_] = _dealt(rows, present[open_] >= minimum, minimum, before=before)
    merged[-1] = missing
    return merged


def _shared(rows: float, small: NDArray[np.bool_], minimum: int) -> Floats:
    """The rows of a run by cell: of the counts in it nothing enters but which of them are small."""
    little = float(minimum // 2)
    left = rows - little * small.sum()
    if not small.any() or left < minimum * (~small).sum() or small.all():
        return np.full(len(small), rows / len(small))
    return np.where(small, little, left / (~small).sum())


def _open_cells(run: NDArray[np.int64], present: Floats, column: Column, minimum: int) -> NDArray[np.int64]:
    """The cells of a number's run that its rows are shared out to: without those of a bound alone unless large."""
    if has_cell_per_value(column):
        return run
    inner = (run > 0) & (run < len(present) - 1)
    return run[inner | (present[run] >= minimum)] if inner.any() else run


def _dealt(rows: float, is_large: NDArray[np.bool_], minimum: int, *, before: float) -> Floats:
    """The rows of a number's run by cell: of the counts in it nothing enters but which cell is large, if one is.

    Args:
        rows: Rows of the run.
        is_large: Whether a cell has at least ``minimum`` rows of its own; at most one does.
        minimum: Fewest rows that may be told.
        before: Released rows of the cell before the run if it is the last one, from which it falls on; else 0.
    """
    little, place = float(minimum // 2), int(np.argmax(is_large))
    sides = (place, len(is_large) - place - 1)
    left = rows - little * np.count_nonzero(sides)
    if not is_large.any() or left < minimum:
        return _falling(rows, len(is_large), before)
    # cells follow a large one in the same run only at the end of the column
    return np.concatenate([_falling(little, sides[0], 0.0), [left], _falling(little, sides[1], left)])


def _falling(rows: float, cells: int, before: float) -> Floats:
    """The rows of a number's run: a geometric fall from the released rows of the cell before it, else equal shares."""
    if not rows < before * cells:
        return np.full(cells, rows / max(cells, 1))
    powers = np.arange(1, cells + 1)
    low, high = 0.0, 1.0
    for _ in range(50):
        ratio = (low + high) / 2
        low, high = (low, ratio) if before * (ratio**powers).sum() > rows else (ratio, high)
    shares = high**powers
    return np.asarray(rows * shares / shares.sum())


def _runs(present: Floats, order: NDArray[np.int64], minimum: int) -> list[NDArray[np.int64]]:
    """Consecutive cells in ``order``, joined until a run is empty or has at least ``minimum`` rows."""
    runs: list[list[int]] = []
    rows: list[float] = []
    for cell in order:
        if rows and 0 < rows[-1] < minimum:
            runs[-1].append(int(cell))
            rows[-1] += present[cell]
        else:
            runs.append([int(cell)])
            rows.append(float(present[cell]))
    while len(runs) > 1 and 0 < rows[-1] < minimum:
        tail, tail_rows = runs.pop(), rows.pop()
        runs[-1] += tail
        rows[-1] += tail_rows
    return [np.array(run) for run in runs]

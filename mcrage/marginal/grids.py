"""How many cells a column has in tables of counts, and which: few enough that each stands out of the noise.

Cells come from the schema and from released histograms alone.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcrage.data.schema import Column

Floats = NDArray[np.float64]

MOST_CELLS = 8
"""Most cells of a column in a table of counts, about. More of them say less about the label to whoever learns from
thousands of rows, even where there is next to no noise (``docs/privacy-budget.md``)."""

STANDS_OUT = 3.0
"""A cell should hold this many times the noise on it."""


@dataclass(frozen=True)
class Grid:
    """A column's merged cells.

    Attributes:
        column: Its place in the schema.
        merged: For each cell of its histogram, *missing* last, the merged cell that it is in.
        shares: For each cell of the histogram its share of its merged cell.
    """

    column: Column
    merged: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, column: Column, merged: tuple[int, ...], cells: Floats) -> "Grid":
        """A grid with the shares that released rows have; equal shares in a merged cell without any."""
        sums = np.bincount(merged, weights=cells)[np.array(merged)]
        even = 1.0 / np.bincount(merged)[np.array(merged)]
        return cls(column, merged, tuple(np.where(sums > 0, cells / np.where(sums > 0, sums, 1.0), even).tolist()))

    @property
    def size(self) -> int:
        """Number of merged cells."""
        return max(self.merged) + 1

    def sums(self, cells: Floats) -> Floats:
        """Rows in each merged cell, from rows in each cell of the histogram."""
        return np.asarray(np.bincount(self.merged, weights=cells, minlength=self.size), dtype=np.float64)


def grid(cells: Floats, column: Column, *, most: int, smallest: float) -> Grid:
    """Merged cells of a column.

    Numbers and ordered levels merge with their neighbours; of levels without order the smallest are put together.
    Missing rows have a cell of their own unless they are too few.

    Args:
        cells: Released rows in each cell of the column's histogram, *missing* last.
        column: Its place in the schema.
        most: Most merged cells, about.
        smallest: Rows that a merged cell has at least, unless the whole column has fewer.
    """
    is_split = min(cells[-1], cells[:-1].sum()) >= smallest
    merge = neighbours if has_order(column) else largest
    inner = merge(cells[:-1], most - is_split, smallest)
    last = inner.max() + 1 if is_split else inner[-1] if has_order(column) else inner[np.argmin(cells[:-1])]
    return Grid.of(column, (*inner.tolist(), int(last)), cells)


def has_order(column: Column) -> bool:
    """Whether neighbouring cells of a column's histogram are alike."""
    return column.is_numeric or column.kind == "ordinal"


def neighbours(cells: Floats, most: int, smallest: float) -> NDArray[np.int64]:
    """Runs of neighbouring cells: half of them as equal in rows, half as equal in width as there are rows for.

    Equal rows alone would put a rare finding at the end of a scale together with usual ones.
    """
    share = 0.0 if len(cells) <= most else 2 / max(most, 1)
    target, widest = share * cells.sum(), share * len(cells)
    merged = np.zeros(len(cells), dtype=np.int64)
    run, rows, width = 0, 0.0, 0
    for cell, count in enumerate(cells):
        is_full = rows >= target or width >= widest or rows + count > 1.5 * target
        if width and rows >= smallest and is_full:
            run, rows, width = run + 1, 0.0, 0
        merged[cell] = run
        rows, width = rows + count, width + 1
    if rows < smallest and run:
        merged[merged == run] = run - 1
    return merged


def largest(cells: Floats, most: int, smallest: float) -> NDArray[np.int64]:
    """The largest cells alone and the others together."""
    order = np.argsort(-cells, kind="stable")
    alone = [cell for cell in order if cells[cell] >= smallest]
    if len(alone) < len(cells) or len(cells) > most:
        alone = alone[: max(most - 1, 0)]
        rest = cells.sum() - cells[alone].sum()
        alone = alone[:-1] if rest < smallest else alone
    merged = np.full(len(cells), len(alone), dtype=np.int64)
    merged[alone] = np.arange(len(alone))
    return merged


def affordable(rows: float, noise: float, others: int) -> int:
    """Cells of a column crossed with ``others`` cells, so that the average one stands out of the noise."""
    return MOST_CELLS if noise == 0 else int(min(MOST_CELLS, rows / (STANDS_OUT * noise * others)))


def affordable_square(rows: float, noise: float) -> int:
    """Cells of each of two crossed columns, so that the average one of the table stands out of the noise."""
    return MOST_CELLS if noise == 0 else int(min(MOST_CELLS, math.sqrt(rows / (STANDS_OUT * noise))))

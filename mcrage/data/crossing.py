"""Tables of counts over several columns: what is crossed with what, said so that a site can count it by itself.

A table's axes are columns, each in the cells of its own histogram (:mod:`mcrage.data.marginals`) merged to fewer, or,
for a column that rows can be asked for by, in its group levels. Which cells there are never depends on rows.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import group_codes
from mcrage.data.marginals import cell_codes, num_cells
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import MessageError


@dataclass(frozen=True)
class Axis:
    """One column of a table of counts.

    Attributes:
        column: Its name.
        merged: For each cell of the column's histogram, *missing* last, the cell of the table that it is in, numbered
            from 0. Empty: the table's cells are the column's group levels.
    """

    column: str
    merged: tuple[int, ...] = ()

    @classmethod
    def whole(cls, column: Column) -> "Axis":
        """A column in the cells of its own histogram."""
        return cls(column.name, tuple(range(num_cells(column) + 1)))

    def size(self, schema: TableSchema) -> int:
        """Number of cells along it."""
        return max(self.merged) + 1 if self.merged else len(schema.column(self.column).group_levels)

    def codes(self, rows: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
        """Cell of each row; −1 where it is in none."""
        column = schema.column(self.column)
        if not self.merged:
            return group_codes(rows, (column,))[:, 0]
        return np.array(self.merged)[cell_codes(rows[self.column], column)]


Axes = tuple[Axis, ...]


def shape(axes: Axes, schema: TableSchema) -> tuple[int, ...]:
    """Cells along each axis."""
    return tuple(axis.size(schema) for axis in axes)


def num_counts(tables: Sequence[Axes], schema: TableSchema) -> int:
    """Cells of all tables together."""
    return sum(math.prod(shape(axes, schema)) for axes in tables)


def check_axes(tables: Sequence[Axes], schema: TableSchema) -> None:
    """Raises unless each table is one of different modelled columns whose cells are merged to cells 0, 1, 2 and so on.

    Raises:
        MessageError: With the column.
    """
    columns = {column.name: column for column in schema.modelled}
    for axes in tables:
        names = [axis.column for axis in axes]
        if len(set(names)) < len(names) or not columns.keys() >= set(names):
            raise MessageError(f"a table of counts crosses different columns that are modelled, got {', '.join(names)}")
        for axis in axes:
            cells = set(axis.merged)
            if cells and (
                len(axis.merged) != num_cells(columns[axis.column]) + 1
                or any(type(cell) is not int for cell in axis.merged)
                or cells != set(range(len(cells)))
            ):
                raise MessageError(f"column '{axis.column}': not a merging of its cells")


def exact_counts(rows: pd.DataFrame, tables: Sequence[Axes], schema: TableSchema) -> NDArray[np.int64]:
    """Rows in every cell of all tables, one table after the other. It must not leave a site.

    A row that is in no cell of one of a table's columns is not in that table.
    """
    codes = {axis: axis.codes(rows, schema) for axes in tables for axis in axes}
    counts = [np.zeros(0, dtype=np.int64)]
    for axes in tables:
        cells, known = np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool)
        for axis in axes:
            cells = cells * axis.size(schema) + codes[axis]
            known &= codes[axis] >= 0
        counts.append(np.bincount(cells[known], minlength=math.prod(shape(axes, schema))))
    return np.concatenate(counts)


def split_counts(values: NDArray[np.float64], tables: Sequence[Axes], schema: TableSchema) -> list[NDArray[np.float64]]:
    """One array per table, in its shape."""
    shapes = [shape(axes, schema) for axes in tables]
    parts = np.split(np.asarray(values, dtype=np.float64), np.cumsum([math.prod(each) for each in shapes])[:-1])
    return [part.reshape(each) for part, each in zip(parts, shapes, strict=True)]


def to_json(tables: Sequence[Axes]) -> str:
    """Canonical text: the same tables always give the same bytes."""
    return json.dumps([[[axis.column, list(axis.merged)] for axis in axes] for axes in tables])


def from_json(text: str) -> tuple[Axes, ...]:
    """The tables of :func:`to_json`; whether a schema has them is not known yet (:func:`check_axes`).

    Raises:
        MessageError: If the text is anything else.
    """
    try:
        content = json.loads(text)
        tables = tuple(tuple(Axis(column, tuple(merged)) for column, merged in axes) for axes in content)
        named = all(isinstance(axis.column, str) for axes in tables for axis in axes)
        if named and to_json(tables) == text:  # the canonical text alone: one question has one spelling
            return tables
    except (TypeError, ValueError, RecursionError):
        pass
    raise MessageError("not the text of tables of counts")

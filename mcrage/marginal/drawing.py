"""Rows drawn from the marginal model."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from mcrage.data.coding import NumericCoding, in_cells, is_coded
from mcrage.data.groups import bin_range
from mcrage.data.marginals import Marginals, num_cells
from mcrage.data.schema import Column, TableSchema
from mcrage.data.series import level_series, numeric_series
from mcrage.marginal.grids import Grid
from mcrage.marginal.model import MarginalModel, Probabilities

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]


def draw_rows(model: MarginalModel, asked: Codes, schema: TableSchema, generator: np.random.Generator) -> pd.DataFrame:
    """Rows with the schema's modelled columns.

    Args:
        model: Distributions of cells.
        asked: Group level of each attribute, −1 where open; shape (rows, attributes).
        schema: The data dictionary.
        generator: Draws everything.
    """
    conditions = draw_conditions(model.groups, asked, generator)
    cells: list[Codes] = []
    drawn: dict[str, pd.Series] = {}
    for each in model.columns:
        given = [conditions] if each.parent < 0 else [conditions, cells[each.parent]]
        flat = each.shares.reshape(model.groups.size, *each.shares.shape[model.groups.ndim :])
        cells.append(_pick(flat[tuple(given)], generator))
        drawn[each.grid.column.name] = draw_values(each.grid, cells[-1], generator)
    levels = np.stack(np.unravel_index(conditions, model.groups.shape), axis=1) if asked.shape[1] else asked
    for place, column in enumerate(schema.attributes):
        drawn[column.name] = _attribute(levels[:, place], column, model.marginals, generator)
    return pd.DataFrame({column.name: drawn[column.name] for column in schema.modelled})


def draw_conditions(groups: Probabilities, asked: Codes, generator: np.random.Generator) -> Codes:
    """Place of a combination of group levels for each row, given those that were asked for."""
    conditions = np.zeros(len(asked), dtype=np.int64)
    numbers = np.arange(groups.size).reshape(groups.shape)
    patterns, inverse = np.unique(asked, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = np.flatnonzero(inverse.ravel() == number)
        inside = tuple(slice(None) if code < 0 else slice(code, code + 1) for code in pattern)
        shares = groups[inside].ravel()
        conditions[rows] = numbers[inside].ravel()[_pick(np.broadcast_to(shares, (len(rows), len(shares))), generator)]
    return conditions


def draw_values(grid: Grid, cells: Codes, generator: np.random.Generator) -> pd.Series:
    """Values of a column in merged cells: first a cell of its histogram by the released rows, then a place in that."""
    column = grid.column
    merged, shares = np.array(grid.merged), np.array(grid.shares)
    fine = np.zeros(len(cells), dtype=np.int64)
    for cell in np.unique(cells):
        rows, inside = np.flatnonzero(cells == cell), np.flatnonzero(merged == cell)
        fine[rows] = inside[_pick(np.broadcast_to(shares[inside], (len(rows), len(inside))), generator)]
    missing = fine == num_cells(column)
    fine[missing] = 0
    if is_coded(column):
        return level_series(fine, missing, column)
    return numeric_series(in_cells(fine, generator.random(len(fine)), column), missing, column)


def _attribute(levels: Codes, column: Column, marginals: Marginals, generator: np.random.Generator) -> pd.Series:
    """Values of an attribute: its levels, or numbers within a bin as the released histogram has them."""
    missing = column.nullable & (levels == len(column.group_levels) - 1)
    levels = np.where(missing, 0, levels)
    if not column.is_numeric:
        return level_series(levels, missing, column)
    density = marginals[column.name][:-1]
    coding = NumericCoding(column, density if density.sum() else None)
    values, place = np.zeros(len(levels)), generator.random(len(levels))
    for level in np.unique(levels):
        rows, ends = levels == level, bin_range(column, int(level))
        low, high = ndtr(coding.bounds(*ends))
        values[rows] = np.clip(coding.decode(ndtri(low + place[rows] * (high - low))), *ends)
    return numeric_series(values, missing, column)


def _pick(shares: Probabilities | Floats, generator: np.random.Generator) -> Codes:
    """A cell for each row, with probabilities proportional to the row's shares; shape (rows, cells)."""
    sums = np.cumsum(shares, axis=1, dtype=np.float64)
    place = generator.random(len(shares)) * sums[:, -1]
    return np.minimum((sums <= place[:, None]).sum(axis=1), shares.shape[1] - 1)

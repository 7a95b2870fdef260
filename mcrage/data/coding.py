"""How one numeric column becomes a number of about unit variance, and back.

Where sites released a histogram, its cumulative share and the normal quantile function give the model's number;
where they did not, the value's position between its public bounds does, on the scale that the schema names::

    value ──released histogram──► probability ──Φ⁻¹──► z        or        value ──bounds, scale──► position ──► z

Rounded columns are spread evenly over their rounding interval first, so that decoding by rounding is exact and a
column with many equal values (zero visits) is still continuous to the model. So are the two bounds of any column: rows
that sit exactly there (a saturation of 100 %, no cost) have a cell of their own and come back exactly there.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from mcrage.data.schema import Column

Floats = NDArray[np.float64]

MAX_CELLS = 256
"""Most cells of a numeric histogram."""

MAX_CODED_VALUES = 32
"""An integer column with at most this many possible values is modelled as levels, not as a number."""

_FLOOR = 1e-6  # share of probability spread evenly, so that no value is impossible and the map stays invertible
_EDGE = 1e-9  # keeps z within ±6
_MARGIN = 1e-3  # of the range: width of the cell beyond a bound that stands for the bound of an unrounded column


def is_coded(column: Column) -> bool:
    """Whether a column is modelled as levels: everything that is not a number, and integers with few values.

    A number with bins stays a number, so that a condition on a bin is a range.
    """
    if not column.is_numeric:
        return True
    return column.kind == "integer" and not column.bins and column.high - column.low < MAX_CODED_VALUES


@dataclass(frozen=True)
class NumericCoding:
    """The map of one numeric column.

    Attributes:
        column: Its place in the schema.
        density: Released share of rows in each cell of :func:`cell_edges`; None where nothing was released.
    """

    column: Column
    density: Floats | None = None

    def encode(self, values: Floats, jitter: Floats | float = 0.0) -> Floats:
        """Model numbers of values.

        Args:
            values: Numbers without NaN; those outside the bounds are moved to the nearest bound.
            jitter: Place within the rounding interval of each value, in [−.5, .5].
        """
        column = self.column
        if self.density is None:
            values = np.clip(values, column.low, column.high) + column.step * jitter
            return (2.0 * scale_position(values, column) - 1.0) * np.sqrt(3.0)
        probability = np.interp(spread(values, column, jitter), cell_edges(column), self._cumulative())
        return np.asarray(ndtri(np.clip(probability, _EDGE, 1 - _EDGE)), dtype=np.float64)

    def decode(self, z: Floats) -> Floats:
        """Values of model numbers: inside the bounds and rounded as the schema says."""
        column = self.column
        if self.density is None:
            values = unscale_position(np.clip((z / np.sqrt(3.0) + 1.0) / 2.0, 0.0, 1.0), column)
        else:
            values = np.interp(ndtr(z), self._cumulative(), cell_edges(column))
        return kept(values, column)

    def bounds(self, low: float, high: float) -> tuple[float, float]:
        """Model numbers between which every value of [low, high] lies, for conditions on a bin."""
        inside = 0.499  # of a rounding step: numbers between the ends round to values between them
        ends = self.encode(np.array([low, high]), np.array([-inside, inside]))
        return float(ends[0]), float(ends[1])

    def _cumulative(self) -> Floats:
        assert self.density is not None
        share = self.density / self.density.sum()
        return np.concatenate([[0.0], np.cumsum((1 - _FLOOR) * share + _FLOOR / len(share))])


def kept(values: Floats, column: Column) -> Floats:
    """Values as a column keeps them: rounded as the schema says, and inside the bounds."""
    if column.step:
        values = np.round(values / column.step) * column.step
        if column.decimals is not None:
            values = np.round(values, column.decimals)
    return np.asarray(np.clip(values, column.low, column.high))


def in_cells(cells: NDArray[np.int64], place: Floats, column: Column) -> Floats:
    """Values at a place within cells of the histogram.

    Args:
        cells: Cells of :func:`cell_edges`, by row.
        place: Where in each, in [0, 1).
        column: Its place in the schema.
    """
    edges = cell_edges(column)
    return kept(edges[cells] + place * (edges[cells + 1] - edges[cells]), column)


def scale_position(values: Floats, column: Column) -> Floats:
    """Position of values within the public bounds, in [0, 1], by the column's scale."""
    low, high, unit = _range(column)
    if column.scale == "log":
        return np.log1p((values - low) / unit) / np.log1p((high - low) / unit)
    if column.scale == "quantile":
        knots = _knots(column, low, high)
        return np.interp(values, knots, np.linspace(0.0, 1.0, len(knots)))
    return (values - low) / (high - low)


def unscale_position(position: Floats, column: Column) -> Floats:
    """Inverse of :func:`scale_position`."""
    low, high, unit = _range(column)
    if column.scale == "log":
        return low + unit * np.expm1(position * np.log1p((high - low) / unit))
    if column.scale == "quantile":
        knots = _knots(column, low, high)
        return np.interp(position, np.linspace(0.0, 1.0, len(knots)), knots)
    return low + position * (high - low)


def spread(values: Floats, column: Column, jitter: Floats | float = 0.0) -> Floats:
    """Values at a place within their rounding interval, or for a bound of an unrounded column within its cell.

    Args:
        values: Numbers without NaN; those outside the bounds are moved to the nearest bound.
        column: Its place in the schema.
        jitter: The place, in [−.5, .5].
    """
    values = np.clip(values, column.low, column.high)
    if column.step:
        return values + column.step * jitter
    beyond = np.where(values == column.low, jitter - 0.5, np.where(values == column.high, jitter + 0.5, 0.0))
    return np.asarray(values + _MARGIN * (column.high - column.low) * beyond, dtype=np.float64)


def has_cell_per_value(column: Column) -> bool:
    """Whether every value of a numeric column has a cell of the histogram."""
    return bool(column.step) and round((column.high - column.low) / column.step) < MAX_CELLS


def cell_edges(column: Column) -> Floats:
    """Edges of the histogram cells of a numeric column.

    A cell a value where they are few. Else cells are even on the column's scale but hold whole rounding intervals, and
    each bound has a cell of its own.
    """
    if not column.step:
        inner = unscale_position(np.linspace(0.0, 1.0, MAX_CELLS + 1), column)
        margin = _MARGIN * (column.high - column.low)
        return np.concatenate([[column.low - margin], inner, [column.high + margin]])
    num_values = round((column.high - column.low) / column.step) + 1
    steps = np.arange(num_values + 1) if has_cell_per_value(column) else _even_steps(column, num_values)
    return np.asarray(column.low + column.step * (steps - 0.5), dtype=np.float64)


def _even_steps(column: Column, num_values: int) -> Floats:
    """Rounding steps at which cells begin."""
    even = unscale_position(np.linspace(0.0, 1.0, MAX_CELLS + 1), column)
    steps = np.round((even - column.low) / column.step + 0.5)
    return np.unique(np.concatenate([np.clip(steps, 0, num_values), [1, num_values - 1]]))


def _range(column: Column) -> tuple[float, float, float]:
    """Bounds widened by half a rounding step, and the unit of the log scale."""
    low, high = column.low - column.step / 2, column.high + column.step / 2
    return low, high, column.step or (high - low) / 1000.0


def _knots(column: Column, low: float, high: float) -> Floats:
    inner = [value for value in column.grid if low < value < high]
    return np.array([low, *inner, high])

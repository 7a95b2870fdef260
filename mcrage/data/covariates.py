"""What a row says about its label, as numbers: the covariates of the label model.

A logistic model sees every number in two ways, as it is and spread to a normal one, and what lies beyond 1.5
standard deviations of the latter once more: risk often turns in the tails of a laboratory value. Ordinal levels and
integers with few values count by their rank. A missing value is 0, the mean; that it is missing is a level of its own.

Covariates are standardised by the released histograms, so that one step size serves all of them; without histograms
by what values spread evenly over the public bounds would give.

Shape: numeric parts (rows, N) and codes (rows, B) of an encoded table give (rows, :attr:`Covariates.number`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from mcrage.data.coding import NumericCoding, cell_edges
from mcrage.data.marginals import Marginals
from mcrage.data.schema import Column

Floats = NDArray[np.float64]

_TAIL = 1.5
_LIMIT = 10.0  # standard deviations; one outlier must not move a step by itself
_AT_ONCE = 8192  # rows
_RARE = 1e-3  # added to a variance: a tail that hardly anybody is in keeps a moderate weight

VIEWS: tuple[Callable[[Floats, Floats], Floats], ...] = (
    lambda value, _: value,
    lambda _, z: z,
    lambda _, z: np.maximum(z - _TAIL, 0.0),
    lambda _, z: np.maximum(-_TAIL - z, 0.0),
)
"""What is seen of a number, from its value and its normal score."""


class Covariates:
    """Numbers for the label model, from encoded rows.

    Args:
        codings: Maps of the numeric parts.
        missing: For each numeric part the block that says whether it is missing; −1 if it never is.
        ranked: Position, column and number of levels, without *missing*, of every block whose levels have an order.
        marginals: Histograms summed over sites; None standardises by the schema alone.
    """

    def __init__(
        self,
        codings: Sequence[NumericCoding],
        *,
        missing: Sequence[int],
        ranked: Sequence[tuple[int, Column, int]],
        marginals: Marginals | None,
    ) -> None:
        self._codings = list(zip(codings, missing, strict=True))
        self._ranked = [(position, levels) for position, _, levels in ranked]
        scales = [
            _moments(_views(coding, _middles(coding.column)), coding.column, marginals, is_number=True)
            for coding in codings
        ]
        scales += [
            _moments(_ranks(np.arange(levels), levels)[None], column, marginals, is_number=False)
            for _, column, levels in ranked
        ]
        self._means = np.concatenate([np.zeros(0), *(means for means, _ in scales)])
        self._deviations = np.concatenate([np.zeros(0), *(deviations for _, deviations in scales)])

    @property
    def number(self) -> int:
        """How many covariates a row has."""
        return len(self._means)

    def __call__(
        self, numeric: Float[Tensor, "rows num_numeric"], codes: Int[Tensor, "rows num_blocks"]
    ) -> Float[Tensor, "rows num_covariates"]:
        """The covariates of encoded rows: of the values that they decode to, so that rounding is the same for all."""
        z, levels = numeric.double().numpy(), codes.numpy()
        starts = range(0, max(len(z), 1), _AT_ONCE)  # several arrays of float64 are needed on the way
        return torch.cat([self._of(z[start : start + _AT_ONCE], levels[start : start + _AT_ONCE]) for start in starts])

    def _of(self, z: Floats, levels: NDArray[np.int64]) -> Float[Tensor, "rows num_covariates"]:
        parts: list[Floats] = []
        absent: list[NDArray[np.bool_]] = []
        for position, (coding, block) in enumerate(self._codings):
            parts.append(_views(coding, coding.decode(z[:, position])))
            is_missing = levels[:, block] == 1 if block >= 0 else np.zeros(len(z), dtype=bool)
            absent.append(np.tile(is_missing, (len(VIEWS), 1)))
        for position, number in self._ranked:
            parts.append(_ranks(levels[:, position], number)[None])
            absent.append(levels[None, :, position] >= number)
        rows = np.concatenate([np.zeros((0, len(z))), *parts]).T
        standardised = np.clip((rows - self._means) / self._deviations, -_LIMIT, _LIMIT)
        hidden = np.concatenate([np.zeros((0, len(z)), dtype=bool), *absent]).T
        return torch.from_numpy(np.where(hidden, 0.0, standardised)).float()


def _views(coding: NumericCoding, values: Floats) -> Floats:
    column = coding.column
    position, z = (values - column.low) / (column.high - column.low), coding.encode(values)
    return np.stack([view(position, z) for view in VIEWS])


def _ranks(codes: NDArray[np.int64], levels: int) -> Floats:
    return codes / max(levels - 1, 1)


def _middles(column: Column) -> Floats:
    edges = cell_edges(column)
    return (edges[:-1] + edges[1:]) / 2


def _moments(views: Floats, column: Column, marginals: Marginals | None, *, is_number: bool) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each view over the cells of a column."""
    cells = np.ones(views.shape[1]) if marginals is None else marginals[column.name][:-1]
    share = cells / cells.sum() if cells.sum() else np.full(len(cells), 1 / len(cells))
    means = views @ share
    variances = ((views - means[:, None]) ** 2) @ share
    # the position within public bounds has no unit of its own: wide bounds must not flatten it
    floor = np.array([1e-12, *[_RARE] * (len(VIEWS) - 1)]) if is_number else np.array([_RARE])
    return means, np.sqrt(variances + floor)

"""The marginal model: columns given group and label, and given one other column each, as a forest.

Shape: with ``A`` attributes of ``s₁ … s_A`` group levels every distribution has these as its first axes, then the
parent's cells if there is a parent, then the column's own cells.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mcrage.data.marginals import Marginals
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import MessageError
from mcrage.marginal.grids import Grid

Probabilities = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ColumnModel:
    """One column given the condition and its parent.

    Attributes:
        grid: The column's cells.
        parent: Place of the parent among the features, −1 for none.
        shares: Probability of each cell; shape (s₁, …, s_A[, parent's cells], cells).
    """

    grid: Grid
    parent: int
    shares: Probabilities


@dataclass(frozen=True, eq=False)
class MarginalModel:
    """What was estimated.

    Attributes:
        marginals: Released histograms: how values lie within cells.
        groups: Probability of each combination of group levels; shape (s₁, …, s_A).
        columns: Features that are no attributes, each after its parent.
    """

    marginals: Marginals
    groups: Probabilities
    columns: tuple[ColumnModel, ...]

    def check(self, schema: TableSchema) -> None:
        """Raises unless shapes, names, parents and values are those of a model of this schema.

        Raises:
            MessageError: With the column.
        """
        sizes = tuple(len(column.group_levels) for column in schema.attributes)
        _check_shares("groups", self.groups, sizes)
        names = [each.grid.column.name for each in self.columns]
        if sorted(names) != sorted(column.name for column in plain_features(schema)):
            raise MessageError(f"expected {len(plain_features(schema))} columns of the schema, got {len(names)}")
        for place, each in enumerate(self.columns):
            if type(each.parent) is not int or not -1 <= each.parent < place:
                raise MessageError(f"column '{names[place]}': its parent has to come before it")
            parent = (self.columns[each.parent].grid.size,) if each.parent >= 0 else ()
            _check_shares(names[place], each.shares, (*sizes, *parent, each.grid.size))


def _check_shares(name: str, shares: Probabilities, shape: tuple[int, ...]) -> None:
    if shares.shape != shape or shares.dtype != np.float32 or not (np.isfinite(shares) & (shares >= 0)).all():
        raise MessageError(f"'{name}': expected finite float32 shares of at least 0 of shape {shape}")


def plain_features(schema: TableSchema) -> tuple[Column, ...]:
    """Columns that are no attributes: those that are drawn after group and label."""
    return tuple(column for column in schema.features if column.role == "feature")

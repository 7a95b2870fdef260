"""The marginal model from sums of noisy counts and the schema, and from nothing else.

Three rounds of questions, each worked out from the answers before it: histograms of single columns and the table of
groups; each column with the label and every sensitive feature, and coarse tables of all pairs; the pairs of the forest.
Whoever answers may be one table (:mod:`mcrage.marginal.source`) or many sites whose noisy counts are summed.

What noise drowns is left out at every step: cells are merged until they stand out of it, deviations are believed as far
as they do (:func:`~mcrage.marginal.tables.shrunk`), and a pair has an edge only if its table shows more than noise.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mcrage.data.crossing import Axes, Axis
from mcrage.data.marginals import Marginals, readable
from mcrage.data.schema import TableSchema
from mcrage.marginal.budget import Budget
from mcrage.marginal.forest import dependence, forest, rooted
from mcrage.marginal.grids import (
    MOST_CELLS,
    STANDS_OUT,
    Grid,
    affordable,
    affordable_square,
    grid,
    has_order,
    largest,
    neighbours,
)
from mcrage.marginal.model import ColumnModel, MarginalModel, plain_features
from mcrage.marginal.tables import Margin, combined, fitted, scaled, shrunk

Floats = NDArray[np.float64]
Answers = tuple[list[Floats], float]
"""Tables of counts, and the variance of the noise on each."""

COARSE_CELLS = 4
"""Most cells of a column in the tables of all pairs."""

CLEAR = 30.0
"""How many times the noise the average cell of a pair's table has to hold for a forest: at a tenth of that, rows drawn
with one told a model less than without (``docs/privacy-budget.md``)."""

_NO_NOISE = 1e-9  # the variance of exact counts, so that they can be weighted
_LEAST_EXPECTED = 1e-6  # rows
_TINY = np.finfo(float).tiny
_LEAST_ROWS = 0.5  # expected in a cell that no row was seen in


class Source(Protocol):
    """Whoever answers with counts."""

    def tables(self, tables: Sequence[Axes], *, noise: float) -> list[Floats]:
        """Tables of counts with noise, negative counts included; one array per table.

        Args:
            tables: What to cross with what.
            noise: Standard deviation on each cell with which one table of rows is protected; 0 for exact counts.
        """
        ...

    def deviation(self, noise: float) -> float:
        """Standard deviation of all noise on a cell of an answer, where ``noise`` was asked for.

        Of sums over sites it is larger. It has to be known once the first question was answered.
        """
        ...


def condition_sets(schema: TableSchema) -> list[tuple[int, ...]]:
    """Attributes that each column is crossed with: every sensitive feature, together with the label if there is one."""
    sensitive = range(len(schema.sensitive))
    if not schema.has_target:
        return [(place,) for place in sensitive]
    return [(place, len(sensitive)) for place in sensitive] or [(0,)]


def num_tables(schema: TableSchema) -> dict[str, int]:
    """Most tables that are asked for, by share of the budget, in the order of the questions."""
    features = len(plain_features(schema))
    return {
        "one_ways": len(schema.modelled),
        "groups": int(bool(schema.attributes)),
        "conditions": features * len(condition_sets(schema)),
        "pairs": math.comb(features, 2),
        "edges": max(features - 1, 0),
    }


def estimate(schema: TableSchema, source: Source, budget: Budget) -> MarginalModel:
    """The model of what a source counts.

    There is a forest only if noise is next to nothing in its tables (:data:`CLEAR`). Where it is not, group and label
    tell more for the same budget.
    """
    return _Estimation(schema, source, budget).model()


class _Estimation:
    def __init__(self, schema: TableSchema, source: Source, budget: Budget) -> None:
        self.schema, self.source, self.budget = schema, source, budget
        self.features = plain_features(schema)
        self.attributes = tuple(Axis(column.name) for column in schema.attributes)
        self.sizes = tuple(len(column.group_levels) for column in schema.attributes)
        self.sets = condition_sets(schema)
        self.pairs = list(combinations(range(len(self.features)), 2))

    def model(self) -> MarginalModel:
        marginals = self._one_ways()
        self.rows = float(max(np.median([cells.sum() for cells in marginals.values()]), 1.0))
        edge_noise = self._noise("edges", max(len(self.features) - 1, 1))
        if self.rows / MOST_CELLS**2 < CLEAR * edge_noise:
            self.budget = replace(self.budget, shares=self.budget.shares.without_forest())
        counted = self._ask([self.attributes] if self.attributes else [], "groups")
        self.grids = self._grids(marginals)
        crossed = self._ask(self._crossed(), "conditions")
        self.groups = self._groups(counted, crossed)
        self.given = self._given(marginals, crossed)
        edges = self._edges() if self.pairs and self.budget.shares.pairs else []
        columns = tuple(self._columns(edges))
        return MarginalModel(marginals, self.groups.astype(np.float32), columns)

    def _noise(self, share: str, tables: int) -> float:
        """Standard deviation of all sites' noise together on each cell of a release of so many tables."""
        return self.source.deviation(self.budget.noise(share, tables))

    def _ask(self, tables: Sequence[Axes], share: str) -> Answers:
        """Answers, and the variance of their noise."""
        if not tables:
            return [], 0.0
        answers = self.source.tables(tables, noise=self.budget.noise(share, len(tables)))
        return answers, self._noise(share, len(tables)) ** 2

    def _one_ways(self) -> Marginals:
        columns = self.schema.modelled
        answers, variance = self._ask([(Axis.whole(column),) for column in columns], "one_ways")
        parts = zip(columns, answers, strict=True)
        return Marginals({c.name: readable(cells, c, deviation=math.sqrt(variance)) for c, cells in parts})

    def _crossed(self) -> list[Axes]:
        """Each column with each set of attributes, one column after the other."""
        return [
            (*(self.attributes[place] for place in each), self._axis(feature))
            for feature in range(len(self.features))
            for each in self.sets
        ]

    def _groups(self, counted: Answers, crossed: Answers) -> Floats:
        """Probability of each combination of group levels.

        Deviations from independence are believed as far as they stand out of the noise: first those of each sensitive
        feature with the label, which the tables of all columns tell as well, then those of all together.
        """
        if not self.attributes:
            return np.ones(())
        (noisy,), variance = counted
        places = range(noisy.ndim)
        joint = np.full((), self.rows)
        for place in places:
            rows = np.maximum(noisy.sum(axis=tuple(other for other in places if other != place)), 1.0)
            joint = np.multiply.outer(joint, rows / rows.sum())
        margins = []
        for number, each in enumerate(self.sets):
            others = tuple(place for place in places if place not in each)
            parts = [(noisy.sum(axis=others), max(variance * math.prod(self.sizes[p] for p in others), _NO_NOISE))]
            for table in crossed[0][number :: len(self.sets)]:
                parts.append((table.sum(axis=-1), max(crossed[1] * table.shape[-1], _NO_NOISE)))
            rows, spread = combined(parts)
            margins.append((each, shrunk(rows, joint.sum(axis=others), variance=spread)))
        joint = np.maximum(fitted(joint, margins), _LEAST_EXPECTED)
        joint = shrunk(noisy[None], joint[None], variance=variance)[0]
        return np.asarray(joint / joint.sum())

    def _grids(self, marginals: Marginals) -> list[Grid]:
        noise = self._noise("conditions", max(len(self.features) * len(self.sets), 1))
        others = max((math.prod(self.sizes[place] for place in each) for each in self.sets), default=1)
        edge_noise = self._noise("edges", max(len(self.features) - 1, 1))
        most = max(affordable(self.rows, noise, others), affordable_square(self.rows, edge_noise), 2)
        return [grid(marginals[c.name], c, most=most, smallest=max(STANDS_OUT * noise, 1.0)) for c in self.features]

    def _axis(self, feature: int) -> Axis:
        return Axis(self.features[feature].name, self.grids[feature].merged)

    def _given(self, marginals: Marginals, crossed: Answers) -> list[Floats]:
        """Rows of every condition and cell, by feature."""
        answers, variance = crossed
        given = []
        for feature, each in enumerate(self.grids):
            own = answers[feature * len(self.sets) : (feature + 1) * len(self.sets)]
            rows = self._rows_of(each, marginals[each.column.name], own, variance)
            given.append(self._one_given(rows / rows.sum(), own, variance))
        return given

    def _rows_of(self, each: Grid, cells: Floats, tables: Sequence[Floats], variance: float) -> Floats:
        """Rows in each cell of a column: the released histogram and the sums of its tables, weighted by their noise."""
        noise = self._noise("one_ways", len(self.schema.modelled))
        shown = np.maximum(each.sums((cells > 0).astype(float)), 1.0)
        parts = [(each.sums(cells), np.maximum(shown * noise**2, _NO_NOISE))]
        for table in tables:
            flat = table.reshape(-1, each.size)
            parts.append((flat.sum(axis=0), np.full(each.size, max(len(flat) * variance, _NO_NOISE))))
        return np.maximum(combined(parts)[0], _LEAST_ROWS)

    def _one_given(self, shares: Floats, tables: Sequence[Floats], variance: float) -> Floats:
        """Rows of every condition and cell of one column, from its shares over all rows and its tables."""
        joint = self.rows * self.groups[..., None] * shares
        last = joint.ndim - 1
        if self.schema.has_target:
            flat = [table.reshape(-1, *table.shape[-2:]) for table in tables]
            parts = [(each.sum(axis=0), max(len(each) * variance, _NO_NOISE)) for each in flat]
            label, spread = combined(parts)
            joint = fitted(joint, [self._margin(joint, (last - 1, last), label, spread)], sweeps=1)
        margins = [
            self._margin(joint, (*each, last), table, variance) for each, table in zip(self.sets, tables, strict=True)
        ]
        margins.append(((last,), self.rows * shares))
        margins.append((tuple(range(last)), self.rows * self.groups))
        return fitted(joint, margins)

    def _margin(self, joint: Floats, axes: tuple[int, ...], noisy: Floats, variance: Floats | float) -> Margin:
        """What a noisy table says about some axes beyond what is known of them."""
        base = joint.sum(axis=tuple(axis for axis in range(joint.ndim) if axis not in axes))
        return axes, shrunk(scaled(noisy, base.sum(axis=-1)), base, variance=variance)

    def _edges(self) -> list[tuple[int, int]]:
        most = max(2, min(COARSE_CELLS, affordable_square(self.rows, self._noise("pairs", len(self.pairs)))))
        coarse = [self._coarse(feature, most) for feature in range(len(self.features))]
        axes = [
            Axis(each.column.name, tuple(int(merged[cell]) for cell in each.merged))
            for each, merged in zip(self.grids, coarse, strict=True)
        ]
        answers, variance = self._ask([(axes[first], axes[second]) for first, second in self.pairs], "pairs")
        given = [_merged(rows, merged) for rows, merged in zip(self.given, coarse, strict=True)]
        strengths = {}
        for pair, observed in zip(self.pairs, answers, strict=True):
            expected = self._expected(given[pair[0]], given[pair[1]])
            strengths[pair] = dependence(observed, expected, variance=variance, pairs=len(self.pairs))
        return forest(len(self.features), strengths)

    def _coarse(self, feature: int, most: int) -> NDArray[np.int64]:
        """For each cell of a column's grid the coarse cell that it is in."""
        each = self.grids[feature]
        rows = self.given[feature].reshape(-1, each.size).sum(axis=0)
        if has_order(each.column):
            return neighbours(rows, most, rows.sum() / most / 2)
        return largest(rows, most, 0.0)

    def _expected(self, first: Floats, second: Floats) -> Floats:
        """Rows by the cells of two columns that are independent given the condition."""
        a, b = first.reshape(-1, first.shape[-1]), second.reshape(-1, second.shape[-1])
        rows = np.maximum(a.sum(axis=1, keepdims=True), _TINY)
        return np.maximum(a.T @ (b / rows), _LEAST_EXPECTED)

    def _columns(self, edges: Sequence[tuple[int, int]]) -> list[ColumnModel]:
        order = rooted(len(self.features), edges)
        place = {feature: position for position, (feature, _) in enumerate(order)} | {-1: -1}
        children = [(parent, feature) for feature, parent in order if parent >= 0]
        asked = [(self._axis(parent), self._axis(feature)) for parent, feature in children]
        answers, variance = self._ask(asked, "edges")
        tables = {feature: table for (_, feature), table in zip(children, answers, strict=True)}
        columns = []
        for feature, parent in order:
            joint = self.given[feature]
            if parent >= 0:
                joint = self._joint(self.given[parent], joint, tables[feature], variance)
            shares = joint / np.maximum(joint.sum(axis=-1, keepdims=True), _TINY)
            columns.append(ColumnModel(self.grids[feature], place[parent], shares.astype(np.float32)))
        return columns

    def _joint(self, parent: Floats, child: Floats, table: Floats, variance: float) -> Floats:
        """Rows of every condition, cell of the parent and cell of the child."""
        conditions = tuple(range(parent.ndim - 1))
        rows = np.maximum(parent.sum(axis=-1), _TINY)[..., None, None]
        joint = parent[..., :, None] * child[..., None, :] / rows
        base = np.maximum(joint.sum(axis=conditions), _LEAST_EXPECTED)
        pair = (len(conditions), len(conditions) + 1)
        wanted = shrunk(table[None], base[None], variance=variance)[0]
        margins = [
            (pair, wanted * base.sum() / wanted.sum()),
            ((*conditions, pair[0]), parent),
            ((*conditions, pair[1]), child),
        ]
        return fitted(joint, margins)


def _merged(rows: Floats, merged: NDArray[np.int64]) -> Floats:
    """The table with cells of the last axis summed."""
    ways = np.zeros((rows.shape[-1], int(merged.max()) + 1))
    ways[np.arange(len(merged)), merged] = 1.0
    return rows @ ways

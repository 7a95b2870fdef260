"""Which columns depend on each other beyond group and label, and the forest that keeps the strongest dependences.

Chow and Liu (1968): of all trees the one whose edges have the most mutual information loses the least. Estimates come
from noisy tables; a pair whose table shows no more than noise would has no edge, so that the tree may be a forest.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

Floats = NDArray[np.float64]
Pair = tuple[int, int]

FALSE_ALARMS = 0.05
"""Probability that among columns that do not depend on each other there is an edge at all."""


def dependence(observed: Floats, expected: Floats, *, variance: float, pairs: int) -> float:
    """Mutual information of two columns beyond what is expected of them, in nats per row; 0 where noise explains it.

    The table's deviations, without those of its rows and columns as a whole, are compared with noise and sampling by
    a chi-squared test at :data:`FALSE_ALARMS` over all pairs. What passes is drawn towards the expected table by the
    share of its squared deviations that noise explains, because noise alone would look like information.

    Args:
        observed: Noisy counts of the two columns.
        expected: Positive counts of the same shape.
        variance: Of the noise on each observed count.
        pairs: Number of pairs that are looked at.
    """
    deviation = observed - expected
    deviation = deviation - deviation.mean(axis=0) - deviation.mean(axis=1, keepdims=True) + deviation.mean()
    degrees = (observed.shape[0] - 1) * (observed.shape[1] - 1)
    found = float((deviation**2 / (variance + expected)).sum())
    if not degrees or found <= chi2.isf(FALSE_ALARMS / pairs, degrees):
        return 0.0
    table = np.maximum(expected + (1 - degrees / found) * deviation, 0.0)
    table, base = table / table.sum(), expected / expected.sum()
    inside = table > 0
    return max(float((table[inside] * np.log(table[inside] / base[inside])).sum()), 0.0)


def forest(size: int, strengths: Mapping[Pair, float]) -> list[Pair]:
    """Edges of the maximum spanning forest (Kruskal, 1956); pairs of strength 0 are no edges.

    Args:
        size: Number of columns.
        strengths: Dependence of each pair.
    """
    tree = list(range(size))
    edges = []
    for pair in sorted(strengths, key=lambda pair: (-strengths[pair], pair)):
        first, second = (tree[column] for column in pair)
        if strengths[pair] > 0 and first != second:
            tree = [first if number == second else number for number in tree]
            edges.append(pair)
    return edges


def rooted(size: int, edges: Sequence[Pair]) -> list[tuple[int, int]]:
    """Columns in an order in which each comes after its parent, each with its parent; −1 for roots.

    A tree's root is its column with the most edges, the first one among equals.
    """
    near: list[list[int]] = [[] for _ in range(size)]
    for first, second in edges:
        near[first].append(second)
        near[second].append(first)
    order: list[tuple[int, int]] = []
    seen: set[int] = set()
    for root in sorted(range(size), key=lambda column: (-len(near[column]), column)):
        queue = [] if root in seen else [(root, -1)]
        while queue:
            column, parent = queue.pop(0)
            seen.add(column)
            order.append((column, parent))
            queue += [(other, column) for other in near[column] if other != parent]
    return order

"""Noisy tables of counts made usable: drawn towards what is known as far as they are noise, and reconciled.

Shape: a table is an array of any number of axes; rows of the last axis are distributions of a column.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Margin = tuple[tuple[int, ...], Floats]
"""Axes of a table and the sums over all others."""

_LEAST = 1e-3  # of what was expected: no cell is impossible because of noise
SWEEPS = 25
"""Rounds of proportional fitting."""


def shrunk(observed: Floats, expected: Floats, *, variance: Floats | float) -> Floats:
    """Counts between those observed and those expected, nearer to the latter the less the former say beyond noise.

    An observed count differs from the true one with the variance v of the noise plus that of a sample (e), a true count
    from the expected one e by a deviation of mean 0 and variance p = τ²√(ev). Then the best linear estimate of the
    deviation is the observed one times p / (p + v). The first axis are slices that have a τ² of their own, found from
    the slice's squared deviations (empirical Bayes; James and Stein, 1961): a small group may differ more than a large
    one, and where a slice differs no more than noise would, nothing is left of its deviations. With e² in place of
    √(ev), as if deviations were relative ones, a finding that only a minority has would be taken for noise, because
    few expect it; with v, cells that hardly anybody is in would keep the noise of the others.

    Args:
        observed: Noisy counts; the first axis are slices.
        expected: Positive counts of the same shape.
        variance: Of the noise on each observed count.

    Returns:
        Positive counts.
    """
    deviation = observed - expected
    spread = variance + expected
    prior = np.sqrt(expected * spread)
    axes = tuple(range(1, observed.ndim))
    excess = (prior / spread**2 * (deviation**2 - spread)).sum(axis=axes, keepdims=True)
    tau = np.maximum(excess / (prior**2 / spread**2).sum(axis=axes, keepdims=True), 0.0)
    believed = deviation * tau * prior / (tau * prior + spread)
    return np.asarray(np.maximum(expected + believed, _LEAST * expected))


def scaled(observed: Floats, totals: Floats) -> Floats:
    """Counts moved by equal parts along the last axis so that they have these totals, which are known better."""
    return observed + ((totals - observed.sum(axis=-1)) / observed.shape[-1])[..., None]


def combined(tables: Sequence[tuple[Floats, Floats | float]]) -> tuple[Floats, Floats]:
    """The weighted mean of several measurements of one table, given with their variances, and its variance."""
    precision = sum((np.asarray(1.0 / variance) for _, variance in tables), np.zeros(()))
    weighted = sum((table / variance for table, variance in tables), np.zeros(()))
    return np.asarray(weighted / precision), np.asarray(1.0 / precision)


def fitted(joint: Floats, margins: Sequence[Margin], *, sweeps: int = SWEEPS) -> Floats:
    """The table nearest to ``joint``, by relative entropy, that has given margins (iterative proportional fitting).

    Of margins that contradict each other the last one is met.

    Args:
        joint: Positive table to start from.
        margins: Positive ones.
        sweeps: Rounds over all margins.
    """
    for _ in range(sweeps):
        for axes, wanted in margins:
            others = tuple(axis for axis in range(joint.ndim) if axis not in axes)
            sums = joint.sum(axis=others)
            ratio = np.divide(wanted, sums, out=np.zeros_like(sums), where=sums > 0)
            joint = joint * np.expand_dims(ratio, others)
    return joint

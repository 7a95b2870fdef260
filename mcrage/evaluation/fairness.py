"""Gaps between groups, gain over a hospital's own rows, and the share of the gap to pooled rows that an arm closes.

Shape: R replicates stand last; replicate r of two arms is drawn from the same patients, so that differences are paired.
"""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from mcrage.evaluation.metrics import METRICS, Floats, interval

LOCAL: Final = "local"
POOLED: Final = "pooled"
GAPS: Final = ("demographic_parity_difference", "equalized_odds_difference")
GAP_CLOSED_METRICS: Final = ("auroc", "auprc")

Verdict = Literal["helps", "no evidence", "harms"]


def group_gaps(values: Floats) -> Floats:
    """Demographic parity and equalised odds differences, as fairlearn defines them: largest minus smallest.

    Args:
        values: Metrics of the groups to compare; shape (..., groups, metrics, R).

    Returns:
        Array of shape (..., 2, R) in the order of :data:`GAPS`. Equalised odds is the worse of the true and the false
        positive rate. An interval of such a difference lies above 0 by construction.
    """
    spread = values.max(axis=-3) - values.min(axis=-3)
    rate, tpr, fpr = (spread[..., METRICS.index(name), :] for name in ("selection_rate", "tpr", "fpr"))
    return np.stack([rate, np.maximum(tpr, fpr)], axis=-2)


def gap_closed(arm: Floats, local: Floats, pooled: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Share of the way from local to pooled rows that an arm goes, with its 95 % interval.

    The share is (arm − local) / (pooled − local): 1 reaches the pooled model, more passes it, below 0 harms. Its
    interval is the percentile interval of the replicates' ratios, which is sound only where the denominator stays away
    from 0: where the interval of pooled − local reaches 0 there is no gap to close, and the share is NaN.

    Args:
        arm: A metric that is better when larger; the value itself stands first, replicates after it: (..., 1 + R).
        local: The same of the hospital's own rows.
        pooled: The same of all hospitals' rows.

    Returns:
        Share, lower and upper limit, shape (..., 3); and whether there is a gap, shape (...).
    """
    gain, gap = np.broadcast_arrays(arm - local, pooled - local)
    is_gap = interval(gap[..., 1:])[0] > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(is_gap[..., None], gain / gap, np.nan)
    return np.stack([share[..., 0], *interval(share[..., 1:])], axis=-1), np.asarray(is_gap)


def verdict(low: float, high: float) -> Verdict:
    """What the interval of a paired difference says of an arm, for a metric that is better when larger."""
    if low > 0:
        return "helps"
    return "harms" if high < 0 else "no evidence"

"""Metrics of binary predictions, for many models and many bootstrap replicates at once.

Every metric is a function of a few sums over patients, so that replicates cost one weighted sum each and hospitals add
up: the federation's sums are the sums of its hospitals'.

Shape: M score vectors over n rows and R columns of weights give sums of shape (M, S, R), and metrics (M, 10, R).

Patients of different hospitals are never ranked against each other, since different models scored them: the
federation's AUROC is over pairs from the same hospital (Janes & Pepe, 2009), its AUPRC the mean weighted by events.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

METRICS: Final = (
    "auroc",
    "auprc",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "tpr",
    "fpr",
    "selection_rate",
    "brier",
    "calibration_error",
)
CALIBRATION_BINS = 10
"""Bins of equal width over [0, 1] (expected calibration error; Naeini et al., 2015)."""

_PAIRS, _RANKED, _PRECISION, _TRUE, _FALSE, _EVENTS, _ROWS, _SQUARES = range(8)
NUM_SUMS = 8 + CALIBRATION_BINS

Floats = NDArray[np.floating]


def patient_draws(
    patients: NDArray[np.int64], num_replicates: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    """How often each row occurs in each bootstrap replicate; shape (n, R).

    Patients are drawn, not rows, so that the rows of one patient come and go together.
    """
    num_patients = int(patients.max(initial=-1)) + 1
    drawn = generator.integers(num_patients, size=(num_replicates, num_patients))
    flat = (drawn + num_patients * np.arange(num_replicates)[:, None]).ravel()
    counts = np.bincount(flat, minlength=num_replicates * num_patients).reshape(num_replicates, num_patients)
    return np.asarray(counts.T.astype(np.float32)[patients])


def sums(event: NDArray[np.bool_], scores: Floats, thresholds: Floats, weights: Floats) -> Floats:
    """The sums that all metrics come from.

    Args:
        event: Whether each row has the event; shape (n,).
        scores: Predicted probabilities; shape (M, n).
        thresholds: Of each score vector; shape (M,).
        weights: Weight of each row in each replicate; shape (n, R). Its dtype is the one of the arithmetic.

    Returns:
        Array of shape (M, S, R).
    """
    result = np.zeros((len(scores), NUM_SUMS, weights.shape[1]), dtype=weights.dtype)
    result[:, _EVENTS], result[:, _ROWS] = event @ weights, weights.sum(axis=0)
    for each, (score, threshold) in enumerate(zip(scores, thresholds, strict=True)):
        result[each, _PAIRS : _PRECISION + 1] = _ranking_sums(event, score, weights)
        result[each, _TRUE:_EVENTS] = _indicators(event, score >= threshold, weights.dtype) @ weights
        result[each, _SQUARES:] = _errors(event, score, weights.dtype) @ weights
    return result


def metrics(sums: Floats) -> Floats:
    """Metrics in the order of :data:`METRICS`, from sums of shape (..., S, R); NaN where a denominator is 0."""
    part = [sums[..., each, :] for each in range(_SQUARES + 1)]
    true, false, events, rows = part[_TRUE], part[_FALSE], part[_EVENTS], part[_ROWS]
    with np.errstate(divide="ignore", invalid="ignore"):
        tpr, fpr = true / events, false / (rows - events)
        values = [
            part[_RANKED] / part[_PAIRS],
            part[_PRECISION] / events,
            (true + rows - events - false) / rows,
            (tpr + 1 - fpr) / 2,
            2 * true / (true + false + events),
            tpr,
            fpr,
            (true + false) / rows,
            part[_SQUARES] / rows,
            np.abs(sums[..., _SQUARES + 1 :, :]).sum(axis=-2) / rows,
        ]
    return np.stack(values, axis=-2)


def interval(replicates: Floats, *, level: float = 0.95) -> tuple[Floats, Floats]:
    """Percentile interval along the last axis; NaN where fewer than 90 % of the replicates have a value."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    flat = replicates.reshape(-1, replicates.shape[-1])
    known = np.isfinite(flat)
    complete = known.all(axis=1)
    limits = np.full((2, len(flat)), np.nan)
    if complete.any():
        limits[:, complete] = np.quantile(flat[complete], tails, axis=-1)
    for each in np.flatnonzero(~complete & (known.mean(axis=1) >= 0.9)):
        limits[:, each] = np.quantile(flat[each][known[each]], tails)
    low, high = limits.reshape(2, *replicates.shape[:-1])
    return low, high


def _ranking_sums(event: NDArray[np.bool_], score: Floats, weights: Floats) -> Floats:
    """Pairs of an event and a non-event, those ranked right (ties half), and summed precision; shape (3, R)."""
    order = np.argsort(-score, kind="stable")
    positive, negative = order[event[order]], order[~event[order]]
    if not len(positive):
        return np.zeros((3, weights.shape[1]), dtype=weights.dtype)
    falling, others = -score[positive], -score[negative]
    above, reached = (np.searchsorted(others, falling, side=side) for side in ("left", "right"))
    last_tied = np.searchsorted(falling, falling, side="right") - 1
    of_positive = weights[positive]
    false = np.zeros((len(negative) + 1, weights.shape[1]), dtype=weights.dtype)
    np.cumsum(weights[negative], axis=0, out=false[1:])
    true = np.cumsum(of_positive, axis=0)
    pairs = true[-1] * false[-1]
    misranked = (false[above] + false[reached]) / 2
    found = true[last_tied]
    # a threshold that no drawn row reaches has no precision; the weight of its events is 0 anyway
    precision = found / np.maximum(found + false[reached], np.finfo(weights.dtype).tiny)
    ranked = pairs - np.einsum("ir,ir->r", of_positive, misranked)
    return np.stack([pairs, ranked, np.einsum("ir,ir->r", of_positive, precision)])


def _indicators(event: NDArray[np.bool_], predicted: NDArray[np.bool_], dtype: np.dtype) -> Floats:
    return np.stack([predicted & event, predicted & ~event]).astype(dtype)


def _errors(event: NDArray[np.bool_], score: Floats, dtype: np.dtype) -> Floats:
    """Squared error, and the error within each calibration bin; shape (1 + bins, n)."""
    error = event - score
    bins = np.minimum((score * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    return np.vstack([error**2, error * (bins == np.arange(CALIBRATION_BINS)[:, None])]).astype(dtype)

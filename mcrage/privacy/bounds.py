"""What scores of canaries say about a training's privacy: lower bounds of epsilon, and tests of signal and noise.

A canary is a made-up patient whose part in a training can be seen as well as anybody's. A fair coin decides for each
whether it takes part; whoever sees what was released guesses the coins. More right guesses than an epsilon allows
refute that epsilon, all canaries of one training together (Steinke, Nasr and Jagielski, 2023, arXiv 2305.08846).

Shape: m canaries have m scores, higher for those that took part, and m truth values.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri
from scipy.stats import binom, rankdata

from mcrage.errors import PrivacyError

Scores = Float[np.ndarray, " m"]
Included = Bool[np.ndarray, " m"]

SHARES_GUESSED = (40, 10, 4)
"""One in so many canaries is guessed to be in, and as many to be out; fixed before any training was seen."""

_TOLERANCE = 1e-10
_LARGEST = 700.0  # an epsilon beyond which e to its power is no number


@dataclass(frozen=True)
class Estimate:
    """A measured number, what it should be, and by how many standard errors it is off."""

    value: float
    expected: float
    z: float


def pre_registered(canaries: int) -> tuple[int, ...]:
    """The numbers of guesses on each side, for so many canaries."""
    return tuple(max(canaries // share, 1) for share in SHARES_GUESSED)


def one_run_bound(
    scores: Scores, included: Included, *, delta: float, guesses: Sequence[int], confidence: float = 0.95
) -> float:
    """Lower bound of the epsilon at ``delta`` of whatever gave the scores (Steinke et al., 2023).

    Args:
        scores: Of the canaries.
        included: Which of them took part.
        delta: Of the claim.
        guesses: For each number, so many canaries with the highest scores are guessed to be in and as many with the
            lowest to be out. The best bound of all numbers counts, each at its share of the error (Bonferroni).
        confidence: Probability with which the bound holds.
    """
    return _best(epsilon_of_guesses, scores, included, delta=delta, guesses=guesses, confidence=confidence)


def one_run_bound_gaussian(
    scores: Scores, included: Included, *, delta: float, guesses: Sequence[int], confidence: float = 0.95
) -> float:
    """The same for mechanisms that are as hard to tell apart as Gaussians (Mahloujifar et al., 2024, arXiv 2410.22235).

    Often larger than :func:`one_run_bound`, because a Gaussian trade-off allows less than one epsilon and delta. Many
    steps of noisy sums have that trade-off nearly, no more: where the true one is another, this is an estimate.
    """
    return _best(epsilon_of_guesses_gaussian, scores, included, delta=delta, guesses=guesses, confidence=confidence)


def _best(
    bound: Callable[..., float],
    scores: Scores,
    included: Included,
    *,
    delta: float,
    guesses: Sequence[int],
    confidence: float,
) -> float:
    require_canaries(scores, included)
    if not guesses or not 0 < min(guesses) <= max(guesses) <= len(scores) // 2:
        raise PrivacyError(f"numbers of guesses must lie in [1, {len(scores) // 2}], got {list(guesses)}")
    if not 0 < delta < 1 or not 0 < confidence < 1:
        raise PrivacyError(f"delta and confidence must lie in (0, 1), got {delta} and {confidence}")
    ordered = included[np.argsort(scores, kind="stable")]
    error = (1 - confidence) / len(guesses)
    return max(
        bound(
            2 * number,
            int(ordered[-number:].sum() + (~ordered[:number]).sum()),
            canaries=len(scores),
            delta=delta,
            error=error,
        )
        for number in guesses
    )


def epsilon_of_guesses(guesses: int, correct: int, *, canaries: int, delta: float, error: float) -> float:
    """The least epsilon under which so many right guesses have at least the probability ``error``."""

    def excess(epsilon: float) -> float:
        return error - chance_of_guesses(guesses, correct, canaries=canaries, epsilon=epsilon, delta=delta)

    return _first_root(excess)


def chance_of_guesses(guesses: int, correct: int, *, canaries: int, epsilon: float, delta: float) -> float:
    """Most probability that an (epsilon, delta) private release gives to at least so many right guesses."""
    right = 1 / (1 + math.exp(-epsilon))
    fewer = np.arange(1, correct + 1)
    at_least = float(binom.sf(correct - 1, guesses, right))
    gained = (binom.sf(correct - 1 - fewer, guesses, right) - at_least) / fewer
    return min(at_least + 2 * canaries * delta * float(np.max(gained, initial=0.0)), 1.0)


def epsilon_of_guesses_gaussian(guesses: int, correct: int, *, canaries: int, delta: float, error: float) -> float:
    """The epsilon at ``delta`` of the least Gaussian under which so many right guesses can be had by chance."""

    def excess(mu: float) -> float:
        return _gaussian_excess(mu, guesses, correct, canaries=canaries, error=error)

    return gaussian_epsilon(_first_root(excess), delta=delta)


def _gaussian_excess(mu: float, guesses: int, correct: int, *, canaries: int, error: float) -> float:
    """Above 0 where the trade-off of mu refutes the guesses; the recursion of the paper's ``audit_rh_with_cap``."""
    right, wrong = error * correct / canaries, error * (guesses - correct) / canaries
    for place in range(correct - 1, -1, -1):
        least = max(wrong, float(ndtr(ndtri(right) - mu)))
        if least == wrong:  # nothing changes any more
            break
        right = min(right + place / (guesses - place) * (least - wrong), 1.0)
        wrong = least
    return right + wrong - guesses / canaries


def gaussian_epsilon(mu: float, *, delta: float) -> float:
    """Epsilon at ``delta`` of telling N(0, 1) from N(mu, 1) (Balle and Wang, 2018, theorem 5)."""
    if mu <= 0:
        return 0.0

    def excess(epsilon: float) -> float:
        first, second = log_ndtr(mu / 2 - epsilon / mu), log_ndtr(-mu / 2 - epsilon / mu) + epsilon
        return float(np.exp(first) * -np.expm1(second - first)) - delta

    return _first_root(excess)


def _first_root(excess: Callable[[float], float]) -> float:
    """Where a falling function reaches 0; 0 if it starts below."""
    if excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, 1.0
    while high < _LARGEST and excess(high) > 0:
        low, high = high, 2 * high
    return float(brentq(excess, low, high, xtol=_TOLERANCE))


def signal(scores: Scores, included: Included, *, expected: float) -> Estimate:
    """Mean score of canaries that took part less that of the others, in standard deviations of the others.

    Args:
        scores: Of the canaries.
        included: Which of them took part.
        expected: By the events of the ledger.
    """
    inside, outside = require_canaries(scores, included)
    difference, spread = float(inside.mean() - outside.mean()), float(outside.std(ddof=1))
    if spread == 0.0:
        return Estimate(math.inf, expected, math.inf)
    of_means = inside.var(ddof=1) / spread**2 / len(inside) + 1 / len(outside)
    value, of_spread = difference / spread, expected**2 / (2 * (len(outside) - 1))
    return Estimate(value, expected, (value - expected) / math.sqrt(of_means + of_spread))


def noise(values: NDArray[np.float64], *, expected: float, number: int | None = None) -> Estimate:
    """Standard deviation of values around 0 that noise alone made.

    Args:
        values: What was released where nobody takes part.
        expected: By the events of the ledger.
        number: How many values ``values`` stands for, if they are root mean squares of several each.
    """
    value = float(np.sqrt(np.mean(values**2)))
    return Estimate(value, expected, (value / expected - 1) * math.sqrt(2 * (number or len(values))))


def auc(scores: Scores, included: Included) -> float:
    """Probability that a canary that took part has a higher score than one that did not."""
    inside, outside = require_canaries(scores, included)
    ranks = rankdata(scores)[included].sum()
    return float(ranks - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside))


def require_canaries(scores: Scores, included: Included) -> tuple[Scores, Scores]:
    """Scores of canaries that took part, and of the others.

    Raises:
        PrivacyError: If there are not at least two of both, or a score is not finite.
    """
    if scores.shape != included.shape or not np.isfinite(scores).all():
        raise PrivacyError("every canary needs one finite score and whether it took part")
    inside, outside = scores[included], scores[~included]
    if min(len(inside), len(outside)) < 2:
        raise PrivacyError(f"at least two canaries in and two out are needed, got {len(inside)} and {len(outside)}")
    return inside, outside

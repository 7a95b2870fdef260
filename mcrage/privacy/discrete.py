"""Noise on integers, sampled exactly: discrete Laplace and discrete Gaussian (Canonne, Kamath and Steinke, 2020).

Every decision compares random bits with a fraction of integers, as many bits as it takes, so that the probabilities
are those of the paper and not those of some floating-point numbers near them.

How long a draw takes depends on what is drawn: from the time of a single draw of discrete Laplace noise its size can
be told with up to 99.65 % success (Jin et al., 2021). So all noises of a release are drawn in one batch, of which an
observer can time the whole at most, and a site replies on a schedule and not as soon as it is done.
"""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mcrage.errors import PrivacyError
from mcrage.privacy.keyed import KeyedBits

LARGEST_SCALE = 2**32
"""Largest scale of any noise: beyond 2⁶³ such noise falls with a probability below exp(−2³⁰)."""

_WORD = 64
_AT_ONCE = 1024

Words = Iterator[int]


def discrete_laplace(scale: Fraction | float, *, size: int, bits: KeyedBits) -> NDArray[np.int64]:
    """Independent noises z with probability proportional to exp(−|z| / scale).

    *Guarantee*: added to counts of which one patient changes one by one, it is (1/scale)-differentially private.

    Args:
        scale: Taken as exactly the fraction that it is, a float too.
        size: Number of noises: all those of a release.
        bits: Where the random bits come from, in blocks: what is left of the last block is lost.
    """
    fraction, words = _checked(scale), _words(bits)
    return np.array([_laplace(fraction, words) for _ in range(size)], dtype=np.int64)


def discrete_gaussian(sigma: Fraction | float, *, size: int, bits: KeyedBits) -> NDArray[np.int64]:
    """Independent noises z with probability proportional to exp(−z² / 2σ²).

    *Guarantee*: added to counts of which one patient changes k by one, it is k/2σ²-concentrated differentially private.

    Args:
        sigma: Taken as exactly the fraction that it is, a float too. From 1 on it is the standard deviation to 6
            digits; the standard deviation of smaller ones is smaller still.
        size: Number of noises: all those of a release.
        bits: Where the random bits come from, in blocks: what is left of the last block is lost.
    """
    variance, words = _checked(sigma) ** 2, _words(bits)
    return np.array([_gaussian(variance, words) for _ in range(size)], dtype=np.int64)


def _checked(scale: Fraction | float) -> Fraction:
    if not 0 < scale <= LARGEST_SCALE:
        raise PrivacyError(f"the scale of noise must lie in (0, {LARGEST_SCALE:,}], got {scale}")
    return Fraction(scale)


def _words(bits: KeyedBits) -> Words:
    while True:
        yield from bits.uint64(_AT_ONCE).tolist()


def _uniform(bound: int, words: Words) -> int:
    """An integer in [0, bound), by rejection."""
    num_bits = (bound - 1).bit_length()
    num_words = -(-num_bits // _WORD)
    while True:
        value = 0
        for _ in range(num_words):
            value = value << _WORD | next(words)
        value >>= num_words * _WORD - num_bits
        if value < bound:
            return value


def _bernoulli(numerator: int, denominator: int, words: Words) -> bool:
    """True with probability numerator / denominator: whether a uniform number, bit by bit, falls below the fraction."""
    while True:
        digit, numerator = divmod(numerator << _WORD, denominator)
        word = next(words)
        if word != digit:
            return word < digit


def _bernoulli_exp(numerator: int, denominator: int, words: Words) -> bool:
    """True with probability exp(−numerator / denominator); algorithm 1."""
    while numerator > denominator:
        if not _bernoulli_exp(1, 1, words):
            return False
        numerator -= denominator
    k = 1
    while _bernoulli(numerator, denominator * k, words):
        k += 1
    return k % 2 == 1


def _laplace(scale: Fraction, words: Words) -> int:
    """One discrete Laplace noise; algorithm 2."""
    t, s = scale.numerator, scale.denominator
    while True:
        u = _uniform(t, words)
        if not _bernoulli_exp(u, t, words):
            continue
        v = 0
        while _bernoulli_exp(1, 1, words):
            v += 1
        size = (u + t * v) // s
        is_negative = _bernoulli(1, 2, words)
        if not (is_negative and size == 0):  # 0 has one sign
            return -size if is_negative else size


def _gaussian(variance: Fraction, words: Words) -> int:
    """One discrete Gaussian noise: a discrete Laplace noise, kept with the ratio of both probabilities; algorithm 3."""
    a, b = variance.numerator, variance.denominator
    t = math.isqrt(a // b) + 1  # ⌊σ⌋ + 1
    while True:
        y = _laplace(Fraction(t), words)
        # (|y| − σ²/t)² / 2σ² with σ² = a/b
        if _bernoulli_exp((abs(y) * b * t - a) ** 2, 2 * a * b * t * t, words):
            return y

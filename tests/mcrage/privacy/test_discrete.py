"""Noise on integers has the probabilities of the paper, to the last bit where that can be enumerated.

Chi-square tests have a fixed key and a false-alarm rate of 10⁻⁶ each, and the same test fails on a scale that is a
tenth off.
"""

import itertools
import time
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, chisquare

from mcrage.errors import PrivacyError
from mcrage.privacy.discrete import (
    LARGEST_SCALE,
    _bernoulli,
    _bernoulli_exp,
    _uniform,
    _words,
    discrete_gaussian,
    discrete_laplace,
)
from mcrage.privacy.keyed import KeyedBits, derive

KEY = bytes(range(32))
NUM_DRAWS = 20_000
FALSE_ALARMS = 1e-6

Weight = Callable[[NDArray[np.int64], float], NDArray[np.float64]]


def laplace(z: NDArray[np.int64], scale: float) -> NDArray[np.float64]:
    return np.exp(-np.abs(z) / scale)


def gaussian(z: NDArray[np.int64], sigma: float) -> NDArray[np.float64]:
    return np.exp(-(z**2) / (2 * sigma**2))


SAMPLERS = [(discrete_laplace, laplace), (discrete_gaussian, gaussian)]


def bits(*context: str | int) -> KeyedBits:
    return KeyedBits(derive(KEY, *context))


def p_value(drawn: NDArray[np.int64], weight: Weight, scale: float) -> float:
    """Of a chi-square test against theory, with cells of an expected count of 20 or more."""
    reach = int(40 * scale) + 40
    support = np.arange(-reach, reach + 1)
    expected = weight(support, scale)
    expected *= len(drawn) / expected.sum()
    cell = np.minimum(np.cumsum(expected) // 20, len(drawn) // 20 - 1).astype(int)
    _, cell = np.unique(cell, return_inverse=True)
    seen = np.bincount(cell[drawn + reach], minlength=cell.max() + 1)
    return float(chisquare(seen, np.bincount(cell, weights=expected)).pvalue)


@pytest.mark.parametrize(("sampler", "weight"), SAMPLERS)
@pytest.mark.parametrize("scale", [Fraction(1), 0.5, 2.0, Fraction(7, 3), 1 / 0.3, 8.0, 31.7])
def test_noise_is_distributed_as_in_theory(sampler: Callable, weight: Weight, scale: float) -> None:
    drawn = sampler(scale, size=NUM_DRAWS, bits=bits("theory"))
    assert drawn.dtype == np.int64
    assert p_value(drawn, weight, float(scale)) > FALSE_ALARMS


@pytest.mark.parametrize(("sampler", "weight"), SAMPLERS)
@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_the_same_test_fails_on_a_scale_that_is_a_tenth_off(sampler: Callable, weight: Weight, factor: float) -> None:
    drawn = sampler(8.0 * factor, size=NUM_DRAWS, bits=bits("theory"))
    assert p_value(drawn, weight, 8.0) < FALSE_ALARMS


@pytest.mark.parametrize("weight", [laplace, gaussian])
def test_the_same_test_fails_on_the_other_noise(weight: Weight) -> None:
    other = discrete_gaussian if weight is laplace else discrete_laplace
    assert p_value(other(8.0, size=NUM_DRAWS, bits=bits("theory")), weight, 8.0) < FALSE_ALARMS


def test_a_gaussian_of_1_and_more_has_the_standard_deviation_that_it_says() -> None:
    support = np.arange(-60, 61)
    for sigma in (1.0, 1.5, 4.0):
        weights = gaussian(support, sigma)
        assert np.sqrt((weights * support**2).sum() / weights.sum()) == pytest.approx(sigma, rel=1e-6)


@pytest.mark.parametrize("sampler", [discrete_laplace, discrete_gaussian])
def test_the_key_fixes_the_noise_and_another_key_has_unrelated_noise(sampler: Callable) -> None:
    """Correlation within 5 standard errors, a false alarm in 2·10⁶."""
    first, again, other = (sampler(5.0, size=5000, bits=bits(name)) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(5000)
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 5 / np.sqrt(5000)


@pytest.mark.parametrize("sampler", [discrete_laplace, discrete_gaussian])
@pytest.mark.parametrize("scale", [2.0, 1 / 0.3])
def test_a_fraction_is_taken_as_it_is(sampler: Callable, scale: float) -> None:
    of_float, of_fraction = (sampler(s, size=100, bits=bits("a")) for s in (scale, Fraction(scale)))
    np.testing.assert_array_equal(of_float, of_fraction)


@pytest.mark.parametrize("scale", [0.3, 1e6, float(LARGEST_SCALE), Fraction(1, 10**30)])
@pytest.mark.parametrize("sampler", [discrete_laplace, discrete_gaussian])
def test_scales_at_both_ends_give_noise_of_their_size(sampler: Callable, scale: float) -> None:
    drawn = sampler(scale, size=50, bits=bits("ends"))
    assert np.abs(drawn).max() <= 20 * scale + 2
    assert (np.abs(drawn).max() >= scale / 5) or scale < 1


@pytest.mark.parametrize("scale", [0, -1.0, float("nan"), float("inf"), LARGEST_SCALE + 1])
@pytest.mark.parametrize("sampler", [discrete_laplace, discrete_gaussian])
def test_a_scale_out_of_range_is_refused(sampler: Callable, scale: float) -> None:
    with pytest.raises(PrivacyError, match="scale of noise"):
        sampler(scale, size=1, bits=bits())


def test_no_noise_is_no_noises() -> None:
    assert discrete_laplace(1.0, size=0, bits=bits()).shape == (0,)


@pytest.mark.parametrize("numerator", range(8))
def test_a_decision_compares_bit_by_bit_and_goes_on_where_they_agree(numerator: int) -> None:
    """Of the first word only those next to the fraction can go wrong; where they agree, the second word decides."""
    digit, rest = divmod(numerator << 64, 7)
    for first, second in itertools.product((digit - 1, digit, digit + 1), (0, (rest << 64) // 7 - 1, 2**64 - 1)):
        if not (0 <= first < 2**64 and second >= 0):
            continue
        uniform = Fraction(first, 2**64) + Fraction(second, 2**128) + Fraction(1, 2**129)
        assert _bernoulli(numerator, 7, iter([first, second, 2**63])) == (uniform < Fraction(numerator, 7))


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (3, 10), (1, 1), (5, 2), (10**40, 3 * 10**40)])
def test_exponential_decisions_have_their_probability(numerator: int, denominator: int) -> None:
    words = _words(bits("exp"))
    hits = sum(_bernoulli_exp(numerator, denominator, words) for _ in range(NUM_DRAWS))
    assert binomtest(hits, NUM_DRAWS, min(np.exp(-numerator / denominator), 1.0)).pvalue > FALSE_ALARMS


@pytest.mark.parametrize("bound", [1, 2, 3, 10])
def test_integers_below_a_bound_are_uniform(bound: int) -> None:
    words = _words(bits("uniform"))
    seen = np.bincount([_uniform(bound, words) for _ in range(NUM_DRAWS)])
    assert len(seen) == bound
    assert chisquare(seen).pvalue > FALSE_ALARMS if bound > 1 else seen[0] == NUM_DRAWS


def test_integers_beyond_a_word_take_the_first_bits_of_two_and_those_above_the_bound_are_drawn_again() -> None:
    words = iter([2**64 - 1, 2**64 - 1, 1, 0])
    assert _uniform(2**64 + 1, words) == 2
    assert list(words) == []


@pytest.mark.parametrize("sampler", [discrete_laplace, discrete_gaussian])
@pytest.mark.parametrize("scale", [2.0, 1 / 0.3, 1e6])
def test_two_thousand_noises_take_less_than_two_seconds(sampler: Callable, scale: float) -> None:
    start = time.perf_counter()
    sampler(scale, size=2000, bits=bits("speed"))
    assert time.perf_counter() - start < 2

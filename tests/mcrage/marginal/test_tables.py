"""Noisy tables are believed as far as they stand out of the noise, and reconciled without losing what they say."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from mcrage.marginal.tables import combined, fitted, scaled, shrunk

Floats = NDArray[np.float64]


def errors(estimate: Callable[[Floats, Floats], Floats], truth: Floats, expected: Floats, noise: float) -> float:
    """Mean squared error of an estimate over 200 noisy tables."""
    draw = np.random.default_rng(0)
    drawn = [estimate(truth + draw.normal(0, noise, truth.shape), expected) for _ in range(200)]
    return float(np.mean([(each - truth) ** 2 for each in drawn]))


def test_where_there_is_noise_alone_little_of_it_is_left() -> None:
    expected = np.full((4, 12), 200.0)
    left = errors(lambda seen, base: shrunk(seen, base, variance=30.0**2), expected, expected, 30.0)
    assert left < 0.15 * 30.0**2


def test_the_same_test_fails_if_the_noise_is_not_known() -> None:
    expected = np.full((4, 12), 200.0)
    left = errors(lambda seen, base: shrunk(seen, base, variance=0.0), expected, expected, 30.0)
    assert left > 0.5 * 30.0**2


def test_deviations_that_stand_out_are_kept_and_small_ones_are_no_worse_than_as_observed() -> None:
    expected = np.full((1, 12), 200.0)
    for size in (20.0, 60.0, 180.0):
        truth = expected + size * np.resize([1.0, -1.0], expected.shape)
        kept = errors(lambda seen, base: shrunk(seen, base, variance=30.0**2), truth, expected, 30.0)
        assert kept < 1.02 * 30.0**2
        assert kept < 1.02 * max(size**2, 30.0**2)


def test_a_slice_that_differs_is_believed_whatever_the_others_do() -> None:
    """A minority of whom every second cell is empty, beside a majority that is as expected."""
    expected = np.stack([np.full(12, 4000.0), np.full(12, 100.0)])
    truth = np.stack([expected[0], 100.0 + 100.0 * np.resize([0.99, -0.99], 12)])
    draw = np.random.default_rng(0)
    seen = shrunk(truth + draw.normal(0, 15.0, truth.shape), expected, variance=15.0**2)
    assert np.abs(seen[1] - truth[1]).mean() < 20
    assert np.abs(seen[0] - truth[0]).mean() < 30


def test_a_finding_that_only_a_minority_has_is_believed_although_few_expect_it() -> None:
    """Of 1,000 patients 500 have what 14 in 1,000 of all patients have, and the noise is that of an epsilon of 1."""
    expected = np.array([[500.0, 300.0, 186.0, 7.0, 7.0]])
    truth = np.array([[250.0, 150.0, 100.0, 250.0, 250.0]])
    draw = np.random.default_rng(0)
    drawn = [shrunk(truth + draw.normal(0, 35.0, truth.shape), expected, variance=35.0**2) for _ in range(50)]
    assert np.mean(drawn, axis=0)[0, 3:].min() > 0.7 * 250


def test_exact_counts_of_many_rows_are_kept_and_no_count_is_negative() -> None:
    truth = np.array([[0.0, 4000.0, 1000.0, 5000.0]])
    exact = shrunk(truth, np.full((1, 4), 2500.0), variance=0.0)
    np.testing.assert_allclose(exact, truth, atol=10)
    assert shrunk(np.array([[-900.0, 900.0]]), np.array([[10.0, 10.0]]), variance=1.0).min() > 0


def test_measurements_are_weighted_by_their_noise() -> None:
    mean, variance = combined([(np.array([10.0, 0.0]), 1.0), (np.array([20.0, 0.0]), 4.0)])
    np.testing.assert_allclose(mean, [12.0, 0.0])
    assert variance == pytest.approx(0.8)
    mean, _ = combined([(np.array([10.0, 0.0]), np.array([1.0, 1.0])), (np.array([20.0, 8.0]), np.array([1.0, 3.0]))])
    np.testing.assert_allclose(mean, [15.0, 2.0])


def test_totals_that_are_known_better_are_met_by_equal_parts() -> None:
    np.testing.assert_allclose(scaled(np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([10.0, 2.0])), [[4, 6], [1, 1]])


def test_margins_are_met_and_what_they_do_not_say_stays() -> None:
    draw = np.random.default_rng(0)
    start, other = draw.uniform(1, 5, (3, 4, 5)), draw.uniform(1, 5, (3, 4, 5))
    met = fitted(start, [((0, 2), other.sum(axis=1)), ((1, 2), other.sum(axis=0)), ((0, 1), other.sum(axis=2))])
    for axis in range(3):
        np.testing.assert_allclose(met.sum(axis=axis), other.sum(axis=axis), rtol=1e-3)

    def interaction(table: Floats) -> Floats:
        """Of all three: what no margin of two says."""
        logs = np.log(table)
        for axis in range(3):
            logs = logs - logs.mean(axis=axis, keepdims=True)
        return logs

    np.testing.assert_allclose(interaction(met), interaction(start), atol=1e-9)


def test_of_margins_that_contradict_each_other_the_last_one_is_met() -> None:
    met = fitted(np.ones((2, 2)), [((0,), np.array([1.0, 1.0])), ((1,), np.array([2.0, 6.0]))])
    np.testing.assert_allclose(met.sum(axis=0), [2, 6])


def test_a_cell_that_nothing_can_be_in_stays_empty() -> None:
    met = fitted(np.array([[1.0, 0.0], [1.0, 0.0]]), [((1,), np.array([3.0, 2.0]))])
    np.testing.assert_allclose(met, [[1.5, 0], [1.5, 0]])

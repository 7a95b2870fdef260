import importlib.util
import json
import math
import os
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from mcrage.errors import PrivacyError
from mcrage.privacy.bounds import (
    auc,
    chance_of_guesses,
    epsilon_of_guesses,
    gaussian_epsilon,
    noise,
    one_run_bound,
    one_run_bound_gaussian,
    pre_registered,
    signal,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "jax_privacy_bounds.py"
DELTA = 1e-5
RUNS = 200


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    """The script that made the golden numbers; its cases need only NumPy."""
    spec = importlib.util.spec_from_file_location("jax_privacy_bounds", GOLDEN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_against(expected: list[dict[str, float]], golden: ModuleType) -> None:
    for number, theirs in enumerate(expected):
        scores, included, delta = golden.case(number)
        claim = {"delta": delta, "guesses": pre_registered(len(scores)), "confidence": golden.CONFIDENCE}
        assert one_run_bound(scores, included, **claim) == pytest.approx(theirs["one_run"], abs=1e-6), number
        assert one_run_bound_gaussian(scores, included, **claim) == pytest.approx(theirs["gaussian"], abs=1e-6), number


def test_both_bounds_are_those_of_jax_privacy_on_100_score_vectors(golden: ModuleType) -> None:
    expected = json.loads(GOLDEN.with_suffix(".json").read_text())
    assert len(expected) == golden.CASES == 100
    assert sum(0 < each["one_run"] < each["gaussian"] for each in expected) > 80
    check_against(expected, golden)


@pytest.mark.slow
@pytest.mark.skipif(
    "MCRAGE_JAX_PRIVACY" not in os.environ,
    reason="MCRAGE_JAX_PRIVACY names no Python that has jax-privacy 2.0.0; its numbers are frozen in tests/golden",
)
def test_jax_privacy_still_gives_the_golden_numbers(golden: ModuleType) -> None:
    command = [os.environ["MCRAGE_JAX_PRIVACY"], str(GOLDEN)]
    check_against(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout), golden)


def gaussian_run(number: int, *, canaries: int, mu: float) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    draw = np.random.default_rng([canaries, round(100 * mu), number])
    included = draw.random(canaries) < 0.5
    return draw.normal(size=canaries) + mu * included, included


@pytest.mark.parametrize("mu", [0.2, 1.2])
@pytest.mark.parametrize("bound", [one_run_bound, one_run_bound_gaussian])
def test_a_bound_exceeds_the_truth_in_at_most_one_of_twenty_runs(bound, mu: float) -> None:
    truth, guesses = gaussian_epsilon(mu, delta=DELTA), pre_registered(200)
    runs = [gaussian_run(number, canaries=200, mu=mu) for number in range(RUNS)]
    exceeded = sum(bound(*run, delta=DELTA, guesses=guesses) > truth for run in runs)
    assert binom.sf(exceeded - 1, RUNS, 0.05) > 1e-4  # false-alarm rate of this test


@pytest.mark.parametrize("bound", [one_run_bound, one_run_bound_gaussian])
def test_a_bound_refutes_a_claim_that_is_far_too_low(bound) -> None:
    scores, included = gaussian_run(0, canaries=1000, mu=1.2)
    assert bound(scores, included, delta=DELTA, guesses=pre_registered(1000)) > gaussian_epsilon(0.4, delta=DELTA)


def test_the_bound_of_randomised_response_is_nearly_its_epsilon() -> None:
    draw = np.random.default_rng(0)
    included = draw.random(4000) < 0.5
    told = included ^ (draw.random(4000) < 1 / (1 + math.exp(2)))
    assert 1.7 < one_run_bound(told.astype(float), included, delta=DELTA, guesses=[1900]) < 2


def test_the_chance_of_guesses_without_delta_is_a_binomial_tail() -> None:
    right = math.exp(0.7) / (1 + math.exp(0.7))
    tail = sum(math.comb(30, k) * right**k * (1 - right) ** (30 - k) for k in range(24, 31))
    assert chance_of_guesses(30, 24, canaries=100, epsilon=0.7, delta=0.0) == pytest.approx(tail, rel=1e-12)


def test_the_chance_of_guesses_adds_delta_times_the_steepest_gain() -> None:
    def at_least(number: int) -> float:
        return float(binom.sf(number - 1, 30, 1 / (1 + math.exp(-0.7))))

    gain = max((at_least(24 - fewer) - at_least(24)) / fewer for fewer in range(1, 25))
    expected = at_least(24) + 2 * 100 * 1e-5 * gain
    assert chance_of_guesses(30, 24, canaries=100, epsilon=0.7, delta=1e-5) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("guesses", "correct"), [(50, 40), (200, 150), (500, 500), (500, 300)])
def test_the_chance_of_guesses_grows_with_epsilon_so_that_a_root_is_a_bound(guesses: int, correct: int) -> None:
    chances = [
        chance_of_guesses(guesses, correct, canaries=1000, epsilon=epsilon, delta=DELTA)
        for epsilon in np.linspace(0, 12, 300)
    ]
    assert (np.diff(chances) >= 0).all()


def test_more_right_guesses_prove_more_and_delta_takes_some_of_it_away() -> None:
    bounds = [epsilon_of_guesses(100, right, canaries=400, delta=DELTA, error=0.05) for right in range(0, 101, 5)]
    assert bounds[:11] == [0.0] * 11
    assert (np.diff(bounds[12:]) > 0).all()
    assert epsilon_of_guesses(100, 90, canaries=400, delta=1e-3, error=0.05) < bounds[18]


@pytest.mark.parametrize("mu", [0.05, 0.5, 1.2, 5.0, 20.0])
def test_the_epsilon_of_a_gaussian_is_that_of_dp_accounting(mu: float) -> None:
    assert gaussian_epsilon(mu, delta=DELTA) == pytest.approx(get_epsilon_gaussian(1 / mu, DELTA), abs=1e-6)


def test_the_signal_of_right_runs_has_unit_spread_and_a_doubled_one_is_far_off() -> None:
    runs = [gaussian_run(number, canaries=400, mu=1.2) for number in range(RUNS)]
    z = np.array([signal(*run, expected=1.2).z for run in runs])
    assert abs(z.mean()) < 4 / math.sqrt(RUNS)
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * RUNS)
    assert min(signal(*run, expected=0.6).z for run in runs) > 2
    assert signal(*runs[0], expected=0.6).z > 4


def test_a_signal_without_any_noise_is_without_bound() -> None:
    estimate = signal(np.array([9.0, 8, 0, 0]), np.array([True, True, False, False]), expected=1.0)
    assert math.isinf(estimate.value)
    assert math.isinf(estimate.z)


def test_the_noise_of_right_runs_has_unit_spread_and_a_tenth_less_is_far_off() -> None:
    draws = [np.random.default_rng(number).normal(scale=3, size=2000) for number in range(RUNS)]
    z = np.array([noise(values, expected=3.0).z for values in draws])
    assert abs(z.mean()) < 4 / math.sqrt(RUNS)
    assert abs(z.std() - 1) < 4 / math.sqrt(2 * RUNS)
    assert max(noise(values * 0.9, expected=3.0).z for values in draws) < -3


def test_the_auc_counts_ties_by_half() -> None:
    draw = np.random.default_rng(3)
    scores, included = draw.integers(0, 5, 60).astype(float), draw.random(60) < 0.5
    assert auc(scores, included) == pytest.approx(roc_auc_score(included, scores), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "included", "message"),
    [
        ([1.0, 2, 3, 4], [True, False, False, False], "got 1 and 3"),
        ([1.0, 2, 3, math.nan], [True, True, False, False], "finite"),
        ([1.0, 2, 3], [True, True, False, False], "every canary"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores: list[float], included: list[bool], message: str) -> None:
    with pytest.raises(PrivacyError, match=message):
        one_run_bound(np.array(scores), np.array(included), delta=DELTA, guesses=[1])


@pytest.mark.parametrize(
    "change", [{"guesses": []}, {"guesses": [0]}, {"guesses": [101]}, {"delta": 0.0}, {"confidence": 1.0}]
)
def test_a_claim_out_of_range_is_refused(change: dict[str, object]) -> None:
    settings = {"delta": DELTA, "guesses": [10], "confidence": 0.95} | change
    with pytest.raises(PrivacyError, match="must lie in"):
        one_run_bound(*gaussian_run(0, canaries=200, mu=1.0), **settings)

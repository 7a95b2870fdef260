"""Shares of a budget, and the noise that follows, cost what was asked for and hardly less."""

import math

import pytest

from mcrage.errors import ConfigError, PrivacyError
from mcrage.marginal.budget import Budget, Shares, precision
from mcrage.privacy import accounting
from mcrage.privacy.events import SMALLEST_NOISE, PrivacyEvent

TABLES = {"one_ways": 39, "groups": 1, "conditions": 72, "pairs": 630, "edges": 25}


def events(epsilon: float, delta: float) -> list[PrivacyEvent]:
    budget = Budget(precision=precision(epsilon=epsilon, delta=delta))
    return [
        PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=budget.noise(share, tables), steps=tables)
        for share, tables in TABLES.items()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "delta"), [(0.05, 1e-5), (1.0, 1e-5), (3.0, 1e-6), (8.0, 1e-5), (20.0, 1e-5)])
def test_all_releases_together_cost_at_most_the_epsilon_and_hardly_less(epsilon: float, delta: float) -> None:
    cost = accounting.epsilon(events(epsilon, delta), delta=delta)
    assert cost <= epsilon
    assert cost > 0.99 * epsilon - 2e-4


@pytest.mark.slow
def test_the_same_test_fails_if_a_tenth_less_noise_is_added() -> None:
    less = [
        PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=0.9 * event.noise_multiplier, steps=event.steps)
        for event in events(1.0, 1e-5)
    ]
    assert accounting.epsilon(less, delta=1e-5) > 1.05


def test_no_epsilon_has_exact_counts() -> None:
    budget = Budget(precision=precision(epsilon=math.inf, delta=1e-5))
    assert {budget.noise(share, tables) for share, tables in TABLES.items()} == {0.0}


def test_noise_grows_with_the_tables_and_is_never_too_little_to_be_counted() -> None:
    budget = Budget(precision=100.0)
    assert budget.noise("conditions", 40) == pytest.approx((40 / (0.55 * 100)) ** 0.5)
    assert budget.noise("conditions", 160) == pytest.approx(2 * budget.noise("conditions", 40))
    assert Budget(precision=1e6).noise("conditions", 1) == SMALLEST_NOISE


def test_without_a_forest_conditions_have_its_shares() -> None:
    plain = Shares().without_forest()
    assert (plain.pairs, plain.edges) == (0.0, 0.0)
    assert plain.conditions == pytest.approx(1 - plain.one_ways - plain.groups)
    assert Budget(precision=1.0, shares=plain).noise("pairs", 3) == math.inf


@pytest.mark.parametrize(
    "parts",
    [{"one_ways": 0.5}, {"one_ways": 0.0, "groups": 0.3}, {"pairs": -0.1, "edges": 0.4}, {"pairs": 0.0, "edges": 0.3}],
    ids=["sum", "nothing", "negative", "edges of no pairs"],
)
def test_shares_that_are_none_are_refused(parts: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        Shares(**parts)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 1e-3, float("nan")])
def test_an_epsilon_out_of_range_is_refused(epsilon: float) -> None:
    with pytest.raises(ConfigError, match="epsilon must be above"):
        precision(epsilon=epsilon, delta=1e-5)


def test_a_delta_out_of_range_is_refused() -> None:
    with pytest.raises(PrivacyError, match="delta"):
        precision(epsilon=1.0, delta=0.1)

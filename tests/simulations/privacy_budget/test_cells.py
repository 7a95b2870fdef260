"""Which cells a sweep has, and which settings reach which of them."""

import math

import pytest

from mcrage.config import RunConfig
from mcrage.errors import ConfigError
from server.budget import planned_epsilon
from simulations.privacy_budget.cells import (
    GENERATORS,
    NOISES,
    REAL,
    Cell,
    Sweep,
    numbers,
    parse_settings,
    whole_numbers,
)
from simulations.privacy_budget.plan import plan_lines
from simulations.truth import SCHEMA

COLUMNS = len(SCHEMA.modelled)


def cell(noise: str, epsilon: float) -> Cell:
    return Cell(dataset="cohort", sites=4, patients=100, seed=3, generator="cddpm", noise=noise, epsilon=epsilon)


def sweep(*settings: str, rounds: int | None = None) -> Sweep:
    return Sweep(given=parse_settings(settings, rounds=rounds))


def test_every_combination_is_a_cell_and_without_noise_there_is_one_per_generator() -> None:
    found = Sweep(seeds=(0, 1), epsilons=(1.0, math.inf), given=parse_settings([], rounds=None)).cells
    assert len({each.name for each in found}) == len(found) == 2 * (1 + 2 * (2 + 1))
    assert [each.generator for each in found[:2]] == [REAL, REAL]
    assert {each.noise for each in found if math.isinf(each.epsilon)} == {"none"}


def test_a_setting_with_a_place_before_it_is_for_cells_of_that_noise_alone() -> None:
    asked = sweep("width=16", "shared.dp_sample_rate=0.3", "local.width=32", rounds=7)
    local, shared, none = (
        asked.config(cell(noise, epsilon), columns=COLUMNS, sites=4)
        for noise, epsilon in (("local", 3.0), ("shared", 3.0), ("none", math.inf))
    )
    assert (local.federation.width, shared.federation.width, none.federation.width) == (32, 16, 16)
    assert (local.privacy.dp_sample_rate, shared.privacy.dp_sample_rate) == (0.5, 0.3)
    assert {each.federation.num_server_rounds for each in (local, shared, none)} == {7}
    assert (local.privacy.dp_noise, shared.privacy.dp_noise, none.privacy.dp) == ("local", "shared", False)
    assert shared.federation.local_steps == 1
    assert {each.federation.min_sites for each in (local, shared, none)} == {4}


def test_settings_of_the_privacy_do_not_reach_cells_without_noise() -> None:
    assert not sweep("dp_draws=2").config(cell("none", math.inf), columns=COLUMNS, sites=4).privacy.dp


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["local", "shared"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_counts_and_histograms_leave_room_for_training_within_the_epsilon(noise: str, epsilon: float) -> None:
    config = sweep().config(cell(noise, epsilon), columns=COLUMNS, sites=4)
    run = RunConfig(federation=config.federation, privacy=config.privacy)
    assert 0.9 * epsilon < planned_epsilon(run, SCHEMA) <= epsilon


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("width", "KEY=VALUE"),
        ("other.width=3", "KEY=VALUE"),
        ("dp_epsilon=3", "the command sets it"),
        ("min-sites=3", "the command sets it"),
    ],
)
def test_a_wrong_setting_is_named(item: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse_settings([item], rounds=None)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"generators": ("gan",)}, "generator: expected some of cddpm, marginal"),
        ({"noises": ("local", "local")}, "noise: expected some of local, shared, each once"),
        ({"epsilons": (0.0,)}, "at least .1"),
        ({"epsilons": ()}, "one at least"),
        ({"seeds": (1, 1)}, "stand there once"),
    ],
)
def test_a_wrong_sweep_is_named(changed: dict[str, tuple[object, ...]], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Sweep(**changed, given=parse_settings([], rounds=None))  # type: ignore[arg-type]


def test_numbers_have_commas_or_come_one_by_one() -> None:
    assert numbers(["1,3", "inf"], option="--epsilon") == (1.0, 3.0, math.inf)
    assert whole_numbers("0,1,2", option="--seeds") == (0, 1, 2)
    for wrong in ("one", "nan"):
        with pytest.raises(ConfigError, match="--epsilon: expected numbers"):
            numbers([wrong], option="--epsilon")
    for wrong in ("0,1.5", "inf", "one"):
        with pytest.raises(ConfigError, match="--seeds: expected"):
            whole_numbers(wrong, option="--seeds")


@pytest.mark.slow
def test_a_plan_has_a_line_per_cell_with_its_epsilon() -> None:
    asked = Sweep(sites=2, patients=60, epsilons=(3.0, math.inf), given=parse_settings([], rounds=5))
    *lines, last, first, second, third, fourth = plan_lines(asked)
    prospects = {line.partition(":")[0]: line for line in (first, second, third, fourth)}
    assert "WORSE than a hospital's own rows" in prospects["marginal, local noise, epsilon 3"]
    assert set(prospects) == {f"{name}, {noise} noise, epsilon 3" for name in GENERATORS for noise in NOISES}
    assert [line.partition(":")[0] for line in lines] == [each.name for each in asked.cells]
    costs = {line.partition(":")[0]: line for line in lines}
    assert "epsilon at most 3.00" in costs["cohort-2x60-seed0-marginal-shared-eps3"]
    assert "epsilon at most 3.00" in costs["cohort-2x60-seed0-cddpm-local-eps3"]
    assert "no epsilon" in costs["cohort-2x60-seed0-cddpm-none-epsinf"]
    assert last.startswith("7 cells of 2 hospitals")

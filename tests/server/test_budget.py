import logging
from collections.abc import Callable

import pytest

from mcrage.config import RunConfig, Scalar
from mcrage.data.schema import TableSchema
from mcrage.errors import PrivacyError
from mcrage.privacy.accounting import alone, epsilon
from server.budget import plan_lines, planned_epsilon, planned_events, prospect, tell_prospect, with_noise

PRIVATE = {"dp": True, "dp-epsilon": 3.0, "dp-score-epsilon": 0.25, "dp-sample-rate": 0.2, "num-server-rounds": 20}


@pytest.fixture
def private() -> Callable[..., RunConfig]:
    def make(**changes: Scalar) -> RunConfig:
        return RunConfig.parse(PRIVATE | {name.replace("_", "-"): value for name, value in changes.items()})

    return make


def test_the_noise_follows_from_the_epsilon_of_everything_together(
    private: Callable[..., RunConfig], tiny_schema: TableSchema
) -> None:
    config = with_noise(private(), tiny_schema)
    events = planned_events(config, tiny_schema)
    assert [event.mechanism for event in events] == ["dp-sgd", "discrete-laplace", "discrete-gaussian"] + [
        "discrete-laplace"
    ] * 2
    assert 2.9 < epsilon(events, delta=1e-5) <= 3.0
    assert planned_epsilon(private(), tiny_schema) == epsilon(events, delta=1e-5)
    # power: a little less noise costs more than was asked for
    noise = 0.97 * config.privacy.dp_noise_multiplier
    less = config.model_copy(update={"privacy": config.privacy.model_copy(update={"dp_noise_multiplier": noise})})
    assert epsilon(planned_events(less, tiny_schema), delta=1e-5) > 3.0


def test_a_run_keeps_its_name_when_its_noise_is_worked_out(
    private: Callable[..., RunConfig], tiny_schema: TableSchema
) -> None:
    assert with_noise(private(), tiny_schema).run == private().run != private(dp_epsilon=2.0).run


def test_noise_that_is_named_stays_as_it_is(private: Callable[..., RunConfig], tiny_schema: TableSchema) -> None:
    config = private(dp_epsilon=0.0, dp_noise_multiplier=2.0)
    assert with_noise(config, tiny_schema) == config
    assert with_noise(RunConfig(), tiny_schema) == RunConfig()


def test_an_epsilon_that_no_noise_reaches_is_refused_before_anything_is_touched(
    private: Callable[..., RunConfig], tiny_schema: TableSchema
) -> None:
    with pytest.raises(PrivacyError, match="epsilon"):
        with_noise(private(dp_epsilon=0.01), tiny_schema)


def test_the_plan_says_what_a_run_would_cost(private: Callable[..., RunConfig], tiny_schema: TableSchema) -> None:
    lines = plan_lines(private(), tiny_schema)
    assert "epsilon = 3.00" in lines[-1] or "epsilon = 2.9" in lines[-1]
    assert lines[0].startswith("privacy: 600 steps, sample rate 0.2, noise multiplier ")
    assert "nothing is claimed" in plan_lines(private(dp_noise_seed=1), tiny_schema)[-1]
    assert planned_events(RunConfig(), tiny_schema)[0].mechanism == "unprotected"


def test_with_shared_noise_the_plan_pays_for_sums_that_may_stay_closed_and_tells_the_share(
    private: Callable[..., RunConfig], tiny_schema: TableSchema
) -> None:
    shared = {"dp_noise": "shared", "local_steps": 1, "min_sites": 5, "dp_spare_rounds": 3}
    config = with_noise(private(**shared), tiny_schema)
    training = planned_events(config, tiny_schema)[0]
    assert training.steps == 23
    assert training.own_noise == pytest.approx(training.noise_multiplier / 2)
    assert 2.9 < planned_epsilon(config, tiny_schema) <= 3.0
    lines = plan_lines(config, tiny_schema)
    assert "shared by the sites" in lines[0]
    left = epsilon(alone(planned_events(config, tiny_schema)), delta=1e-5)
    assert left > 3.0
    assert lines[-1].endswith(f"more than 1 colluding sites, or whoever breaks the masks, epsilon = {left:.2f}")
    few = private(**(shared | {"min_sites": 60}), dp_epsilon=8.0, dp_sample_rate=0.05)
    assert plan_lines(few, tiny_schema)[-1].endswith("or whoever breaks the masks, no epsilon at all")


@pytest.mark.parametrize("noise", ["local", "shared"])
def test_the_plan_of_the_marginal_generator_names_its_tables_and_their_epsilon(
    private: Callable[..., RunConfig], tiny_schema: TableSchema, noise: str
) -> None:
    config = private(generator="marginal", dp_noise=noise, dp_score_epsilon=0.0, min_sites=5, dp_spare_rounds=1)
    lines = plan_lines(config, tiny_schema)
    events = planned_events(config, tiny_schema)
    assert lines[0].startswith("privacy: 4 counts per patient with Gaussian noise of standard deviation ")
    assert [event.steps for event in events] == [4, 1, 2, 1, 1] + [4] * (noise == "shared")
    assert 2.9 < planned_epsilon(config, tiny_schema) <= 3.0
    assert any("each site's patients would pay epsilon = " in line for line in lines)
    least = min(event.noise_multiplier for event in events)
    assert any(f"min_histogram_noise above {least:.3g} refuse" in line for line in lines)
    assert (" shared by the sites, " in lines[0]) == (noise == "shared")
    assert ("colluding sites" in lines[-1]) == (noise == "shared")


def test_whoever_starts_a_private_run_is_told_where_such_runs_did_harm(
    private: Callable[..., RunConfig], tiny_schema: TableSchema, caplog: pytest.LogCaptureFixture
) -> None:
    config = private(generator="marginal", dp_score_epsilon=0.0, min_sites=5, dp_epsilon=1.0)
    with caplog.at_level(logging.INFO, "mcrage.server"):
        tell_prospect(config, tiny_schema, patients=500, sites=5)
        tell_prospect(config, tiny_schema, patients=5e7, sites=5)
        tell_prospect(RunConfig(), tiny_schema, patients=500, sites=5)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "WORSE than a hospital's own rows" in caplog.messages[0]
    assert "WORSE" not in caplog.messages[1]
    shared = private(generator="marginal", dp_score_epsilon=0.0, min_sites=5, dp_epsilon=1.0, dp_noise="shared")
    known = [prospect(each, tiny_schema, patients=20_000, sites=10).shares["cohort"] for each in (config, shared)]
    assert known[0] < known[1], "of ten sites' noise there is √10 times as much as of one"

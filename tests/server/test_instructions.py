from collections.abc import Callable

import numpy as np
import pytest

from mcrage.config import RunConfig, StrategyName
from mcrage.messages import EvaluateInstruction, TrainInstruction
from mcrage.wire import Wire, unpacked
from server.instructions import Instructions
from server.strategy import make_strategy
from simulations.grid import InProcessGrid

PARAMETERS = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.float32)}
NODES = {"b": 1002, "a": 1001}


def received(message: object) -> Wire:
    records = message.content  # type: ignore[attr-defined]
    arrays = {name: array.numpy() for name, array in records.array_records["arrays"].items()}
    return unpacked(Wire(dict(records.config_records["config"]), arrays))


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi"])
def test_every_site_is_sent_the_parameters_and_what_to_do_with_them(strategy: StrategyName) -> None:
    config = RunConfig.parse({"strategy": strategy, "local-steps": 7})
    grid = InProcessGrid(lambda message, context: message, [{}, {}, {}], config)
    messages = Instructions(config, "{}", PARAMETERS).training(
        make_strategy(config.federation), NODES, server_round=3, parameters=PARAMETERS, grid=grid
    )
    assert {site: message.metadata.dst_node_id for site, message in messages.items()} == NODES
    for message in messages.values():
        told = TrainInstruction.from_wire(received(message))
        assert (told.run, told.server_round, told.first_step, told.local_steps) == (config.run, 3, 14, 7)
        assert told.proximal_mu == (config.federation.proximal_mu if strategy == "fedprox" else 0.0)
        assert not told.dp
        assert told.noise_multiplier == 0.0
        for name, array in PARAMETERS.items():
            np.testing.assert_array_equal(told.parameters[name], array)


def test_where_nobody_is_asked_no_strategy_waits_for_a_node() -> None:
    grid = InProcessGrid(lambda message, context: message, [], RunConfig())
    instructions = Instructions(RunConfig(), "{}", PARAMETERS)
    strategy = make_strategy(RunConfig().federation)
    assert instructions.training(strategy, {}, server_round=1, parameters=PARAMETERS, grid=grid) == {}


@pytest.mark.parametrize("dp", [False, True])
def test_a_measurement_says_how_noisy_it_has_to_be(dp: bool, tiny_config: Callable[..., RunConfig]) -> None:
    noise = {"dp": True, "dp_noise_multiplier": 1.0, "dp_score_epsilon": 0.5} if dp else {}
    config = tiny_config(**noise)
    InProcessGrid(lambda message, context: message, [], config)
    messages = Instructions(config, "{}", PARAMETERS).measurement(NODES, server_round=2, parameters=PARAMETERS)
    assert {site: message.metadata.message_type for site, message in messages.items()} == dict.fromkeys(
        NODES, "evaluate"
    )
    told = EvaluateInstruction.from_wire(received(messages["a"]))
    assert (told.dp, told.score_epsilon, told.delta) == ((True, 0.5, 1e-5) if dp else (False, 0.0, 0.0))

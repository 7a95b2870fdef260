import itertools
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mcrage.config import FederationConfig, RunConfig
from mcrage.errors import FederationError
from mcrage.messages import Parameters, SiteUpdate
from server.strategy import RoundGrid, aggregate, make_strategy, restore_state, state_of, to_record
from simulations.grid import InProcessGrid

NAMES = ["w", "b"]
START: Parameters = {"w": np.full((2, 2), 0.5, np.float32), "b": np.zeros(3, np.float32)}
STRATEGIES: dict[str, type[FedAvg]] = {
    "fedavg": FedAvg,
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
}
GRID = InProcessGrid(lambda message, context: message, [{}, {}, {}, {}], RunConfig())
floats = st.floats(-10, 10, width=32)
updates_of = st.lists(
    st.tuples(arrays.arrays(np.float32, (2, 2), elements=floats), arrays.arrays(np.float32, 3, elements=floats)),
    min_size=1,
    max_size=4,
)


def config(strategy: str, **changes: Any) -> FederationConfig:
    return FederationConfig(strategy=strategy, **changes)  # type: ignore[arg-type]


def instructions(strategy: FedAvg, parameters: Parameters, server_round: int, sites: list[str]) -> dict[str, Message]:
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = None
    view = RoundGrid(GRID, list(GRID.get_node_ids())[: len(sites)])
    messages = strategy.configure_train(server_round, to_record(parameters), ConfigRecord(), view)
    return dict(zip(sites, messages, strict=True))


def one_round(
    strategy: FedAvg,
    updates: dict[str, Parameters],
    *,
    start: Parameters = START,
    server_round: int = 1,
    **weights: float,
) -> Parameters:
    checked = {site: SiteUpdate(server_round=server_round, loss=0.0, parameters=p) for site, p in updates.items()}
    return aggregate(
        strategy,
        checked,
        weights=dict.fromkeys(updates, 1.0) | weights,
        instructions=instructions(strategy, start, server_round, list(updates)),
        server_round=server_round,
    )


def some_updates(server_round: int) -> dict[str, Parameters]:
    draw = np.random.default_rng(server_round)
    return {site: {n: (a + draw.normal(size=a.shape)).astype(np.float32) for n, a in START.items()} for site in "ab"}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_is_flowers_own_and_gives_finite_float32(name: str) -> None:
    strategy = make_strategy(config(name))
    assert type(strategy) is STRATEGIES[name]
    parameters = START
    for server_round in (1, 2, 3):
        parameters = one_round(strategy, some_updates(server_round), start=parameters, server_round=server_round)
    assert {n: (a.dtype, a.shape) for n, a in parameters.items()} == {n: (a.dtype, a.shape) for n, a in START.items()}
    assert all(np.isfinite(array).all() for array in parameters.values())


def test_the_server_strategies_differ_from_each_other() -> None:
    results = []
    for name in ("fedavg", "fedavgm", "fedadam", "fedyogi"):
        strategy, parameters = make_strategy(config(name)), START
        for server_round in (1, 2):
            parameters = one_round(strategy, some_updates(server_round), start=parameters, server_round=server_round)
        results.append(parameters["w"].tobytes())
    assert len(set(results)) == 4


def test_fedprox_tells_the_sites_its_weight() -> None:
    messages = instructions(make_strategy(config("fedprox", proximal_mu=0.7)), START, 1, ["a"])
    assert messages["a"].content.config_records["config"]["proximal-mu"] == 0.7


@settings(max_examples=30)
@given(updates_of, st.integers(0, 23))
def test_the_average_does_not_depend_on_the_order_of_the_replies(drawn: list[Any], order: int) -> None:
    updates = {f"site-{place}": dict(zip(NAMES, pair, strict=True)) for place, pair in enumerate(drawn)}
    orders = list(itertools.permutations(updates.items()))
    shuffled = dict(orders[order % len(orders)])
    one, other = (one_round(make_strategy(config("fedavg")), u) for u in (updates, shuffled))
    assert all(one[name].tobytes() == other[name].tobytes() for name in NAMES)


@settings(max_examples=30)
@given(updates_of)
def test_the_average_of_equal_updates_is_that_update(drawn: list[Any]) -> None:
    update = dict(zip(NAMES, drawn[0], strict=True))
    average = one_round(make_strategy(config("fedavg")), {f"site-{place}": update for place in range(len(drawn))})
    for name in NAMES:
        np.testing.assert_allclose(average[name], update[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=30)
@given(updates_of)
def test_the_average_lies_between_the_updates(drawn: list[Any]) -> None:
    updates = {f"site-{place}": dict(zip(NAMES, pair, strict=True)) for place, pair in enumerate(drawn)}
    average = one_round(make_strategy(config("fedavg")), updates)
    for name in NAMES:
        stacked = np.stack([update[name] for update in updates.values()])
        assert (average[name] >= stacked.min(0) - 1e-5).all()
        assert (average[name] <= stacked.max(0) + 1e-5).all()


@settings(max_examples=30)
@given(st.floats(0.1, 100), st.floats(0.1, 100), st.floats(0.1, 10))
def test_only_the_ratio_of_the_weights_counts(a: float, b: float, scale: float) -> None:
    updates = some_updates(1)
    one = one_round(make_strategy(config("fedavg")), updates, a=a, b=b)
    other = one_round(make_strategy(config("fedavg")), updates, a=a * scale, b=b * scale)
    exact = (a * updates["a"]["w"].astype(float) + b * updates["b"]["w"]) / (a + b)
    np.testing.assert_allclose(one["w"], other["w"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one["w"], exact, rtol=1e-5, atol=1e-6)


def test_fedavgm_without_momentum_and_with_rate_one_is_fedavg() -> None:
    plain = one_round(make_strategy(config("fedavg")), some_updates(1))
    momentum = make_strategy(config("fedavgm", server_momentum=0.0, server_learning_rate=1.0))
    np.testing.assert_array_equal(one_round(momentum, some_updates(1))["w"], plain["w"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_restored_strategy_goes_on_bit_by_bit(name: str) -> None:
    strategy, parameters = make_strategy(config(name)), START
    for server_round in (1, 2):
        parameters = one_round(strategy, some_updates(server_round), start=parameters, server_round=server_round)
    restored = make_strategy(config(name))
    # A checkpoint does not keep the order.
    restore_state(restored, dict(reversed(state_of(strategy, NAMES).items())), NAMES)
    one, other = (one_round(s, some_updates(3), start=parameters, server_round=3) for s in (strategy, restored))
    assert all(one[n].tobytes() == other[n].tobytes() for n in NAMES)


def test_the_moments_of_a_strategy_are_named_arrays() -> None:
    kept = {}
    for name in STRATEGIES:
        strategy = make_strategy(config(name))
        assert state_of(strategy, NAMES) == {}
        one_round(strategy, some_updates(1))
        kept[name] = sorted(state_of(strategy, NAMES))
    moments = ["m/b", "m/w", "v/b", "v/w"]
    assert kept["fedavg"] == kept["fedprox"] == []
    assert kept["fedavgm"] == ["momentum/b", "momentum/w"]
    assert kept["fedadam"] == kept["fedyogi"] == moments


def test_a_training_that_diverges_stops() -> None:
    huge = {site: {name: np.full_like(array, 3e38) for name, array in START.items()} for site in "ab"}
    with (
        pytest.raises(FederationError, match="not finite"),
        pytest.warns(RuntimeWarning),
    ):
        one_round(make_strategy(config("fedavgm", server_learning_rate=10.0)), huge)


def test_a_round_shows_the_strategy_its_own_nodes_and_the_grid_behind() -> None:
    first, *_ = GRID.get_node_ids()
    view = RoundGrid(GRID, [first])
    assert list(view.get_node_ids()) == [first]
    message = view.create_message(RecordDict({"x": ArrayRecord()}), "train", first, "group")
    (message_id,) = view.push_messages([message])
    assert len(list(view.pull_messages([message_id]))) == 1
    assert len(list(view.send_and_receive([message]))) == 1
    marker: Any = object()
    view.set_run(marker)
    assert view.run is GRID.run is marker


def test_flower_is_the_version_whose_strategies_were_read() -> None:
    # What is used beyond the documented interface: these attributes, which the checkpoint depends on.
    assert version("flwr").startswith("1.41.")
    assert {"m_t", "v_t", "current_arrays"} <= set(vars(FedAdam()))
    assert {"m_t", "v_t", "current_arrays"} <= set(vars(FedYogi()))
    assert {"momentum_vector", "current_arrays"} <= set(vars(FedAvgM()))

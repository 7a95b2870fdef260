import itertools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from client.app import app
from mcrage.config import FederationConfig, RunConfig, sites_for_trimming
from mcrage.errors import FederationError
from mcrage.messages import Parameters, SiteUpdate
from server.rounds import run_federation
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
    "fedmedian": FedMedian,
    "fedtrimmedavg": FedTrimmedAvg,
    "krum": Krum,
    "multikrum": MultiKrum,
}
ROBUST = [*STRATEGIES][5:]
SITES = "abcde"
GRID = InProcessGrid(lambda message, context: message, [{}] * 9, RunConfig())
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


def some_updates(server_round: int, sites: str = SITES) -> dict[str, Parameters]:
    draw = np.random.default_rng(server_round)
    return {site: {n: (a + draw.normal(size=a.shape)).astype(np.float32) for n, a in START.items()} for site in sites}


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


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_depends_on_the_order_of_the_replies(name: str) -> None:
    updates = some_updates(1)
    one, other = (one_round(make_strategy(config(name)), dict(u)) for u in (updates.items(), [*updates.items()][::-1]))
    assert all(one[n].tobytes() == other[n].tobytes() for n in NAMES)


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
    updates = some_updates(1, "ab")
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
    assert all(kept[name] == [] for name in ("fedavg", "fedprox", *ROBUST))
    assert kept["fedavgm"] == ["momentum/b", "momentum/w"]
    assert kept["fedadam"] == kept["fedyogi"] == moments


def test_a_training_that_diverges_stops() -> None:
    huge = {site: {name: np.full_like(array, 3e38) for name, array in START.items()} for site in "ab"}
    with (
        pytest.raises(FederationError, match="not finite"),
        pytest.warns(RuntimeWarning),
    ):
        one_round(make_strategy(config("fedavgm", server_learning_rate=10.0)), huge)


# What a site may send instead of its honest update, which is one unit long.
LIES: dict[str, Callable[[Parameters, np.random.Generator], Parameters]] = {
    "ten times the update": lambda update, draw: {n: 10 * a for n, a in update.items()},
    "the opposite": lambda update, draw: {n: -a for n, a in update.items()},
    "random, as long": lambda update, draw: of_length(1.0, draw),
    "random, much longer": lambda update, draw: of_length(1e3, draw),
    "as large as float32": lambda update, draw: {n: np.full_like(a, 3e38) for n, a in update.items()},
}
ZEROS: Parameters = {"w": np.zeros((20, 20), np.float32), "b": np.zeros(30, np.float32)}


def of_length(length: float, draw: np.random.Generator) -> Parameters:
    noise = {n: draw.normal(size=a.shape).astype(np.float32) for n, a in ZEROS.items()}
    return {n: np.float32(length / size(noise)) * a for n, a in noise.items()}


def size(update: Parameters) -> float:
    return float(np.linalg.norm(flat(update)))


def flat(update: Parameters) -> NDArray[np.float64]:
    return np.concatenate([update[n].astype(np.float64).ravel() for n in NAMES])


def honest_updates(draw: np.random.Generator) -> dict[str, Parameters]:
    """Of unit length and mostly the same direction; any two are .14 apart."""
    common = of_length(1.0, draw)
    spread = {site: of_length(0.1, draw) for site in SITES}
    return {site: {n: common[n] + spread[site][n] for n in NAMES} for site in SITES}


def averaged(name: str, updates: dict[str, Parameters]) -> NDArray[np.float64]:
    return flat(one_round(make_strategy(config(name)), updates, start=ZEROS))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("liar", SITES)
def test_a_lying_site_moves_robust_strategies_by_less_than_honest_sites_differ_and_the_mean_by_more(
    liar: str, lie: str
) -> None:
    draw = np.random.default_rng(5)
    honest = honest_updates(draw)
    lying = honest | {liar: LIES[lie](honest[liar], draw)}
    others = np.stack([flat(honest[site]) for site in SITES if site != liar])
    differ = max(float(np.linalg.norm(one - other)) for one, other in itertools.combinations(others, 2))
    moved = {name: np.linalg.norm(averaged(name, lying) - averaged(name, honest)) for name in ("fedavg", *ROBUST)}
    assert moved.pop("fedavg") > 1.2 * differ, "the power of the test"
    assert all(distance < differ for distance in moved.values())


@pytest.mark.parametrize("lie", LIES)
def test_krum_takes_an_honest_update_and_multikrum_the_mean_of_all_honest_ones(lie: str) -> None:
    draw = np.random.default_rng(6)
    honest = honest_updates(draw)
    lying = honest | {"c": LIES[lie](honest["c"], draw)}
    others = [flat(honest[site]) for site in SITES if site != "c"]
    assert any((averaged("krum", lying) == other).all() for other in others)
    np.testing.assert_allclose(averaged("multikrum", lying), np.mean(others, axis=0), rtol=1e-6, atol=1e-9)


@settings(max_examples=30)
@given(updates_of.filter(lambda drawn: len(drawn) == 4), updates_of, st.sampled_from(["fedmedian", "fedtrimmedavg"]))
def test_whatever_one_site_sends_every_parameter_stays_between_those_of_honest_sites(
    honest: list[Any], sent: list[Any], name: str
) -> None:
    updates = {f"site-{place}": dict(zip(NAMES, pair, strict=True)) for place, pair in enumerate([sent[0], *honest])}
    average = one_round(make_strategy(config(name)), updates)
    for place, n in enumerate(NAMES):
        stacked = np.stack([pair[place] for pair in honest])
        assert (average[n] >= stacked.min(0)).all()
        assert (average[n] <= stacked.max(0)).all()


def closest(updates: dict[str, Parameters], malicious: int) -> str:
    """Krum as its paper defines it, by a naive loop."""
    scores = {}
    for site in updates:
        distances = sorted(np.square(flat(updates[site]) - flat(updates[other])).sum() for other in updates)
        scores[site] = sum(distances[1 : len(updates) - malicious - 1])
    return min(scores, key=scores.__getitem__)


@pytest.mark.parametrize("malicious", [1, 2])
def test_krum_finds_what_its_definition_finds_where_updates_are_small_beside_the_parameters(malicious: int) -> None:
    found, in_float32 = [], []
    sites = SITES + "fg"
    for seed in range(20):
        draw = np.random.default_rng(seed)
        updates = {site: {n: a + np.float32(1) for n, a in of_length(0.01, draw).items()} for site in sites}
        expected = flat(updates[closest(updates, malicious)])
        strategy = make_strategy(config("krum", malicious_sites=malicious))
        found.append((flat(one_round(strategy, updates, start=ZEROS)) == expected).all())
        picked, _ = strategy.aggregate_train(1, replies(strategy, updates))
        assert picked is not None
        in_float32.append((flat({n: array.numpy() for n, array in picked.items()}) == expected).all())
    assert all(found)
    assert sum(in_float32) < 15, "the power of the test: Flower's distances in float32 mislead Krum"


def replies(strategy: FedAvg, updates: dict[str, Parameters]) -> list[Message]:
    asked = instructions(strategy, ZEROS, 1, list(updates))
    parts = [(asked[site], to_record(update)) for site, update in updates.items()]
    return [
        Message(RecordDict({"arrays": a, "metrics": MetricRecord({"weight": 1.0})}), reply_to=to) for to, a in parts
    ]


@pytest.mark.parametrize(
    ("name", "changes", "needed"),
    [
        ("fedmedian", {}, 3),
        ("fedtrimmedavg", {}, 5),
        ("fedtrimmedavg", {"trimmed_share": 0.4}, 3),
        ("krum", {}, 5),
        ("krum", {"malicious_sites": 3}, 9),
        ("multikrum", {"malicious_sites": 2}, 7),
    ],
)
def test_a_round_of_too_few_sites_is_refused_and_never_a_plain_mean(
    name: str, changes: dict[str, Any], needed: int
) -> None:
    assert config(name, **changes).needed_sites == needed
    updates = some_updates(1, "abcdefghi"[:needed])
    enough = one_round(make_strategy(config(name, **changes)), updates)
    mean = np.mean([update["w"] for update in updates.values()], axis=0, dtype=np.float64)
    assert not np.allclose(enough["w"], mean)
    del updates["a"]
    with pytest.raises(FederationError, match=f"{needed} sites, got {needed - 1}"):
        one_round(make_strategy(config(name, **changes)), updates)


def test_flower_alone_would_have_given_the_plain_mean() -> None:
    # What the refusal is for.
    updates = some_updates(1, "abcd")
    strategy = make_strategy(config("fedtrimmedavg"))
    averaged, _ = strategy.aggregate_train(1, replies(strategy, updates))
    assert averaged is not None
    np.testing.assert_allclose(averaged["w"].numpy(), np.mean([u["w"] for u in updates.values()], axis=0), rtol=1e-6)


@given(st.floats(1e-6, 0.4999))
def test_the_fewest_sites_for_trimming_are_those_of_which_flower_leaves_one_out_at_each_end(share: float) -> None:
    fewest = sites_for_trimming(share)
    assert int(share * fewest) == 1
    assert int(share * (fewest - 1)) == 0


def test_multikrum_leaves_out_as_many_as_may_lie_of_those_who_answered() -> None:
    strategy = make_strategy(config("multikrum", malicious_sites=2))
    for sites, selected in (("abcdefg", 5), ("abcdefghi", 7)):
        one_round(strategy, some_updates(1, sites))
        assert isinstance(strategy, MultiKrum)
        assert strategy.num_nodes_to_select == selected


def test_a_run_below_the_strategys_number_of_sites_ends_with_both_numbers(
    tiny_config: Callable[..., RunConfig],
) -> None:
    def client_app(message: Message, context: Context) -> Message:
        late = message.content.config_records["config"].get("server-round") == 2
        if late and context.node_config["partition-id"] == 1:
            raise RuntimeError
        return app(message, context)

    run = tiny_config(strategy="fedmedian", min_sites=3)
    with pytest.raises(FederationError, match="round 2: 2 sites answered, 3 are needed"):
        run_federation(InProcessGrid.of_folder(client_app, 3, run), run)


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
    assert {"num_malicious_nodes", "num_nodes_to_select"} <= set(vars(MultiKrum()))
    assert "beta" in vars(FedTrimmedAvg())

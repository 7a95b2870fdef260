"""Which Flower strategy averages the updates, and what of it has to survive a restart.

The strategies are Flower's own, also those that bear a site that lies. Around them: a view of the grid that holds the
sites of this round and no others, so that neither Flower's waiting loop nor its draws from the global generator decide
who takes part; and their moments as named arrays, for the checkpoint.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
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
from flwr.supercore.run import Run
from numpy.typing import NDArray

from mcrage.config import SITES_FOR_MEDIAN, FederationConfig, RobustName, sites_for_krum, sites_for_trimming
from mcrage.errors import FederationError
from mcrage.messages import Parameters, SiteUpdate

State = dict[str, NDArray[Any]]

WEIGHT = "weight"
"""Name of the only metric that the strategy sees; its value is the server's."""


def make_strategy(config: FederationConfig) -> FedAvg:
    """The strategy of a run. It takes every site that it is shown and waits for none.

    A server's momentum is FedAvgM's own, moments are FedAdam's and FedYogi's. The robust strategies (FedMedian,
    FedTrimmedAvg, Krum, MultiKrum) have neither: what they average is the next round's start, and a restart has nothing
    of theirs to keep.
    """
    common: dict[str, Any] = {
        "min_train_nodes": 1,
        "min_available_nodes": 1,
        "min_evaluate_nodes": 1,
        "weighted_by_key": WEIGHT,
    }
    moments: dict[str, Any] = {"eta": config.eta, "tau": config.tau, "beta_1": config.beta_1, "beta_2": config.beta_2}
    match config.strategy:
        case "fedavg":
            return FedAvg(**common)
        case "fedavgm":
            lr, momentum = config.server_learning_rate, config.server_momentum
            return FedAvgM(**common, server_learning_rate=lr, server_momentum=momentum)
        case "fedprox":
            return FedProx(**common, proximal_mu=config.proximal_mu)
        case "fedadam":
            return FedAdam(**common, **moments)
        case "fedyogi":
            return FedYogi(**common, **moments)
        case robust:
            return _robust(robust, config, common)


def _robust(name: RobustName, config: FederationConfig, common: Mapping[str, Any]) -> FedAvg:
    match name:
        case "fedmedian":
            return FedMedian(**common)
        case "fedtrimmedavg":
            return FedTrimmedAvg(**common, beta=config.trimmed_share)
        case "krum":
            return Krum(**common, num_malicious_nodes=config.malicious_sites)
        case "multikrum":
            return MultiKrum(**common, num_malicious_nodes=config.malicious_sites)


def state_of(strategy: FedAvg, names: Sequence[str]) -> State:
    """The strategy's moments as arrays: what the next round depends on besides the parameters.

    Args:
        strategy: A strategy of :func:`make_strategy`.
        names: Names of the parameters, in order.
    """
    if isinstance(strategy, FedAvgM):
        return {f"momentum/{name}": array for name, array in zip(names, strategy.momentum_vector or [], strict=False)}
    if isinstance(strategy, FedAdam | FedYogi):
        moments = {"m": strategy.m_t or {}, "v": strategy.v_t or {}}
        return {f"{kind}/{name}": array for kind, arrays in moments.items() for name, array in arrays.items()}
    return {}


def restore_state(strategy: FedAvg, state: Mapping[str, NDArray[Any]], names: Sequence[str]) -> None:
    """Gives the strategy the moments that :func:`state_of` took from another one; nothing before the first round."""
    if not state:
        return
    if isinstance(strategy, FedAvgM):
        strategy.momentum_vector = [state[f"momentum/{name}"] for name in names]
    if isinstance(strategy, FedAdam | FedYogi):
        strategy.m_t = {name: state[f"m/{name}"] for name in names}
        strategy.v_t = {name: state[f"v/{name}"] for name in names}


def aggregate(
    strategy: FedAvg,
    updates: Mapping[str, SiteUpdate],
    *,
    weights: Mapping[str, float],
    instructions: Mapping[str, Message],
    server_round: int,
) -> Parameters:
    """The strategy's next parameters, float32, from checked updates in the order of the sites' names.

    The strategy gets messages that are made here: the sites' numbers, the server's weights and nothing else.

    Raises:
        FederationError: If the result is not finite: the training diverged. If there are so few updates that a robust
            strategy would be the plain mean, or could be led by a lying site.
    """
    needed = _needed_updates(strategy)
    if len(updates) < needed:
        name = type(strategy).__name__
        raise FederationError(f"round {server_round}: {name} needs the updates of {needed} sites, got {len(updates)}")
    if type(strategy) is MultiKrum:  # Krum is one too, and takes one update
        strategy.num_nodes_to_select = len(updates) - strategy.num_malicious_nodes
    # Krum's squared distances are differences of squared norms, which float32 would round away.
    dtype = np.float64 if needed > 1 else np.float32
    replies = []
    for site in sorted(updates):
        arrays = to_record({name: array.astype(dtype, copy=False) for name, array in updates[site].parameters.items()})
        content = RecordDict({"arrays": arrays, "metrics": MetricRecord({WEIGHT: weights[site]})})
        replies.append(Message(content, reply_to=instructions[site]))
    averaged, _ = strategy.aggregate_train(server_round, replies)
    assert averaged is not None, "a strategy that gets replies gives parameters"
    parameters = {name: array.numpy().astype(np.float32) for name, array in averaged.items()}
    bad = [name for name, array in parameters.items() if not np.isfinite(array).all()]
    if bad:
        raise FederationError(
            f"round {server_round}: {len(bad)} averaged arrays are not finite; lower the learning rates"
        )
    return parameters


def _needed_updates(strategy: FedAvg) -> int:
    match strategy:
        case MultiKrum():
            return sites_for_krum(strategy.num_malicious_nodes)
        case FedTrimmedAvg():
            return sites_for_trimming(strategy.beta)
        case FedMedian():
            return SITES_FOR_MEDIAN
        case _:
            return 1


def to_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Named arrays as Flower's record."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


class RoundGrid(Grid):
    """A grid as a strategy may see it in one round: only the nodes that are asked.

    Args:
        grid: The grid behind it.
        node_ids: Nodes of this round.
    """

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid = grid
        self._node_ids = list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes of this round."""
        return list(self._node_ids)

    def set_run(self, run: Run) -> None:
        """As the grid behind it."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As the grid behind it."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As the grid behind it."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid behind it."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the grid behind it."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """As the grid behind it."""
        return self._grid.send_and_receive(messages, timeout=timeout)

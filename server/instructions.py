"""What the sites are asked in a round, as Flower's messages."""

from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM

from mcrage.config import PrivacyConfig, RunConfig
from mcrage.messages import EvaluateInstruction, Parameters, SumInstruction, TrainInstruction
from mcrage.peers import Peer, peers_to_json
from mcrage.wire import packed
from server.strategy import RoundGrid, to_record


class Instructions:
    """Makes the messages of a run.

    Args:
        config: The settings, with a noise multiplier where there is privacy.
        description: The untrained model.
        names: Of its parameters, in order.
    """

    def __init__(self, config: RunConfig, description: str, names: Iterable[str]) -> None:
        self._config, self.description, self.names = config, description, tuple(names)

    def training(
        self, strategy: FedAvg, nodes: Mapping[str, int], *, server_round: int, parameters: Parameters, grid: Grid
    ) -> dict[str, Message]:
        """The strategy's instructions to train from these parameters, by site."""
        if not nodes:
            return {}  # a strategy would wait for a node for ever
        federation, privacy = self._config.federation, self._config.privacy
        instruction = TrainInstruction(
            **self._common(),
            server_round=server_round,
            parameters=parameters,
            first_step=(server_round - 1) * federation.local_steps,
            local_steps=federation.local_steps,
            total_steps=federation.total_steps,
            batch_size=federation.batch_size,
            learning_rate=federation.learning_rate,
            warmup_steps=federation.warmup_steps,
            proximal_mu=federation.proximal_mu if federation.strategy == "fedprox" else 0.0,
            **(_noise(privacy) if privacy.dp else {}),
        )
        wire = instruction.to_wire()
        sent = packed(wire)
        if isinstance(strategy, FedAvgM):
            strategy.current_arrays = None  # else it starts from its own copy, not from what was kept
        view, config = RoundGrid(grid, list(nodes.values())), ConfigRecord(dict(sent.values))
        messages = strategy.configure_train(server_round, to_record(wire.arrays), config, view)
        record = to_record(sent.arrays)
        for message in messages:
            message.content["arrays"] = record  # the strategy keeps those that it was given, by name
        by_node = {message.metadata.dst_node_id: message for message in messages}
        return {site: by_node[node_id] for site, node_id in nodes.items()}

    def sum(
        self,
        nodes: Mapping[str, int],
        *,
        peers: Mapping[str, Peer],
        server_round: int,
        attempt: int,
        parameters: Parameters,
    ) -> dict[str, Message]:
        """Instructions for a step that these sites take together, by site: the same for all of them."""
        privacy = self._config.privacy
        instruction = SumInstruction(
            **self._common(),
            server_round=server_round,
            attempt=attempt,
            total_rounds=self._config.federation.num_server_rounds,
            parameters=parameters,
            colluders=privacy.dp_colluders,
            peers=peers_to_json(peers),
            **_noise(privacy),
        )
        wire = packed(instruction.to_wire())
        content = RecordDict({"config": ConfigRecord(dict(wire.values)), "arrays": to_record(wire.arrays)})
        return {site: Message(content, node_id, "train.sum") for site, node_id in nodes.items()}

    def measurement(self, nodes: Mapping[str, int], *, server_round: int, parameters: Parameters) -> dict[str, Message]:
        """Instructions to measure the model with these parameters on the test patients, by site."""
        privacy = self._config.privacy
        instruction = EvaluateInstruction(
            **self._common(),
            server_round=server_round,
            parameters=parameters,
            score_epsilon=privacy.dp_score_epsilon if privacy.dp else 0.0,
        )
        wire = packed(instruction.to_wire())
        content = RecordDict({"config": ConfigRecord(dict(wire.values)), "arrays": to_record(wire.arrays)})
        return {site: Message(content, node_id, MessageType.EVALUATE) for site, node_id in nodes.items()}

    def _common(self) -> dict[str, Any]:
        """What every instruction about the model says."""
        federation, privacy = self._config.federation, self._config.privacy
        return {
            "run": self._config.run,
            "test_fraction": federation.test_fraction,
            "description": self.description,
            "seed": federation.seed,
            "dp": privacy.dp,
            "delta": privacy.dp_delta if privacy.dp else 0.0,
            "noise_seed": privacy.dp_noise_seed,
        }


def _noise(privacy: PrivacyConfig) -> dict[str, Any]:
    """What a training instruction says about noise."""
    return {
        "noise_multiplier": privacy.dp_noise_multiplier,
        "sample_rate": privacy.dp_sample_rate,
        "max_grad_norm": privacy.dp_max_grad_norm,
        "draws": privacy.dp_draws,
    }

"""The round loop: ask the sites, check what comes back, average, keep a checkpoint, and so on to the last round.

The averaging is that of a stock Flower strategy; the loop around it is ours because ``Strategy.start`` begins at
round 1 whatever was done before, waits for ever below its minimum of nodes, and ends at the first inconsistent reply.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvgM

from mcrage.cddpm import CDDPM
from mcrage.config import PrivacyConfig, RunConfig
from mcrage.data.groups import GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.data.transform import TableTransform
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import CheckpointError, ConfigError, FederationError
from mcrage.memory import require_memory
from mcrage.messages import (
    EvaluateInstruction,
    Parameters,
    SiteLoss,
    SiteScores,
    SiteUpdate,
    TrainInstruction,
    Wire,
    counts_from_json,
    counts_to_json,
)
from mcrage.privacy.counts import SCORE_EDGES
from mcrage.privacy.statement import PrivacyAccount
from server.budget import with_noise
from server.checkpoints import Checkpoint, CheckpointFolder
from server.records import MetricsFile as MetricsFile
from server.records import RoundRecord as RoundRecord
from server.roster import Roster, call_roll, collect_accounts, total_counts
from server.strategy import RoundGrid, aggregate, make_strategy, restore_state, state_of, to_record
from server.validation import Replies, check_replies

_LOG = logging.getLogger("mcrage.server")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FederationResult:
    """What a run gives.

    Attributes:
        model: The trained generator: the moving average of the rounds.
        site_counts: Group counts that each site released about its training rows, by site.
        group_counts: Their sum.
        marginals: One-way histograms summed over the sites; None without them.
        history: One record per round.
        absent: Nodes that took no part in the run, with the reason.
        accounts: What the sites' privacy ledgers say after the run, by site; empty without privacy.
    """

    model: CDDPM
    site_counts: Mapping[str, GroupCounts]
    group_counts: GroupCounts
    marginals: Marginals | None
    history: tuple[RoundRecord, ...]
    absent: Mapping[str, str]
    accounts: Mapping[str, PrivacyAccount] = field(default_factory=dict)


Progress = Callable[[RoundRecord], None]


def run_federation(grid: Grid, config: RunConfig, *, progress: Progress | None = None) -> FederationResult:
    """Trains one generator at all sites that the grid reaches.

    Args:
        grid: Flower's, or one inside this process.
        config: The settings. Checkpoints and ``metrics.jsonl`` go to ``config.places.out_dir``.
        progress: Called after every round.

    Raises:
        FederationError: If too few sites answer, or the training diverges; ``resume`` goes on from the last round.
        SchemaError: If the sites' data dictionaries differ.
        ConfigError: If the folder has an unfinished run and ``resume`` is not set.
        CheckpointError: If ``resume`` is set and the run there had other settings.
    """
    roster = call_roll(grid, config)
    loop = RoundLoop(grid, config, roster)
    while loop.server_round < config.federation.num_server_rounds:
        record = loop.next_round()
        if progress is not None:
            progress(record)
    return replace(loop.result(), accounts=loop.accounts())


class RoundLoop:
    """A run between two rounds. What the next round depends on is all in one :class:`Checkpoint`.

    Args:
        grid: Reaches the sites.
        config: The settings.
        roster: The sites.
    """

    def __init__(self, grid: Grid, config: RunConfig, roster: Roster) -> None:
        self._grid, self._config, self._roster = grid, with_noise(config, roster.schema), roster
        self._weights = roster.weights(config.federation.site_weights)
        out_dir = Path(config.places.out_dir)
        self._checkpoints = CheckpointFolder(out_dir / "checkpoints")
        self._metrics = MetricsFile(out_dir / "metrics.jsonl")
        self._strategy = make_strategy(config.federation)
        self._state = self._resumed() or self._begun()
        self._names = list(self._state.parameters)
        restore_state(self._strategy, self._state.strategy_state, self._names)
        self._metrics.restart(self._records())

    @property
    def server_round(self) -> int:
        """Rounds that are done."""
        return self._state.server_round

    def next_round(self) -> RoundRecord:
        """Trains one round and keeps it: after this returns, a crash costs nothing."""
        started = time.monotonic()
        server_round = self.server_round + 1
        replies, instructions = self._collect_updates(server_round)
        parameters = aggregate(
            self._strategy,
            replies.accepted,
            weights=self._weights,
            instructions=instructions,
            server_round=server_round,
        )
        decay = self._config.federation.ema_decay
        average = moved_average(self._state.average, parameters, decay=decay, server_round=server_round)
        measured = self._measured(server_round, average)
        record = RoundRecord(
            server_round=server_round,
            sites=tuple(replies.accepted),
            losses={site: update.loss for site, update in replies.accepted.items() if update.loss is not None},
            held_out={site: reply.loss for site, reply in measured.items() if isinstance(reply, SiteLoss)},
            scores={site: reply.counts.tolist() for site, reply in measured.items() if isinstance(reply, SiteScores)},
            dropped=replies.dropped,
            seconds=time.monotonic() - started,
        )
        self._keep(record, parameters, average)
        return record

    def result(self) -> FederationResult:
        """The model as it is now, with everything that was learned on the way."""
        model = CDDPM.from_description(self._state.description)
        model.load_parameters(self._state.average)
        federation = self._config.federation
        model.set_params(random_state=federation.seed)
        model.calibrate(self._rows_trained())
        schema = self._roster.schema
        site_counts = {site: counts_from_json(text, schema) for site, text in self._state.site_counts.items()}
        return FederationResult(
            model=model,
            site_counts=site_counts,
            group_counts=total_counts(site_counts),
            marginals=self._roster.marginals,
            history=self._records(),
            absent=self._roster.absent,
        )

    def accounts(self) -> Mapping[str, PrivacyAccount]:
        """What the sites' privacy ledgers say, by site; empty without privacy."""
        return collect_accounts(self._grid, self._config, self._roster) if self._config.privacy.dp else {}

    def _rows_trained(self) -> int:
        """Rows that all steps saw together, from public numbers."""
        federation, privacy = self._config.federation, self._config.privacy
        per_step = federation.batch_size * len(self._state.site_counts)
        if privacy.dp:
            patients = sum(
                sum(counts_from_json(text, self._roster.schema).values()) for text in self._state.site_counts.values()
            )
            per_step = int(privacy.dp_sample_rate * patients * privacy.dp_draws)
        return self.server_round * federation.local_steps * per_step

    def _begun(self) -> Checkpoint:
        """The state before the first round."""
        federation = self._config.federation
        size = ModelConfig(width=federation.width, depth=federation.depth)
        require_memory(TableTransform(self._roster.schema).layout, size, rows=0, batch_size=federation.batch_size)
        model = CDDPM.initialised(
            self._roster.schema, self._roster.marginals, config=size, random_state=federation.seed
        )
        parameters = model.parameters()
        described = self._roster.descriptions.items()
        self._checkpoints.clear()
        return Checkpoint(
            server_round=0,
            num_server_rounds=federation.num_server_rounds,
            run_fingerprint=self._fingerprint(),
            description=model.describe(),
            parameters=parameters,
            average=parameters,
            strategy_state={},
            history=(),
            site_counts={site: counts_to_json(description.group_counts) for site, description in described},
        )

    def _resumed(self) -> Checkpoint | None:
        """The last checkpoint, if this run may go on from it; None if there is nothing to go on from."""
        latest, folder = self._checkpoints.latest(), self._checkpoints.folder
        if latest is None:
            return None
        if not self._config.places.resume:
            if latest.server_round < latest.num_server_rounds:
                done = f"{latest.server_round} of {latest.num_server_rounds} rounds"
                raise ConfigError(f"'{folder}' has a run after {done}: set resume=true, or another out-dir")
            return None
        if latest.run_fingerprint != self._fingerprint():
            raise CheckpointError(f"the run in '{folder}' had other settings or another schema; it cannot be resumed")
        # safetensors keeps no order; the strategies go by the model's.
        names = list(CDDPM.from_description(latest.description).parameters())
        parameters, average = ({name: part[name] for name in names} for part in (latest.parameters, latest.average))
        return replace(latest, parameters=parameters, average=average)

    def _fingerprint(self) -> str:
        parts = self._config.run + self._roster.schema.fingerprint
        return hashlib.sha256(parts.encode()).hexdigest()

    def _collect_updates(self, server_round: int) -> tuple[Replies[SiteUpdate], dict[str, Message]]:
        """Checked updates, the instructions they answer, and who is missing; sites are asked again below quorum."""
        execution, needed = self._config.execution, self._config.federation.min_sites
        shapes = {name: array.shape for name, array in self._state.parameters.items()}
        read = partial(SiteUpdate.from_wire, shapes=shapes)
        accepted: dict[str, SiteUpdate] = {}
        instructions: dict[str, Message] = {}
        for attempt in range(1 + execution.quorum_retries):
            if attempt:
                time.sleep(execution.quorum_wait_seconds)
            sites = [site for site in self._roster.nodes if site not in accepted]
            messages = self._train_messages(server_round, self._connected(sites))
            replies = self._exchange(messages, sites, read, server_round)
            accepted |= replies.accepted
            instructions |= messages
            if len(accepted) >= needed:
                return Replies(accepted, replies.dropped), instructions
        reasons = "".join(f"\n{site}: {reason}" for site, reason in replies.dropped.items())
        raise FederationError(
            f"round {server_round}: {len(accepted)} sites answered, {needed} are needed; "
            f"resume=true goes on after round {server_round - 1}{reasons}"
        )

    def _train_messages(self, server_round: int, sites: list[str]) -> dict[str, Message]:
        """The strategy's instructions, by site."""
        if not sites:
            return {}  # a strategy would wait for a node for ever
        federation, privacy = self._config.federation, self._config.privacy
        instruction = TrainInstruction(
            **self._common(),
            server_round=server_round,
            parameters=self._state.parameters,
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
        if isinstance(self._strategy, FedAvgM):
            self._strategy.current_arrays = None  # else it starts from its own copy, not from what was kept
        view = RoundGrid(self._grid, [self._roster.nodes[site] for site in sites])
        config = ConfigRecord(dict(wire.values))
        messages = self._strategy.configure_train(server_round, to_record(wire.arrays), config, view)
        by_node = {message.metadata.dst_node_id: message for message in messages}
        return {site: by_node[self._roster.nodes[site]] for site in sites}

    def _measured(self, server_round: int, average: Parameters) -> Mapping[str, SiteLoss | SiteScores]:
        """What the sites say about the averaged model, in the rounds in which it is measured."""
        if server_round not in self._config.measured_rounds():
            return {}
        privacy = self._config.privacy
        wire = EvaluateInstruction(
            **self._common(),
            server_round=server_round,
            parameters=average,
            score_epsilon=privacy.dp_score_epsilon if privacy.dp else 0.0,
        ).to_wire()
        content = RecordDict({"config": ConfigRecord(dict(wire.values)), "arrays": to_record(wire.arrays)})
        sites = self._connected(self._roster.nodes)
        messages = {site: Message(content, self._roster.nodes[site], MessageType.EVALUATE) for site in sites}
        read: Callable[[Wire], SiteLoss | SiteScores] = SiteLoss.from_wire
        if privacy.dp:
            read = partial(SiteScores.from_wire, shape=_scores_shape(self._roster.schema))
        replies = self._exchange(messages, sites, read, server_round)
        for site, reason in replies.dropped.items():
            _LOG.warning("round %d: site %s did not measure the model: %s", server_round, site, reason)
        return replies.accepted

    def _common(self) -> dict[str, Any]:
        """What every instruction about the model says."""
        federation, privacy = self._config.federation, self._config.privacy
        return {
            "run": self._config.run,
            "test_fraction": federation.test_fraction,
            "description": self._state.description,
            "seed": federation.seed,
            "dp": privacy.dp,
            "delta": privacy.dp_delta if privacy.dp else 0.0,
            "noise_seed": privacy.dp_noise_seed,
        }

    def _connected(self, sites: Iterable[str]) -> list[str]:
        online = set(self._grid.get_node_ids())
        return [site for site in sites if self._roster.nodes[site] in online]

    def _exchange(
        self, messages: Mapping[str, Message], sites: Iterable[str], read: Callable[[Wire], T], server_round: int
    ) -> Replies[T]:
        """Sends, waits until the deadline, and checks; a site without a message counts as missing."""
        asked = {self._roster.nodes[site]: site for site in sites}
        timeout = self._config.execution.round_timeout_seconds
        answers = self._grid.send_and_receive(messages.values(), timeout=timeout) if messages else []
        return check_replies(answers, asked=asked, read=read, server_round=server_round)

    def _keep(self, record: RoundRecord, parameters: Parameters, average: Parameters) -> None:
        for site, reason in record.dropped.items():
            _LOG.warning("round %d goes on without site %s: %s", record.server_round, site, reason)
        self._state = replace(
            self._state,
            server_round=record.server_round,
            parameters=parameters,
            average=average,
            strategy_state=state_of(self._strategy, self._names),
            history=(*self._state.history, asdict(record)),
        )
        self._checkpoints.save(self._state)
        self._metrics.append(record)

    def _records(self) -> tuple[RoundRecord, ...]:
        return tuple(RoundRecord(**record) for record in self._state.history)


def _scores_shape(schema: TableSchema) -> tuple[int, int, int]:
    """Groups, labels and score bins of what a site tells about a model."""
    return math.prod(len(column.group_levels) for column in schema.sensitive), 2, len(SCORE_EDGES) - 1


def _noise(privacy: PrivacyConfig) -> dict[str, Any]:
    """What a training instruction says about noise."""
    return {
        "noise_multiplier": privacy.dp_noise_multiplier,
        "sample_rate": privacy.dp_sample_rate,
        "max_grad_norm": privacy.dp_max_grad_norm,
        "draws": privacy.dp_draws,
    }


def moved_average(average: Parameters, parameters: Parameters, *, decay: float, server_round: int) -> Parameters:
    """Moves the average towards the parameters, float32.

    The decay of round r is min(``decay``, (1 + r) / (10 + r)), so that a short run does not keep its random start.
    """
    kept = np.float32(min(decay, (1 + server_round) / (10 + server_round)))
    return {name: kept * average[name] + (np.float32(1) - kept) * array for name, array in parameters.items()}

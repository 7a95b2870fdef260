"""The round loop: ask the sites, check what comes back, average, keep a checkpoint, and so on to the last round.

The averaging is that of a stock Flower strategy; the loop around it is ours because ``Strategy.start`` begins at
round 1 whatever was done before, waits for ever below its minimum of nodes, and ends at the first inconsistent reply.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.serverapp import Grid

from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig
from mcrage.data.groups import GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.data.transform import TableTransform
from mcrage.diffusion.network import ModelConfig
from mcrage.memory import require_memory
from mcrage.messages import Parameters, SiteLoss, SiteScores, Wire, counts_from_json, counts_to_json
from mcrage.privacy.counts import SCORE_EDGES
from mcrage.privacy.statement import PrivacyAccount
from server.accounts import collect_accounts
from server.budget import planned_epsilon, tell_prospect, with_noise
from server.checkpoints import CHECKPOINTS as CHECKPOINTS
from server.checkpoints import Checkpoint, CheckpointFolder, one_writer, run_fingerprint
from server.counting import count_federation
from server.exchange import Exchange, Subject
from server.instructions import Instructions
from server.local_steps import LocalSteps, Method
from server.records import FederationResult as FederationResult
from server.records import MetricsFile as MetricsFile
from server.records import RoundRecord as RoundRecord
from server.roster import Roster, call_roll, total_counts
from server.shared_steps import SharedSteps
from server.status import LiveStatus
from server.validation import check_replies, in_order

_LOG = logging.getLogger("mcrage.server")
T = TypeVar("T")


Progress = Callable[[RoundRecord], None]


def run_federation(
    grid: Grid,
    config: RunConfig,
    *,
    progress: Progress | None = None,
    keep: Callable[[FederationResult], None] | None = None,
) -> FederationResult:
    """Trains one generator at all sites that the grid reaches.

    Args:
        grid: Flower's, or one inside this process.
        config: The settings. Checkpoints, ``metrics.jsonl`` and ``status.json`` go to ``config.places.out_dir``.
        progress: Called after every round.
        keep: Called with the result, while the folder is still this run's alone and the run not yet done.

    Raises:
        FederationError: If too few sites answer, the training diverges (``resume`` goes on from the last round), or
            another run has the folder.
        SchemaError: If the sites' data dictionaries differ.
        ConfigError: If the folder has an unfinished run and ``resume`` is not set, or a setting names a file that
            cannot be used.
        CheckpointError: If ``resume`` is set and the run there had other settings.
    """
    out_dir = Path(config.places.out_dir)
    with one_writer(out_dir), LiveStatus(out_dir / "status.json", config) as status:
        timeout = config.execution.round_timeout_seconds
        exchange = Exchange(grid, timeout=timeout, heard=status.heard)
        begun = CheckpointFolder(out_dir / CHECKPOINTS).latest() if config.places.resume else None
        schema = None if begun is None else TableSchema.parse(json.loads(begun.description)["schema"])
        status.change(server_round=0 if begun is None else begun.server_round)
        roster = call_roll(grid, config, exchange=exchange, schema=schema, waiting=status.waiting)
        if config.federation.generator == "marginal":
            result = count_federation(config, roster, status=status, progress=progress)
        else:
            result = _trained(RoundLoop(grid, config, roster, status=status), config, progress)
        if keep is not None:
            keep(result)
    return result


def _trained(loop: "RoundLoop", config: RunConfig, progress: Progress | None) -> FederationResult:
    while loop.server_round < config.federation.num_server_rounds:
        record = loop.next_round()
        if progress is not None:
            progress(record)
    return replace(loop.result(), accounts=loop.accounts())


class RoundLoop:
    """A run between two rounds. What the next round depends on is all in one :class:`Checkpoint` and the roster.

    Args:
        grid: Reaches the sites.
        config: The settings.
        roster: The sites.
        status: Is told what happens; None for nobody.
    """

    def __init__(self, grid: Grid, config: RunConfig, roster: Roster, *, status: LiveStatus | None = None) -> None:
        self._grid, self._config, self._roster = grid, with_noise(config, roster.schema), roster
        self._status = status or LiveStatus(None, config)
        if status is not None and config.privacy.dp:
            status.change(epsilon_planned=planned_epsilon(self._config, roster.schema))
        out_dir = Path(config.places.out_dir)
        self._checkpoints = CheckpointFolder(out_dir / CHECKPOINTS)
        self._metrics = MetricsFile(out_dir / "metrics.jsonl")
        self._state = self._resumed() or self._begun()
        self._instructions = Instructions(self._config, self._state.description, self._state.parameters)
        self._method = self._made_method()
        self._method.restore(self._state.strategy_state)
        self._metrics.restart(self._records())
        self._tell_progress()
        if not self.server_round:
            counts = self._site_counts()
            patients = sum(total_counts(counts).values())
            tell_prospect(self._config, roster.schema, patients=patients, sites=len(counts))

    @property
    def server_round(self) -> int:
        """Rounds that are done."""
        return self._state.server_round

    def next_round(self) -> RoundRecord:
        """Trains one round and keeps it: after this returns, a crash costs nothing."""
        started = time.monotonic()
        server_round = self.server_round + 1
        self._roster.update(server_round)
        self._count_joiners()
        step = self._method.step(server_round, self._state.parameters, self._site_counts())
        parameters = step.parameters
        decay = self._config.federation.ema_decay
        average = moved_average(self._state.average, parameters, decay=decay, server_round=server_round)
        measured = self._measured(server_round, average)
        record = RoundRecord(
            server_round=server_round,
            sites=step.sites,
            losses=step.losses,
            held_out={site: reply.loss for site, reply in measured.items() if isinstance(reply, SiteLoss)},
            scores={site: reply.counts.tolist() for site, reply in measured.items() if isinstance(reply, SiteScores)},
            dropped=step.dropped,
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
        site_counts = self._site_counts()
        return FederationResult(
            model=model,
            site_counts=site_counts,
            group_counts=total_counts(site_counts),
            marginals=model.transform.marginals,
            history=self._records(),
            absent=self._roster.absent,
        )

    def accounts(self) -> Mapping[str, PrivacyAccount]:
        """What the sites' privacy ledgers say, by site; empty without privacy."""
        return collect_accounts(self._config, self._roster) if self._config.privacy.dp else {}

    def _made_method(self) -> Method:
        """How a round moves the parameters."""
        if self._config.privacy.dp_noise == "shared":
            return SharedSteps(self._config, self._roster, self._instructions, self._status)
        return LocalSteps(self._grid, self._config, self._roster, self._instructions, self._status)

    def _site_counts(self) -> dict[str, GroupCounts]:
        return {site: counts_from_json(text, self._roster.schema) for site, text in self._state.site_counts.items()}

    def _rows_trained(self) -> int:
        """Rows that all steps saw together, from public numbers."""
        federation, privacy = self._config.federation, self._config.privacy
        if not privacy.dp:
            per_step = [federation.batch_size * len(record.sites) for record in self._records()]
        else:
            patients = {site: sum(counts.values()) for site, counts in self._site_counts().items()}
            drawn = [privacy.dp_sample_rate * sum(map(patients.__getitem__, r.sites)) for r in self._records()]
            per_step = [int(patients_drawn * privacy.dp_draws) for patients_drawn in drawn]
        return federation.local_steps * sum(per_step)

    def _begun(self) -> Checkpoint:
        """The state before the first round."""
        federation = self._config.federation
        size = ModelConfig(width=federation.width, depth=federation.depth)
        require_memory(TableTransform(self._roster.schema).layout, size, rows=0, batch_size=federation.batch_size)
        model = CDDPM.initialised(
            self._roster.schema, self._roster.marginals, config=size, random_state=federation.seed
        )
        parameters = model.parameters()
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
            site_counts=self._described_counts(),
        )

    def _resumed(self) -> Checkpoint | None:
        """The last checkpoint, if this run may go on from it; None if there is nothing to go on from."""
        latest = self._checkpoints.resumable(self._fingerprint(), resume=self._config.places.resume)
        if latest is None:
            return None
        # safetensors keeps no order; the strategies go by the model's.
        names = list(CDDPM.from_description(latest.description).parameters())
        parameters, average = ({name: part[name] for name in names} for part in (latest.parameters, latest.average))
        # Who came while nothing ran counts as a joiner; what a site told when it joined stays as it was.
        site_counts = in_order(self._described_counts() | dict(latest.site_counts))
        return replace(latest, parameters=parameters, average=average, site_counts=site_counts)

    def _described_counts(self) -> dict[str, str]:
        return {site: counts_to_json(told.group_counts) for site, told in self._roster.descriptions.items()}

    def _count_joiners(self) -> None:
        site_counts = in_order(self._described_counts() | dict(self._state.site_counts))
        self._state = replace(self._state, site_counts=site_counts)

    def _fingerprint(self) -> str:
        return run_fingerprint(self._config, self._roster.schema)

    def _measured(self, server_round: int, average: Parameters) -> Mapping[str, SiteLoss | SiteScores]:
        """What the sites say about the averaged model, in the rounds in which it is measured."""
        if server_round not in self._config.measured_rounds():
            return {}
        read: Callable[[Wire], SiteLoss | SiteScores] = SiteLoss.from_wire
        if self._config.privacy.dp:
            read = partial(SiteScores.from_wire, shape=_scores_shape(self._roster.schema))
        standing = self._roster.standing(self._roster.nodes)
        nodes = {site: self._roster.nodes[site] for site in standing.free}
        messages = self._instructions.measurement(nodes, server_round=server_round, parameters=average)
        answers = self._roster.exchange.ask(messages, Subject("measurement", server_round))
        replies = check_replies(answers, asked=nodes, read=read, server_round=server_round)
        for site, reason in (standing.reasons | replies.dropped).items():
            _LOG.warning("round %d: site %s did not measure the model: %s", server_round, site, reason)
        return replies.accepted

    def _keep(self, record: RoundRecord, parameters: Parameters, average: Parameters) -> None:
        for site, reason in record.dropped.items():
            _LOG.warning("round %d goes on without site %s: %s", record.server_round, site, reason)
        self._state = replace(
            self._state,
            server_round=record.server_round,
            parameters=parameters,
            average=average,
            strategy_state=self._method.state(),
            history=(*self._state.history, asdict(record)),
        )
        self._checkpoints.save(self._state)
        self._metrics.append(record)
        busy = self._roster.standing(record.dropped).busy
        self._status.round_done(record.server_round, dropped=record.dropped, busy=busy)
        self._tell_progress()

    def _tell_progress(self) -> None:
        self._status.reached(self.server_round, [record.seconds for record in self._records()])

    def _records(self) -> tuple[RoundRecord, ...]:
        return tuple(RoundRecord(**record) for record in self._state.history)


def _scores_shape(schema: TableSchema) -> tuple[int, int, int]:
    """Groups, labels and score bins of what a site tells about a model."""
    return math.prod(len(column.group_levels) for column in schema.sensitive), 2, len(SCORE_EDGES) - 1


def moved_average(average: Parameters, parameters: Parameters, *, decay: float, server_round: int) -> Parameters:
    """Moves the average towards the parameters, float32.

    The decay of round r is min(``decay``, (1 + r) / (10 + r)), so that a short run does not keep its random start.
    """
    kept = np.float32(min(decay, (1 + server_round) / (10 + server_round)))
    return {name: kept * average[name] + (np.float32(1) - kept) * array for name, array in parameters.items()}

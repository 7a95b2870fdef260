"""A run of the marginal generator: each round is a question for tables of counts, and what is kept are their sums.

The questions are worked out from the answers before them (:mod:`mcrage.marginal.estimation`), so a run that was killed
works them out again from the sums in its checkpoint and asks only what has no answer yet. Whom it asks is in the
checkpoint before anybody is asked: the same question of the same sites is the same release, which costs nothing twice.

All questions are answered by the same sites: those that answered the first one, at least ``min_sites``. One that fails
later is asked again, and where it stays away the run stops until it is resumed. With shared noise a sum opens only if
all answer; the first one is asked for anew of the others, with noise of its own, within ``dp_spare_rounds``.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from mcrage.config import MOST_QUESTIONS, RunConfig
from mcrage.data.crossing import Axes, num_counts, split_counts, to_json
from mcrage.data.groups import GroupCounts
from mcrage.errors import CheckpointError, FederationError, MessageError
from mcrage.marginal.generator import MarginalGenerator
from mcrage.messages import CountInstruction, SiteCounts, SiteSum, Wire, counts_to_json
from mcrage.peers import Peer, peers_to_json
from mcrage.privacy.masking import opened
from mcrage.privacy.shared_counts import SharedCounts
from server.accounts import collect_accounts
from server.budget import planned_epsilon, tables_budget, tell_prospect
from server.checkpoints import CHECKPOINTS, Checkpoint, CheckpointFolder, run_fingerprint
from server.exchange import Subject
from server.gathering import CLOSED, ClosedSums, gathered, offer
from server.records import FederationResult, MetricsFile, RoundRecord
from server.roster import Roster
from server.status import LiveStatus
from server.validation import Replies, check_replies, in_order

_LOG = logging.getLogger("mcrage.server")
Progress = Callable[[RoundRecord], None]


def count_federation(
    config: RunConfig, roster: Roster, *, status: LiveStatus, progress: Progress | None
) -> FederationResult:
    """The marginal generator of all sites' counts.

    Args:
        config: The settings.
        roster: The sites.
        status: Is told what happens.
        progress: Called after every question.

    Raises:
        FederationError: If too few sites answer, or one that answered before stays away; ``resume`` goes on.
        ConfigError: If the folder has an unfinished run and ``resume`` is not set.
        CheckpointError: If ``resume`` is set and the run there had other settings.
    """
    if config.privacy.dp:
        status.change(epsilon_planned=planned_epsilon(config, roster.schema))
    source = SitesSource(config, roster, status, progress=progress)
    model = MarginalGenerator(random_state=config.federation.seed)
    model.estimate(roster.schema, source, tables_budget(config))
    source.finish()
    return FederationResult(
        model=model,
        site_counts={site: GroupCounts({}) for site in source.sites},
        group_counts=model.group_counts(),
        marginals=model.model_.marginals,
        history=source.history,
        absent=roster.absent,
        accounts=collect_accounts(config, roster) if config.privacy.dp else {},
    )


class SitesSource:
    """A :class:`mcrage.marginal.estimation.Source` that asks the sites of a run, or knows what they answered.

    Args:
        config: The settings.
        roster: The sites.
        status: Is told what happens.
        progress: Called after every question that is answered anew.
    """

    def __init__(
        self, config: RunConfig, roster: Roster, status: LiveStatus, *, progress: Progress | None = None
    ) -> None:
        self._config, self._roster, self._status, self._progress = config, roster, status, progress
        out_dir = Path(config.places.out_dir)
        self._checkpoints = CheckpointFolder(out_dir / CHECKPOINTS)
        self._closed = ClosedSums(out_dir / CLOSED, config)
        self._metrics = MetricsFile(out_dir / "metrics.jsonl")
        self._state = self._checkpoints.resumable(self._fingerprint, resume=config.places.resume) or self._begun()
        told = json.loads(self._state.description)
        self.sites: tuple[str, ...] = tuple(told["sites"])
        self._peers, self._questions = str(told["peers"]), list(told["questions"])
        self._failed: dict[str, str] = {}  # whose silence closed a sum, and why
        self._missing: dict[str, str] = {}
        self._asked = 0
        self._metrics.restart(self.history)
        self._tell_progress()

    @property
    def history(self) -> tuple[RoundRecord, ...]:
        """One record per question."""
        return tuple(RoundRecord(**record) for record in self._state.history)

    def tables(self, tables: Sequence[Axes], *, noise: float) -> list[NDArray[np.float64]]:
        """Sums of the sites' tables; ``noise`` is what protects each site's patients, 0 for exact counts.

        Raises:
            FederationError: If too few sites answer.
            CheckpointError: If the sums in the checkpoint answer another question.
        """
        self._asked += 1
        if self._asked > self._state.server_round:
            self._ask(tables, noise)
        elif self._questions[self._asked - 1] != _digest(tables, noise):
            raise CheckpointError("the checkpoint answers other questions, as of another version; start anew elsewhere")
        total = self._state.parameters[f"sum-{self._asked}"].astype(np.float64)
        return split_counts(total, tables, self._roster.schema)

    def deviation(self, noise: float) -> float:
        """Standard deviation of the noise of all sites on a cell."""
        if noise and math.isfinite(noise) and self._is_shared:
            return self._shared(noise).deviation
        return noise * math.sqrt(len(self.sites))

    def finish(self) -> None:
        """Notes that there is no further question."""
        self._state = replace(self._state, num_server_rounds=self._state.server_round)
        self._checkpoints.save(self._state)
        self._status.change(num_server_rounds=self._state.server_round)
        self._tell_progress()

    @property
    def _is_shared(self) -> bool:
        return self._config.privacy.dp_noise == "shared"

    @property
    def _needed(self) -> int:
        """How many of the sites have to answer: all, but of the first question where each answer means something."""
        is_open = not self._state.server_round and not self._is_shared
        return self._config.federation.min_sites if is_open else len(self.sites)

    @property
    def _fingerprint(self) -> str:
        return run_fingerprint(self._config, self._roster.schema)

    def _shared(self, noise: float) -> SharedCounts:
        return SharedCounts(noise=noise, sites=len(self.sites), colluders=self._config.privacy.dp_colluders)

    def _ask(self, tables: Sequence[Axes], noise: float) -> None:
        """Asks until a sum is complete, and keeps it: after this returns, a crash costs nothing."""
        started, size = time.monotonic(), num_counts(tables, self._roster.schema)
        self._closed.require_planned(self._asked)
        while True:
            if not self.sites:
                self._choose()
            replies = self._answers(to_json(tables), noise, size)
            if self._is_complete(replies):
                break
        words = [reply.words for reply in replies.accepted.values() if isinstance(reply, SiteSum)]
        counts = [reply.counts for reply in replies.accepted.values() if isinstance(reply, SiteCounts)]
        total = (opened(words) if words else np.sum(counts, axis=0)).astype(np.int64)
        self.sites = tuple(replies.accepted)
        self._questions.append(_digest(tables, noise))
        record = RoundRecord(
            server_round=self._asked,
            sites=self.sites,
            losses={},
            held_out={},
            scores={},
            dropped=in_order(self._missing | self._failed | replies.dropped),
            seconds=time.monotonic() - started,
        )
        self._missing, self._failed = {}, {}
        self._keep(record, total)
        if self._asked == 1:
            patients = float(total.sum()) / len(tables)
            tell_prospect(self._config, self._roster.schema, patients=patients, sites=len(self.sites))

    def _choose(self) -> None:
        """Takes all sites that are there and notes them, before one is asked."""
        self._closed.require_planned(self._asked)
        admitted, self._missing = gathered(
            self._config, self._roster, self._status, server_round=self._asked, admit=self._admitted
        )
        self.sites = tuple(admitted)
        self._peers = peers_to_json({site: peer for site, peer in admitted.items() if peer}) if self._is_shared else ""
        self._save()

    def _admitted(self, site: str) -> Peer | None:
        if site in self._failed:
            raise MessageError(self._failed[site])
        return offer(self._config, self._roster, site) if self._is_shared else None

    def _is_complete(self, replies: Replies[SiteSum | SiteCounts]) -> bool:
        """Whether the sum can be made; whom to ask next is settled where it cannot."""
        if len(replies.accepted) >= self._needed:
            return True
        if self._state.server_round or not self._is_shared:
            lines = "".join(f"\n{site}: {reason}" for site, reason in replies.dropped.items())
            raise FederationError(
                f"round {self._asked}: {len(replies.accepted)} sites answered, {self._needed} are needed; "
                f"resume=true goes on after round {self._state.server_round}{lines}"
            )
        self._closed.add()
        for site, reason in replies.dropped.items():
            _LOG.warning("round %d: the sum stays closed, site %s is missing: %s", self._asked, site, reason)
        self._failed |= replies.dropped
        self.sites = ()
        return False

    def _answers(self, text: str, noise: float, size: int) -> Replies[SiteSum | SiteCounts]:
        """Checked answers of the sites that are asked together; those that are missing are asked again."""
        execution, subject = self._config.execution, Subject("counts", self._asked, self._closed.number)
        read: Callable[[Wire], SiteSum | SiteCounts] = partial(
            SiteSum.from_wire if self._is_shared else SiteCounts.from_wire, size=size
        )
        accepted: dict[str, SiteSum | SiteCounts] = {}
        dropped: dict[str, str] = {}
        for attempt in range(1 + execution.quorum_retries):
            if attempt:
                self._status.waiting(dropped)
                self._roster.exchange.pause(execution.quorum_wait_seconds)
                self._roster.update(self._asked)
            missing = [site for site in self.sites if site not in accepted]
            standing = self._roster.standing(site for site in missing if site in self._roster.nodes)
            working = [site for site, other in standing.busy.items() if other == subject]
            asked = sorted([*standing.free, *working])
            reasons = dict.fromkeys(missing, "is not connected") | standing.reasons
            absent = {site: reason for site, reason in reasons.items() if site not in asked}
            self._status.asking(self._asked, asked, busy={}, absent={**self._roster.absent, **absent})
            messages = self._messages(standing.free, text, noise)
            replies = check_replies(
                self._roster.exchange.ask(messages, subject), asked=asked, read=read, server_round=self._asked
            )
            accepted |= replies.accepted
            dropped = absent | replies.dropped
            if len(accepted) >= self._needed:
                break
        return Replies(in_order(accepted), in_order(dropped))

    def _messages(self, sites: Sequence[str], text: str, noise: float) -> dict[str, Message]:
        privacy = self._config.privacy
        instruction = CountInstruction(
            run=self._config.run,
            test_fraction=self._config.federation.test_fraction,
            dp=privacy.dp,
            delta=privacy.dp_delta if privacy.dp else 0.0,
            noise_seed=privacy.dp_noise_seed,
            server_round=self._asked,
            attempt=self._closed.number,
            tables=text,
            noise=noise,
            colluders=privacy.dp_colluders if self._is_shared else 0,
            peers=self._peers,
        )
        content = RecordDict({"config": ConfigRecord(dict(instruction.to_wire().values))})
        return {site: Message(content, self._roster.nodes[site], "train.count") for site in sites}

    def _begun(self) -> Checkpoint:
        """The state before the first question."""
        self._checkpoints.clear()
        return Checkpoint(
            server_round=0,
            num_server_rounds=MOST_QUESTIONS,
            run_fingerprint=self._fingerprint,
            description=self._described((), "", []),
            parameters={},
            average={},
            strategy_state={},
            history=(),
            site_counts={},
        )

    def _described(self, sites: Sequence[str], peers: str, questions: Sequence[str]) -> str:
        schema = json.loads(self._roster.schema.to_json())
        told = {"schema": schema, "sites": list(sites), "peers": peers, "questions": list(questions)}
        return json.dumps({"generator": "marginal"} | told)

    def _save(self) -> None:
        nobody = counts_to_json(GroupCounts({}))
        self._state = replace(
            self._state,
            description=self._described(self.sites, self._peers, self._questions),
            site_counts=dict.fromkeys(self.sites, nobody),
        )
        self._checkpoints.save(self._state)

    def _keep(self, record: RoundRecord, total: NDArray[np.int64]) -> None:
        for site, reason in record.dropped.items():
            _LOG.warning("round %d goes on without site %s: %s", record.server_round, site, reason)
        self._state = replace(
            self._state,
            server_round=record.server_round,
            parameters={**self._state.parameters, f"sum-{record.server_round}": total},
            history=(*self._state.history, asdict(record)),
        )
        self._save()
        self._metrics.append(record)
        self._status.round_done(record.server_round, dropped=record.dropped, busy=())
        self._tell_progress()
        if self._progress is not None:
            self._progress(record)

    def _tell_progress(self) -> None:
        self._status.reached(self._state.server_round, [record.seconds for record in self.history])


def _digest(tables: Sequence[Axes], noise: float) -> str:
    return hashlib.sha256(f"{noise!r} {to_json(tables)}".encode()).hexdigest()

"""A round that is one step of all sites together: masked sums that the server opens whole or not at all.

The optimiser is the server's, so that its moments are of what all sites say. A sum stays closed if one of the sites
that were asked together does not answer; it is asked for anew, of the others, with noise of its own that is charged
like any other. A site that failed is left out for some rounds: every failure costs all patients.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig
from mcrage.data.groups import MINIMUM_CELL, GroupCounts
from mcrage.errors import FederationError, MessageError
from mcrage.messages import Parameters, SiteSum
from mcrage.peers import Peer
from mcrage.privacy.masking import opened
from mcrage.privacy.shared import SharedNoise
from mcrage.refusals import REFUSALS
from mcrage.training.optimisers import Optimisers, TrainingConfig
from mcrage.training.shared import descend, num_gradients
from server.checkpoints import Arrays
from server.exchange import Subject
from server.home import read_json, write_json
from server.instructions import Instructions
from server.local_steps import Step
from server.roster import Roster
from server.status import LiveStatus
from server.validation import Replies, check_replies

_LOG = logging.getLogger("mcrage.server")

ROUNDS_LEFT_OUT = 5
"""How many rounds a site that failed is not asked again."""

CLOSED = "closed-sums.json"
_OTHER_KEYS = REFUSALS[2134]


class ClosedSums:
    """How many sums of a run stayed closed, in a file: whoever starts the run anew has not paid for them less.

    Args:
        path: The file.
        config: Of the run; a run that is begun, or another one, has none yet.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self._path, self._run = path, config.run
        told = read_json(path) if config.places.resume else {}
        self.number = int(told["closed"]) if told.get("run") == self._run else 0
        if not self.number:
            path.unlink(missing_ok=True)

    def add(self) -> None:
        """One more; on disk before anything else is asked for."""
        self.number += 1
        write_json(self._path, {"run": self._run, "closed": self.number})


class SharedSteps:
    """A :class:`~server.local_steps.Method`.

    Args:
        config: The settings.
        roster: The sites.
        instructions: Makes messages.
        status: Is told what happens.
    """

    def __init__(self, config: RunConfig, roster: Roster, instructions: Instructions, status: LiveStatus) -> None:
        self._config, self._roster, self._instructions, self._status = config, roster, instructions, status
        federation = config.federation
        self._model = CDDPM.from_description(instructions.description)
        self._optimisers = Optimisers(
            self._model.network_,
            TrainingConfig(
                total_steps=federation.total_steps,
                learning_rate=federation.learning_rate,
                warmup_steps=federation.warmup_steps,
            ),
        )
        self._closed = ClosedSums(Path(config.places.out_dir) / CLOSED, config)
        self._left_out: dict[str, tuple[int, str]] = {}

    def step(self, server_round: int, parameters: Parameters, site_counts: Mapping[str, GroupCounts]) -> Step:
        """One round: a sum of all sites that can be asked, and a step of the optimiser by it."""
        replies = self._opened_sum(server_round, parameters)
        sites = tuple(replies.accepted)
        privacy, patients = self._config.privacy, sum(sum(site_counts[site].values()) for site in sites)
        steps = opened(reply.words for reply in replies.accepted.values())
        gradient = self._noise(len(sites)).value(steps) / (privacy.dp_sample_rate * max(patients, MINIMUM_CELL))
        self._model.load_parameters(parameters)
        descend(self._optimisers, gradient, step=server_round - 1)
        moved = self._model.parameters()
        if not all(np.isfinite(array).all() for array in moved.values()):
            raise FederationError(f"round {server_round}: parameters are not finite; lower the learning rate")
        return Step(parameters=moved, sites=sites, losses={}, dropped=replies.dropped)

    def state(self) -> Arrays:
        """Moments of the optimiser."""
        return dict(self._optimisers.state())

    def restore(self, state: Arrays) -> None:
        """Goes on from what :meth:`state` gave."""
        self._optimisers.restore(state)

    def _noise(self, sites: int) -> SharedNoise:
        privacy = self._config.privacy
        return SharedNoise(
            noise_multiplier=privacy.dp_noise_multiplier,
            max_grad_norm=privacy.dp_max_grad_norm,
            sites=sites,
            colluders=privacy.dp_colluders,
        )

    def _opened_sum(self, server_round: int, parameters: Parameters) -> Replies[SiteSum]:
        """Masked sums of sites that were asked together and all answered."""
        missing: dict[str, str] = {}
        while True:
            self._require_planned(server_round)
            peers, reasons = self._gathered(server_round)
            missing = reasons | {site: reason for site, reason in missing.items() if site not in peers}
            replies = self._ask(server_round, parameters, peers, missing)
            if len(replies.accepted) == len(peers):
                return Replies(replies.accepted, missing)
            self._closed.add()
            for site, reason in replies.dropped.items():
                missing[site] = reason
                last = self._config.federation.num_server_rounds if _OTHER_KEYS in reason else server_round
                self._left_out[site] = (last + ROUNDS_LEFT_OUT, reason)
                _LOG.warning("round %d: the sum stays closed, site %s is missing: %s", server_round, site, reason)

    def _require_planned(self, server_round: int) -> None:
        closed, spare = self._closed.number, self._config.privacy.dp_spare_rounds
        if closed > spare:
            raise FederationError(
                f"round {server_round}: {closed} sums of this run stayed closed, which is more than "
                f"dp-spare-rounds={spare}: the next one would cost more than was planned; the model after round "
                f"{server_round - 1} is in the checkpoint"
            )

    def _gathered(self, server_round: int) -> tuple[dict[str, Peer], dict[str, str]]:
        """Sites to ask together, with their keys, and why the others are not; waits while there are too few."""
        execution, needed = self._config.execution, self._config.federation.min_sites
        reasons: dict[str, str] = {}
        for attempt in range(1 + execution.quorum_retries):
            if attempt:
                self._status.waiting(reasons)
                self._roster.exchange.pause(execution.quorum_wait_seconds)
            standing = self._roster.standing(self._roster.nodes)
            reasons, peers = dict(standing.reasons), {}
            for site in standing.free:
                until, reason = self._left_out.get(site, (0, ""))
                if server_round <= until:
                    reasons[site] = f"left out until round {until}: {reason}"
                    continue
                try:
                    peers[site] = self._offer(site)
                except MessageError as error:
                    reasons[site] = str(error)
            if len(peers) >= needed:
                return peers, reasons
        lines = "".join(f"\n{site}: {reason}" for site, reason in reasons.items())
        raise FederationError(
            f"round {server_round}: {len(peers)} sites are there, {needed} are needed; "
            f"resume=true goes on after round {server_round - 1}{lines}"
        )

    def _offer(self, site: str) -> Peer:
        """A site's key for masks, if it is signed with the key that the coordinator has of it."""
        peer = Peer.parse(self._roster.descriptions[site].mask_key, site=site, run=self._config.run)
        signer = self._roster.exchange.signers.get(self._roster.nodes[site])
        if signer is not None and signer.public_key != peer.signing_key:
            raise MessageError("its key for masks is signed by another key than the one it was enrolled with")
        return peer

    def _ask(
        self, server_round: int, parameters: Parameters, peers: Mapping[str, Peer], missing: Mapping[str, str]
    ) -> Replies[SiteSum]:
        subject = Subject("training", server_round, self._closed.number)
        nodes = {site: self._roster.nodes[site] for site in peers}
        self._status.asking(server_round, list(peers), busy={}, absent={**self._roster.absent, **missing})
        messages = self._instructions.sum(
            nodes, peers=peers, server_round=server_round, attempt=self._closed.number, parameters=parameters
        )
        return check_replies(
            self._roster.exchange.ask(messages, subject),
            asked=peers,
            read=partial(SiteSum.from_wire, size=num_gradients(self._model.network_)),
            server_round=server_round,
        )

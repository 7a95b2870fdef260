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
from mcrage.training.shared import LABEL_LEARNING_RATE, descend, num_gradients
from server.checkpoints import Arrays
from server.exchange import Subject
from server.gathering import CLOSED, ClosedSums, gathered, offer
from server.instructions import Instructions
from server.local_steps import Step
from server.roster import Roster
from server.status import LiveStatus
from server.validation import Replies, check_replies

_LOG = logging.getLogger("mcrage.server")

ROUNDS_LEFT_OUT = 5
"""How many rounds a site that failed is not asked again."""

_OTHER_KEYS = REFUSALS[2134]


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
                label_learning_rate=LABEL_LEARNING_RATE,
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
            self._closed.require_planned(server_round)
            peers, reasons = gathered(
                self._config,
                self._roster,
                self._status,
                server_round=server_round,
                admit=lambda site: self._admitted(site, server_round),
            )
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

    def _admitted(self, site: str, server_round: int) -> Peer:
        until, reason = self._left_out.get(site, (0, ""))
        if server_round <= until:
            raise MessageError(f"left out until round {until}: {reason}")
        return offer(self._config, self._roster, site)

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

"""A round in which every site takes steps of its own and a stock Flower strategy averages where they came to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from mcrage.config import RunConfig
from mcrage.data.groups import GroupCounts
from mcrage.errors import FederationError
from mcrage.messages import Parameters, SiteUpdate
from server.checkpoints import Arrays
from server.exchange import Subject
from server.instructions import Instructions
from server.roster import Roster, site_weights
from server.status import LiveStatus
from server.strategy import aggregate, make_strategy, restore_state, state_of
from server.validation import Replies, check_replies, in_order, read_update


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a round came to.

    Attributes:
        parameters: The global model after it.
        sites: Sites that took part.
        losses: Mean training loss by site; empty where none leaves the sites.
        dropped: Sites that did not take part, with the reason.
    """

    parameters: Parameters
    sites: tuple[str, ...]
    losses: Mapping[str, float]
    dropped: Mapping[str, str]


class Method(Protocol):
    """How a round moves the parameters; what the next round depends on besides them is its state."""

    def step(self, server_round: int, parameters: Parameters, site_counts: Mapping[str, GroupCounts]) -> Step:
        """One round from these parameters; raises a FederationError if too few sites answer or training diverges."""

    def state(self) -> Arrays:
        """What has to survive a restart."""

    def restore(self, state: Arrays) -> None:
        """Goes on from what :meth:`state` gave; nothing before the first round."""


class LocalSteps:
    """A :class:`Method`.

    Args:
        grid: Reaches the sites.
        config: The settings.
        roster: The sites.
        instructions: Makes messages.
        status: Is told what happens.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, roster: Roster, instructions: Instructions, status: LiveStatus
    ) -> None:
        self._grid, self._config, self._roster = grid, config, roster
        self._instructions, self._status = instructions, status
        self._strategy = make_strategy(config.federation)
        self._names = list(instructions.names)

    def step(self, server_round: int, parameters: Parameters, site_counts: Mapping[str, GroupCounts]) -> Step:
        """One round: the sites' updates, checked and averaged."""
        replies, instructions = self._collect_updates(server_round, parameters)
        averaged = aggregate(
            self._strategy,
            replies.accepted,
            weights=site_weights(site_counts, self._config.federation.site_weights),
            instructions=instructions,
            server_round=server_round,
        )
        losses = {site: update.loss for site, update in replies.accepted.items() if update.loss is not None}
        return Step(parameters=averaged, sites=tuple(replies.accepted), losses=losses, dropped=replies.dropped)

    def state(self) -> Arrays:
        """The strategy's moments."""
        return state_of(self._strategy, self._names)

    def restore(self, state: Arrays) -> None:
        """Gives the strategy its moments."""
        restore_state(self._strategy, state, self._names)

    def _collect_updates(
        self, server_round: int, parameters: Parameters
    ) -> tuple[Replies[SiteUpdate], dict[str, Message]]:
        """Checked updates, the instructions they answer, and who is missing; sites are asked again below quorum."""
        execution, needed = self._config.execution, self._config.federation.min_sites
        accepted: dict[str, SiteUpdate] = {}
        instructions: dict[str, Message] = {}
        dropped: Mapping[str, str] = {}
        for attempt in range(1 + execution.quorum_retries):
            if attempt:
                self._status.waiting(dropped)
                self._roster.exchange.pause(execution.quorum_wait_seconds)
            missing = [site for site in self._roster.nodes if site not in accepted]
            replies, messages = self._ask_to_train(server_round, missing, parameters)
            accepted |= replies.accepted
            instructions |= messages
            dropped = replies.dropped
            if len(accepted) >= needed:
                return Replies(in_order(accepted), dropped), instructions
        reasons = "".join(f"\n{site}: {reason}" for site, reason in dropped.items())
        raise FederationError(
            f"round {server_round}: {len(accepted)} sites answered, {needed} are needed; "
            f"resume=true goes on after round {server_round - 1}{reasons}"
        )

    def _ask_to_train(
        self, server_round: int, sites: Iterable[str], parameters: Parameters
    ) -> tuple[Replies[SiteUpdate], Mapping[str, Message]]:
        """What those of the sites answer that can be asked, or were asked in this round and still work on it."""
        subject = Subject("training", server_round)
        standing = self._roster.standing(sites)
        working = [site for site, other in standing.busy.items() if other == subject]
        asked = sorted([*standing.free, *working])
        not_asked = {site: reason for site, reason in standing.reasons.items() if site not in asked}
        busy = {site: reason for site, reason in not_asked.items() if site in standing.busy}
        self._status.asking(server_round, asked, busy=busy, absent={**self._roster.absent, **standing.absent})
        messages = self._instructions.training(
            self._strategy,
            {site: self._roster.nodes[site] for site in standing.free},
            server_round=server_round,
            parameters=parameters,
            grid=self._grid,
        )
        max_norm = self._config.federation.max_update_norm
        replies = check_replies(
            self._roster.exchange.ask(messages, subject),
            asked=asked,
            read=partial(read_update, sent=parameters, max_norm=max_norm),
            server_round=server_round,
        )
        return Replies(replies.accepted, in_order(replies.dropped | not_asked)), messages

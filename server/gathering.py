"""Who is asked together where sites share the noise, and how many sums stayed closed because one fell silent."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mcrage.config import RunConfig
from mcrage.errors import FederationError, MessageError
from mcrage.peers import Peer
from server.home import read_json, write_json
from server.roster import Roster
from server.status import LiveStatus

CLOSED = "closed-sums.json"
T = TypeVar("T")


class ClosedSums:
    """How many sums of a run stayed closed, in a file: whoever starts the run anew has not paid for them less.

    Args:
        path: The file.
        config: Of the run; a run that is begun, or another one, has none yet.
    """

    def __init__(self, path: Path, config: RunConfig) -> None:
        self._path, self._run, self._spare = path, config.run, config.privacy.dp_spare_rounds
        told = read_json(path) if config.places.resume else {}
        self.number = int(told["closed"]) if told.get("run") == self._run else 0
        if not self.number:
            path.unlink(missing_ok=True)

    def add(self) -> None:
        """One more; on disk before anything else is asked for."""
        self.number += 1
        write_json(self._path, {"run": self._run, "closed": self.number})

    def require_planned(self, server_round: int) -> None:
        """Raises if more sums stayed closed than were planned for.

        Raises:
            FederationError: In that case.
        """
        if self.number > self._spare:
            raise FederationError(
                f"round {server_round}: {self.number} sums of this run stayed closed, which is more than "
                f"dp-spare-rounds={self._spare}: the next one would cost more than was planned; what was reached by "
                f"round {server_round - 1} is in the checkpoint"
            )


def gathered(
    config: RunConfig, roster: Roster, status: LiveStatus, *, server_round: int, admit: Callable[[str], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """Sites to ask together, each with what ``admit`` gives, and why others are not; waits while there are too few.

    Args:
        config: The settings.
        roster: The sites.
        status: Is told who is missing.
        server_round: Round that is about to begin.
        admit: Gives what has to be known of a site, or raises a MessageError with the reason why it is not asked.

    Raises:
        FederationError: If there stay fewer than ``min_sites``.
    """
    execution, needed = config.execution, config.federation.min_sites
    reasons: dict[str, str] = {}
    for attempt in range(1 + execution.quorum_retries):
        if attempt:
            status.waiting(reasons)
            roster.exchange.pause(execution.quorum_wait_seconds)
        standing = roster.standing(roster.nodes)
        reasons, admitted = dict(standing.reasons), {}
        for site in standing.free:
            try:
                admitted[site] = admit(site)
            except MessageError as error:
                reasons[site] = str(error)
        if len(admitted) >= needed:
            return admitted, reasons
    lines = "".join(f"\n{site}: {reason}" for site, reason in reasons.items())
    raise FederationError(
        f"round {server_round}: {len(admitted)} sites are there, {needed} are needed; "
        f"resume=true goes on after round {server_round - 1}{lines}"
    )


def offer(config: RunConfig, roster: Roster, site: str) -> Peer:
    """A site's key for masks, if it is signed with the key that the coordinator has of it.

    Raises:
        MessageError: If it is not.
    """
    peer = Peer.parse(roster.descriptions[site].mask_key, site=site, run=config.run)
    signer = roster.exchange.signers.get(roster.nodes[site])
    if signer is not None and signer.public_key != peer.signing_key:
        raise MessageError("its key for masks is signed by another key than the one it was enrolled with")
    return peer

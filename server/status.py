"""What a run does right now, as a file that others may read at any time."""

import json
import logging
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal

from mcrage.config import RunConfig
from mcrage.errors import ConfigError, McrageError
from mcrage.files import replace_file
from server.home import read_json

_LOG = logging.getLogger("mcrage.server")
_ROUNDS_FOR_PACE = 5
_BEAT_SECONDS = 5.0


class LiveStatus:
    """``status.json`` of a run: replaced as a whole when something changes, and every few seconds of waiting.

    As a context manager it ends with the state ``done``, with ``stopped`` where ``wish.json`` beside it says that this
    is wanted (:func:`server.jobs.want`), else with ``failed`` and the error's first line.

    Its fields: ``run``, ``state`` (``waiting for sites``, ``training``, and those of its end), ``server_round`` (rounds
    that are done), ``num_server_rounds``, ``sites`` (by name a ``state``: ``training``, ``answered``, ``busy`` or
    ``absent``, with its ``reason`` and ``round``), ``seconds_per_round`` (median of the last five), ``eta_seconds``,
    ``started``, ``updated`` (UTC), ``error``; with privacy ``epsilon_planned``, of one site's patients.

    Args:
        path: The file; None writes none.
        config: The settings.
    """

    def __init__(self, path: Path | None, config: RunConfig) -> None:
        self._path = path
        self._written = 0.0
        self._content: dict[str, Any] = {
            "run": config.run,
            "state": "waiting for sites",
            "server_round": 0,
            "num_server_rounds": config.federation.rounds,
            "sites": {},
            "seconds_per_round": None,
            "eta_seconds": None,
            "started": datetime.now(UTC).isoformat(),
            "error": "",
        }

    def __enter__(self) -> "LiveStatus":
        if self._path is not None:
            for draft in self._path.parent.glob(f".{self._path.name}.*"):  # of a run that was killed while it wrote
                draft.unlink()
        self._write()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.change(state="done")
        elif self._is_to_stop():  # however Flower ends the process then: by a signal, or by refusing a request
            self.change(state="stopped")
        else:
            self.change(state="failed", error=_one_line(error))

    def change(self, **fields: Any) -> None:
        """Sets fields."""
        self._content |= fields
        self._write()

    def waiting(self, reasons: Mapping[str, str]) -> None:
        """Too few sites are there; these are not, for these reasons."""
        self._note("absent", reasons, self._content["server_round"] + 1)
        self.change(state="waiting for sites")

    def asking(
        self, server_round: int, sites: Iterable[str], *, busy: Mapping[str, str], absent: Mapping[str, str]
    ) -> None:
        """Sites train; the others do not, for these reasons."""
        # A node without a name stands there as "node 123" until it joins as a site.
        self._content["sites"] = {name: told for name, told in self._content["sites"].items() if " " not in name}
        self._note("training", dict.fromkeys(sites, ""), server_round)
        self._note("busy", busy, server_round)
        self._note("absent", absent, server_round)
        self.change(state="training")

    def heard(self, sites: Iterable[str]) -> None:
        """Sites have answered; with none of them it only shows that the run is alive."""
        known = self._content["sites"]
        answered = [site for site in sites if known.get(site, {}).get("state") == "training"]
        for site in answered:
            known[site] |= {"state": "answered"}
        if answered or time.monotonic() - self._written > _BEAT_SECONDS:
            self._write()

    def round_done(self, server_round: int, *, dropped: Mapping[str, str], busy: Collection[str]) -> None:
        """A round is over; sites were dropped for these reasons, and some of them still work on it."""
        self._note("absent", {site: reason for site, reason in dropped.items() if site not in busy}, server_round)
        self._note("busy", {site: reason for site, reason in dropped.items() if site in busy}, server_round)

    def reached(self, server_round: int, seconds: Sequence[float]) -> None:
        """So many rounds are kept, which took so long each."""
        left = self._content["num_server_rounds"] - server_round
        pace = median(seconds[-_ROUNDS_FOR_PACE:]) if seconds else None
        eta = None if pace is None else round(pace * left, 1)
        self.change(server_round=server_round, seconds_per_round=pace, eta_seconds=eta)

    def _is_to_stop(self) -> bool:
        if self._path is None:
            return False
        try:
            return bool(read_json(self._path.with_name("wish.json")).get("wish") == "stop")
        except ConfigError:
            return False

    def _note(
        self, state: Literal["training", "busy", "absent"], reasons: Mapping[str, str], server_round: int
    ) -> None:
        self._content["sites"] |= {
            site: {"state": state, "reason": reason, "round": server_round} for site, reason in reasons.items()
        }

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._path is None:
            return
        content = self._content | {"updated": datetime.now(UTC).isoformat()}
        try:
            replace_file(self._path, (json.dumps(content, indent=1) + "\n").encode(), mode=0o644)
        except OSError as error:  # a full disk ends the run at its next checkpoint, with a clearer word
            _LOG.warning("'%s' could not be written: %s", self._path, error.strerror or error)


def _one_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [""])[0]
    return line if isinstance(error, McrageError) else f"{type(error).__name__}: {line}"

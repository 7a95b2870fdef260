"""What goes on in a federation: its coordinator, its sites and its runs, as data and as lines for a terminal.

Everything is read, nothing is changed; what is damaged in a run's folder is a line about that run. Where nothing
listens on the SuperLink's port, Flower is not even imported.
"""

import json
import math
import os
import socket
import textwrap
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mcrage.config import FederationConfig
from mcrage.errors import ConfigError, FederationError, PrivacyError
from mcrage.files import lock_file
from mcrage.pki import SERVER_CERTIFICATE, describe, read_pem
from mcrage.privacy.statement import PrivacyAccount
from server.home import Home
from server.proxy import wrong_clocks

if TYPE_CHECKING:
    from server.control import Node

WIDTH = 100
"""Columns of the terminal."""

_CONNECT_SECONDS = 0.5
_SILENT_SECONDS = 60.0
_RENEW_DAYS = 30


class Part(BaseModel):
    """A file of a run, as far as it is read here."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)


class SiteNow(Part):
    """A site in ``status.json``."""

    state: str = ""
    reason: str = ""
    round: int = 0


class RunNow(Part):
    """``status.json``, as :class:`server.status.LiveStatus` writes it."""

    state: str = ""
    server_round: int = 0
    num_server_rounds: int = 0
    sites: dict[str, SiteNow] = {}
    seconds_per_round: float | None = None
    eta_seconds: float | None = None
    updated: datetime | None = None
    error: str = ""
    epsilon_planned: float | None = None


class RoundPart(Part):
    """A round in ``run.json``; :class:`server.records.RoundRecord` says what stands in it."""

    server_round: int
    sites: list[str]
    losses: dict[str, float]
    held_out: dict[str, float]
    dropped: dict[str, str]
    seconds: float


class Record(Part):
    """``run.json``, as :func:`server.app.save_result` writes it."""

    config: dict[str, bool | int | float | str]
    seconds: float
    sites: list[str]
    absent: dict[str, str]
    privacy: dict[str, Any]
    rounds: list[RoundPart]

    @property
    def accounts(self) -> dict[str, PrivacyAccount]:
        """What the sites' ledgers said after the run.

        Raises:
            PrivacyError: If one of them is not whole.
        """
        return {site: PrivacyAccount.from_json(json.dumps(account)) for site, account in self.privacy.items()}


class _Settings(Part):
    num_server_rounds: int = Field(default=FederationConfig().num_server_rounds, alias="num-server-rounds")
    dp: bool = False


class _Job(Part):
    state: str = "wanted"
    error: str = ""


AnyPart = TypeVar("AnyPart", bound=BaseModel)


def read_part(path: Path, kind: type[AnyPart]) -> AnyPart | None:
    """A file of a run; None if it is not there.

    Raises:
        ConfigError: If it cannot be read, or is not what it has to be.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "it is not whole JSON"
        raise ConfigError(f"'{path}' is damaged ({where})") from None


def site_rows(home: Home) -> list[dict[str, Any]]:
    """A row per site: ``site``, ``state``, ``days_left`` of its newest certificate, ``keys``, ``node_ids``, ``reason``.

    The state is ``connected``, ``not connected``, ``not registered yet`` while no running coordinator has seen the
    site, and ``unknown`` where the SuperLink does not answer. The reason is why it is turned away, where that is known.
    """
    return _site_rows(home, _nodes(home))


def overview(home: Home) -> dict[str, Any]:
    """The coordinator, its sites and its runs, as plain data.

    Raises:
        ConfigError: If the coordinator's own settings or its list of sites are damaged.
    """
    nodes = _nodes(home)
    return {
        "coordinator": _coordinator(home, answers=nodes is not None),
        "sites": _site_rows(home, nodes),
        "runs": [_run(home.run(name)) for name in home.runs() if home.run(name).is_dir()],
    }


def overview_lines(overview: Mapping[str, Any]) -> list[str]:
    """The same in words, in lines of at most :data:`WIDTH` columns."""
    sites, runs = overview["sites"], overview["runs"]
    lines = _coordinator_lines(overview["coordinator"])
    lines += [f"sites: {len(sites)}" if sites else "sites: none; 'python -m server site add' lets one in"]
    lines += [line for row in sites for line in _wrapped(_site_line(row), indent=2)]
    lines += [] if runs else ["runs: none; 'python -m server start' wants one"]
    return lines + [line for run in runs for line in _run_lines(run)]


def duration(seconds: float) -> str:
    """A time in words: ``4.2 s``, ``42 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _nodes(home: Home) -> "dict[int, Node] | None":
    """The nodes that Flower knows, by id; None if the SuperLink does not answer."""
    port = home.settings.superlink_port
    try:
        socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return None
    from server.control import Control

    try:
        control = Control(port, home.pki / "ca.crt")
    except OSError:  # without the authority's certificate there is nobody to believe
        return None
    try:
        return {node.node_id: node for node in control.nodes()}
    except FederationError:
        return None
    finally:
        control.close()


def _coordinator(home: Home, *, answers: bool) -> dict[str, Any]:
    settings, days, problem = home.settings, None, ""
    try:
        days = describe(read_pem(home.pki / SERVER_CERTIFICATE)).days_left
    except ConfigError as error:
        problem = str(error)
    return {
        "running": _is_running(home),
        "superlink": answers,
        "names": list(settings.names),
        "listen": settings.listen,
        "certificate_days_left": days,
        "problem": problem,
    }


def _is_running(home: Home) -> bool:
    path = home.folder / "state" / "up.lock"
    if not path.exists():
        return False
    lock = lock_file(path)
    if lock is not None:
        os.close(lock)
    return lock is None


def _site_rows(home: Home, nodes: "Mapping[int, Node] | None") -> list[dict[str, Any]]:
    registry, clocks = home.read_registry(), wrong_clocks(home.proxy / "access.log")
    rows = []
    for site, entry in sorted(home.sites().items()):
        node_ids = _node_ids(registry.get(site))
        if not node_ids:
            state = "not registered yet"
        elif nodes is None:
            state = "unknown"
        else:
            is_there = any(node_id in nodes and nodes[node_id].is_online for node_id in node_ids)
            state = "connected" if is_there else "not connected"
        days_left = entry.keys[-1].days_left if entry.keys else 0
        row = {"site": site, "state": state, "days_left": days_left, "keys": len(entry.keys), "node_ids": node_ids}
        reason = _of_clock(clocks[site]) if site in clocks else ""
        rows.append({**row, "reason": reason})
    return rows


def _of_clock(seconds: int) -> str:
    where = "ahead of" if seconds > 0 else "behind"
    return f"turned away: its clock is {abs(seconds)} s {where} this machine's"


def _node_ids(entry: Any) -> list[int]:
    node_ids = entry.get("node_ids") if isinstance(entry, dict) else None
    return [node_id for node_id in node_ids if type(node_id) is int] if isinstance(node_ids, list) else []


def _run(folder: Path) -> dict[str, Any]:
    """One run; ``problems`` has a line for everything in its folder that cannot be used."""
    problems: list[str] = []
    job = _part(folder / "job.json", _Job, problems)
    now = _part(folder / "status.json", RunNow, problems)
    settings = _part(folder / "settings.json", _Settings, problems)
    record = _part(folder / "run.json", Record, problems)
    if not (folder / "settings.json").exists():
        problems.append(f"'{folder / 'settings.json'}' is not there: the run was never wholly begun")
    is_whole = settings is not None and (job is not None or not (folder / "job.json").exists())
    job, now, state = job or _Job(), now or RunNow(), (job or _Job()).state if is_whole else "damaged"
    return {
        "run": folder.name,
        "state": state,
        "phase": now.state,
        "round": now.server_round,
        "rounds": now.num_server_rounds or (settings.num_server_rounds if settings else None),
        "sites": {site: each.model_dump() for site, each in now.sites.items()},
        "seconds_per_round": now.seconds_per_round,
        "eta_seconds": now.eta_seconds,
        "silent_seconds": _silence(now) if state == "running" else None,
        "dp": settings.dp if settings else None,
        "epsilon_planned": now.epsilon_planned,
        "epsilon": _epsilons(record, problems) if record else {},
        "error": job.error or (now.error if state != "done" else ""),
        "problems": problems,
    }


def _part(path: Path, kind: type[AnyPart], problems: list[str]) -> AnyPart | None:
    try:
        return read_part(path, kind)
    except ConfigError as error:
        problems.append(str(error))
        return None


def _silence(now: RunNow) -> float | None:
    """Seconds since the run last gave a sign of life."""
    if now.updated is None:
        return None
    updated = now.updated if now.updated.tzinfo else now.updated.replace(tzinfo=UTC)
    return max(0.0, (datetime.now(UTC) - updated).total_seconds())


def _epsilons(record: Record, problems: list[str]) -> dict[str, dict[str, float | None] | None]:
    """Of this run and in all, by site: None for a number without bound, and for a site whose account did not come."""
    if not record.config.get("dp"):
        return {}
    try:
        accounts = record.accounts
    except PrivacyError as error:
        problems.append(f"run.json: {error}")
        return {}
    told = {
        site: {"run": _finite(account.epsilon_run), "total": _finite(account.epsilon)}
        for site, account in accounts.items()
    }
    return {site: told.get(site) for site in sorted({*record.sites, *told})}


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _coordinator_lines(found: Mapping[str, Any]) -> list[str]:
    state = "running" if found["running"] else "not running; 'python -m server up' starts it"
    if found["running"] and not found["superlink"]:
        state = "running, but its SuperLink does not answer"
    days = found["certificate_days_left"]
    certificate = found["problem"] if days is None else f"server certificate {_validity(days)}"
    return [
        *_wrapped(f"coordinator {', '.join(found['names'])}: {state}", indent=0),
        *_wrapped(f"proxy on {found['listen']}, {certificate}", indent=2),
    ]


def _validity(days: int) -> str:
    if days < 0:
        return f"expired {-days} days ago"
    return f"{days} days" + (": renew" if days <= _RENEW_DAYS else "")


def _site_line(row: Mapping[str, Any]) -> str:
    keys = "" if row["keys"] == 1 else f", {row['keys']} keys"
    reason = f"; {row['reason']}" if row["reason"] else ""
    return f"{row['site']:<24} {row['state']:<18} certificate {_validity(row['days_left'])}{keys}{reason}"


def _run_lines(run: Mapping[str, Any]) -> list[str]:
    is_going = run["state"] in ("wanted", "running")
    texts = [*_site_states(run["sites"])] if run["state"] != "done" else []
    texts += _silent(run) + _epsilon_lines(run, is_going=is_going)
    texts += [f"error: {line}" for line in run["error"].splitlines()] + run["problems"]
    return _wrapped(_headline(run), indent=0) + [line for text in texts for line in _wrapped(text, indent=2)]


def _headline(run: Mapping[str, Any]) -> str:
    state, phase = run["state"], run["phase"]
    parts = [f"{state} ({phase})" if state == "running" and phase not in ("", "training") else state]
    if run["rounds"] is not None:
        parts.append(f"{run['round']} of {run['rounds']} rounds")
    if run["seconds_per_round"] is not None:
        parts.append(f"{duration(run['seconds_per_round'])} a round")
    if state == "running" and run["eta_seconds"] is not None:
        parts.append(f"about {duration(run['eta_seconds'])} left")
    if run["dp"] is False:
        parts.append("no privacy claim")
    return f"run {run['run']}: {', '.join(parts)}"


def _site_states(sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line per state, with the sites in it and why."""
    by_state: dict[str, list[str]] = {}
    for site, now in sorted(sites.items()):
        by_state.setdefault(now["state"], []).append(f"{site} ({now['reason']})" if now["reason"] else site)
    return [f"{state}: {', '.join(those)}" for state, those in sorted(by_state.items())]


def _silent(run: Mapping[str, Any]) -> list[str]:
    seconds = run["silent_seconds"]
    return [] if seconds is None or seconds < _SILENT_SECONDS else [f"no sign of life for {duration(seconds)}"]


def _epsilon_lines(run: Mapping[str, Any], *, is_going: bool) -> list[str]:
    """What is planned while a run goes on, then what each site's ledger says; sites of equal numbers share a line."""
    if is_going and run["epsilon_planned"] is not None:
        return [f"epsilon {run['epsilon_planned']:.2f} planned for the patients of each site"]
    by_text: dict[str, list[str]] = {}
    for site, spent in run["epsilon"].items():
        text = "no account came"
        if spent is not None:
            of_run, total = ("without bound" if each is None else f"{each:.2f}" for each in spent.values())
            text = f"epsilon {of_run} of this run, {total} in all"
        by_text.setdefault(text, []).append(site)
    return [f"{text}: {', '.join(those)}" for text, those in by_text.items()]


def _wrapped(text: str, *, indent: int) -> list[str]:
    # Reasons and errors may quote what came from elsewhere: no character of theirs steers the terminal.
    clean = "".join(each if each.isprintable() else "?" for each in text)
    first, more = " " * indent, " " * (indent + 2)
    return textwrap.wrap(clean, WIDTH, initial_indent=first, subsequent_indent=more, break_on_hyphens=False)

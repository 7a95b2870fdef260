"""The doctor of a hospital's installation: looks at all that the daemon needs; says what is wrong, where, what to do.

Every check runs, whatever the others found. No line holds a cell of the table, a key or a password; of an error that
nobody foresaw it has the type alone. Nothing is changed, but for a witness that had fallen behind its ledger.

Where two users run the two halves of the daemon, each of them has it look at what its own half needs.
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mcrage
from client.bundles import Approvals, Bundle
from client.findings import ASK, INSTALL, Finding, Level, Line, contained
from client.holdings import ledger_lines, log_lines, policy_lines, secret_lines, table_lines
from client.leaving import leaving_lines
from client.places import JOURNAL, LEDGER, POLICY, SECRET, WITNESS
from client.reach import certificate_lines, key_lines, server_lines
from client.rights import NOT_READABLE, USER, barred, file_lines
from client.settings import SiteSettings, parts_of

_Check = Callable[[SiteSettings], Iterator[Line]]

_LOW_DISK, _LITTLE_DISK = 2 * 10**8, 10**9


def examine(settings: SiteSettings, *, offline: bool, only: str = "both") -> list[Finding]:
    """All that was found, in the order of the checks.

    Args:
        settings: Of the site.
        offline: Whether the server is not asked.
        only: ``network`` or ``data`` for what one half of the daemon needs, run by that half's user.

    Raises:
        ConfigError: If there is no such half.
    """
    checks = _checks(only)
    if os.name != "posix":
        text = f"this is {sys.platform}, where the rights of files are not those that the daemon relies on"
        return [Finding("system", "problem", text, "Run the daemon on Linux.")]
    found = [each for area, check, remedy in checks for each in _looked_at(settings, area, check, remedy)]
    if "network" in parts_of(only) and not offline:
        are_keys_right = not any(each.is_problem and each.area in ("files", "keys") for each in found)
        ask = partial(server_lines, settings, are_keys_right=are_keys_right)
        found += contained("server", ask, ASK)
    return found


def _looked_at(settings: SiteSettings, area: str, check: _Check, remedy: str) -> Iterator[Finding]:
    """What a check finds; of what this user may not look at, that alone is said."""
    used = [(path, barred(path, need)) for path, need in _used(settings).get(area, ())]
    for path, closed in used:
        if closed:
            yield Finding(area, "problem", f"'{path}' {closed}", USER)
    if NOT_READABLE not in (closed for _, closed in used):
        yield from contained(area, partial(check, settings), remedy)


def _used(settings: SiteSettings) -> dict[str, tuple[tuple[Path, int], ...]]:
    """What a check looks into, and what the daemon does there; of ``files`` and ``keys``, they say it themselves."""
    site, private, reads, writes = settings.site, settings.site.private, os.R_OK, os.R_OK | os.W_OK
    return {
        "approvals": ((settings.daemon.approved, reads),),
        "policy": ((private / POLICY, reads),),
        "ledger": ((private / LEDGER, writes), (private / WITNESS, reads)),
        "secret": ((private / SECRET, reads),),
        "table": ((site.schema_file, reads), (site.data, reads)),
        "log": ((private / JOURNAL, writes),),
    }


def _versions(_settings: SiteSettings) -> Iterator[Line]:
    from client.node import require_flower

    installed = {"python": platform.python_version(), "mcrage": mcrage.__version__}
    for name in ("flwr", "torch", "opacus"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            yield "problem", f"{name} is not installed", INSTALL
    require_flower()
    yield "ok", ", ".join(f"{name} {number}" for name, number in installed.items()), ""


def _approvals(settings: SiteSettings) -> Iterator[Line]:
    approvals = Approvals(settings.daemon.approved)
    listed = approvals.listed()
    if not listed:
        yield "note", "none: nothing can run here until 'python -m client approve'", "The coordinator has the bundle."
        return
    digest, at, by = listed[-1]
    differences = Bundle(digest, approvals.last_files()).differences()
    if differences:
        text = f"the newest approved bundle and the code installed here differ in {len(differences)} files"
        remedy = "Install the version of that bundle, or approve the bundle of this version."
        yield "problem", f"{text}, the first one {differences[0]}", remedy
    else:
        text = f"{len(listed)} bundles; the newest, {digest[:12]}, {at[:10]} by {by!r}, is the code installed here"
        yield "ok", text, ""


def _disk(settings: SiteSettings, *, only: str) -> Iterator[Line]:
    place = settings.server.key.parent if only == "network" else settings.site.private
    folder = next(folder for folder in (place, *place.parents) if os.path.exists(folder))
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free >= _LITTLE_DISK else "note" if free >= _LOW_DISK else "problem"
    yield level, f"{free / 10**9:.1f} GB are free at '{folder}'", "" if level == "ok" else "Make room there."


def _checks(only: str) -> list[tuple[str, _Check, str]]:
    """Area, check, and what to do about what it raises, of all that a half of the daemon needs, in order."""
    network, data, either = {"network"}, {"data"}, {"network", "data"}
    certificate = "Ask the coordinator for a new one; certificate and ca.crt have to be of one federation."
    approved = "Give it to root and run 'chmod go-w' on it, or remove it and approve the bundle anew."
    ledger = "Nothing can be answered before; bring back the newest copy and never make a new one."
    every: tuple[tuple[str, set[str], _Check, str], ...] = (
        ("versions", either, _versions, INSTALL),
        ("files", either, partial(file_lines, only=only), ASK),
        ("keys", network, key_lines, "Bring both keys back from one backup, or enrol anew."),
        ("keys", network, certificate_lines, certificate),
        ("approvals", either, _approvals, approved),
        ("policy", data, policy_lines, "Correct it, or run 'chmod go-w' on it; until then everything is refused."),
        ("ledger", data, ledger_lines, ledger),
        ("secret", data, secret_lines, "Bring it back from a backup; never make a new one beside the old ledger."),
        ("table", data, table_lines, "Correct the data dictionary, or get it from the coordinator."),
        ("leaves", data, leaving_lines, ASK),
        ("disk", either, partial(_disk, only=only), ASK),
        ("log", data, log_lines, "Keep it as it is, and find out who changed it."),
    )
    return [(area, check, remedy) for area, parts, check, remedy in every if parts & {*parts_of(only)}]

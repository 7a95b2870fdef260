"""Whether the files that a hospital's daemon needs are there, and belong to and are open to whom they should.

A part of the doctor (:mod:`client.check`).
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from client.findings import Line
from client.places import DAEMON_LOCK, DEBUG_LOG, LEDGER, SECRET, TRAINER_LOCK, WITNESS
from client.settings import SiteSettings, parts_of

NOT_READABLE, NOT_WRITABLE = "is not readable by this user", "is not writable by this user"
USER = "Run this as the daemon's user ('--only' where there are two), or give that user what it needs (chown, chmod)."


def barred(path: Path, need: int = os.R_OK) -> str:
    """What keeps this user from a file or folder that is there, in words; empty where nothing does, or none is there.

    Args:
        path: Of it; it is not readable either where a folder above it is closed.
        need: As :func:`os.access` takes it.
    """
    try:
        path.stat()
    except PermissionError:
        return NOT_READABLE
    except OSError:
        return ""
    if not os.access(path, need & ~os.W_OK):
        return NOT_READABLE
    return "" if os.access(path, need) else NOT_WRITABLE


def is_readable_file(path: Path) -> bool:
    """Whether there is a file that this user may read."""
    return os.path.isfile(path) and not barred(path)


class _Right(NamedTuple):
    """How a file or folder has to be.

    Attributes:
        path: Of it.
        forbidden: Bits of the mode that it must not have.
        chmod: What takes them away.
        remedy: What to do where it is missing.
        is_own: Whether it has to be this user's, and no link; others may be root's, and links.
        is_folder: Whether it is a folder.
        least_bytes: Of a file.
        also: Another user to whom it may belong.
    """

    path: Path
    forbidden: int
    chmod: str
    remedy: str
    is_own: bool = True
    is_folder: bool = False
    least_bytes: int = 1
    also: int | None = None

    def fault(self) -> tuple[str, str] | None:
        """What is wrong first of all, and what to do."""
        try:
            status = self.path.lstat() if self.is_own and not self.is_folder else self.path.stat()
        except PermissionError:
            return NOT_READABLE, USER
        except OSError as error:
            return f"cannot be used: {error.strerror}", self.remedy
        mode, owners = stat.S_IMODE(status.st_mode), {os.getuid(), self.also} | (set() if self.is_own else {0})
        is_kind, need = (stat.S_ISDIR, os.R_OK | os.X_OK) if self.is_folder else (stat.S_ISREG, os.R_OK)
        closed = barred(self.path, need)
        faults = (
            (
                not is_kind(status.st_mode),
                "is a link, or no file or folder",
                "Put there what the link leads to.",
            ),
            (closed, closed, USER),
            (
                status.st_uid not in owners,
                f"belongs to user {status.st_uid}, and this is run by user {os.getuid()}",
                USER,
            ),
            (mode & self.forbidden, f"is open to others (mode {mode:04o})", f"Run 'chmod {self.chmod} {self.path}'."),
            (status.st_size < self.least_bytes, f"has less than {self.least_bytes} bytes", f"Remove it; {self.remedy}"),
        )
        return next(((text, remedy) for is_so, text, remedy in faults if is_so), None)


def file_lines(settings: SiteSettings, *, only: str) -> Iterator[Line]:
    """Whether every file and folder is there, with the rights that it needs.

    Args:
        settings: Of the site.
        only: ``network`` or ``data`` for what one half of the daemon needs; ``both`` otherwise.
    """
    parts = parts_of(only)
    rights = _rights(settings, parts)
    faults = [(right.path, *fault) for right in rights if (fault := right.fault())]
    named = {path for path, *_ in faults}
    faults += [fault for part in parts for fault in _unwritable(settings, part) if fault[0] not in named]
    for path, text, remedy in faults:
        yield "problem", f"'{path}' {text}", remedy
    if not faults:
        yield "ok", f"{len(rights)} files and folders are there, with the rights that they need", ""
    if len(parts) == 1:
        yield from _apart_lines(settings, only)


def _rights(settings: SiteSettings, parts: tuple[str, ...]) -> list[_Right]:
    server, secret = settings.server, settings.daemon.secret
    enrol = f"'python -m client enroll {settings.file}' makes it; if it was lost, bring it back from a backup."
    of_network = [
        _Right(server.key.parent, 0o027, "750", enrol, is_folder=True),
        _Right(server.key, 0o177, "600", enrol),
        _Right(server.node_key, 0o177, "600", enrol),
        _Right(server.certificate, 0o022, "go-w", "Put there what the coordinator sent back.", is_own=False),
        _Right(server.ca, 0o022, "go-w", "Put there the federation's ca.crt, from the coordinator.", is_own=False),
    ]
    is_shared = len(parts) == 1
    of_both = _Right(secret, 0o137, "640", enrol, not is_shared, least_bytes=32)
    if is_shared and os.path.exists(secret):
        # Whose the folder is could put another one there anyway.
        of_both = of_both._replace(also=secret.parent.stat().st_uid)
    return [
        _Right(settings.file, 0o022, "go-w", "Write it anew.", is_own=False),
        *(of_network if "network" in parts else ()),
        of_both,
        *([_Right(settings.site.private, 0o077, "700", enrol, is_folder=True)] if "data" in parts else ()),
    ]


def _unwritable(settings: SiteSettings, part: str) -> Iterator[tuple[Path, str, str]]:
    """What a half of the daemon writes, where its user cannot, and what to do."""
    keys, private, lock = settings.server.key.parent, settings.site.private, DAEMON_LOCK.format(part=part)
    if part == "network":
        folders, files = [keys], [keys / lock]
    else:
        folders = [private, (private / WITNESS).parent]
        files = [private / name for name in (lock, TRAINER_LOCK, DEBUG_LOG)]
    for folder in folders:
        if barred(folder, os.R_OK | os.W_OK | os.X_OK) == NOT_WRITABLE:
            yield folder, NOT_WRITABLE, USER
    for file in files:
        if os.path.islink(file):
            yield file, "is a link, where the file itself is needed", "Remove it; the daemon makes a new one."
        elif not barred(file.parent, os.R_OK | os.X_OK) and (closed := barred(file, os.R_OK | os.W_OK)):
            yield file, closed, USER


def _apart_lines(settings: SiteSettings, part: str) -> Iterator[Line]:
    """Whether what only the other half may read is closed to the user of this one."""
    server, site = settings.server, settings.site
    closed = {
        "network": (site.data, site.private / SECRET, site.private / LEDGER),
        "data": (server.key, server.node_key),
    }
    found = [path for path in closed[part] if is_readable_file(path)]
    own = [path for path in found if os.getuid() in (0, path.stat().st_uid)]
    for path in found:
        if path not in own:
            text = f"'{path}' is readable by this user, and is the other half's"
            yield "problem", text, "Run 'chmod o-r' on it, or take this user out of the group that may read it."
    if own:
        text = f"'{own[0]}' is the other half's and readable by this user, who may read both: they are not apart"
        yield "note", text, "Give each half a user of its own, as deploy/systemd does."
    if not found:
        yield "ok", f"nothing that is the other half's, such as '{closed[part][0]}', is readable by this user", ""

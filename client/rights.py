"""Whether the files that a hospital's daemon needs are there, and belong to and are open to whom they should.

A part of the doctor (:mod:`client.check`).
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from client.findings import Line
from client.settings import SiteSettings

NOT_READABLE, NOT_WRITABLE = "is not readable by this user", "is not writable by this user"
USER = "Run this as the user who runs the daemon, or give that user what it needs (chown, chmod)."


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
    """

    path: Path
    forbidden: int
    chmod: str
    remedy: str
    is_own: bool = True
    is_folder: bool = False
    least_bytes: int = 1

    def fault(self) -> tuple[str, str] | None:
        """What is wrong first of all, and what to do."""
        try:
            status = self.path.lstat() if self.is_own and not self.is_folder else self.path.stat()
        except PermissionError:
            return NOT_READABLE, USER
        except OSError as error:
            return f"cannot be used: {error.strerror}", self.remedy
        mode, owners = stat.S_IMODE(status.st_mode), {os.getuid()} | (set() if self.is_own else {0})
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


def file_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether every file and folder is there, with the rights that it needs."""
    server, daemon = settings.server, settings.daemon
    enrol = f"'python -m client enroll {settings.file}' makes it; if it was lost, bring it back from a backup."
    rights = [
        _Right(settings.file, 0o022, "go-w", "Write it anew.", is_own=False),
        _Right(server.key.parent, 0o027, "750", enrol, is_folder=True),
        _Right(server.key, 0o177, "600", enrol),
        _Right(server.node_key, 0o177, "600", enrol),
        _Right(server.certificate, 0o022, "go-w", "Put there what the coordinator sent back.", is_own=False),
        _Right(server.ca, 0o022, "go-w", "Put there the federation's ca.crt, from the coordinator.", is_own=False),
        _Right(daemon.secret, 0o137, "640", enrol, least_bytes=32),
        _Right(settings.site.private, 0o077, "700", enrol, is_folder=True),
    ]
    faults = [(right.path, fault) for right in rights if (fault := right.fault())]
    for path, (text, remedy) in faults:
        yield "problem", f"'{path}' {text}", remedy
    if not faults:
        yield "ok", f"{len(rights)} files and folders are there, with the rights that they need", ""

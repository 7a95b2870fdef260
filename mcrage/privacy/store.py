"""The file under a ledger: SQLite, its owner's alone, and on a local disk."""

import hashlib
import json
import os
import re
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from mcrage.errors import LedgerError

BUSY_SECONDS = 180.0  # other processes may each ask the slow accountant while this one waits

_APPLICATION, _VERSION = 0x6D637267, 1
_MOUNTS = Path("/proc/self/mountinfo")
_SCHEMA = (
    "CREATE TABLE ledger (id TEXT NOT NULL, created TEXT NOT NULL) STRICT",
    "CREATE TABLE charges (sequence INTEGER PRIMARY KEY, time TEXT NOT NULL, key TEXT NOT NULL UNIQUE, "
    "run TEXT NOT NULL, task TEXT NOT NULL, dataset TEXT NOT NULL, events TEXT NOT NULL, previous TEXT NOT NULL, "
    "hash TEXT NOT NULL) STRICT",
    "CREATE TRIGGER no_update BEFORE UPDATE ON charges BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END",
    "CREATE TRIGGER no_delete BEFORE DELETE ON charges BEGIN SELECT RAISE(ABORT, 'a ledger only grows'); END",
)
_REASONS = {
    "SQLITE_NOTADB": "it is not a privacy ledger, or it is damaged",
    "SQLITE_CORRUPT": "the ledger is damaged",
    "SQLITE_BUSY": f"another process has held the ledger for {BUSY_SECONDS:g} seconds",
    "SQLITE_FULL": "the ledger cannot grow: the disk is full; nothing was granted",
}
_NETWORK = frozenset(
    ("9p", "afpfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs")
) | {"nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "virtiofs"}
_LOCAL_FUSE = frozenset(["fuse.encfs", "fuse.fuseblk", "fuse.gocryptfs", "fuse.lxcfs", "fuse.mergerfs"])


@contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Turns what SQLite raises into one line, without its own text, which may hold a part of a row."""
    try:
        yield
    except (sqlite3.Error, UnicodeDecodeError) as error:
        # Of a damaged schema, Python cannot even read SQLite's complaint.
        is_unreadable = isinstance(error, UnicodeDecodeError)
        name = "SQLITE_CORRUPT" if is_unreadable else getattr(error, "sqlite_errorname", type(error).__name__)
        known = next((words for start, words in _REASONS.items() if name.startswith(start)), None)
        raise LedgerError(f"{path}: {known or f'the ledger cannot be used ({name})'}") from None


def connect(path: Path) -> sqlite3.Connection:
    """The file opened, never made; transactions are the caller's."""
    address = f"{path.absolute().as_uri()}?mode=rw"
    database = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        # Each commit reaches the disk before it returns.
        database.execute("PRAGMA synchronous = FULL")
    except BaseException:
        database.close()
        raise
    return database


def write_schema(path: Path, name: str, created: str) -> None:
    """Makes an empty file a ledger without charges."""
    database = connect(path)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("BEGIN IMMEDIATE")
        database.execute(f"PRAGMA application_id = {_APPLICATION}")
        database.execute(f"PRAGMA user_version = {_VERSION}")
        for statement in _SCHEMA:
            database.execute(statement)
        database.execute("INSERT INTO ledger VALUES (?, ?)", (name, created))
        database.execute("COMMIT")
    finally:
        database.close()


def read_format(path: Path, database: sqlite3.Connection) -> tuple[str, datetime]:
    """Name of a ledger and time of its creation, if the file is one and every page of it is sound."""
    [application], [version] = (
        database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    statements = [
        text for [text] in database.execute("SELECT sql FROM sqlite_master WHERE sql NOT NULL ORDER BY rowid")
    ]
    if application != _APPLICATION:
        raise LedgerError(f"{path}: it is not a privacy ledger")
    if version != _VERSION or tuple(statements) != _SCHEMA:
        raise LedgerError(f"{path}: the ledger is of another version of mcrage, or its tables were altered")
    if database.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
        raise LedgerError(f"{path}: the ledger is damaged")
    names = database.execute("SELECT id, created FROM ledger").fetchall()
    try:
        [(name, created)] = names
        return name, datetime.fromisoformat(created)
    except (TypeError, ValueError):
        raise LedgerError(f"{path}: the ledger is damaged") from None


def digest(*content: object) -> str:
    """SHA-256 over everything in a row; what a damaged file may hold instead of text and numbers has a hash too."""
    return hashlib.sha256(json.dumps(content, default=repr).encode()).hexdigest()


def identity(path: Path) -> tuple[int, int]:
    """Tells a file from another one that took its name."""
    try:
        status = path.stat()
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def is_there(path: Path) -> bool:
    """Whether there is anything of that name; raises a LedgerError where this user may not look."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from None
    return True


def check_places(path: Path, witness: Path) -> None:
    """Raises a LedgerError if the two would be lost together, or the ledger's lock would not hold."""
    if path.parent.resolve() == witness.parent.resolve():
        raise LedgerError(
            f"{witness}: the witness belongs in another folder, or one backup would bring back both files"
        )
    mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace") if _MOUNTS.exists() else ""
    if kind := network_filesystem(path.parent.resolve(), mounts):
        raise LedgerError(f"{path}: it lies on a network drive ({kind}), where its lock cannot be relied on")


def sync_folder(folder: Path) -> None:
    """Makes the names of new files outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_private(path: Path) -> None:
    """Raises a LedgerError unless it is a file, and not a link to one, that nobody but its owner may use."""
    try:
        mode = path.lstat().st_mode
    except OSError as error:
        raise LedgerError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise LedgerError(f"{path}: it is a link or not a file at all, where the file itself is needed")
    if mode & 0o077:
        raise LedgerError(f"{path}: others than its owner may use it (mode {mode & 0o777:04o}); run chmod 600")


def network_filesystem(path: Path, mounts: str) -> str | None:
    """The type of the network file system that a path lies on, if it does.

    Args:
        path: An absolute path without links.
        mounts: Text of ``/proc/self/mountinfo``.
    """
    kind, longest = "", -1
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        place = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
        # The last of several mounts on one place hides the others.
        if path.is_relative_to(place) and len(place.parts) >= longest:
            kind, longest = after.split()[0], len(place.parts)
    is_remote = kind in _NETWORK or (kind.split(".")[0] == "fuse" and kind not in _LOCAL_FUSE)
    return kind if is_remote else None

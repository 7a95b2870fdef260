"""The SuperLink's database: whether this Flower can use it, and whether its disk has room for it.

Flower itself only ends where it cannot, with a trace of its own code, and is started again and again.
"""

import os
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import flwr

from mcrage.errors import ConfigError

LEAST_FREE_BYTES = 32 * 2**20
"""Below this nothing is begun: the database and its log grow by some updates of every site in a round."""

# A file per step from one form of the tables to the next; to ask alembic for them would load all of its plugins.
_STEPS = Path(flwr.__file__).parent / "supercore" / "state" / "alembic" / "versions"
_HOW_TO_GO_ON = (
    "start it with the Flower that wrote it, restore a backup, or move it away with its -wal and -shm: without it, "
    "sites are registered anew, and runs go on after their last complete round ('resume' where one gives up meanwhile)"
)


def require_usable(database: Path) -> None:
    """Raises unless the installed Flower can use a database, or there is none; an older one is copied beside it first.

    The copy is called ``superlink-REVISION.sqlite``, after what Flower calls the form of its tables.

    Raises:
        ConfigError: If it is damaged, none of Flower's, or of a newer Flower; it is left as it is.
        OSError: If it cannot be copied.
    """
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=rw", uri=True)) as connection:
            revision = _revision(connection)
            _require_known(database, revision)
            if revision and revision in known_revisions()[0]:
                _copy(connection, database.with_name(f"{database.stem}-{revision}.sqlite"))
    except sqlite3.Error as error:
        raise ConfigError(f"'{database}' cannot be used ({error}); {_HOW_TO_GO_ON}") from None


def shortage(*folders: Path) -> str:
    """What is wrong with the disk of one of the folders, in words; empty if all have room."""
    for folder in folders:
        free = shutil.disk_usage(folder).free
        if free < LEAST_FREE_BYTES:
            needed = LEAST_FREE_BYTES // 2**20
            return f"the disk of '{folder}' is full: {free // 2**20} MB are left, {needed} MB are needed"
    return ""


def known_revisions() -> tuple[frozenset[str], frozenset[str]]:
    """Revisions of the tables that the installed Flower makes newer, and those that it works with."""
    steps = [path.read_text(encoding="utf-8") for path in _STEPS.glob("*.py")]
    made = {name for step in steps for name in re.findall(r'^revision\b.* = "(\w+)"', step, re.MULTILINE)}
    before = [text for step in steps for text in re.findall(r"^down_revision\b.* = (.*)", step, re.MULTILINE)]
    older = made & {name for text in before for name in re.findall(r'"(\w+)"', text)}
    return frozenset(older), frozenset(made - older)


def _revision(connection: sqlite3.Connection) -> str | None:
    """Of its tables; empty where it has none yet, None where they are not of Flower."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return ""
    if "alembic_version" not in tables:
        return None
    problems = [text for (text,) in connection.execute("PRAGMA quick_check(1)") if text != "ok"]
    if problems:
        raise sqlite3.DatabaseError(" ".join(problems[0].split()))
    found = [revision for (revision,) in connection.execute("SELECT version_num FROM alembic_version")]
    return str(found[0]) if len(found) == 1 else None


def _require_known(database: Path, revision: str | None) -> None:
    if revision != "" and revision not in frozenset.union(*known_revisions()):
        named = f"tables of revision {revision}, which" if revision else "tables that"
        raise ConfigError(f"'{database}' has {named} flwr {flwr.__version__} does not know; {_HOW_TO_GO_ON}")


def _copy(connection: sqlite3.Connection, target: Path) -> None:
    if target.exists():
        return
    draft = target.with_name(f".{target.name}")
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(sqlite3.connect(draft)) as copy:
        connection.backup(copy)
    draft.replace(target)

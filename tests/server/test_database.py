"""The SuperLink's database, made by Flower's own steps, and a disk without room."""

import shutil
import sqlite3
import stat
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from flwr.supercore.state.alembic.utils import ALEMBIC_DIR, build_alembic_config
from sqlalchemy import create_engine

from mcrage.errors import ConfigError
from server import coordinator, database, jobs
from server.coordinator import run_coordinator
from server.database import known_revisions, require_usable, shortage
from server.home import CoordinatorSettings, Home
from server.jobs import Jobs

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A database with the tables of some release of Flower."""

    def at(revision: str = "heads") -> Path:
        path = tmp_path / "superlink.sqlite"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = create_engine(f"sqlite:///{path}")
            command.upgrade(build_alembic_config(engine), revision)
            engine.dispose()
        return path

    return at


def ask(path: Path, question: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute(question).fetchall()
        connection.commit()
    return found


def files(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.parent.iterdir()}


def test_flower_itself_knows_the_same_revisions() -> None:
    scripts = ScriptDirectory(str(ALEMBIC_DIR))
    older, newest = known_revisions()
    assert newest == set(scripts.get_heads())
    assert older | newest == {script.revision for script in scripts.walk_revisions()}


def test_a_database_of_this_flower_and_none_at_all_are_used_as_they_are(make: Make, tmp_path: Path) -> None:
    require_usable(tmp_path / "superlink.sqlite")
    assert not [*tmp_path.iterdir()]
    path = make()
    before = files(path)
    require_usable(path)
    assert files(path) == before


def test_an_empty_file_is_a_database_that_was_never_begun(tmp_path: Path) -> None:
    (tmp_path / "superlink.sqlite").touch()
    require_usable(tmp_path / "superlink.sqlite")


def test_an_older_database_is_copied_once_before_flower_changes_it(make: Make) -> None:
    older = "8f4785e2dc47"
    path = make(older)
    require_usable(path)
    copy = path.with_name(f"superlink-{older}.sqlite")
    assert ask(copy, "SELECT version_num FROM alembic_version") == [(older,)]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    before = files(path)
    require_usable(path)
    assert files(path) == before


@pytest.mark.parametrize(
    ("change", "told"),
    {
        "newer": ("UPDATE alembic_version SET version_num = 'ab12'", "has tables of revision ab12, which flwr 1.41.0"),
        "none": ("DROP TABLE alembic_version", "has tables that flwr 1.41.0 does not know"),
        "empty": ("DELETE FROM alembic_version", "has tables that flwr 1.41.0 does not know"),
        "two": ("INSERT INTO alembic_version VALUES ('ab12')", "has tables that flwr 1.41.0 does not know"),
    }.values(),
    ids=["newer", "none", "empty", "two"],
)
def test_a_database_that_this_flower_does_not_know_is_refused_and_left(make: Make, change: str, told: str) -> None:
    path = make()
    ask(path, change)
    before = files(path)
    with pytest.raises(
        ConfigError, match="start it with the Flower that wrote it, restore a backup, or move"
    ) as refused:
        require_usable(path)
    assert f"'{path}' {told}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert files(path) == before


@pytest.mark.parametrize("place", [0, 5000])
def test_a_damaged_database_is_refused_and_left(make: Make, place: int) -> None:
    path = make()
    content = bytearray(path.read_bytes())
    content[place : place + 4096] = b"x" * 4096
    path.write_bytes(content)
    before = files(path)
    with pytest.raises(ConfigError, match=r"cannot be used .*; start it with the Flower that wrote it"):
        require_usable(path)
    assert files(path) == before


def test_a_disk_without_room_is_named_with_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shortage(tmp_path, tmp_path) == ""
    monkeypatch.setattr(database, "LEAST_FREE_BYTES", 2**60)
    free = shutil.disk_usage(tmp_path).free // 2**20
    told = shortage(tmp_path)
    assert told.startswith(f"the disk of '{tmp_path}' is full: ")
    assert abs(int(told.split("full: ")[1].split()[0]) - free) < 1000


def test_nothing_starts_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home.create(tmp_path / "home", CoordinatorSettings(names=("localhost",)))
    monkeypatch.setattr(coordinator, "_require_files", lambda _: None)
    monkeypatch.setattr(database, "LEAST_FREE_BYTES", 2**60)
    with pytest.raises(ConfigError, match=r"state' is full: .* MB are needed; make room, then start it again"):
        run_coordinator(home)


def test_a_run_waits_for_room_without_losing_an_attempt_and_says_so(tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", CoordinatorSettings(names=("localhost",)))
    started: list[object] = []
    control = SimpleNamespace(start=lambda *_: started.append(1) or 5, status=lambda _: "finished:failed")
    runs = Jobs(home, control, b"bundle")  # type: ignore[arg-type]
    jobs.create(home, "trial", {})
    for _ in range(9):
        assert runs.tick(hindrance="the disk is full"), "it is not over"
    job = jobs.read(home, "trial")
    assert (job.state, job.error, started) == ("wanted", "waits: the disk is full", [])
    runs.tick()
    job = jobs.read(home, "trial")
    assert (job.state, job.error, job.attempts) == ("running", "", 1)
    for _ in range(9):  # its process is gone: while the disk is full that is no attempt
        runs.tick(hindrance="the disk is full")
    job = jobs.read(home, "trial")
    assert (job.state, job.attempts, len(started)) == ("wanted", 0, 1)
    jobs.want(home, "trial", "stop")
    runs.tick(hindrance="the disk is full")
    assert (jobs.read(home, "trial").state, jobs.read(home, "trial").error) == ("stopped", "")

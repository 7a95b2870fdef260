"""The faults of a deployment one by one: a full disk, a cut line, a wrong clock, another Flower's database, many kills.

Every test leaves the coordinator and three hospitals running as it found them. With ``MCRAGE_FAULTS=FILE`` each adds a
line of JSON to that file: the fault, what came of it, and after how many seconds.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from alembic import command
from flwr.supercore.state.alembic.utils import build_alembic_config
from sqlalchemy import create_engine

from client.journal import verify
from client.places import JOURNAL, TRAINER_LOCK
from client.policy import SitePolicy
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from server import jobs
from server.overview import site_rows
from server.proxy import find_nginx
from simulations.deployed import ROOT, Federation
from simulations.faults import Clock, Line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DISK_MB = 192


@pytest.fixture(scope="module")
def federation(site_dir: Path) -> Iterator[Federation]:
    """With a small disk of its own for the coordinator, where this user may mount one."""
    try:
        find_nginx()
    except ConfigError as error:
        pytest.skip(str(error))
    # Not in pytest's own place, which it could not clear while a disk is there, should this ever be killed.
    folder = Path(tempfile.mkdtemp(prefix="mcrage-faults-"))
    disk = folder / "home"
    disk.mkdir()
    if os.geteuid() == 0:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m,mode=700", "none", str(disk)]
        subprocess.run(mount, check=False, capture_output=True)
    made = Federation(folder, site_dir, num_sites=3, policy=SitePolicy.simulated(declared_patients=84))
    try:
        yield made.all_up()
    finally:
        made.close()
        if disk.is_mount():
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
        shutil.rmtree(folder)


@pytest.fixture
def same_as_undisturbed(in_one_process: Callable[..., str]) -> Callable[[Federation, str], None]:
    """Checks a finished run against the same run without any network: every round once, and the same bytes."""

    def check(federation: Federation, run: str) -> None:
        model = federation.home.run(run) / "model" / "model.safetensors"
        rounds = federation.result(run)["rounds"]
        assert [record["server_round"] for record in rounds] == list(range(1, len(rounds) + 1))  # type: ignore[arg-type]
        assert all(record["sites"] == sorted(federation.sites) for record in rounds)  # type: ignore[attr-defined]
        assert hashlib.sha256(model.read_bytes()).hexdigest() == in_one_process(federation, run)

    return check


def tell(fault: str, result: str, seconds: float) -> None:
    if path := os.environ.get("MCRAGE_FAULTS"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"fault": fault, "result": result, "seconds": round(seconds, 1)}) + "\n")


def refusal(federation: Federation) -> str:
    """Why the coordinator does not start."""
    command = [sys.executable, "-m", "server", "up", str(federation.home.folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 2, ended.stderr
    return ended.stderr


def is_done(federation: Federation, run: str, *, seconds: float = 200) -> None:
    assert federation.finished(run, seconds=seconds).state == "done", federation.log("coordinator")[-3000:]


@pytest.mark.soak  # test_deployed.py kills it once, and each of its parts
@pytest.mark.parametrize("times", [2, 5])
def test_a_coordinator_killed_several_times_in_a_run_repeats_no_round(
    federation: Federation, same_as_undisturbed: Callable[[Federation, str], None], times: int
) -> None:
    run = f"killed-{times}"
    federation.want(run, local_steps=60, num_server_rounds=times + 1)
    took = []
    for number in range(times):
        federation.reached(run, number + 1)
        time.sleep(0.3 * number)  # in another part of the round each time
        federation.end("coordinator", signal.SIGKILL)
        since = time.monotonic()
        federation.wait(lambda: len(federation.processes("coordinator")) <= 1, seconds=60, what="the end of all")
        federation.up()
        federation.reached(run, number + 2)
        took.append(time.monotonic() - since)
    is_done(federation, run)
    same_as_undisturbed(federation, run)
    tell(f"R24 coordinator killed {times} times in a run", "goes on; slowest time from kill to next round", max(took))


def test_a_line_that_breaks_in_the_middle_of_models_costs_no_round(
    federation: Federation, same_as_undisturbed: Callable[[Federation, str], None]
) -> None:
    line = Line(federation.port)
    federation.end("site-03")
    federation.connect("site-03", port=line.port)
    federation.start_site("site-03")
    federation.wait(lambda: federation.online() == set(federation.sites), seconds=90, what="the way round")
    line.to_break += ["pull", "push", "push", "pull", "pull", "push"]
    federation.want("cut", num_server_rounds=5, width=128)
    is_done(federation, "cut")
    assert not line.to_break, f"all were broken, not only {line.broken}"
    same_as_undisturbed(federation, "cut")
    slowest = max(record["seconds"] for record in federation.result("cut")["rounds"])  # type: ignore[attr-defined]
    tell("R6 line broken in 3 pulls and 3 pushes of models", "every reply once; slowest round", slowest)
    federation.end("site-03")
    line.close()
    federation.connect("site-03", port=federation.port)
    federation.start_site("site-03")
    federation.wait(lambda: federation.online() == set(federation.sites), seconds=90, what="the straight way")


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    try:
        return Clock(tmp_path / "clock")
    except ConfigError as error:
        pytest.skip(str(error))


def reason(federation: Federation, site: str) -> str:
    return next(row["reason"] for row in site_rows(federation.home) if row["site"] == site)


@pytest.mark.soak  # tests/client/test_node.py and tests/server/test_overview.py have either side
@pytest.mark.parametrize("ahead", [600, -600])
def test_a_clock_that_is_wrong_by_ten_minutes_is_told_on_both_sides(
    federation: Federation, clock: Clock, ahead: int
) -> None:
    clock.set(ahead)
    federation.end("site-02")
    before = len(federation.log("site-02"))
    federation.start_site("site-02", **clock.environment)
    since = time.monotonic()
    told = f"this machine's clock differs from the server's by {ahead:+} s"
    near = [told.replace(f"{ahead:+}", f"{ahead + more:+}") for more in (-1, 0, 1)]
    log = lambda: federation.log("site-02")[before:]  # noqa: E731
    federation.wait(lambda: any(text in log() for text in near), seconds=90, what="the site's word")
    site_knows = time.monotonic() - since
    where = "ahead of" if ahead > 0 else "behind"
    federation.wait(lambda: where in reason(federation, "site-02"), seconds=90, what="the server's word")
    assert "turned away: its clock is" in reason(federation, "site-02")
    federation.want(f"without{ahead}", num_server_rounds=2, min_sites=2)
    is_done(federation, f"without{ahead}")
    assert federation.result(f"without{ahead}")["sites"] == ["site-01", "site-03"]
    clock.set(0)
    since = time.monotonic()
    federation.wait(lambda: federation.online() == set(federation.sites), seconds=120, what="the site")
    tell(f"R8 site's clock {ahead:+} s at its start", "both sides name the seconds, after", site_knows)
    tell(f"R8 site's clock {ahead:+} s set right", "site is back after", time.monotonic() - since)
    assert reason(federation, "site-02") == ""


@pytest.mark.soak
def test_a_clock_that_jumps_in_a_run_costs_its_own_site_some_rounds(federation: Federation, clock: Clock) -> None:
    federation.end("site-02")
    federation.start_site("site-02", **clock.environment)
    federation.wait(lambda: federation.online() == set(federation.sites), seconds=90, what="all sites")
    federation.want("jump", num_server_rounds=400, min_sites=2, round_timeout_seconds=15.0)
    federation.reached("jump", 2)
    clock.set(600)
    since = time.monotonic()
    federation.wait(lambda: "ahead of" in reason(federation, "site-02"), seconds=150, what="the server's word")
    seconds = time.monotonic() - since
    tell("R8 site's clock jumps by 600 s in a run", "the others go on; the server names the seconds, after", seconds)
    clock.set(0)
    since, missed = time.monotonic(), federation.rounds("jump")

    def is_back() -> bool:
        lines = (federation.home.run("jump") / "metrics.jsonl").read_text().splitlines()
        last = [json.loads(line) for line in lines if "site-02" in line][-1]
        return last["round"] > missed and last["dropped"] is None

    federation.wait(is_back, seconds=150, what="the site")
    tell("R8 jumped clock set right", "site trains again after", time.monotonic() - since)
    jobs.want(federation.home, "jump", "stop")
    assert federation.finished("jump").state == "stopped"


def test_a_full_disk_at_the_coordinator_has_runs_wait_and_damages_nothing(
    federation: Federation, same_as_undisturbed: Callable[[Federation, str], None]
) -> None:
    """Database, checkpoints, registry and the proxy's files are on it."""
    if not federation.home.folder.is_mount():
        pytest.skip("no disk of its own could be mounted for the coordinator: that needs root")
    federation.want("full", local_steps=60, num_server_rounds=6)
    federation.reached("full", 2)
    ballast = federation.home.folder / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.write(bytes(2**10)):
            pass
    reached, since = federation.rounds("full"), time.monotonic()
    told = f"the disk of '{federation.home.database.parent}' is full"
    federation.wait(lambda: told in federation.log("coordinator"), seconds=60, what="the coordinator's word")
    tell("R5 coordinator's disk full", "its log names the disk, after", time.monotonic() - since)
    federation.wait(
        lambda: not federation.processes("coordinator", "flwr-serverapp"), seconds=150, what="the run's end"
    )
    federation.end("coordinator")
    assert told in refusal(federation)
    ballast.unlink()
    since = time.monotonic()
    federation.up()
    federation.reached("full", reached + 1, seconds=200)
    tell("R5 room made on the coordinator's disk", "the next round is complete after", time.monotonic() - since)
    is_done(federation, "full")
    same_as_undisturbed(federation, "full")


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "debug.log"}


@pytest.mark.soak  # tests/server/test_database.py shows in a second what is refused and what is copied
def test_a_database_of_another_flower_is_refused_or_made_newer_and_runs_go_on(
    federation: Federation, same_as_undisturbed: Callable[[Federation, str], None]
) -> None:
    database = federation.home.database
    # Hospitals take some time to notice that their node is not known any more, and to be let in again.
    federation.want("flower", local_steps=60, num_server_rounds=6, quorum_retries=90)
    federation.reached("flower", 1)
    federation.end("coordinator")
    with closing(sqlite3.connect(database)) as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        connection.execute("UPDATE alembic_version SET version_num = 'fedcba987654'")
        connection.commit()
    content = database.read_bytes()
    assert f"'{database}' has tables of revision fedcba987654, which flwr 1.41.0 does not know" in refusal(federation)
    assert database.read_bytes() == content, "it is left as it is"
    for each in database.parent.glob("superlink.sqlite*"):  # what the refusal says
        each.rename(each.with_name(f"away-{each.name}"))
    since = time.monotonic()
    federation.up()
    federation.reached("flower", 2)
    seconds = time.monotonic() - since
    tell("R17 database of a newer Flower", "refused; once moved away the next round is complete after", seconds)
    federation.end("coordinator")
    older = step_back(database)
    since = time.monotonic()
    federation.up()
    federation.reached("flower", 3)
    tell(
        f"R17 database of an older Flower ({older})",
        "copied and made newer; next round after",
        time.monotonic() - since,
    )
    with closing(sqlite3.connect(database.with_name(f"superlink-{older}.sqlite"))) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [(older,)]
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]
    is_done(federation, "flower")
    same_as_undisturbed(federation, "flower")


def step_back(database: Path) -> str:
    """Gives a database the tables of Flower some releases ago; returns their revision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = create_engine(f"sqlite:///{database}")
        command.downgrade(build_alembic_config(engine), "-3")
        engine.dispose()
    with closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("SELECT version_num FROM alembic_version").fetchone()[0])


def is_free(path: Path) -> bool:
    """Whether no process holds a lock."""
    lock = lock_file(path)
    if lock is not None:
        os.close(lock)
    return lock is not None


def killed(federation: Federation, folder: Path, *, times: int) -> None:
    """Kills a hospital's daemon, alone or with what it started, at any moment of its start and work."""
    settings, draw = federation.sites["site-01"], random.Random(23)
    federation.end("site-01")
    before, elsewhere = everything(settings.file.parent), set(Path(tempfile.gettempdir()).glob("*flwr*"))
    handles = {each: len(os.listdir(f"/proc/{each}/fd")) for each in federation.processes("coordinator")}
    slowest = 0.0
    for _ in range(times):
        federation.start_site("site-01", TMPDIR=str(folder))
        time.sleep(draw.uniform(0.05, 5.0))
        others = [each for each in federation.processes("site-01") if draw.random() < 0.3]
        federation.end("site-01", signal.SIGKILL)
        for each in others:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        gone = federation.wait(lambda: not federation.processes("site-01"), seconds=20, what="the end of its processes")
        slowest = max(slowest, gone)
    private, keys = settings.site.private, settings.server.key.parent
    for path in (private / "daemon-data.lock", keys / "daemon-network.lock", private / TRAINER_LOCK):
        # A dying process loses its name before its files.
        federation.wait(lambda path=path: is_free(path), seconds=10, what=f"{path.name} to be free")
    assert everything(settings.file.parent) == before
    assert [*folder.iterdir()] == []
    assert set(Path(tempfile.gettempdir()).glob("*flwr*")) == elsewhere
    more = {each: len(os.listdir(f"/proc/{each}/fd")) - number for each, number in handles.items()}
    assert max(more.values()) < 8, "connections of the moment, not one per kill"
    assert not verify(settings.site.private / JOURNAL).problems
    tell(f"R23 {times} kills of a site's daemon", "no process, lock, file or handle left; slowest end", slowest)


def test_a_daemon_killed_at_any_moment_leaves_nothing(federation: Federation, tmp_path: Path) -> None:
    killed(federation, tmp_path, times=8)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_daemon_killed_two_hundred_times_leaves_nothing_and_works(federation: Federation, tmp_path: Path) -> None:
    killed(federation, tmp_path, times=200)
    federation.start_site("site-01")
    since = time.monotonic()
    federation.wait(lambda: federation.online() == set(federation.sites), seconds=150, what="the site")
    federation.want("after", num_server_rounds=2)
    is_done(federation, "after")
    tell("R23 200 kills of a site's daemon", "works again after", time.monotonic() - since)

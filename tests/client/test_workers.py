"""A worker per run, started once, and no other daemon's at the same time."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.places import TRAINER_LOCK
from client.settings import SiteSettings
from client.worker import from_message, to_message
from client.workers import Failure, Workers
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.refusals import BUSY, ENDED, TOO_LONG

HEADER = {"task_id": 2, "node_id": 7}

# A daemon that starts a worker and says which process it is.
DAEMON = """
import sys, time
from pathlib import Path
from client.settings import SiteSettings
from client.workers import Workers
workers = Workers(SiteSettings.load(Path(sys.argv[1])))
workers.warm()
print(workers._reserve._process.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def settings(new_site: Callable[..., SiteSettings]) -> SiteSettings:
    made: SiteSettings = new_site()
    return made


@pytest.fixture
def workers(settings: SiteSettings) -> Iterator[Workers]:
    made = Workers(settings)
    yield made
    made.stop()


def unknown(run_id: int) -> bytes:
    """An instruction that needs no table."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = run_id, 2, 7
    return from_message(Message(RecordDict({"config": ConfigRecord({"x": 1})}), 7, "query.nothing"))


def pids(settings: SiteSettings) -> set[int]:
    found = subprocess.run(
        ["pgrep", "-f", f"client.worker {settings.file}"], capture_output=True, text=True, check=False
    )
    return {int(line) for line in found.stdout.split()}


def asked(workers: Workers, run_id: int, *, over: Callable[[], int] = lambda: 0) -> bytes | Failure:
    return workers.ask(run_id, {**HEADER, "run_id": run_id}, unknown(run_id), over)


def test_a_run_keeps_its_worker_and_two_runs_do_not_share_one(workers: Workers, settings: SiteSettings) -> None:
    workers.warm()
    reserve = pids(settings)
    assert len(reserve) == 1
    for run_id in (1, 1, 2, 1, 2):
        reply = asked(workers, run_id)
        assert isinstance(reply, bytes)
        assert to_message(reply).error.code == 1004
    both = pids(settings)
    assert len(both) == 2
    assert reserve < both, "the one in reserve was used"
    asked(workers, 3)
    assert len(pids(settings)) == 2, "the run that was longest idle gave its place up"
    workers.stop()
    assert pids(settings) == set()


def test_a_dead_worker_is_replaced_and_one_that_takes_too_long_is_ended(
    workers: Workers, settings: SiteSettings
) -> None:
    assert isinstance(asked(workers, 1), bytes)
    (first,) = pids(settings)
    os.kill(first, signal.SIGKILL)
    time.sleep(0.2)
    assert isinstance(asked(workers, 1), bytes), "it died while there was nothing to do"
    (second,) = pids(settings)
    assert asked(workers, 1, over=lambda: TOO_LONG) == Failure(TOO_LONG)
    assert pids(settings) == set()
    killed = asked(workers, 1, over=lambda: [os.kill(each, signal.SIGKILL) for each in pids(settings)] and 0)
    assert killed == Failure(ENDED)
    assert second not in pids(settings)


def test_while_another_daemon_has_the_data_nothing_is_started(workers: Workers, settings: SiteSettings) -> None:
    lock = lock_file(settings.site.private / TRAINER_LOCK)
    assert lock is not None
    workers.warm()
    assert asked(workers, 1) == Failure(BUSY)
    assert pids(settings) == set()
    os.close(lock)
    assert isinstance(asked(workers, 1), bytes)
    assert lock_file(settings.site.private / TRAINER_LOCK) is None, "now these have it"


def test_a_lock_that_this_user_may_not_write_is_told_in_a_line(workers: Workers, settings: SiteSettings) -> None:
    path = settings.site.private / TRAINER_LOCK
    path.touch()
    path.chmod(0o400)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(12_345)  # root may write everything
        with pytest.raises(ConfigError) as told:
            workers.warm()
    finally:
        os.seteuid(user)
    assert str(told.value) == f"'{path}' cannot be used: Permission denied"


def test_the_data_are_free_only_when_the_last_worker_of_a_killed_daemon_is_gone(settings: SiteSettings) -> None:
    root = Path(__file__).resolve().parents[2]
    daemon = subprocess.Popen([sys.executable, "-c", DAEMON, str(settings.file)], stdout=subprocess.PIPE, cwd=root)
    assert daemon.stdout is not None
    worker = int(daemon.stdout.readline())
    os.kill(worker, signal.SIGSTOP)  # so that it cannot end at once
    assert lock_file(settings.site.private / TRAINER_LOCK) is None
    daemon.kill()
    daemon.wait()
    deadline = time.monotonic() + 10
    while (lock := lock_file(settings.site.private / TRAINER_LOCK)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.close(lock)
    assert not Path(f"/proc/{worker}/stat").exists() or Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z"
    daemon.stdout.close()

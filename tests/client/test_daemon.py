"""The daemon of a hospital up to the programs that it starts: small ones here, that tell how they were started."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flwr
import pytest

from client.daemon import run_daemon
from client.settings import SiteSettings
from mcrage.errors import ConfigError
from mcrage.files import lock_file

LOCKS = {"network": "keys/daemon-network.lock", "data": "private/daemon-data.lock"}

STARTED = """#!{python}
import json, os, sys, time
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
time.sleep({seconds})
sys.exit({code})
"""

Told = Callable[[Callable[[], object]], threading.Thread]
Programs = Callable[..., Callable[[], list[tuple[list[str], dict[str, str]]]]]


@pytest.fixture
def settings(new_site: Callable[..., SiteSettings]) -> SiteSettings:
    made: SiteSettings = new_site()
    return made


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Puts a program in the place of Python; gives what tells the arguments and environments with which it ran."""

    def make(*, seconds: float = 0, code: int = 2) -> Callable[[], list[Any]]:
        log, path = tmp_path / "started.jsonl", tmp_path / "program"
        path.write_text(STARTED.format(python=sys.executable, log=str(log), seconds=seconds, code=code))
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))
        return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return make


@pytest.fixture
def tell_to_end() -> Iterator[Told]:
    """Sends SIGTERM once something has been done, from a thread."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # where the daemon has failed by then
    threads = []

    def start(work: Callable[[], object]) -> threading.Thread:
        def run() -> None:
            work()
            os.kill(os.getpid(), signal.SIGTERM)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join()
    signal.signal(signal.SIGTERM, before)


def wait(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)


def are_free(settings: SiteSettings) -> list[str]:
    """Halves of which no daemon is running."""
    free = []
    for part, name in LOCKS.items():
        lock = lock_file(settings.file.parent / name)
        if lock is not None:
            os.close(lock)
            free.append(part)
    return free


@pytest.mark.parametrize(
    ("only", "modules"), [("network", ["node"]), ("data", ["runner"]), ("both", ["node", "runner"])]
)
def test_each_half_is_a_program_of_its_own(
    only: str, modules: list[str], settings: SiteSettings, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = programs(seconds=0.5)
    monkeypatch.setenv("NO_PROXY", "internal.example.org")
    assert run_daemon(settings, only=only) == 2, "a program that cannot be set right by another start ends the daemon"
    assert {tuple(arguments) for arguments, _ in started()} == {
        ("-m", f"client.{module}", str(settings.file)) for module in modules
    }
    for _, environment in started():
        assert (environment["FLWR_TELEMETRY_ENABLED"], environment["FLWR_DISABLE_UPDATE_CHECK"]) == ("0", "1")
        assert environment["NO_PROXY"] == environment["no_proxy"] == "internal.example.org,127.0.0.1"
    assert are_free(settings) == ["network", "data"]


@pytest.mark.parametrize("only", ["", "Network", "data,network", "both "])
def test_a_half_that_there_is_not_is_refused(only: str, settings: SiteSettings, programs: Programs) -> None:
    started = programs()
    with pytest.raises(ConfigError, match=r"^--only: expected network or data, it is '"):
        run_daemon(settings, only=only)
    assert not started()


@pytest.mark.parametrize("held", LOCKS)
def test_nothing_starts_where_another_daemon_has_a_half(held: str, settings: SiteSettings, programs: Programs) -> None:
    started = programs()
    lock = lock_file(settings.file.parent / LOCKS[held])
    assert lock is not None
    for only in (held, "both"):
        with pytest.raises(ConfigError, match="another daemon of site st-mary is running"):
            run_daemon(settings, only=only)
    assert not started()
    assert are_free(settings) == [part for part in LOCKS if part != held], "the other half is given back"
    os.close(lock)


def test_a_running_daemon_locks_a_second_one_out_and_ends_when_it_is_told_to(
    settings: SiteSettings, programs: Programs, tell_to_end: Told
) -> None:
    started, refused = programs(seconds=60), []

    def second() -> None:
        wait(lambda: len(started()) == 2)
        for only in ("both", "network", "data"):
            try:
                run_daemon(settings, only=only)
            except ConfigError as error:
                refused.append(str(error))

    before, thread = signal.getsignal(signal.SIGTERM), tell_to_end(second)
    assert run_daemon(settings) == 0
    thread.join()
    assert refused == ["another daemon of site st-mary is running"] * 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert are_free(settings) == ["network", "data"]


def test_a_program_that_ends_is_started_again(
    settings: SiteSettings,
    programs: Programs,
    tell_to_end: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    started = programs(code=1)
    monkeypatch.setattr("client.daemon._RESTART_SECONDS", 0.1)
    tell_to_end(lambda: wait(lambda: len(started()) >= 3))
    assert run_daemon(settings, only="data") == 0
    assert len(started()) >= 3
    assert "the data process ended (code 1); started again in" in caplog.text


@pytest.mark.parametrize("part", LOCKS)
def test_a_site_that_was_never_enrolled_is_told_how(part: str, settings: SiteSettings, programs: Programs) -> None:
    started, folder = programs(), (settings.file.parent / LOCKS[part]).parent
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ConfigError, match=rf"'{folder}' cannot be used: .*; 'python -m client enroll' makes it"):
        run_daemon(settings, only=part)
    folder.mkdir()
    (folder / Path(LOCKS[part]).name).symlink_to("/nowhere")
    with pytest.raises(ConfigError, match="cannot be used"):
        run_daemon(settings, only=part)
    assert not started()


def test_another_version_of_flower_is_refused_before_anything_starts(
    settings: SiteSettings, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = programs()
    monkeypatch.setattr(flwr, "__version__", "1.43.0")
    with pytest.raises(ConfigError, match=r"flwr 1\.41\.0 is needed here"):
        run_daemon(settings)
    assert not started()

"""Programs under a supervisor that is told to stop, fails or is killed; all of them real processes."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest

from mcrage import supervision
from mcrage.supervision import Program, Supervisor, end, start, started_with

linux = pytest.mark.skipif(sys.platform != "linux", reason="only the Linux kernel tells a program of its parent's end")

ENDS_ITS_CHILD = 'sleep 60 & echo $! > child; trap "kill $!; exit 0" TERM; touch ready; wait'
LEAVES_ITS_CHILD = "sleep 60 & echo $! > child; touch ready; wait"
SUPERVISE = """
import signal, sys
from mcrage.supervision import Program, Supervisor
orphan_signal, *scripts = sys.argv[1:]
programs = [
    Program(name=str(number), command=["sh", "-c", script], orphan_signal=signal.Signals[orphan_signal])
    for number, script in enumerate(scripts)
]
sys.exit(Supervisor(programs).run())
"""
DIE_BEFORE_THE_KERNEL_IS_ASKED = """
import os, sys, time
from mcrage import supervision
parent, getppid, prctl = os.getpid(), os.getppid, supervision._PRCTL

def prctl_when_orphaned(*arguments):
    open("forked", "w").close()
    while getppid() == parent:
        time.sleep(0.01)
    return prctl(*arguments)

supervision._PRCTL = prctl_when_orphaned
if sys.argv[1] == "without the check":
    os.getppid = lambda: parent
supervision.start(supervision.Program(name="late", command=["sh", "-c", "echo $$ > ready; exec sleep 60"]))
"""


def shell(name: str, script: str, **settings: object) -> Program:
    return Program(name=name, command=["sh", "-c", script], **settings)  # type: ignore[arg-type]


def until(is_so: Callable[[], object], *, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_alive(process_id: int) -> bool:
    try:
        stat = Path(f"/proc/{process_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def number_in(path: Path) -> int:
    assert until(lambda: path.exists() and path.read_text().strip())
    return int(path.read_text())


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(supervision.__file__).parents[1]))
    monkeypatch.setattr(supervision, "_TICK_SECONDS", 0.01)
    return tmp_path


@pytest.fixture
def python() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Runs scripts, and kills what they leave behind: it is in the files ``ready`` and ``child``."""
    made: list[subprocess.Popen[bytes]] = []

    def run(script: str, *arguments: str) -> "subprocess.Popen[bytes]":
        made.append(subprocess.Popen([sys.executable, "-c", script, *arguments], start_new_session=True))
        return made[-1]

    yield run
    for process in made:
        process.kill()
        process.wait()
    for path in (Path("ready"), Path("child")):
        if path.exists() and (text := path.read_text().strip()):
            with suppress(ProcessLookupError):
                os.kill(int(text), signal.SIGKILL)


def run_until(programs: Sequence[Program], is_so: Callable[[Supervisor], object], *, seconds: float = 10.0) -> int:
    """The exit code of a supervisor that is stopped once something is so."""
    supervisor, deadline = Supervisor(programs), time.monotonic() + seconds

    def look() -> None:
        assert time.monotonic() < deadline, "it did not come about in time"
        if is_so(supervisor):
            supervisor.stop()

    return supervisor.run(each_tick=look)


def pauses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"again in ([0-9.]+) s", text)]


def test_a_program_runs_until_the_supervisor_is_told_to_stop() -> None:
    seen: list[int | None] = []

    def is_running(supervisor: Supervisor) -> bool:
        seen.append(supervisor.process_id("sleeper"))
        return seen[-1] is not None

    assert run_until([shell("sleeper", "exec sleep 60")], is_running) == 0
    assert seen[-1]
    assert not is_alive(seen[-1])


def test_a_program_that_ends_is_started_again_after_pauses_that_grow(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_LONGEST_PAUSE", 0.3)
    moments: list[float] = []

    def has_failed_five_times(supervisor: Supervisor) -> bool:
        if len(caplog.messages) > len(moments):
            moments.append(time.monotonic())
        return len(moments) == 5

    assert run_until([shell("failing", "exit 3", restart_seconds=0.05)], has_failed_five_times) == 0
    assert pauses(caplog.text) == [0.05, 0.1, 0.2, 0.3, 0.3]
    waited = [later - sooner for sooner, later in pairwise(moments)]
    assert all(seconds >= pause for seconds, pause in zip(waited, pauses(caplog.text), strict=False))
    assert caplog.messages[0] == "failing ended (code 3); started again in 0.05 s"


def test_a_program_that_lasted_is_started_again_after_its_shortest_pause(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervision, "_LASTING_SECONDS", 0.05)
    program = shell("lasting", "sleep 0.1; exit 1", restart_seconds=0.02)
    run_until([program], lambda _: len(caplog.messages) == 3)
    assert pauses(caplog.text) == [0.02, 0.02, 0.02]


def test_the_signal_that_ended_a_program_is_named(caplog: pytest.LogCaptureFixture) -> None:
    programs = [shell(name, f"kill -{name} $$", restart_seconds=60.0) for name in ("KILL", "40")]
    run_until(programs, lambda _: len(caplog.messages) == 2)
    assert "KILL ended (SIGKILL); started again in 60 s" in caplog.messages
    assert "40 ended (signal 40); started again in 60 s" in caplog.messages


def test_a_program_that_is_not_set_up_rightly_ends_all_with_code_2(caplog: pytest.LogCaptureFixture) -> None:
    ids: list[int | None] = []
    programs = [shell("good", "exec sleep 60"), shell("bad", "sleep 0.1; exit 2")]
    supervisor = Supervisor(programs)
    assert supervisor.run(each_tick=lambda: ids.append(supervisor.process_id("good"))) == 2
    assert ids[0]
    assert not is_alive(ids[0])
    assert caplog.messages == ["bad is not set up rightly; see its lines above"]


def test_a_program_that_cannot_be_started_is_tried_again_and_holds_up_no_other(
    caplog: pytest.LogCaptureFixture, here: Path
) -> None:
    missing = Program(name="missing", command=[str(here / "tool")], restart_seconds=0.05)

    def both_run(supervisor: Supervisor) -> bool:
        if len(caplog.messages) == 2:
            (here / "tool").write_text("#!/bin/sh\nexec sleep 60\n")
            (here / "tool").chmod(0o700)
        return all(map(supervisor.process_id, ("missing", "other")))

    assert run_until([missing, shell("other", "exec sleep 60")], both_run) == 0
    assert caplog.messages[0] == "missing cannot be started (No such file or directory); tried again in 0.05 s"


def test_programs_are_ended_in_the_reverse_order(here: Path) -> None:
    script = 'trap "echo {0} >> ended; exit 0" TERM; touch {0}; while :; do sleep 0.02; done'
    programs = [shell(name, script.format(name)) for name in "abc"]
    run_until(programs, lambda _: all((here / name).exists() for name in "abc"))
    assert (here / "ended").read_text().split() == ["c", "b", "a"]


def test_a_program_that_ignores_the_request_is_killed_after_its_grace_with_its_children(here: Path) -> None:
    deaf = shell("deaf", "trap '' TERM; " + LEAVES_ITS_CHILD, grace_seconds=0.3)
    stopped: list[float] = []

    def is_ready(_: Supervisor) -> bool:
        stopped.append(time.monotonic())
        return (here / "ready").exists()

    assert run_until([deaf], is_ready) == 0
    assert 0.3 <= time.monotonic() - stopped[-1] < 3
    assert until(lambda: not is_alive(number_in(here / "child")), seconds=2)


def test_what_a_program_leaves_behind_is_ended_with_it(here: Path) -> None:
    process = start(shell("careless", "sleep 60 & echo $! > child; exit 0"))
    child = number_in(here / "child")
    end(process, seconds=5)
    assert until(lambda: not is_alive(child), seconds=2)


def test_a_killed_program_is_not_started_anew_beside_its_old_children(here: Path) -> None:
    """As nginx would not get its port."""
    program = shell("killed", "[ -e child ] && exec sleep 60; " + LEAVES_ITS_CHILD, restart_seconds=0.05)
    ids: list[int] = []

    def is_back(supervisor: Supervisor) -> bool:
        process_id = supervisor.process_id("killed")
        if process_id and not ids and (here / "ready").exists():
            os.kill(process_id, signal.SIGKILL)
            ids.append(process_id)
        return bool(process_id and ids and process_id not in ids)

    assert run_until([program], is_back) == 0
    assert until(lambda: not is_alive(number_in(here / "child")), seconds=1)


def test_an_error_at_a_tick_is_passed_on_and_leaves_nothing_running() -> None:
    before, ids = signal.getsignal(signal.SIGTERM), []
    supervisor = Supervisor([shell("sleeper", "exec sleep 60")])

    def fail() -> None:
        ids.append(supervisor.process_id("sleeper"))
        if ids[-1]:
            raise RuntimeError("of a tick")

    with pytest.raises(RuntimeError, match="of a tick"):
        supervisor.run(each_tick=fail)
    assert not is_alive(ids[-1] or 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_done_before_the_end_sees_the_programs_and_cannot_keep_them() -> None:
    supervisor, seen = Supervisor([shell("sleeper", "exec sleep 60")]), []
    before = signal.getsignal(signal.SIGTERM)

    def fail() -> None:
        seen.append(supervisor.process_id("sleeper"))
        raise RuntimeError("before the end")

    with pytest.raises(RuntimeError, match="before the end"):
        supervisor.run(each_tick=supervisor.stop, before_end=fail)
    assert seen[0]
    assert not is_alive(seen[0])
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_anything_else_to_do_it_runs_until_the_signal() -> None:
    supervisor = Supervisor([shell("sleeper", "exec sleep 60")])
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert supervisor.run() == 0
    assert supervisor.process_id("sleeper") is None


def test_a_program_can_be_started_anew_without_a_pause(caplog: pytest.LogCaptureFixture) -> None:
    ids: list[int] = []

    def has_two(supervisor: Supervisor) -> bool:
        process_id = supervisor.process_id("sleeper")
        if process_id is not None and process_id not in ids:
            ids.append(process_id)
            if len(ids) == 1:
                supervisor.restart("sleeper")
                supervisor.restart("sleeper")  # what does not run stays as it is
                assert supervisor.process_id("sleeper") is None
        return len(ids) == 2

    run_until([shell("sleeper", "exec sleep 60", restart_seconds=60.0)], has_two, seconds=5)
    assert not any(map(is_alive, ids))
    assert caplog.messages == []


def test_a_program_that_was_killed_has_no_process_id() -> None:
    seen: list[int | None] = []

    def is_gone(supervisor: Supervisor) -> bool:
        seen.append(supervisor.process_id("sleeper"))
        if seen[-1] is not None:
            os.kill(seen[-1], signal.SIGKILL)
            until(lambda: not is_alive(seen[-1] or 0))
            return supervisor.process_id("sleeper") is None
        return False

    assert run_until([shell("sleeper", "exec sleep 60", restart_seconds=60.0)], is_gone) == 0


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_supervisor_that_is_told_to_end_ends_all_and_gives_0(
    here: Path, python: Callable[..., "subprocess.Popen[bytes]"], number: signal.Signals, to_all: bool
) -> None:
    """Ctrl-C reaches all processes of a terminal, but the supervisor alone of these."""
    script = 'trap "echo int >> heard" INT; trap "echo term >> heard; kill $!; exit 0" TERM; sleep 60 & '
    process = python(SUPERVISE, "SIGKILL", script + "echo $! > child; touch ready; while :; do wait; done")
    child = number_in(here / "child")
    (os.killpg if to_all else os.kill)(process.pid, number)
    assert process.wait(10) == 0
    assert (here / "heard").read_text().split() == ["term"]
    assert not is_alive(child)


@linux
@pytest.mark.parametrize(
    ("orphan_signal", "script", "is_left"),
    [
        ("SIGKILL", "echo $$ > child; exec sleep 60", False),
        ("SIGTERM", "echo $$ > child; exec sleep 60", False),
        ("SIGTERM", ENDS_ITS_CHILD, False),
        ("SIGKILL", ENDS_ITS_CHILD, True),  # it had no time to
        ("SIGTERM", LEAVES_ITS_CHILD, True),
    ],
)
def test_a_killed_supervisor_leaves_no_program_behind_but_children_that_those_leave(
    here: Path, python: Callable[..., "subprocess.Popen[bytes]"], orphan_signal: str, script: str, is_left: bool
) -> None:
    process = python(SUPERVISE, orphan_signal, f"echo $$ > own; {script}")
    own, child = number_in(here / "own"), number_in(here / "child")
    assert own == child or until((here / "ready").exists)
    process.kill()
    process.wait()
    assert until(lambda: not is_alive(own), seconds=2)
    assert until(lambda: not is_alive(child), seconds=0.5 if is_left else 2) is not is_left


@linux
@pytest.mark.parametrize("variant", ["as it is", "without the check"])
def test_a_program_whose_supervisor_died_before_the_kernel_was_asked_never_runs(
    here: Path, python: Callable[..., "subprocess.Popen[bytes]"], variant: str
) -> None:
    process = python(DIE_BEFORE_THE_KERNEL_IS_ASKED, variant)
    assert until((here / "forked").exists)
    process.kill()
    process.wait()
    has_run = until((here / "ready").exists, seconds=5 if variant == "without the check" else 0.7)
    assert has_run == (variant == "without the check")


@linux
def test_a_program_ends_with_the_thread_that_started_it() -> None:
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(start(shell("sleeper", "exec sleep 60"))))
    thread.start()
    thread.join()
    assert started[0].wait(5) == -signal.SIGKILL


@linux
def test_processes_are_found_by_what_was_put_into_their_environment(here: Path) -> None:
    script = "env -u MARK sleep 60 & echo $! > child; touch ready; wait"
    own = start(shell("own", script, environment=os.environ | {"MARK": "a=b c"}))
    other = start(shell("other", "exec sleep 60", environment=os.environ | {"MARK": "a=b cd"}))
    assert until((here / "ready").exists)
    assert started_with("MARK", "a=b c") == {own.pid, number_in(here / "child")}, "children that dropped it as well"
    itself = "from mcrage.supervision import started_with; print(len(started_with('MARK', 'of itself')))"
    environment = os.environ | {"MARK": "of itself"}
    assert subprocess.check_output([sys.executable, "-c", itself], env=environment).strip() == b"0"
    for process in (own, other):
        end(process, seconds=5)
    assert started_with("MARK", "a=b c") == set()


def test_a_program_gets_its_streams_and_its_environment_only() -> None:
    program = shell("talking", "echo $WHO $HOME", environment={"WHO": "me", "PATH": os.environ["PATH"]})
    output, _ = start(program, stdout=subprocess.PIPE).communicate(timeout=10)
    assert output.strip() == b"me"


def test_where_the_kernel_cannot_help_a_program_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_PRCTL", None)
    process = start(shell("sleeper", "exec sleep 60"))
    assert process.poll() is None
    end(process, seconds=5)
    assert process.returncode == -signal.SIGTERM

"""Programs that run as long as a daemon does: started, watched, started again, and ended with it.

A program ends when its supervisor does, even if that is killed: the kernel sees to it (Linux), so nothing is left
behind that still reads data or holds a port.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

_LOG = logging.getLogger("mcrage.daemon")

_PR_SET_PDEATHSIG = 1
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before any fork
_TICK_SECONDS = 0.2
_CONFIGURATION = 2
_LASTING_SECONDS, _LONGEST_PAUSE = 60.0, 15.0


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of a daemon.

    Attributes:
        name: In the log.
        command: What is run.
        environment: Of the program.
        restart_seconds: Pause before it is started again; longer each time, up to 15 s, while it does not last.
        orphan_signal: What it gets when its supervisor is gone; a program with processes of its own needs SIGTERM.
        grace_seconds: How long it may take to end before it is killed.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    restart_seconds: float = 1.0
    orphan_signal: signal.Signals = signal.SIGKILL
    grace_seconds: float = 20.0


def start(program: Program, **streams: Any) -> "subprocess.Popen[bytes]":
    """Starts a program that ends when this process does.

    To be called from a thread that lives as long as the program: to the kernel the end of the thread is that of the
    parent. Processes that the program starts are its own business; ``orphan_signal`` lets it end them.

    Args:
        program: What to start.
        streams: ``stdin``, ``stdout``, ``stderr`` and ``pass_fds``, as for Popen.

    Raises:
        OSError: If it cannot be started.
    """
    parent = os.getpid()

    def follow() -> None:
        if _PRCTL is not None:
            _PRCTL(_PR_SET_PDEATHSIG, int(program.orphan_signal))
        if os.getppid() != parent:  # it was gone before the kernel was asked
            os._exit(1)

    # A session of its own: Ctrl-C reaches the supervisor alone, which ends the programs in order.
    return subprocess.Popen(
        list(program.command),
        env=dict(program.environment),
        preexec_fn=follow,
        start_new_session=True,
        **streams,
    )


class Supervisor:
    """Keeps programs running until it is told to stop.

    Args:
        programs: In the order in which they are started; they are ended in the reverse order.
    """

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = tuple(programs)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._due: dict[str, float] = {program.name: 0.0 for program in programs}
        self._pause: dict[str, float] = {program.name: program.restart_seconds for program in programs}
        self._started: dict[str, float] = {}
        self._is_stopping = False

    def process_id(self, name: str) -> int | None:
        """Of a program that runs now."""
        process = self._running.get(name)
        return process.pid if process and process.poll() is None else None

    def stop(self) -> None:
        """Asks :meth:`run` to end."""
        self._is_stopping = True

    def restart(self, name: str) -> None:
        """Ends a program that runs now; it is started again at once."""
        program = next(each for each in self._programs if each.name == name)
        process = self._running.pop(name, None)
        if process is not None:
            end(process, seconds=program.grace_seconds)
            self._due[name] = 0.0

    def run(self, *, each_tick: Callable[[], None] | None = None, before_end: Callable[[], None] | None = None) -> int:
        """Runs until SIGTERM, SIGINT or :meth:`stop`; returns the exit code of the daemon.

        A program that ends with code 2 is not set up rightly; then all end, and the code is 2.

        Args:
            each_tick: Called about five times a second; what it raises ends all programs and is passed on.
            before_end: Called before the programs are ended.
        """
        before = {each: signal.signal(each, self._signalled) for each in (signal.SIGTERM, signal.SIGINT)}
        code = 0
        try:
            while not self._is_stopping and not code:
                code = self._watch()
                if each_tick is not None:
                    each_tick()
                time.sleep(_TICK_SECONDS)
        finally:
            try:
                if before_end is not None:
                    before_end()
            finally:
                self._end()
                for each, handler in before.items():
                    signal.signal(each, handler)
        return code

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._is_stopping = True

    def _watch(self) -> int:
        """Starts what is due; the exit code of the daemon if a program cannot be set right by another start."""
        for program in self._programs:
            process = self._running.get(program.name)
            if process is not None and (code := process.poll()) is not None:
                _sweep(self._running.pop(program.name))
                if code == _CONFIGURATION:
                    _LOG.error("%s is not set up rightly; see its lines above", program.name)
                    return _CONFIGURATION
                pause = self._next_pause(program)
                _LOG.warning("%s ended (%s); started again in %g s", program.name, _ending(code), pause)
            elif process is None and time.monotonic() >= self._due[program.name]:
                self._start(program)
        return 0

    def _start(self, program: Program) -> None:
        self._started[program.name] = time.monotonic()
        try:
            self._running[program.name] = start(program)
        except OSError as error:
            pause = self._next_pause(program)
            _LOG.error("%s cannot be started (%s); tried again in %g s", program.name, error.strerror, pause)

    def _next_pause(self, program: Program) -> float:
        now, name = time.monotonic(), program.name
        lasted = now - self._started[name] > _LASTING_SECONDS
        pause = program.restart_seconds if lasted else self._pause[name]
        self._pause[name] = min(2 * pause, max(_LONGEST_PAUSE, program.restart_seconds))
        self._due[name] = now + pause
        return pause

    def _end(self) -> None:
        for program in reversed(self._programs):
            process = self._running.pop(program.name, None)
            if process is not None:
                end(process, seconds=program.grace_seconds)


def end(process: "subprocess.Popen[bytes]", *, seconds: float) -> None:
    """Asks a program to end, and ends it and whatever it started if it has not in time."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    _sweep(process)
    process.wait()


def started_with(variable: str, value: str) -> set[int]:
    """Ids of the processes that have this in their environment, and of their descendants; this one is left out.

    Descendants count by parent: some programs overwrite their environment when they set their title.
    """
    mark = f"{variable}={value}".encode()
    parents: dict[int, int] = {}
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
        except (OSError, IndexError):
            continue  # it ended meanwhile, or is another user's
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _sweep(process: "subprocess.Popen[bytes]") -> None:
    """Ends what a program has left of its process group: nginx, killed, leaves workers that hold its port."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _ending(code: int) -> str:
    if code >= 0:
        return f"code {code}"
    with suppress(ValueError):  # only some of the real-time signals have names
        return signal.Signals(-code).name
    return f"signal {-code}"

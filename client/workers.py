"""The processes with the data, as the runner sees them: one per run, kept in memory, and no other on this data.

The lock on the private folder is opened once and passed on to every worker. It is free again when this process and all
of its workers have ended, so that no other daemon's worker ever meets one of these.
"""

import errno
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.frames import read_frame, write_frame
from client.places import DEBUG_LOG, TRAINER_LOCK
from client.settings import SiteSettings
from mcrage.errors import ConfigError, McrageError
from mcrage.files import lock_file
from mcrage.refusals import BUSY, ENDED
from mcrage.supervision import Program, start

_LOG = logging.getLogger("mcrage.daemon")
_TICK_SECONDS = 0.1
_MOST_WORKERS = 2  # each takes half a gigabyte


@dataclass(frozen=True)
class Failure:
    """An instruction that no worker answered; ``code`` is one of :mod:`mcrage.refusals`."""

    code: int


class Worker:
    """One process (:mod:`client.worker`), started at once; it takes some seconds to be ready.

    Args:
        settings: Of the site.
        log: Descriptor of the file that gets its error output: what libraries write may hold a patient's data.
        lock: Descriptor of the lock that it keeps for as long as it lives.
    """

    def __init__(self, settings: SiteSettings, *, log: int, lock: int) -> None:
        program = Program(name="worker", command=[sys.executable, "-m", "client.worker", str(settings.file)])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        self._process = start(program, pass_fds=(lock,), **pipes)
        self._replies: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_read_all, args=(self._process.stdout, self._replies), daemon=True).start()

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def ask(self, header: dict[str, Any], payload: bytes, is_over: Callable[[], int]) -> bytes | Failure:
        """The reply to an instruction; see :meth:`Workers.ask`."""
        # A worker that does not read would hold this process up, and with it the limit on the time.
        threading.Thread(target=_write, args=(self._process.stdin, header, payload), daemon=True).start()
        while not (code := is_over()):
            try:
                reply = self._replies.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                continue
            if reply is None:
                _LOG.error("a worker ended with code %d; what it said is in %s", self._process.wait(), DEBUG_LOG)
                return Failure(ENDED)
            return reply
        return Failure(code)


class Workers:
    """The workers of a site: one for each of the runs that were last worked on, and one in reserve at the start.

    Args:
        settings: Of the site.

    Raises:
        ConfigError: If the private folder cannot be written.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self._settings = settings
        path = settings.site.private / DEBUG_LOG
        try:
            self._log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(path, error) from None
        self._lock: int | None = None
        self._reserve: Worker | None = None
        self._by_run: dict[int, Worker] = {}

    def warm(self) -> None:
        """Starts a worker while there is nothing to do, if none is there.

        Raises:
            ConfigError: If the lock on the data cannot be used.
        """
        self._forget_the_dead()
        if not self._by_run and self._reserve is None:
            self._reserve = self._new()

    def ask(self, run_id: int, header: dict[str, Any], payload: bytes, is_over: Callable[[], int]) -> bytes | Failure:
        """A worker's reply to an instruction.

        Args:
            run_id: Run of the instruction, which has a worker of its own.
            header: Of the frame.
            payload: The instruction.
            is_over: Asked now and then; another code than 0 ends the waiting and the worker.

        Raises:
            ConfigError: If the lock on the data cannot be used.
        """
        self._forget_the_dead()
        worker = self._by_run.pop(run_id, None)
        if worker is None:
            worker, self._reserve = self._reserve or self._new(), None
        if worker is None:
            return Failure(BUSY)
        while len(self._by_run) >= _MOST_WORKERS:
            self._by_run.pop(next(iter(self._by_run))).stop()
        reply = worker.ask(header, payload, is_over)
        if isinstance(reply, Failure):
            worker.stop()
        else:
            self._by_run[run_id] = worker  # the newest comes last
        return reply

    def stop(self) -> None:
        """Ends all workers and frees the data."""
        for worker in (*self._by_run.values(), *filter(None, [self._reserve])):
            worker.stop()
        self._by_run, self._reserve = {}, None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _forget_the_dead(self) -> None:
        if self._reserve is not None and not self._reserve.is_alive:
            self._reserve.stop()
            self._reserve = None
        for run_id in [run_id for run_id, worker in self._by_run.items() if not worker.is_alive]:
            self._by_run.pop(run_id).stop()

    def _new(self) -> Worker | None:
        """None where another process works on the data."""
        if self._lock is None:
            path = self._settings.site.private / TRAINER_LOCK
            try:
                self._lock = lock_file(path)
            except OSError as error:
                raise _unusable(path, error) from None
        if self._lock is None:
            return None
        return Worker(self._settings, log=self._log, lock=self._lock)


def _unusable(path: Path, error: OSError) -> ConfigError:
    text = "it is a link, where the file itself is needed" if error.errno == errno.ELOOP else error.strerror
    return ConfigError(f"'{path}' cannot be used: {text}")


def _write(stream: Any, header: dict[str, Any], payload: bytes) -> None:
    with suppress(OSError, ValueError):  # it has ended, which its replies tell
        write_frame(stream, header, payload)


def _read_all(stream: Any, replies: "queue.SimpleQueue[bytes | None]") -> None:
    with suppress(McrageError, ValueError, OSError):  # a stream that was closed meanwhile
        while (frame := read_frame(stream)) is not None:
            if frame[1]:  # the first one only says that the worker is ready
                replies.put(frame[1])
    replies.put(None)

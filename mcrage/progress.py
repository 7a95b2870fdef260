"""Progress of long work: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressReport:
    """Reports steps of one piece of work as they finish.

    Args:
        title: What is being done.
        total: Number of steps.
        enabled: Whether to print at all.
        every: Steps between two lines where there is no terminal.
        done: Steps that were done before.
        opening: A line to print before the first step.
    """

    def __init__(
        self, title: str, total: int, *, enabled: bool = True, every: int = 1, done: int = 0, opening: str = ""
    ) -> None:
        self.title = title
        self.total = total
        self.every = every
        self.opening = opening
        self._enabled = enabled
        self._done = done
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressReport":
        if self._enabled and self.opening:
            print(self.opening, file=sys.stderr, flush=True)  # noqa: T201
        if self._enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task(self.title, total=self.total, completed=self._done, note="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, note: str = "") -> None:
        """One more step is done; ``note`` is a short remark such as the loss."""
        self._done += 1
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=self._done, note=note)
        elif self._enabled and (self._done % self.every == 0 or self._done == self.total):
            seconds = time.monotonic() - self._started
            print(f"{self.title} {self._done}/{self.total} {note} ({seconds:.0f} s)", file=sys.stderr, flush=True)  # noqa: T201

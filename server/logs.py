"""The proxy's logs: begun anew when they are large, with a few of the old ones kept beside them.

``access.log`` becomes ``access.log.00007``. The numbers rise, and no old log is renamed again or changed, so whoever
reads all of them meets every line once.
"""

import errno
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TextIO

MOST_BYTES = 50_000_000
"""A log that is larger is begun anew. Ten hospitals that only wait fill one in a day."""

NUM_OLD = 5
"""How many old ones are kept of each."""

_NAMES = ("access.log", "error.log")


def rotate(folder: Path, process_id: int, *, most_bytes: int = MOST_BYTES) -> None:
    """Begins those of nginx's logs anew that are larger; no line is lost.

    Nothing is done while nginx is still starting: the signal would end it.

    Args:
        folder: Of the proxy.
        process_id: Of nginx's master process.
        most_bytes: Of each log.

    Raises:
        OSError: If a file cannot be renamed or removed.
    """
    if not _is_up(folder, process_id):
        return
    has_to_reopen = [_is_set_aside(folder / name, most_bytes) for name in _NAMES]
    if any(has_to_reopen):
        with suppress(ProcessLookupError):  # it opens them when it is started again
            os.kill(process_id, signal.SIGUSR1)


def files_of(log: Path) -> list[Path]:
    """The files that a log consists of, the oldest first; none if it was never begun."""
    return [*_old(log), *([log] if log.exists() else [])]


def lines_of(log: Path) -> Iterator[str]:
    """Every line of a log once, the oldest first, also while it is begun anew.

    Raises:
        OSError: If there is none, or it cannot be read.
    """
    with ExitStack() as opened:
        # The newest first: set aside in between, it is met again under its new name, and known by its inode.
        newest = dict(_opened([log], opened))
        files = dict(_opened(_old(log), opened)) | newest
        if not files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(log))
        for file in files.values():
            yield from file


def _opened(paths: Iterable[Path], stack: ExitStack) -> Iterator[tuple[int, TextIO]]:
    for path in paths:
        with suppress(FileNotFoundError):
            # bytes of a path that are no UTF-8 stand in the log as they came
            file = stack.enter_context(path.open(encoding="utf-8", errors="replace"))
            yield os.fstat(file.fileno()).st_ino, file


def _is_set_aside(log: Path, most_bytes: int) -> bool:
    """Whether nginx has to begin a log; one that is too large gets another name, and it goes on there until then."""
    try:
        is_large = log.stat().st_size > most_bytes
    except FileNotFoundError:  # the last signal did not come through, or somebody removed it
        return True
    if is_large:
        old = _old(log)
        log.replace(log.with_name(f"{log.name}.{_number(old[-1]) + 1 if old else 1:05d}"))
        for each in _old(log)[:-NUM_OLD]:
            each.unlink()
    return is_large


def _old(log: Path) -> list[Path]:
    return sorted((path for path in log.parent.glob(f"{log.name}.*") if path.suffix[1:].isdecimal()), key=_number)


def _number(log: Path) -> int:
    return int(log.suffix[1:])


def _is_up(folder: Path, process_id: int) -> bool:
    """Whether it is this process that has written its id, which nginx does once it hears signals."""
    try:
        return (folder / "nginx.pid").read_text(errors="replace").strip() == str(process_id)
    except OSError:
        return False

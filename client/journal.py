"""The audit log of a hospital: a file of JSON lines that only grows, each with a hash of itself and of the line before.

::

    {"n":41,"at":"2026-03-01T09:30:00.125+00:00","event":"train","round":3,"previous":"...","hash":"..."}

``hash`` is SHA-256 of the line without it: compact ASCII JSON, its fields in the order in which they stand. Whoever may
write to the file can cut off its end, or make all of it anew; a head that was kept elsewhere (:func:`head`) tells. On
a local disk of Linux, ``chattr +a`` on the file leaves that to root.

A process that dies while it writes leaves half a line. The next one ends that line with ``#torn`` and says in an entry
how long it was and what hash it has, so that a torn line can be told from one that was altered.
"""

import errno
import fcntl
import hashlib
import io
import json
import math
import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from mcrage.errors import PrivacyError
from mcrage.privacy.store import sync_folder

Fact = str | int | float | bool | None

TORN = "torn line found"
"""The event that tells of a torn line; only the journal itself writes it."""

_TORN_END = b" #torn\n"
_LONGEST_TEXT, _LONGEST_LINE, _TAIL = 500, 2**14, 2**16  # characters, bytes, bytes
_MOST_PROBLEMS = 100
_LARGEST = 2**63 - 1
_OWN = ("n", "at", "event", "previous", "hash")


class Head(NamedTuple):
    """How far a log has come.

    Attributes:
        lines: Number of its entries; torn lines do not count.
        hash: Of the last of them; 64 zeros where there is none.
    """

    lines: int
    hash: str


_START = Head(0, "0" * 64)


@dataclass(frozen=True)
class Verdict:
    """What a log looks like.

    Attributes:
        lines: Number of the last entry.
        head: Hash of the last entry.
        problems: What was altered, removed, inserted or put elsewhere, one line each.
        torn: Lines that a crash cut off, one line each: no sign of tampering by themselves.
    """

    lines: int
    head: str
    problems: list[str]
    torn: list[str]


class Journal:
    """An audit log, to which any number of processes and threads may append at once.

    Args:
        path: The file, on a local disk; the first entry makes it, in a folder that is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **facts: Fact) -> str:
        """Adds an entry, which is on disk when this returns.

        Args:
            event: What happened: 1 to 500 printable characters.
            facts: By names of a to z and _: texts of at most 500 printable characters, finite numbers, truth values
                and None.

        Returns:
            Hash of the entry.

        Raises:
            PrivacyError: If an argument is out of range, others may use the file, its last line was altered, or it
                cannot be written; then nothing was added.
        """
        _check(event, facts)
        with _locked(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, fcntl.LOCK_EX) as descriptor:
            _check_private(descriptor, self.path)
            last, torn = _end(descriptor, self.path)
            lines = b""
            if torn:
                digest = hashlib.sha256(torn + _TORN_END).hexdigest()
                last, line = _next(last, TORN, {"bytes": len(torn), "digest": digest})
                lines = _TORN_END + line
            last, line = _next(last, event, facts)
            _write(descriptor, lines + line, self.path)
        return last.hash


def head(path: Path) -> Head:
    """How far a log has come, from its last lines alone: this is what to keep elsewhere.

    Raises:
        PrivacyError: If there is no log, or its last line was altered.
    """
    with _locked(path, os.O_RDONLY, fcntl.LOCK_SH) as descriptor:
        return _end(descriptor, path)[0]


def read(path: Path, last: int | None = None) -> Iterator[dict[str, Any]]:
    """Entries as they stand, in order, and ``{"damaged": number of the line}`` for a line that is none.

    Args:
        path: The log.
        last: Only that many lines, from the end.

    Raises:
        PrivacyError: If there is no log.
    """
    lines = _lines(path)
    for number, line in lines if last is None else deque(lines, last):
        yield _entry(line) or {"damaged": number}


def verify(path: Path, *, expect_head: str | None = None, expect_lines: int | None = None) -> Verdict:
    """What a log looks like from its first line to its last.

    Args:
        path: The log; it may grow meanwhile.
        expect_head: A hash that :func:`head` gave once.
        expect_lines: The number that it gave with it.

    Raises:
        PrivacyError: If there is no log.
    """
    chain = _Chain()
    is_seen = expect_head is None or Head(expect_lines or 0, expect_head) == _START
    for number, line in _lines(path):
        entry = _entry(line)
        chain.add(number, line, entry)
        if entry is not None and entry["hash"] == expect_head:
            is_seen |= expect_lines in (None, entry["n"])
    chain.end()
    if chain.last.lines < (expect_lines or 0):
        chain.say(f"entries {chain.last.lines + 1} to {expect_lines} are missing: the end was cut off")
    elif not is_seen:
        where = "no entry has" if expect_lines is None else f"entry {expect_lines} does not have"
        chain.say(f"{where} the hash that was kept elsewhere: the log was made anew")
    return Verdict(*chain.last, chain.problems, chain.torn)


class _Chain:
    """A log up to a line of its file."""

    _strange: range  # lines since the last entry that are none

    def __init__(self) -> None:
        self.last = _START
        self.problems: list[str] = []
        self.torn: list[str] = []
        self._forget()

    def add(self, number: int, line: bytes, entry: Mapping[str, Any] | None) -> None:
        """Goes on by a line."""
        if entry is None:
            self._strange = range(self._strange.start or number, number + 1)
            self._digest.update(line)
            self._are_torn &= _is_torn(line)
            return
        replaced = self._explain(number, entry)
        missing = entry["n"] - self.last.lines - 1
        if missing < 0:
            self.say(f"line {number}: entry {entry['n']} stands after entry {self.last.lines}")
            return
        if missing > replaced:
            self.say(f"line {number}: entries between {self.last.lines} and {entry['n']} are missing before it")
        elif missing == 0 and entry["previous"] != self.last.hash:
            self.say(f"line {number}: entry {entry['n']} was written after another entry than the one before it")
        self.last = Head(entry["n"], entry["hash"])

    def end(self) -> None:
        """Says what is left when there are no more lines."""
        if self._strange and self._are_torn:
            self.torn.append(f"line {self._strange[0]}: the last write was cut off, which the next entry will tell")
        else:
            self._say_strange()

    def say(self, problem: str) -> None:
        """Adds a problem, unless there are very many already."""
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)
        elif len(self.problems) == _MOST_PROBLEMS:
            self.problems.append(f"there are more than {_MOST_PROBLEMS} problems")

    def _explain(self, number: int, entry: Mapping[str, Any]) -> int:
        """Says what is before an entry and is none; gives the number of lines that may be altered entries."""
        tells = entry["event"] == TORN
        replaced = len(self._strange)
        if tells and replaced and entry.get("digest") == self._digest.hexdigest():
            self.torn.append(f"line {self._strange[0]}: a write was cut off, as entry {entry['n']} tells")
            replaced = 0
        else:
            self._say_strange()
            if tells:
                self.say(f"line {number}: the torn line of which it tells is not before it")
        self._forget()
        return replaced

    def _say_strange(self) -> None:
        for number in self._strange:
            self.say(f"line {number}: it is not as it was written")

    def _forget(self) -> None:
        self._strange = range(0)
        self._digest = hashlib.sha256()
        self._are_torn = True


def _next(last: Head, event: str, facts: Mapping[str, Fact]) -> tuple[Head, bytes]:
    """The entry after another one, and its line."""
    at = datetime.now(UTC).isoformat(timespec="milliseconds")
    content = {"n": last.lines + 1, "at": at, "event": event, **dict(sorted(facts.items())), "previous": last.hash}
    digest, line = _sealed(content)
    if len(line) > _LONGEST_LINE:
        raise PrivacyError(f"audit log: an entry of {len(line):,} bytes; at most {_LONGEST_LINE:,} are allowed")
    return Head(last.lines + 1, digest), line


def _sealed(content: Mapping[str, Any]) -> tuple[str, bytes]:
    """The hash of an entry, and its line."""
    digest = hashlib.sha256(_canonical(content)).hexdigest()
    return digest, _canonical({**content, "hash": digest}) + b"\n"


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _entry(line: bytes) -> dict[str, Any] | None:
    """The entry of a line, if each byte of it is as it was written."""
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            return None
        if line != _sealed({name: value for name, value in entry.items() if name != "hash"})[1]:
            return None
    except (ValueError, RecursionError):
        return None
    return entry if [type(entry.get(name)) for name in _OWN] == [int, str, str, str, str] else None


def _is_torn(line: bytes) -> bool:
    """Whether a line that is no entry is one of which only the beginning was written."""
    return line.endswith(_TORN_END) or not line.endswith(b"\n")


def _end(descriptor: int, path: Path) -> tuple[Head, bytes]:
    """The last entry, and what is torn after it; it reads no more than the last lines."""
    size = os.fstat(descriptor).st_size
    start = max(size - _TAIL, 0)
    lines = io.BytesIO(os.pread(descriptor, size - start, start)).readlines()
    after: list[bytes] = []
    while lines:
        entry = _entry(lines[-1])
        if entry is not None:
            return Head(entry["n"], entry["hash"]), b"".join(after)
        if not _is_torn(lines[-1]):
            raise PrivacyError(f"{path}: the last line of the audit log was altered; keep the file and ask who did it")
        after.insert(0, lines.pop())
    if start:
        raise PrivacyError(f"{path}: the end of the audit log is not readable; keep the file and ask who did it")
    return _START, b"".join(after)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are there now with their numbers; what is longer than any entry comes in pieces."""
    with _locked(path, os.O_RDONLY, fcntl.LOCK_SH) as descriptor, open(descriptor, "rb", closefd=False) as file:
        left, number = os.fstat(descriptor).st_size, 1
        # The lock was for the size, which is not that of half an entry: reading may take long.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        while line := file.readline(min(left, _LONGEST_LINE)):
            yield number, line
            left -= len(line)
            number += line.endswith(b"\n")


@contextmanager
def _locked(path: Path, flags: int, operation: int) -> Iterator[int]:
    """The descriptor of a file, and not of what a link leads to, once no other process writes it."""
    try:
        # Without O_NONBLOCK a named pipe would be waited for.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PrivacyError(f"{path}: the audit log cannot be used: it is not a file")
            fcntl.flock(descriptor, operation)
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        text = "it is a link, where the file itself is needed" if error.errno == errno.ELOOP else error.strerror
        raise PrivacyError(f"{path}: the audit log cannot be used: {text}") from None


def _check_private(descriptor: int, path: Path) -> None:
    status = os.fstat(descriptor)
    mode = stat.S_IMODE(status.st_mode)
    if not status.st_size and mode != 0o600:
        os.fchmod(descriptor, 0o600)  # a umask may have taken bits away
    elif mode & 0o077:
        raise PrivacyError(f"{path}: others than its owner may use the audit log (mode {mode:04o}); run chmod 600")


def _write(descriptor: int, lines: bytes, path: Path) -> None:
    """Adds all of the lines, on the disk itself, or nothing."""
    before, left = os.fstat(descriptor).st_size, memoryview(lines)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
        if not before:
            sync_folder(path.parent)
    except OSError:
        with suppress(OSError):  # what stays is a torn line, of which the next entry tells
            os.ftruncate(descriptor, before)
        raise


def _check(event: str, facts: Mapping[str, Fact]) -> None:
    if not isinstance(event, str) or event in ("", TORN):
        raise PrivacyError(f"audit log: an event is a text that is neither empty nor '{TORN}'")
    for name, value in {"event": event, **facts}.items():
        if not re.fullmatch("[a-z_]+", name) or (name in _OWN and name != "event"):
            raise PrivacyError(f"audit log: {name!r} is no name of a fact: a to z and _, none of {', '.join(_OWN)}")
        if wanted := _wanted(value):
            raise PrivacyError(f"audit log: {name} must be {wanted}")


def _wanted(value: object) -> str | None:
    """What a value should be and is not."""
    match value:
        case None:
            return None
        case str():
            ok, wanted = len(value) <= _LONGEST_TEXT and value.isprintable(), f"{_LONGEST_TEXT} printable characters"
        case int():
            ok, wanted = -_LARGEST <= value <= _LARGEST, "a number of 64 bits"
        case float():
            ok, wanted = math.isfinite(value), "finite"
        case _:
            ok, wanted = False, f"text, a number, a truth value or None, not a {type(value).__name__}"
    return None if ok else wanted

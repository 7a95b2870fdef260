"""Files that are there whole or not at all: under readers, kills and a full disk."""

import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcrage.files import lock_file, replace_file

OLD, NEW = b"o" * 300_000, b"n" * 500_000
WRITE_FOR_EVER = """
import sys
from pathlib import Path
from mcrage.files import replace_file
print("ready", flush=True)
while True:
    for sign, size in ((b"n", 500_000), (b"o", 300_000)):
        replace_file(Path(sys.argv[1]), sign * size)
"""
HOLD = """
import sys, time
from pathlib import Path
from mcrage.files import lock_file
print(lock_file(Path(sys.argv[1])) is not None, flush=True)
time.sleep(60)
"""


def python(script: str, path: Path) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().strip() in (b"ready", b"True")
    return process


def kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def drafts(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def halves_seen(path: Path, write: Callable[[Path, bytes], object], *, seconds: float) -> int:
    """How often a reader saw neither the old nor the new content while another thread wrote both in turn."""
    path.write_bytes(OLD)
    deadline, halves = time.monotonic() + seconds, 0

    def write_in_turn() -> None:
        while time.monotonic() < deadline:
            write(path, NEW)
            write(path, OLD)

    writer = threading.Thread(target=write_in_turn)
    writer.start()
    while writer.is_alive():
        halves += path.read_bytes() not in (OLD, NEW)
    writer.join()
    return halves


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    assert halves_seen(tmp_path / "file", replace_file, seconds=0.6) == 0
    assert drafts(tmp_path) == []


def test_a_reader_sees_halves_of_a_file_that_is_written_in_place(tmp_path: Path) -> None:
    assert halves_seen(tmp_path / "file", Path.write_bytes, seconds=0.6) > 0


def test_a_kill_in_the_middle_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", set()
    path.write_bytes(OLD)
    for number in range(20):
        process = python(WRITE_FOR_EVER, path)
        time.sleep(0.002 * number)
        kill(process)
        content = path.read_bytes()
        assert content in (OLD, NEW), f"kill {number}: {len(content)} bytes"
        seen.add(len(content))
    assert len(seen) == 2, "the kills came at different moments"


def test_a_full_disk_leaves_the_old_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            replace_file(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == OLD
    assert drafts(tmp_path) == []


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777])
def test_the_mode_is_what_was_asked_for_whatever_the_umask(tmp_path: Path, mask: int, umask: None) -> None:
    os.umask(mask)
    for name, mode in {"secret": 0o600, "shared": 0o640, "public": 0o644}.items():
        replace_file(tmp_path / name, b"x", mode=mode)
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode
    replace_file(tmp_path / "default", b"x")
    assert stat.S_IMODE((tmp_path / "default").stat().st_mode) == 0o600


def test_nobody_else_can_read_it_while_it_is_written(
    tmp_path: Path, umask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        modes.extend(stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    replace_file(tmp_path / "secret", b"x")
    assert modes == [0o600]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(OLD)
    link.symlink_to(target)
    replace_file(link, NEW)
    assert not link.is_symlink()
    assert (link.read_bytes(), target.read_bytes()) == (NEW, OLD)


def test_what_cannot_be_put_in_its_place_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "folder", NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_lock_is_held_by_one_process_until_it_ends_by_whatever_means(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = python(HOLD, path)
    assert lock_file(path) is None
    kill(process)
    mine = lock_file(path)
    assert mine is not None
    assert lock_file(path) is None, "not even the same process has it twice"
    script = (
        "import sys; from pathlib import Path; from mcrage.files import lock_file; print(lock_file(Path(sys.argv[1])))"
    )
    assert subprocess.check_output([sys.executable, "-c", script, str(path)]).strip() == b"None"
    os.close(mine)
    again = lock_file(path)
    assert again is not None
    os.close(again)


def test_a_program_that_is_started_does_not_inherit_a_lock(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / "lock")
    assert lock is not None
    program = subprocess.Popen(["sleep", "60"])
    os.close(lock)
    again = lock_file(tmp_path / "lock")
    kill(program)
    assert again is not None
    os.close(again)


def test_looking_at_a_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    lock, before = lock_file(tmp_path / "lock"), len(os.listdir("/proc/self/fd"))
    assert [lock_file(tmp_path / "lock") for _ in range(5)] == [None] * 5
    assert len(os.listdir("/proc/self/fd")) == before
    assert lock is not None
    os.close(lock)


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        lock_file(tmp_path / "lock")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_cannot_be_locked_is_an_error_and_not_held_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(descriptor: int, operation: int) -> None:
        raise OSError(37, "No locks available")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("fcntl.flock", without_locks)
    with pytest.raises(OSError, match="No locks available"):
        lock_file(tmp_path / "lock")
    assert len(os.listdir("/proc/self/fd")) == before

"""What the audit log of a hospital holds, survives and gives away: tampering, crashes, full disks, many writers."""

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.journal import TORN, Head, Journal, Verdict, head, read, verify
from mcrage.errors import PrivacyError

ROOT = Path(__file__).parents[2]
START, NUM_LINES = "0" * 64, 6


def forged(n: int, previous: str, **facts: Any) -> dict[str, Any]:
    """An entry as someone else would write it, by the rule of the module's docstring alone."""
    entry = {"n": n, "at": "2026-03-01T09:30:00.125+00:00", **({"event": "train"} | facts), "previous": previous}
    return entry | {"hash": hashlib.sha256(json.dumps(entry, separators=(",", ":")).encode()).hexdigest()}


def line_of(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def chained(number: int) -> Iterator[bytes]:
    previous = START
    for n in range(1, number + 1):
        entry = forged(n, previous, round=n)
        previous = entry["hash"]
        yield line_of(entry)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Bytes of a log of a few entries."""
    journal = Journal(tmp_path_factory.mktemp("log") / "audit.jsonl")
    for number in range(NUM_LINES):
        journal.append("train", round=number)
    return journal.path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scratch") / "audit.jsonl"
    path.touch(0o600)
    return path


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "audit.jsonl"
    path.touch(0o600)
    path.write_bytes(content)
    return path


def problems_of(scratch: Path, content: bytes) -> list[str]:
    scratch.write_bytes(content)
    return verify(scratch).problems


def test_an_entry_says_what_was_said_and_carries_the_hash_that_the_docstring_promises(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "audit.jsonl")
    digest = journal.append("train", site="Zürich", round=3, epsilon=0.5, is_new=True, note=None)
    [line] = journal.path.read_text(encoding="ascii").splitlines()
    entry = json.loads(line)
    assert list(entry) == ["n", "at", "event", "epsilon", "is_new", "note", "round", "site", "previous", "hash"]
    assert (entry["n"], entry["event"], entry["site"], entry["previous"]) == (1, "train", "Zürich", START)
    assert entry == forged(**{name: value for name, value in entry.items() if name != "hash"})
    assert entry["hash"] == digest != journal.append("evaluate") == head(journal.path).hash
    assert verify(journal.path).problems == []


TEXTS = st.text(max_size=500).filter(str.isprintable)
FACTS = st.one_of(TEXTS, st.integers(-(2**63) + 1, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False))
NAMES = st.from_regex("[a-z_]{1,20}", fullmatch=True).filter(lambda name: name not in list(forged(1, START)))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.dictionaries(NAMES, FACTS | st.booleans() | st.none(), max_size=3), max_size=4))
def test_facts_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]]) -> None:
    journal = Journal(tmp_path_factory.mktemp("log") / "audit.jsonl")
    journal.append("start")
    hashes = [journal.append("event", **facts) for facts in entries]
    found = list(read(journal.path))[1:]
    assert [{k: v for k, v in entry.items() if k not in forged(1, START)} for entry in found] == entries
    assert ([entry["hash"] for entry in found], verify(journal.path).problems) == (hashes, [])


@pytest.mark.parametrize(
    ("event", "facts"),
    [
        *((event, {}) for event in ("", TORN, "a\nb", "x" * 501, 5)),
        *(("train", {name: "x"}) for name in ("n", "at", "previous", "hash", "Round", "", "round\n", "round_2")),
        *(("train", {"x": text}) for text in ("x" * 501, "\x1b[2J", "a\nb", "\ud800", b"bytes", [1])),
        *(("train", {"x": number}) for number in (float("nan"), float("inf"), 10**5000)),
        ("train", {letter * 9: "é" * 500 for letter in "abcdefgh"}),
    ],
)
def test_what_a_reader_could_stumble_over_is_refused(tmp_path: Path, event: Any, facts: dict[str, Any]) -> None:
    journal = Journal(tmp_path / "audit.jsonl")
    journal.append("first", text="x" * 500, emoji="🏥" * 500)
    before = journal.path.read_bytes()
    with pytest.raises(PrivacyError, match=r"^audit log: "):
        journal.append(event, **facts)
    assert journal.path.read_bytes() == before


@settings(deadline=None, max_examples=400)
@given(st.data(), st.integers(0, 1), st.binary(max_size=1))
def test_any_byte_that_is_changed_removed_or_added_is_found(
    content: bytes, scratch: Path, data: st.DataObject, removed: int, new: bytes
) -> None:
    place = data.draw(st.integers(0, len(content) - removed))
    changed = content[:place] + new + content[place + removed :]
    found = problems_of(scratch, changed)
    if changed.endswith(b"\n"):
        assert bool(found) == (changed != content)
    else:  # nobody can tell whether the last newline was ever written
        assert found or verify(scratch).torn


@settings(deadline=None, max_examples=200)
@given(st.permutations(range(NUM_LINES)), st.integers(1, NUM_LINES), st.integers(0, NUM_LINES - 1))
def test_lines_that_are_removed_repeated_or_in_another_order_are_found(
    content: bytes, scratch: Path, order: list[int], kept: int, repeated: int
) -> None:
    lines = content.splitlines(keepends=True)
    chosen = order[:kept]
    if chosen != list(range(kept)):
        assert problems_of(scratch, b"".join(lines[number] for number in chosen))
    assert problems_of(scratch, content + lines[repeated])
    assert problems_of(scratch, b"".join([*lines[:repeated], lines[repeated], *lines[repeated:]]))


def test_a_forged_entry_is_found_although_its_own_hash_is_right(content: bytes, scratch: Path) -> None:
    entries = [json.loads(line) for line in content.splitlines()]
    new = forged(3, entries[2]["previous"], round=99)
    for altered in ([*entries[:2], new, *entries[3:]], [*entries[:2], new, *entries[2:]], [forged(7, START), *entries]):
        assert problems_of(scratch, b"".join(map(line_of, altered)))
    for strange in (forged("7", entries[5]["hash"]), forged(7, 0), forged(7, entries[5]["hash"], event=None)):  # type: ignore[arg-type]
        assert problems_of(scratch, content + line_of(strange)) == ["line 7: it is not as it was written"]


def test_links_alone_would_not_show_an_altered_fact(content: bytes, scratch: Path) -> None:
    altered = content.replace(b'"round":2', b'"round":7')
    entries = [json.loads(line) for line in altered.splitlines()]
    assert all(after["previous"] == before["hash"] for before, after in itertools.pairwise(entries))
    assert problems_of(scratch, altered) == ["line 3: it is not as it was written"]


def test_a_problem_is_one_line_that_says_where(content: bytes, scratch: Path) -> None:
    lines = content.splitlines(keepends=True)
    for chosen, words in {
        (0, 1, 4, 5): "line 3: entries between 2 and 5 are missing before it",
        (0, 1, 2, 3, 3, 4, 5): "line 5: entry 4 stands after entry 4",
    }.items():
        assert problems_of(scratch, b"".join(lines[number] for number in chosen)) == [words]


def test_a_cut_end_is_found_by_the_head_that_was_kept_elsewhere(path: Path) -> None:
    seen = head(path)
    assert seen == Head(NUM_LINES, verify(path).head)
    Journal(path).append("more")
    expected = {"expect_head": seen.hash, "expect_lines": seen.lines}
    for known in (expected, {"expect_head": seen.hash}, {"expect_lines": seen.lines}, {"expect_head": START}):
        assert verify(path, **known).problems == []
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    assert verify(path).problems == []
    assert verify(path, **expected).problems == ["entries 6 to 6 are missing: the end was cut off"]
    assert len(verify(path, expect_head=seen.hash).problems) == len(verify(path, expect_lines=6).problems) == 1


def test_another_log_is_found_by_the_head_that_was_kept_elsewhere(path: Path, scratch: Path) -> None:
    scratch.write_bytes(b"".join(chained(9)))
    assert verify(scratch).problems == []
    [problem] = verify(scratch, expect_head=head(path).hash, expect_lines=6).problems
    assert problem == "entry 6 does not have the hash that was kept elsewhere: the log was made anew"
    assert verify(path, expect_head=head(path).hash, expect_lines=5).problems
    scratch.write_bytes(b"")
    assert head(scratch) == Head(0, START)
    assert verify(path, expect_head=START, expect_lines=3).problems


def test_a_write_that_was_cut_off_anywhere_is_named_and_costs_no_other_entry(content: bytes, scratch: Path) -> None:
    start = content[:-1].rindex(b"\n") + 1
    for cut in range(start, len(content)):
        scratch.write_bytes(content[:cut])
        half = verify(scratch)
        assert (half.lines, half.problems, len(half.torn)) == (NUM_LINES - 1, [], cut > start)
        Journal(scratch).append("next")
        whole = verify(scratch)
        assert whole.problems == []
        assert whole.torn == ["line 6: a write was cut off, as entry 6 tells"] * (cut > start)
        assert (whole.lines, [*read(scratch)][-1]["event"]) == (NUM_LINES + (cut > start), "next")


def test_a_crash_while_a_crash_is_told_is_told_too(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content[:-40])
    Journal(scratch).append("next")
    told = scratch.read_bytes()
    for cut in range(len(content) - 40, len(told)):
        scratch.write_bytes(told[:cut])
        Journal(scratch).append("last")
        verdict = verify(scratch)
        assert verdict.problems == []
        assert 1 <= len(verdict.torn) <= 2
        assert head(scratch) == Head(verdict.lines, verdict.head)


def test_a_torn_line_cannot_be_exchanged_or_taken_away(content: bytes, scratch: Path) -> None:
    scratch.write_bytes(content[:-40])
    Journal(scratch).append("next")
    lines = scratch.read_bytes().splitlines(keepends=True)
    assert lines[5].endswith(b" #torn\n")
    for removed in range(7):
        assert problems_of(scratch, b"".join([*lines[:removed], *lines[removed + 1 :]]))
    assert problems_of(scratch, b"".join([*lines[:5], lines[5].replace(b"train", b"trian"), *lines[6:]]))
    assert problems_of(scratch, b"".join([*lines[:3], b'{"n":4 #torn\n', *lines[3:]]))


def test_nothing_is_added_after_a_last_line_that_was_altered(path: Path) -> None:
    altered = path.read_bytes().replace(b'"round":5', b'"round":6')
    path.write_bytes(altered)
    for use in (lambda: Journal(path).append("next"), lambda: head(path)):
        with pytest.raises(PrivacyError, match=r"audit\.jsonl: the last line of the audit log was altered; keep the"):
            use()
    assert path.read_bytes() == altered
    assert verify(path).problems == ["line 6: it is not as it was written"]


def test_the_last_entries_are_read_and_a_damaged_line_is_marked(path: Path) -> None:
    assert [entry["round"] for entry in read(path, last=2)] == [4, 5]
    assert [len(list(read(path, last=number))) for number in (0, 99)] == [0, NUM_LINES]
    entries = read(path)
    assert next(entries)["round"] == 0
    Journal(path).append("next")
    assert len(list(entries)) == NUM_LINES - 1
    path.write_bytes(path.read_bytes().replace(b'"round":4', b'"round":9'))
    assert [entry.get("damaged") for entry in read(path, last=3)] == [5, None, None]


def test_only_the_end_of_a_long_log_is_read_to_add_to_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, sizes, pread = path.read_bytes(), [], os.pread
    path.write_bytes(b"x" * 99 + b"\n" + (b"y" * 999 + b"\n") * 3000 + old)

    def counted(descriptor: int, size: int, offset: int) -> bytes:
        sizes.append(size)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", counted)
    Journal(path).append("next")
    assert head(path).lines == NUM_LINES + 1
    assert max(sizes) <= 2**16 < path.stat().st_size / 40
    path.write_bytes(b"z" * 2**17)
    with pytest.raises(PrivacyError, match="the end of the audit log is not readable"):
        Journal(path).append("next")


def test_a_log_is_checked_in_little_memory_whatever_is_in_it(content: bytes, scratch: Path) -> None:
    strange = (b"\x00[" * 2**19 + b"\n" + content, 1), (b"[" * 9999 + b"\nno entry" * 9999 + b"\n", 101)
    for log, number in ((b"".join(chained(4000)), 0), *strange):
        scratch.write_bytes(log)
        tracemalloc.start()
        found = verify(scratch).problems
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (len(found), found[:1]) == (number, ["line 1: it is not as it was written"] * bool(number))
        assert peak < 200_000


def test_an_entry_is_on_disk_when_its_hash_is_given_or_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    Journal(path).append("next")
    assert sizes == [path.stat().st_size]
    Journal(path.with_name("new.jsonl")).append("first")
    assert len(sizes) == 3  # its folder as well
    monkeypatch.setattr(os, "fsync", lambda _: os.close(-1))
    with pytest.raises(PrivacyError, match="cannot be used: Bad file descriptor"):
        Journal(path).append("next")
    assert sizes[0] == path.stat().st_size


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    journal = Journal(tmp_path / "audit.jsonl")
    before = os.umask(umask)
    try:
        journal.append("first")
    finally:
        os.umask(before)
    assert journal.path.stat().st_mode & 0o777 == 0o600
    journal.path.chmod(0o640)
    with pytest.raises(PrivacyError, match=r"others than its owner may use the audit log \(mode 0640\); run chmod 600"):
        journal.append("second")
    assert verify(journal.path).lines == 1


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("target")])
def test_what_is_no_file_is_neither_written_nor_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path, target = tmp_path / "audit.jsonl", tmp_path / "target"
    target.touch()
    make(path)
    for use in (lambda: Journal(path).append("x"), lambda: head(path), lambda: list(read(path)), lambda: verify(path)):
        with pytest.raises(PrivacyError, match=r"audit\.jsonl: the audit log cannot be used: (it is|Is a)"):
            use()
    assert target.read_bytes() == b""
    with pytest.raises(PrivacyError, match="cannot be used: No such file"):
        verify(tmp_path / "missing.jsonl")


APPENDING = """
import fcntl, os, resource, sys
from pathlib import Path
from client.journal import Journal
from mcrage.errors import PrivacyError

path, name, most, broken = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:]
if "unlocked" in broken:
    fcntl.flock = lambda *_: None
if "full" in broken:
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 1000,) * 2)
if "append-only" in broken:
    os.ftruncate = lambda *_: os.close(-1)
print("ready", flush=True)
sys.stdin.read()
try:
    for number in range(most):
        print(Journal(path).append("event", process=name, number=number), flush=True)
except PrivacyError as error:
    print(error)
"""


def start(path: Path, *arguments: object, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
    """A process that appends to a log once its input ends."""
    command = [sys.executable, "-c", APPENDING, str(path), *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=stdin, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"  # type: ignore[union-attr]
    return process


def together(path: Path, *broken: str) -> Iterator[Verdict]:
    """The log while eight processes append to it, and after that."""
    reader, writer = os.pipe()
    processes = [start(path, number, 50, *broken, stdin=reader) for number in range(8)]
    os.close(writer)
    for process in processes:
        yield verify(path)
        process.communicate(timeout=60)
    os.close(reader)
    yield verify(path)


def test_eight_processes_make_one_chain(path: Path) -> None:
    *during, after = together(path)
    assert [verdict for verdict in during if verdict.problems or verdict.torn] == []
    assert (after.lines, after.problems, after.torn) == (NUM_LINES + 400, [], [])
    entries = list(read(path))[NUM_LINES:]
    for name in map(str, range(8)):
        assert [entry["number"] for entry in entries if entry["process"] == name] == list(range(50))


def test_without_the_lock_eight_processes_break_it(path: Path) -> None:
    assert list(together(path, "unlocked"))[-1].problems


def test_a_process_that_is_killed_loses_nothing_that_it_was_told_is_there(path: Path) -> None:
    draw, told = random.Random(0), list[str]()
    for number in range(20):
        process = start(path, number, 10**6)
        told += [process.stdout.readline().strip() for _ in range(draw.randrange(1, 30))]  # type: ignore[union-attr]
        process.kill()
        told += process.communicate(timeout=60)[0].split("\n")[:-1]
    Journal(path).append("after")
    assert (verify(path).problems, len(verify(path).torn) <= 20) == ([], True)
    assert {*told} <= {entry.get("hash") for entry in read(path)}
    assert len(told) > 100


@pytest.mark.parametrize("broken", [["full"], ["full", "append-only"]])
def test_a_full_disk_is_an_error_and_the_log_goes_on_when_there_is_room(path: Path, broken: list[str]) -> None:
    told = start(path, "x", 1000, *broken).communicate(timeout=60)[0].splitlines()
    assert told[-1] == f"{path}: the audit log cannot be used: File too large"
    verdict = verify(path)
    assert (verdict.lines, verdict.problems, len(verdict.torn)) == (NUM_LINES + len(told) - 1, [], len(broken) - 1)
    Journal(path).append("next")
    assert (verify(path).problems, len(verify(path).torn)) == ([], len(broken) - 1)

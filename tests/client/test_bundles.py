"""Bundles and the hospital's list of them: what names the installed code, and what is refused and never unpacked."""

import hashlib
import io
import json
import os
import shutil
import stat
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from client.bundles import CODE, INSTALLED, MOST_BYTES, Approvals, Bundle, installed_files
from mcrage.errors import ConfigError, RefusedError
from server.coordinator import write_bundle
from server.home import CoordinatorSettings, Home

MB = 2**20
FILES = {
    "client/app.py": b"app = 1\n",
    "mcrage/errors.py": b"class E: ...\n",
    "server/app.py": b"",
    "pyproject.toml": b"",
}


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, **fields: int) -> bytes:
    """A zip file, with the fields of its first entry changed."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for number, (name, data) in enumerate(files.items()):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            for field, value in fields.items():
                setattr(info, field, 0 if number else value)
            archive.writestr(info, data)
    return content.getvalue()


def patched(content: bytes, **fields: int) -> bytes:
    """A zip file whose first entry says something else of itself, in the list at the end that readers go by."""
    where = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "size": (24, "<I"), "offset": (42, "<I")}
    changed = bytearray(content)
    start = changed.index(b"PK\1\2")
    for field, value in fields.items():
        at, form = where[field]
        struct.pack_into(form, changed, start + at, value)
        if field == "flags":
            struct.pack_into(form, changed, 6, value)
    return bytes(changed)


def with_entries(number: int) -> bytes:
    """A zip file that lists a file many times, which takes 47 bytes each."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    total = len(entry) * number
    return entry * number + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 65_535, 65_535, total, 0, 0)


def bomb(method: int, size: int) -> bytes:
    """A small zip file that says that its file has ten bytes."""
    return patched(packed({"client/app.py": bytes(size)}, method), size=10)


def duplicated() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, that it is asked for this
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("client/app.py", "one")
            archive.writestr("client/app.py", "two")
    return content.getvalue()


NOISE = np.random.default_rng(0).bytes(11 * MB)
ELSEWHERE = ["../x.py", "client/../../x.py", "/etc/x", "..\\x.py", "\\\\host\\x", "C:/x.py", "C:x", "./x", "a//b"]
ODD = ["client/", ".", "..", "client/a\nb.py", "client/\x1b[2J.py", "client/\u202eyp.py", "client/" + "a" * 300]

HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "garbage": lambda: NOISE[:MB],
    "half a header": lambda: b"PK\3\4",
    "11 MB": lambda: NOISE,
    "11 MB of files": lambda: packed({"client/app.py": NOISE}),
    "cut off": lambda: packed(FILES)[:-30],
    "begun late": lambda: packed(FILES)[30:],
    "100,000 files": lambda: with_entries(100_000),
    "more than 100 MB": lambda: packed({f"client/{n}.py": bytes(60 * MB) for n in range(2)}),
    "says 4 GB": lambda: patched(packed(FILES), size=2**32 - 2),
    "says less than it has": lambda: bomb(zipfile.ZIP_DEFLATED, 50 * MB),
    "says less, in bzip2": lambda: bomb(zipfile.ZIP_BZIP2, 50 * MB),
    "says less, in LZMA": lambda: bomb(zipfile.ZIP_LZMA, 50 * MB),
    "says more than it has": lambda: patched(packed(FILES), size=9),
    "another checksum": lambda: patched(packed(FILES), crc=1),
    "another method": lambda: patched(packed(FILES), method=77),
    "no deflate": lambda: patched(packed(FILES, zipfile.ZIP_STORED), method=8),
    "encrypted": lambda: patched(packed(FILES), flags=1),
    "strongly encrypted": lambda: patched(packed(FILES), flags=0x40),
    "not UTF-8": lambda: patched(packed({"client/a.py": b""}), flags=0x800).replace(b"/a.py", b"/\xff.py"),
    "its file is elsewhere": lambda: patched(packed(FILES), offset=2**32 - 2),
    "twice": duplicated,
    "a NUL": lambda: packed({"client/app.py#.txt": b""}).replace(b"#", b"\0"),
    "a link": lambda: packed({"client/app.py": b"/etc/passwd"}, external_attr=(stat.S_IFLNK | 0o777) << 16),
    "a device": lambda: packed({"client/app.py": b""}, external_attr=(stat.S_IFBLK | 0o666) << 16),
    **{f"path {name[:20]!r}": lambda name=name: packed({name: b""}) for name in (*ELSEWHERE, *ODD)},  # type: ignore[misc]
}


@contextmanager
def at_most(megabytes: float, seconds: float) -> Iterator[None]:
    """Fails where what is done takes more memory or time of the processor."""
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        used, taken = tracemalloc.get_traced_memory()[1] / MB, time.process_time() - started
    finally:
        tracemalloc.stop()
    assert used < megabytes, f"{used:.0f} MB"
    assert taken < seconds, f"{taken:.2f} s"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bundle that a coordinator of this checkout would send."""
    home = Home.create(tmp_path_factory.mktemp("coordinator") / "home", CoordinatorSettings(names=("localhost",)))
    return write_bundle(home)


@pytest.fixture
def installed(real: bytes, tmp_path: Path) -> Path:
    """A folder with the code of that bundle, as if it had been installed there."""
    folder = tmp_path / "installed"
    zipfile.ZipFile(io.BytesIO(real)).extractall(folder)
    return folder


@pytest.fixture
def approvals(tmp_path: Path) -> Approvals:
    return Approvals(tmp_path / "approved.json")


def test_the_bundle_of_a_checkout_names_the_code_that_is_installed(real: bytes) -> None:
    with at_most(4, 1.0):
        bundle = Bundle.read(real)
    assert bundle.digest == hashlib.sha256(real).hexdigest()
    assert bundle.differences() == []
    assert {name for name in bundle.files if name.startswith(CODE)} == set(installed_files())
    assert {"client/app.py", "client/node.py", "mcrage/messages.py"} <= set(bundle.files)
    assert not [name for name in bundle.files if name.startswith(("tests/", "deploy/", "simulations/", "runs/"))]


@pytest.mark.parametrize("name", ["client/app.py", "mcrage/privacy/noise.py"])
def test_one_changed_byte_is_named_and_makes_another_bundle(name: str, real: bytes, installed: Path) -> None:
    bundle = Bundle.read(real)
    path = installed / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert bundle.differences(installed=installed) == [f"{name}: changed"]
    files = {each: (installed / each).read_bytes() for each in bundle.files}
    changed = Bundle.read(packed(files))
    assert changed.digest != bundle.digest
    assert changed.differences(installed=installed) == []
    assert changed.changes_since(bundle.files) == [f"{name}: changed"]


def test_a_file_more_or_less_is_named_on_the_side_that_has_it(real: bytes, installed: Path) -> None:
    bundle = Bundle.read(real)
    (installed / "client" / "more.py").write_text("")
    (installed / "mcrage" / "rng.py").unlink()
    assert bundle.differences(installed=installed) == [
        "client/more.py: only installed here",
        "mcrage/rng.py: only in the bundle",
    ]
    assert bundle.changes_since({}) == [f"{name}: only in this bundle" for name in sorted(bundle.files)]
    assert Bundle("0" * 64, {}).changes_since({"a": ""}) == ["a: only in the last approved one"]


def test_what_never_runs_at_a_hospital_may_differ_and_still_needs_its_own_approval(
    real: bytes, installed: Path, approvals: Approvals
) -> None:
    bundle = Bundle.read(real)
    files = {name: (installed / name).read_bytes() for name in bundle.files}
    other = packed(files | {"server/app.py": b"import os\n", "torch.py": b"", "sitecustomize.py": b""})
    assert Bundle.read(other).differences(installed=installed) == []
    approvals.add(bundle, by="test")
    with pytest.raises(RefusedError, match="2009"):
        approvals.require(other, installed=installed)


@pytest.mark.parametrize("name", ["client/secret.so", "client/x/__init__.pyc", "mcrage/data.json"])
def test_what_is_no_python_file_beside_the_code_is_a_difference(name: str, real: bytes, installed: Path) -> None:
    files = {each: (installed / each).read_bytes() for each in Bundle.read(real).files}
    assert Bundle.read(packed(files | {name: b"x"})).differences(installed=installed) == [f"{name}: only in the bundle"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_bundle_is_refused_at_once_and_never_unpacked(
    name: str, approvals: Approvals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = HOSTILE[name]()
    monkeypatch.chdir(tmp_path)
    with at_most(12, 0.5), pytest.raises(ConfigError, match=r"^the bundle") as caught:
        Bundle.read(content)
    assert str(caught.value).isprintable()
    with at_most(1, 0.5), pytest.raises(RefusedError, match="2009"):
        approvals.require(content)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_many_files_that_is_none_of_these_is_read() -> None:
    assert len(Bundle.read(packed({f"client/{n}.py": b"" for n in range(2_000)})).files) == 2_000
    content = packed({"client/large.py": bytes(99 * MB)})
    with at_most(12, 1.0):
        Bundle.read(content)


def test_such_bombs_do_go_off_where_they_are_read_as_usual() -> None:
    content = bomb(zipfile.ZIP_BZIP2, 50 * MB)
    assert len(content) < 500

    def read() -> None:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, archive.open("client/app.py") as file:
            file.read(11)

    with pytest.raises(AssertionError, match="MB"), at_most(40, 5), pytest.raises(zipfile.BadZipFile):
        read()


def test_no_damage_makes_another_error_than_a_refusal() -> None:
    whole, draw = packed(FILES | {"client/more.py": NOISE[:200]}), np.random.default_rng(1)
    kinds = {"refused": 0, "read": 0}
    for _ in range(3_000):
        damaged = bytearray(whole)
        for at in draw.integers(0, len(whole), draw.integers(1, 5)):
            damaged[at] = draw.integers(0, 256)
        try:
            Bundle.read(bytes(damaged))
            kinds["read"] += 1
        except ConfigError:
            kinds["refused"] += 1
    assert min(kinds.values()) > 100


def test_only_python_files_of_the_app_and_the_library_count_as_installed(tmp_path: Path) -> None:
    for name in ("client/a.py", "client/sub/b.py", "client/c.txt", "mcrage/d.py", "server/e.py", "f.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert set(installed_files(tmp_path)) == {"client/a.py", "client/sub/b.py", "mcrage/d.py"}
    assert (INSTALLED / "client" / "bundles.py").is_file()


def test_a_bundle_runs_only_while_it_is_approved(real: bytes, approvals: Approvals) -> None:
    bundle = Bundle.read(real)
    with pytest.raises(RefusedError, match=f"2009.*SHA-256 {bundle.digest}"):
        approvals.require(real)
    approvals.add(bundle, by="dr. example")
    assert approvals.require(real) == bundle.digest
    with pytest.raises(RefusedError, match="2009"):
        approvals.require(real + b"\0")
    approvals.withdraw(bundle.digest)
    with pytest.raises(RefusedError, match="2009"):
        approvals.require(real)


def test_an_approval_is_of_the_code_that_was_installed_with_it(
    real: bytes, installed: Path, approvals: Approvals
) -> None:
    approvals.add(Bundle.read(real), by="test")
    approvals.require(real, installed=installed)
    for path in (installed / "client").glob("*.py"):
        path.write_text("raise SystemExit\n")
    with pytest.raises(RefusedError, match=r"2010.*client/__init__\.py: changed") as caught:
        approvals.require(real, installed=installed)
    assert str(caught.value).count("changed") == 5
    shutil.rmtree(installed)
    with pytest.raises(RefusedError, match="2010"):
        approvals.require(real, installed=installed)


def test_the_newest_approval_comes_last_and_is_there_once(approvals: Approvals) -> None:
    first, second = (Bundle.read(packed({"client/app.py": text})) for text in (b"1", b"2"))
    for bundle, by in ((first, "a"), (second, "b"), (first, "c")):
        approvals.add(bundle, by=by)
    assert [(digest, by) for digest, _, by in approvals.listed()] == [(second.digest, "b"), (first.digest, "c")]
    assert approvals.last_files() == first.files
    approvals.withdraw(first.digest)
    assert approvals.last_files() == second.files
    with pytest.raises(ConfigError, match=f"no bundle with SHA-256 {first.digest} is approved"):
        approvals.withdraw(first.digest)
    approvals.withdraw(second.digest)
    assert (approvals.listed(), approvals.last_files()) == ([], {})


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_list_can_be_read_by_both_processes_and_written_by_none_but_its_owner(
    umask: int, approvals: Approvals
) -> None:
    before = os.umask(umask)
    try:
        approvals.add(Bundle.read(packed(FILES)), by="test")
    finally:
        os.umask(before)
    assert approvals.path.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in approvals.path.parent.iterdir()] == ["approved.json"]


def _unusable(approvals: Approvals, content: bytes, words: str) -> None:
    """Refused wherever the list is used, also to add to it: what is not understood is not replaced."""
    before = approvals.path.lstat()
    bundle = Bundle.read(content)
    for use in (
        approvals.listed,
        approvals.last_files,
        lambda: approvals.require(content),
        lambda: approvals.add(bundle, by="x"),
        lambda: approvals.withdraw(bundle.digest),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            use()
        assert str(caught.value).startswith(f"'{approvals.path}' ")
    assert approvals.path.lstat() == before


def test_a_list_that_others_can_write_approves_nothing(approvals: Approvals) -> None:
    content = packed(FILES)
    approvals.add(Bundle.read(content), by="test")
    for mode in (0o664, 0o646, 0o666):
        approvals.path.chmod(mode)
        _unusable(approvals, content, "writable by no other")
    approvals.path.chmod(0o444)
    assert len(approvals.listed()) == 1


def test_a_list_of_another_user_approves_nothing(approvals: Approvals, monkeypatch: pytest.MonkeyPatch) -> None:
    content = packed(FILES)
    approvals.add(Bundle.read(content), by="test")
    if os.getuid() == 0:
        os.chown(approvals.path, 12_345, 12_345)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 12_345)
    _unusable(approvals, content, "of root or this user")


@pytest.mark.parametrize(("kind", "words"), [("link", "symbolic links"), ("folder", "a file"), ("pipe", "a file")])
def test_what_is_no_file_approves_nothing(kind: str, words: str, approvals: Approvals, tmp_path: Path) -> None:
    content = packed(FILES)
    elsewhere = Approvals(tmp_path / "elsewhere.json")
    elsewhere.add(Bundle.read(content), by="test")
    make = {"link": lambda: approvals.path.symlink_to(elsewhere.path), "folder": approvals.path.mkdir}
    make.get(kind, lambda: os.mkfifo(approvals.path))()
    _unusable(approvals, content, words)


ENTRY = {"sha256": "0" * 64, "approved": "2026-01-01", "by": "x", "files": {}}
GARBAGE = [
    *("", "{", "null", "7", '"text"', '["a"]', "[null]", "{}x", "[" * 100_000, "\udcff"),
    json.dumps([{name: value for name, value in ENTRY.items() if name != "files"}]),
    *(
        json.dumps([ENTRY | change])
        for change in ({"sha256": "0"}, {"sha256": "G" * 64}, {"files": {"a": 1}}, {"x": 1})
    ),
]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_a_list_that_is_damaged_approves_nothing(text: str, approvals: Approvals) -> None:
    approvals.path.write_bytes(text.encode(errors="surrogateescape"))
    approvals.path.chmod(0o600)
    _unusable(approvals, packed(FILES), "is not a list of approvals")


def test_a_list_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        Approvals(tmp_path / "nowhere" / "approved.json").add(Bundle.read(packed(FILES)), by="test")


def test_a_bundle_of_the_allowed_size_is_read() -> None:
    filler = NOISE[: MOST_BYTES - 2_000]
    content = packed({"client/app.py": filler}, zipfile.ZIP_STORED)
    assert MOST_BYTES - 2_000 < len(content) <= MOST_BYTES
    assert Bundle.read(content).files == {"client/app.py": hashlib.sha256(filler).hexdigest()}

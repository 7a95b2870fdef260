"""A ledger that was edited, set back, exchanged or put where it is not safe is not opened."""

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from mcrage.errors import LedgerError
from mcrage.privacy import ledger as ledger_module
from mcrage.privacy import store
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Charge, Limits, PrivacyLedger
from mcrage.privacy.store import check_private, digest, network_filesystem

NUM_CHARGES = 6
COUNTS = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=10)
LIMITS = Limits(delta=1e-5, epsilon_total=None, epsilon_run=None)

Places = tuple[Path, Path]


def charge(ledger: PrivacyLedger, key: str) -> Charge:
    return ledger.charge([COUNTS], key=key, run=f"run {key}", task="count", dataset="table", limits=LIMITS)


def opened(places: Places) -> PrivacyLedger:
    return PrivacyLedger.open(places[0], witness=places[1])


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Ledger and witness after some charges, closed."""
    (tmp_path / "elsewhere").mkdir()
    found = tmp_path / "ledger.db", tmp_path / "elsewhere" / "witness.json"
    with PrivacyLedger.create(found[0], witness=found[1]) as ledger:
        for number in range(NUM_CHARGES):
            charge(ledger, str(number))
    return found


def edit(path: Path, *statements: str) -> None:
    """What somebody with the file and SQLite can do: the guards against changes go and come back."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for name in ("no_update", "no_delete"):
            database.execute(f"DROP TRIGGER {name}")
        for statement in (*statements, *store._SCHEMA[2:]):
            database.execute(statement)


EDITS = {
    "time": "UPDATE charges SET time = '2020-01-01T00:00:00+00:00' WHERE sequence = 3",
    "key": "UPDATE charges SET key = 'other' WHERE sequence = 3",
    "run": "UPDATE charges SET run = 'other' WHERE sequence = 3",
    "task": "UPDATE charges SET task = 'other' WHERE sequence = 3",
    "dataset": "UPDATE charges SET dataset = 'other' WHERE sequence = 3",
    "events": "UPDATE charges SET events = replace(events, '10', '90') WHERE sequence = 3",
    "previous": "UPDATE charges SET previous = hash WHERE sequence = 3",
    "hash": "UPDATE charges SET hash = previous WHERE sequence = 3",
    "last": "UPDATE charges SET events = replace(events, '10', '90') WHERE sequence = 6",
    "created": "UPDATE ledger SET created = '2020-01-01T00:00:00+00:00'",
}
DELETIONS = {
    "first": "DELETE FROM charges WHERE sequence = 1",
    "middle": "DELETE FROM charges WHERE sequence = 3",
    "last": "DELETE FROM charges WHERE sequence = 6",
    "all": "DELETE FROM charges",
}


def test_an_edit_that_changes_nothing_is_none(places: Places) -> None:
    edit(places[0], "UPDATE charges SET run = run")
    with opened(places) as ledger:
        assert len(ledger.rows) == NUM_CHARGES


@pytest.mark.parametrize("statement", EDITS.values(), ids=EDITS)
def test_an_altered_row_is_found(places: Places, statement: str) -> None:
    edit(places[0], statement)
    with pytest.raises(LedgerError, match=r"charge [136] was altered"):
        opened(places)


@pytest.mark.parametrize("statement", DELETIONS.values(), ids=DELETIONS)
def test_a_deleted_row_is_found(places: Places, statement: str) -> None:
    edit(places[0], statement)
    with pytest.raises(LedgerError, match=r"charge [13] is missing|older than its witness"):
        opened(places)


def test_rows_in_another_order_are_found(places: Places) -> None:
    swap = [f"UPDATE charges SET sequence = {new} WHERE sequence = {old}" for old, new in ((2, 99), (3, 2), (99, 3))]
    edit(places[0], *swap)
    with pytest.raises(LedgerError, match="charge 2 was altered"):
        opened(places)


def rechained(path: Path, old: str, new: str) -> None:
    """Edits the events of the third row and makes all hashes after it right again."""
    with closing(sqlite3.connect(path)) as database:
        rows = [list(row) for row in database.execute("SELECT * FROM charges ORDER BY sequence")]
    rows[2][6] = rows[2][6].replace(old, new)
    for before, row in pairwise(rows):
        row[7] = before[8]
        row[8] = digest(*row[:8])
    edit(
        path,
        *(f"UPDATE charges SET events='{r[6]}', previous='{r[7]}', hash='{r[8]}' WHERE key='{r[2]}'" for r in rows),
    )


def test_a_row_that_was_altered_together_with_all_hashes_is_found_by_the_witness(places: Places) -> None:
    rechained(places[0], "10", "90")
    with pytest.raises(LedgerError, match="not those that its witness saw"):
        opened(places)


def test_a_forged_row_that_is_no_event_and_a_ledger_without_a_name_are_errors(places: Places) -> None:
    rechained(places[0], "discrete-laplace", "discrete")
    rechained(places[0], "noise_multiplier", "noise")
    with pytest.raises(LedgerError, match="charge 3 of the ledger cannot be read"):
        opened(places)
    edit(places[0], "DELETE FROM ledger")
    with pytest.raises(LedgerError, match="the ledger is damaged"):
        opened(places)


def test_it_is_the_hash_of_the_whole_row_that_finds_an_edit(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that leaves the events out, the same edit goes unseen."""

    def forgetful(*content: object) -> str:
        return digest(*(content[:6] + content[7:] if len(content) == 8 else content))

    monkeypatch.setattr(ledger_module, "digest", forgetful)
    forgetful_places = places[0].with_name("other.db"), places[1].with_name("other.json")
    with PrivacyLedger.create(forgetful_places[0], witness=forgetful_places[1]) as ledger:
        for number in range(NUM_CHARGES):
            charge(ledger, str(number))
    edit(forgetful_places[0], EDITS["events"])
    with opened(forgetful_places) as ledger:
        assert ledger.rows[2].events != ledger.rows[1].events


def test_what_goes_through_sqlite_cannot_change_a_row(places: Places) -> None:
    with closing(sqlite3.connect(places[0])) as database:
        for statement in (EDITS["run"], DELETIONS["last"]):
            with pytest.raises(sqlite3.IntegrityError, match="a ledger only grows"):
                database.execute(statement)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.99])
def test_a_truncated_file_is_found(places: Places, share: float) -> None:
    os.truncate(places[0], int(places[0].stat().st_size * share))
    with pytest.raises(LedgerError, match=r"ledger\.db: (the ledger is damaged|it is not a privacy ledger)"):
        opened(places)


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_a_flipped_byte_is_found_or_changes_nothing(places: Places, tmp_path: Path, suffix: str) -> None:
    """Of the file at rest, and of the log that a killed process leaves behind."""
    source = opened(places)
    if suffix:
        for number in range(3):
            charge(source, f"more {number}")
    rows = source.rows
    if not suffix:
        source.close()
    draw, found = random.Random(0), 0
    copy = tmp_path / "copy.db"
    for _ in range(300):
        for end in ("", "-wal"):
            copy.with_name(copy.name + end).unlink(missing_ok=True)
            if places[0].with_name(places[0].name + end).exists():
                shutil.copy(places[0].with_name(places[0].name + end), copy.with_name(copy.name + end))
        target = copy.with_name(copy.name + suffix)
        content = bytearray(target.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        target.write_bytes(content)
        try:
            with opened((copy, places[1])) as ledger:
                assert ledger.rows == rows
        except LedgerError:
            found += 1
    source.close()
    assert found > 30


def test_an_older_copy_is_found(places: Places) -> None:
    backup = shutil.copy(places[0], places[0].with_name("backup"))
    with opened(places) as ledger:
        charge(ledger, "later")
    shutil.copy(backup, places[0])
    with pytest.raises(LedgerError, match=r"older than its witness, which saw 7 charges where it has 6"):
        opened(places)


def test_an_older_witness_is_good_enough(places: Places) -> None:
    backup = shutil.copy(places[1], places[1].with_name("backup"))
    with opened(places) as ledger:
        charge(ledger, "later")
    shutil.copy(backup, places[1])
    opened(places).close()


def test_another_ledger_is_found(places: Places) -> None:
    other = places[0].with_name("other.db"), places[1].with_name("other.json")
    PrivacyLedger.create(other[0], witness=other[1]).close()
    with pytest.raises(LedgerError, match="another ledger than the one that its witness knows"):
        opened((other[0], places[1]))


def test_a_file_that_took_the_place_of_an_open_ledger_is_found(places: Places) -> None:
    with opened(places) as ledger:
        shutil.copy(places[0], places[0].with_name("copy"))
        places[0].with_name("copy").replace(places[0])
        with pytest.raises(LedgerError, match="exchanged while the ledger was open"):
            charge(ledger, "later")
        places[0].unlink()
        with pytest.raises(LedgerError, match="No such file"):
            charge(ledger, "later")


def test_a_row_that_is_deleted_or_altered_under_an_open_ledger_is_found(places: Places) -> None:
    with opened(places) as ledger:
        edit(places[0], DELETIONS["last"])
        with pytest.raises(LedgerError, match="charge 6 was altered or is missing"):
            charge(ledger, "later")


def test_missing_files_are_told_apart(places: Places) -> None:
    gone = places[0].with_name("gone.db"), places[1].with_name("gone.json")
    with pytest.raises(
        LedgerError, match=r"no ledger; make one with: mcrage budget init .*gone\.db --witness .*gone\.json"
    ):
        opened(gone)
    with pytest.raises(LedgerError, match="the ledger is missing, though its witness is there"):
        opened((gone[0], places[1]))
    with pytest.raises(LedgerError, match="the witness is missing; bring it back"):
        opened((places[0], gone[1]))


def test_nothing_is_replaced(places: Places) -> None:
    gone = places[0].with_name("gone.db"), places[1].with_name("gone.json")
    for pair in (places, (gone[0], places[1]), (places[0], gone[1])):
        with pytest.raises(LedgerError, match="is there already; a ledger is never replaced"):
            PrivacyLedger.create(pair[0], witness=pair[1])
    opened(places).close()


def test_a_ledger_whose_witness_cannot_be_made_is_not_left_behind(places: Places) -> None:
    path = places[0].with_name("new.db")
    with pytest.raises(LedgerError, match="witness cannot be written"):
        PrivacyLedger.create(path, witness=path.parent / "no such folder" / "witness.json")
    with pytest.raises(LedgerError, match="No such file"):
        PrivacyLedger.create(path.parent / "no such folder" / "ledger.db", witness=places[1].with_name("new.json"))
    assert not path.exists()


def test_ledger_and_witness_are_in_different_folders(tmp_path: Path) -> None:
    (tmp_path / "same").symlink_to(tmp_path)
    for witness in (tmp_path / "witness.json", tmp_path / "same" / "witness.json"):
        with pytest.raises(LedgerError, match="belongs in another folder"):
            PrivacyLedger.create(tmp_path / "ledger.db", witness=witness)


def foreign_text(path: Path) -> None:
    path.write_text("patient,age\np1,40\n" * 100, encoding="utf-8")


def foreign_database(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE charges (sequence)")
    path.chmod(0o600)


def newer_version(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 2")


def without_guards(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TRIGGER no_delete")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (foreign_text, "not a privacy ledger"),
        (foreign_database, "not a privacy ledger"),
        (newer_version, "another version"),
        (without_guards, "its tables were altered"),
    ],
)
def test_a_foreign_file_is_refused(places: Places, change: Callable[[Path], None], message: str) -> None:
    change(places[0])
    with pytest.raises(LedgerError, match=message):
        opened(places)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_file_that_others_may_use_is_refused(places: Places, which: int, mode: int) -> None:
    places[which].chmod(mode)
    with pytest.raises(LedgerError, match=f"others than its owner may use it \\(mode {mode:04o}\\); run chmod 600"):
        opened(places)


@pytest.mark.parametrize("which", [0, 1])
def test_a_link_is_refused(places: Places, which: int) -> None:
    target = places[which].rename(places[which].with_name("target"))
    places[which].symlink_to(target)
    with pytest.raises(LedgerError, match="a link or not a file at all"):
        opened(places)


def test_files_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    before = os.umask(0)
    try:
        with PrivacyLedger.create(tmp_path / "l", witness=tmp_path / "elsewhere" / "w") as ledger:
            charge(ledger, "first")
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
            assert len(files) == 4
    finally:
        os.umask(before)


def test_a_folder_or_a_missing_file_is_not_private(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="not a file at all"):
        check_private(tmp_path)
    with pytest.raises(LedgerError, match="No such file"):
        check_private(tmp_path / "gone")


MOUNTS = r"""
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
40 22 0:40 / /mnt/share rw - nfs4 filer:/export rw
41 22 0:41 / /mnt/share/fast rw - xfs /dev/sdb1 rw
42 22 0:42 / /mnt/with\040space rw - cifs //filer/x rw
43 22 0:43 / /data/clinic rw - fuse.sshfs me@there: rw
44 22 0:44 / /mnt/usb rw - fuseblk /dev/sdc1 rw
45 22 0:45 / /srv rw - autofs systemd-1 rw
46 45 0:46 / /srv rw master:3 - glusterfs there:/x rw
47 22 0:47 / /vault rw - fuse.gocryptfs /dev/fuse rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/mcrage", None),
        ("/mnt/share", "nfs4"),
        ("/mnt/share/deep/er", "nfs4"),
        ("/mnt/share/fast/x", None),
        ("/mnt/shared", None),
        ("/mnt/with space/x", "cifs"),
        ("/data/clinic/x", "fuse.sshfs"),
        ("/mnt/usb", None),
        ("/srv/x", "glusterfs"),
        ("/vault/x", None),
    ],
)
def test_network_drives_are_known_by_their_mounts(path: str, kind: str | None) -> None:
    assert network_filesystem(Path(path), MOUNTS) == kind


@pytest.mark.parametrize(
    "kind",
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "9p", "afs", "ceph", "glusterfs", "fuse.s3fs", "fuse"],
)
def test_a_ledger_on_a_network_drive_is_refused(
    places: Places, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"40 22 0:40 / {tmp_path} rw - {kind} somewhere rw\n", encoding="utf-8")
    monkeypatch.setattr(store, "_MOUNTS", mounts)
    with pytest.raises(LedgerError, match=rf"network drive \({kind}\)"):
        opened(places)
    with pytest.raises(LedgerError, match=rf"network drive \({kind}\)"):
        PrivacyLedger.create(tmp_path / "new.db", witness=places[1].with_name("new.json"))


def test_a_ledger_that_another_process_holds_for_too_long_is_an_error(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.05)
    with opened(places) as ledger, closing(sqlite3.connect(places[0], isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="another process has held the ledger"):
            charge(ledger, "later")

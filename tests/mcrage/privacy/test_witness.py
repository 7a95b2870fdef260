import os
from pathlib import Path

import pytest

from mcrage.errors import LedgerError
from mcrage.privacy.witness import Witness

SEEN = Witness(ledger="name", charges=3, head="hash")


def test_a_witness_reads_what_it_wrote_and_leaves_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "witness.json"
    SEEN.write(path)
    later = Witness(ledger="name", charges=4, head="next")
    later.write(path)
    assert Witness.read(path) == later
    assert [found.name for found in tmp_path.iterdir()] == ["witness.json"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ledger": "a", "charges": "3", "head": "b"}', "\xff"])
def test_a_damaged_witness_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "witness.json"
    SEEN.write(path)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(LedgerError, match="the witness is damaged; bring it back"):
        Witness.read(path)


def test_a_draft_of_a_killed_process_is_no_obstacle_and_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    path, draft = tmp_path / "witness.json", tmp_path / "witness.json.draft"
    draft.write_text("half", encoding="utf-8")
    SEEN.write(path)
    assert Witness.read(path) == SEEN
    target = tmp_path / "target"
    target.write_text("precious", encoding="utf-8")
    draft.symlink_to(target)
    with pytest.raises(LedgerError, match="witness cannot be written"):
        SEEN.write(path)
    assert target.read_text(encoding="utf-8") == "precious"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_root_leaves_the_file_to_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "witness.json"
    SEEN.write(path)
    os.chown(path, 1234, 1234)
    SEEN.write(path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1234)

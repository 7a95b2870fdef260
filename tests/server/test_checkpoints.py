import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mcrage.errors import CheckpointError, ConfigError, FederationError
from server.checkpoints import Checkpoint, CheckpointFolder, one_writer


def checkpoint(server_round: int, *, before: int = 0) -> Checkpoint:
    """After a round; those after ``before`` took other seconds, as a round does that is trained again."""
    draw = np.random.default_rng(server_round)
    return Checkpoint(
        server_round=server_round,
        num_server_rounds=9,
        run_fingerprint="f",
        description="{}",
        parameters={"b.weight": draw.normal(size=(2, 3)).astype(np.float32), "a": np.zeros((), np.float32)},
        average={"b.weight": draw.normal(size=(2, 3)).astype(np.float32), "a": np.ones((), np.float32)},
        strategy_state={"m/a": draw.normal(size=4)},
        history=tuple(
            {"server_round": number, "losses": {"x": 0.1}, "seconds": 1.5 if before and number > before else 1.0}
            for number in range(1, server_round + 1)
        ),
        site_counts={"x": "{}"},
    )


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    assert one is not None
    for part in ("parameters", "average", "strategy_state"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert set(ours) == set(theirs)
        for name, array in ours.items():
            assert (array.dtype, array.shape, array.tobytes()) == (
                theirs[name].dtype,
                theirs[name].shape,
                theirs[name].tobytes(),
            )
    assert (one.server_round, one.history, one.site_counts) == (other.server_round, other.history, other.site_counts)


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(checkpoint(3))
    assert_same(folder.latest(), checkpoint(3))


def test_there_is_nothing_at_first(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "checkpoints").latest() is None


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for server_round in (1, 2, 10, 11):
        folder.save(checkpoint(server_round))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00010", "round-00011"]
    assert_same(folder.latest(), checkpoint(11))


def damage(path: Path, how: str, *, at: float = 0.5) -> None:
    content = path.read_bytes()
    place = int(len(content) * at)
    if how == "missing":
        path.unlink()
    elif how == "flipped":
        with path.open("r+b") as file:  # the file that is there, whatever other names it has
            file.seek(place)
            file.write(bytes([content[place] ^ 1]))
    else:
        os.truncate(path, place if how == "truncated" else 0)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "history.jsonl", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "flipped", "truncated"])
@pytest.mark.parametrize("last", [2, 5])
def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str, last: int
) -> None:
    folder = CheckpointFolder(tmp_path)
    for server_round in range(1, last):
        folder.save(checkpoint(server_round))
    damage(folder.save(checkpoint(last)) / name, how)
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        assert_same(folder.latest(), checkpoint(last - 1))
    assert f"round-{last:05d}" in caplog.text
    for server_round in (last, last + 1):
        folder.save(checkpoint(server_round, before=last - 1))
        assert_same(folder.latest(), checkpoint(server_round, before=last - 1))


@pytest.mark.parametrize("how", ["missing", "flipped", "truncated"])
def test_a_history_that_is_damaged_while_the_run_goes_on_is_written_anew(tmp_path: Path, how: str) -> None:
    """No checkpoint is made of it: what the run itself knows counts."""
    folder = CheckpointFolder(tmp_path)
    for server_round in range(1, 6):
        folder.save(checkpoint(server_round))
    damage(tmp_path / "round-00004" / "history.jsonl", how, at=0.1)
    for server_round in (6, 7):
        folder.save(checkpoint(server_round))
        assert_same(folder.latest(), checkpoint(server_round))


KILLED_ANYWHERE = """
import os, runpy, shutil, signal, sys
from pathlib import Path
from server.checkpoints import CheckpointFolder
checkpoint, begun, killed = runpy.run_path(sys.argv[1])["checkpoint"], Path(sys.argv[2]), Path(sys.argv[3])
EVENTS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "sync"}
left, sync = 0, os.fsync

def count(event, _):
    global left
    left -= event in EVENTS
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

def counted_sync(descriptor):
    count("sync", ())
    sync(descriptor)

for number in range(1, 1000):
    folder = shutil.copytree(begun, killed / f"{number:03d}")
    if os.fork() == 0:
        left, os.fsync = number, counted_sync
        sys.addaudithook(count)
        for server_round in (5, 6):
            CheckpointFolder(folder).save(checkpoint(server_round))
        os._exit(0)
    if os.wait()[1] == 0:
        break
"""


@pytest.mark.slow
def test_wherever_a_save_is_killed_the_newest_whole_one_is_there_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "begun")
    for server_round in range(1, 5):
        folder.save(checkpoint(server_round))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_ANYWHERE, __file__, str(folder.folder), str(tmp_path / "killed")]
    subprocess.run(command, env=environment, check=True)
    reached, num_cut_off = [], 0
    for path in sorted((tmp_path / "killed").iterdir()):
        folder = CheckpointFolder(path)
        latest = folder.latest()
        assert latest is not None
        reached.append(latest.server_round)
        assert_same(latest, checkpoint(reached[-1]))
        lines = [(each, int(each.parent.name[-5:])) for each in path.glob("round-*/history.jsonl")]
        num_cut_off += any(len(each.read_bytes().splitlines()) > number for each, number in lines)
        copy = Path(shutil.copytree(path, tmp_path / "copies" / path.name))
        damage(copy / f"round-{reached[-1]:05d}" / "state.json", "flipped")
        assert_same(CheckpointFolder(copy).latest(), checkpoint(reached[-1] - 1))
        for server_round in range(reached[-1] + 1, 9):
            folder.save(checkpoint(server_round, before=reached[-1]))
            assert_same(folder.latest(), checkpoint(server_round, before=reached[-1]))
        assert sorted(each.name for each in path.iterdir()) == ["round-00007", "round-00008"]
        damage(path / "round-00008" / "history.jsonl", "flipped", at=0.0)
        assert_same(folder.latest(), checkpoint(7, before=reached[-1]))
    assert reached == sorted(reached)
    assert set(reached) == {4, 5, 6}
    assert num_cut_off > 2, "some were killed after they had added to a file and before they were complete"


def bytes_written() -> int:
    """By this process so far, whether or not they have reached a disk."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def test_a_round_adds_its_own_record_to_the_history_and_not_all_others(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    cost = {}
    for server_round in (1, 2, 3, 4, *range(3000, 3005)):
        made, before = checkpoint(server_round), bytes_written()
        folder.save(made)
        cost[server_round] = bytes_written() - before
    assert cost[3000] > 150_000, "the history so far"
    assert cost[3004] < cost[4] + 5_000
    assert_same(folder.latest(), checkpoint(3004))


def test_a_history_that_is_no_continuation_is_written_whole(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for server_round in range(1, 5):
        folder.save(checkpoint(server_round))
    for server_round in range(5, 8):
        folder.save(checkpoint(server_round, before=2))
        assert_same(folder.latest(), checkpoint(server_round, before=2))


def test_without_links_the_history_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    folder = CheckpointFolder(tmp_path)
    for server_round in range(1, 6):
        folder.save(checkpoint(server_round))
        assert_same(folder.latest(), checkpoint(server_round))


def test_a_copy_by_links_stays_what_it_was(tmp_path: Path) -> None:
    """As some programs for backups make them."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for server_round in range(1, 6):
        folder.save(checkpoint(server_round))
    copy = Path(shutil.copytree(folder.folder, tmp_path / "copy", copy_function=os.link))
    content = {path: path.read_bytes() for path in copy.glob("*/*")}
    for server_round in range(6, 10):
        folder.save(checkpoint(server_round))
        assert_same(folder.latest(), checkpoint(server_round))
    assert {path: path.read_bytes() for path in copy.glob("*/*")} == content


def test_when_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.save(checkpoint(1)) / "manifest.json").write_text("7")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        folder.latest()


def test_what_a_crash_left_half_written_is_neither_read_nor_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    (tmp_path / ".round-00002").mkdir()
    (tmp_path / ".round-00002" / "state.json").write_text("{")
    assert_same(folder.latest(), checkpoint(1))
    folder.save(checkpoint(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00001", "round-00002"]


def test_a_round_can_be_saved_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.save(checkpoint(2)) / "state.json").unlink()
    folder.save(checkpoint(2))
    assert_same(folder.latest(), checkpoint(2))


def test_clearing_removes_all(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    folder.save(checkpoint(1))
    folder.clear()
    assert folder.latest() is None


def test_there_is_nothing_in_it_that_runs_when_it_is_read(tmp_path: Path) -> None:
    path = CheckpointFolder(tmp_path).save(checkpoint(1))
    files = {"history.jsonl", "state.json", "tensors.safetensors"}
    assert {file.name for file in path.iterdir()} == files | {"manifest.json"}
    assert set(json.loads((path / "manifest.json").read_text())) == files


def enter(folder: Path) -> None:
    with one_writer(folder):
        pass


def test_a_second_writer_is_told_which_folder_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with one_writer(folder), pytest.raises(FederationError, match=r"another run writes to '.*a/run'"):
        enter(folder)
    enter(folder)


HOLD = """
import sys, time
from pathlib import Path
from server.checkpoints import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_kept_out_until_it_is_dead_even_if_it_was_killed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(FederationError, match="another run writes"):
            enter(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
    enter(tmp_path)


def test_a_folder_that_cannot_be_made_is_a_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out-dir '.*file/run': Not a directory"):
        enter(tmp_path / "file" / "run")

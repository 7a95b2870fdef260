import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mcrage.errors import CheckpointError, ConfigError, FederationError
from server.checkpoints import Checkpoint, CheckpointFolder, one_writer


def checkpoint(server_round: int) -> Checkpoint:
    draw = np.random.default_rng(server_round)
    return Checkpoint(
        server_round=server_round,
        num_server_rounds=9,
        run_fingerprint="f",
        description="{}",
        parameters={"b.weight": draw.normal(size=(2, 3)).astype(np.float32), "a": np.zeros((), np.float32)},
        average={"b.weight": draw.normal(size=(2, 3)).astype(np.float32), "a": np.ones((), np.float32)},
        strategy_state={"m/a": draw.normal(size=4)},
        history=({"server_round": server_round, "losses": {"x": 0.1}},),
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


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "flipped", "truncated"])
def test_a_damaged_one_gives_way_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(checkpoint(1))
    path = folder.save(checkpoint(2)) / name
    content = path.read_bytes()
    path.unlink()
    middle = len(content) // 2
    damaged = {
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "truncated": content[:middle],
    }
    if how in damaged:
        path.write_bytes(damaged[how])
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        assert_same(folder.latest(), checkpoint(1))
    assert "round-00002" in caplog.text


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
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.json", "tensors.safetensors"]
    assert set(json.loads((path / "manifest.json").read_text())) == {"state.json", "tensors.safetensors"}


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

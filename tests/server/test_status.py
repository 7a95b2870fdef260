import json
from pathlib import Path
from typing import Any, Literal

import pytest

from mcrage.config import RunConfig
from mcrage.errors import FederationError
from server import jobs
from server.home import CoordinatorSettings, Home
from server.status import LiveStatus

FIELDS = {
    "run",
    "state",
    "server_round",
    "num_server_rounds",
    "sites",
    "seconds_per_round",
    "eta_seconds",
    "started",
    "updated",
    "error",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "status.json"


def told(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_it_begins_with_waiting_and_ends_with_done(path: Path) -> None:
    config = RunConfig()
    with LiveStatus(path, config):
        first = told(path)
        assert set(first) == FIELDS
        assert (first["state"], first["run"], first["num_server_rounds"]) == ("waiting for sites", config.run, 40)
        assert first["seconds_per_round"] is first["eta_seconds"] is None
    last = told(path)
    assert (last["state"], last["error"]) == ("done", "")
    assert first["started"] == last["started"] <= first["updated"] <= last["updated"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FederationError("0 sites are there\nnode 7: gone"), "0 sites are there"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (OSError(28, "No space left on device"), "OSError: [Errno 28] No space left on device"),
    ],
)
def test_whatever_ends_a_run_stands_there_in_one_line(path: Path, error: BaseException, line: str) -> None:
    def fail() -> None:
        with LiveStatus(path, RunConfig()):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert (told(path)["state"], told(path)["error"]) == ("failed", line)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), RuntimeError("refused"), FederationError("why")])
@pytest.mark.parametrize("wish", ["stop", "run"])
def test_a_run_that_was_to_stop_says_that_it_was_stopped(
    tmp_path: Path, error: BaseException, wish: Literal["stop", "run"]
) -> None:
    """However its process came to end: Flower interrupts it, or refuses what it asks for."""
    home = Home.create(tmp_path / "home", CoordinatorSettings(names=("localhost",)))
    config = jobs.create(home, "trial", {})
    path = home.run("trial") / "status.json"

    def end() -> None:
        with LiveStatus(path, config) as status:
            status.reached(3, [1.0])
            jobs.want(home, "trial", wish)
            raise error

    with pytest.raises(type(error)):
        end()
    assert told(path)["server_round"] == 3
    assert (told(path)["state"], told(path)["error"] == "") == (
        ("stopped", True) if wish == "stop" else ("failed", False)
    )
    jobs.want(home, "trial", "run")
    with LiveStatus(path, config):
        assert told(path)["state"] == "waiting for sites"
    assert told(path)["state"] == "done"


def test_a_wish_that_cannot_be_read_is_none(path: Path) -> None:
    path.with_name("wish.json").write_text("{")
    with pytest.raises(SystemExit), LiveStatus(path, RunConfig()):
        raise SystemExit(0)
    assert told(path)["state"] == "failed"


def test_every_site_has_its_state_reason_and_round(path: Path) -> None:
    status = LiveStatus(path, RunConfig())
    status.asking(3, ["a", "b"], busy={"c": "still busy with round 2"}, absent={"d": "is not connected", "node 9": "x"})
    assert told(path)["state"] == "training"
    assert told(path)["sites"] == {
        "a": {"state": "training", "reason": "", "round": 3},
        "b": {"state": "training", "reason": "", "round": 3},
        "c": {"state": "busy", "reason": "still busy with round 2", "round": 3},
        "d": {"state": "absent", "reason": "is not connected", "round": 3},
        "node 9": {"state": "absent", "reason": "x", "round": 3},
    }
    status.heard(["a", "c", "node 9"])
    states = {site: each["state"] for site, each in told(path)["sites"].items()}
    assert states == {"a": "answered", "b": "training", "c": "busy", "d": "absent", "node 9": "absent"}
    status.round_done(3, dropped={"b": "did not answer in time", "d": "is not connected"}, busy=["b"])
    status.reached(3, [1.0])
    assert told(path)["sites"]["b"] == {"state": "busy", "reason": "did not answer in time", "round": 3}
    assert told(path)["sites"]["d"]["state"] == "absent"
    status.asking(4, ["a", "n9"], busy={}, absent={})
    assert "node 9" not in told(path)["sites"]


def test_the_pace_is_the_median_of_the_last_five_rounds(path: Path) -> None:
    status = LiveStatus(path, RunConfig.parse({"num-server-rounds": 10}))
    status.reached(6, [500.0, 1.0, 2.0, 90.0, 3.0, 4.0])
    assert (told(path)["server_round"], told(path)["seconds_per_round"], told(path)["eta_seconds"]) == (6, 3.0, 12.0)


def test_waiting_writes_now_and_then_and_not_at_every_look(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("server.status.time.monotonic", lambda: clock[0])
    status = LiveStatus(path, RunConfig())
    status.change()
    before = told(path)["updated"]
    status.heard([])
    assert told(path)["updated"] == before
    clock[0] += 10.0
    status.heard([])
    assert told(path)["updated"] > before


def test_a_reader_never_sees_half_of_it_and_a_killed_writer_leaves_nothing(path: Path) -> None:
    (path.parent / ".status.json.0a1b2c3d").write_text("{")
    with LiveStatus(path, RunConfig()) as status:
        before = path.stat().st_ino
        status.change(server_round=1)
        assert path.stat().st_ino != before  # replaced, not written over
    assert [each.name for each in path.parent.iterdir()] == ["status.json"]


def test_a_file_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with LiveStatus(tmp_path / "nowhere" / "status.json", RunConfig()) as status:
        status.change(server_round=1)
    assert "could not be written" in caplog.text


def test_without_a_place_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with LiveStatus(None, RunConfig()) as status:
        status.reached(1, [1.0])
    assert list(tmp_path.iterdir()) == []

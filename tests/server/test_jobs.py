"""What becomes of a run that is wanted: with a stand-in for Flower's side, and at a real SuperLink."""

import resource
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.config import RunConfig, Scalar
from mcrage.errors import ConfigError, FederationError
from server import jobs
from server.home import CoordinatorSettings, Home, read_json, write_json
from server.jobs import Jobs
from server.status import LiveStatus

PRIVATE: dict[str, Scalar] = {"dp": True, "dp-epsilon": 3.0, "num-server-rounds": 5}


class Flower:
    """A SuperLink that does as it is told, and remembers it."""

    def __init__(self) -> None:
        self.started: list[Mapping[str, Scalar]] = []
        self.stopped: list[int] = []
        self.known: dict[int, str] = {}
        self.problem: Exception | None = None

    def start(self, _: bytes, config: Mapping[str, Scalar]) -> int:
        if self.problem is not None:
            raise self.problem
        self.started.append(config)
        self.known[len(self.started)] = "running"
        return len(self.started)

    def stop(self, run_id: int) -> None:
        self.stopped.append(run_id)
        self.known[run_id] = "finished:stopped"

    def status(self, run_id: int) -> str:
        return self.known.get(run_id, "")

    def runs(self) -> dict[int, str]:
        return dict(self.known)

    def names(self) -> list[str]:
        return [str(config["run-name"]) for config in self.started]


def as_jobs(home: Home, flower: Flower) -> Jobs:
    return Jobs(home, flower, b"bundle")  # type: ignore[arg-type]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", CoordinatorSettings(names=("localhost",), superlink_port=1))


@pytest.fixture
def flower() -> Flower:
    return Flower()


@pytest.fixture
def running(home: Home, flower: Flower) -> Jobs:
    """One run, ``trial``, that Flower has as number 1."""
    jobs.create(home, "trial", PRIVATE)
    made = as_jobs(home, flower)
    made.tick()
    assert jobs.read(home, "trial").state == "running"
    return made


def told(home: Home, *, error: BaseException, rounds: int = 0) -> None:
    """A process of the run that comes so far, and then ends."""
    with suppress(BaseException), LiveStatus(home.run("trial") / "status.json", RunConfig()) as status:
        status.change(server_round=rounds, state="training")
        raise error


def killed(home: Home, *, rounds: int = 0) -> None:
    """A process of the run that comes so far and says nothing at its end."""
    LiveStatus(home.run("trial") / "status.json", RunConfig()).change(server_round=rounds, state="training")


def test_a_run_is_wanted_then_runs_then_is_done_and_cannot_be_stopped_any_more(
    home: Home, flower: Flower, running: Jobs
) -> None:
    assert (jobs.read(home, "trial").flower_run, running.tick()) == (1, True)
    assert jobs.read(home, "trial").state == "running"
    flower.known[1] = "finished:completed"
    assert not running.tick()
    jobs.want(home, "trial", "stop")
    assert not running.tick()
    assert (jobs.read(home, "trial").state, jobs.is_heard(home, "trial")) == ("done", True)
    assert (len(flower.started), flower.stopped) == (1, [])


def test_flower_gets_every_setting_and_the_places_that_the_coordinator_sets(
    home: Home, flower: Flower, running: Jobs
) -> None:
    expected = jobs.parse(home, "trial", PRIVATE).to_flat()
    assert flower.started == [expected]
    assert expected["out-dir"] == str(home.run("trial"))
    assert expected["sites-file"] == str(home.registry)
    assert (expected["resume"], expected["run-name"], expected["site-dir"]) == (True, "trial", "")
    assert (expected["dp"], expected["dp-epsilon"]) == (True, 3.0)


def test_settings_that_are_not_allowed_are_a_line_each(home: Home) -> None:
    with pytest.raises(ConfigError) as refused:
        jobs.create(home, "trial", {"nm-server-rounds": 3, "dp": "yes"})
    assert str(refused.value).splitlines() == [
        "dp: input should be a valid boolean; it is 'yes'",
        "nm-server-rounds: there is no such setting; did you mean num-server-rounds?",
    ]
    for key in ("site-dir", "out-dir", "resume", "sites-file"):
        with pytest.raises(ConfigError, match=f"^{key}: the coordinator sets it itself$"):
            jobs.create(home, "trial", {key: "/etc", "seed": 1})
    assert home.runs() == []


def test_a_name_is_taken_once(home: Home, running: Jobs) -> None:
    before = (home.run("trial") / "settings.json").read_bytes()
    with pytest.raises(ConfigError, match="there is no run 'other'; 'status' shows all"):
        jobs.want(home, "other", "run")
    with pytest.raises(ConfigError, match="there is a run trial already; 'resume' goes on with it"):
        jobs.create(home, "trial", {})
    with pytest.raises(ConfigError, match="run name"):
        jobs.create(home, "../trial", {})
    assert (home.run("trial") / "settings.json").read_bytes() == before


def test_a_run_whose_process_is_gone_goes_on_and_is_given_up_after_three_attempts_without_a_round(
    home: Home, flower: Flower, running: Jobs
) -> None:
    killed(home, rounds=2)
    for attempt in (1, 2, 3):
        assert (jobs.read(home, "trial").attempts, len(flower.started)) == (attempt, attempt)
        write_json(home.run("trial") / "job.json", jobs.read(home, "trial").model_dump() | {"rounds": 2})
        flower.known[attempt] = "finished:failed"
        running.tick()
        running.tick()
    job = jobs.read(home, "trial")
    assert job.state == "failed"
    assert job.error == "its process ended 3 times without completing a round"
    running.tick()
    assert len(flower.started) == 3


def test_a_run_that_comes_one_round_further_each_time_is_not_given_up(
    home: Home, flower: Flower, running: Jobs
) -> None:
    for attempt in range(1, 11):
        killed(home, rounds=attempt)
        flower.known[attempt] = "finished:failed"
        running.tick()
        assert (jobs.read(home, "trial").state, jobs.read(home, "trial").attempts) == ("wanted", 0)
        running.tick()
    assert jobs.read(home, "trial").state == "running"
    assert len(flower.started) == 11


def test_a_failure_that_was_told_is_not_tried_again(home: Home, flower: Flower, running: Jobs) -> None:
    told(home, error=FederationError("round 3: 1 sites answered, 2 are needed\nhosp-a: absent"), rounds=2)
    flower.known[1] = "finished:failed"
    for _ in range(3):
        running.tick()
    job = jobs.read(home, "trial")
    assert (job.state, job.error) == ("failed", "round 3: 1 sites answered, 2 are needed")
    assert len(flower.started) == 1


def test_a_failure_of_an_earlier_attempt_is_not_that_of_this_one(home: Home, flower: Flower, running: Jobs) -> None:
    told(home, error=FederationError("of the first attempt"))
    flower.known[1] = "finished:failed"
    running.tick()
    jobs.want(home, "trial", "run")
    running.tick()
    flower.known[2] = "finished:failed"  # before it could say anything
    running.tick()
    assert (jobs.read(home, "trial").state, jobs.read(home, "trial").error) == ("wanted", "")


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), httpx.ConnectError("refused"), KeyError(7)])
def test_what_nobody_foresaw_is_tried_again_but_not_for_ever(
    home: Home, flower: Flower, running: Jobs, error: BaseException
) -> None:
    """A ServerApp ends itself when the process that started it is gone, and when the SuperLink is away too long."""
    for attempt in (1, 2, 3):
        assert (jobs.read(home, "trial").state, len(flower.started)) == ("running", attempt)
        told(home, error=error)
        assert read_json(home.run("trial") / "status.json")["state"] == "failed"
        flower.known[attempt] = "finished:failed"
        running.tick()
        running.tick()
    said = f"its process ended 3 times without completing a round, at last with {type(error).__name__}: "
    assert jobs.read(home, "trial").error.startswith(said)


def test_a_run_is_stopped_once_and_stays_stopped(home: Home, flower: Flower, running: Jobs) -> None:
    jobs.create(home, "never-started", {})
    for name in ("trial", "never-started"):
        jobs.want(home, name, "stop")
    anew = as_jobs(home, flower)
    anew.recover()  # after a start of the coordinator as well
    for _ in range(3):
        anew.tick()
    assert (jobs.read(home, "trial").state, flower.stopped, len(flower.started)) == ("stopped", [1], 1)
    assert jobs.read(home, "never-started").state == "stopped"


class Clock(datetime):
    """A clock that stands still, or was set back."""

    moment = datetime.now(UTC)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls.moment


@pytest.mark.parametrize("step", [timedelta(), timedelta(days=-365), timedelta(days=365)])
@pytest.mark.parametrize("ended", ["stopped", "failed"])
def test_a_run_goes_on_when_it_is_wanted_whatever_the_clock_says(
    home: Home, flower: Flower, monkeypatch: pytest.MonkeyPatch, step: timedelta, ended: str
) -> None:
    Clock.moment = datetime(2030, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(jobs, "datetime", Clock)
    made = as_jobs(home, flower)
    jobs.create(home, "trial", {})
    made.tick()
    told(home, error=FederationError("why"), rounds=1)
    flower.known[1] = "finished:failed"
    if ended == "stopped":
        jobs.want(home, "trial", "stop")
    made.tick()
    assert jobs.read(home, "trial").state == ended
    Clock.moment += step
    jobs.want(home, "trial", "run")
    assert not jobs.is_heard(home, "trial"), "what waits for its end must not take the old one for it"
    made.tick()
    job = jobs.read(home, "trial")
    assert (job.state, job.attempts, job.error, len(flower.started)) == ("running", 1, "", 2)
    assert jobs.is_heard(home, "trial")
    made.tick()
    assert len(flower.started) == 2


def test_a_wish_to_go_on_does_not_start_again_what_is_done(home: Home, flower: Flower, running: Jobs) -> None:
    jobs.want(home, "trial", "run")
    running.tick()
    flower.known[1] = "finished:completed"
    for _ in range(3):
        running.tick()
    assert (jobs.read(home, "trial").state, len(flower.started)) == ("done", 1)
    with pytest.raises(ConfigError, match="run trial is done; 'start' wants another one under another name"):
        jobs.want(home, "trial", "run")


def test_after_a_start_of_the_coordinator_what_flower_still_runs_is_ended_and_started_anew(
    home: Home, flower: Flower, running: Jobs
) -> None:
    jobs.create(home, "finished", {})
    running.tick()
    flower.known[2] = "finished:completed"
    running.tick()
    flower.known[9] = "pending"  # started in the moment in which the coordinator was killed
    anew = as_jobs(home, flower)
    anew.recover()
    assert flower.stopped == [1, 9]
    assert (jobs.read(home, "trial").state, jobs.read(home, "trial").attempts) == ("wanted", 0)
    anew.tick()
    assert flower.names() == ["trial", "finished", "trial"]
    assert jobs.read(home, "finished").state == "done"


def test_what_flower_refuses_fails_and_is_told(home: Home, flower: Flower) -> None:
    jobs.create(home, "trial", {})
    flower.problem = ConfigError("the SuperLink refused to start a run (HTTP 412, Flower's code 15)")
    as_jobs(home, flower).tick()
    assert (jobs.read(home, "trial").state, jobs.read(home, "trial").error) == ("failed", str(flower.problem))


def test_a_run_waits_for_a_superlink_that_does_not_answer(home: Home, flower: Flower) -> None:
    jobs.create(home, "trial", {})
    flower.problem = FederationError("the SuperLink does not answer")
    made = as_jobs(home, flower)
    for _ in range(5):
        with pytest.raises(FederationError):
            made.tick()
    assert (jobs.read(home, "trial").state, jobs.read(home, "trial").attempts) == ("wanted", 0)
    flower.problem = None
    made.tick()
    assert jobs.read(home, "trial").state == "running"


DAMAGED = ["", '{"state": "stopped"', "[]", '{"state": "flying"}', '{"attempts": "x"}', '{"rounds": null}', '{"a": 1}']


@pytest.mark.parametrize("content", DAMAGED)
def test_a_run_whose_state_is_damaged_holds_up_no_other_and_is_told_once(
    home: Home, flower: Flower, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("c-good", "a-damaged", "b-good"):
        jobs.create(home, name, {})
    path = home.run("a-damaged") / "job.json"
    path.write_text(content)
    made = as_jobs(home, flower)
    made.recover()
    for _ in range(3):
        made.tick()
    assert flower.names() == ["b-good", "c-good"]
    assert path.read_text() == content
    (line,) = [message for message in caplog.messages if message.startswith("run a-damaged")]
    assert str(path) in line
    path.unlink()
    home.run("being-created").mkdir()
    made.tick()
    assert flower.names() == ["b-good", "c-good", "a-damaged"]


@pytest.mark.parametrize("content", ["", "[]", '{"server_round": "x"}', '{"server_round": null, "state": 7}'])
def test_what_a_run_says_of_itself_may_be_damaged(home: Home, flower: Flower, running: Jobs, content: str) -> None:
    (home.run("trial") / "status.json").write_text(content)
    flower.known[1] = "finished:failed"
    running.tick()
    running.tick()
    assert len(flower.started) == 2


def test_no_run_starts_without_a_setting_that_it_was_wanted_with(home: Home, flower: Flower) -> None:
    """A default in its place would be a run without privacy."""
    assert not jobs.parse(home, "trial", {}).privacy.dp
    jobs.create(home, "trial", PRIVATE)
    path = home.run("trial") / "settings.json"
    whole, made = read_json(path), as_jobs(home, flower)
    for key in whole:
        write_json(path, {name: value for name, value in whole.items() if name != key})
        jobs.want(home, "trial", "run")
        made.tick()
        job = jobs.read(home, "trial")
        assert job.state == "failed"
        assert job.error == f"'{path}' lacks {key}, and no default takes its place; restore it, then 'resume'"
    path.unlink()
    with pytest.raises(ConfigError, match=r"lacks batch-size, .* and \d+ more"):
        jobs.load(home, "trial")
    made.tick()
    assert flower.started == []
    path.write_text('{"dp": ')
    jobs.want(home, "trial", "run")
    jobs.create(home, "z-good", {})
    made.tick()
    assert (jobs.read(home, "trial").state, flower.names()) == ("failed", ["z-good"])
    write_json(path, whole)
    jobs.want(home, "trial", "run")
    made.tick()
    assert [config["dp"] for config in flower.started] == [False, True]


@given(cut=st.integers(min_value=0), noise=st.binary(max_size=4))
@settings(max_examples=80, deadline=None)
def test_whatever_is_left_of_its_settings_a_private_run_is_private(
    cut: int, noise: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = Home(tmp_path_factory.getbasetemp() / "cut")
    home.run("trial").mkdir(parents=True, exist_ok=True)
    write_json(home.run("trial") / "settings.json", jobs._kept(jobs.parse(home, "trial", PRIVATE)))
    path = home.run("trial") / "settings.json"
    content = path.read_bytes()
    cut %= len(content)
    path.write_bytes(content[:cut] + noise + content[cut + len(noise) :])
    with suppress(ConfigError):
        config = jobs.load(home, "trial")
        assert config.privacy.dp
        assert noise == content[cut : cut + len(noise)] or config.privacy.dp_epsilon > 0


def test_a_start_that_cannot_be_written_down_is_taken_back(
    home: Home, flower: Flower, running: Jobs, caplog: pytest.LogCaptureFixture
) -> None:
    """Else every look would start the run once more while the disk is full."""
    flower.known[1] = "finished:failed"
    running.tick()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        running.tick()
        running.tick()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert flower.stopped == [2, 3]
    assert caplog.text.count("File too large") == 1
    running.tick()
    assert (jobs.read(home, "trial").state, jobs.read(home, "trial").flower_run) == ("running", 4)

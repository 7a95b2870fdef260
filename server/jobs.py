"""Runs of a coordinator: wanted by ``start``, ``stop`` and ``resume``, and carried out by the running coordinator.

A run outlives what carries it out. If its process, the SuperLink or the whole machine ends in the middle, the
coordinator starts Flower's part anew, and training goes on after the last complete round (:mod:`server.rounds`).

Nothing here goes by the clock: a wish and an attempt are known by marks, so a clock that is set back loses neither.
"""

import logging
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mcrage.config import RunConfig, Scalar
from mcrage.errors import ConfigError, FederationError
from server.control import Control
from server.home import Home, read_json, write_json

_LOG = logging.getLogger("mcrage.daemon")

State = Literal["wanted", "running", "done", "failed", "stopped"]
ENDED: tuple[State, ...] = ("done", "failed", "stopped")
_MOST_ATTEMPTS = 3
_OWN_KEYS = ("site-dir", "out-dir", "resume", "sites-file")
# server.status puts the class before what mcrage did not raise on purpose: a SuperLink that was away too long, say, or
# the signal by which a process was made to end.
_UNFORESEEN = re.compile(r"[A-Z]\w*: ")


class Job(BaseModel):
    """A run as the running coordinator sees it.

    Attributes:
        state: ``wanted`` until Flower has it.
        flower_run: Flower's number of the newest attempt; 0 before the first.
        attempts: Since a round was last completed.
        rounds: That were complete at the newest attempt.
        error: Why it failed, or what it waits for; empty otherwise.
        wish: Mark of the wish that it follows.
        told: Mark of what the run had said of itself before the newest attempt.
        changed: When this was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    state: State = "wanted"
    flower_run: int = 0
    attempts: int = 0
    rounds: int = 0
    error: str = ""
    wish: str = ""
    told: str = ""
    changed: str = ""


def create(home: Home, name: str, settings: Mapping[str, Scalar]) -> RunConfig:
    """Wants a new run; the running coordinator starts it.

    Args:
        home: The coordinator's folder.
        name: Of the run.
        settings: Those that are not the default, by kebab-case key.

    Raises:
        ConfigError: If there is such a run, or a setting is not allowed.
    """
    folder = home.run(name)
    if (folder / "settings.json").exists():
        raise ConfigError(f"there is a run {name} already; 'resume' goes on with it")
    config = parse(home, name, settings)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_json(folder / "settings.json", _kept(config))
    want(home, name, "run")
    return config


def parse(home: Home, name: str, settings: Mapping[str, Scalar]) -> RunConfig:
    """All settings of a run.

    Raises:
        ConfigError: With a line for every setting that is not allowed, or that the coordinator sets itself.
    """
    own = sorted(set(_OWN_KEYS) & set(settings))
    if own:
        raise ConfigError("\n".join(f"{key}: the coordinator sets it itself" for key in own))
    places: dict[str, Scalar] = {"out-dir": str(home.run(name)), "resume": True, "sites-file": str(home.registry)}
    # The name tells this run from another one with the same settings in the sites' ledgers.
    return RunConfig.parse({"run-name": name, **settings, **places})


def load(home: Home, name: str) -> RunConfig:
    """The settings with which a run was wanted.

    Raises:
        ConfigError: If one of them is not there any more: no default takes its place, as it could be one without
            privacy.
    """
    path = home.run(name) / "settings.json"
    settings = read_json(path)
    missing = sorted(set(_kept(RunConfig())) - set(settings))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ConfigError(f"'{path}' lacks {shown}, and no default takes its place; restore it, then 'resume'")
    return parse(home, name, settings)


def _kept(config: RunConfig) -> dict[str, Scalar]:
    return {key: value for key, value in config.to_flat().items() if key not in _OWN_KEYS}


def want(home: Home, name: str, wish: Literal["run", "stop"]) -> None:
    """Writes down what shall become of a run.

    Raises:
        ConfigError: If there is no such run, or it shall go on and is done already.
    """
    folder = home.run(name)
    if not (folder / "settings.json").exists():
        raise ConfigError(f"there is no run {name!r}; 'status' shows all")
    if wish == "run" and read(home, name).state == "done":
        raise ConfigError(f"run {name} is done; 'start' wants another one under another name")
    mark = secrets.token_hex(8)
    write_json(folder / "wish.json", {"wish": wish, "mark": mark, "at": datetime.now(UTC).isoformat()})


def read(home: Home, name: str) -> Job:
    """A run's state.

    Raises:
        ConfigError: If it is damaged.
    """
    path = home.run(name) / "job.json"
    try:
        return Job.model_validate(read_json(path))
    except ValidationError:
        raise ConfigError(f"'{path}' is damaged, or of another version: remove it, and the run goes on") from None


def is_heard(home: Home, name: str) -> bool:
    """Whether the running coordinator has taken up the newest wish."""
    return _mark(read_json(home.run(name) / "wish.json")) == read(home, name).wish


def _mark(wish: Mapping[str, Any]) -> str:
    return str(wish.get("mark", ""))


class Jobs:
    """Carries out what is wanted.

    Args:
        home: The coordinator's folder.
        control: Of the SuperLink.
        bundle: The app.
    """

    def __init__(self, home: Home, control: Control, bundle: bytes) -> None:
        self._home, self._control, self._bundle = home, control, bundle
        self._said: dict[str, str] = {}
        self._hindrance = ""

    def recover(self) -> None:
        """Ends what Flower still holds for running: after a start of the coordinator nothing runs any more.

        Raises:
            FederationError: If the SuperLink does not answer.
        """
        for flower_run, status in self._control.runs().items():
            if not status.startswith("finished"):
                self._control.stop(flower_run)
        for name in self._home.runs():
            try:
                job = read(self._home, name)
                if job.state == "running":
                    self._write(name, job, state="wanted", attempts=0)
            except (ConfigError, OSError) as error:
                self._say(name, str(error))

    def tick(self, *, hindrance: str = "") -> bool:
        """Looks at every run once; returns whether any of them goes on.

        Args:
            hindrance: Why none may be started now; it is no fault of the runs, which wait.

        Raises:
            FederationError: If the SuperLink does not answer about one of them; the others were looked at.
        """
        is_busy, silent, self._hindrance = False, None, hindrance
        for name in self._home.runs():
            try:
                is_busy |= self._look_at(name) not in ENDED
                self._said.pop(name, None)
            except (ConfigError, OSError) as error:
                self._say(name, str(error))
            except FederationError as error:
                silent = error
        if silent is not None:
            raise silent
        return is_busy

    def _look_at(self, name: str) -> State:
        folder = self._home.run(name)
        job, wish = read(self._home, name), read_json(folder / "wish.json")
        if not wish and not (folder / "job.json").exists():
            return "stopped"  # it is being created at this moment, or never was
        is_stop = wish.get("wish") == "stop"
        if _mark(wish) != job.wish:
            is_anew = job.state in ENDED and not is_stop
            job = self._write(name, Job() if is_anew else job, wish=_mark(wish))
        if is_stop:
            job = self._stopped(name, job)
        elif job.state == "wanted" and self._hindrance:
            job = self._waiting(name, job)
        elif job.state == "wanted":
            job = self._start(name, job)
        elif job.state == "running":
            job = self._watch(name, job)
        return job.state

    def _start(self, name: str, job: Job) -> Job:
        rounds, told = self._rounds(name), self._told(name)
        try:
            flower_run = self._control.start(self._bundle, load(self._home, name).to_flat())
        except ConfigError as error:
            _LOG.error("run %s cannot be started: %s", name, error)
            return self._write(name, job, state="failed", error=str(error))
        _LOG.info("run %s: started after round %d", name, rounds)
        known = {"flower_run": flower_run, "rounds": rounds, "told": _mark_of(told)}
        try:
            return self._write(name, job, state="running", error="", attempts=job.attempts + 1, **known)
        except OSError:
            self._control.stop(flower_run)  # nothing would know of it, and the next look start another one
            raise

    def _waiting(self, name: str, job: Job) -> Job:
        if job.error:
            return job
        return self._write(name, job, error=f"waits: {self._hindrance}", attempts=0)

    def _watch(self, name: str, job: Job) -> Job:
        status = self._control.status(job.flower_run)
        if status == "finished:completed":
            _LOG.info("run %s: done", name)
            return self._write(name, job, state="done")
        if status.startswith("finished") or not status:
            return self._ended(name, job)
        return job

    def _ended(self, name: str, job: Job) -> Job:
        """A run whose process is gone: it failed for a reason that was foreseen, or goes on after its last round."""
        told, rounds = self._told(name), self._rounds(name)
        attempts = 0 if rounds > job.rounds else job.attempts
        has_told = told.get("state") == "failed" and _mark_of(told) != job.told
        error = str(told.get("error", "")) if has_told else ""
        if not error or _UNFORESEEN.match(error):
            if attempts < _MOST_ATTEMPTS:
                _LOG.warning("run %s: its process is gone; it goes on after round %d %s", name, rounds, error)
                return self._write(name, job, state="wanted", attempts=attempts)
            last = f", at last with {error}" if error else ""
            error = f"its process ended {attempts} times without completing a round{last}"
        _LOG.error("run %s failed after round %d: %s", name, rounds, error)
        return self._write(name, job, state="failed", error=error)

    def _stopped(self, name: str, job: Job) -> Job:
        if job.state in ENDED:
            return job
        status = self._control.status(job.flower_run) if job.flower_run else ""
        if status and not status.startswith("finished"):
            self._control.stop(job.flower_run)
        _LOG.info("run %s: stopped after round %d", name, self._rounds(name))
        return self._write(name, job, state="stopped", error="")

    def _told(self, name: str) -> dict[str, Any]:
        """What the run says of itself; nothing where that cannot be read, as it is no reason to let it alone."""
        try:
            return read_json(self._home.run(name) / "status.json")
        except ConfigError:
            return {}

    def _rounds(self, name: str) -> int:
        rounds = self._told(name).get("server_round")
        return rounds if type(rounds) is int else 0

    def _write(self, name: str, job: Job, **changes: Any) -> Job:
        written = job.model_copy(update={**changes, "changed": datetime.now(UTC).isoformat()})
        write_json(self._home.run(name) / "job.json", written.model_dump())
        return written

    def _say(self, name: str, problem: str) -> None:
        """Once, not at every look."""
        if self._said.get(name) != problem:
            self._said[name] = problem
            _LOG.error("run %s: %s", name, problem)


def _mark_of(told: Mapping[str, Any]) -> str:
    return str(told.get("updated", ""))

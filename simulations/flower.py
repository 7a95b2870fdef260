"""``flwr run`` as one command that can be trusted: a true exit status, and nothing left running afterwards.

Flower's own command returns 0 whether or not the run succeeds, and leaves a SuperLink behind that keeps the folder and
the environment of the first run. Here every run has a Flower home, ports and a SuperLink of its own, the network is not
needed, and all processes that were started are ended, whatever happened.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from mcrage.config import RunConfig, Scalar
from mcrage.errors import FederationError
from mcrage.supervision import started_with

HOME = "FLWR_HOME"
_FLWR = str(Path(sys.executable).parent / "flwr")
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0
_LAST_LINES_SECONDS = 5.0
_SUCCESS = "finished:completed"


def flower_environment(home: Path) -> dict[str, str]:
    """The environment of an offline run with a Flower home and ports of its own.

    Args:
        home: Flower's folder for this run; it also marks the processes that belong to it.
    """
    programs = str(Path(sys.executable).parent)
    return os.environ | {
        "PATH": programs + os.pathsep + os.environ.get("PATH", ""),
        HOME: str(home.resolve()),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(_free_port()),
    }


def flwr_run(app_dir: Path, config: RunConfig, *, num_sites: int, num_cpus: int = 1) -> int:
    """Runs the app in Flower's simulation and waits for its end.

    Args:
        app_dir: Folder of ``pyproject.toml``.
        config: The settings; relative places count from the current folder.
        num_sites: Number of pretend hospitals.
        num_cpus: CPUs that Ray reserves per site.

    Returns:
        0 if the run completed, 1 if it failed. Its log goes to stderr as it comes; the SuperLink's stays in
        ``flower/`` under the out-dir when it failed.

    Raises:
        FederationError: If Flower did not accept the run, or this system has no ``/proc`` to find processes in.
    """
    if not Path("/proc/self/environ").exists():
        raise FederationError("ending Flower's processes needs /proc; use the in-process grid, or plain 'flwr run'")
    out_dir = Path(config.places.out_dir).resolve()
    home = out_dir / "flower"
    home.mkdir(parents=True, exist_ok=True)
    places = {"site-dir": str(Path(config.places.site_dir).resolve()), "out-dir": str(out_dir)}
    environment = flower_environment(home)
    settings = home / "run-config.toml"
    settings.write_text(to_toml(config.to_flat() | places), encoding="utf-8")
    federation = f"num-supernodes={num_sites} client-resources-num-cpus={num_cpus}"
    with _nothing_left_behind(home):
        run_id = _start(app_dir, settings, federation, environment)
        with _log_shown(run_id, environment):
            while not (status := _status(run_id, environment)).startswith("finished"):
                time.sleep(_POLL_SECONDS)
    if status != _SUCCESS:
        return 1
    shutil.rmtree(home)
    return 0


def to_toml(values: Mapping[str, Scalar]) -> str:
    """Settings as a TOML file, one a line."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _start(app_dir: Path, settings: Path, federation: str, environment: Mapping[str, str]) -> str:
    options = ("--run-config", str(settings), "--federation-config", federation, "--format", "json")
    answer = _flwr(environment, "run", str(app_dir.resolve()), *options)
    try:
        return str(json.loads(answer)["run-id"])
    except (ValueError, KeyError):
        raise FederationError(f"Flower did not start the run: {answer.strip()}") from None


def _status(run_id: str, environment: Mapping[str, str]) -> str:
    answer = _flwr(environment, "ls", "--run-id", run_id, "--format", "json")
    try:
        return str(json.loads(answer)["runs"][0]["status"])
    except (ValueError, KeyError, IndexError):
        raise FederationError(f"Flower does not know the run any more: {answer.strip()}") from None


def _flwr(environment: Mapping[str, str], *arguments: str) -> str:
    done = subprocess.run([_FLWR, *arguments], env=environment, capture_output=True, text=True, check=False)
    return done.stdout + (done.stderr if done.returncode else "")


@contextmanager
def _log_shown(run_id: str, environment: Mapping[str, str]) -> Iterator[None]:
    """Sends the run's log to stderr as it comes."""
    reader = subprocess.Popen([_FLWR, "log", run_id, "--stream"], env=environment, stdout=sys.stderr)
    try:
        yield
    finally:
        with suppress(subprocess.TimeoutExpired):
            reader.wait(_LAST_LINES_SECONDS)
        reader.kill()
        reader.wait()


@contextmanager
def _nothing_left_behind(home: Path) -> Iterator[None]:
    """Ends every process that carries this Flower home in its environment, and their children, on the way out."""
    try:
        yield
    finally:
        started = processes_of(home)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process_id in started:
                _send(process_id, number)
            deadline = time.monotonic() + _GRACE_SECONDS
            while (started := {*filter(_is_alive, started), *processes_of(home)}) and time.monotonic() < deadline:
                time.sleep(0.1)


def processes_of(home: Path) -> set[int]:
    """Ids of the processes that were started with this Flower home, and of their descendants."""
    return started_with(HOME, str(home.resolve()))


def _send(process_id: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def _is_alive(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

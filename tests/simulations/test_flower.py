import hashlib
import os
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from client.app import app as client_app
from mcrage.config import RunConfig
from mcrage.errors import FederationError
from server.app import app as server_app
from simulations import flower
from simulations.flower import flower_environment, flwr_run, processes_of, to_toml
from simulations.grid import InProcessGrid, make_context

ROOT = Path(__file__).parents[2]


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_bundle_that_goes_to_the_hospitals_holds_the_program_and_nothing_else(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "flwr"), "build", "--app", str(ROOT)]
    subprocess.run(command, cwd=tmp_path, env=flower_environment(tmp_path / "home"), check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    names = zipfile.ZipFile(bundle).namelist()
    assert {"client/app.py", "server/app.py", "mcrage/cddpm.py", "pyproject.toml"} <= set(names)
    assert {name.split("/")[0] for name in names} <= {
        "client",
        "server",
        "mcrage",
        "pyproject.toml",
        "LICENSE",
        ".info",
    }
    assert all(name.endswith(".py") for name in names if "/" in name and not name.startswith(".info"))


@pytest.mark.slow
def test_both_engines_give_the_same_bytes_and_flower_leaves_nothing_running(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    here = tiny_config(out_dir=str(tmp_path / "here"), num_server_rounds=2, strategy="fedadam")
    server_app(InProcessGrid.of_folder(client_app, 3, here), make_context(here))
    there = tiny_config(out_dir=str(tmp_path / "there"), num_server_rounds=2, strategy="fedadam")
    assert flwr_run(ROOT, there, num_sites=3) == 0
    assert processes_of(tmp_path / "there" / "flower") == set()
    for name in ("model/model.safetensors", "model/model.json", "metrics.jsonl"):
        assert file_digest(tmp_path / "here" / name) == file_digest(tmp_path / "there" / name)


@pytest.mark.slow
def test_a_run_that_fails_has_a_status_that_says_so(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = tiny_config(site_dir=str(tmp_path / "nowhere"), quorum_retries=0)
    assert flwr_run(ROOT, config, num_sites=2) == 1
    assert processes_of(tmp_path / "out" / "flower") == set()
    assert (tmp_path / "out" / "flower" / "local-superlink" / "superlink.log").exists()


def test_what_flower_does_not_accept_is_an_error(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="did not start the run"):
        flwr_run(tmp_path, tiny_config(), num_sites=2)


def test_settings_are_written_as_toml() -> None:
    values = {"a-b": 1, "c": 0.5, "d": True, "e": 'a "quoted" path with é', "f": 1e-05}
    assert tomllib.loads(to_toml(values)) == values


def test_a_run_is_offline_and_has_a_home_and_a_port_of_its_own(tmp_path: Path) -> None:
    one, other = (flower_environment(tmp_path / name) for name in "ab")
    assert one["FLWR_HOME"] == str(tmp_path / "a")
    assert one["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] != other["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"]
    assert one["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == one["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert one["FLWR_TELEMETRY_ENABLED"] == one["RAY_USAGE_STATS_ENABLED"] == "0"


SLEEP = "print('ready', flush=True); import time; time.sleep(60)"
CHILD = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env={}); "
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def start(script: str, home: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"FLWR_HOME": str(home)}
    process = subprocess.Popen([sys.executable, "-c", script + SLEEP], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def interrupted(home: Path) -> None:
    with flower._nothing_left_behind(home):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("script", "num_processes"), [(CHILD, 2), (STUBBORN, 1)])
def test_whatever_happens_the_processes_of_the_run_are_ended_and_no_others(
    script: str, num_processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "_GRACE_SECONDS", 1.0)
    with start(script, tmp_path / "ours") as ours, start("", tmp_path / "others") as others:
        assert len(processes_of(tmp_path / "ours")) == num_processes
        with pytest.raises(KeyboardInterrupt):
            interrupted(tmp_path / "ours")
        assert processes_of(tmp_path / "ours") == set()
        assert ours.wait(5) == -(signal.SIGKILL if script == STUBBORN else signal.SIGTERM)
        assert others.poll() is None
        others.kill()

"""A federation of real processes on this machine: coordinator, proxy, TLS, and hospitals with files of their own.

For tests and measurements of what a deployment does; all traffic stays on loopback.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from client.bundles import Approvals, Bundle
from client.enrolment import enrol
from client.journal import read
from client.places import JOURNAL, POLICY
from client.policy import SitePolicy
from client.settings import SiteSettings
from mcrage.config import Scalar
from mcrage.errors import FederationError
from mcrage.files import replace_file
from mcrage.pki import Authority
from mcrage.supervision import started_with
from server import jobs, sites
from server.coordinator import write_bundle
from server.home import CoordinatorSettings, Home, read_json
from server.overview import site_rows

ROOT = Path(__file__).resolve().parents[1]
HURRIED: dict[str, Scalar] = {
    "local-steps": 2,
    "batch-size": 32,
    "width": 16,
    "depth": 1,
    "evaluate-every": 0,
    "round-timeout-seconds": 60.0,
    "quorum-retries": 3,
    "quorum-wait-seconds": 1.0,
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(is_so: Callable[[], object], *, seconds: float, what: str) -> float:
    """Waits; returns the seconds that it took."""
    started = time.monotonic()
    while not is_so():
        if time.monotonic() - started > seconds:
            raise FederationError(f"{what}: not within {seconds:g} s")
        time.sleep(0.1)
    return time.monotonic() - started


def processes(*words: str) -> list[int]:
    """Ids of the processes whose command line has all of the words."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(word in command for word in words):
                    found.append(int(entry.name))
    return found


class Federation:
    """A coordinator and hospitals, each in a folder of its own.

    Args:
        folder: Where all of it is.
        data: Folder of ``schema.json`` and a table per hospital, ``site-01.csv`` and so on.
        num_sites: How many of them take part.
        policy: Of every hospital.
    """

    def __init__(self, folder: Path, data: Path, *, num_sites: int, policy: SitePolicy) -> None:
        self.folder = folder
        self.port = free_port()
        names = CoordinatorSettings(names=("localhost",), listen=f"127.0.0.1:{self.port}", superlink_port=free_port())
        self.home = Home.create(folder / "home", names)
        a_day_ago = datetime.now(UTC) - timedelta(days=1)
        Authority.create(self.home.pki, name="test", at=a_day_ago).issue_server(["localhost"], at=a_day_ago)
        self.bundle = write_bundle(self.home)
        self.sites: dict[str, SiteSettings] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for path in sorted(data.glob("site-*.csv"))[:num_sites]:
            self.enrol(path.stem, path, data / "schema.json", policy)

    def enrol(self, name: str, table: Path, schema: Path, policy: SitePolicy) -> SiteSettings:
        """A new hospital with a copy of a table."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "table.csv").write_bytes(table.read_bytes())
        (folder / "schema.json").write_bytes(schema.read_bytes())
        (folder / "site.toml").write_text(
            f'[site]\nname = "{name}"\ndata = "table.csv"\nschema_file = "schema.json"\n'
            f'[server]\naddress = "localhost:{self.port}"\n'
            f"[daemon]\nport = {free_port()}\nmax_task_seconds = 60.0\n"
        )
        (folder / "site.toml").chmod(0o600)
        settings = SiteSettings.load(folder / "site.toml")
        enrol(settings, declared_patients=84)
        replace_file(settings.site.private / POLICY, policy.to_toml().encode())
        certificate = sites.add(self.home, name, (folder / "keys" / f"{name}.csr").read_bytes(), days=30)
        settings.server.certificate.write_bytes(certificate)
        settings.server.ca.write_bytes((self.home.pki / "ca.crt").read_bytes())
        Approvals(settings.daemon.approved).add(Bundle.read(self.bundle), by="test")
        self.sites[name] = settings
        return settings

    def up(self) -> None:
        """Starts the coordinator and waits until Flower knows every site."""
        self._start("coordinator", "server", "up", str(self.home.folder))
        until(lambda: set(self.home.read_registry()) == set(self.home.sites()), seconds=60, what="the coordinator")

    def start_site(self, name: str, **environment: str) -> None:
        """Starts a hospital's daemon, with more in its environment."""
        self._start(name, "client", "run", str(self.sites[name].file), **environment)

    def connect(self, name: str, *, port: int) -> None:
        """Has a hospital connect to another port, from its next start."""
        path = self.sites[name].file
        path.write_text(re.sub(r"localhost:\d+", f"localhost:{port}", path.read_text()))
        self.sites[name] = SiteSettings.load(path)

    def online(self) -> set[str]:
        """Hospitals whose node the SuperLink sees."""
        return {row["site"] for row in site_rows(self.home) if row["state"] == "connected"}

    def wait_for_online(self, names: set[str], *, since: float, seconds: float) -> float:
        """Waits until the nodes of hospitals are alive again; returns the seconds since then."""

        def are_back() -> bool:
            alive = all(self.processes(name, "client.node") for name in names)
            answered = all("SuperNode ID" in self.log(name).rpartition("started again")[2] for name in names)
            return alive and answered and names <= self.online()

        until(are_back, seconds=seconds, what="killed nodes")
        return time.monotonic() - since

    wait = staticmethod(until)

    def all_up(self, **environments: Mapping[str, str]) -> "Federation":
        """Starts everything.

        Args:
            environments: What hospitals have in their environment beside this process's own, by name.
        """
        self.up()
        for name in self.sites:
            self.start_site(name, **environments.get(name, {}))
        until(lambda: self.online() == set(self.sites), seconds=90, what="all hospitals")
        return self

    def _start(self, name: str, *command: str, **more: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
        self._running[name] = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        log.close()

    def end(self, name: str, number: signal.Signals = signal.SIGTERM, *, seconds: float = 30.0) -> tuple[int, float]:
        """Ends a daemon; returns its exit code and how long it took."""
        process = self._running.pop(name)
        started = time.monotonic()
        process.send_signal(number)
        code = process.wait(seconds)
        return code, time.monotonic() - started

    def close(self) -> None:
        """Ends everything that was started."""
        for name in [*self._running]:
            self._running[name].terminate()
        for name in [*self._running]:
            with suppress(subprocess.TimeoutExpired):
                self._running[name].wait(40)
            self._running.pop(name).kill()

    def processes(self, name: str, *words: str) -> list[int]:
        """Ids of a daemon's processes."""
        if name == "coordinator" and not words:
            # A ServerApp does not name the folder on its command line.
            return sorted({*processes(str(self.home.folder)), *started_with("FLWR_HOME", str(self.home.flower))})
        return processes(str(self.home.folder) if name == "coordinator" else str(self.sites[name].file.parent), *words)

    def want(self, run: str, **settings: Scalar) -> None:
        """Wants a run."""
        changed = {name.replace("_", "-"): value for name, value in settings.items()}
        jobs.create(self.home, run, {**HURRIED, "min-sites": len(self.sites), **changed})

    def status(self, run: str) -> dict[str, object]:
        """What the run says of itself."""
        return read_json(self.home.run(run) / "status.json")

    def rounds(self, run: str) -> int:
        """Rounds that are complete."""
        return int(str(self.status(run).get("server_round", 0)))

    def reached(self, run: str, server_round: int, *, seconds: float = 150.0) -> float:
        """Waits until a round is complete."""
        return until(lambda: self.rounds(run) >= server_round, seconds=seconds, what=f"{run}: round {server_round}")

    def training(self, run: str, site: str, *, seconds: float = 150.0) -> None:
        """Waits until a hospital has been asked to train and has not answered yet."""
        path = self.sites[site].site.private / JOURNAL

        def has_begun() -> bool:
            last = next(iter(read(path, last=1)), {})
            return last.get("event") == "instruction" and last.get("kind") == "train"

        until(has_begun, seconds=seconds, what=f"{run}: training at {site}")

    def finished(self, run: str, *, seconds: float = 240.0) -> jobs.Job:
        """Waits for the end of a run."""
        ends = ("done", "failed", "stopped")
        until(lambda: jobs.read(self.home, run).state in ends, seconds=seconds, what=f"the end of {run}")
        return jobs.read(self.home, run)

    def result(self, run: str) -> dict[str, object]:
        """The record of a finished run."""
        return dict(json.loads((self.home.run(run) / "run.json").read_text()))

    def log(self, name: str) -> str:
        """What a daemon has said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

"""The coordinator's daemon: SuperLink, the process that runs its ServerApps, and the proxy, kept alive; sites and runs.

Only the proxy can be reached from other machines. The SuperLink listens on loopback with a database, so that a kill
loses nothing that was complete.
"""

import errno
import logging
import os
import shutil
import signal
import socket
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from flwr.cli.build import build_fab_from_disk

from mcrage.errors import ConfigError, FederationError
from mcrage.files import lock_file, replace_file
from mcrage.supervision import Program, Supervisor, started_with
from server import logs, sites
from server.control import Control
from server.database import require_usable, shortage
from server.home import PROCESS_MARK, CoordinatorSettings, Home, set_environment
from server.jobs import Jobs

APP = Path(__file__).resolve().parent.parent
PACKAGES, FILES = ("mcrage", "client", "server"), ("pyproject.toml", "LICENSE")

_LOG = logging.getLogger("mcrage.daemon")
_LOOK_SECONDS = 1.0
_SITES_SECONDS = 15.0
_PORT_SECONDS = 10.0
_PATIENCE_SECONDS = 60.0
_DATABASE_SECONDS = 1.0
_SUPERLINK, _PROXY = "the SuperLink", "the proxy"


def run_coordinator(home: Home) -> int:
    """Everything that ``python -m server up`` does, until SIGTERM; returns the exit code.

    Raises:
        ConfigError: If the folder or a port is in use, keys are missing, its disk is full, the database is none that
            Flower knows, or nginx refuses its configuration.
    """
    with _alone(home):
        settings = home.settings
        _end_leftovers(home)
        _require_files(home)
        _require_room(home)
        require_usable(home.database)
        for address, name in ((settings.address, "listen"), (("127.0.0.1", settings.superlink_port), "superlink_port")):
            _require_free(address, f"{home.folder / 'coordinator.toml'}: {name}")
        return Coordinator(home, settings, write_bundle(home)).run()


class Coordinator:
    """SuperLink, ServerApps and proxy, and what is done for sites and runs while they go on.

    Args:
        home: The coordinator's folder, which nobody else uses.
        settings: As they are now; a change counts from the next start.
        bundle: The app.

    Raises:
        ConfigError: If nginx refuses its configuration.
    """

    def __init__(self, home: Home, settings: CoordinatorSettings, bundle: bytes) -> None:
        self._home, self._settings = home, settings
        proxy = sites.proxy_of(home, settings)
        proxy.write()
        proxy.check()
        self._listed, self._certificate = self._list(), self._server_certificate()
        self._control = Control(settings.superlink_port, home.pki / "ca.crt")
        self._jobs = Jobs(home, self._control, bundle)
        self._supervisor = Supervisor(programs(home, settings, proxy.command()))
        self._is_recovered, self._is_clean = False, False
        self._next_look, self._next_sites = 0.0, 0.0
        self._done: list[str] = []
        self._problems: dict[str, tuple[float, str]] = {}

    def run(self) -> int:
        """Runs until SIGTERM; returns the exit code."""
        names = ", ".join(self._settings.names)
        _LOG.info("coordinator %s: proxy on %s, SuperLink on loopback", names, self._settings.listen)
        try:
            # The SuperLink ends at once if nobody stays connected to it.
            return self._supervisor.run(each_tick=self._tick, before_end=self._control.close)
        finally:
            _LOG.info("coordinator %s: ended", names)

    def _tick(self) -> None:
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_SECONDS
        self._guarded("certificate", self._look_at_certificate)
        self._guarded("sites", self._look_at_sites)
        self._guarded("runs", self._look_at_runs)
        self._guarded("disk", self._look_at_disk)
        self._guarded("logs", self._look_at_logs)

    def _guarded(self, what: str, look: Callable[[], None]) -> None:
        """What is wrong with one of them is said, once, and keeps nothing else from going on."""
        try:
            look()
        except (FederationError, ConfigError, OSError) as error:
            since, said = self._problems.get(what, (time.monotonic(), ""))
            # The SuperLink takes some seconds to start.
            is_due = not isinstance(error, FederationError) or time.monotonic() - since > _PATIENCE_SECONDS
            if is_due and str(error) != said:
                said = str(error)
                _LOG.error("%s: %s", what, said)
            self._problems[what] = since, said
        else:
            self._problems.pop(what, None)

    def _look_at_certificate(self) -> None:
        """One that was renewed is taken up by all who show it; runs bear that the SuperLink starts anew."""
        certificate = self._server_certificate()
        process_id = self._supervisor.process_id(_PROXY)
        if certificate != self._certificate and process_id is not None:
            sites.proxy_of(self._home, self._settings).reload(process_id)
            self._certificate = certificate
            self._supervisor.restart(_SUPERLINK)
            _LOG.info("the server's certificate was renewed")

    def _look_at_sites(self) -> None:
        """After a change of the list, and now and then: Flower's list could have been changed by hand."""
        listed = self._list()
        if listed == self._listed and time.monotonic() < self._next_sites:
            return
        proxy = sites.proxy_of(self._home, self._settings)
        proxy.render()  # what the proxy would refuse is no key for Flower either
        done = sites.reconcile(self._home, self._control)
        for line in done:
            if line not in self._done:
                _LOG.info("%s", line)
        self._done, self._next_sites = done, time.monotonic() + _SITES_SECONDS
        process_id = self._supervisor.process_id(_PROXY)
        if listed != self._listed and process_id is not None:
            proxy.reload(process_id)
            self._listed = listed

    def _look_at_runs(self) -> None:
        if not self._is_recovered:
            self._jobs.recover()
            self._is_recovered = True
        is_busy = self._jobs.tick(hindrance=_shortage(self._home))
        self._is_clean = not is_busy and (self._is_clean or forget_updates(self._home.database))

    def _look_at_disk(self) -> None:
        if problem := _shortage(self._home):
            raise ConfigError(f"{problem}; runs wait until there is room")

    def _look_at_logs(self) -> None:
        process_id = self._supervisor.process_id(_PROXY)
        if process_id is not None:
            logs.rotate(self._home.proxy, process_id)

    def _list(self) -> bytes:
        return self._home.list_of_sites.read_bytes()

    def _server_certificate(self) -> bytes:
        return (self._home.pki / "server.crt").read_bytes()


@contextmanager
def _alone(home: Home) -> Iterator[None]:
    lock = lock_file(home.folder / "state" / "up.lock")
    if lock is None:
        raise ConfigError(f"a coordinator is running in '{home.folder}' already")
    try:
        yield
    finally:
        os.close(lock)


def _end_leftovers(home: Home) -> None:
    """Ends what a coordinator that was killed has left: Flower's ServerApps would wait for ever for their SuperLink."""
    for process_id in started_with(PROCESS_MARK, str(home.folder.resolve())):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process_id, signal.SIGKILL)
            _LOG.warning("process %d of an earlier coordinator was ended", process_id)


def _require_files(home: Home) -> None:
    needed = [home.pki / name for name in ("ca.crt", "server.crt", "server.key")] + [home.secret]
    missing = [f"'{path}' is not there; restore it from a backup" for path in needed if not path.is_file()]
    if missing:
        raise ConfigError("\n".join(missing))


def _shortage(home: Home) -> str:
    return shortage(home.database.parent, home.folder / "runs")


def _require_room(home: Home) -> None:
    if problem := _shortage(home):
        raise ConfigError(f"{problem}; make room, then start it again")


def _require_free(address: tuple[str, int], name: str) -> None:
    """Raises unless a program could listen there: it would be started again and again, and its reason stay in a log."""
    host, port = address
    deadline = time.monotonic() + _PORT_SECONDS  # what a killed coordinator had started takes a moment to end
    while True:
        try:
            with socket.create_server(address, family=socket.AF_INET6 if ":" in host else socket.AF_INET):
                return
        except OSError as error:
            if time.monotonic() > deadline or error.errno != errno.EADDRINUSE:
                why = os.strerror(error.errno or 0)
                raise ConfigError(f"{name}: nothing can listen on port {port} of {host}: {why}") from None
        time.sleep(0.2)


def forget_updates(database: Path) -> bool:
    """Overwrites what sites have sent to runs that are over; returns whether it could.

    Flower deletes such rows itself, but SQLite leaves their bytes in free pages and in the write-ahead log. The
    SuperLink may use the database meanwhile; if it holds it for long, nothing is done.
    """
    try:
        where = f"{database.as_uri()}?mode=rw"
        with closing(sqlite3.connect(where, uri=True, timeout=_DATABASE_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute("VACUUM")
            is_busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.Error:
        return False
    return not is_busy


def programs(home: Home, settings: CoordinatorSettings, nginx: list[str]) -> list[Program]:
    """What a coordinator runs."""
    environment = set_environment(home)
    bin_folder, ca = Path(sys.executable).parent, str(home.pki / "ca.crt")
    environment["PATH"] = f"{bin_folder}{os.pathsep}{environment.get('PATH', '')}"
    superlink = [
        str(bin_folder / "flower-superlink"),
        *("--host", "127.0.0.1", "--port", str(settings.superlink_port)),
        *("--ssl-ca-certfile", ca, "--ssl-certfile", str(home.pki / "server.crt")),
        *("--ssl-keyfile", str(home.pki / "server.key"), "--enable-supernode-auth"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(home.secret)),
        *("--database", str(home.database), "--disable-runtime-dependency-installation"),
    ]
    superexec = [
        str(bin_folder / "flower-superexec"),
        *("--runtime-api-address", f"127.0.0.1:{settings.superlink_port}", "--root-certificates", ca),
        *("--superexec-auth-secret-file", str(home.secret)),
    ]
    return [
        # Its database outlives a kill, and it would wait long for those who stay connected.
        Program(name=_SUPERLINK, command=superlink, environment=environment, grace_seconds=3.0),
        Program(name="the ServerApps", command=superexec, environment=environment, orphan_signal=signal.SIGTERM),
        # Killed, nginx's master would leave its workers behind.
        Program(name=_PROXY, command=nginx, environment=environment, orphan_signal=signal.SIGTERM),
    ]


def write_bundle(home: Home) -> bytes:
    """The app that is installed here as one file, which hospitals approve by its SHA-256."""
    # Of a copy: Flower goes through all that lies beside these files, such as a whole environment, for seconds.
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what Flower calls
        for package in PACKAGES:
            shutil.copytree(APP / package, Path(name, package), ignore=shutil.ignore_patterns("__pycache__"))
        for file in FILES:
            shutil.copy(APP / file, name)
        content: bytes = build_fab_from_disk(Path(name))
    if not home.bundle.is_file() or home.bundle.read_bytes() != content:
        replace_file(home.bundle, content, mode=0o644)
    return content

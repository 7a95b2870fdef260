"""The coordinator's daemon: what keeps it from starting, and all of its real programs at once."""

import http.client
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.cli.build import build_fab_from_disk
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.pki import Authority, site_request
from mcrage.signing import as_extension, public_key
from server import coordinator, jobs, sites
from server.control import Control
from server.coordinator import APP, FILES, PACKAGES, forget_updates, programs, run_coordinator, write_bundle
from server.home import CoordinatorSettings, Home, write_json
from server.jobs import Jobs
from server.logs import MOST_BYTES
from server.proxy import find_nginx
from simulations.deployed import free_port, until

NewHome = Callable[[Path], Home]
SuperLinkOf = Callable[[Home], AbstractContextManager[Control]]

UPDATE = b"update of a hospital " * 500


@pytest.fixture
def home(tmp_path: Path, new_home: NewHome) -> Home:
    return new_home(tmp_path / "home")


def refusal(home: Home) -> str:
    """Why it does not start; it leaves the folder to the next one."""
    with pytest.raises(ConfigError) as refused:
        run_coordinator(home)
    lock = lock_file(home.folder / "state" / "up.lock")
    assert lock is not None
    os.close(lock)
    return str(refused.value)


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_is_what_flower_itself_would_build(home: Home, tmp_path: Path) -> None:
    """Of the same files: its own search goes through all that lies beside them."""
    content = write_bundle(home)
    written = home.bundle.stat()
    assert home.bundle.read_bytes() == content
    assert stat.S_IMODE(written.st_mode) == 0o644
    app = tmp_path / "app"
    for package in PACKAGES:
        shutil.copytree(APP / package, app / package)
    for name in (*FILES, ".gitignore"):
        shutil.copy(APP / name, app)
    (app / "data").mkdir()
    (app / "data" / "patients.json").write_text("{}")
    assert build_fab_from_disk(app) == content
    assert write_bundle(home) == content
    assert home.bundle.stat() == written, "hospitals need not approve it anew"


def test_a_folder_has_one_coordinator(home: Home) -> None:
    lock = lock_file(home.folder / "state" / "up.lock")
    assert lock is not None
    with pytest.raises(ConfigError, match=f"^a coordinator is running in '{home.folder}' already$"):
        run_coordinator(home)
    os.close(lock)


@pytest.mark.parametrize("name", ["pki/ca.crt", "pki/server.crt", "pki/server.key", "state/runtime.secret"])
def test_a_file_that_is_missing_is_told_before_anything_is_started(home: Home, name: str) -> None:
    (home.folder / name).unlink()
    assert refusal(home) == f"'{home.folder / name}' is not there; restore it from a backup"


def test_all_missing_keys_are_told_at_once(home: Home) -> None:
    shutil.rmtree(home.pki)
    assert len(refusal(home).splitlines()) == 3


@pytest.mark.parametrize(("key", "place"), [("listen", 0), ("superlink_port", 1)])
def test_a_port_that_is_in_use_is_told_before_anything_is_started(
    home: Home, monkeypatch: pytest.MonkeyPatch, key: str, place: int
) -> None:
    monkeypatch.setattr(coordinator, "_PORT_SECONDS", 0.3)
    port = (home.settings.address[1], home.settings.superlink_port)[place]
    with socket.create_server(("127.0.0.1", port)):
        told = refusal(home)
    where = f"{home.folder / 'coordinator.toml'}: {key}"
    assert told == f"{where}: nothing can listen on port {port} of 127.0.0.1: Address already in use"


def test_an_address_of_another_machine_is_told(tmp_path: Path) -> None:
    named = CoordinatorSettings(names=("localhost",), listen="192.0.2.1:8443", superlink_port=free_port())
    home = Home.create(tmp_path / "home", named)
    Authority.create(home.pki, name="test").issue_server(["localhost"])
    assert refusal(home).endswith(
        "listen: nothing can listen on port 8443 of 192.0.2.1: Cannot assign requested address"
    )


def test_a_port_may_take_a_moment_to_become_free(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed coordinator had started ends after it."""
    monkeypatch.setattr(coordinator, "_PORT_SECONDS", 10.0)
    taken = socket.create_server(("127.0.0.1", home.settings.superlink_port))
    holder = subprocess.Popen(["sleep", "0.5"], pass_fds=[taken.fileno()])
    taken.close()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("server.proxy._PLACES_WITHOUT_PATH", "")
    assert refusal(home).startswith("nginx is not installed"), "so the ports were free in the end"
    assert holder.wait() == 0


def test_what_an_earlier_coordinator_left_is_ended_and_nothing_else(home: Home) -> None:
    """Such as a ServerApp, which would wait for its SuperLink; a shell with the same FLWR_HOME is somebody's own."""
    (home.pki / "ca.crt").unlink()
    environment = programs(home, home.settings, ["nginx"])[0].environment
    left = subprocess.Popen(["sleep", "60"], env=dict(environment))
    shell = subprocess.Popen(["sleep", "60"], env=os.environ | {"FLWR_HOME": str(home.flower)})
    refusal(home)
    assert left.wait(5) == -signal.SIGKILL
    assert shell.poll() is None
    shell.kill()
    shell.wait()


def test_without_nginx_it_is_told_what_to_install(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("server.proxy._PLACES_WITHOUT_PATH", "")
    assert refusal(home) == "nginx is not installed; on Debian or Ubuntu: apt install nginx-light"


def test_a_key_that_nginx_refuses_is_told_in_its_words(home: Home) -> None:
    find_nginx()
    (home.pki / "server.key").write_text("no key")
    told = refusal(home)
    assert told.startswith("nginx refuses its configuration: ")
    assert "\n" not in told


def test_secrets_stand_on_no_command_line_and_in_no_environment(home: Home) -> None:
    secrets = [home.secret.read_bytes().hex(), "PRIVATE KEY"]
    for program in programs(home, home.settings, ["nginx"]):
        text = " ".join([*program.command, *program.environment.values()])
        assert not any(secret in text for secret in secrets)


@pytest.fixture(scope="module")
def live_home(tmp_path_factory: pytest.TempPathFactory, new_home: NewHome) -> Home:
    return new_home(tmp_path_factory.mktemp("superlink") / "home")


@pytest.fixture(scope="module")
def superlink(live_home: Home, superlink_of: SuperLinkOf) -> Iterator[Control]:
    with superlink_of(live_home) as control:
        yield control


def test_a_real_superlink_takes_a_run_and_gives_it_up(live_home: Home, superlink: Control) -> None:
    made = Jobs(live_home, superlink, write_bundle(live_home))
    jobs.create(live_home, "trial", {"dp": True, "dp-epsilon": 3.0})
    made.tick()
    first = jobs.read(live_home, "trial").flower_run
    assert superlink.status(first) == "pending"
    anew = Jobs(live_home, superlink, live_home.bundle.read_bytes())
    anew.recover()
    assert superlink.status(first) == "finished:stopped"
    anew.tick()
    second = jobs.read(live_home, "trial").flower_run
    assert second != first
    jobs.want(live_home, "trial", "stop")
    anew.tick()
    assert superlink.status(second) == "finished:stopped"


def test_a_run_that_the_superlink_does_not_know_any_more_goes_on(live_home: Home, superlink: Control) -> None:
    """Its database may have been lost."""
    jobs.create(live_home, "lost", {})
    write_json(live_home.run("lost") / "job.json", {"state": "running", "flower_run": 12345})
    made = Jobs(live_home, superlink, write_bundle(live_home))
    made.recover()
    made.tick()
    assert superlink.status(jobs.read(live_home, "lost").flower_run) == "pending"
    jobs.want(live_home, "lost", "stop")
    made.tick()


def bytes_left(database: Path) -> int:
    return sum(path.read_bytes().count(b"update of a hospital") for path in database.parent.glob(f"{database.name}*"))


def put_update(database: Path, run_id: int) -> None:
    """As the SuperLink does with a piece of what a hospital sends."""
    signed = run_id - 2**64 if run_id >= 2**63 else run_id
    with closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as connection:
        connection.execute("INSERT INTO objects VALUES (?, ?, 1, 0)", ("of-a-hospital", UPDATE))
        connection.execute("INSERT INTO run_objects VALUES (?, ?)", (signed, "of-a-hospital"))


def test_what_flower_deletes_is_still_there_until_it_is_forgotten(live_home: Home, superlink: Control) -> None:
    run_id = superlink.start(write_bundle(live_home), {"run-name": "updates"})
    put_update(live_home.database, run_id)
    superlink.stop(run_id)
    with closing(sqlite3.connect(live_home.database)) as connection:
        assert connection.execute("SELECT count(*) FROM objects").fetchone() == (0,)
    assert bytes_left(live_home.database) > 0
    assert forget_updates(live_home.database)
    assert bytes_left(live_home.database) == 0
    assert superlink.status(run_id) == "finished:stopped", "the SuperLink goes on with the same database"
    assert superlink.register(key_header(site_request("hosp-a").key_pem), "hosp-a")


def test_a_database_that_is_in_use_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where SQLite does not overwrite what it deletes, as most builds do not, it is overwritten too."""
    monkeypatch.setattr(coordinator, "_DATABASE_SECONDS", 0.05)
    database = tmp_path / "a b?.sqlite"
    assert not forget_updates(database)
    assert not database.exists()
    with closing(sqlite3.connect(database, isolation_level=None)) as of_superlink:
        for order in ("PRAGMA secure_delete = OFF", "PRAGMA journal_mode = WAL", "CREATE TABLE objects (content)"):
            of_superlink.execute(order)
        of_superlink.execute("INSERT INTO objects VALUES (?)", (UPDATE,))
        of_superlink.execute("DELETE FROM objects")
        of_superlink.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert bytes_left(database) > 0
        of_superlink.execute("BEGIN IMMEDIATE")
        assert not forget_updates(database)
        of_superlink.execute("COMMIT")
        assert forget_updates(database)
        assert bytes_left(database) == 0
        assert of_superlink.execute("SELECT count(*) FROM objects").fetchone() == (0,)


def key_header(key_pem: bytes) -> str:
    key = load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return b64encode(public_key_to_bytes(key.public_key())).decode()


class Daemon:
    """``python -m server up`` of a folder, as a process."""

    def __init__(self, home: Home) -> None:
        self.home, self.log = home, home.folder.parent / "log"
        command = [sys.executable, "-m", "server", "up", str(home.folder)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=APP, stdout=log, stderr=log, start_new_session=True)

    def programs(self) -> list[str]:
        """Command lines of the processes that belong to it."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return [line for line in found if str(self.home.folder) in line]

    def ask(self, context: ssl.SSLContext, key: str) -> str:
        """Who answers a site: ``app``, or nginx with a status."""
        connection = http.client.HTTPSConnection(*self.home.settings.address, context=context, timeout=10)
        with closing(connection), suppress(OSError):
            connection.request("POST", "/v1/fleet/get-run", b"", {"flwr-public-key": key})
            answer = connection.getresponse()
            answer.read()
            is_of_app = answer.headers.get("content-type", "").startswith("application/")
            return "app" if is_of_app else str(answer.status)
        return "nobody"


@pytest.fixture
def daemon(home: Home) -> Iterator[Daemon]:
    find_nginx()
    made = Daemon(home)
    yield made
    if made.process.poll() is None:
        made.process.terminate()
        made.process.wait(40)


def shown(port: int) -> int:
    """Serial number of the certificate that a server shows."""
    return x509.load_pem_x509_certificate(ssl.get_server_certificate(("127.0.0.1", port)).encode()).serial_number


@pytest.mark.slow
def test_a_running_coordinator_takes_up_sites_runs_and_certificates_and_ends_without_a_trace(
    daemon: Daemon, tmp_path: Path
) -> None:
    home, (_, port) = daemon.home, daemon.home.settings.address
    made, context = site_request("hosp-a", as_extension(public_key(bytes(32)))), ssl._create_unverified_context()
    (tmp_path / "site.pem").write_bytes(made.key_pem + sites.add(home, "hosp-a", made.request_pem, days=30))
    context.load_cert_chain(tmp_path / "site.pem")
    asked = lambda: daemon.ask(context, key_header(made.key_pem))  # noqa: E731

    until(lambda: asked() == "app", seconds=60, what="a site that was added while it starts")
    with pytest.raises(ConfigError, match="a coordinator is running in"):
        run_coordinator(home)

    home.list_of_sites.write_text("{")
    until(lambda: "sites.json' cannot be used" in daemon.log.read_text(), seconds=10, what="word of a damaged list")
    assert asked() == "app", "the list before it stays in force"
    home.write_sites({})
    until(lambda: asked() == "401", seconds=20, what="the end of a site that was removed")
    assert home.read_registry() == {}

    logs = [home.proxy / name for name in ("access.log", "error.log")]
    for log in logs:
        os.truncate(log, MOST_BYTES + 1)  # nginx goes on behind the hole
    until(lambda: all(log.with_name(f"{log.name}.00001").exists() for log in logs), seconds=20, what="its logs anew")
    until(lambda: asked() == "401" and logs[0].exists() and logs[0].stat().st_size > 0, seconds=20, what="a line in it")

    jobs.create(home, "trial", {})
    until(lambda: jobs.read(home, "trial").state == "running", seconds=20, what="a run")
    put_update(home.database, jobs.read(home, "trial").flower_run)
    assert bytes_left(home.database) > 0
    jobs.want(home, "trial", "stop")
    until(lambda: bytes_left(home.database) == 0, seconds=20, what="the end of what sites sent")

    renewed = Authority.open(home.pki).renew().serial
    for each in (port, home.settings.superlink_port):
        until(lambda each=each: takes(each) and shown(each) == int(renewed, 16), seconds=40, what="a new certificate")

    started = time.monotonic()
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(30) == 0
    assert time.monotonic() - started < 10
    until(lambda: daemon.programs() == [], seconds=2, what="the end of all that it had started")
    assert not takes(port)
    log = daemon.log.read_text()
    assert log.count("cannot be used") == 1, "a problem is told once"
    assert "PRIVATE KEY" not in log
    assert home.secret.read_bytes().hex() not in log
    of_others = [path for path in (home.folder / "state").iterdir() if path.stat().st_mode & 0o077]
    assert of_others == []


def takes(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True

"""A real nginx whose logs are begun anew while it is asked."""

import http.client
import json
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from mcrage.errors import ConfigError
from mcrage.pki import Authority, describe, site_request
from server.logs import NUM_OLD, files_of, lines_of, rotate
from server.proxy import Proxy, ProxySite, bytes_by_site, counted_since
from simulations.deployed import free_port

KEY = "A" * 64


class Nginx(NamedTuple):
    proxy: Proxy
    process: "subprocess.Popen[bytes]"
    context: ssl.SSLContext

    def ask(self) -> None:
        """A request of site alpha, of some 3,000 bytes; nobody is behind the proxy."""
        connection = http.client.HTTPSConnection(*self.proxy.listen, context=self.context, timeout=30)
        with closing(connection):
            connection.request("POST", "/v1/fleet/get-run", bytes(3000), {"flwr-public-key": KEY})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 502

    def rotate(self, most_bytes: int = 1) -> None:
        rotate(self.proxy.folder, self.process.pid, most_bytes=most_bytes)

    def has_begun_anew(self) -> bool:
        """Whether it has opened its logs again."""
        return all((self.proxy.folder / name).exists() for name in ("access.log", "error.log"))


def until(is_so: object, *, seconds: float = 30.0) -> None:
    assert callable(is_so)
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[Nginx]:
    if not (shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")):
        pytest.skip("nginx is not installed (apt install nginx-light)")
    authority, made = Authority.create(tmp_path / "ca", name="Test"), site_request("alpha")
    authority.issue_server(["localhost"])
    certificate = authority.issue_site(made.request_pem, site="alpha", days=1)
    (tmp_path / "site.pem").write_bytes(certificate + made.key_pem)
    context = ssl._create_unverified_context()
    context.load_cert_chain(tmp_path / "site.pem")
    proxy = Proxy(
        folder=tmp_path / "nginx",
        listen=("127.0.0.1", free_port()),
        upstream_port=free_port(),
        server_certificate=authority.folder / "server.crt",
        server_key=authority.folder / "server.key",
        ca=authority.folder / "ca.crt",
        sites=(ProxySite("alpha", (describe(certificate).serial,), (KEY,)),),
    )
    proxy.write()
    process = subprocess.Popen(proxy.command(), start_new_session=True)
    until(lambda: (proxy.folder / "nginx.pid").exists())
    yield Nginx(proxy, process, context)
    process.terminate()
    process.wait(30)


def test_no_line_is_lost_while_logs_are_begun_anew_and_bytes_count_over_all_of_them(nginx: Nginx) -> None:
    log, num_requests = nginx.proxy.access_log, 60
    for number in range(num_requests):
        nginx.ask()
        if number % 12 == 11:
            until(nginx.has_begun_anew)
            nginx.rotate()  # the newest line may still have to be written: that is done after the answer
    until(nginx.has_begun_anew)
    assert len(files_of(log)) == 1 + NUM_OLD == 6
    until(lambda: len([*lines_of(log)]) == num_requests)
    assert sum(len(path.read_text().splitlines()) for path in files_of(log)) == num_requests
    ((site, (came, went)),) = bytes_by_site(log).items()
    assert site == "alpha"
    assert num_requests * 3000 < came < num_requests * 3500
    assert went > num_requests * 100
    assert len(files_of(nginx.proxy.folder / "error.log")) > 1, "each of them says that nobody is behind the proxy"


def test_old_ones_fall_out_and_it_is_said_since_when_is_counted(nginx: Nginx) -> None:
    log = nginx.proxy.access_log
    for _ in range(NUM_OLD + 3):
        until(nginx.has_begun_anew)
        until(lambda: log.stat().st_size > 0 or nginx.ask())
        nginx.rotate()
    until(nginx.has_begun_anew)
    assert [path.name for path in files_of(log)][:-1] == [f"access.log.{number:05d}" for number in range(4, 9)]
    entries = [json.loads(line) for line in lines_of(log)]
    since = counted_since(log)
    assert since is not None
    assert since == datetime.fromisoformat(entries[0]["time"]) <= datetime.now(UTC)
    assert bytes_by_site(log)["alpha"][0] == sum(entry["bytes_in"] for entry in entries)


def test_a_log_that_is_not_large_stays_and_one_that_was_removed_is_begun_again(nginx: Nginx) -> None:
    log = nginx.proxy.access_log
    nginx.ask()
    until(lambda: log.stat().st_size > 0)
    before = log.stat().st_ino
    nginx.rotate(most_bytes=log.stat().st_size)
    assert [path.stat().st_ino for path in files_of(log)] == [before]
    log.replace(log.with_name("access.log.00001"))  # as by a coordinator that was killed before it told nginx
    assert len([*lines_of(log)]) == 1
    nginx.rotate(most_bytes=10**9)
    until(nginx.has_begun_anew)
    nginx.ask()
    until(lambda: len([*lines_of(log)]) == 2)


def test_a_reader_meets_every_line_once_whatever_is_set_aside_meanwhile(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    (tmp_path / "access.log.00009").write_text("1\n")
    (tmp_path / "access.log.00010").write_text("2\n")
    (tmp_path / "access.log.gz").write_text("of somebody else")
    log.write_text("3\n")
    reader = lines_of(log)
    read = [next(reader)]
    log.replace(tmp_path / "access.log.00011")
    (tmp_path / "access.log.00009").unlink()
    log.write_text("4\n")
    assert [*read, *reader] == ["1\n", "2\n", "3\n"]
    assert [*lines_of(log)] == ["2\n", "3\n", "4\n"]


def test_a_log_with_no_entry_counts_nothing_and_one_that_is_not_there_is_told(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    assert files_of(log) == []
    with pytest.raises(ConfigError, match="No such file"):
        counted_since(log)
    log.write_bytes(bytes(100))
    assert (counted_since(log), bytes_by_site(log)) == (None, {})


def test_a_program_that_has_not_written_its_id_gets_no_signal(tmp_path: Path) -> None:
    """One that does not listen yet would be ended by it."""
    (tmp_path / "access.log").write_text("much")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    for content in (None, "", "12\n", f"{process.pid}1\n", "\udcff".encode(errors="surrogateescape").decode("latin-1")):
        with suppress(FileNotFoundError):
            (tmp_path / "nginx.pid").unlink()
        if content is not None:
            (tmp_path / "nginx.pid").write_text(content, encoding="latin-1")
        rotate(tmp_path, process.pid, most_bytes=1)
    assert process.poll() is None
    assert [path.name for path in files_of(tmp_path / "access.log")] == ["access.log"]
    (tmp_path / "nginx.pid").write_text(f"{process.pid}\n")
    rotate(tmp_path, process.pid, most_bytes=1)
    assert process.wait(30) == -signal.SIGUSR1
    rotate(tmp_path, process.pid, most_bytes=1)  # and it may be gone by then

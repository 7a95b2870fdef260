"""A real SuperLink, bare and behind the proxy, and servers with one fault each, looked at from outside."""

import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from flwr.proto.control_pb2 import ListNodesResponse, ListRunsResponse

from mcrage.errors import ConfigError
from mcrage.pki import Authority, describe, site_request
from server.doctor import ASKED, Probe, is_production, probe
from server.proxy import Proxy, ProxySite
from simulations.deployed import free_port

Files = dict[str, Path | None]
NOTHING: Files = {"ca": None, "certificate": None, "key": None}


class Servers(NamedTuple):
    """Ports of one SuperLink with TLS, of the proxy in front of it, and of a SuperLink without TLS."""

    bare: int
    proxy: int
    insecure: int
    log: Path
    authority: Authority
    site: Files

    @property
    def stranger(self) -> Files:
        return NOTHING | {"ca": self.authority.folder / "ca.crt"}


@contextmanager
def running(command: list[Any], **settings: Any) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([str(word) for word in command], start_new_session=True, **settings)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    while process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.02)


@contextmanager
def superlink(folder: Path, port: int, *options: Any) -> Iterator["subprocess.Popen[bytes]"]:
    folder.mkdir()
    (folder / "secret").write_bytes(os.urandom(32))
    command = [
        *(Path(sys.executable).parent / "flower-superlink", "--host", "127.0.0.1", "--port", port, *options),
        *("--isolation", "process", "--superexec-auth-secret-file", folder / "secret"),
        *("--database", folder / "state.db", "--disable-runtime-dependency-installation"),
    ]
    offline = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    with (
        (folder / "log").open("wb") as log,
        running(command, env=os.environ | offline, stdout=log, stderr=log) as process,
    ):
        yield process


def site_of(authority: Authority, folder: Path) -> tuple[Files, ProxySite]:
    made = site_request("alpha")
    certificate = authority.issue_site(made.request_pem, site="alpha", days=1)
    (folder / "alpha.crt").write_bytes(certificate)
    (folder / "alpha.key").write_bytes(made.key_pem)
    files = {"ca": authority.folder / "ca.crt", "certificate": folder / "alpha.crt", "key": folder / "alpha.key"}
    return files, ProxySite("alpha", (describe(certificate).serial,), (b64encode(bytes(24)).decode(),))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("authority") / "ca", name="Test")
    made.issue_server(["localhost"])
    return made


@pytest.fixture(scope="module")
def servers(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    if shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") is None:
        pytest.skip("nginx is not installed (apt install nginx-light)")
    folder, bare, front, insecure = tmp_path_factory.mktemp("servers"), free_port(), free_port(), free_port()
    ca, certificate, key = (authority.folder / name for name in ("ca.crt", "server.crt", "server.key"))
    tls = ("--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-supernode-auth")
    files, entry = site_of(authority, folder)
    proxy = Proxy(
        folder=folder / "nginx",
        listen=("127.0.0.1", front),
        upstream_port=bare,
        server_certificate=certificate,
        server_key=key,
        ca=ca,
        sites=(entry,),
    )
    proxy.write()
    with (
        superlink(folder / "insecure", insecure, "--insecure") as first,
        superlink(folder / "bare", bare, *tls) as second,
        running(proxy.command()) as third,
    ):
        for port, process in ((insecure, first), (bare, second), (front, third)):
            wait_for(port, process)
        yield Servers(bare, front, insecure, folder / "bare" / "log", authority, files)


def ask(port: int, files: Files, **settings: Any) -> list[Probe]:
    return probe(f"127.0.0.1:{port}", **files, **settings)


def failed(probes: list[Probe]) -> list[str]:
    return [each.name for each in probes if not each.is_ok]


def test_a_superlink_behind_the_proxy_is_production_and_hears_nothing(servers: Servers) -> None:
    before = servers.log.read_text()
    for files, number in ((servers.stranger, 4 + 2 * len(ASKED)), (servers.site, 5 + 3 * len(ASKED))):
        probes = ask(servers.proxy, files)
        assert failed(probes) == []
        assert is_production(probes)
        assert len(probes) == number
        assert all(str(each).startswith("ok    ") and "\n" not in str(each) for each in probes)
    assert servers.log.read_text() == before


@pytest.mark.parametrize("who", ["stranger", "site"])
def test_a_bare_superlink_is_not_production_and_every_open_path_is_named(servers: Servers, who: str) -> None:
    probes = ask(servers.bare, getattr(servers, who))
    assert not is_production(probes)
    open_to = ["a stranger", *(["a site without its node key"] if who == "site" else [])]
    answered = {f"{method} https {path} as {asker}" for method, path in ASKED for asker in open_to}
    assert {name for name in failed(probes) if "https" in name} == answered
    line = next(str(each) for each in probes if "list-runs" in each.name)
    assert line.startswith(
        "FAIL  POST https /v1/control/list-runs as a stranger: 415 by uvicorn (application/json); let"
    )


def test_a_superlink_without_tls_is_not_production(servers: Servers) -> None:
    probes = ask(servers.insecure, servers.stranger)
    assert failed(probes) == ["certificate for 127.0.0.1", *(f"{way} http {path} as a stranger" for way, path in ASKED)]
    assert "no TLS" in str(probes[0])
    assert not is_production(probes)


def test_asking_changes_nothing_on_a_server_that_is_open(servers: Servers) -> None:
    def listed(call: str) -> bytes:
        url, kind = f"https://127.0.0.1:{servers.bare}/v1/control/{call}", {"content-type": "application/protobuf"}
        trust = ssl.create_default_context(cafile=servers.authority.folder / "ca.crt")
        answer = httpx.post(url, headers=kind, verify=trust, trust_env=False)
        assert answer.status_code == 200
        return answer.content

    ask(servers.bare, servers.site)
    assert not ListNodesResponse.FromString(listed("list-nodes")).nodes_info
    assert not ListRunsResponse.FromString(listed("list-runs")).run_dict


def test_the_certificate_of_another_authority_is_not_to_be_trusted_nor_accepted(
    servers: Servers, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "ca", name="Test")
    files, _ = site_of(other, tmp_path)
    probes = ask(servers.proxy, files)
    assert failed(probes) == ["certificate for 127.0.0.1", "the site's certificate"]
    assert not is_production(probes)
    assert failed(ask(servers.proxy, NOTHING)) == ["certificate for 127.0.0.1"]


class Imitation(BaseHTTPRequestHandler):
    """Answers as the proxy does, but for one fault."""

    status, kind, clock, name = 400, "text/html", timedelta(0), "nginx"

    def do_GET(self) -> None:
        self.send_response_only(self.status)
        self.send_header("Server", self.name)
        self.send_header("Date", format_datetime(datetime.now(UTC) + self.clock, usegmt=True))
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815


@contextmanager
def imitation(
    authority: Authority, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2, host: str = "127.0.0.1", **fault: Any
) -> Iterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_cert_chain(authority.folder / "server.crt", authority.folder / "server.key")

    class Server(ThreadingHTTPServer):
        def get_request(self) -> tuple[socket.socket, Any]:
            plain, address = super().get_request()
            return context.wrap_socket(plain, server_side=True), address

    with Server((host, 0), type("Faulty", (Imitation,), fault)) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield server.server_port
        server.shutdown()


PATHS = [f"{method} https {path} as a stranger" for method, path in ASKED]


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        ({}, []),
        ({"version": ssl.TLSVersion.TLSv1_1}, ["TLS 1.1"]),
        ({"version": ssl.TLSVersion.TLSv1}, ["TLS 1.0", "TLS 1.1"]),
        ({"clock": timedelta(seconds=-9)}, ["clock"]),
        ({"clock": timedelta(seconds=9)}, ["clock"]),
        *(({"status": status}, PATHS) for status in (200, 302, 500, 502)),
        ({"kind": "application/json; charset=utf-8"}, PATHS),
        ({"kind": "application/protobuf"}, PATHS),
        ({"name": "uvicorn"}, PATHS),
    ],
    ids=str,
)
def test_each_fault_is_found_and_nothing_else(authority: Authority, fault: dict[str, Any], names: list[str]) -> None:
    with imitation(authority, **fault) as port:
        probes = ask(port, NOTHING | {"ca": authority.folder / "ca.crt"})
    assert failed(probes) == names
    assert is_production(probes) == (not names)
    assert all(bool(each.remedy) != each.is_ok for each in probes)


@pytest.mark.parametrize(
    ("issue", "seen"),
    [
        (lambda ca: ca.issue_server(["localhost"], days=3), "days left"),
        (lambda ca: ca.issue_server(["localhost"], days=1, at=datetime.now(UTC) - timedelta(days=2)), "expired"),
    ],
)
def test_a_certificate_that_ends_soon_or_has_ended_is_found(
    tmp_path: Path, issue: Callable[[Authority], object], seen: str
) -> None:
    authority = Authority.create(tmp_path / "ca", name="Test")
    issue(authority)
    with imitation(authority) as port:
        probes = ask(port, NOTHING | {"ca": authority.folder / "ca.crt"})
    assert failed(probes) == ["certificate for 127.0.0.1"]
    assert seen in str(probes[0])


def test_a_certificate_for_another_name_is_found(authority: Authority) -> None:
    with imitation(authority, host="127.0.0.2") as port:
        probes = probe(f"127.0.0.2:{port}", **NOTHING | {"ca": authority.folder / "ca.crt"})
    assert failed(probes) == ["certificate for 127.0.0.2"]
    assert "certificate is not valid for '127.0.0.2'" in str(probes[0])


def test_a_server_that_cannot_be_reached_is_one_clear_line(authority: Authority) -> None:
    port = free_port()
    probes = ask(port, NOTHING)
    assert [str(each) for each in probes] == [
        f"FAIL  reach 127.0.0.1:{port}: Connection refused; "
        "check the address, that the server runs, and the firewalls in between"
    ]
    assert not is_production(probes)
    assert not is_production([])


def test_a_server_that_says_nothing_is_not_waited_for_at_every_question() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        probes = ask(silent.getsockname()[1], NOTHING, timeout_seconds=0.2)
    assert time.monotonic() - started < 5
    assert len(probes) == 6
    assert not is_production(probes)
    assert "no answer within 0.2 s" in str(probes[-1])


@pytest.mark.parametrize(
    "address", ["", "host", "host:", "host:0", "host:99999", "host:x", "u@host:1", "host:1/x", ":1"]
)
def test_what_is_no_address_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(ConfigError, match="is not an address") as refused:
        probe(address, **NOTHING)
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_used_are_refused_in_one_line(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.folder / "server.crt", authority.folder / "ca.key"
    for files, words in (
        ({"ca": tmp_path / "missing"}, "No such file"),
        ({"ca": key}, "not a certificate that can be read"),
        ({"certificate": certificate}, "one of them is missing"),
        ({"certificate": certificate, "key": key}, "not a certificate and its key"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            probe("127.0.0.1:1", **NOTHING | files)
        assert "\n" not in str(refused.value)

"""The real nginx in front of a real SuperLink, asked by its sites, by other sites and by strangers."""

import http.client
import json
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from flwr.proto import control_pb2, fleet_pb2, node_pb2
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from mcrage.errors import ConfigError
from mcrage.pki import Authority, describe, site_request
from server import proxy as proxy_module
from server.proxy import FLEET_PATHS, Proxy, ProxySite, bytes_by_site, find_nginx
from simulations.deployed import free_port

PATH = "/v1/fleet/get-run"
PROTOBUF = {"Content-Type": "application/protobuf"}
POSTS = [
    *(f"/v1/control/{call}" for call in ("list-runs", "start-run", "register-node", "list-nodes")),
    *(f"/v1/runtime/{call}" for call in ("acquire-task", "push-messages", "pull-task-input")),
    *(f"/v1/fleet/{call}" for call in ("register-node", "unregister-node", "", "GET-RUN", "get-run/", "get%2drun")),
    *(f"/v1/fleet/{trick}/control/list-runs" for trick in ("..", "%2e%2e", "%252e%252e", "get-run/../..", "..%2f..")),
    *(PATH + trick for trick in ("?x=1", "%00", "%0d%0aX:1", ";/../../control/list-runs")),
    *("//v1/control/list-runs", "/V1/CONTROL/LIST-RUNS", f"/v1/control/list-runs?{PATH}", "*", "/v1//fleet/get-run"),
    *("/v1/control/../fleet/get-run", "/v1\\fleet\\get-run", "https://localhost/v1/control/list-runs"),
]
GETS = ("/", "/docs", "/openapi.json", "/health", PATH)
HOSTILE = [*(("POST", path) for path in POSTS), *(("GET", path) for path in GETS), ("PUT", PATH), ("HEAD", PATH)]
SLOW = ("silent", "half a hello", "half a request", "half a body")


class Site(NamedTuple):
    entry: ProxySite
    context: ssl.SSLContext
    header: str
    node_key: Any


def enrol(authority: Authority, name: str = "alpha", at: datetime | None = None) -> Site:
    made, context, file = site_request(name), ssl._create_unverified_context(), authority.folder / "newest.pem"
    certificate = authority.issue_site(made.request_pem, site=name, days=1, at=at)
    file.write_bytes(certificate + made.key_pem)
    context.load_cert_chain(file)
    node_key: Any = load_pem_private_key(made.key_pem, None)
    header = b64encode(public_key_to_bytes(node_key.public_key())).decode()
    return Site(ProxySite(name, (describe(certificate).serial,), (header,)), context, header, node_key)


@contextmanager
def running(command: list[Any], port: int, **settings: Any) -> Iterator[int]:
    process = subprocess.Popen([str(word) for word in command], start_new_session=True, **settings)
    try:
        while process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(30)


def ask(target: Any, path: str = PATH, who: Site | None = None, **given: Any) -> http.client.HTTPResponse:
    """One request over TLS, its path as it stands here; with a site's certificate and, unless another is given, key."""
    context = who.context if who else ssl._create_unverified_context()
    key = given.get("key", who.header if who else "")
    headers = ({"flwr-public-key": key} if key else {}) | given.get("headers", {})
    port = target.proxy.listen[1] if isinstance(target, Federation) else target
    connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=given.get("seconds", 10))
    with closing(connection):
        connection.request(given.get("method", "POST"), path, given.get("body", b""), headers)
        answer = connection.getresponse()
        answer.read()
        return answer


def is_of_app(answer: http.client.HTTPResponse) -> bool:
    return answer.headers.get("content-type", "").startswith(("application/json", PROTOBUF["Content-Type"]))


def register(port: int, site: Site) -> int:
    node = control_pb2.RegisterNodeRequest(public_key=b64decode(site.header), name=site.entry.name)
    return ask(port, "/v1/control/register-node", body=node.SerializeToString(), headers=PROTOBUF).status


class Federation(NamedTuple):
    authority: Authority
    proxy: Proxy
    log: Path
    processes: tuple[int, int]
    alpha: Site
    beta: Site

    def seen_by_app(self) -> list[str]:
        return re.findall(r'"([A-Z]+ [^"]*) HTTP/1.[01]"', self.log.read_text())

    @contextmanager
    def another(self, folder: Path, without: str = "", **changes: Any) -> Iterator[tuple[int, Proxy, int]]:
        """Port, settings and process of a second proxy; without some text of what it would render."""
        proxy = replace(self.proxy, **{"folder": folder, "listen": ("127.0.0.1", free_port())} | changes)
        proxy.write()
        proxy.configuration.write_text(proxy.configuration.read_text().replace(without, ""))
        with running(proxy.command(), proxy.listen[1]) as process:
            yield proxy.listen[1], proxy, process


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    if shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin") is None:
        pytest.skip("nginx is not installed (apt install nginx-light)")
    folder, port, listen = tmp_path_factory.mktemp("server"), free_port(), ("127.0.0.1", free_port())
    authority = Authority.create(folder / "ca", name="Test")
    authority.issue_server(["localhost"])
    ca, certificate, key = (authority.folder / name for name in ("ca.crt", "server.crt", "server.key"))
    (folder / "secret").write_bytes(os.urandom(32))
    secret, database = ("--superexec-auth-secret-file", folder / "secret"), ("--database", folder / "state.db")
    command = [
        *(Path(sys.executable).parent / "flower-superlink", "--host", "127.0.0.1", "--port", port, *secret, *database),
        *("--ssl-ca-certfile", ca, "--ssl-certfile", certificate, "--ssl-keyfile", key, "--enable-supernode-auth"),
        *("--isolation", "process", "--disable-runtime-dependency-installation"),
    ]
    offline = {"FLWR_HOME": str(folder), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    files = {"server_certificate": certificate, "server_key": key, "ca": ca}
    pair = (enrol(authority), enrol(authority, "beta"))
    entries = tuple(site.entry for site in pair)
    proxy = Proxy(folder=folder / "nginx", listen=listen, upstream_port=port, sites=entries, **files)
    proxy.write()
    proxy.check()
    with (
        (log := folder / "superlink.log").open("wb") as file,
        running(command, port, env=os.environ | offline, stdout=file, stderr=file) as superlink,
        running(proxy.command(), listen[1]) as nginx,
    ):
        assert [register(port, site) for site in pair] == [200, 200]
        yield Federation(authority, proxy, log, (superlink, nginx), *pair)


def test_a_registered_node_works_through_the_proxy(federation: Federation) -> None:
    for site in (federation.alpha, federation.beta):
        key, address = site.node_key.public_key(), f"https://127.0.0.1:{federation.proxy.listen[1]}"
        signed = (RuntimeVersionHttpInterceptor("SuperNode"), NodeAuthHttpInterceptor(site.node_key, key))
        with FleetHttpClient(address, interceptors=signed, verify=site.context) as client:
            request = fleet_pb2.ActivateNodeRequest(public_key=b64decode(site.header), heartbeat_interval=30)
            node = node_pb2.Node(node_id=client.ActivateNode(request).node_id)
            assert node.node_id > 0
            assert list(client.PullMessages(fleet_pb2.PullMessagesRequest(node=node)).messages_list) == []


def test_every_path_of_a_node_is_passed_on_and_nothing_else_is(federation: Federation) -> None:
    fleet = {path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/fleet/")}
    assert fleet - set(FLEET_PATHS) == {"/v1/fleet/register-node", "/v1/fleet/unregister-node"}
    before = federation.seen_by_app()
    assert all(is_of_app(ask(federation, path, federation.alpha)) for path in FLEET_PATHS)
    answers = [ask(federation, path, federation.alpha, method=method) for method, path in HOSTILE]
    assert {(answer.headers["server"], answer.status in (400, 404)) for answer in answers} == {("nginx", True)}
    assert federation.seen_by_app() == before + [f"POST {path}" for path in FLEET_PATHS]


def test_without_the_proxy_the_same_requests_reach_the_superlink(federation: Federation) -> None:
    direct = federation.proxy.upstream_port
    answers = [ask(direct, path, method=method) for method, path in HOSTILE]
    assert {answer.headers["server"] for answer in answers} == {"uvicorn"}
    assert ask(direct, "/docs", method="GET").status == 200
    assert ask(direct, "/v1/control/list-runs", headers=PROTOBUF).status == 200, "a stranger lists the runs"
    assert register(direct, enrol(federation.authority, "stranger")) == 200, "a stranger registers a node"


def test_a_certificate_and_a_key_count_together_only(federation: Federation) -> None:
    own, others, before = federation.alpha.header, federation.beta.header, federation.seen_by_app()
    for key in (others, "", own.swapcase(), own[:-4], own + "A", f"{own},{own}", ".*", "-"):
        assert ask(federation, who=federation.alpha, key=key).status == 401
    for who in (federation.beta, enrol(federation.authority)):  # the latter's certificate is not in the list
        assert ask(federation, who=who, key=own).status == 401
    assert federation.seen_by_app() == before


def test_a_certificate_that_is_not_valid_reaches_nothing(federation: Federation, tmp_path: Path) -> None:
    ca, now, two, before = federation.authority, datetime.now(UTC), timedelta(days=2), federation.seen_by_app()
    foreign = enrol(Authority.create(tmp_path / "ca", name="Test"))
    of_server = foreign._replace(context=ssl._create_unverified_context())
    of_server.context.load_cert_chain(ca.folder / "server.crt", ca.folder / "server.key")
    for who in (None, foreign, enrol(ca, at=now - two), enrol(ca, at=now + two), of_server):
        answer = ask(federation, who=who, key=federation.alpha.header)
        assert (answer.status, answer.headers["server"]) == (400, "nginx")
    assert federation.seen_by_app() == before


def test_each_line_of_defence_is_needed(federation: Federation, tmp_path: Path) -> None:
    for line, site, path in (
        ("if ($site = -) { return 401; }", federation.beta._replace(header=federation.alpha.header), PATH),
        (f'if ($asked != "POST {PATH}") {{ return 404; }}', federation.alpha, "/v1/control/../fleet/get-run"),
    ):
        assert not is_of_app(ask(federation, path, site))
        with federation.another(tmp_path, without=line) as (port, _, _):
            assert is_of_app(ask(port, path, site))


def resident_mb(processes: tuple[int, int]) -> float:
    workers = Path(f"/proc/{processes[1]}/task/{processes[1]}/children").read_text().split()
    pages = [int(Path(f"/proc/{each}/statm").read_text().split()[1]) for each in (*processes, *workers)]
    return sum(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("length", [{"Content-Length": str(2**31)}, {"Transfer-Encoding": "chunked"}])
def test_a_body_of_two_gigabytes_is_refused_at_once(federation: Federation, length: dict[str, str]) -> None:
    alpha, before, memory = federation.alpha, federation.seen_by_app(), resident_mb(federation.processes)
    address, piece, started = federation.proxy.listen, b"40000\r\n" + bytes(2**18) + b"\r\n", time.monotonic()
    with closing(http.client.HTTPSConnection(*address, context=alpha.context, timeout=10)) as connection:
        connection.request("POST", "/")  # what TLS itself sends is read with the answer
        connection.getresponse().read()
        connection.request("POST", "/v1/fleet/push-object", headers={"flwr-public-key": alpha.header} | length)
        with suppress(BrokenPipeError, ConnectionResetError):
            while not select.select([connection.sock], [], [], 0)[0] and time.monotonic() < started + 5:
                connection.send(piece)
        assert connection.getresponse().status == 413
    assert time.monotonic() - started < 1
    assert federation.seen_by_app() == before
    assert resident_mb(federation.processes) < memory + 50


def slow_connection(port: int, kind: str, site: Site, kept: ExitStack) -> None:
    plain = kept.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
    if kind == "half a hello":
        plain.sendall(b"\x16\x03\x01\x02\x00\x01")
    if kind in ("half a request", "half a body"):
        secure = kept.enter_context(site.context.wrap_socket(plain))
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {site.header}\r\nContent-Length: 9\r\n"
        secure.sendall(head.encode() + (b"\r\nx" if kind == "half a body" else b""))


@pytest.mark.parametrize(("kind", "room"), [*((kind, 4096) for kind in SLOW), ("half a request", 64)])
def test_two_hundred_slow_connections_keep_a_healthy_site_out_only_where_there_is_room_for_few(
    federation: Federation, tmp_path: Path, kind: str, room: int
) -> None:
    with federation.another(tmp_path, connections=room) as (port, _, _), ExitStack() as kept:
        for _ in range(200):
            with suppress(*([OSError] if room == 64 else [])):
                slow_connection(port, kind, federation.beta, kept)
        is_served, started = False, time.monotonic()
        with suppress(OSError):
            is_served = is_of_app(ask(port, who=federation.alpha, seconds=2)) and time.monotonic() - started < 2
        assert is_served == (room == 4096)


def test_a_round_of_sixty_objects_meets_no_limit_and_a_flood_does(federation: Federation, tmp_path: Path) -> None:
    assert 503 not in [ask(federation, who=federation.beta).status for _ in range(80)]
    with federation.another(tmp_path, requests_per_second=5, burst=10) as (port, _, _):
        started = time.monotonic()
        statuses = [ask(port, who=federation.alpha).status for _ in range(60)]
        assert 11 <= 60 - statuses.count(503) <= 12 + 5 * (time.monotonic() - started)
        assert 503 not in [ask(port, who=federation.beta).status for _ in range(10)]  # it concerns its own site only


def test_a_site_that_is_removed_is_refused_after_a_reload(federation: Federation, tmp_path: Path) -> None:
    with federation.another(tmp_path) as (port, proxy, process):
        with pytest.raises(ConfigError, match="cannot load certificate"):
            replace(proxy, server_certificate=tmp_path / "missing.crt").reload(process)
        proxy.check()  # what was refused did not replace the file
        assert is_of_app(ask(port, who=federation.alpha))
        replace(proxy, sites=(federation.beta.entry,)).reload(process)
        deadline = time.monotonic() + 5
        while ask(port, who=federation.alpha).status != 401:
            assert time.monotonic() < deadline
        assert is_of_app(ask(port, who=federation.beta))
    for gone in (process, 0, -1):
        with pytest.raises(ConfigError, match="nginx does not run as process"):
            proxy.reload(gone)


class TakenOver(BaseHTTPRequestHandler):
    heard: list[tuple[str, list[str]]] = []
    answers = {
        PATH: (307, "Location", "http://127.0.0.1/internal"),
        "/v1/fleet/get-fab": (399, "Location", "/v1/control/list-runs"),
        "/v1/fleet/push-object": (200, "X-Accel-Redirect", PATH),
    }

    def do_POST(self) -> None:
        self.heard.append((self.path, self.headers.get_all("flwr-public-key", [])))
        self.send_response(self.answers[self.path][0])
        self.send_header(*self.answers[self.path][1:])
        self.end_headers()


@contextmanager
def taken_over(authority: Authority) -> Iterator[int]:
    TakenOver.heard.clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.folder / "server.crt", authority.folder / "server.key")
    with ThreadingHTTPServer(("127.0.0.1", 0), TakenOver) as upstream:
        upstream.socket = context.wrap_socket(upstream.socket, server_side=True)
        threading.Thread(target=upstream.serve_forever).start()
        yield upstream.server_port
        upstream.shutdown()


def test_a_redirect_is_not_passed_on_one_key_is_and_to_the_own_app_only(federation: Federation, tmp_path: Path) -> None:
    alpha, paths = federation.alpha, TakenOver.answers
    with taken_over(federation.authority) as app, federation.another(tmp_path, upstream_port=app) as (port, proxy, _):
        answers = [ask(port, path, alpha) for path in paths]
        assert [answer.status for answer in answers] == [502, 502, 200]
        assert not any("location" in answer.headers for answer in answers)
        keys = f"flwr-public-key: {alpha.header}\r\nflwr-public-key: {federation.beta.header}\r\n\r\n"
        with alpha.context.wrap_socket(socket.create_connection(proxy.listen)) as connection:
            connection.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\n{keys}".encode())
            connection.recv(100)
        assert TakenOver.heard == [(path, [alpha.header]) for path in (*paths, PATH)]
    other = Authority.create(tmp_path / "ca", name="Test")
    other.issue_server(["localhost"])
    with taken_over(other) as app, federation.another(tmp_path, upstream_port=app) as (port, _, _):
        assert (ask(port, who=alpha).status, TakenOver.heard) == (502, [])


def test_the_log_adds_up_by_site_and_holds_no_key(federation: Federation, tmp_path: Path) -> None:
    with federation.another(tmp_path) as (port, proxy, _):
        assert all(is_of_app(ask(port, who=federation.alpha, body=bytes(size))) for size in (1000, 200_000))
        ask(port, "/%22%0a%ff?patient=7", federation.alpha)
        ask(port, who=federation.beta, key=federation.alpha.header)
    text = proxy.access_log.read_text(encoding="utf-8", errors="replace")
    assert len(text.splitlines()) == 4
    assert " ".join(json.loads(text.splitlines()[0])) == "time site path status bytes_in bytes_out seconds clock"
    assert not re.search(f"{federation.alpha.header[:60]}|patient", text + (tmp_path / "error.log").read_text())
    proxy.access_log.write_text(text + '{"time":"20')  # cut off by a crash
    ((site, (came, went)),) = bytes_by_site(proxy.access_log).items()
    assert (site, 201_000 < came < 204_000, 200 < went < 4000) == ("alpha", True, True)
    with pytest.raises(ConfigError, match=r"missing\.log: No such file"):
        bytes_by_site(tmp_path / "missing.log")


@pytest.mark.skipif(os.geteuid() != 0, reason="all tests show it already: they run as an ordinary user")
def test_an_ordinary_user_can_run_it(federation: Federation) -> None:
    with tempfile.TemporaryDirectory() as name:
        ca, listen = shutil.copytree(federation.authority.folder, Path(name, "ca")), ("127.0.0.1", free_port())
        files = {"server_certificate": ca / "server.crt", "server_key": ca / "server.key", "ca": ca / "ca.crt"}
        proxy = replace(federation.proxy, folder=Path(name), listen=listen, **files)
        proxy.write()
        for path in (Path(name), *Path(name).rglob("*")):
            os.chown(path, 65534, 65534)
        with running(proxy.command(), listen[1], user=65534, group=65534, extra_groups=[]) as process:
            assert Path(f"/proc/{process}").stat().st_uid == 65534
            assert is_of_app(ask(listen[1], who=federation.alpha, body=bytes(2**20)))


TEXTS = ("a b", "a;", "a\n", "a}", '"', "$host", "", "../a", "-", "-a", "a" * 65, "ä", "a\0", "{{ ca }}", "ABC", "0a")
HOSTILE_SETTINGS = [
    *({"sites": (ProxySite(text, (), ()),)} for text in TEXTS[:-1]),
    *({"sites": (ProxySite("a", (text,), ()),)} for text in (*TEXTS, "0x0A", "AA" * 21)),
    *({"sites": (ProxySite("a", (), (text,)),)} for text in (*TEXTS, "A" * 16 + "\n", "=" * 16, ".*" * 8, "A" * 17)),
    *({"sites": (ProxySite("a", *own), ProxySite("b", *own))} for own in ((("0A",), ()), ((), ("A" * 16,)))),
    {"sites": (ProxySite("a", (), ()),) * 2},
    *({"ca": Path(text)} for text in ('a"b', "a\\", "$a", "a\n")),
    *({"listen": (at, 1)} for at in ("*", "localhost", "1.2.3.4; #", "fe80::1%;", "")),
    *({"listen": ("::1", port)} for port in (0, 65536, "443; #", True)),
    *({name: value} for name in ("upstream_port", "max_body_mb", "burst") for value in (0, -1, 1.5, "1; #")),
]


@pytest.mark.parametrize("changes", HOSTILE_SETTINGS, ids=repr)
def test_what_could_mean_something_else_to_nginx_is_refused(changes: dict[str, Any]) -> None:
    files = dict.fromkeys(("folder", "server_certificate", "server_key", "ca"), Path("x"))
    good = Proxy(listen=("::1", 443), upstream_port=8000, sites=(ProxySite("a", ("0A",), (8 * "ab+/",)),), **files)
    assert "ssl_verify_client on;" in good.render()
    with pytest.raises(ConfigError) as refused:
        replace(good, **changes).render()
    assert str(refused.value).isprintable()


def test_a_machine_without_nginx_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(proxy_module, "_PLACES_WITHOUT_PATH", "")
    with pytest.raises(ConfigError, match="apt install nginx-light"):
        find_nginx()

"""What the doctor says of a site's keys, its certificate and the way to the server, with one fault at a time."""

import os
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from client import reach
from client.check import examine
from client.enrolment import enrol
from client.findings import Finding
from client.settings import SiteSettings
from mcrage.pki import Authority, site_request

NAME, SECRET_TEXT = "st-mary", "Mrs Example"


@dataclass(frozen=True)
class Site:
    """An enrolled site, of which only the keys matter here, and its federation's authority."""

    folder: Path
    authority: Authority

    @property
    def settings(self) -> SiteSettings:
        return SiteSettings.load(self.folder / "site.toml")

    def path(self, name: str) -> Path:
        return self.folder / "keys" / name

    def certify(self, *, request: bytes | None = None, name: str = NAME, days: int = 365, ago: int = 0) -> None:
        """Puts another certificate there."""
        at = datetime.now(UTC) - timedelta(days=ago)
        pem = request or self.path(f"{NAME}.csr").read_bytes()
        self.path("site.crt").write_bytes(self.authority.issue_site(pem, site=name, days=days, at=at))

    def point_to(self, address: str, more: str = "") -> None:
        site = f'[site]\nname = "{NAME}"\ndata = "table.csv"\nschema_file = "schema.json"\n'
        (self.folder / "site.toml").write_text(f'{site}[server]\naddress = "{address}"\n{more}', encoding="utf-8")

    def findings(self) -> list[Finding]:
        """Of the areas that this is about."""
        found = examine(self.settings, offline=False)
        return [each for each in found if each.area in ("files", "keys", "server")]


def made_authority(folder: Path) -> Authority:
    # Its certificates may begin some days ago.
    return Authority.create(folder, name="Federation", at=datetime.now(UTC) - timedelta(days=9))


@contextmanager
def listener(answer: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[str]:
    """The address of a server that does something with every connection."""
    with socket.create_server((host, 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with suppress(OSError), connection:
                    answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"{host}:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def server(
    authority: Authority,
    *,
    host: str = "127.0.0.1",
    days: int = 90,
    ago: int = 0,
    clients: Path | None = None,
    ahead: float = 0,
    status: int = 404,
) -> Iterator[str]:
    """The address of a TLS server that asks for a site's certificate, and answers as the coordinator's proxy does."""
    authority.issue_server(["federation.example.org"], days=days, at=datetime.now(UTC) - timedelta(days=ago))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.folder / "server.crt", authority.folder / "server.key")
    context.load_verify_locations(clients or authority.folder / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(2**16)
            date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
            secured.sendall(f"HTTP/1.1 {status} X\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())

    with listener(answer, host) as address:
        yield address


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return made_authority(tmp_path_factory.mktemp("federation") / "ca")


@pytest.fixture(scope="module")
def address(authority: Authority) -> Iterator[str]:
    with server(authority) as running:
        yield running


@pytest.fixture
def site(tmp_path: Path, authority: Authority, address: str, monkeypatch: pytest.MonkeyPatch) -> Site:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    made = Site(tmp_path, authority)
    made.point_to(address)
    enrol(made.settings, declared_patients=84)
    made.certify()
    shutil.copy(authority.folder / "ca.crt", made.path("ca.crt"))
    return made


def problems(findings: list[Finding]) -> list[str]:
    """Problems, each of them one line that says what to do and holds nothing of a key file."""
    for each in findings:
        assert str(each).isprintable()
        assert SECRET_TEXT not in str(each)
        assert each.remedy or not each.is_problem
    return [str(each) for each in findings if each.is_problem]


def test_a_site_in_order_reaches_its_server(site: Site) -> None:
    levels = [(each.area, each.level) for each in site.findings()]
    assert levels == [("files", "ok"), ("keys", "ok"), ("server", "ok"), ("server", "ok")]


def other_keys(site: Site, *names: str, of: str = NAME) -> bytes:
    """Puts other keys there; gives the request for their certificate."""
    made = site_request(of)
    for name, content in (("site.key", made.key_pem), ("node.key", made.openssh_key)):
        if name in names:
            site.path(name).write_bytes(content)
    return made.request_pem


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def other_authority(site: Site) -> None:
    shutil.copy(made_authority(site.folder / "other").folder / "ca.crt", site.path("ca.crt"))


TWO_KEYS = ("site.key", "node.key")
REFUSED = "does not accept this site's certificate"
FAULTS: dict[str, tuple[Callable[[Site], object], list[str]]] = {
    "key 0644": (lambda s: s.path("site.key").chmod(0o644), ["mode 0644). Run 'chmod 600 "]),
    "node key 0640": (lambda s: s.path("node.key").chmod(0o640), ["mode 0640). Run 'chmod 600 "]),
    "key is a link": (lambda s: link(s.path("site.key")), ["is a link"]),
    "key missing": (lambda s: s.path("site.key").unlink(), ["python -m client enroll"]),
    "keys folder open": (lambda s: s.path("").chmod(0o755), ["chmod 750"]),
    "node key of another pair": (lambda s: other_keys(s, "node.key"), ["is another key than"]),
    "keys of another pair": (lambda s: other_keys(s, *TWO_KEYS), ["was issued for another key"]),
    "key damaged": (lambda s: s.path("site.key").write_text(SECRET_TEXT), ["is no private key"]),
    "certificate missing": (lambda s: s.path("site.crt").unlink(), ["Put there what the coordinator sent back"]),
    "certificate writable": (lambda s: s.path("site.crt").chmod(0o666), ["chmod go-w"]),
    "certificate damaged": (lambda s: s.path("site.crt").write_text(SECRET_TEXT), ["expected a certificate in PEM"]),
    "certificate of another site": (
        lambda s: s.certify(request=other_keys(s, *TWO_KEYS, of="st-john"), name="st-john"),
        ["names the site 'st-john'"],
    ),
    "certificate expired": (lambda s: s.certify(days=1, ago=3), ["expired on", REFUSED]),
    "certificate ends": (lambda s: s.certify(days=7), ["client enroll --rotate"]),
    "authority missing": (lambda s: s.path("ca.crt").unlink(), ["Put there the federation's ca.crt"]),
    "other authority": (other_authority, ["is not of the authority", "is not of the authority in this site's ca.crt"]),
    "authority is none": (
        lambda s: shutil.copy(s.path("site.crt"), s.path("ca.crt")),
        ["is not one of an authority", "is not of the authority in this site's ca.crt"],
    ),
    "runtime secret readable": (lambda s: s.path("runtime.secret").chmod(0o644), ["chmod 640"]),
    "runtime secret short": (lambda s: s.path("runtime.secret").write_bytes(b"x" * 31), ["has less than 32 bytes"]),
    "private folder open": (lambda s: (s.folder / "private").chmod(0o750), ["chmod 700"]),
    "name unknown": (lambda s: s.point_to("no..name:8443"), ["its name is not known here. Check [server] address"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_line_that_says_what_to_do(site: Site, name: str) -> None:
    break_it, expected = FAULTS[name]
    break_it(site)
    found = problems(site.findings())
    assert len(found) == len(expected), found
    assert all(text in line for line, text in zip(found, expected, strict=True)), found


def test_what_belongs_to_another_user_is_a_problem(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    foreign = [each.text for each in site.findings() if "this is run by user 54321" in each.text]
    for path in (site.path(""), *map(site.path, TWO_KEYS), site.folder / "private"):
        assert any(text.startswith(f"'{path}' belongs to user {path.stat().st_uid}") for text in foreign)


def test_without_its_keys_a_site_still_learns_whether_the_server_listens(site: Site) -> None:
    site.path("site.crt").unlink()
    assert [(each.level, "TLS was not tried" in each.text) for each in site.findings()][-1] == ("note", True)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        site.point_to(f"127.0.0.1:{closed.getsockname()[1]}")
    assert "nothing listens there" in problems(site.findings())[-1]


SERVERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "name": ({"host": "127.0.0.2"}, "problem", "its certificate is for another name. Correct [server] address"),
    "expired": ({"days": 1, "ago": 3}, "problem", "its certificate has expired"),
    "not yet": ({"ago": -3}, "problem", "its certificate is not valid yet. Set this machine's clock"),
    "ends": ({"days": 10}, "note", "more days. Tell the coordinator to renew it"),
    "site not accepted, as nginx says": ({"status": 400}, "problem", f"{REFUSED}. Ask the coordinator"),
    "clock behind": ({"ahead": 600}, "problem", "s behind the server's. Set this machine's clock"),
    "clock ahead": ({"ahead": -600}, "problem", "s ahead of the server's. Set this machine's clock"),
    "clock off a little": ({"ahead": 4.5}, "note", "s behind the server's. Set this machine's clock"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_each_fault_of_a_server_is_told_from_the_others(site: Site, name: str) -> None:
    how, level, text = SERVERS[name]
    with server(site.authority, **how) as address:
        site.point_to(address)
        findings = site.findings()
    told = [each for each in findings if each.level != "ok"]
    assert [each.level for each in told] == [level], told
    assert text in str(told[0])
    assert (problems(findings) == []) == (level == "note")


def test_a_server_of_other_clients_does_not_accept_this_one(site: Site, tmp_path: Path) -> None:
    other = made_authority(tmp_path / "other")
    with server(site.authority, clients=other.folder / "ca.crt") as address:
        site.point_to(address)
        [problem] = problems(site.findings())
    assert f"{REFUSED}. Ask the coordinator" in problem


def wait(connection: socket.socket) -> None:
    while connection.recv(2**16):
        pass


@pytest.mark.parametrize(
    ("answer", "seconds", "text"),
    [
        (wait, {"SECONDS": 0.2, "_STEP_SECONDS": 0.5}, "it does not answer in time. Have the firewall let TCP out"),
        (wait, {"_STEP_SECONDS": 0.2}, "it does not answer in time. Have the firewall let TCP out"),
        (lambda connection: None, {}, "it ends the connection without an answer. Ask the coordinator"),
        (lambda connection: connection.sendall(b"220 mail\r\n"), {}, "it does not speak TLS as it should. Check the"),
    ],
)
def test_what_is_no_server_of_a_federation_is_told_in_time(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[socket.socket], None],
    seconds: dict[str, float],
    text: str,
) -> None:
    for name, value in seconds.items():
        monkeypatch.setattr(reach, name, value)
    with listener(answer) as address:
        site.point_to(address)
        [problem] = problems(site.findings())
    assert f"{address}: {text}" in problem


def test_a_proxy_is_followed_only_where_the_settings_say_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []

    def refuse(connection: socket.socket) -> None:
        asked.append(connection.recv(2**16))
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with listener(refuse) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:{SECRET_TEXT.split()[0]}@{proxy}")
        findings = site.findings()
        assert (problems(findings), asked) == ([], [])
        assert "proxy_from_environment = true" in str(findings[-3])
        site.point_to("federation.example.org:8443", "proxy_from_environment = true\n")
        [problem] = problems(site.findings())
    assert "the proxy in HTTPS_PROXY refuses it. Have the proxy allow CONNECT" in problem
    assert asked[0].startswith(b"CONNECT federation.example.org:8443 ")

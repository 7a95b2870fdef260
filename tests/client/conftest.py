"""An enrolled hospital with a small table, the bundle of the code that is installed here, and servers on loopback."""

import io
import os
import re
import shutil
import signal
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client.bundles import INSTALLED, installed_files
from client.enrolment import enrol
from client.places import JOURNAL, POLICY
from client.policy import SitePolicy
from client.runner import Runner
from client.settings import SiteSettings
from mcrage.pki import Authority

NewSite = Callable[..., SiteSettings]


@pytest.fixture(scope="session")
def bundle() -> bytes:
    """What a coordinator would send, but for the code that never runs at a hospital."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("pyproject.toml", *installed_files()):
            archive.write(INSTALLED / name, name)
    return content.getvalue()


@pytest.fixture(scope="session")
def new_site(tmp_path_factory: pytest.TempPathFactory, site_dir: Path) -> Callable[..., SiteSettings]:
    """Makes hospitals that allow everything, with files of their own."""

    def make(*, address: str = "127.0.0.1:8443", more: str = "", name: str = "st-mary") -> SiteSettings:
        folder = tmp_path_factory.mktemp(name)
        (folder / "table.csv").write_bytes((site_dir / "site-01.csv").read_bytes())
        (folder / "schema.json").write_bytes((site_dir / "schema.json").read_bytes())
        (folder / "site.toml").write_text(
            f'[site]\nname = "{name}"\ndata = "table.csv"\nschema_file = "schema.json"\n'
            f'[server]\naddress = "{address}"\n{more}',
            encoding="utf-8",
        )
        (folder / "site.toml").chmod(0o600)
        settings = SiteSettings.load(folder / "site.toml")
        enrol(settings, declared_patients=84)
        policy = SitePolicy.simulated(declared_patients=84).to_toml()
        (settings.site.private / POLICY).write_text(policy, encoding="utf-8")
        return settings

    return make


@dataclass
class Listener:
    """A server on loopback that gives every connection the same answer, and what it has seen.

    Attributes:
        address: Of it.
        answer: What it says once a request has ended.
        context: For TLS; None for a server without.
        connections, received, sent: Their number; all bytes that came, after TLS; number of bytes that went.
        names: Of the client's certificates, one for each connection; empty without one.
    """

    address: str
    answer: bytes | Iterator[bytes]
    context: ssl.SSLContext | None
    connections: int = 0
    received: bytes = b""
    sent: int = 0
    names: list[str] = field(default_factory=list)

    def serve(self, listening: socket.socket) -> None:
        """Talks to one client after the other until the socket is shut down."""
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            self.connections += 1
            connection.settimeout(5)
            with connection, suppress(OSError):
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        if self.context is not None:
            connection = self.context.wrap_socket(connection, server_side=True)
            subject = dict(pair[0] for pair in (connection.getpeercert() or {}).get("subject", ()))
            self.names.append(subject.get("commonName", ""))
        with connection:
            request = b""
            while not _is_whole(request):
                request += connection.recv(2**16) or b"\x16"
            self.received += request
            for part in [self.answer] if isinstance(self.answer, bytes) else self.answer:
                connection.sendall(part)
                self.sent += len(part)


def _is_whole(request: bytes) -> bool:
    """Whether a request has ended; of what is none, such as a beginning of TLS, nothing more is waited for."""
    head, end, body = request.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    return b"\x16" in (request[:1], request[-1:]) or (bool(end) and len(body) >= int(length[1] if length else 0))


@pytest.fixture
def listen() -> Callable[..., Any]:
    """Starts servers, for the time of a ``with``; over TLS if there is an authority, with a certificate by it."""

    @contextmanager
    def start(
        answer: bytes | Iterator[bytes], *, host: str = "127.0.0.1", authority: Authority | None = None, **issue: Any
    ) -> Iterator[Listener]:
        context = None
        if authority is not None:
            authority.issue_server(["federation.example.org"], **issue)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(authority.folder / "server.crt", authority.folder / "server.key")
            context.load_verify_locations(authority.folder / "ca.crt")
            context.verify_mode = ssl.CERT_OPTIONAL
        with socket.create_server((host, 0)) as listening:
            server = Listener(f"{host}:{listening.getsockname()[1]}", answer, context)
            thread = threading.Thread(target=server.serve, args=(listening,))
            thread.start()
            try:
                yield server
            finally:
                listening.shutdown(socket.SHUT_RDWR)
                thread.join()

    return start


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    # Its certificates may begin some days ago.
    folder = tmp_path_factory.mktemp("federation")
    return Authority.create(folder / "ca", name="Federation", at=datetime.now(UTC) - timedelta(days=9))


@pytest.fixture
def site(new_site: NewSite, authority: Authority) -> NewSite:
    """Makes an enrolled hospital with a certificate."""

    def make(address: str = "127.0.0.1:8443", more: str = "") -> SiteSettings:
        settings = new_site(address=address, more=more)
        request = settings.server.key.with_name("st-mary.csr").read_bytes()
        settings.server.certificate.write_bytes(authority.issue_site(request, site="st-mary"))
        shutil.copy(authority.folder / "ca.crt", settings.server.ca)
        return settings

    return make


@pytest.fixture
def run() -> Iterator[Callable[[SiteSettings, Callable[[], None]], None]]:
    """Runs the runner of a site while a script talks to it; ends it then as systemd does."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}

    def work(settings: SiteSettings, script: Callable[[], None]) -> None:
        outcome: Future[None] = Future()

        def drive() -> None:
            try:
                started = time.monotonic()
                while not (settings.site.private / JOURNAL).exists():
                    assert time.monotonic() - started < 60, "not in time"
                    time.sleep(0.005)
                script()
                outcome.set_result(None)
            except BaseException as error:  # noqa: BLE001  # raised again where the result is asked for
                outcome.set_exception(error)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=drive, daemon=True)
        thread.start()
        try:
            Runner(settings).run()
        finally:
            signal.signal(signal.SIGTERM, lambda *_: None)  # where it failed, the script's comes too late
            thread.join()
        outcome.result()

    yield work
    for each, handler in before.items():
        signal.signal(each, handler)

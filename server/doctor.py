"""What a server shows from outside: asked as a stranger would, and again with the certificate of a site.

No request has an effect: what would be a call of Flower carries a content type that it refuses before it looks further.
"""

import re
import socket
import ssl
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from mcrage.errors import ConfigError
from mcrage.pki import describe

ASKED = (
    *(("POST", f"/v1/control/{call}") for call in ("list-runs", "start-run", "register-node", "list-nodes")),
    *(("POST", f"/v1/runtime/{call}") for call in ("acquire-task", "push-messages")),
    *(("POST", f"/v1/fleet/{call}") for call in ("register-node", "pull-messages")),
    *(("GET", path) for path in ("/docs", "/openapi.json", "/health", "/")),
)
"""What nobody may reach who does not show a certificate and a node key."""

LEAST_DAYS = 7
"""So long a server's certificate has to be valid still."""

LARGEST_CLOCK_SECONDS = 5.0
"""Flower refuses a node whose clock is further ahead."""

_BEHIND_THE_PROXY = "let the SuperLink listen on 127.0.0.1 only, and the sites in through the proxy"
_OLD_VERSIONS = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)
_NO_DATE = (KeyError, ValueError, TypeError)
_OF_FLOWER = ("application/json", "application/protobuf", "application/flower-protobuf-stream")


@dataclass(frozen=True)
class Probe:
    """One question to a server, and what came back.

    Attributes:
        name: What was asked.
        is_ok: Whether it is as it has to be.
        seen: What was seen, in words.
        remedy: What to do; empty if all is well.
    """

    name: str
    is_ok: bool
    seen: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"ok    {self.name}: {self.seen}" if self.is_ok else f"FAIL  {self.name}: {self.seen}; {self.remedy}"

    @classmethod
    def of(cls, name: str, is_ok: bool, seen: str, remedy: str) -> "Probe":
        """Keeps the remedy for those that need it."""
        return cls(name, is_ok, seen, "" if is_ok else remedy)


def is_production(probes: Sequence[Probe]) -> bool:
    """Whether a server may hold a federation of hospitals: everything that was asked is as it has to be."""
    return bool(probes) and all(each.is_ok for each in probes)


def probe(
    address: str, *, ca: Path | None, certificate: Path | None, key: Path | None, timeout_seconds: float = 5.0
) -> list[Probe]:
    """Asks a server everything, and gives an answer for each question; one only if it cannot be reached.

    Args:
        address: ``host:port`` as the sites use it.
        ca: PEM file of the federation's authority; without one, those that this machine trusts.
        certificate: PEM file of a site, to ask with it too.
        key: PEM file of its key.
        timeout_seconds: Of each step of a request.

    Raises:
        ConfigError: If the address or a file cannot be read.
    """
    server = _Server(*_host_and_port(address), timeout_seconds)
    stranger, trusting = _context(), _trusting(ca)
    site = _context_of_site(certificate, key)
    if (problem := server.unreachable()) is not None:
        return [problem]
    probes = [server.certificate(trusting), server.clock(site or stranger)]
    probes += [server.old_version(version) for version in _OLD_VERSIONS]
    probes += server.closed_paths("https", stranger, "a stranger")
    probes += server.closed_paths("http", stranger, "a stranger")
    if site is not None:
        probes += [server.knows(site), *server.closed_paths("https", site, "a site without its node key")]
    gone = server.unreachable()  # else the silence of a server that went away would count as refusing
    return [*probes, gone] if gone else probes


@dataclass(frozen=True)
class _Server:
    host: str
    port: int
    timeout: float

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=self.timeout)

    def client(self, scheme: str, context: ssl.SSLContext) -> httpx.Client:
        base = f"{scheme}://{self.address}"
        return httpx.Client(base_url=base, verify=context, timeout=self.timeout, trust_env=False)

    def unreachable(self) -> Probe | None:
        try:
            self.connect().close()
        except OSError as error:
            remedy = "check the address, that the server runs, and the firewalls in between"
            return Probe(f"reach {self.address}", False, _words(error), remedy)
        return None

    def certificate(self, context: ssl.SSLContext) -> Probe:
        name = f"certificate for {self.host}"
        try:
            with self.connect() as plain, context.wrap_socket(plain, server_hostname=self.host) as secure:
                der, version = secure.getpeercert(binary_form=True), secure.version()
        except ssl.SSLCertVerificationError as error:
            seen = f"not to be trusted: {error.verify_message.rstrip('.')}"
            remedy = "give the federation's ca.crt; if this is it, do not connect: issue the server a certificate for"
            return Probe(name, False, seen, f"{remedy} {self.host}")
        except OSError as error:
            return Probe(name, False, f"no TLS ({_words(error)})", "serve TLS only: start the coordinator's proxy")
        days = describe(ssl.DER_cert_to_PEM_cert(der or b"").encode()).days_left
        return Probe.of(name, days >= LEAST_DAYS, f"of the authority, {days} days left, {version}", "renew it")

    def clock(self, context: ssl.SSLContext) -> Probe:
        name, remedy = "clock", "synchronise both machines by NTP; Flower refuses nodes that are ahead"
        for scheme in ("https", "http"):
            with suppress(httpx.HTTPError, *_NO_DATE), self.client(scheme, context) as client:
                date = parsedate_to_datetime(client.get("/").headers["date"])
                seconds = abs((datetime.now(UTC) - date).total_seconds() - 0.5)  # the header has whole seconds
                return Probe.of(name, seconds <= LARGEST_CLOCK_SECONDS, f"{seconds:.0f} s from this machine's", remedy)
        return Probe(name, False, "the server does not tell its time", remedy)

    def old_version(self, version: ssl.TLSVersion) -> Probe:
        name = version.name.replace("v1_1", " 1.1").replace("v1", " 1.0")
        context = _context()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that it is old is the point
            context.minimum_version, context.maximum_version = version, version
        context.set_ciphers("ALL:@SECLEVEL=0")
        try:
            with self.connect() as plain, context.wrap_socket(plain):
                return Probe(name, False, "accepted", "allow TLS 1.2 and 1.3 only")
        except ssl.SSLError as error:
            if error.reason == "NO_PROTOCOLS_AVAILABLE":
                return Probe(name, False, "this machine cannot ask", "ask from a machine whose OpenSSL has it")
        except OSError:
            pass  # closed without a word
        return Probe(name, True, "refused")

    def knows(self, site: ssl.SSLContext) -> Probe:
        """A certificate that is refused like a stranger's would make all that is asked with it say nothing."""
        name, remedy = "the site's certificate", "renew it, or check that it is of this federation's authority"
        try:
            with self.client("https", site) as client:
                answer = client.post("/v1/fleet/get-run", headers={"content-type": "text/plain"})
        except httpx.HTTPError as error:
            return Probe(name, False, f"no answer ({_words(error)})", remedy)
        is_ok = answer.status_code == 401 and not _is_of_flower(answer)
        return Probe.of(name, is_ok, "accepted" if is_ok else f"not accepted: {_shown(answer)}", remedy)

    def closed_paths(self, scheme: str, context: ssl.SSLContext, who: str) -> Iterator[Probe]:
        with self.client(scheme, context) as client:
            for method, path in ASKED:
                name = f"{method} {scheme} {path} as {who}"
                try:
                    answer = client.request(method, path, headers={"content-type": "text/plain"})
                except httpx.TimeoutException:
                    yield Probe(name, False, f"no answer within {self.timeout:g} s", "ask again with more time")
                    return  # the next ones would only take as long
                except httpx.HTTPError:
                    yield Probe(name, True, "closed without an answer")
                    continue
                is_ok = 400 <= answer.status_code < 500 and not _is_of_flower(answer)
                yield Probe.of(name, is_ok, _shown(answer), _BEHIND_THE_PROXY)


def _is_of_flower(answer: httpx.Response) -> bool:
    return answer.headers.get("server", "").startswith("uvicorn") or _media_type(answer) in _OF_FLOWER


def _media_type(answer: httpx.Response) -> str:
    kind: str = answer.headers.get("content-type", "")
    return kind.partition(";")[0].strip().lower()


def _shown(answer: httpx.Response) -> str:
    by, kind = answer.headers.get("server", "a server without a name"), _media_type(answer)
    return f"{answer.status_code} by {by}" + (f" ({kind})" if kind else "")


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    text = re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", str(error))  # where in OpenSSL it happened
    return text or type(error).__name__


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{address}")
        if parts.hostname and parts.port and parts.netloc == address and "@" not in address:
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise ConfigError(f"{address!r} is not an address like hospital-federation.org:8443")


def _context() -> ssl.SSLContext:
    """Looks at whoever answers: what is sent is no secret, and what a false server shows is worth seeing too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _trusting(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca)
    except OSError as error:
        raise ConfigError(f"{ca}: not a certificate that can be read ({_words(error)})") from None


def _context_of_site(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("to ask as a site needs its certificate and its key; one of them is missing")
    context = _context()
    try:
        # an empty password, or OpenSSL would ask for one at the terminal
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise ConfigError(f"{certificate}, {key}: not a certificate and its key ({_words(error)})") from None
    return context

"""Whether this site can reach the coordinator's server as its daemon does: its keys, its certificate, the way there.

A part of the doctor (:mod:`client.check`).
"""

import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import getproxies_environment

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as forms

from client.findings import ASK, Line
from client.rights import is_readable_file
from client.settings import ServerSection, SiteSettings
from mcrage.errors import ConfigError
from mcrage.pki import CertificateInfo, describe, read_pem, verify

SECONDS = 10.0
"""After so long the server counts as one that cannot be reached, whatever takes the time."""

_STEP_SECONDS = 4.0
_SOON_DAYS, _URGENT_DAYS, _SERVER_DAYS = 30, 7, 14
_CLOCK_NOTE, _CLOCK_PROBLEM = 2.0, 5.0  # Flower refuses a message of more than 5 s ahead or 305 s behind
_CLOCK = "Set this machine's clock and switch NTP on; if it is right, tell the coordinator."
_REGISTERED = "Ask the coordinator whether this site is registered with its newest certificate."

# What the daemon's own errors look like (number or words of OpenSSL, names of classes); what it is; what to do.
_FAULTS = (
    (
        "verify (7|18|19|20|21) ",
        "its certificate is not of the authority in this site's ca.crt",
        "Compare the fingerprint of ca.crt with the coordinator's, by telephone; if it is right, something between "
        "opens TLS, such as a firewall: have it leave this server out.",
    ),
    ("verify (62|64) ", "its certificate is for another name", "Correct [server] address: it is the coordinator's."),
    ("verify 9 ", "its certificate is not valid yet", _CLOCK),
    (
        "verify 10 ",
        "its certificate has expired",
        "If this machine's clock is right, tell the coordinator to renew it.",
    ),
    ("verify", "its certificate is refused", ASK),
    (
        "ALERT_.*(CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|ACCESS_DENIED|DECRYPT_ERROR)",
        "it does not accept this site's certificate",
        _REGISTERED,
    ),
    ("gaierror|UnicodeError", "its name is not known here", "Check [server] address, and this machine's DNS."),
    ("ConnectionRefused", "nothing listens there", "Check the port in [server] address, or wait for the server."),
    ("Timeout", "it does not answer in time", "Have the firewall let TCP out to this host and port."),
    ("ProxyError", "the proxy in HTTPS_PROXY refuses it", "Have the proxy allow CONNECT to this host and port."),
    ("EOF|Reset|BrokenPipe|RemoteProtocol", "it ends the connection without an answer", _REGISTERED),
    ("SSLError", "it does not speak TLS as it should", "Check the port in [server] address."),
    ("", "it cannot be reached", "Check this machine's network."),
)


class _Answer(NamedTuple):
    status: int
    days_left: int
    seconds_ahead: float | None


def key_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether both files of the private key hold the same one.

    Raises:
        ConfigError: If one of them is no such key.
    """
    key, node_key = settings.server.key, settings.server.node_key
    if not (is_readable_file(key) and is_readable_file(node_key)):
        return  # said among the files
    if _fingerprint(key, forms.load_pem_private_key) != _fingerprint(node_key, forms.load_ssh_private_key):
        yield "problem", f"'{node_key}' is another key than '{key}'", "Bring both back from one backup."


def _fingerprint(path: Path, load: Callable[[bytes, None], Any]) -> str:
    """SHA-256 of the public key, as a certificate's description has it."""
    try:
        public = load(read_pem(path), None).public_key()
        return sha256(public.public_bytes(forms.Encoding.DER, forms.PublicFormat.SubjectPublicKeyInfo)).hexdigest()
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigError(f"'{path}' is no private key without passphrase in the form that 'enroll' writes") from None


def certificate_lines(settings: SiteSettings) -> Iterator[Line]:
    """Whether the site's certificate is its own, of its authority, for its key, and for how long.

    Raises:
        ConfigError: If the certificate is not valid, or a file holds none.
    """
    server, name = settings.server, settings.site.name
    if not (is_readable_file(server.certificate) and is_readable_file(server.ca)):
        return  # said among the files
    authority, own = _described(server.ca), _described(server.certificate)
    if own.subject != name:
        text = f"'{server.certificate}' names the site {own.subject!r}, '{settings.file}' the site '{name}'"
        yield "problem", text, "Put there this site's own, or correct [site] name."
    with suppress(ConfigError):  # said of the key
        if own.public_key_fingerprint != _fingerprint(server.key, forms.load_pem_private_key):
            text = f"'{server.certificate}' was issued for another key than '{server.key}'"
            yield "problem", text, "Put there the one for this key, or bring the key back from a backup."
    verify(read_pem(server.certificate), read_pem(server.ca), purpose="site")
    first = min(authority, own, key=lambda info: info.not_after)
    text = f"certificate and authority are valid for {first.days_left} days, until {first.not_after:%Y-%m-%d}"
    if first.days_left > _SOON_DAYS:
        yield "ok", text, ""
    else:
        remedy = f"Run 'python -m client enroll --rotate {settings.file}', and ask for the newest ca.crt."
        yield "note" if first.days_left > _URGENT_DAYS else "problem", text, remedy


def _described(path: Path) -> CertificateInfo:
    try:
        return describe(read_pem(path))
    except ConfigError as error:
        raise ConfigError(f"'{path}': {error}") from None


def server_lines(settings: SiteSettings, *, are_keys_right: bool) -> Iterator[Line]:
    """What asking the server once, ``GET /``, tells.

    Args:
        settings: Of the site.
        are_keys_right: Whether nothing was found wrong with the site's keys; without them only TCP is tried.

    Raises:
        ConfigError: If TLS cannot be tried though the keys are right.
    """
    from client.node import tls_context

    server = settings.server
    if {"https", "all"} & getproxies_environment().keys() and not server.proxy_from_environment:
        remedy = "If the server is only reached through it, set proxy_from_environment = true in [server]."
        yield "note", "HTTPS_PROXY is set here and not followed", remedy
    try:
        context = tls_context(settings)
    except ConfigError:
        if are_keys_right:
            raise
        context = None
    try:
        answer = _asked(server, context)
    except (OSError, UnicodeError, httpx.HTTPError) as error:
        text, remedy = _in_words(error)
        yield "problem", f"{server.address}: {text}", remedy
        return
    if answer is None:
        text = f"{server.address}: it can be reached; TLS was not tried, as it takes this site's keys"
        yield "note", text, "Put right what is wrong with the keys."
    else:
        yield from _answer_lines(server, answer)


def _answer_lines(server: ServerSection, answer: _Answer) -> Iterator[Line]:
    # nginx lets every certificate through TLS and then says no.
    if answer.status == 400:
        yield "problem", f"{server.address}: it does not accept this site's certificate", _REGISTERED
    else:
        yield "ok", f"{server.address}: a server of this federation, over TLS", ""
    if answer.days_left <= _SERVER_DAYS:
        text = f"{server.address}: its certificate is valid for {answer.days_left} more days"
        yield "note", text, "Tell the coordinator to renew it."
    ahead = answer.seconds_ahead
    if ahead is None:
        yield "note", f"{server.address}: it tells no time, so the clocks were not compared", ""
    elif abs(ahead) >= _CLOCK_NOTE:
        text = f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
        yield "problem" if abs(ahead) >= _CLOCK_PROBLEM else "note", text, _CLOCK
    else:
        yield "ok", "this machine's clock and the server's agree", ""


def _asked(server: ServerSection, context: ssl.SSLContext | None) -> _Answer | None:
    """The answer, or what went wrong, within the time."""
    result: Future[_Answer | None] = Future()

    def work() -> None:
        try:
            result.set_result(_ask(server, context))
        except BaseException as error:  # noqa: BLE001  # raised again where the result is asked for
            result.set_exception(error)

    # Looking up a name cannot be limited, and a thread of another kind would be waited for at the end.
    threading.Thread(target=work, daemon=True).start()
    return result.result(timeout=SECONDS)


def _ask(server: ServerSection, context: ssl.SSLContext | None) -> _Answer | None:
    from client.node import clock_difference

    if context is None:
        socket.create_connection((server.host, server.port), timeout=_STEP_SECONDS).close()
        return None
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the request between the findings
    with (
        httpx.Client(verify=context, timeout=_STEP_SECONDS, trust_env=server.proxy_from_environment) as client,
        client.stream("GET", f"https://{server.address}/") as response,  # of which no body is read
    ):
        certificate = response.extensions["network_stream"].get_extra_info("ssl_object").getpeercert(True)
        return _Answer(
            status=response.status_code,
            days_left=describe(ssl.DER_cert_to_PEM_cert(certificate).encode()).days_left,
            seconds_ahead=clock_difference(response.headers, datetime.now(UTC)),
        )


def _in_words(error: BaseException) -> tuple[str, str]:
    """What went wrong with a connection, and what to do."""
    while below := error.__cause__ or error.__context__:  # httpx wraps what it gets
        error = below
    code = f"verify {error.verify_code} " if isinstance(error, ssl.SSLCertVerificationError) else ""
    reason = getattr(error, "reason", None) or ""
    looks = f"{code}{reason} {' '.join(kind.__name__ for kind in type(error).__mro__)}"
    return next((text, remedy) for pattern, text, remedy in _FAULTS if re.search(pattern, looks))

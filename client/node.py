"""The process with the network: Flower's SuperNode, with what a hospital needs and the open-source build lacks.

It holds the site's key and no data. Flower's own program runs, ``flower-supernode`` of exactly one version, with these
of its private parts replaced, each of them guarded by a test:

* the client of the coordinator shows the site's certificate, follows no redirect, and reads no answer without limit;
* a bundle that the hospital has not approved is refused with code 7 before anything of it is kept;
* an instruction whose run ends while it is fetched is forgotten as a whole, so that it holds up no other one;
* it asks for work four times a second while a run is going on, and every 3 seconds otherwise.
"""

import logging
import os
import ssl
import stat
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import flwr
import httpx
from flwr.supercore.fab import Fab
from flwr.supercore.run import RunNotRunningException

from client.bundles import Approvals
from client.settings import SiteSettings
from mcrage.errors import ConfigError, PrivacyError

FLOWER = "1.41.0"
"""The only version of Flower whose private parts are known to be as expected here."""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}

_LOG = logging.getLogger("mcrage.daemon")
_MOST_BYTES = 2**26
_CLOCK_SECONDS = 4.0
_BUSY_SECONDS = 120.0
_IDLE_SLEEP, _REPLY_SLEEP = 3, 0.5  # what Flower asks for


def main() -> None:
    """Runs the SuperNode until it is told to end; takes the path of ``site.toml``."""
    show_log()
    os.environ.update(QUIET)
    try:
        settings = SiteSettings.load(Path(sys.argv[1]))
        require_flower()
        require_closed_keys(settings)
        harden(settings)
    except ConfigError as error:
        _LOG.error("%s", error)
        sys.exit(2)
    from flwr.supernode.cli.flower_supernode import flower_supernode

    sys.argv = ["flower-supernode", *flags(settings)]
    flower_supernode()
    # Flower returns here when the coordinator turned it away in mid-run; its HTTP thread would live on for ever.
    os._exit(1)


def show_log() -> None:
    """Shows what the daemon itself says; at the root logger, Flower's own lines would come twice."""
    logger = logging.getLogger("mcrage")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def require_flower() -> None:
    """Raises unless Flower is of exactly the version that was examined.

    Raises:
        ConfigError: Naming both versions.
    """
    if flwr.__version__ != FLOWER:
        raise ConfigError(f"flwr {FLOWER} is needed here, {flwr.__version__} is installed: pip install flwr=={FLOWER}")


def require_closed_keys(settings: SiteSettings) -> None:
    """Raises unless both files of the site's key are this user's alone.

    Raises:
        ConfigError: Naming the file.
    """
    for path in (settings.server.key, settings.server.node_key):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be used: {error.strerror}") from None
        if mode & 0o077:
            raise ConfigError(f"others may use the key '{path}' (mode {mode:04o}); run chmod 600")


def flags(settings: SiteSettings) -> list[str]:
    """Command line of Flower's SuperNode."""
    server, daemon = settings.server, settings.daemon
    return [
        *("--superlink", server.address, "--root-certificates", str(server.ca)),
        *("--auth-supernode-private-key", str(server.node_key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(daemon.secret)),
        *("--host", "127.0.0.1", "--port", str(daemon.port)),
    ]


def harden(settings: SiteSettings) -> None:
    """Replaces the parts of Flower that a hospital cannot rely on."""
    from flwr.supernode import fleet_http_connection, start_client_internal

    approvals, pace = Approvals(settings.daemon.approved), Pace()
    pull = start_client_internal._pull_and_store_message

    def pull_approved(*, get_fab: Callable[[str, int], Fab], **others: Any) -> int | None:
        def get_marked_fab(fab_hash: str, run_id: int) -> Fab:
            # Flower looks at a bundle only if something claims to vouch for it.
            return Fab(fab_hash, get_fab(fab_hash, run_id).content, {"valid_license": "the hospital's own list"})

        whole = {name: _told_as_failure(others.pop(name)) for name in ("pull_object", "confirm_message_received")}
        run_id = pull(get_fab=get_marked_fab, **{**others, **whole, "trusted_entities": {"hospital": "approvals"}})
        pace.saw_work(run_id is not None)
        if run_id is None:
            _forget_replies(others["state"], others["object_store"])
        return run_id

    _replace(fleet_http_connection, "FleetHttpClient", pinned_client(settings))
    _replace(start_client_internal, "_pull_and_store_message", pull_approved)
    _replace(start_client_internal, "_verify_fab", lambda fab, _: is_approved(fab, approvals))
    _replace(start_client_internal, "time", pace)


def _told_as_failure(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same call; that the run has ended meanwhile is an error like any other.

    Flower cleans up after errors, but not after that: the task of half an instruction would stay, and the runner would
    ask for the other half for more than an hour, deaf to every other run.
    """

    def called(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RunNotRunningException:
            raise ConnectionAbortedError("its run has ended meanwhile") from None

    return called


def _forget_replies(state: Any, object_store: Any) -> None:
    """Drops what was answered to an instruction that was given up while it was fetched.

    Flower sends replies only after it has fetched an instruction, and then the first that is there. With an old one
    before it, every reply would wait for the next instruction, which does not come before the reply is there.
    """
    for reply in state.get_messages_legacy(is_reply=True):
        _LOG.warning("a reply to an instruction that was given up is dropped")
        state.delete_messages(message_ids=[reply.metadata.message_id, reply.metadata.reply_to_message_id])
        object_store.delete(reply.metadata.message_id)


def _replace(module: ModuleType, name: str, value: object) -> None:
    if not hasattr(module, name):
        raise ConfigError(f"{module.__name__} of the installed Flower has no {name}: install flwr=={FLOWER}")
    setattr(module, name, value)


def is_approved(fab: Fab, approvals: Approvals) -> bool:
    """Whether the hospital has approved a bundle that names the code installed here; says why not in the log."""
    try:
        approvals.require(fab.content)
    except (PrivacyError, ConfigError) as error:
        _LOG.error("a bundle of the coordinator was refused: %s", error)
        return False
    return True


class Pace:
    """The part of :mod:`time` that Flower's loop uses, with shorter pauses while there is work."""

    def __init__(self) -> None:
        self._last_work = -_BUSY_SECONDS

    def saw_work(self, was_there: bool) -> None:
        """Tells whether the coordinator had an instruction."""
        if was_there:
            self._last_work = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleeps as long as Flower asks, or less."""
        if seconds == _REPLY_SLEEP:
            seconds = 0.05
        elif seconds == _IDLE_SLEEP and time.monotonic() - self._last_work < _BUSY_SECONDS:
            seconds = 0.25
        time.sleep(seconds)


def tls_context(settings: SiteSettings) -> ssl.SSLContext:
    """TLS 1.2 or later to a server of the federation's authority, with the site's own certificate.

    Raises:
        ConfigError: If a file is missing or not what it should be.
    """
    server = settings.server
    try:
        context = ssl.create_default_context(cafile=str(server.ca))
        context.load_cert_chain(str(server.certificate), str(server.key))
    except (OSError, ssl.SSLError) as error:
        names = f"{server.ca.name}, {server.certificate.name}, {server.key.name}"
        raise ConfigError(f"keys: one of {names} is missing or does not fit the others ({error})") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def pinned_client(settings: SiteSettings) -> type:
    """Flower's client of the coordinator, bound to one server and to the site's certificate."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    context, watch = tls_context(settings), ClockWatch()

    class PinnedFleetClient(FleetHttpClient):
        """Talks to the coordinator as this site and to nobody else."""

        def __init__(self, base_url: str, **others: Any) -> None:
            url, server = httpx.URL(base_url), settings.server
            if (url.scheme, url.host, url.port or 443) != ("https", server.host.lower(), server.port):
                raise ConfigError(f"Flower was to connect to {base_url} in the place of https://{server.address}")
            super().__init__(base_url, **{**others, "verify": context})
            timeout = self._client.timeout
            self._client.close()
            self._client = httpx.Client(
                verify=context,
                timeout=timeout,
                follow_redirects=False,
                trust_env=settings.server.proxy_from_environment,
                headers={"accept-encoding": "identity"},
                event_hooks={"response": [require_bounded, watch.look]},
            )

    return PinnedFleetClient


def require_bounded(response: httpx.Response) -> None:
    """Raises if an answer announces more than a site reads, or not how much; a packed one may unpack to any size."""
    announced = response.headers.get("content-length", "")
    is_bounded = announced.isdecimal() and len(announced) < 12 and int(announced) <= _MOST_BYTES
    if not is_bounded or "content-encoding" in response.headers:
        raise httpx.UnsupportedProtocol(f"an answer of the coordinator has no length of at most {_MOST_BYTES:,} bytes")


class ClockWatch:
    """Says in the log when this machine's clock and the server's differ by more than Flower allows."""

    def __init__(self) -> None:
        self._said = 0.0

    def look(self, response: httpx.Response) -> None:
        """Looks at the date of an answer."""
        seconds = clock_difference(response.headers, datetime.now(UTC))
        if seconds is None or abs(seconds) < _CLOCK_SECONDS or time.monotonic() < self._said:
            return
        self._said = time.monotonic() + 60
        _LOG.error("this machine's clock differs from the server's by %+.0f s: set the time, switch NTP on", seconds)


def clock_difference(headers: Mapping[str, str], here: datetime) -> float | None:
    """Seconds by which this machine's clock is ahead of the server's; None where it told no date."""
    try:
        return (here - parsedate_to_datetime(headers["date"])).total_seconds()
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


if __name__ == "__main__":
    main()

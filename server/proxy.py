"""The door of the coordinator: nginx in front of a SuperLink that listens on loopback.

A SuperLink serves starting runs, registering nodes and taking tasks on the port that the sites need, and asks nobody
who they are. What is rendered here passes on a request only if it is one of the ten that a registered node makes, over
TLS with a certificate of the federation's own authority, and if certificate and node key belong to the same site.
"""

import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
from base64 import b64decode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from mcrage.config import SITE_NAME
from mcrage.errors import ConfigError
from mcrage.files import replace_file
from server.logs import lines_of

FLEET_PATHS = tuple(
    f"/v1/fleet/{call}"
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat"),
        *("pull-messages", "push-messages", "confirm-message-received"),
        *("get-run", "get-fab", "push-object", "pull-object"),
    )
)
"""What a registered node asks of a SuperLink, and all that is passed on."""

_TEMPLATE = Path(__file__).with_name("nginx.conf.j2")
_NOBODY = "-"  # the site in the access log where none was recognised; no site can be called so
# What Flower's SuperLink bears: a signature is at most this many seconds from the future, or this old.
_MOST_AHEAD, _MOST_BEHIND = 4, 300
_TURNED_AWAY, _LAST_BYTES = "401", 2**18
_PLACES_WITHOUT_PATH = "/usr/sbin:/usr/local/sbin"


@dataclass(frozen=True)
class ProxySite:
    """A site as the proxy knows it; several serials and keys while it changes them.

    Attributes:
        name: Of the site.
        serials: Of its certificates, as :func:`mcrage.pki.describe` gives them.
        public_keys: Node keys as they stand in the header ``flwr-public-key``: base64.
    """

    name: str
    serials: tuple[str, ...]
    public_keys: tuple[str, ...]

    def check(self) -> None:
        """Lets nothing into a configuration that could mean anything else there.

        Raises:
            ConfigError: If the name, a serial or a key has another form.
        """
        if not re.fullmatch(SITE_NAME, self.name):
            raise ConfigError(
                f"site {self.name!r}: a name is 1 to 64 of a-z, 0-9, - and _, and begins with a letter or digit"
            )
        for serial in self.serials:
            if not re.fullmatch(r"([0-9A-F]{2}){1,20}", serial):
                raise ConfigError(f"site '{self.name}': serial {serial!r} is not pairs of digits 0-9 and A-F")
        for key in self.public_keys:
            if not _is_base64(key):
                raise ConfigError(f"site '{self.name}': a node key is not base64 of 16 to 2,048 characters")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """The settings of nginx for one federation.

    Attributes:
        folder: Where everything of nginx lies: configuration, logs, process id, bodies on their way. As root, the
            workers run as the owner of this folder.
        listen: Address and port that the sites connect to.
        upstream_port: Of the SuperLink on 127.0.0.1, which has a certificate of ``ca`` for ``localhost``.
        server_certificate: PEM file that is shown to the sites.
        server_key: PEM file of its key.
        ca: PEM file of the authority of the federation; no other one counts.
        sites: Who may connect.
        max_body_mb: Largest request in MiB. Flower cuts what it sends into objects of 5 MB.
        requests_per_second: Of one site, after ``burst``.
        burst: Requests that a site may send at once. A round pulls and pushes some 60 objects.
        connections_per_site: Requests of one site at the same time. A SuperNode makes about four.
        connections: Of each of the two workers, among them those to the SuperLink.
    """

    folder: Path
    listen: tuple[str, int]
    upstream_port: int
    server_certificate: Path
    server_key: Path
    ca: Path
    sites: tuple[ProxySite, ...] = ()
    max_body_mb: int = 16
    requests_per_second: int = 50
    burst: int = 200
    connections_per_site: int = 20
    connections: int = 4096

    @property
    def configuration(self) -> Path:
        """The file that :meth:`write` writes."""
        return self.folder / "nginx.conf"

    @property
    def access_log(self) -> Path:
        """One JSON object a line: time, site, path, status, bytes in and out, seconds, and the site's clock."""
        return self.folder / "access.log"

    def render(self) -> str:
        """The configuration as text.

        Raises:
            ConfigError: If a value could not stand in it as what it is, or two sites share a name, serial or key.
        """
        _check_sites(self.sites)
        environment = Environment(undefined=StrictUndefined, trim_blocks=True)
        template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        paths = ("folder", "server_certificate", "server_key", "ca")
        numbers = ("max_body_mb", "requests_per_second", "burst", "connections_per_site", "connections")
        return template.render(
            {name: _path(name, getattr(self, name)) for name in paths}
            | {name: _whole(name, getattr(self, name), most=1_000_000) for name in numbers},
            listen=_address(*self.listen),
            upstream_port=_whole("upstream_port", self.upstream_port, most=65535),
            fleet_paths=FLEET_PATHS,
            sites=self.sites,
            nobody=_NOBODY,
            user=_worker_user(self.folder),
        )

    def write(self) -> None:
        """Writes the configuration, whole or not at all."""
        self._write(self.configuration)

    def check(self) -> None:
        """Lets nginx read what was written.

        Raises:
            ConfigError: In nginx's own words.
        """
        self._check(self.configuration)

    def command(self) -> list[str]:
        """Runs nginx in the foreground. SIGTERM ends it, and SIGQUIT once it has answered what it was asked."""
        return _nginx(self.folder, self.configuration)

    def reload(self, process_id: int) -> None:
        """Gives a running nginx what is rendered now; it goes on as before if that is refused.

        Args:
            process_id: Of the process that :meth:`command` became.

        Raises:
            ConfigError: If nginx refuses it, or does not run.
        """
        draft = self.folder / "nginx.conf.draft"
        self._write(draft)
        self._check(draft)
        draft.replace(self.configuration)
        try:
            if process_id <= 1:  # 0 and -1 would reach processes that are not nginx
                raise ProcessLookupError
            os.kill(process_id, signal.SIGHUP)
        except OSError:
            raise ConfigError(
                f"nginx does not run as process {process_id}; it will read the change at its start"
            ) from None

    def _write(self, path: Path) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(path, self.render().encode())

    def _check(self, path: Path) -> None:
        command = [*_nginx(self.folder, path), "-t", "-q"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"nginx refuses its configuration: {_main_line(done.stderr)}")


def find_nginx() -> str:
    """The nginx of this machine.

    Raises:
        ConfigError: If there is none.
    """
    found = shutil.which("nginx") or shutil.which("nginx", path=_PLACES_WITHOUT_PATH)
    if found is None:
        raise ConfigError("nginx is not installed; on Debian or Ubuntu: apt install nginx-light")
    return found


def bytes_by_site(log: Path) -> dict[str, tuple[int, int]]:
    """Bytes that came from each site and went to it, headers included, since :func:`counted_since`.

    Args:
        log: Access log of the proxy; the old ones that are kept beside it count as well.

    Raises:
        ConfigError: If the log cannot be read.
    """
    came: Counter[str] = Counter()
    went: Counter[str] = Counter()
    for entry in _entries(log):
        came[entry["site"]] += entry["bytes_in"]
        went[entry["site"]] += entry["bytes_out"]
    return {site: (came[site], went[site]) for site in sorted(came) if site != _NOBODY}


def wrong_clocks(log: Path) -> dict[str, int]:
    """Seconds by which the clocks of sites are ahead of this machine's that were turned away by their newest request.

    Args:
        log: Access log of the proxy; its last part is read. Without it nobody was turned away.
    """
    newest = {str(entry.get("site")): entry for entry in _last_entries(log)}
    found = {site: _ahead(entry) for site, entry in newest.items() if str(entry.get("status")) == _TURNED_AWAY}
    return {site: seconds for site, seconds in found.items() if site != _NOBODY and seconds is not None}


def _ahead(entry: Mapping[str, Any]) -> int | None:
    """None where the clock was no reason to turn it away, or was not told."""
    try:
        seconds = (_moment(entry["clock"]) - _moment(entry["time"])).total_seconds()
    except (KeyError, TypeError, ValueError):
        return None
    return round(seconds) if seconds > _MOST_AHEAD or seconds < -_MOST_BEHIND else None


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _last_entries(log: Path) -> Iterator[Mapping[str, Any]]:
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LAST_BYTES))
        for line in file.read(_LAST_BYTES).splitlines():
            with suppress(ValueError):  # the first may be half a line
                entry = json.loads(line)
                if isinstance(entry, dict):
                    yield entry


def counted_since(log: Path) -> datetime | None:
    """When the oldest request was answered that is still in a log; None if there is none.

    Raises:
        ConfigError: If the log cannot be read.
    """
    first = next(_entries(log), None)
    return None if first is None else datetime.fromisoformat(first["time"])


def _entries(log: Path) -> Iterator[Mapping[str, Any]]:
    try:
        for line in lines_of(log):
            with suppress(json.JSONDecodeError):  # a line that a crash cut off
                yield json.loads(line)
    except OSError as error:
        raise ConfigError(f"{log}: {error.strerror}; nginx writes it once it runs") from None


def _nginx(folder: Path, configuration: Path) -> list[str]:
    # until the configuration names a log, errors go to stderr: the built-in place is often not ours to write
    return [find_nginx(), "-p", str(folder.absolute()), "-e", "stderr", "-c", str(configuration.absolute())]


def _main_line(text: str) -> str:
    found = re.search(r"\[emerg\] (?:\d+#\d+: )?(.*)", text)
    return found[1] if found else text.strip() or "it says nothing"


def _check_sites(sites: Iterable[ProxySite]) -> None:
    owners: dict[tuple[str, str], str] = {}
    for site in sites:
        site.check()
        own = {"name": (site.name,), "certificate serial": site.serials, "node key": site.public_keys}
        for each in ((what, value) for what, values in own.items() for value in values):
            if each in owners:
                raise ConfigError(
                    f"sites '{owners[each]}' and '{site.name}' have the same {each[0]}; each needs its own"
                )
            owners[each] = site.name


def _is_base64(text: str) -> bool:
    if not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", text) or not 16 <= len(text) <= 2048:
        return False
    try:
        b64decode(text, validate=True)
    except ValueError:
        return False
    return True


def _path(name: str, path: Path) -> str:
    text = str(path.absolute())
    # quotes and backslashes end a value, and some directives take $ for a variable
    if not text.isprintable() or set(text) & set('"\\$'):
        raise ConfigError(f"{name}: {text!r} has a quote, backslash, $ or control character; choose another path")
    return text


def _whole(name: str, value: int, *, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{name} is {value!r}; expected a whole number from 1 to {most:,}")
    return value


def _address(host: str, port: int) -> str:
    try:
        if "%" in host:  # a zone, in which anything may stand
            raise ValueError
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ConfigError(f"listen: {host!r} is not an IP address; 0.0.0.0 and :: mean all of this machine") from None
    shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{shown}:{_whole('listen port', port, most=65535)}"


def _worker_user(folder: Path) -> str:
    """Owner and group of the folder, for a master process that is root; empty for any other, which keeps its user."""
    if os.geteuid() != 0 or not folder.exists():
        return ""
    try:
        return f"{folder.owner()} {folder.group()}"
    except KeyError:
        raise ConfigError(
            f"{folder} belongs to a user without a name; give it to the user that nginx shall run as"
        ) from None

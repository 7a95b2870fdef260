"""The coordinator's folder: its settings, its keys, its sites, its database and its runs.

::

    HOME/
      coordinator.toml    names, port and limits
      pki/                the federation's authority and the server's certificate (mcrage.pki)
      sites.json          which sites there shall be, with their keys: written by ``site add`` and its like
      former-keys.json    keys that are out of use for ever, with their sites
      state/              the SuperLink's database, the registry of node ids, the secret of its own processes
      proxy/              nginx: configuration and logs
      flwr/               Flower's home
      mcrage.fab          the bundle that every run uses
      runs/NAME/          a run: settings, checkpoints, model, report
"""

import ipaddress
import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mcrage.errors import ConfigError
from mcrage.files import replace_file

RUN_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_SETTINGS, _SITES, _FORMER = "coordinator.toml", "sites.json", "former-keys.json"
PROCESS_MARK = "MCRAGE_COORDINATOR"
"""In the environment of all that a coordinator starts: its folder. Nobody sets it by hand, as they may FLWR_HOME."""

_REGISTRY, _SECRET = "state/registry.json", "state/runtime.secret"


class CoordinatorSettings(BaseModel):
    """``coordinator.toml``.

    Attributes:
        names: DNS names and addresses under which sites reach the server.
        listen: Address and port of the proxy, for all the world.
        superlink_port: On loopback.
        max_body_mb: Largest request of a site; Flower sends pieces of 5 MB.
        requests_per_second: Of one site.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    names: tuple[str, ...] = Field(min_length=1)
    listen: str = "0.0.0.0:8443"
    superlink_port: int = Field(default=18000, ge=1, lt=2**16)
    max_body_mb: int = Field(default=16, ge=6, le=1024)
    requests_per_second: int = Field(default=50, ge=1, le=10_000)

    @field_validator("listen")
    @classmethod
    def _is_address(cls, listen: str) -> str:
        host, _, port = listen.rpartition(":")
        try:
            ipaddress.ip_address(host.strip("[]"))
            is_address = port.isdecimal() and 0 < int(port) < 2**16
        except ValueError:
            is_address = False
        if not is_address:
            raise ValueError("expected an IP address and a port, such as 0.0.0.0:8443")
        return listen

    @model_validator(mode="after")
    def _has_two_ports(self) -> "CoordinatorSettings":
        if self.address[1] == self.superlink_port:
            raise ValueError(f"listen and superlink_port have the same port, {self.superlink_port}")
        return self

    @property
    def address(self) -> tuple[str, int]:
        """Where the proxy listens."""
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)


@dataclass(frozen=True)
class Home:
    """A coordinator's folder.

    Args:
        folder: Where it is.
    """

    folder: Path

    @classmethod
    def create(cls, folder: Path, settings: CoordinatorSettings) -> "Home":
        """An empty folder of a coordinator, without keys.

        Raises:
            ConfigError: If there is one already.
        """
        home = cls(folder.absolute())
        home.require_new()
        for part in (".", "state", "proxy", "flwr", "runs", "requests"):
            (home.folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        home.folder.chmod(0o700)
        replace_file(home.secret, secrets.token_bytes(32))
        home.write_sites({})
        replace_file(home.registry, b"{}\n")
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.model_dump(mode="json").items()]
        replace_file(home.folder / _SETTINGS, ("\n".join(lines) + "\n").encode())
        return home

    def require_new(self) -> None:
        """Raises if there is a coordinator's folder already.

        Raises:
            ConfigError: If so.
        """
        if (self.folder / _SETTINGS).exists():
            raise ConfigError(f"'{self.folder}' is a coordinator's folder already")

    @classmethod
    def open(cls, folder: Path) -> "Home":
        """The folder of a coordinator.

        Raises:
            ConfigError: If it is none.
        """
        if not (folder / _SETTINGS).is_file():
            raise ConfigError(f"'{folder}' is no coordinator's folder: 'python -m server init' makes one")
        return cls(folder.absolute())

    @property
    def settings(self) -> CoordinatorSettings:
        """What ``coordinator.toml`` says.

        Raises:
            ConfigError: With a line for everything that is wrong in it.
        """
        path = self.folder / _SETTINGS
        try:
            return CoordinatorSettings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise ConfigError("\n".join(f"{path}: {line}" for line in problems(error))) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None

    @property
    def pki(self) -> Path:
        """Folder of the authority and of the server's certificate."""
        return self.folder / "pki"

    @property
    def database(self) -> Path:
        """The SuperLink's."""
        return self.folder / "state" / "superlink.sqlite"

    @property
    def secret(self) -> Path:
        """By which the SuperLink knows the process that runs its ServerApps."""
        return self.folder / _SECRET

    @property
    def registry(self) -> Path:
        """Sites and the node ids that Flower gave them: written by the running coordinator alone."""
        return self.folder / _REGISTRY

    @property
    def flower(self) -> Path:
        """Flower's home."""
        return self.folder / "flwr"

    @property
    def proxy(self) -> Path:
        """Folder of the proxy."""
        return self.folder / "proxy"

    @property
    def bundle(self) -> Path:
        """The app, as one file."""
        return self.folder / "mcrage.fab"

    def run(self, name: str) -> Path:
        """Folder of a run.

        Raises:
            ConfigError: If the name is not one.
        """
        if not RUN_NAME.fullmatch(name):
            raise ConfigError(f"run name {name!r}: expected a-z, 0-9, - and _, at most 64, no - or _ first")
        return self.folder / "runs" / name

    def runs(self) -> list[str]:
        """Names of all runs, one that was never wholly begun among them."""
        found = (self.folder / "runs").iterdir()
        return sorted(path.name for path in found if RUN_NAME.fullmatch(path.name) and path.is_dir())

    @property
    def list_of_sites(self) -> Path:
        """The file that :meth:`sites` reads."""
        return self.folder / _SITES

    def sites(self) -> dict[str, "SiteEntry"]:
        """The sites that there shall be, by name.

        Raises:
            ConfigError: If the file is damaged.
        """
        try:
            content = json.loads(self.list_of_sites.read_text(encoding="utf-8"))
            return {name: SiteEntry.model_validate(entry) for name, entry in content.items()}
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"'{self.list_of_sites}' cannot be used ({type(error).__name__})") from None

    def write_sites(self, sites: Mapping[str, "SiteEntry"]) -> None:
        """Replaces the list of sites."""
        content = {name: entry.model_dump(mode="json") for name, entry in sorted(sites.items())}
        replace_file(self.list_of_sites, (json.dumps(content, indent=1) + "\n").encode())

    def former_keys(self) -> dict[str, str]:
        """Keys that are out of use for ever, as they stand in ``sites.json``, with the site that had each.

        Raises:
            ConfigError: If the file is damaged.
        """
        return {key: str(site) for key, site in read_json(self.folder / _FORMER).items()}

    def write_former_keys(self, keys: Mapping[str, str]) -> None:
        """Replaces the list of keys that are out of use."""
        write_json(self.folder / _FORMER, keys)

    def read_registry(self) -> dict[str, Any]:
        """Node ids by site and key."""
        try:
            return dict(json.loads(self.registry.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            return {}  # it is made anew from Flower's own list


def problems(error: ValidationError) -> list[str]:
    """A line for everything that is wrong with settings, without what was given."""
    found = [(".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")) for each in error.errors()]
    return [f"{place}: {text}" if place else text for place, text in found]


class SiteKey(BaseModel):
    """A key of a site.

    Attributes:
        serial: Of its certificate, as the proxy prints it.
        public_key: As it stands in the header of Flower's requests.
        expires: End of the certificate.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    serial: str
    public_key: str
    expires: datetime

    @property
    def days_left(self) -> int:
        """Whole days until the certificate ends."""
        return (self.expires - datetime.now(UTC)).days


class SiteEntry(BaseModel):
    """A site as the coordinator knows it.

    Attributes:
        keys: Of its connection; several while one replaces another, the newest last.
        signing_key: By which its replies are checked, hexadecimal; it stays.
        added: When it was let in.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[SiteKey, ...] = Field(min_length=1)
    signing_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    added: datetime


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file."""
    replace_file(path, (json.dumps(dict(content), indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        ConfigError: If it is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"'{path}' cannot be used ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ConfigError(f"'{path}' does not hold a JSON object")
    return content


def set_environment(home: Home) -> dict[str, str]:
    """The environment of Flower's programs at a coordinator: nothing is sent home, nothing is installed."""
    quiet = {
        PROCESS_MARK: str(home.folder.resolve()),
        "FLWR_HOME": str(home.flower),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "PYTHONUNBUFFERED": "1",
        "FLWR_LOG_LEVEL": "WARNING",
    }
    return os.environ | quiet

"""``site.toml``: the one file that a hospital's administrator edits.

Every path in it counts from its own folder. What the hospital allows is not here but in the policy of its private
folder (:mod:`client.policy`), which may belong to someone else.
"""

import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mcrage.config import SITE_NAME, Scalar
from mcrage.errors import ConfigError

PARTS = ("network", "data")
"""Halves of the daemon; two users may run them."""

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):(?P<port>[0-9]{1,5})")
_MOST_BYTES = 2**14


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _is_plain(cls, value: object) -> object:
        if isinstance(value, Path) and not str(value).isprintable():
            raise ValueError("a path has printable characters only")
        return value


class SiteSection(_Section):
    """What is the hospital's own.

    Attributes:
        name: Of the site, as the coordinator knows it.
        data: Its table, CSV or Parquet.
        schema_file: The data dictionary.
        private: Folder of policy, ledger, secret and logs.
        num_threads: Threads of torch.
    """

    name: str = Field(pattern=SITE_NAME)
    data: Path
    schema_file: Path
    private: Path = Path("private")
    num_threads: int = Field(default=1, ge=1, le=1024)


class ServerSection(_Section):
    """Where the coordinator is, and by what it and the site know each other.

    Attributes:
        address: ``host:port`` of the coordinator's proxy.
        ca: Certificate of the federation's authority.
        certificate: The site's own, from the coordinator.
        key: Its private key, for TLS.
        node_key: The same key in the form that Flower reads.
        proxy_from_environment: Whether ``HTTPS_PROXY`` and its like are followed.
    """

    address: str
    ca: Path = Path("keys/ca.crt")
    certificate: Path = Path("keys/site.crt")
    key: Path = Path("keys/site.key")
    node_key: Path = Path("keys/node.key")
    proxy_from_environment: bool = False

    @field_validator("address")
    @classmethod
    def _is_address(cls, address: str) -> str:
        match = _ADDRESS.fullmatch(address)
        if match is None or not 0 < int(match["port"]) < 2**16:
            raise ValueError("expected host:port, such as federation.example.org:8443")
        return address

    @property
    def host(self) -> str:
        """Name or address of the server."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Its port."""
        return int(self.address.rpartition(":")[2])


class DaemonSection(_Section):
    """How the daemon runs.

    Attributes:
        port: On loopback, between the process with the network and the one with the data.
        secret: File that both read, by which they know each other.
        approved: List of the bundles that the hospital has approved.
        max_task_seconds: An instruction that takes longer is abandoned.
        max_memory_gb: Of the process with the data; 0 for no limit of its own.
    """

    port: int = Field(default=9094, ge=1, lt=2**16)
    secret: Path = Path("keys/runtime.secret")
    approved: Path = Path("approved.json")
    max_task_seconds: float = Field(default=3600.0, gt=0)
    max_memory_gb: float = Field(default=0.0, ge=0, le=2**20)


class SiteSettings(_Section):
    """A hospital's ``site.toml``.

    Attributes:
        file: Where it was read.
        site, server, daemon: Its sections.
    """

    file: Path
    site: SiteSection
    server: ServerSection
    daemon: DaemonSection = DaemonSection()

    @classmethod
    def load(cls, path: Path) -> "SiteSettings":
        """The settings of a file, with absolute paths.

        Raises:
            ConfigError: With a line for everything that is wrong in it.
        """
        try:
            content = _read(path)
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"'{path}' is not TOML: {str(error).splitlines()[0]}") from None
        if "file" in content:  # not the administrator's to say
            raise ConfigError(f"{path}: file: extra inputs are not permitted")
        try:
            settings = cls.model_validate({"file": path, **content})
        except ValidationError as error:
            raise ConfigError("\n".join(f"{path}: {_readable(dict(each))}" for each in error.errors())) from None
        return settings.model_copy(
            update={name: _absolute(getattr(settings, name), path) for name in ("site", "server", "daemon")}
        )

    @property
    def node_config(self) -> dict[str, Scalar]:
        """The site as :meth:`client.site.Site.of` takes it."""
        return {
            "site": self.site.name,
            "data-path": str(self.site.data),
            "schema-path": str(self.site.schema_file),
            "private-dir": str(self.site.private),
            "num-threads": self.site.num_threads,
        }


def parts_of(only: str) -> tuple[str, ...]:
    """Halves of the daemon that ``--only`` stands for: one of :data:`PARTS`, or all of them for ``both``.

    Raises:
        ConfigError: If it is something else.
    """
    if only not in (*PARTS, "both"):
        raise ConfigError(f"--only: expected network or data, it is {only!r}")
    return PARTS if only == "both" else (only,)


def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb", opener=_opened) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"'{path}' is not a file")
        if stat.S_IMODE(status.st_mode) & 0o022:
            raise ConfigError(f"'{path}' can be written by others: chmod go-w")
        if status.st_size > _MOST_BYTES:
            raise ConfigError(f"'{path}' has {status.st_size:,} bytes; at most {_MOST_BYTES:,} are read")
        return tomllib.loads(file.read().decode("utf-8"))


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would be waited for


def _absolute(section: _Section, file: Path) -> _Section:
    folder = file.absolute().parent
    paths = {name: folder / value for name, value in section if isinstance(value, Path)}
    return section.model_copy(update=paths)


def _readable(problem: dict[str, Any]) -> str:
    where = ".".join(part if str(part).isprintable() else repr(part) for part in problem["loc"])
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}"

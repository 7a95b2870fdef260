"""Who may call itself what: the coordinator's list of sites and their nodes.

The file is JSON, ``{"hosp-a": {"node_ids": [123, 456], "signing_key": "<64 hexadecimal digits>"}, ...}``; other fields
are somebody else's. A site has several nodes while its key is rotated, the newest last. Replies of a site without a
signing key need no signature.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcrage.config import SITE_NAME
from mcrage.errors import ConfigError
from mcrage.signing import Signer

_LOG = logging.getLogger("mcrage.server")

_KEY = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Registry:
    """What the file says.

    Attributes:
        site_of: Site by node id; a site's newest node comes last.
        signers: Who has to sign replies, by node id.
    """

    site_of: Mapping[int, str]
    signers: Mapping[int, Signer]


class SitesFile:
    """The list as it is now: sites are added and removed while a run goes on.

    Args:
        path: The file; empty for none, with which every node may take part under a name that is free.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._last: Registry | None = None

    def current(self) -> Registry | None:
        """The list, read anew; None without a file.

        Once it was read, a file that cannot be read is logged and the list before it stays in force: an editor may be
        half way through.

        Raises:
            ConfigError: If it cannot be read the first time.
        """
        if not self._path:
            return None
        try:
            self._last = read_registry(Path(self._path))
        except ConfigError as error:
            if self._last is None:
                raise
            _LOG.warning("%s; the list before it stays in force", error)
        return self._last


def read_registry(path: Path) -> Registry:
    """The list in a file.

    Raises:
        ConfigError: If the file is missing or not as it has to be.
    """
    site_of: dict[int, str] = {}
    signers: dict[int, Signer] = {}
    for site, entry in _content(path).items():
        if not re.fullmatch(SITE_NAME, site):
            raise ConfigError(f"sites-file '{path}': {site!r} is no name of a site: use a-z, 0-9, - and _")
        where = f"sites-file '{path}': site '{site}'"
        node_ids = _node_ids(entry, where)
        for node_id in node_ids:
            if site_of.setdefault(node_id, site) != site:
                raise ConfigError(f"sites-file '{path}': node {node_id} is that of two sites")
        if key := _signing_key(entry, where):
            signers |= dict.fromkeys(node_ids, Signer(site, key))
    return Registry(site_of, signers)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"sites-file '{path}': {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"sites-file '{path}': it is not JSON") from None
    if not isinstance(content, dict):
        raise ConfigError(f"sites-file '{path}': expected an object of sites by name")
    return content


def _node_ids(entry: Any, where: str) -> list[int]:
    node_ids = entry.get("node_ids") if isinstance(entry, dict) else None
    if not isinstance(node_ids, list) or not all(type(node_id) is int and node_id > 0 for node_id in node_ids):
        raise ConfigError(f"{where}: expected node_ids, a list of whole numbers")
    return node_ids


def _signing_key(entry: Mapping[str, Any], where: str) -> bytes:
    """Empty where there is none."""
    key = entry.get("signing_key", "")
    if not isinstance(key, str) or (key and not _KEY.fullmatch(key)):
        raise ConfigError(f"{where}: expected signing_key, 64 hexadecimal digits")
    return bytes.fromhex(key)

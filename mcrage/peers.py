"""The sites that share noise in a run: whose key for masks is whose, as each of them has signed it.

The server carries the keys from site to site. With a signature that a hospital can check against the signing key that
it knows of another one, the server cannot put a key of its own in the place of a site's and read what the masks hide.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mcrage.config import SITE_NAME
from mcrage.errors import MessageError
from mcrage.privacy.shared import MOST_SITES
from mcrage.signing import public_key, signing_key
from mcrage.wire import loads

_HEX = {"key": 64, "signing_key": 64, "signature": 128}


@dataclass(frozen=True)
class Peer:
    """A site's key for the masks of a run.

    Attributes:
        key: X25519, 32 bytes.
        signing_key: Ed25519, 32 bytes: by which the site is known.
        signature: Of the site, over run, name and key.
    """

    key: bytes
    signing_key: bytes
    signature: bytes

    @classmethod
    def signed(cls, key: bytes, *, site: str, run: str, secret: bytes) -> "Peer":
        """What a site with this secret offers."""
        return cls(key, public_key(secret), signing_key(secret).sign(_content(run, site, key)))

    @classmethod
    def parse(cls, text: str, *, site: str, run: str) -> "Peer":
        """What :meth:`to_json` gave, if the site signed it for this run.

        Raises:
            MessageError: If it did not, or it is anything else.
        """
        return _read(loads(text, "the key for masks"), site=site, run=run)

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self._hex())

    def _hex(self) -> dict[str, str]:
        return {name: getattr(self, name).hex() for name in _HEX}


def peers_to_json(peers: Mapping[str, Peer]) -> str:
    """Who is asked together, as text: the same for all of them."""
    return json.dumps({site: peers[site]._hex() for site in sorted(peers)})


def peers_from_json(text: str, *, run: str) -> dict[str, Peer]:
    """Who is asked together; each key was found to be signed by its site for this run.

    Raises:
        MessageError: If one is not, or the text is anything else.
    """
    content = loads(text, "the keys for masks")
    if not isinstance(content, dict) or not 2 <= len(content) <= MOST_SITES:
        raise MessageError(f"the keys for masks: expected those of 2 to {MOST_SITES:,} sites")
    if not all(re.fullmatch(SITE_NAME, site) for site in content):
        raise MessageError("the keys for masks: a name is not one of a site")
    return {site: _read(offer, site=site, run=run) for site, offer in content.items()}


def _read(content: object, *, site: str, run: str) -> Peer:
    if not isinstance(content, dict) or set(content) != set(_HEX):
        raise MessageError("a key for masks: expected a key, a signing key and a signature")
    if not all(isinstance(content[name], str) and _is_hex(content[name], size) for name, size in _HEX.items()):
        raise MessageError("a key for masks: expected hexadecimal digits of the right number")
    peer = Peer(**{name: bytes.fromhex(content[name]) for name in _HEX})
    try:
        Ed25519PublicKey.from_public_bytes(peer.signing_key).verify(peer.signature, _content(run, site, peer.key))
    except InvalidSignature:
        raise MessageError(f"the key for masks of site {site} is not signed by it for this run") from None
    return peer


def _is_hex(text: str, size: int) -> bool:
    return re.fullmatch(f"[0-9a-f]{{{size}}}", text) is not None


def _content(run: str, site: str, key: bytes) -> bytes:
    return json.dumps(["mcrage mask key 1", run, site, key.hex()]).encode()

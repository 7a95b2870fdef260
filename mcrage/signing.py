"""Signed replies: a hospital's own signature binds what it answers to its name and to the one instruction it answers.

TLS and Flower tell the coordinator which node sent something; that a reply belongs to the instruction that it claims to
answer is told by an id alone. The key is derived from the site's secret, so that it is where the patients' rows are and
not where the network is, and lives as long as the site does.
"""

import hashlib
import json
import re
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mcrage.errors import ConfigError, MessageError
from mcrage.privacy.keyed import derive
from mcrage.wire import Wire

SIGNATURE = "signature"
"""Name of the value that holds it."""

_URI = re.compile(r"urn:mcrage:signing-key:([0-9a-f]{64})")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


class Signer(NamedTuple):
    """Who has to have signed.

    Attributes:
        site: Name of the site.
        public_key: Its Ed25519 key, 32 bytes.
    """

    site: str
    public_key: bytes


def signing_key(secret: bytes) -> Ed25519PrivateKey:
    """The key of a site with this secret of 32 bytes, always the same (Ed25519, RFC 8032)."""
    return Ed25519PrivateKey.from_private_bytes(derive(secret, "signing key of replies"))


def public_key(secret: bytes) -> bytes:
    """The 32 bytes by which everybody can check what a site with this secret signed."""
    return signing_key(secret).public_key().public_bytes_raw()


def signed(wire: Wire, *, site: str, instruction: str, secret: bytes) -> Wire:
    """The reply with a signature over all of it, the site's name and the id of the instruction."""
    signature = signing_key(secret).sign(_digest(wire, site, instruction))
    return Wire({**wire.values, SIGNATURE: signature.hex()}, wire.arrays)


def unsigned(wire: Wire, *, signer: Signer | None, instruction: str) -> Wire:
    """The reply without its signature, once that was found to be right; None as signer takes any.

    Raises:
        MessageError: If there is no signature, or it is not this site's over this reply to this instruction.
    """
    rest = Wire({name: value for name, value in wire.values.items() if name != SIGNATURE}, wire.arrays)
    if signer is None:
        return rest
    signature = wire.values.get(SIGNATURE)
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        raise MessageError("its reply is not signed")
    key = Ed25519PublicKey.from_public_bytes(signer.public_key)
    try:
        key.verify(bytes.fromhex(signature), _digest(rest, signer.site, instruction))
    except InvalidSignature:
        raise MessageError("its reply is not signed by this site as an answer to what it was asked") from None
    return rest


def as_extension(key: bytes) -> x509.SubjectAlternativeName:
    """How a certificate request tells the site's public key."""
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"urn:mcrage:signing-key:{key.hex()}")])


def requested_key(request_pem: bytes) -> bytes:
    """The public key that a certificate request tells; that the request is good is somebody else's to check.

    Raises:
        ConfigError: If it tells none, or more than one.
    """
    found: list[str] = []
    with suppress(ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        extensions = x509.load_pem_x509_csr(request_pem).extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        found = [match[1] for uri in uris if (match := _URI.fullmatch(uri))]
    if len(found) != 1:
        raise ConfigError("the request tells no signing key of the site: 'python -m client enroll' makes one that does")
    return bytes.fromhex(found[0])


def _digest(wire: Wire, site: str, instruction: str) -> bytes:
    """SHA-256 of every value and array; Python writes each float so that no other one is written the same."""
    arrays = [
        [name, array.dtype.str, list(array.shape), hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()]
        for name, array in sorted(wire.arrays.items())
    ]
    content = ["mcrage reply 1", site, instruction, sorted(wire.values.items()), arrays]
    return hashlib.sha256(json.dumps(content).encode()).digest()

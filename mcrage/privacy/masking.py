"""Secure aggregation: masks that hide what a site sends and cancel in the sum of all sites that were asked together.

Every two sites share a key (X25519, RFC 7748), of which neither the server nor anybody else knows more than the public
halves. From it and from the instruction both derive the same stream (HKDF-SHA256, AES-256-CTR); one adds it and the
other subtracts it, modulo 2³². Of one site's masked vector, or of the sum of any but all of them, whoever knows none of
the keys of two of the missing or honest sites learns nothing: it is uniform (Bonawitz et al., 2017, without their
recovery of drop-outs).

**All or nothing.** A sum opens only if every site that was asked together answered. No mask is ever revealed, so that
there is no list of survivors to lie about and no late reply that a revealed mask would lay bare; a sum that stays
closed is asked for anew, of the sites that are left, as another release with noise of its own. The context of the
masks has to hold everything that the reply depends on and the sites that were asked: then two requests never share a
mask, and sites that were told different things send vectors whose masks do not cancel.

Who runs the server may also be one of the sites, or several of them; what is then protected is told with the noise
(:mod:`mcrage.privacy.shared`).
"""

from collections.abc import Iterable, Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from numpy.typing import NDArray

from mcrage.errors import PrivacyError
from mcrage.privacy.keyed import KEY_BYTES, KeyedBits, derive

Words = NDArray[np.uint32]


class MaskKey:
    """A site's half of the keys that it shares with the others.

    Args:
        secret: The site's 32 bytes.
        state: Digest of all that the site's replies depend on beside what it is asked, such as its table: with another
            one it has another key.
    """

    def __init__(self, secret: bytes, state: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(derive(secret, "key of masks", state))

    @property
    def public(self) -> bytes:
        """The 32 bytes for the other sites."""
        return self._key.public_key().public_bytes_raw()

    def mask(self, size: int, *, site: str, peers: Mapping[str, bytes], context: bytes) -> Words:
        """What this site adds to its vector, modulo 2³².

        Args:
            size: Numbers of the vector.
            site: Its name.
            peers: Public key of every site that is asked together with it, its own among them.
            context: Of this request; the module says what has to be in it.

        Raises:
            PrivacyError: If its own key is not among the peers, there is no other site, two have the same key, or a
                key is none.
        """
        if peers.get(site) != self.public:
            raise PrivacyError("this site's key is not the one that the server gave to the other sites")
        if len(peers) < 2 or len({*peers.values()}) < len(peers):
            raise PrivacyError("masks take at least two sites, each with a key of its own")
        total = np.zeros(size, dtype=np.uint32)
        for peer, public in peers.items():
            if peer == site:
                continue
            first, second = sorted([site, peer])
            stream = _stream(derive(self._shared(public), "mask", context, first, second), size)
            if site == first:
                total += stream
            else:
                total -= stream
        return total

    def _shared(self, public: bytes) -> bytes:
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(public))
        except ValueError:  # of another length, or of small order
            raise PrivacyError("a site's key is none that masks can be made with") from None


def opened(masked: Iterable[Words]) -> NDArray[np.int32]:
    """The sum of the vectors without their masks, as signed numbers; those of all sites that were asked together.

    Where one is missing the result is uniform and says nothing. Sums beyond ±2³¹ come out modulo 2³².
    """
    first, *others = masked
    total = first.copy()
    for each in others:
        total += each
    return total.view(np.int32)


def _stream(key: bytes, size: int) -> Words:
    assert len(key) == KEY_BYTES
    words = KeyedBits(key).uint64(-(-size // 2))
    return words.astype("<u8", copy=False).view("<u4")[:size].astype(np.uint32, copy=False)

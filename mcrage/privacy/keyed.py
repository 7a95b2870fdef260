"""Randomness from a secret of 32 bytes: the same key gives the same bits, another key unrelated ones.

Whoever has the key can take the noise away again. So a site's secret stays in one file that only its owner reads, and
each use has a key of its own, derived from the secret and from everything that tells this use from others.
"""

import builtins
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from mcrage.errors import PrivacyError

KEY_BYTES = 32

_MODES = (0o600, 0o400)
_ENCODED: dict[type, tuple[bytes, Callable[..., bytes]]] = {
    str: (b"s", str.encode),
    int: (b"i", lambda number: str(number).encode()),
    bytes: (b"b", bytes),
}


def derive(key: bytes, *context: str | int | bytes) -> bytes:
    """A key of its own for each context: HKDF-SHA256 (RFC 5869).

    Type and length of every part go in, so that ("a", "b"), ("ab",), ("1",) and (1,) give four keys.

    Raises:
        PrivacyError: If the key does not have 32 bytes, or a part is neither text, a Python integer nor bytes.
    """
    info = b"".join(_encoded(part) for part in context)
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=info).derive(_checked(key))


class KeyedBits:
    """A stream of bits: the AES-256-CTR keystream of a key. Every draw goes on where the last one ended."""

    def __init__(self, key: bytes) -> None:
        # A key is used for one stream only, so that the counter may start at 0.
        self._cipher = Cipher(algorithms.AES256(_checked(key)), modes.CTR(builtins.bytes(16))).encryptor()

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """The next ``n`` words of 64 bits, uniform and independent; 4 ms for a million."""
        words = np.empty(n, dtype="<u8")
        self._cipher.update_into(builtins.bytes(8 * n), words.data.cast("B"))
        return words.astype(np.uint64, copy=False)

    def bytes(self, n: int) -> builtins.bytes:
        """The next ``n`` bytes."""
        return self._cipher.update(builtins.bytes(n))


def read_secret(path: str | Path) -> bytes:
    """The 32 bytes of a site's secret.

    Raises:
        PrivacyError: If the file is missing, a link, readable by others or of another length; it says what to do.
    """
    try:
        # Non-blocking: opening a pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise PrivacyError(_unreadable(path, error)) from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise PrivacyError(f"secret '{path}' is not a regular file; name the file that create_secret made")
        if (mode := stat.S_IMODE(status.st_mode)) not in _MODES:
            raise PrivacyError(f"secret '{path}' has mode {mode:04o}, 0600 or 0400 is needed; run chmod 600 on it")
        secret = file.read(KEY_BYTES + 1)
    if len(secret) != KEY_BYTES:
        raise PrivacyError(
            f"secret '{path}' has {status.st_size:,} bytes, {KEY_BYTES} are needed; remove it and create a new secret"
        )
    return secret


def create_secret(path: str | Path) -> bytes:
    """Writes 32 bytes of the operating system's randomness to a new file that only its owner reads; returns them.

    Raises:
        PrivacyError: If there is a file of that name, or none can be written.
    """
    secret = os.urandom(KEY_BYTES)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise PrivacyError(f"secret '{path}' is there already; it is never replaced: read it instead") from None
    except OSError as error:
        raise PrivacyError(f"secret '{path}' cannot be created: {error.strerror}; choose another folder") from None
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # whatever the umask took away
        file.write(secret)
        file.flush()
        os.fsync(descriptor)
    return secret


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise PrivacyError(f"a key of {KEY_BYTES} bytes is needed, this one has {len(key)}")
    return key


def _encoded(part: str | int | bytes) -> bytes:
    # By exact type: True is no integer here, and a NumPy integer would be derived from its text.
    if type(part) not in _ENCODED:
        raise PrivacyError(f"a context is made of text, integers and bytes, got {type(part).__name__}")
    tag, encode = _ENCODED[type(part)]
    content = encode(part)
    return tag + len(content).to_bytes(8, "little") + content


def _unreadable(path: str | Path, error: OSError) -> str:
    if Path(path).is_symlink():
        return f"secret '{path}' is a symbolic link; name the file itself"
    if isinstance(error, FileNotFoundError):
        return f"secret '{path}' does not exist; create it with create_secret"
    return f"secret '{path}' cannot be read: {error.strerror}; it must belong to the user that runs this"

"""Files of public data sets: from a folder, else from the cache, else from the official address; always checked.

Environment variables:

* ``MCRAGE_DATA``: a folder with one folder per data set, files as upstream names them, plain or with ``.gz`` added;
* ``MCRAGE_CACHE``: where downloads are kept; ``~/.cache/mcrage`` if unset.
"""

import gzip
import hashlib
import io
import os
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mcrage.errors import McrageError

MAXIMUM_BYTES = 200_000_000
"""Longest download; the largest file here has 3 MB packed and 19 MB unpacked."""


class DatasetUnavailableError(McrageError):
    """A public data set is in no folder and cannot be fetched, or is not the file that it should be."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file of a public data set.

    Attributes:
        dataset: Name of the data set and of its folder.
        name: File name upstream.
        sha256: Checksum of the file's content, unpacked.
        address: Where it is fetched from: the file itself, the file packed with gzip, or a zip with a member of its
            name. Empty where there is no stable address.
        page: The data set's page, for people.
    """

    dataset: str
    name: str
    sha256: str
    address: str = ""
    page: str = ""


def content(source: SourceFile, *, timeout_seconds: float = 60.0) -> bytes:
    """The unpacked content of a file, whose checksum is right.

    Raises:
        DatasetUnavailableError: If it is nowhere, or if a folder or the address has another file of this name.
    """
    local = _from_folder(source)
    if local is not None:
        return local
    cached = cache_folder() / source.dataset / source.name
    if cached.is_file() and _is_right(data := cached.read_bytes(), source):
        return data
    data = _downloaded(source, timeout_seconds=timeout_seconds)
    _keep(cached, data)
    return data


def cache_folder() -> Path:
    """Where downloads are kept."""
    return Path(os.environ.get("MCRAGE_CACHE") or Path.home() / ".cache" / "mcrage")


def _from_folder(source: SourceFile) -> bytes | None:
    root = os.environ.get("MCRAGE_DATA")
    if not root:
        return None
    for path in (Path(root) / source.dataset / f"{source.name}{suffix}" for suffix in ("", ".gz")):
        if path.is_file():
            data = _unpacked(path.read_bytes(), source.name)
            if data is None or not _is_right(data, source):
                raise DatasetUnavailableError(
                    f"{path} is not the file of data set '{source.dataset}': its SHA-256 should be {source.sha256}; "
                    "replace it or unset MCRAGE_DATA"
                )
            return data
    return None


def _downloaded(source: SourceFile, *, timeout_seconds: float) -> bytes:
    if not source.address:
        raise DatasetUnavailableError(_by_hand(source, "is not here and has no stable address"))
    try:
        with urllib.request.urlopen(source.address, timeout=timeout_seconds) as response:
            packed = response.read(MAXIMUM_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DatasetUnavailableError(
            _by_hand(source, f"is not here and {source.address} cannot be fetched ({reason})")
        ) from None
    data = _unpacked(packed, source.name) if len(packed) <= MAXIMUM_BYTES else None
    if data is None or not _is_right(data, source):
        found = "no such file" if data is None else f"SHA-256 {hashlib.sha256(data).hexdigest()}"
        raise DatasetUnavailableError(
            _by_hand(source, f"at {source.address} has changed: {source.sha256} was expected, {found} came")
        )
    return data


def _by_hand(source: SourceFile, what: str) -> str:
    origin = f" from {source.page}" if source.page else ""
    return (
        f"data set '{source.dataset}': {source.name} {what}; get it{origin} "
        f"and put it into {cache_folder() / source.dataset}, or set MCRAGE_DATA to a folder that has it"
    )


def _unpacked(data: bytes, name: str) -> bytes | None:
    """What is inside a gzip file or a zip's member of this name; None where there is no such content."""
    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                # Publishers move members between folders of the zip: only the last part of the name counts.
                members = [info for info in archive.infolist() if PurePosixPath(info.filename).name == name]
                return archive.read(members[0]) if members and members[0].file_size <= MAXIMUM_BYTES else None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile):
        return None
    return data


def _is_right(data: bytes, source: SourceFile) -> bool:
    return hashlib.sha256(data).hexdigest() == source.sha256


def _keep(path: Path, data: bytes) -> None:
    """Writes a file at once or not at all: two processes may fetch the same one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError as error:
        raise DatasetUnavailableError(
            f"{path.parent} cannot be written ({error.strerror}); set MCRAGE_CACHE to a folder that can"
        ) from None

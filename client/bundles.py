"""Which code may run at the hospital: the bundles that it has approved, by SHA-256.

A bundle (Flower's FAB, a zip file) is only ever read here, never unpacked and never imported: what runs is the code
that is installed at the hospital. An approval says that a bundle names this very code, so the coordinator and the
hospital mean the same program.
"""

import hashlib
import io
import json
import os
import stat
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mcrage.errors import ConfigError, RefusedError
from mcrage.files import replace_file

INSTALLED = Path(__file__).resolve().parent.parent
CODE = ("client/", "mcrage/")
"""What of a bundle runs at a hospital."""

MOST_BYTES = 10 * 2**20
"""Size of a bundle."""

_MOST_FILES = 2_000
_MOST_UNPACKED = 100 * 2**20
_CHUNK = 2**20
_NOT_APPROVED, _OTHER_CODE = 2009, 2010
_ENTRY = b"PK\x01\x02"
# The others unpack all that a few bytes stand for at once, however much is asked for.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNREADABLE = (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, ValueError)


@dataclass(frozen=True)
class Bundle:
    """A bundle's content, without any of it having been written or run.

    Attributes:
        digest: SHA-256 of all of it.
        files: SHA-256 by path.
    """

    digest: str
    files: Mapping[str, str]

    @classmethod
    def read(cls, content: bytes) -> "Bundle":
        """What a bundle holds.

        Raises:
            ConfigError: If it is no zip file, is too large packed or unpacked, or has a path that leads elsewhere.
        """
        digest = hashlib.sha256(content).hexdigest()
        if len(content) > MOST_BYTES:
            raise ConfigError(f"the bundle has {len(content):,} bytes; at most {MOST_BYTES:,} are read")
        # Counted before the list is made, which takes a hundred times the memory.
        if (number := content.count(_ENTRY)) > _MOST_FILES:
            raise ConfigError(f"the bundle has {number:,} files; at most {_MOST_FILES:,} are read")
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                return cls(digest, _files(archive))
        except _UNREADABLE as error:
            raise ConfigError(f"the bundle is not a zip file that can be read ({type(error).__name__})") from None

    def differences(self, *, installed: Path = INSTALLED) -> list[str]:
        """How the code that would run here differs from what the bundle names: a line per file."""
        here = {name: digest for name, digest in installed_files(installed).items() if name.startswith(CODE)}
        there = {name: digest for name, digest in self.files.items() if name.startswith(CODE)}
        return _differences(there, here, there="in the bundle", here="installed here")

    def changes_since(self, files: Mapping[str, str]) -> list[str]:
        """How the bundle differs from another one's files: a line per file."""
        return _differences(self.files, files, there="in this bundle", here="in the last approved one")


def _files(archive: zipfile.ZipFile) -> dict[str, str]:
    infos = archive.infolist()
    if sum(info.file_size for info in infos) > _MOST_UNPACKED:
        raise ConfigError(f"the bundle would unpack to more than {_MOST_UNPACKED:,} bytes")
    files: dict[str, str] = {}
    for info in infos:
        _require_plain(info, files)
        files[info.filename] = _digest(archive, info)
    return files


def _digest(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> str:
    digest, size = hashlib.sha256(), 0
    with archive.open(info) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if size != info.file_size:
        raise ConfigError(f"the bundle's file {info.filename!r} is not as large as it says")
    return digest.hexdigest()


def _require_plain(info: zipfile.ZipInfo, seen: Mapping[str, str]) -> None:
    name = info.orig_filename  # the other one ends at a NUL
    parts = name.split("/")
    is_elsewhere = name.startswith("/") or "\\" in name or ":" in name or any(part in ("", ".", "..") for part in parts)
    if is_elsewhere or not name.isprintable() or len(name) > 255:
        raise ConfigError(f"the bundle has a path that leads elsewhere or is not plain: {name[:80]!r}")
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise ConfigError(f"the bundle's file {name!r} is a link or no file")
    if info.compress_type not in _METHODS:
        raise ConfigError(f"the bundle's file {name!r} is packed in another way than deflate")
    if name in seen:
        raise ConfigError(f"the bundle has {name!r} twice")


def installed_files(folder: Path = INSTALLED) -> dict[str, str]:
    """SHA-256 of every Python file that can run at the hospital, by path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in CODE
        for path in sorted((folder / part).rglob("*.py"))
    }


def _differences(first: Mapping[str, str], second: Mapping[str, str], *, there: str, here: str) -> list[str]:
    return [
        f"{name}: only {there}"
        if name not in second
        else f"{name}: only {here}"
        if name not in first
        else f"{name}: changed"
        for name in sorted({*first, *second})
        if first.get(name) != second.get(name)
    ]


@dataclass(frozen=True)
class Approvals:
    """The list of approved bundles, a JSON file that only root or the daemon's user may write.

    Args:
        path: The file; without it nothing is approved.
    """

    path: Path

    def add(self, bundle: Bundle, *, by: str) -> None:
        """Approves a bundle; the newest approval comes last."""
        kept = [each for each in self._entries() if each["sha256"] != bundle.digest]
        entry = {
            "sha256": bundle.digest,
            "approved": datetime.now(UTC).isoformat(timespec="seconds"),
            "by": by,
            "files": dict(bundle.files),
        }
        self._write([*kept, entry])

    def withdraw(self, digest: str) -> None:
        """Takes an approval back.

        Raises:
            ConfigError: If no bundle of this SHA-256 is approved.
        """
        entries = self._entries()
        kept = [each for each in entries if each["sha256"] != digest]
        if len(kept) == len(entries):
            raise ConfigError(f"no bundle with SHA-256 {digest} is approved")
        self._write(kept)

    def listed(self) -> list[tuple[str, str, str]]:
        """SHA-256, time and approver of every approval."""
        return [(each["sha256"], each["approved"], each["by"]) for each in self._entries()]

    def last_files(self) -> dict[str, str]:
        """Files of the newest approved bundle; empty if there is none."""
        entries = self._entries()
        return dict(entries[-1]["files"]) if entries else {}

    def require(self, content: bytes, *, installed: Path = INSTALLED) -> str:
        """The SHA-256 of an approved bundle that names the code installed here.

        Raises:
            RefusedError: With code 2009 if it is not approved, 2010 if other code is installed by now.
        """
        digest = hashlib.sha256(content).hexdigest()
        if digest not in {each["sha256"] for each in self._entries()}:
            raise RefusedError(_NOT_APPROVED, f"SHA-256 {digest}")
        differences = Bundle.read(content).differences(installed=installed)
        if differences:
            raise RefusedError(_OTHER_CODE, f"SHA-256 {digest}; " + "; ".join(differences[:5]))
        return digest

    def _entries(self) -> list[dict[str, Any]]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"'{self.path}' cannot be read: {error.strerror}") from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022 or status.st_uid not in (0, os.getuid()):
                raise ConfigError(f"'{self.path}' must be a file of root or this user, writable by no other")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                text = file.read()
        finally:
            os.close(descriptor)
        try:
            return [_Approval.model_validate(each).model_dump() for each in json.loads(text)]
        except (ValueError, TypeError, RecursionError):
            raise ConfigError(f"'{self.path}' is not a list of approvals; approve the bundle anew") from None

    def _write(self, entries: list[dict[str, Any]]) -> None:
        try:
            replace_file(self.path, (json.dumps(entries, indent=1) + "\n").encode(), mode=0o644)
        except OSError as error:
            raise ConfigError(f"'{self.path}' cannot be written: {error.strerror}") from None


class _Approval(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    approved: str
    by: str
    files: dict[str, str]

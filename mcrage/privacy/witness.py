"""The witness of a ledger: a small file elsewhere that knows how far the ledger had come."""

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mcrage.errors import LedgerError
from mcrage.privacy.store import check_private, sync_folder


@dataclass(frozen=True, kw_only=True)
class Witness:
    """How far a ledger had come.

    Attributes:
        ledger: Random name of the ledger.
        charges: Number of its rows.
        head: Hash of the last of them.
    """

    ledger: str
    charges: int
    head: str

    @classmethod
    def read(cls, path: Path) -> "Witness":
        """What :meth:`write` wrote.

        Raises:
            LedgerError: If the file is damaged, or others than its owner may use it.
        """
        check_private(path)
        try:
            witness = cls(**json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}") from None
        except (TypeError, ValueError):
            raise LedgerError(f"{path}: the witness is damaged; bring it back from any backup") from None
        if not (isinstance(witness.charges, int) and isinstance(witness.ledger, str) and isinstance(witness.head, str)):
            raise LedgerError(f"{path}: the witness is damaged; bring it back from any backup")
        return witness

    def write(self, path: Path) -> None:
        """Replaces the file in one step that outlives a power cut."""
        draft = path.with_name(path.name + ".draft")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(draft, flags, 0o600), "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)
                with suppress(FileNotFoundError):
                    # A root user who looks at the ledger leaves the file to the daemon.
                    os.fchown(file.fileno(), path.stat().st_uid, path.stat().st_gid)
                file.write(json.dumps(asdict(self)) + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise LedgerError(f"{path}: the witness cannot be written: {error.strerror}") from None

"""What was done to the data of one site, for ever: a file that only grows, and a witness that it was not set back.

The file is SQLite. Every row carries a hash of itself and of the row before; the first link is the random name of the
ledger. After each charge a second small file, the witness, keeps the newest hash: a ledger that was restored from a
backup, edited or exchanged no longer holds it. The witness lies in another folder, so that no one backup brings back
both. Whoever may write to both files can forge them: the guard is against accidents and other people's programs.

A charge is committed before any data are read, and never given back, so that a crash overstates what was spent.
"""

import json
import math
import os
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mcrage.errors import BudgetExceededError, LedgerError, PrivacyError
from mcrage.privacy.accounting import check_delta, costs_at_most, merge
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.store import (
    check_places,
    check_private,
    connect,
    digest,
    identity,
    in_words,
    is_there,
    read_format,
    sync_folder,
    write_schema,
)
from mcrage.privacy.witness import Witness

_LONGEST_TEXT = 200
_SELECT = "SELECT sequence, time, key, run, task, dataset, events, previous, hash FROM charges"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a site allows.

    Attributes:
        delta: Of every epsilon here.
        epsilon_total: Of all that was ever charged; None for no limit.
        epsilon_run: Of one run; None for no limit.
        most_events: Number of events in the whole ledger; None for no limit.
        allow_unprotected: Whether releases without noise are recorded, for a site that asks for no privacy. They do
            not count towards an epsilon, and no statement about privacy can be made once there is one.
    """

    delta: float
    epsilon_total: float | None
    epsilon_run: float | None
    most_events: int | None = None
    allow_unprotected: bool = False

    def __post_init__(self) -> None:
        check_delta(self.delta)
        for name in ("epsilon_total", "epsilon_run"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise PrivacyError(f"{name} must be above 0 or None, got {limit}")
        if self.most_events is not None and self.most_events < 0:
            raise PrivacyError(f"most_events must be at least 0 or None, got {self.most_events}")


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One row of a ledger.

    Attributes:
        sequence: From 1, without gaps.
        time: When it was made, UTC.
        key: Names what was asked: a retry of the same is not charged again.
        run: Label of the run.
        task: What the data were used for.
        dataset: Fingerprint of the table, one for all of a run.
        events: What was done.
        hash: Over the row and the hash before it.
        is_new: Whether this call made it.
    """

    sequence: int
    time: datetime
    key: str
    run: str
    task: str
    dataset: str
    events: tuple[PrivacyEvent, ...]
    hash: str
    is_new: bool = False

    @property
    def protected(self) -> tuple[PrivacyEvent, ...]:
        """Its events without those that no epsilon covers."""
        return tuple(event for event in self.events if event.mechanism != "unprotected")


@dataclass
class _State:
    """What a ledger holds up to a row, with equal events merged."""

    head: str
    sequence: int = 0
    num_events: int = 0
    spent: tuple[PrivacyEvent, ...] = ()
    spent_by_run: dict[str, tuple[PrivacyEvent, ...]] = field(default_factory=dict)
    dataset_by_run: dict[str, str] = field(default_factory=dict)

    def add(self, charge: Charge) -> None:
        self.head, self.sequence = charge.hash, charge.sequence
        self.num_events += len(charge.events)
        self.spent = merge([*self.spent, *charge.protected])
        self.spent_by_run[charge.run] = merge([*self.spent_by_run.get(charge.run, ()), *charge.protected])
        self.dataset_by_run[charge.run] = charge.dataset


class PrivacyLedger:
    """A site's record of what was done to its data; see :meth:`create` and :meth:`open`.

    It belongs to the thread that opened it; any number of processes may have it open.
    """

    def __init__(self, path: Path, witness: Path) -> None:
        """Use :meth:`open`: this alone checks nothing."""
        self._path, self._witness = path, witness
        with in_words(path):
            self._database = connect(path)
        self._file = identity(path)
        self._id, self.since = "", datetime.min
        self._state = _State(head="")

    @classmethod
    def create(cls, path: Path, *, witness: Path) -> "PrivacyLedger":
        """An empty ledger, on a local disk, and its witness in another folder.

        Raises:
            LedgerError: If one of both files is there, or cannot be made.
        """
        check_places(path, witness)
        for file in (path, witness):
            if os.path.lexists(file):
                raise LedgerError(f"{file} is there already; a ledger is never replaced")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            os.fchmod(descriptor, 0o600)
            os.close(descriptor)
            sync_folder(path.parent)
        except OSError as error:
            raise LedgerError(f"{path}: {error.strerror}") from None
        name, created = secrets.token_hex(16), datetime.now(UTC).isoformat()
        try:
            with in_words(path):
                write_schema(path, name, created)
            Witness(ledger=name, charges=0, head=digest(name, created)).write(witness)
        except LedgerError:
            path.unlink()  # it is empty, and no witness knows it
            raise
        return cls.open(path, witness=witness)

    @classmethod
    def open(cls, path: Path, *, witness: Path) -> "PrivacyLedger":
        """The ledger at ``path`` after everything in it was checked, also against its witness.

        A ledger that is ahead of its witness is one whose process died between the two: the witness is brought up.

        Raises:
            LedgerError: If a file is missing, damaged, open to others or on a network drive, or if the ledger is older
                than the witness or another one.
        """
        check_places(path, witness)
        _check_presence(path, witness)
        check_private(path)
        ledger = cls(path, witness)
        try:
            ledger.verify()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._database.close()

    @property
    def rows(self) -> tuple[Charge, ...]:
        """Every charge, in order, read and checked again."""
        with in_words(self._path):
            return tuple(self._chained(_State(head=self._genesis)))

    @property
    def events(self) -> tuple[PrivacyEvent, ...]:
        """Every event, in order."""
        return tuple(event for row in self.rows for event in row.events)

    @property
    def unprotected(self) -> bool:
        """Whether there ever was a release without noise, so that nothing can be said about the patients' privacy."""
        return any(len(row.protected) < len(row.events) for row in self.rows)

    @property
    def head(self) -> str:
        """Hash of the last charge; of the ledger's name where there is none."""
        with in_words(self._path):
            self._catch_up()
        return self._state.head

    def verify(self) -> None:
        """Reads everything again.

        Raises:
            LedgerError: If anything was altered, is missing, or is not what the witness saw.
        """
        # Before the ledger, so that a charge of another process in between cannot make the ledger look older.
        seen = Witness.read(self._witness)
        with in_words(self._path), self._transaction("BEGIN"):
            self._id, self.since = read_format(self._path, self._database)
            self._state = _State(head=self._genesis)
            self._catch_up()
            self._check_against(seen)
        self._bring_up_witness()

    def charge(
        self, events: Sequence[PrivacyEvent], *, key: str, run: str, task: str, dataset: str, limits: Limits
    ) -> Charge:
        """Records what is about to be done, durably, if the limits allow it.

        *Guarantee*: when this returns, the events are on disk; when it raises, nothing may be done to the data. One
        ledger's events together cost at most the limits, whatever processes charge it and whenever they die.

        Args:
            events: What will be done, at least one.
            key: Of this request; the same one again returns the old charge and costs nothing.
            run: Label of the run.
            task: What the data are used for.
            dataset: Fingerprint of the table.
            limits: What the site allows.

        Raises:
            BudgetExceededError: If it would cost more than that; nothing is recorded.
            LedgerError: If the ledger is not as it was, the table is another one than before in this run, or the key
                stands for something else.
            PrivacyError: If an argument is out of range, or the accountant failed.
        """
        wanted = tuple(events)
        _check_request(wanted, {"key": key, "run": run, "task": task, "dataset": dataset})
        with in_words(self._path), self._transaction("BEGIN IMMEDIATE"):
            self._catch_up()
            old = self._database.execute(f"{_SELECT} WHERE key = ?", (key,)).fetchone()
            if old is not None:
                charge = _charge(old)
                if (charge.run, charge.task, charge.dataset, charge.events) != (run, task, dataset, wanted):
                    raise LedgerError("the key of this charge was already used for something else")
            else:
                if self._state.dataset_by_run.get(run, dataset) != dataset:
                    raise LedgerError("the table changed during the run; start a new run with it")
                self._refuse_above(limits, wanted, run)
                charge = self._insert(wanted, key, run, task, dataset)
        self._bring_up_witness()
        return charge

    def _refuse_above(self, limits: Limits, wanted: tuple[PrivacyEvent, ...], run: str) -> None:
        protected = tuple(event for event in wanted if event.mechanism != "unprotected")
        if len(protected) < len(wanted) and not limits.allow_unprotected:
            raise BudgetExceededError("a release without noise costs more than any budget; nothing was charged")
        if limits.most_events is not None and self._state.num_events + len(wanted) > limits.most_events:
            raise BudgetExceededError(f"this would be more than {limits.most_events:,} events; nothing was charged")
        budgets = (
            ("the budget for one run", limits.epsilon_run, self._state.spent_by_run.get(run, ())),
            ("the budget of the site", limits.epsilon_total, self._state.spent),
        )
        for name, limit, spent in budgets:
            most = math.inf if limit is None else limit
            if protected and not costs_at_most(most, [*spent, *protected], delta=limits.delta):
                raise BudgetExceededError(
                    f"this would cost more than {name}, epsilon {most:g} at delta {limits.delta:g}; nothing was charged"
                )

    def _insert(self, events: tuple[PrivacyEvent, ...], key: str, run: str, task: str, dataset: str) -> Charge:
        text = "[" + ", ".join(event.to_json() for event in events) + "]"
        sequence, time = self._state.sequence + 1, datetime.now(UTC).isoformat()
        content = (sequence, time, key, run, task, dataset, text, self._state.head)
        row = (*content, digest(*content))
        self._database.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._database.execute("COMMIT")
        charge = _charge(row, is_new=True)
        self._state.add(charge)
        return charge

    def _catch_up(self) -> None:
        for _ in self._chained(self._state):
            pass

    def _chained(self, state: _State) -> Iterator[Charge]:
        """Charges after a state, each checked and added to it."""
        if self._hash_at(state.sequence) != state.head:
            raise LedgerError(f"{self._path}: charge {state.sequence} was altered or is missing")
        for row in self._database.execute(f"{_SELECT} WHERE sequence > ? ORDER BY sequence", (state.sequence,)):
            *content, claimed = row
            if row[0] != state.sequence + 1:
                raise LedgerError(f"{self._path}: charge {state.sequence + 1} is missing")
            if content[-1] != state.head or claimed != digest(*content):
                raise LedgerError(f"{self._path}: charge {row[0]} was altered")
            charge = _charge(row)
            state.add(charge)
            yield charge

    def _hash_at(self, sequence: int) -> str:
        if sequence == 0:
            return self._genesis
        row = self._database.execute("SELECT hash FROM charges WHERE sequence = ?", (sequence,)).fetchone()
        return str(row[0]) if row else ""

    @property
    def _genesis(self) -> str:
        return digest(self._id, self.since.isoformat())

    def _check_against(self, seen: Witness) -> None:
        if seen.ledger != self._id:
            raise LedgerError(f"{self._path}: another ledger than the one that its witness knows")
        if seen.charges > self._state.sequence:
            raise LedgerError(
                f"{self._path}: older than its witness, which saw {seen.charges:,} charges where it has "
                f"{self._state.sequence:,}; was it restored from a backup?"
            )
        if self._hash_at(seen.charges) != seen.head:
            raise LedgerError(f"{self._path}: its charges are not those that its witness saw")

    def _bring_up_witness(self) -> None:
        """Under the ledger's lock, so that no process sets the witness back to a charge before another's."""
        seen = Witness.read(self._witness)
        if (seen.ledger, seen.charges, seen.head) == (self._id, self._state.sequence, self._state.head):
            return
        with in_words(self._path), self._transaction("BEGIN IMMEDIATE"):
            seen = Witness.read(self._witness)
            self._catch_up()
            self._check_against(seen)
            if seen.charges < self._state.sequence:
                now = Witness(ledger=self._id, charges=self._state.sequence, head=self._state.head)
                now.write(self._witness)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        """What is not committed in it is undone."""
        if identity(self._path) != self._file:
            raise LedgerError(f"{self._path}: the file was exchanged while the ledger was open")
        self._database.execute(begin)
        try:
            yield
        finally:
            if self._database.in_transaction:
                with suppress(sqlite3.Error):
                    self._database.execute("ROLLBACK")


def _charge(row: Sequence[Any], *, is_new: bool = False) -> Charge:
    sequence, time, key, run, task, dataset, text, _, own = row
    try:
        events = tuple(PrivacyEvent.from_json(json.dumps(event)) for event in json.loads(text))
        made = datetime.fromisoformat(time)
    except (PrivacyError, TypeError, ValueError):
        raise LedgerError(f"charge {sequence} of the ledger cannot be read") from None
    names = {"key": key, "run": run, "task": task, "dataset": dataset}
    return Charge(sequence=sequence, time=made, events=events, hash=own, is_new=is_new, **names)


def _check_presence(path: Path, witness: Path) -> None:
    has_ledger, has_witness = is_there(path), is_there(witness)
    if not has_ledger and not has_witness:
        raise LedgerError(f"{path}: there is no ledger; make one with: mcrage budget init {path} --witness {witness}")
    if not has_ledger:
        raise LedgerError(f"{path}: the ledger is missing, though its witness is there; what was spent is not known")
    if not has_witness:
        raise LedgerError(f"{witness}: the witness is missing; bring it back from any backup, an older one will do")


def _check_request(events: tuple[PrivacyEvent, ...], texts: dict[str, str]) -> None:
    if not events:
        raise PrivacyError("a charge needs at least one event")
    merge(events)
    for name, text in texts.items():
        if not (0 < len(text) <= _LONGEST_TEXT and text.isprintable()):
            raise PrivacyError(f"{name} must be 1 to {_LONGEST_TEXT} printable characters")

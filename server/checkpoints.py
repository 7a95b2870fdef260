"""A checkpoint after every round: complete or not there, checked when it is read, and the one before it kept as well.

A checkpoint is a folder ``round-00012`` with ``tensors.safetensors``, ``state.json``, ``history.jsonl`` and
``manifest.json``, the last of which has the length and SHA-256 of the others. It is written under another name, synced
and renamed, so that a crash at any point leaves the checkpoints before it as they were.

The history grows with every round. Its file is therefore handed on from the checkpoint that is removed, two rounds
before, and only appended to: what stands behind the length in a manifest is of a later round. The two checkpoints that
are kept share no file, so what damages one of them leaves the other.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from mcrage.errors import CheckpointError, ConfigError, FederationError
from mcrage.files import lock_file

_LOG = logging.getLogger("mcrage.server")
_TENSORS, _STATE, _HISTORY, _MANIFEST = "tensors.safetensors", "state.json", "history.jsonl", "manifest.json"
_KEPT = 2
LOCK = ".lock"
CHECKPOINTS = "checkpoints"
"""Folder of a run's checkpoints."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A federation after a round.

    Attributes:
        server_round: Rounds that are done.
        num_server_rounds: Rounds that the run shall have.
        run_fingerprint: Settings and schema of the run; a run with others cannot go on from here.
        description: The untrained model, as JSON.
        parameters: The global model.
        average: The moving average of the parameters.
        strategy_state: Moments of the strategy.
        history: One record per round, plain data.
        site_counts: Group counts by site as JSON text.
    """

    server_round: int
    num_server_rounds: int
    run_fingerprint: str
    description: str
    parameters: Arrays
    average: Arrays
    strategy_state: Arrays
    history: tuple[Mapping[str, Any], ...]
    site_counts: Mapping[str, str]


def run_fingerprint(config: RunConfig, schema: TableSchema) -> str:
    """SHA-256 of settings and schema: what a run that goes on must have in common with the one that stopped."""
    return hashlib.sha256((config.run + schema.fingerprint).encode()).hexdigest()


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps every other run out of it.

    Raises:
        FederationError: If another run has it.
        ConfigError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / LOCK)
    except OSError as error:
        raise ConfigError(f"out-dir '{folder}': {error.strerror or error}") from None
    if lock is None:
        raise FederationError(f"another run writes to '{folder}': wait for its end, or take another out-dir")
    try:
        yield
    finally:
        os.close(lock)


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: Where they are; made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint so that it survives a power cut, then removes all but the last two."""
        final = self.folder / f"round-{checkpoint.server_round:05d}"
        draft = self.folder / f".{final.name}"
        for abandoned in self.folder.glob(".round-*"):
            shutil.rmtree(abandoned)
        draft.mkdir(parents=True)
        contents = {_TENSORS: save(_joined(checkpoint)), _STATE: _state_json(checkpoint), _HISTORY: _lines(checkpoint)}
        manifest = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in contents.items()}
        _write_synced(draft / _TENSORS, contents[_TENSORS])
        _write_synced(draft / _STATE, contents[_STATE])
        _write_history(draft / _HISTORY, contents[_HISTORY], self._outgoing(final))
        _write_synced(draft / _MANIFEST, json.dumps(manifest).encode())
        _sync_folder(draft)
        shutil.rmtree(final, ignore_errors=True)
        draft.rename(final)
        _sync_folder(self.folder)
        for old in self._found()[:-_KEPT]:
            shutil.rmtree(old)
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there has been none.

        Raises:
            CheckpointError: If there are checkpoints and all are damaged.
        """
        found = self._found()
        for path in reversed(found):
            try:
                return _read(path)
            except CheckpointError as error:
                _LOG.warning("%s; the one before it is used", error)
        if found:
            raise CheckpointError(f"all {len(found)} checkpoints in '{self.folder}' are damaged; start anew elsewhere")
        return None

    def resumable(self, fingerprint: str, *, resume: bool) -> Checkpoint | None:
        """The newest checkpoint, if a run may go on from it; None if there is nothing to go on from.

        Args:
            fingerprint: Of the run (:func:`run_fingerprint`).
            resume: Whether to go on; without it a run that is not done stays as it is.

        Raises:
            ConfigError: If the folder has a run that is not done, and ``resume`` is not set.
            CheckpointError: If the run there is another one, or all checkpoints are damaged.
        """
        latest = self.latest()
        if latest is None:
            return None
        if not resume:
            if latest.server_round < latest.num_server_rounds:
                done = f"{latest.server_round} of {latest.num_server_rounds} rounds"
                raise ConfigError(f"'{self.folder}' has a run after {done}: set resume=true, or another out-dir")
            return None
        if latest.run_fingerprint != fingerprint:
            raise CheckpointError(
                f"the run in '{self.folder}' had other settings or another schema; it cannot be resumed"
            )
        return latest

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("round-*"))

    def _outgoing(self, final: Path) -> Path | None:
        """The newest checkpoint that will be removed once this one is there."""
        found = self._found()
        kept = sorted({*found, final})[-_KEPT:]
        return next((path for path in reversed(found) if path not in kept), None)


def _joined(checkpoint: Checkpoint) -> Arrays:
    parts = {
        "parameters": checkpoint.parameters,
        "average": checkpoint.average,
        "strategy": checkpoint.strategy_state,
    }
    return {f"{part}/{name}": np.asarray(a, order="C") for part, arrays in parts.items() for name, a in arrays.items()}


def _state_json(checkpoint: Checkpoint) -> bytes:
    state = {
        "format": 2,
        "server_round": checkpoint.server_round,
        "num_server_rounds": checkpoint.num_server_rounds,
        "run_fingerprint": checkpoint.run_fingerprint,
        "description": checkpoint.description,
        "site_counts": dict(checkpoint.site_counts),
    }
    return json.dumps(state).encode()


def _lines(checkpoint: Checkpoint) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in checkpoint.history).encode()


def _write_history(path: Path, content: bytes, outgoing: Path | None) -> None:
    """Writes the history, by handing on the file of a checkpoint that will be removed if it begins with the same."""
    known = b"" if outgoing is None else _history_alone(outgoing)
    shared = len(known) if content.startswith(known) else 0
    if outgoing is not None and shared:
        try:
            path.hardlink_to(outgoing / _HISTORY)
        except OSError:  # a file system without links
            shared = 0
    with path.open("r+b" if shared else "xb") as file:
        file.truncate(shared)  # behind it stands what a save left that a crash cut off
        file.seek(shared)
        file.write(content[shared:])
        file.flush()
        os.fsync(file.fileno())


def _history_alone(checkpoint: Path) -> bytes:
    """A checkpoint's history; nothing if it is damaged, or its file is also that of another folder, such as a copy."""
    try:
        is_alone = (checkpoint / _HISTORY).stat().st_nlink == 1
        return _verified(checkpoint, _HISTORY) if is_alone else b""
    except (OSError, CheckpointError):
        return b""


def _verified(path: Path, name: str) -> bytes:
    """What a file of a checkpoint had in it when that was written.

    Raises:
        CheckpointError: If it is damaged or missing.
    """
    try:
        told = json.loads((path / _MANIFEST).read_bytes())[name]
        content, sha256 = (path / name).read_bytes()[: told["bytes"]], told["sha256"]
    except (OSError, LookupError, TypeError, ValueError):
        raise CheckpointError(f"checkpoint '{path.name}' is not complete") from None
    if sha256 != _sha256(content):
        raise CheckpointError(f"checkpoint '{path.name}': '{name}' is not what was written")
    return content


def _read(path: Path) -> Checkpoint:
    state, tensors = json.loads(_verified(path, _STATE)), load(_verified(path, _TENSORS))
    return Checkpoint(
        server_round=state["server_round"],
        num_server_rounds=state["num_server_rounds"],
        run_fingerprint=state["run_fingerprint"],
        description=state["description"],
        parameters=_part(tensors, "parameters/"),
        average=_part(tensors, "average/"),
        strategy_state=_part(tensors, "strategy/"),
        history=tuple(json.loads(line) for line in _verified(path, _HISTORY).splitlines()),
        site_counts=state["site_counts"],
    )


def _part(tensors: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is journaled
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

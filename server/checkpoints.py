"""A checkpoint after every round: complete or not there, checked when it is read, and the one before it kept as well.

A checkpoint is a folder ``round-00012`` with ``tensors.safetensors``, ``state.json`` and ``manifest.json``, the last
of which has the SHA-256 of the others. It is written under another name, synced and renamed, so that a crash at any
point leaves the checkpoints before it as they were.
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

from mcrage.errors import CheckpointError, ConfigError, FederationError
from mcrage.files import lock_file

_LOG = logging.getLogger("mcrage.server")
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_KEPT = 2
LOCK = ".lock"

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
        contents = {_TENSORS: save(_joined(checkpoint)), _STATE: _state_json(checkpoint)}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        contents[_MANIFEST] = json.dumps(hashes).encode()
        for name, content in contents.items():
            _write_synced(draft / name, content)
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

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        return sorted(self.folder.glob("round-*"))


def _joined(checkpoint: Checkpoint) -> Arrays:
    parts = {
        "parameters": checkpoint.parameters,
        "average": checkpoint.average,
        "strategy": checkpoint.strategy_state,
    }
    return {f"{part}/{name}": np.asarray(a, order="C") for part, arrays in parts.items() for name, a in arrays.items()}


def _state_json(checkpoint: Checkpoint) -> bytes:
    state = {
        "format": 1,
        "server_round": checkpoint.server_round,
        "num_server_rounds": checkpoint.num_server_rounds,
        "run_fingerprint": checkpoint.run_fingerprint,
        "description": checkpoint.description,
        "history": list(checkpoint.history),
        "site_counts": dict(checkpoint.site_counts),
    }
    return json.dumps(state).encode()


def _read(path: Path) -> Checkpoint:
    try:
        hashes = dict(json.loads((path / _MANIFEST).read_bytes()))
        contents = {name: (path / name).read_bytes() for name in (_TENSORS, _STATE)}
    except (OSError, TypeError, ValueError):
        raise CheckpointError(f"checkpoint '{path.name}' is not complete") from None
    for name, content in contents.items():
        if hashes.get(name) != hashlib.sha256(content).hexdigest():
            raise CheckpointError(f"checkpoint '{path.name}': '{name}' is not what was written")
    state, tensors = json.loads(contents[_STATE]), load(contents[_TENSORS])
    return Checkpoint(
        server_round=state["server_round"],
        num_server_rounds=state["num_server_rounds"],
        run_fingerprint=state["run_fingerprint"],
        description=state["description"],
        parameters=_part(tensors, "parameters/"),
        average=_part(tensors, "average/"),
        strategy_state=_part(tensors, "strategy/"),
        history=tuple(state["history"]),
        site_counts=state["site_counts"],
    )


def _part(tensors: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in tensors.items() if name.startswith(prefix)}


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

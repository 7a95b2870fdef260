"""A model on disk: ``model.safetensors`` with its numbers, ``model.json`` with everything else; no pickle."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mcrage.errors import CheckpointError

Arrays = Mapping[str, NDArray[np.float32]]

_CALIBRATION = "calibration."  # before the names of arrays that no site trains


@dataclass(frozen=True)
class StoredModel:
    """What a model's folder holds.

    Attributes:
        description: JSON text of its schema, marginals and configuration.
        settings: Of training and sampling.
        parameters: By name.
        calibration: What was measured after training, by name.
    """

    description: str
    settings: Mapping[str, Any]
    parameters: Arrays
    calibration: Arrays

    def write(self, folder: Path) -> None:
        """Writes both files."""
        folder.mkdir(parents=True, exist_ok=True)
        named = {_CALIBRATION + name: array for name, array in self.calibration.items()}
        save_file({**self.parameters, **named}, folder / "model.safetensors")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        content = {"description": json.loads(self.description), "settings": dict(self.settings), "sha256": digest}
        (folder / "model.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "StoredModel":
        """What :meth:`write` wrote.

        Raises:
            CheckpointError: If a file is missing or damaged.
        """
        try:
            content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
            weights = (folder / "model.safetensors").read_bytes()
            if hashlib.sha256(weights).hexdigest() != content["sha256"]:
                raise CheckpointError(f"{folder}: model.safetensors does not have the checksum that model.json gives")
            arrays = load_file(folder / "model.safetensors")
            parameters = {name: array for name, array in arrays.items() if not name.startswith(_CALIBRATION)}
            calibration = {name.removeprefix(_CALIBRATION): arrays[name] for name in arrays.keys() - parameters.keys()}
            return cls(json.dumps(content["description"]), content["settings"], parameters, calibration)
        except OSError as error:
            raise CheckpointError(f"{folder}: {error.strerror or error}") from None
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"{folder}: not a model of this version ({type(error).__name__})") from None

"""What every generator can do, whatever it is made of, and how one is read from its folder."""

import json
from pathlib import Path
from typing import Protocol

import pandas as pd

from mcrage.data.repair import Repairs
from mcrage.data.schema import TableSchema
from mcrage.storage import StoredModel


class Generator(Protocol):
    """Makes rows of a table.

    Attributes:
        in_words: What it is.
        schema_: The data dictionary.
        repairs_: What the schema's rules did to the rows of the last call.
    """

    in_words: str
    schema_: TableSchema
    repairs_: Repairs

    def sample(
        self,
        n: int,
        conditions: dict[str, object] | pd.DataFrame | None = None,
        *,
        random_state: int | None = None,
    ) -> pd.DataFrame:
        """``n`` rows, all of the levels that ``conditions`` has, or row i of those of its row i."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes its folder, which :func:`load_generator` reads."""
        ...


def load_generator(directory: str | Path) -> Generator:
    """The generator in a folder, of whichever kind.

    Raises:
        CheckpointError: If a file is missing, damaged or not of this version.
    """
    from mcrage.cddpm import CDDPM
    from mcrage.marginal.generator import MarginalGenerator

    content = json.loads(StoredModel.read(Path(directory)).description)
    is_marginal = isinstance(content, dict) and content.get("generator") == "marginal"
    return (MarginalGenerator if is_marginal else CDDPM).load(directory)

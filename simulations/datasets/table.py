"""What every loader of a public data set returns, and how it turns the publisher's text into a typed table."""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mcrage.data.reader import read_table
from mcrage.data.schema import TableSchema


@dataclass(frozen=True, kw_only=True)
class PublicTable:
    """A public data set as one table.

    Attributes:
        name: Name of the data set.
        schema: Its data dictionary, written by hand from the publisher's documentation.
        table: All rows, with the schema's columns and dtypes.
        licence: Licence of the data.
        credit: Whom to credit.
    """

    name: str
    schema: TableSchema
    table: pd.DataFrame
    licence: str
    credit: str


def texts(content: bytes, *, header: list[str] | None = None) -> pd.DataFrame:
    """Cells of a CSV file as text, exactly as they stand: ``None`` and ``NA`` stay words.

    Args:
        content: The file.
        header: Column names, where the file has no header.
    """
    return pd.read_csv(
        io.BytesIO(content),
        dtype=str,
        keep_default_na=False,
        header=0 if header is None else None,
        names=header,
    )


def typed(cells: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """The table of text cells, read as a hospital's file would be.

    Raises:
        DataError: If the cells do not follow the schema.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{schema.name}.csv"
        cells.to_csv(path, index=False)
        return read_table(path, schema)

"""Pretend hospitals on disk: one file per hospital, the shared schema, and a common test set where there is one.

::

    folder/
      schema.json
      site-01.csv
      site-02.csv
      test.csv        no hospital's; optional
      private/        made by the hospitals when they are first asked

The files are what a real hospital has, so that the same reader and the same client open them.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from client.pretend import PRIVATE
from mcrage.data.reader import read_table
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError

SCHEMA_FILE = "schema.json"
TEST_FILE = "test.csv"


@dataclass(frozen=True)
class Hospitals:
    """Tables of several hospitals that share a schema.

    Attributes:
        schema: The data dictionary.
        tables: Table of each hospital by its name, in order.
        test: Rows of nobody, for testing all hospitals' models on the same patients; None where there are none.
    """

    schema: TableSchema
    tables: Mapping[str, pd.DataFrame]
    test: pd.DataFrame | None = None

    def training_patients(self, test_fraction: float) -> float:
        """Patients of all hospitals but the share that these keep for testing."""
        column = self.schema.patient_id
        if column is None:
            return sum(map(len, self.tables.values())) * (1 - test_fraction)
        ids = [table[column.name] for table in self.tables.values()]
        return float(sum(each.nunique() + each.isna().sum() for each in ids)) * (1 - test_fraction)


def write_sites(folder: str | Path, hospitals: Hospitals) -> list[Path]:
    """Writes the files of all hospitals, the schema and the test set; returns the hospitals' files in order.

    The same hospitals give the same bytes.

    Raises:
        ConfigError: If the folder holds files of hospitals that would not be overwritten.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"site-{number:02d}.csv" for number in range(1, len(hospitals.tables) + 1)]
    spare = sorted(path.name for path in set(folder.glob("site-*.csv")) - set(paths))
    if spare:
        raise ConfigError(f"folder '{folder}' holds {', '.join(spare)} of other hospitals; choose an empty folder")
    for path, table in zip(paths, hospitals.tables.values(), strict=True):
        before = path.read_bytes() if path.exists() else b""
        _write(path, table, hospitals.schema)
        if path.read_bytes() != before:  # another table is another hospital, with a ledger of its own
            shutil.rmtree(folder / PRIVATE / path.stem, ignore_errors=True)
    (folder / TEST_FILE).unlink(missing_ok=True)
    if hospitals.test is not None:
        _write(folder / TEST_FILE, hospitals.test, hospitals.schema)
    hospitals.schema.save(folder / SCHEMA_FILE)
    return paths


def read_sites(folder: str | Path) -> Hospitals:
    """The hospitals of a folder, each called by its site column, or by its file where that names none or several.

    Raises:
        SchemaError: If the schema is missing or not valid.
        DataError: With every problem of the first file that does not follow it.
        ConfigError: If there is no hospital's file, or two hospitals have one name.
    """
    folder = Path(folder)
    schema = TableSchema.load(folder / SCHEMA_FILE)
    # The shorter name first: site-99 before site-100.
    paths = sorted(folder.glob("site-*.csv"), key=lambda path: (len(path.name), path.name))
    if not paths:
        raise ConfigError(f"folder '{folder}' has no site-*.csv; write one file per hospital")
    tables: dict[str, pd.DataFrame] = {}
    for path in paths:
        table = read_table(path, schema)
        name = site_name(table, schema, default=path.stem)
        if name in tables:
            raise ConfigError(f"two files in '{folder}' are of the hospital '{name}'; give each hospital one file")
        tables[name] = table
    test = folder / TEST_FILE
    return Hospitals(schema, tables, read_table(test, schema) if test.exists() else None)


def site_name(table: pd.DataFrame, schema: TableSchema, *, default: str) -> str:
    """The one name in the site column; ``default`` where the schema has no such column or the table several names."""
    if schema.site is None or schema.site.name not in table:
        return default
    names = table[schema.site.name].dropna().unique()
    return str(names[0]) if len(names) == 1 else default


def as_text(table: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """The table as the schema writes it: every cell text, columns with role ``ignored`` left out."""
    columns = [column for column in schema.columns if column.role != "ignored"]
    return pd.DataFrame({column.name: _texts(table[column.name], column) for column in columns})


def _write(path: Path, table: pd.DataFrame, schema: TableSchema) -> None:
    path.write_bytes(as_text(table, schema).to_csv(index=False, lineterminator="\n").encode())


def _texts(values: "pd.Series[Any]", column: Column) -> "pd.Series[Any]":
    missing = column.missing_codes[0] if column.missing_codes else ""
    texts: pd.Series[Any]
    if column.kind == "date":
        texts = values.dt.strftime(column.date_format)
    elif column.kind == "continuous" and column.decimals is not None:
        texts = values.map(f"{{:.{column.decimals}f}}".format, na_action="ignore")
    elif column.kind == "boolean":
        texts = values.astype(object).map(lambda value: column.levels[int(value)], na_action="ignore")
    else:
        # Python's shortest repr of a float reads back as the same float.
        texts = values.astype(object).map(str, na_action="ignore")
    return texts.astype(object).where(values.notna(), missing)

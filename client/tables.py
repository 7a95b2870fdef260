"""A hospital's tables in memory: read, split and encoded once per file as it is on disk.

A simulation asks the same process hundreds of times: reading once per file saves more than training costs.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pandas as pd

from mcrage import rng
from mcrage.cddpm import CDDPM
from mcrage.data.reader import read_table
from mcrage.data.schema import TableSchema
from mcrage.data.split import split_by_patient
from mcrage.data.transform import EncodedTable
from mcrage.errors import ConfigError
from mcrage.privacy.sampling import KeyedDraws, Patients

_KEPT_IN_MEMORY = 128


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was read: another time or size is another file."""

    path: Path
    modified_ns: int
    size: int


@dataclass(frozen=True)
class TableKey:
    """A hospital's table and how it is split."""

    site: str
    data: Stamp
    schema: Stamp
    test_fraction: float


def stamp(path: Path) -> Stamp:
    """The stamp of a file.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None
    return Stamp(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=_KEPT_IN_MEMORY)
def fingerprint(data: Stamp, schema: Stamp) -> str:
    """SHA-256 of the bytes of a table's file and of its data dictionary."""
    digest = hashlib.sha256()
    for each in (data, schema):
        with each.path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@lru_cache(maxsize=_KEPT_IN_MEMORY)
def split(key: TableKey) -> tuple[TableSchema, pd.DataFrame, pd.DataFrame]:
    """The data dictionary, the training rows and the test rows.

    Raises:
        ConfigError: If a file is not the one of its stamp any more: what was charged was for that one.
    """
    schema = TableSchema.load(key.schema.path)
    train, test = split_by_patient(read_table(key.data.path, schema), schema, test_fraction=key.test_fraction)
    if any(stamp(each.path) != each for each in (key.data, key.schema)):
        raise ConfigError(f"'{key.data.path}' or its schema changed while it was read")
    return schema, train, test


@lru_cache(maxsize=_KEPT_IN_MEMORY)
def encoded(key: TableKey, description: str, seed: int) -> EncodedTable:
    """The training rows as tensors."""
    _, train, _ = split(key)
    return model(description).transform.encode(train, generator=rng.stream(seed, "encode", key.site))


@lru_cache(maxsize=_KEPT_IN_MEMORY)
def encoded_by_row(key: TableKey, description: str, spreading: bytes) -> tuple[EncodedTable, Patients]:
    """The training rows as tensors, each encoded from itself alone, and whose they are.

    Args:
        key: The table.
        description: The model.
        spreading: 32 bytes from which each row gets numbers of its own that spread rounded values.
    """
    schema, train, _ = split(key)
    patients, transform = Patients(train, schema), model(description).transform
    rows = KeyedDraws(spreading, patients.row_names())
    jitter = rows.uniform(rows.everyone, 0, size=max(transform.layout.num_numeric, 1)).double().numpy() - 0.5
    return transform.encode_spread(train, jitter.T), patients


@lru_cache(maxsize=1)
def model(description: str) -> CDDPM:
    """The model of a description; one at a time, whose parameters are loaded anew for each instruction."""
    return CDDPM.from_description(description)

"""Train and test rows by a keyed hash of the patient: whoever joins or leaves moves nobody else."""

import hashlib

import numpy as np
import pandas as pd

from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError


def split_by_patient(
    table: pd.DataFrame, schema: TableSchema, *, test_fraction: float = 0.3, key: str = "mcrage"
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Train and test rows, in the table's order; all rows of a patient fall on one side.

    A patient is a test patient if BLAKE2b(key, patient id) falls below ``test_fraction`` of its range. A row without
    a patient id, and every row where the schema has none, goes by its position.

    Args:
        table: Rows that follow the schema.
        schema: Names the patient id column.
        test_fraction: Expected share of test patients, between 0 and 1.
        key: Another key deals the patients anew.
    """
    if not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction must lie between 0 and 1, got {test_fraction}")
    in_test = _places(table, schema, hashlib.sha256(key.encode()).digest()) < test_fraction
    return table[~in_test], table[in_test]


def _places(table: pd.DataFrame, schema: TableSchema, key: bytes) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A number in [0, 1) for each row, the same for all rows of a patient."""
    # The prefix keeps the patient called "7" apart from the row at position 7.
    names = [f"row {position}" for position in range(len(table))]
    if schema.patient_id is not None:
        patients = table[schema.patient_id.name]
        names = [
            row if missing else f"patient {patient}"
            for row, patient, missing in zip(names, patients, patients.isna(), strict=True)
        ]
    place = {name: _place(name, key) for name in set(names)}
    return np.array([place[name] for name in names], dtype=np.float64)


def _place(name: str, key: bytes) -> float:
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=key).digest()
    # 53 bits: a float holds them exactly, so that the largest is still below 1.
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53

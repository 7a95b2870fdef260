"""Who takes part in a step, and with which random numbers: each patient's own, whoever else is in the table.

Both are outputs of a keyed pseudorandom function (AES-256) of the patient and the step. So batches are Poisson samples
with a public probability, a batch may be empty, and adding a patient changes nothing for the others.

Shape: P patients with R rows in all; a batch of B patients with K draws each gives B·K rows.
"""

import hashlib

import numpy as np
import pandas as pd
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mcrage.data.schema import TableSchema
from mcrage.privacy.keyed import derive

_BLOCK = np.dtype([("patient", "<u8"), ("step", "<u4"), ("counter", "<u4")])
_INCLUSION, _DRAWS = 0, 1  # counters: whether a patient takes part; from 1 on, the patient's numbers
_BITS = 53


class Patients:
    """The patients of a table and the rows of each.

    Args:
        table: Rows that follow the schema. A row without a patient id is a patient of its own, named by its position.
        schema: Names the patient id column, if there is one.
    """

    def __init__(self, table: pd.DataFrame, schema: TableSchema) -> None:
        names = patient_names(table, schema)
        codes, distinct = pd.factorize(names)
        self.names: tuple[str, ...] = tuple(distinct)
        self._rows = np.argsort(codes, kind="stable")
        self._counts = np.bincount(codes, minlength=len(distinct))
        self._starts = np.cumsum(self._counts) - self._counts

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, patients: NDArray[np.int64], uniform: Float[Tensor, "patients draws"]) -> Tensor:
        """A row number for each patient and draw: one of the patient's own rows, uniformly."""
        counts, starts = self._counts[patients, None], self._starts[patients, None]
        place = np.minimum((uniform.numpy() * counts).astype(np.int64), counts - 1)
        return torch.from_numpy(self._rows[starts + place])

    def places(self) -> NDArray[np.int64]:
        """For each row of the table, its place among the rows of its patient."""
        places = np.empty(len(self._rows), dtype=np.int64)
        places[self._rows] = np.arange(len(self._rows)) - np.repeat(self._starts, self._counts)
        return places

    def of_rows(self) -> NDArray[np.int64]:
        """For each row of the table, the number of its patient."""
        numbers = np.empty(len(self._rows), dtype=np.int64)
        numbers[self._rows] = np.repeat(np.arange(len(self)), self._counts)
        return numbers

    def row_names(self) -> tuple[str, ...]:
        """For each row of the table, a name that depends on its patient and its place among that patient's rows."""
        pairs = zip(self.places(), self.of_rows(), strict=True)
        return tuple(f"{place} of {self.names[number]}" for place, number in pairs)


def patient_names(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.object_]:
    """What each row's patient is called; the prefix keeps the patient called 7 apart from the row at position 7."""
    rows = np.array([f"row {position}" for position in range(len(table))], dtype=object)
    if schema.patient_id is None:
        return rows
    patients = table[schema.patient_id.name]
    named = "patient " + patients.astype(object).map(str)
    return np.where(patients.isna(), rows, named)


class KeyedDraws:
    """The random numbers of patients.

    Args:
        key: 32 bytes; another key gives other numbers.
        names: What each patient is called.
    """

    def __init__(self, key: bytes, names: tuple[str, ...]) -> None:
        of_names = derive(key, "patients")
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8, key=of_names).digest() for name in names)
        self._patients = np.frombuffer(digests, dtype="<u8")
        # each block is encrypted on its own: a function of the patient, the step and the counter, and of nothing else
        self._cipher = Cipher(algorithms.AES(derive(key, "draws")), modes.ECB())

    @property
    def everyone(self) -> NDArray[np.int64]:
        """The numbers of all patients."""
        return np.arange(len(self._patients))

    def included(self, step: int, *, sample_rate: float) -> NDArray[np.int64]:
        """Numbers of the patients in a step's batch, each in it with probability ``sample_rate`` on its own."""
        words = self._words(self._patients, step, first=_INCLUSION, blocks=1).view("<u8")[:, 0]
        limit = np.uint64(int(sample_rate * 2**_BITS))
        return np.flatnonzero(words >> np.uint64(64 - _BITS) < limit)

    def uniform(self, patients: NDArray[np.int64], step: int, *, size: int) -> Float[Tensor, "patients size"]:
        """Numbers in (0, 1) for each of these patients at a step; float32 of 23 bits."""
        words = self._words(self._patients[patients], step, first=_DRAWS, blocks=-(-size // 4))
        signed = torch.from_numpy(words.view("<i4"))[:, :size]
        return (signed >> 9).float().mul_(2.0**-23).add_(0.5 + 2.0**-24)

    def _words(self, patients: NDArray[np.uint64], step: int, *, first: int, blocks: int) -> NDArray[np.uint8]:
        plain = np.empty((len(patients), blocks), dtype=_BLOCK)
        plain["patient"] = patients[:, None]
        plain["step"] = step
        plain["counter"] = np.arange(first, first + blocks)
        out = np.empty(plain.nbytes + 15, dtype=np.uint8)  # the cipher asks for room for almost a block more
        self._cipher.encryptor().update_into(plain.tobytes(), out.data)
        return out[: plain.nbytes].reshape(len(patients), 16 * blocks)


def normal(uniform: Float[Tensor, "patients size"]) -> Float[Tensor, "patients size"]:
    """Standard normal numbers from uniform ones of an even number per patient (Box and Muller, 1958)."""
    half = uniform.shape[1] // 2
    radius = uniform[:, :half].log().mul_(-2.0).sqrt_()
    angle = uniform[:, half:].mul(2 * torch.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)

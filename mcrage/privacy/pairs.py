"""Tables of counts over two or more columns that may leave a site under differential privacy.

As in :mod:`mcrage.privacy.counts`: every patient counts once, with one row; a site charges the event before it makes
the release; the noise follows from a key that nobody outside the site knows. Which tables there are and how their cells
are merged is asked for from outside: it is public, or worked out from what was released before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.crossing import Axes, check_axes, exact_counts, shape, split_counts, to_json
from mcrage.data.schema import TableSchema
from mcrage.errors import PrivacyError
from mcrage.privacy.counts import MOST_CELLS, NoisyCounts, patient_rows, with_noise
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive

MOST_CELLS_IN_ALL = 2_000_000
"""Most cells of all tables of a release: their noise takes ten seconds."""


@dataclass(frozen=True, eq=False)
class NoisyTables:
    """Several tables of one release.

    Attributes:
        counts: The noisy counts of all tables, one table after the other.
        tables: What each of them crosses.
        schema: The data dictionary.
    """

    counts: NoisyCounts
    tables: tuple[Axes, ...]
    schema: TableSchema

    @property
    def arrays(self) -> list[NDArray[np.float64]]:
        """Noisy patients by cell, negative counts included, one array per table."""
        return split_counts(self.counts.values.astype(np.float64), self.tables, self.schema)


def tables_event(schema: TableSchema, tables: Sequence[Axes], *, noise: float) -> PrivacyEvent:
    """What :func:`noisy_tables` costs.

    Raises:
        PrivacyError: If there is no table, one has more than 20,000 cells, all have more than 2,000,000 together, or
            ``noise`` is out of range.
        MessageError: If a table is not one of the schema's columns.
    """
    if not tables:
        raise PrivacyError("no table of counts was asked for")
    check_axes(tables, schema)
    cells = [math.prod(shape(axes, schema)) for axes in tables]
    for axes, count in zip(tables, cells, strict=True):
        if count > MOST_CELLS:
            crossed = ", ".join(axis.column for axis in axes)
            raise PrivacyError(f"{count:,} cells of {crossed} would hold noise alone; at most {MOST_CELLS:,} may be")
    if sum(cells) > MOST_CELLS_IN_ALL:
        raise PrivacyError(f"{sum(cells):,} cells were asked for; at most {MOST_CELLS_IN_ALL:,} may be")
    return PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=noise, steps=len(tables))


def noisy_tables(
    table: pd.DataFrame, schema: TableSchema, tables: Sequence[Axes], *, noise: float, key: bytes
) -> NoisyTables:
    """Tables of counts with noise: discrete Gaussian on every cell, negative counts kept.

    *Guarantee*: a patient with all rows (neighbours: one patient more or less) is in one cell of each table at most and
    changes it by 1, so that each table has an L2 sensitivity of 1 and the release is the Gaussian mechanism composed
    once per table; the event of :func:`tables_event` covers it.

    Args:
        table: Rows that follow the schema.
        schema: The columns and their cells.
        tables: What to cross with what, fixed before anybody saw these rows or worked out from earlier releases.
        noise: Standard deviation of the noise on each cell.
        key: Of this release and this table of rows; :mod:`mcrage.privacy.counts` says why.

    Raises:
        PrivacyError, MessageError: As :func:`tables_event`.
    """
    event = tables_event(schema, tables, noise=noise)
    exact = exact_counts(table.iloc[patient_rows(table, schema, key=key)], tables, schema)
    noise_key = derive(key, "tables", event.to_json(), schema.fingerprint, to_json(tables))
    return NoisyTables(with_noise(exact, event=event, key=noise_key), tuple(tables), schema)

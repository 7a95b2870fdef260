"""One table that answers with its counts, with noise or without."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.crossing import Axes, exact_counts, split_counts
from mcrage.data.schema import TableSchema
from mcrage.errors import BudgetExceededError
from mcrage.privacy.accounting import costs_at_most
from mcrage.privacy.counts import patient_rows
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.pairs import noisy_tables, tables_event


class LocalSource:
    """Counts of one table's patients, each with one row.

    *Guarantee*: all answers together are (``epsilon``, ``delta``)-differentially private for a patient with all rows
    (neighbours: one patient more or less); the events of :attr:`events` cover them, and a release that would cost more
    is refused before it is made. With an infinite epsilon answers are exact and protect nobody.

    Args:
        table: Rows that follow the schema.
        schema: The data dictionary.
        epsilon: Of all answers together.
        delta: Of all answers together.
        key: Of all answers from this table; it picks each patient's row as well.

    Attributes:
        events: What was released so far.
    """

    def __init__(self, table: pd.DataFrame, schema: TableSchema, *, epsilon: float, delta: float, key: bytes) -> None:
        self._table, self._schema = table, schema
        self._epsilon, self._delta, self._key = epsilon, delta, key
        self.events: tuple[PrivacyEvent, ...] = ()

    def tables(self, tables: Sequence[Axes], *, noise: float) -> list[NDArray[np.float64]]:
        """Tables of counts; ``noise`` is 0 for exact ones.

        Raises:
            BudgetExceededError: If they would cost more than is left.
        """
        if noise == 0:
            exact = exact_counts(self._exact_rows(), tables, self._schema)
            return split_counts(exact.astype(np.float64), tables, self._schema)
        self._charge(tables_event(self._schema, tables, noise=noise))
        return noisy_tables(self._table, self._schema, tables, noise=noise, key=self._key).arrays

    def deviation(self, noise: float) -> float:
        """The same: there is one noise."""
        return noise

    def _exact_rows(self) -> pd.DataFrame:
        self._charge(PrivacyEvent(mechanism="unprotected"))
        return self._table.iloc[patient_rows(self._table, self._schema, key=self._key)]

    def _charge(self, event: PrivacyEvent) -> None:
        events = (*self.events, event)
        if not math.isinf(self._epsilon) and not costs_at_most(self._epsilon, events, delta=self._delta):
            raise BudgetExceededError(f"{event.in_words} would cost more than is left of epsilon {self._epsilon:g}")
        self.events = events

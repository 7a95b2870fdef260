"""Counts of several hospitals, as whoever opens their sum sees them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.crossing import Axes, exact_counts, split_counts, to_json
from mcrage.data.schema import TableSchema
from mcrage.errors import BudgetExceededError, PrivacyError
from mcrage.privacy.accounting import costs_at_most
from mcrage.privacy.counts import patient_rows, with_noise
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive
from mcrage.privacy.pairs import tables_event
from mcrage.privacy.shared_counts import SharedCounts

_PUBLIC = bytes(32)  # picks one row of a patient where nothing is kept secret


class SummedSource:
    """A :class:`mcrage.marginal.estimation.Source` that sums the noisy counts of several hospitals.

    *Guarantee*, if the key is secret: all answers together are (``epsilon``, ``delta``)-differentially private for a
    patient of one hospital with all rows, by the events of :attr:`events`: with ``colluders=0`` for whoever sees each
    hospital's answers, else for whoever sees the sums alone and knows what so many hospitals added. Answers that would
    cost more are refused. Here the key follows from a seed, so that a simulation can be repeated and nobody is
    protected. With an infinite epsilon answers are exact.

    Args:
        tables: Rows of each hospital.
        schema: The data dictionary.
        epsilon, delta: Of all answers together, for each hospital.
        colluders: 0 for all of the noise at every hospital. Otherwise the sum of all but so many has it once.
        key: Of all answers.

    Attributes:
        events: What every hospital is charged for.
        own_events: The same for what a hospital's own share protects from, if all others collude.
    """

    def __init__(
        self,
        tables: Mapping[str, pd.DataFrame],
        schema: TableSchema,
        *,
        epsilon: float,
        delta: float,
        colluders: int,
        key: bytes,
    ) -> None:
        if not 0 <= colluders < len(tables):
            raise PrivacyError(f"of {len(tables)} hospitals {colluders} cannot collude and one be left")
        self._schema, self._epsilon, self._delta = schema, epsilon, delta
        self._colluders = colluders
        self._keys = {site: _own_key(key, site) for site in tables}
        self._rows = {
            site: table.iloc[patient_rows(table, schema, key=_PUBLIC if math.isinf(epsilon) else self._keys[site])]
            for site, table in tables.items()
        }
        self.events: tuple[PrivacyEvent, ...] = ()
        self.own_events: tuple[PrivacyEvent, ...] = ()

    def tables(self, tables: Sequence[Axes], *, noise: float) -> list[NDArray[np.float64]]:
        """Tables of counts over all hospitals; ``noise`` is 0 for exact ones.

        Raises:
            BudgetExceededError: If they would cost more than is left.
        """
        exact = {site: exact_counts(rows, tables, self._schema) for site, rows in self._rows.items()}
        event = tables_event(self._schema, tables, noise=noise) if noise else None
        total = self._sum(exact, event, to_json(tables))
        return split_counts(total.astype(np.float64), tables, self._schema)

    def deviation(self, noise: float) -> float:
        """Standard deviation of the noise of all hospitals on a cell."""
        if not noise or math.isinf(noise) or not self._colluders:
            return noise * math.sqrt(len(self._rows))
        return self._shared(noise).deviation

    def _sum(self, exact: Mapping[str, NDArray[np.int64]], event: PrivacyEvent | None, what: str) -> NDArray[np.int64]:
        if event is None:
            self._charge(PrivacyEvent(mechanism="unprotected"), PrivacyEvent(mechanism="unprotected"))
            return np.sum(list(exact.values()), axis=0)
        own = self.own_event(event)
        self._charge(event, own)
        noisy = [
            with_noise(counts, event=own, key=derive(self._keys[site], "sum", len(self.events), what)).values
            for site, counts in exact.items()
        ]
        return np.sum(noisy, axis=0)

    def own_event(self, event: PrivacyEvent) -> PrivacyEvent:
        """What a hospital adds so that the event holds: all of its noise, or a share of it."""
        if not self._colluders:
            return event
        return replace(event, noise_multiplier=self._shared(event.noise_multiplier).own_noise)

    def _shared(self, noise: float) -> SharedCounts:
        return SharedCounts(noise=noise, sites=len(self._rows), colluders=self._colluders)

    def _charge(self, event: PrivacyEvent, own: PrivacyEvent) -> None:
        events = (*self.events, event)
        if not math.isinf(self._epsilon) and not costs_at_most(self._epsilon, events, delta=self._delta):
            raise BudgetExceededError(f"{event.in_words} would cost more than is left of epsilon {self._epsilon:g}")
        self.events, self.own_events = events, (*self.own_events, own)


def _own_key(key: bytes, site: str) -> bytes:
    return derive(key, "hospital", hashlib.sha256(site.encode()).digest())

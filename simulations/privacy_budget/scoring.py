"""What a hospital's model learns from its own rows and others', by group of patients.

The model is a logistic regression, as in :mod:`mcrage.evaluation.downstream`, and tested on the common test set where
there is one, else on each hospital's own held-out rows. Figures are over all hospitals: sums add up, and patients that
different models scored are never ranked against each other (:mod:`mcrage.evaluation.metrics`).

True positive rates are those of a hospital that acts on the fifth of the test patients with the highest scores: how
well the groups are ranked together, whatever rows of another prevalence do to the level of the scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import group_codes
from mcrage.errors import DataError
from mcrage.evaluation.downstream import events, train_and_score
from mcrage.evaluation.metrics import METRICS, NUM_SUMS, Floats, metrics, sums
from mcrage.evaluation.strata import Strata
from mcrage.rng import derive
from simulations.arms import SiteTables
from simulations.study import Study

LEAST = 20
"""Fewest test patients with and without the event that a group's figures rest on."""

MEASURED = ("auroc", "tpr")
ACTED_ON = 0.2
"""Share of the test patients whose scores are above the threshold of a true positive rate."""


@dataclass(frozen=True)
class Value:
    """One figure: of a group of patients, or, for a gap between groups, of a sensitive feature."""

    group: str
    metric: str
    value: float


class Scorer:
    """Scores whatever rows hospitals train on.

    Args:
        study: Names the schema and the common test set.
        sites: The hospitals' rows.
        seed: Root of the models' draws.
    """

    def __init__(self, study: Study, sites: Sequence[SiteTables], *, seed: int) -> None:
        common = study.hospitals.test
        self._schema, self._sites, self._seed = study.schema, sites, seed
        self._tests = [tables.test if common is None else common for tables in sites]
        codes = [group_codes(table, study.schema.sensitive) for table in (*(s.train for s in sites), *self._tests)]
        self._strata = Strata(codes, study.schema)
        self._shown = [place for place, group in enumerate(self._strata.groups) if len(group.levels) < 2]
        self._rows = [self._strata.rows(each) for each in codes]  # of training tables, then of test tables
        self._events = [events(test, study.schema) for test in self._tests]
        self._different = 1 if common is not None else len(sites)

    def values(self, training: Callable[[SiteTables], pd.DataFrame]) -> list[Value]:
        """AUROC and true positive rate by group, and the largest differences between the groups of a feature.

        Args:
            training: Gives the rows that a hospital's model is trained on.

        Returns:
            Everybody's figures, those of every level of a sensitive feature, and the gaps, named by the feature. A
            group with too few test patients has none, and a hospital whose training rows are of one class counts
            nowhere.
        """
        added: Floats = np.zeros((len(self._strata.groups), NUM_SUMS, 1))
        for number, tables in enumerate(self._sites):
            added += self._sums(number, training(tables))
        found = metrics(added)[..., 0]
        found[[not self._is_large(place) for place in range(len(found))]] = np.nan
        values = [
            Value(str(self._strata.groups[place]), metric, float(found[place, METRICS.index(metric)]))
            for place in self._shown
            for metric in MEASURED
        ]
        return [each for each in (*values, *self._gaps(found)) if np.isfinite(each.value)]

    def sizes(self) -> list[Value]:
        """Test patients of each group, and its share of all hospitals' training rows."""
        train, values = self._rows[: len(self._sites)], []
        for place in self._shown:
            name, held = (
                str(self._strata.groups[place]),
                [sum(len(rows[each]) for rows in train) for each in (place, 0)],
            )
            values.append(Value(name, "test_rows", float(sum(len(rows[place]) for rows in self._different_tests))))
            values.append(Value(name, "train_share", held[0] / max(held[1], 1)))
        return values

    @property
    def _different_tests(self) -> list[list[NDArray[np.int64]]]:
        return self._rows[len(self._sites) :][: self._different]

    def _is_large(self, place: int) -> bool:
        parts = zip(self._different_tests, self._events, strict=False)
        event = np.concatenate([events[rows[place]] for rows, events in parts])
        return bool(min(event.sum(), (~event).sum()) >= LEAST)

    def _sums(self, number: int, train: pd.DataFrame) -> Floats:
        """Sums of one hospital by group; shape (groups, S, 1)."""
        found = np.zeros((len(self._strata.groups), NUM_SUMS, 1))
        state = derive(self._seed, self._sites[number].site, "model") % 2**32
        try:
            scored = train_and_score(
                train, self._tests[number], self._schema, model="logistic_regression", random_state=state
            )
        except DataError:
            return found
        event, rows = self._events[number], self._rows[len(self._sites) + number]
        threshold = np.array([np.quantile(scored.scores, 1 - ACTED_ON)])
        for place in self._shown:
            part = rows[place]
            found[place] = sums(event[part], scored.scores[None, part], threshold, np.ones((len(part), 1)))[0]
        return found

    def _gaps(self, found: Floats) -> list[Value]:
        values = []
        for column in self._schema.sensitive:
            of_column = found[self._strata.by[column.name]]
            for metric in MEASURED:
                known = of_column[:, METRICS.index(metric)]
                known = known[np.isfinite(known)]
                if len(known) > 1:
                    values.append(Value(column.name, f"{metric}_gap", float(known.max() - known.min())))
        return values

"""Counts of patients that may leave a site under differential privacy: the one place that makes them.

Every patient counts once, with one of their rows. Which cells there are is public: the schema says it, and a cell that
nobody is in gets noise like any other. Noise comes first; whatever is done afterwards (no negative counts, none below
:data:`~mcrage.data.groups.MINIMUM_CELL`, metrics) sees noisy counts alone and costs nothing more.

For each release there is a function that gives its event. A site charges that event before it asks for the release:
the event's function refuses whatever the release would refuse.

**Keys**: a release takes a key of 32 bytes that nobody outside the site knows. The noise follows from the key, so
that a repeated request has the same answer. It must therefore be a key of that request and of that table: derived from
the site's secret, the name of the release, and a digest of the rows (and scores) that it is about. Two tables with the
same key have the same noise, and their difference is exact.
"""

import itertools
import json
import math
from dataclasses import InitVar, dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts, group_codes
from mcrage.data.marginals import Marginals, cell_codes, num_cells, readable
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import PrivacyError
from mcrage.privacy.discrete import discrete_gaussian, discrete_laplace
from mcrage.privacy.events import Mechanism, PrivacyEvent
from mcrage.privacy.keyed import KeyedBits, derive
from mcrage.privacy.sampling import KeyedDraws, Patients

MOST_CELLS = 20_000
"""Most cells of a table of groups, or of groups, labels and score bins: most of them would hold noise alone."""

SCORE_EDGES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Bins of scores, finer where the scores of rare events lie, with the usual thresholds as edges.

Calibrated scores of events with a prevalence of .02 to .5 and an AUROC of .7 to .9 lose at most .021 of their AUROC in
these bins, .016 from .1 on; in 20 equal bins, which have 1.4 times the noise in each sum, they lose up to .14.
"""

_HERE = object()


@dataclass(frozen=True, eq=False)
class NoisyCounts:
    """Counts with noise on every one; only :func:`with_noise` and :func:`received_scores` make them.

    Attributes:
        values: The noisy counts, in the order of the cells, negative ones included.
        event: What the ledger has of it.
    """

    values: NDArray[np.int64]
    event: PrivacyEvent
    maker: InitVar[object]

    def __post_init__(self, maker: object) -> None:
        if maker is not _HERE:
            raise PrivacyError("noisy counts are made by the functions of mcrage.privacy.counts only")
        self.values.setflags(write=False)

    @property
    def scale(self) -> float:
        """Of the noise on each count: the scale of the discrete Laplace, σ of the discrete Gaussian distribution."""
        return self.event.noise_multiplier

    @property
    def mechanism(self) -> Mechanism:
        """How the noise is distributed."""
        return self.event.mechanism


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisyScores:
    """Noisy patients by group, label and score bin: all that metrics may be computed from.

    Attributes:
        counts: The counts, in the order of groups, labels and bins.
        groups: The finest groups, from the schema.
        edges: Edges of the score bins; a bin holds its lower edge.
    """

    counts: NoisyCounts
    groups: tuple[Group, ...]
    edges: tuple[float, ...]

    @property
    def histogram(self) -> NDArray[np.int64]:
        """Shape (groups, 2, bins): patients without the event, then those with it."""
        return self.counts.values.reshape(len(self.groups), 2, len(self.edges) - 1)


def patient_rows(table: pd.DataFrame, schema: TableSchema, *, key: bytes) -> NDArray[np.int64]:
    """Positions of one row of each patient, rising.

    Which of a patient's rows it is follows from the key and the patient's id: it depends neither on what stands in the
    rows nor on other patients. A row without an id is a patient of its own, named by its position.
    """
    patients = Patients(table, schema)
    draws = KeyedDraws(derive(key, "row of a patient"), patients.names)
    picked = patients.pick(draws.everyone, draws.uniform(draws.everyone, 0, size=1))
    return np.sort(picked.numpy().ravel().astype(np.int64))


def group_counts_event(schema: TableSchema, *, epsilon: float) -> PrivacyEvent:
    """What :func:`noisy_group_counts` costs.

    Raises:
        PrivacyError: If the schema has more than 20,000 groups, or ``epsilon`` is out of range.
    """
    _checked_cells(schema.attributes, 1)
    return _laplace_event(epsilon)


def noisy_group_counts(table: pd.DataFrame, schema: TableSchema, *, epsilon: float, key: bytes) -> GroupCounts:
    """Patients of every group, with noise: discrete Laplace of scale 1/ε, no negative counts, then none below 11.

    Groups with a noisy count of 1 to 10 are suppressed, those of 0 or less are not listed. At an ε of .5 a group of
    nobody is listed with a probability of .0025, at .1 with .17: use smaller ones for totals alone.

    *Guarantee*: the result is ε-differentially private for a patient with all rows (neighbours: one patient more or
    less), who is in one cell at most; the event of :func:`group_counts_event` covers it. A row with a level that the
    schema does not have is in no cell.

    Args:
        table: Rows that follow the schema.
        schema: Its sensitive features and label span the groups.
        epsilon: Of this release.
        key: Of this release and this table; the module says why.

    Raises:
        PrivacyError: As :func:`group_counts_event`.
    """
    noisy = _noisy_groups(table, schema, epsilon=epsilon, key=key)
    # the threshold must see the noisy count: one on the true count would tell which side it is on
    return GroupCounts(dict(zip(_groups(schema.attributes), noisy.values.tolist(), strict=True))).suppress()


def marginals_event(schema: TableSchema, *, noise: float) -> PrivacyEvent:
    """What :func:`noisy_marginals` costs.

    Raises:
        PrivacyError: If ``noise`` is out of range.
    """
    return PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=noise, steps=len(schema.modelled))


def noisy_marginals(
    table: pd.DataFrame, schema: TableSchema, *, noise: float, key: bytes, minimum: int = MINIMUM_CELL
) -> Marginals:
    """Histograms of all modelled columns, with noise: discrete Gaussian, then made readable.

    How is said at :func:`mcrage.data.marginals.readable`.

    *Guarantee*: a patient is in one cell of each column and changes it by 1, so that the result is the Gaussian
    mechanism composed once per column; the event of :func:`marginals_event` covers it.

    Args:
        table: Rows that follow the schema.
        schema: The columns and their cells.
        noise: Standard deviation of the noise on each cell.
        key: Of this release and this table; the module says why.
        minimum: Cells with fewer, by their noisy counts, are merged.

    Raises:
        PrivacyError: As :func:`marginals_event`.
    """
    noisy = _by_column(_noisy_columns(table, schema, noise=noise, key=key), schema)
    return readable_marginals(noisy, schema, deviation=noise, minimum=minimum)


def noisy_columns(
    table: pd.DataFrame, schema: TableSchema, *, noise: float, key: bytes, minimum: int = MINIMUM_CELL
) -> Marginals:
    """Histograms of all modelled columns with noise, to be added to those of other sites before they are read.

    Noise falls on both sides, and so do the counts here: where each site cut its own negative counts off, their sum
    would say of a level that nobody has that some patients of every site have it. No count from 1 to ``minimum`` − 1 is
    in it, nor one from −1 down to as far below: both are 0, so that noise alone still adds up to nothing.

    *Guarantee*: as :func:`noisy_marginals`.

    Args:
        table: Rows that follow the schema.
        schema: The columns and their cells.
        noise: Standard deviation of the noise on each cell.
        key: Of this release and this table; the module says why.
        minimum: Counts nearer to 0 are 0.

    Raises:
        PrivacyError: As :func:`marginals_event`.
    """
    noisy = _by_column(_noisy_columns(table, schema, noise=noise, key=key), schema)
    return Marginals({name: np.where(np.abs(cells) < minimum, 0.0, cells) for name, cells in noisy.items()})


def readable_marginals(
    noisy: Marginals, schema: TableSchema, *, deviation: float, minimum: int = MINIMUM_CELL
) -> Marginals:
    """Histograms from noisy ones: no negative counts, then small cells merged. It reads nothing but these.

    Args:
        noisy: Counts of which some may be negative.
        schema: The columns and their cells.
        deviation: Standard deviation of the noise on each of them.
        minimum: Cells with fewer, by their noisy counts, are merged.
    """
    columns = schema.modelled
    return Marginals({c.name: readable(noisy[c.name], c, deviation=deviation, minimum=minimum) for c in columns})


def scores_event(schema: TableSchema, *, epsilon: float, edges: tuple[float, ...] = SCORE_EDGES) -> PrivacyEvent:
    """What :func:`noisy_scores` costs.

    Raises:
        PrivacyError: If there are more than 20,000 cells, ``epsilon`` is out of range, or the edges do not rise from
            0 to 1.
        SchemaError: If the schema has no target.
    """
    if edges[:1] != (0.0,) or edges[-1:] != (1.0,) or any(b <= a for a, b in itertools.pairwise(edges)):
        raise PrivacyError(f"the edges of score bins must rise from 0 to 1, got {', '.join(map(str, edges))}")
    _checked_cells((*schema.sensitive, schema.target), len(edges) - 1)
    return _laplace_event(epsilon)


def noisy_scores(
    table: pd.DataFrame,
    schema: TableSchema,
    scores: NDArray[np.floating],
    *,
    epsilon: float,
    key: bytes,
    edges: tuple[float, ...] = SCORE_EDGES,
) -> NoisyScores:
    """Patients by group, label and score bin, with noise: all metrics of one model at one checkpoint come from it.

    *Guarantee*: for a model that does not depend on the table's patients, the result is ε-differentially private for a
    patient with all rows, who is in one cell at most; the event of :func:`scores_event` covers it. The model must be
    public, released under differential privacy itself, or trained on such releases: one that learned from these
    patients without protection would change everybody's score when one of them leaves.

    Args:
        table: Rows that follow the schema.
        schema: Its sensitive features span the groups; it needs a target.
        scores: Predicted probability of the event of each row; one that is not a number is counted nowhere.
        epsilon: Of this release.
        key: Of this release, this table and these scores; the module says why.
        edges: Edges of the bins, fixed before anybody saw a score. A threshold has to be one of them.

    Raises:
        PrivacyError: As :func:`scores_event`, or if there is not one score per row.
        SchemaError: If the schema has no target.
    """
    event = scores_event(schema, epsilon=epsilon, edges=edges)
    if np.shape(scores) != (len(table),):
        raise PrivacyError(f"one score per row is needed: {len(table):,} rows, scores of shape {np.shape(scores)}")
    rows = patient_rows(table, schema, key=key)
    score, people = scores[rows], table.iloc[rows]
    group, label = _group_cells(people, schema.sensitive), _group_cells(people, (schema.target,))
    is_positive = label == schema.target.levels.index(schema.target.positive_level)
    place = np.searchsorted(edges[1:-1], score, side="right")
    known = (group >= 0) & (label >= 0) & ~np.isnan(score)
    cells = ((2 * group + is_positive) * (len(edges) - 1) + place)[known]
    groups = tuple(_groups(schema.sensitive))
    exact = np.bincount(cells, minlength=2 * len(groups) * (len(edges) - 1))
    noise_key = derive(key, "scores", event.to_json(), schema.fingerprint, json.dumps(edges))
    return NoisyScores(counts=with_noise(exact, event=event, key=noise_key), groups=groups, edges=edges)


def received_scores(histogram: NDArray[np.floating], schema: TableSchema, *, epsilon: float) -> NoisyScores:
    """A histogram that a site released, on the other side of the wire: what it costs and how noisy it is is known.

    Args:
        histogram: As :attr:`NoisyScores.histogram`, whole numbers.
        schema: The data dictionary.
        epsilon: Of the release.

    Raises:
        PrivacyError: If it is of another shape.
    """
    event, groups = scores_event(schema, epsilon=epsilon), tuple(_groups(schema.sensitive))
    if np.shape(histogram) != (len(groups), 2, len(SCORE_EDGES) - 1):
        raise PrivacyError(f"scores of {len(groups):,} groups are expected, got shape {np.shape(histogram)}")
    counts = NoisyCounts(np.asarray(histogram).astype(np.int64).ravel(), event, _HERE)
    return NoisyScores(counts=counts, groups=groups, edges=SCORE_EDGES)


def _noisy_groups(table: pd.DataFrame, schema: TableSchema, *, epsilon: float, key: bytes) -> NoisyCounts:
    """Noisy patients of every group of the schema, negative counts included."""
    event = group_counts_event(schema, epsilon=epsilon)
    cells = _group_cells(table.iloc[patient_rows(table, schema, key=key)], schema.attributes)
    exact = np.bincount(cells[cells >= 0], minlength=_num_groups(schema.attributes))
    return with_noise(exact, event=event, key=derive(key, "groups", event.to_json(), schema.fingerprint))


def _noisy_columns(table: pd.DataFrame, schema: TableSchema, *, noise: float, key: bytes) -> NoisyCounts:
    """Noisy patients of every cell of every modelled column, negative counts included."""
    event = marginals_event(schema, noise=noise)
    rows = table.iloc[patient_rows(table, schema, key=key)]
    exact = [np.bincount(cell_codes(rows[c.name], c), minlength=num_cells(c) + 1) for c in schema.modelled]
    noise_key = derive(key, "columns", event.to_json(), schema.fingerprint)
    return with_noise(np.concatenate(exact), event=event, key=noise_key)


def _by_column(noisy: NoisyCounts, schema: TableSchema) -> Marginals:
    ends = np.cumsum([num_cells(column) + 1 for column in schema.modelled])[:-1]
    parts = zip(schema.modelled, np.split(noisy.values, ends), strict=True)
    return Marginals({column.name: part.astype(np.float64) for column, part in parts})


def with_noise(exact: NDArray[np.int64], *, event: PrivacyEvent, key: bytes) -> NoisyCounts:
    """Counts with the noise of an event on each, for the releases of this package.

    Args:
        exact: Counts of which one patient changes as many as the event says, by one each.
        event: Mechanism and noise.
        key: Of this release alone.
    """
    sample = discrete_laplace if event.mechanism == "discrete-laplace" else discrete_gaussian
    noise = sample(event.noise_multiplier, size=len(exact), bits=KeyedBits(key))
    return NoisyCounts(exact + noise, event, _HERE)


def _laplace_event(epsilon: float) -> PrivacyEvent:
    if not epsilon > 0:
        raise PrivacyError(f"epsilon must be positive, got {epsilon}")
    return PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=1 / epsilon)


def _checked_cells(columns: tuple[Column, ...], bins: int) -> None:
    if (cells := _num_groups(columns) * bins) > MOST_CELLS:
        raise PrivacyError(
            f"{cells:,} cells of {', '.join(column.name for column in columns)} would hold noise alone; at most "
            f"{MOST_CELLS:,} are possible: merge levels, or make fewer columns sensitive"
        )


def _num_groups(columns: tuple[Column, ...]) -> int:
    return math.prod(len(column.group_levels) for column in columns)


def _groups(columns: tuple[Column, ...]) -> list[Group]:
    """Every intersection of the columns' levels, the last column's first."""
    names = [[(column.name, level) for level in column.group_levels] for column in columns]
    return [Group(pairs) for pairs in itertools.product(*names)]


def _group_cells(rows: pd.DataFrame, columns: tuple[Column, ...]) -> NDArray[np.int64]:
    """Position of each row's group among :func:`_groups`; −1 where a level is none of the schema's."""
    codes = group_codes(rows, columns)
    cells = np.zeros(len(rows), dtype=np.int64)
    for code, column in zip(codes.T, columns, strict=True):
        cells = cells * len(column.group_levels) + code
    return np.where((codes < 0).any(axis=1), -1, cells)

"""What a model and its rows give away about the rows that it was trained on: measured attacks, never a guarantee.

Four measures, each against a *hold-out*: rows of the same distribution that the model has not seen.

* :func:`membership_attacks`: from the model's loss on a row, was the row trained on? AUC, .5 is a guess.
* :func:`density_ratio`: from the generated rows around a row, the same.
* :func:`exact_copies`: how many generated rows are a training row, and how many a row of an equally large hold-out.
* :func:`closest_records`: how many generated rows are nearer to a training row than to any row of an equally large
  hold-out; half is perfect. That finds copying and nothing subtler: it is no evidence of privacy (Yao et al., 2025).

A measure that cannot be computed has no value, and a reason.

Shape: losses (rows, times, draws) of :meth:`mcrage.CDDPM.row_losses`; m generated and n real rows give distances
(m, n), a few rows at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom, rankdata

from mcrage.data.schema import TableSchema
from mcrage.evaluation.fidelity import model_matrix

ATTACK_TIMES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
"""Diffusion times of the attack: on the simulated cohort, those at which the loss tells members apart."""

ATTACK_DRAWS = 4
"""Noise draws at each time, 44 in all: as good as 88, measured."""

FALSE_ALARMS = 0.01
"""Share of the hold-out that the attack may name in error when its true positive rate is taken."""

MINIMUM_ROWS = 20
"""Fewest rows of each kind: below it the standard errors, all for large samples, are wrong."""

FEWEST_ALARMS = round(1 / FALSE_ALARMS)
"""Fewest rows of the hold-out for a true positive rate: fewer have no row that may be named in error."""

NEIGHBOURS = 10
"""Nearest rows that give a density: as good as any number up to it, on the simulated cohort and on diabetes-130."""

_Z = 1.96
_CELLS = 1 << 21  # distances at a time: 16 MB
_TIE = 1e-9  # sums of equal parts in another order differ by less
_NEAR = 1e-3  # of one column: rows that are nearer count as equal
_LEAST_LOSS = 0.05  # of the yardstick: below it a share says nothing

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Measured:
    """A number with its standard error.

    Attributes:
        value: None where it could not be computed.
        error: Standard error; 0 where there is no value.
        reason: Why there is no value.
        bounds: 95 % interval where it is not symmetric.
    """

    value: float | None
    error: float = 0.0
    reason: str = ""
    bounds: tuple[float, float] | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval; None where there is no value."""
        if self.value is None or self.bounds is not None:
            return self.bounds
        return self.value - _Z * self.error, self.value + _Z * self.error


@dataclass(frozen=True)
class Attack:
    """How well a score tells members from others.

    Attributes:
        name: ``loss``, ``calibrated loss`` or ``label``; :mod:`mcrage.evaluation.membership` has more.
        auc: Probability that a member scores above another row, ties half; .5 is a guess.
        tpr: Share of the members that the attack finds while it names 1 % of the others.
    """

    name: str
    auc: Measured
    tpr: Measured


@dataclass(frozen=True)
class Copies:
    """Generated rows that equal a real one.

    Attributes:
        of_training: Share that equals a training row.
        of_holdout: Share that equals a row of an equally large hold-out.
        excess: The former less the latter; its error is the one under exchange of the two tables.
    """

    of_training: float
    of_holdout: float
    excess: Measured


@runtime_checkable
class Attackable(Protocol):
    """A model of which an attacker knows everything, such as :class:`mcrage.CDDPM`."""

    def row_losses(
        self, table: pd.DataFrame, *, times: tuple[float, ...], draws: int, random_state: int
    ) -> NDArray[np.float32]:
        """Loss of each row at the same times and noise for all rows; shape (rows, times, draws)."""
        ...

    def label_losses(self, table: pd.DataFrame) -> NDArray[np.float32] | None:
        """Loss of each row's label; None where the model has none."""
        ...

    def untrained(self) -> "Attackable":
        """The same network before its training."""
        ...


def membership_attacks(
    model: Attackable,
    members: pd.DataFrame,
    others: pd.DataFrame,
    *,
    reference: Attackable | None = None,
    random_state: int = 0,
) -> list[Attack]:
    """Attacks by an adversary who has the model and a row, the strongest first.

    All use the loss at the same times and noise for every row, so that nothing but the row differs. The *loss* attack
    takes its mean (Yeom et al., 2018; Carlini et al., 2023, for diffusion). The *calibrated loss* attack takes it as a
    share of what another model has on the same row at the same noise, so that a row that is hard for every model is
    not mistaken for one that was not seen (Watson et al., 2022), and gives each time the same say. Without
    ``reference`` that model is the network before its training, which whoever has the model can build: on the
    simulated cohort this raised the AUC from .56 to .59 and from .63 to .69. The *label* attack takes the loss of the
    label model.

    Taking the strongest of three leans upwards, by about one standard error where none works.

    Args:
        model: The trained model.
        members: Rows that it was trained on.
        others: Rows of the same distribution that it was not trained on.
        reference: A model trained on rows that are in neither table, for a better informed attacker.
        random_state: Seed of the noise.
    """
    few = _too_few({"members": len(members), "others": len(others)})
    if few is not None:
        return [Attack("loss", few, few)]
    table = pd.concat([members, others], ignore_index=True)
    losses = losses_at_times(model, table, random_state=random_state)
    yardstick = losses_at_times(reference or model.untrained(), table, random_state=random_state)
    scores = {"loss": -losses.mean(axis=1), "calibrated loss": -calibrated(losses, yardstick)}
    labels = model.label_losses(table)
    if labels is not None:
        scores["label"] = -labels
    attacks = [attack(name, score[: len(members)], score[len(members) :]) for name, score in scores.items()]
    return sorted(attacks, key=lambda attack: -(attack.auc.value or 0.0))


def losses_at_times(model: Attackable, table: pd.DataFrame, *, random_state: int) -> Floats:
    """Each row's loss at the times of the attack, the mean over draws; shape (rows, times)."""
    losses = model.row_losses(table, times=ATTACK_TIMES, draws=ATTACK_DRAWS, random_state=random_state)
    return np.asarray(losses.mean(axis=2))


def calibrated(losses: Floats, yardstick: Floats) -> Floats:
    """Losses as shares of another model's, each time with the same say; shape (rows,)."""
    shares = losses / (yardstick + _LEAST_LOSS)
    spread = np.maximum(shares.std(axis=0), np.finfo(np.float32).tiny)
    return np.asarray((shares / spread).mean(axis=1))


def attack(name: str, members: Floats, others: Floats) -> Attack:
    """What a score achieves, given for members and others."""
    return Attack(name, auc(members, others), true_positives(members, others))


def auc(members: Floats, others: Floats) -> Measured:
    """Probability that a member scores above another row, ties half, with its standard error (DeLong et al., 1988)."""
    few = _too_few({"members": len(members), "others": len(others)})
    if few is not None:
        return few
    ranks = rankdata(np.concatenate([members, others]))
    above = (ranks[: len(members)] - rankdata(members)) / len(others)
    below = 1 - (ranks[len(members) :] - rankdata(others)) / len(members)
    variance = above.var(ddof=1) / len(members) + below.var(ddof=1) / len(others)
    return Measured(float(above.mean()), float(np.sqrt(variance)))


def true_positives(members: Floats, others: Floats) -> Measured:
    """Share of the members above the score that 1 % of the others exceed.

    The interval is a Bayesian one (Jeffreys' prior) that does not take that score as known: of n others a binomial
    number k exceeds it, so that it lies between the k-th and the next, where half of the members between are found.
    """
    few = _too_few({"members": len(members), "others": len(others)})
    if few is not None:
        return few
    if len(others) < FEWEST_ALARMS:
        return Measured(None, reason=f"needs at least {FEWEST_ALARMS} others")
    ranked = np.sort(others)[::-1]
    limits = ranked[: int(binom.ppf(1 - 1e-6, len(others), FALSE_ALARMS)) + 1]
    found = len(members) - np.searchsorted(np.sort(members), limits, side="right")
    weights = binom.pmf(np.arange(len(limits)), len(others), FALSE_ALARMS)
    weights /= weights.sum()
    between = (found + np.array([found[0] / 2, *found[:-1]])) / 2
    a, b = between + 0.5, len(members) - between + 0.5
    low, high = (
        float(brentq(lambda share, q=q: weights @ beta.cdf(share, a, b) - q, 0.0, 1.0)) for q in (0.025, 0.975)
    )
    share = float(found[int(FALSE_ALARMS * len(others))] / len(members))
    return Measured(share, (high - low) / (2 * _Z), bounds=(min(low, share), max(high, share)))


def exact_copies(
    synthetic: pd.DataFrame,
    training: pd.DataFrame,
    holdout: pd.DataFrame,
    schema: TableSchema,
    *,
    generator: np.random.Generator,
) -> Copies:
    """Share of generated rows that equal a real row in every modelled column; missing equals missing.

    A row of few columns is met by chance, so that the hold-out says how many copies to expect. If the model had not
    seen the training rows, they and the hold-out could be exchanged: of c equal real rows all are on one given side
    with probability 2⁻ᶜ, which gives the standard error.

    Args:
        synthetic: Generated rows.
        training: Rows that the model was trained on.
        holdout: Rows that it was not trained on; the larger of the two tables is thinned to the size of the other.
        schema: The data dictionary.
        generator: Picks the rows that stay.
    """
    tables = [synthetic, *_equal(training, holdout, generator)]
    few = _too_few({"generated": len(synthetic), "training": len(tables[1]), "hold-out": len(tables[2])})
    if few is not None:
        return Copies(0.0, 0.0, few)
    coded = np.concatenate([np.nan_to_num(model_matrix(table, schema.modelled), nan=np.inf) for table in tables])
    kinds, kind = np.unique(coded, axis=0, return_inverse=True)
    ends = np.cumsum([len(table) for table in tables])[:-1]
    made, seen, unseen = (np.bincount(part, minlength=len(kinds)) for part in np.split(kind.ravel(), ends))
    of_training, of_holdout = (float(made[rows > 0].sum() / len(synthetic)) for rows in (seen, unseen))
    real = seen + unseen
    one_sided = np.where(real > 0, 2.0 ** (1 - real), 0.0)
    # both tables have the same size, which the second term accounts for
    variance = (made**2 * one_sided).sum() - (made * real * one_sided).sum() ** 2 / real.sum()
    error = np.sqrt(max(variance, 0.0)) / len(synthetic)
    return Copies(of_training, of_holdout, Measured(of_training - of_holdout, float(error)))


def closest_records(
    synthetic: pd.DataFrame,
    training: pd.DataFrame,
    holdout: pd.DataFrame,
    schema: TableSchema,
    *,
    generator: np.random.Generator,
) -> Measured:
    """Share of generated rows whose nearest real row is a training row rather than one of an equally large hold-out.

    The distance is Gower's (1971): the mean over columns of 0 or 1 for levels, missing being one of them, and for
    numbers of the difference over the 5–95 % range of the real rows, at most 1. Ties count half.

    Many generated rows may share one nearest real row, so that they are not as many independent votes. The standard
    error counts real rows instead: if the model had seen none, each half of them would as well be the training table.

    Args:
        synthetic: Generated rows.
        training: Rows that the model was trained on.
        holdout: Rows that it was not trained on; the larger of the two tables is thinned to the size of the other.
        schema: The data dictionary.
        generator: Picks the rows that stay.
    """
    seen, unseen = _equal(training, holdout, generator)
    few = _too_few({"generated": len(synthetic), "training": len(seen), "hold-out": len(unseen)})
    if few is not None:
        return few
    real = model_matrix(pd.concat([seen, unseen], ignore_index=True), schema.modelled)
    rows = model_matrix(synthetic, schema.modelled)
    votes = np.zeros(len(real))
    for distances in distances_by_parts(rows, real, scales_of(real, schema)):
        nearest = [distances[:, : len(seen)].argmin(axis=1), len(seen) + distances[:, len(seen) :].argmin(axis=1)]
        a, b = (np.take_along_axis(distances, side[:, None], axis=1)[:, 0] for side in nearest)
        share = np.where(np.abs(a - b) < _TIE, 0.5, a < b)
        votes += np.bincount(nearest[0], share, len(real)) + np.bincount(nearest[1], 1 - share, len(real))
    error = 0.5 * votes.std(ddof=1) * np.sqrt(len(real)) / len(rows)  # half of the real rows, drawn without replacement
    return Measured(float(votes[: len(seen)].sum() / len(rows)), float(error))


def density_ratio(
    rows: pd.DataFrame, *, synthetic: pd.DataFrame, reference_rows: pd.DataFrame, schema: TableSchema
) -> Floats:
    """Density of each row under generated rows over that under other rows of the population; shape (rows,).

    A generator that overfits puts more rows near those that it was trained on than the population has there (DOMIAS,
    van Breugel et al., 2023). Either density is that of the ten nearest rows by Gower's distance (Loftsgaarden and
    Quesenberry, 1965): the mean of the log distances, so that one copy is seen, without the dimension, which is a
    factor of all scores. Where many rows are equal in every column the ten nearest of either side are, and the attack
    sees nothing.
    """
    known = model_matrix(reference_rows, schema.modelled)
    asked, made = (model_matrix(table, schema.modelled) for table in (rows, synthetic))
    scales = scales_of(known, schema)
    population, generated = (
        np.log(nearest(asked, table, scales, count=NEIGHBOURS) + _NEAR / len(scales)).mean(axis=1)
        for table in (known, made)
    )
    return np.asarray(population - generated)


def nearest(
    rows: Floats, real: Floats, scales: Floats, *, count: int, owners: NDArray[np.intp] | None = None
) -> Floats:
    """Distances to the nearest real rows, of another owner if owners are given; shape (rows, count), in no order."""
    parts, start = [], 0
    for distances in distances_by_parts(rows, real, scales):
        if owners is not None:
            distances[owners[start : start + len(distances), None] == owners] = np.inf
        start += len(distances)
        parts.append(np.partition(distances, min(count, len(real)) - 1, axis=1)[:, :count])
    return np.concatenate(parts)


def distances_by_parts(rows: Floats, real: Floats, scales: Floats) -> Iterator[Floats]:
    """Gower's distances of a few rows at a time to every real row; each of shape (some rows, real rows)."""
    size = max(_CELLS // max(len(real), 1), 1)
    for start in range(0, len(rows), size):
        yield _distances(rows[start : start + size], real, scales)


def scales_of(real: Floats, schema: TableSchema) -> Floats:
    """What a difference in each column is divided by, for Gower's distance; 0 for columns of levels."""
    columns = zip(schema.modelled, real.T, strict=True)
    return np.array([_scale(values) if column.is_numeric else 0.0 for column, values in columns])


def _distances(rows: Floats, real: Floats, scales: Floats) -> Floats:
    """Gower's distance of every row to every real row; ``scales`` is 0 for columns of levels."""
    total = np.zeros((len(rows), len(real)))
    for a, b, scale in zip(rows.T, real.T, scales, strict=True):
        gap = np.abs(a[:, None] - b)
        part = np.minimum(gap / scale, 1.0) if scale else (gap > 0).astype(np.float64)
        absent = np.isnan(a)[:, None] != np.isnan(b)
        total += np.where(absent, 1.0, np.nan_to_num(part))
    return np.asarray(total / len(scales))


def _scale(values: Floats) -> float:
    """The 5–95 % range of a number; the whole range if that is 0, and 0 if every value is the same or missing."""
    there = values[~np.isnan(values)]
    if not len(there):
        return 0.0
    low, high = np.quantile(there, [0.05, 0.95])
    return float(high - low) or float(np.ptp(there))


def _equal(a: pd.DataFrame, b: pd.DataFrame, generator: np.random.Generator) -> list[pd.DataFrame]:
    """Both tables with the number of rows of the smaller one."""
    size = min(len(a), len(b))
    return [t if len(t) == size else t.iloc[generator.choice(len(t), size, replace=False)] for t in (a, b)]


def _too_few(rows: Mapping[str, int]) -> Measured | None:
    for name, number in rows.items():
        if number < MINIMUM_ROWS:
            return Measured(None, reason=f"needs at least {MINIMUM_ROWS} {name} rows, there are {number}")
    return None

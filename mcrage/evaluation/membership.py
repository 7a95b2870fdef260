"""Who was in the training? Attacks on the model and on its rows, for everyone and for those who stand out.

Measured figures and never a guarantee. The unit is the patient where the schema names one, with the mean score over the
patient's rows, and the row where it does not. Six attacks, each by an adversary who has the records and asks whether
they were trained on:

* ``loss``, ``calibrated loss``, ``label``: from the model (:func:`mcrage.evaluation.disclosure.membership_attacks`);
* ``loss against reference``, ``label against reference``: the same beside a model that was trained on other rows;
* ``density ratio``: from the model's rows alone (:func:`mcrage.evaluation.disclosure.density_ratio`).

Which records stand out is decided without knowing whether they were trained on (:func:`subsets`). What cannot be
computed is absent, with a reason.

Shape: a score for each of n rows (n,), then for each of their patients (patients,).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import group_codes
from mcrage.data.schema import MISSING, TableSchema
from mcrage.errors import ConfigError
from mcrage.evaluation.disclosure import (
    FALSE_ALARMS,
    MINIMUM_ROWS,
    Attack,
    Attackable,
    Floats,
    Measured,
    attack,
    calibrated,
    density_ratio,
    losses_at_times,
    nearest,
    scales_of,
)
from mcrage.evaluation.fidelity import model_matrix
from mcrage.evaluation.strata import Strata

STANDING_OUT = 0.05
"""Share of the patients who count as isolated, or as those with most rows."""

_NO_REFERENCE_MODEL = "needs a model trained on reference rows"
_NO_LABEL = "the model has no label"
_NO_LOSS = "the model is no network: it has no loss"

Mask = NDArray[np.bool_]
Scores = Floats | str  # or the reason why there are none


@dataclass(frozen=True)
class Subset:
    """Patients whose records are attacked together.

    Attributes:
        name: ``everyone``, ``minority``, ``most isolated`` or ``most encounters``.
        detail: Which patients these are.
        members: Whether each patient of the members is one of them.
        others: The same of the others.
        reason: Why there is no such subset.
    """

    name: str
    detail: str
    members: Mask
    others: Mask
    reason: str = ""


@dataclass(frozen=True)
class SubsetAttacks:
    """How well each attack does on one subset.

    Attributes:
        name, detail: Of the subset.
        members: Patients who were trained on; None where the subset is absent.
        others: Patients who were not.
        attacks: In the order of the module's docstring; empty where the subset is absent.
        reason: Why it is absent.
    """

    name: str
    detail: str
    members: int | None = None
    others: int | None = None
    attacks: tuple[Attack, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class MembershipReport:
    """All attacks on all subsets.

    Attributes:
        subsets: Everyone first.
        unit: ``patient`` or ``row``.
        rows: Rows of each table.
        random_state: Seed of the noise.
    """

    subsets: tuple[SubsetAttacks, ...]
    unit: str
    rows: Mapping[str, int]
    random_state: int

    @property
    def strongest(self) -> Attack:
        """The attack with the highest AUC on everyone; taking the highest of six leans upwards."""
        return max(self.subsets[0].attacks, key=lambda attack: attack.auc.value or 0.0)

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "unit": self.unit,
            "rows": dict(self.rows),
            "random_state": self.random_state,
            "false_alarms": FALSE_ALARMS,
            "subsets": [
                {name: value for name, value in vars(subset).items() if name != "attacks"}
                | {"attacks": {a.name: {"auc": _plain(a.auc), "tpr": _plain(a.tpr)} for a in subset.attacks}}
                for subset in self.subsets
            ],
        }


@dataclass(frozen=True)
class Consistency:
    """What a claimed guarantee allows an attack to find, beside what was found.

    Attributes:
        epsilon, delta: The claim.
        bound: Highest true positive rate at 1 % false alarms; 1 where the claim says nothing.
        exceeded: Subset and attack whose whole interval lies above the bound, which speaks against the claim: where
            it holds, one interval in forty does so at most.
    """

    epsilon: float
    delta: float
    bound: float
    exceeded: tuple[tuple[str, str], ...]

    @property
    def says_nothing(self) -> bool:
        """Whether the claim allows every attack."""
        return self.bound >= 1

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return asdict(self) | {"says_nothing": self.says_nothing}


def membership_report(  # noqa: PLR0913 — what an attacker knows, each by its name
    model: object,
    synthetic: pd.DataFrame,
    *,
    members: pd.DataFrame,
    others: pd.DataFrame,
    schema: TableSchema,
    reference_rows: pd.DataFrame | None = None,
    reference: Attackable | None = None,
    random_state: int = 0,
) -> MembershipReport:
    """Every attack on every subset, each with 95 % intervals.

    Args:
        model: The trained model; one that is not :class:`Attackable` has no loss to attack.
        synthetic: Rows that it generated; more of them make the density ratio stronger.
        members: Rows that it was trained on.
        others: Rows of the same population that it was not trained on; 100 patients or more for a true positive rate.
        schema: The data dictionary.
        reference_rows: More rows of the same population, in neither table.
        reference: A model trained on ``reference_rows``.
        random_state: Seed of the noise.

    Raises:
        ConfigError: If a patient is in two of the tables of real rows.
    """
    tables = {"members": members, "others": others}
    if reference_rows is not None:
        tables["reference rows"] = reference_rows
    _refuse_shared_patients(tables, schema)
    both = pd.concat([members, others], ignore_index=True)
    scores = _model_scores(model, both, reference, random_state)
    scores["density ratio"] = _density(both, synthetic, reference_rows, schema)
    people = [_People.of(table, schema) for table in (members, others)]
    by_person = {
        name: score
        if isinstance(score, str)
        else [person.mean(part) for person, part in zip(people, np.split(score, [len(members)]), strict=True)]
        for name, score in scores.items()
    }
    found = subsets(members, others, schema=schema, reference_rows=reference_rows)
    counts = {name: len(table) for name, table in tables.items()} | {"synthetic": len(synthetic)}
    unit = "row" if schema.patient_id is None else "patient"
    return MembershipReport(tuple(_attacked(subset, by_person) for subset in found), unit, counts, random_state)


def subsets(
    members: pd.DataFrame, others: pd.DataFrame, *, schema: TableSchema, reference_rows: pd.DataFrame | None = None
) -> list[Subset]:
    """Everyone and three subsets; exchanging the two tables changes nothing but the sides of their patients.

    * The *minority*: of the levels of each sensitive feature, the one with the fewest patients that has at least 20 in
      either table, and no more than half of all. A patient has the level of the first row. Not an intersection: the
      smallest would always have about 20, too few to say anything.
    * The *most isolated* 5 %, by Gower's distance to the nearest reference row, or without these to the nearest row of
      anybody else in the two tables; the mean over a patient's rows.
    * The 5 % with *most encounters*, by rows.

    Ties at the 5 % are all taken in.
    """
    people = [_People.of(table, schema) for table in (members, others)]
    everyone = [np.ones(len(each), dtype=bool) for each in people]
    return [
        Subset("everyone", "", everyone[0], everyone[1]),
        _minority([table.iloc[each.first] for table, each in zip((members, others), people, strict=True)], schema),
        _isolated(pd.concat([members, others], ignore_index=True), people, schema, reference_rows),
        _frequent(people, schema),
    ]


def consistency(report: MembershipReport, *, epsilon: float, delta: float) -> Consistency:
    """The highest true positive rate that (ε, δ) allows at 1 % false alarms: e^ε · .01 + δ (Kairouz et al., 2015).

    Raises:
        ConfigError: If epsilon is not positive, or delta not from 0 to below 1.
    """
    if not (epsilon > 0 and 0 <= delta < 1):
        raise ConfigError(f"epsilon must be above 0 and delta from 0 to below 1, got {epsilon} and {delta}")
    bound = min(1.0, math.exp(min(epsilon, 700.0)) * FALSE_ALARMS + delta)
    exceeded = tuple(
        (subset.name, each.name)
        for subset in report.subsets
        for each in subset.attacks
        if each.tpr.interval is not None and each.tpr.interval[0] > bound
    )
    return Consistency(epsilon, delta, bound, exceeded)


@dataclass(frozen=True)
class _People:
    """The patients of one table.

    Attributes:
        of_row: Number of each row's patient.
        first: Position of each patient's first row.
        sizes: Rows of each patient.
    """

    of_row: NDArray[np.intp]
    first: NDArray[np.intp]
    sizes: NDArray[np.intp]

    @classmethod
    def of(cls, table: pd.DataFrame, schema: TableSchema) -> "_People":
        """Patients in the order of their first rows; a row without a patient id is a patient."""
        numbers = np.full(len(table), -1)
        if schema.patient_id is not None:
            numbers = pd.factorize(table[schema.patient_id.name])[0]
        alone = numbers < 0
        numbers = np.where(alone, len(table) + np.arange(len(table)), numbers)
        _, first, of_row, sizes = np.unique(numbers, return_index=True, return_inverse=True, return_counts=True)
        return cls(of_row, first, sizes)

    def __len__(self) -> int:
        return len(self.first)

    def mean(self, values: Floats) -> Floats:
        """Means over each patient's rows."""
        return np.asarray(np.bincount(self.of_row, values, len(self)) / self.sizes)


def _model_scores(
    model: object, rows: pd.DataFrame, reference: Attackable | None, random_state: int
) -> dict[str, Scores]:
    if not isinstance(model, Attackable):
        return dict.fromkeys(("loss", "calibrated loss", "loss against reference", "label"), _NO_LOSS)
    losses = losses_at_times(model, rows, random_state=random_state)
    before = losses_at_times(model.untrained(), rows, random_state=random_state)
    labels = model.label_losses(rows)
    scores: dict[str, Scores] = {
        "loss": -losses.mean(axis=1),
        "calibrated loss": -calibrated(losses, before),
        "loss against reference": _NO_REFERENCE_MODEL,
        "label": _NO_LABEL if labels is None else -labels,
        "label against reference": _NO_LABEL if labels is None else _NO_REFERENCE_MODEL,
    }
    if reference is not None:
        theirs = losses_at_times(reference, rows, random_state=random_state)
        scores["loss against reference"] = -calibrated(losses, theirs)
        their_labels = reference.label_losses(rows)
        if labels is not None and their_labels is not None:
            scores["label against reference"] = their_labels - labels
    return scores


def _density(rows: pd.DataFrame, made: pd.DataFrame, reference: pd.DataFrame | None, schema: TableSchema) -> Scores:
    if reference is None:
        return "needs reference rows, which are in neither table"
    if min(len(made), len(reference)) < MINIMUM_ROWS:
        return f"needs at least {MINIMUM_ROWS} generated and {MINIMUM_ROWS} reference rows"
    return density_ratio(rows, synthetic=made, reference_rows=reference, schema=schema)


def _attacked(subset: Subset, scores: Mapping[str, list[Floats] | str]) -> SubsetAttacks:
    sizes = int(subset.members.sum()), int(subset.others.sum())
    reason = subset.reason
    if not reason and min(sizes) < MINIMUM_ROWS:
        reason = f"needs at least {MINIMUM_ROWS} members and {MINIMUM_ROWS} others"
    if reason:
        return SubsetAttacks(subset.name, subset.detail, reason=reason)
    attacks = []
    for name, score in scores.items():
        if isinstance(score, str):
            attacks.append(Attack(name, Measured(None, reason=score), Measured(None, reason=score)))
        else:
            attacks.append(attack(name, score[0][subset.members], score[1][subset.others]))
    return SubsetAttacks(subset.name, subset.detail, *sizes, tuple(attacks))


def _minority(first_rows: list[pd.DataFrame], schema: TableSchema) -> Subset:
    nobody = [np.zeros(len(table), dtype=bool) for table in first_rows]
    codes = [group_codes(table, schema.sensitive) for table in first_rows]
    strata = Strata(codes, schema)
    groups = list(zip(strata.groups, *(strata.rows(each) for each in codes), strict=True))
    smaller = [
        (len(members) + len(others), str(group), members, others)
        for group, members, others in groups
        if min(len(members), len(others)) >= MINIMUM_ROWS
        and 2 * (len(members) + len(others)) <= sum(map(len, first_rows))
        and len(group.levels) == 1
        and MISSING not in group.as_dict().values()
    ]
    if not smaller:
        reason = f"no level of a sensitive feature has {MINIMUM_ROWS} members and {MINIMUM_ROWS} others"
        return Subset("minority", "", nobody[0], nobody[1], reason)
    _, name, *places = min(smaller, key=lambda each: each[0])
    for mask, place in zip(nobody, places, strict=True):
        mask[place] = True
    return Subset("minority", name, nobody[0], nobody[1])


def _isolated(
    both: pd.DataFrame, people: list[_People], schema: TableSchema, reference_rows: pd.DataFrame | None
) -> Subset:
    rows = model_matrix(both, schema.modelled)
    if reference_rows is None:
        owners = np.concatenate([people[0].of_row, len(people[0]) + people[1].of_row])
        distances = nearest(rows, rows, scales_of(rows, schema), count=1, owners=owners)
    else:
        real = model_matrix(reference_rows, schema.modelled)
        distances = nearest(rows, real, scales_of(real, schema), count=1)
    parts = np.split(distances[:, 0], [len(people[0].of_row)])
    apart = [each.mean(part) for each, part in zip(people, parts, strict=True)]
    whom = "row of anybody else" if reference_rows is None else "reference row"
    detail = f"{100 * STANDING_OUT:.0f} % farthest from the nearest {whom}"
    return _top("most isolated", detail, apart, "every record is as far from its nearest one")


def _frequent(people: list[_People], schema: TableSchema) -> Subset:
    if schema.patient_id is None:
        absent = [np.zeros(len(each), dtype=bool) for each in people]
        return Subset("most encounters", "", absent[0], absent[1], "the schema names no patient")
    sizes = [each.sizes.astype(np.float64) for each in people]
    detail = f"{100 * STANDING_OUT:.0f} % with most rows"
    return _top("most encounters", detail, sizes, "every patient has as many rows")


def _top(name: str, detail: str, values: Sequence[Floats], reason: str) -> Subset:
    """The patients with the highest 5 % of the values, and everybody at the limit, but never everyone."""
    together = np.concatenate(values)
    higher = together[together > together.min(initial=np.inf)]
    if not len(higher):
        nobody = [np.zeros(len(part), dtype=bool) for part in values]
        return Subset(name, detail, nobody[0], nobody[1], reason)
    limit = max(float(np.quantile(together, 1 - STANDING_OUT, method="higher")), float(higher.min()))
    return Subset(name, detail, values[0] >= limit, values[1] >= limit)


def _refuse_shared_patients(tables: Mapping[str, pd.DataFrame], schema: TableSchema) -> None:
    if schema.patient_id is None:
        return
    patients = {name: set(table[schema.patient_id.name].dropna()) for name, table in tables.items()}
    for (a, first), (b, second) in combinations(patients.items(), 2):
        if first & second:
            raise ConfigError(f"patients of the {a} are among the {b}; each patient may be in one table only")


def _plain(measured: Measured) -> dict[str, Any]:
    if measured.interval is None:
        return {"value": None, "reason": measured.reason}
    low, high = np.clip(measured.interval, 0.0, 1.0).tolist()
    return {"value": measured.value, "low": low, "high": high}

"""What the federated model of an experiment gives away, as only a simulation can ask: it has all hospitals' rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mcrage import rng
from mcrage.data.schema import TableSchema
from mcrage.evaluation.disclosure import Measured
from mcrage.evaluation.membership import MembershipReport, membership_report
from mcrage.generator import Generator
from mcrage.privacy.sampling import Patients
from simulations.arms import SiteTables

MOST_PATIENTS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """Rows that an attack is tried on.

    Attributes:
        members: Of training patients of all hospitals.
        others: Of half of the patients that were held out.
        reference: Of the other half.
    """

    members: pd.DataFrame
    others: pd.DataFrame
    reference: pd.DataFrame


def attack(
    model: Generator, synthetic: pd.DataFrame, sites: Sequence[SiteTables], schema: TableSchema, *, seed: int
) -> MembershipReport:
    """Attacks on the training patients of all hospitals, beside half of those that they held out; up to 1,000 each.

    The other half tells the attacker what patients are like.
    """
    attacked = attacked_rows(sites, schema, seed=seed)
    return membership_report(
        model,
        synthetic.iloc[: 2 * MOST_PATIENTS],
        members=attacked.members,
        others=attacked.others,
        reference_rows=attacked.reference,
        schema=schema,
        random_state=rng.derive(seed, "attack"),
    )


def attacked_rows(sites: Sequence[SiteTables], schema: TableSchema, *, seed: int) -> Attacked:
    """The rows of at most 1,000 patients of each kind, drawn by the seed."""
    seen, held_out = (
        _shuffled(pd.concat([_named(getattr(tables, part), tables.site, schema) for tables in sites]), schema, seed)
        for part in ("train", "test")
    )
    half = len(held_out) // 2
    return Attacked(members=_first(seen), others=_first(held_out[:half]), reference=_first(held_out[half:]))


def attack_rows(report: MembershipReport) -> list[dict[str, Any]]:
    """A row per subset and attack; one without figures where a subset is absent."""
    return [
        {
            "subset": subset.name,
            "detail": subset.detail,
            "members": subset.members,
            "others": subset.others,
            "attack": each.name,
            "auc": _figure(each.auc),
            "tpr": _figure(each.tpr),
            "reason": each.auc.reason,
        }
        for subset in report.subsets
        for each in subset.attacks
    ]


def _figure(measured: Measured) -> tuple[float, float, float] | None:
    """Value and 95 % interval."""
    if measured.value is None or measured.interval is None:
        return None
    low, high = (min(max(end, 0.0), 1.0) for end in measured.interval)
    return measured.value, low, high


def _shuffled(table: pd.DataFrame, schema: TableSchema, seed: int) -> list[pd.DataFrame]:
    """The rows of each patient, patients in random order."""
    patients = Patients(table, schema).of_rows()
    order = rng.stream(seed, "attacked").permutation(patients.max(initial=-1) + 1)
    rows = pd.Series(np.arange(len(table))).groupby(patients).indices
    return [table.iloc[rows[number]] for number in order]


def _first(patients: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(patients[:MOST_PATIENTS], ignore_index=True)


def _named(table: pd.DataFrame, site: str, schema: TableSchema) -> pd.DataFrame:
    """Patients of two hospitals with the same id are two patients."""
    if schema.patient_id is None:
        return table
    column = schema.patient_id.name
    return table.assign(**{column: (f"{site} " + table[column].astype("str")).where(table[column].notna())})

"""What a cell's generator tells of who was trained on, as only a simulation can ask: it has all hospitals' rows.

Advantage is 2 · AUC − 1: how much more often than not a training patient scores above another one; 0 is a guess.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mcrage import rng
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.evaluation.disclosure import Floats, attack, calibrated, density_ratio, losses_at_times
from mcrage.evaluation.membership import subsets
from mcrage.generator import Generator
from mcrage.privacy.sampling import Patients
from simulations.arms import SiteTables
from simulations.attacks import Attacked, attacked_rows
from simulations.privacy_budget.scoring import Value

ROWS = 2000
"""Generated rows that the attack on rows sees."""

EVERYBODY = "all"


def advantages(model: Generator, sites: Sequence[SiteTables], schema: TableSchema, *, seed: int) -> list[Value]:
    """Advantage of the attack on generated rows and, for a network, of those on its loss; for all and the minority.

    The minority is the smallest level of a sensitive feature that has 20 patients on either side
    (:func:`mcrage.evaluation.membership.subsets`).
    """
    attacked = attacked_rows(sites, schema, seed=seed)
    both = pd.concat([attacked.members, attacked.others], ignore_index=True)
    synthetic = model.sample(ROWS, random_state=rng.derive(seed, "attacked rows"))
    scores = {"rows": density_ratio(both, synthetic=synthetic, reference_rows=attacked.reference, schema=schema)}
    if isinstance(model, CDDPM):
        scores |= _of_loss(model, both, seed=rng.derive(seed, "attack"))
    groups = subsets(attacked.members, attacked.others, schema=schema, reference_rows=attacked.reference)[:2]
    values = []
    for name, score in scores.items():
        members, others = _by_patient(score, attacked, schema)
        for subset in groups:
            auc = None if subset.reason else attack(name, members[subset.members], others[subset.others]).auc.value
            if auc is not None:
                values.append(Value(subset.detail or EVERYBODY, f"advantage_{name}", 2 * auc - 1))
    return values


def _of_loss(model: CDDPM, rows: pd.DataFrame, *, seed: int) -> dict[str, Floats]:
    losses = losses_at_times(model, rows, random_state=seed)
    before = losses_at_times(model.untrained(), rows, random_state=seed)
    return {"loss": -losses.mean(axis=1), "calibrated_loss": -calibrated(losses, before)}


def _by_patient(score: Floats, attacked: Attacked, schema: TableSchema) -> tuple[Floats, Floats]:
    """Mean over each patient's rows, patients in the order of their first rows."""
    parts = np.split(score, [len(attacked.members)])
    members, others = (
        np.bincount(people, part) / np.bincount(people)
        for people, part in (
            (Patients(table, schema).of_rows(), part)
            for table, part in zip((attacked.members, attacked.others), parts, strict=True)
        )
    )
    return members, others

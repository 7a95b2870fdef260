"""How many rows each group should be raised to, chosen by cross-validation on a hospital's own training rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from mcrage.data.groups import GroupCounts
from mcrage.evaluation.downstream import Model, events, patient_codes, train_and_score
from mcrage.rebalancing.baselines import ArmSpec, augmented
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rebalancing.rebalancer import Rebalancer
from mcrage.rng import derive, stream

FOLDS = 3


@dataclass(frozen=True, kw_only=True)
class TargetChoice:
    """The size that ranked best, and how the others did.

    Attributes:
        size: Rows that each group should have; 0 for no synthetic rows.
        auroc: Mean AUROC over the folds, by size; empty where the rows were too few to tell.
    """

    size: int
    auroc: Mapping[int, float]


def choose_target(
    candidates: Iterable[int],
    train: pd.DataFrame,
    pool: Rebalancer,
    *,
    federation: GroupCounts,
    limit: float | None = 1.0,
    model: Model = "logistic_regression",
    seed: int,
) -> TargetChoice:
    """The size for :meth:`RebalancePlan.to_target` with the highest AUROC on held-out training rows.

    No synthetic rows at all is always among the candidates; the smaller of two equals is taken. With fewer than
    :data:`FOLDS` patients with or without the event nothing can be compared, and the largest candidate is taken: such a
    hospital needs the rows most. The pool's model has seen the held-out rows as well, if this hospital took part in
    its training, so the AUROC serves for choosing and not for reporting.

    Args:
        candidates: Sizes to try.
        train: The hospital's training rows.
        pool: Synthetic rows to take from.
        federation: Rows per group and label over all hospitals.
        limit: As in :meth:`RebalancePlan.to_target`.
        model: Downstream model to choose for.
        seed: Seed of the folds, the draws and the model.
    """
    sizes = sorted({0, *candidates})
    folds = _folds(train, pool, seed=seed)
    if not folds:
        return TargetChoice(size=sizes[-1], auroc={})
    auroc = {}
    for size in sizes:
        scores = []
        for fold, (inside, outside) in enumerate(folds):
            rows = train.iloc[inside]
            counts = GroupCounts.of(rows, pool.schema.attributes)
            plan = RebalancePlan.to_target(
                counts, size, label=pool.schema.target.name, federation=federation, limit=limit
            )
            synthetic = pool.take(plan, stream(seed, "target", fold)).table
            arm = augmented(rows, synthetic, pool.schema) if len(synthetic) else ArmSpec(table=rows)
            held_out = train.iloc[outside]
            scored = train_and_score(arm, held_out, pool.schema, model=model, random_state=derive(seed, fold) % 2**32)
            scores.append(roc_auc_score(events(held_out, pool.schema), scored.scores))
        auroc[size] = float(np.mean(scores))
    return TargetChoice(size=max(sizes, key=lambda size: (auroc[size], -size)), auroc=auroc)


def _folds(train: pd.DataFrame, pool: Rebalancer, *, seed: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    event, patients = events(train, pool.schema), patient_codes(train, pool.schema)
    if min(len(np.unique(patients[event == label])) for label in (False, True)) < FOLDS:
        return []
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=derive(seed, "folds") % 2**32)
    folds = splitter.split(np.zeros(len(train)), event, patients)
    return [fold for fold in folds if all(0 < event[part].sum() < len(part) for part in fold)]

"""What happens at one hospital once there is a pool of synthetic rows: plans, training sets, scores.

Hospitals are independent of each other: every function here is a task for a process of its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from mcrage.cddpm import CDDPM
from mcrage.config import FederationConfig
from mcrage.data.groups import Group, GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.evaluation.arms import SiteScores, evaluate_site
from mcrage.rebalancing.baselines import augmented
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rebalancing.rebalancer import Rebalancer, make_pool
from mcrage.rng import derive, stream

OWN = "own"
COMMON = "common"


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteTables:
    """The rows of one hospital.

    Attributes:
        site: Its name.
        train: Its training rows.
        test: Its held-out rows.
    """

    site: str
    train: pd.DataFrame
    test: pd.DataFrame


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalTraining:
    """A model that sees one hospital only.

    Attributes:
        folder: Where it goes.
        train: The hospital's training rows.
        schema: The data dictionary.
        federation: Settings of the federated model, whose network and batches it has.
        seed: Seed of the training.
    """

    folder: Path
    train: pd.DataFrame
    schema: TableSchema
    federation: FederationConfig
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteTask:
    """All that the evaluation of one hospital needs.

    Attributes:
        tables: The hospital's rows.
        schema: The data dictionary.
        plans: What each federated arm takes from the pool.
        pools: Synthetic rows of the federated model to take from, by arm.
        pooled: The training rows of all hospitals.
        common_test: Test rows that all hospitals share; None where there are none.
        local_model: Folder of the model that saw this hospital only; None leaves its arm out.
        seed: Root of the draws.
        path: File for the scores.
    """

    tables: SiteTables
    schema: TableSchema
    plans: Mapping[str, RebalancePlan]
    pools: Mapping[str, pd.DataFrame]
    pooled: pd.DataFrame
    common_test: pd.DataFrame | None
    local_model: Path | None
    seed: int
    path: Path


def train_local(task: LocalTraining) -> None:
    """Trains and saves the model of one hospital, in as many steps as it takes part with in the federation."""
    torch.set_num_threads(1)
    settings = task.federation.model_dump(include={"width", "depth", "batch_size", "learning_rate"})
    model = CDDPM(**settings, steps=task.federation.total_steps, random_state=task.seed)
    model.fit(task.train, task.schema).save(task.folder)


def site_plans(
    train: pd.DataFrame, schema: TableSchema, *, federation: GroupCounts, multiple: float, floor: int
) -> dict[str, RebalancePlan]:
    """What one hospital takes from the pool in each federated arm.

    ``federated_parity`` raises every group × label to the hospital's largest (MCRAGE). ``federated_target`` raises
    every group to a multiple of what the whole federation holds of it, small groups at least to a floor, and leaves the
    label of each row to the model: it is drawn last, given everything else.

    Args:
        train: The hospital's training rows, whose exact counts stay with it.
        schema: The data dictionary.
        federation: Rows per group over all hospitals.
        multiple: Rows that a group has in the end, per row that the federation holds of it.
        floor: Fewest rows that a group has in the end.
    """
    return {
        "federated_parity": RebalancePlan.to_parity(GroupCounts.of(train, schema.attributes)),
        "federated_target": RebalancePlan.to_federation(
            GroupCounts.of(train, schema.sensitive), federation=federation, multiple=multiple, floor=floor
        ),
    }


def largest_request(plans: Sequence[RebalancePlan]) -> dict[Group, int]:
    """Most rows of each group that any of the plans asks for: what a pool for all of them holds."""
    request: dict[Group, int] = {}
    for plan in plans:
        for group, count in plan.items():
            request[group] = max(request.get(group, 0), count)
    return {group: count for group, count in request.items() if count}


def score_site(task: SiteTask) -> int:
    """Trains all arms at one hospital and keeps their scores on both test sets.

    Returns:
        Rows that the plans asked for and the pool did not have.
    """
    torch.set_num_threads(1)
    own, short = task.tables, 0
    arms: dict[str, pd.DataFrame] = {"pooled": task.pooled}
    for arm, plan in task.plans.items():
        taken = Rebalancer.from_pool(task.pools[arm], task.schema).take(plan, stream(task.seed, "take", arm, own.site))
        arms[arm] = augmented(own.train, taken.table, task.schema).table
        short += sum(taken.short.values())
    if task.local_model is not None:
        # The same rows by group as the larger federated arm: what differs is who trained the model.
        model, plan = CDDPM.load(task.local_model), task.plans["federated_target"]
        rows = make_pool(model, task.schema, plan, random_state=derive(task.seed, "local rows", own.site))
        arms["local_cddpm"] = augmented(own.train, rows.table, task.schema).table
    tests = [own.test] if task.common_test is None else [own.test, task.common_test]
    test = pd.concat(tests, ignore_index=True)
    scores = evaluate_site(own.site, own.train, test, schema=task.schema, arms=arms, seed=task.seed)
    save_scores(scores, task.path, num_own=len(own.test))
    return short


def save_scores(scores: SiteScores, path: Path, *, num_own: int) -> None:
    """Writes scores to an ``.npz`` file; a file is either whole or not there."""
    reasons = [[arm, model, reason] for (arm, model), reason in scores.reasons.items()]
    names = {"site": scores.site, "arms": scores.arms, "models": scores.models, "reasons": reasons, "num_own": num_own}
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.savez(
            file,
            names=np.array(json.dumps(names)),
            event=scores.event,
            patients=scores.patients,
            codes=scores.codes,
            scores=scores.scores,
            thresholds=scores.thresholds,
        )
    temporary.replace(path)


def load_scores(path: Path) -> dict[str, SiteScores]:
    """The scores of one hospital by test set: ``own`` held-out rows and, where there are any, the ``common`` ones."""
    with np.load(path, allow_pickle=False) as kept:
        names = json.loads(str(kept["names"]))
        everything = SiteScores(
            site=names["site"],
            event=kept["event"],
            patients=kept["patients"],
            codes=kept["codes"],
            arms=tuple(names["arms"]),
            models=tuple(names["models"]),
            scores=kept["scores"],
            thresholds=kept["thresholds"],
            reasons={(arm, model): reason for arm, model, reason in names["reasons"]},
        )
    rows = np.arange(len(everything.event))
    parts = {OWN: rows[: names["num_own"]], COMMON: rows[names["num_own"] :]}
    return {name: _part(everything, part) for name, part in parts.items() if len(part) or name == OWN}


def _part(scores: SiteScores, rows: NDArray[np.int64]) -> SiteScores:
    """The scores of some of the rows, their patients numbered anew."""
    return replace(
        scores,
        event=scores.event[rows],
        patients=np.unique(scores.patients[rows], return_inverse=True)[1].astype(np.int64),
        codes=scores.codes[rows],
        scores=scores.scores[:, :, rows],
    )

"""From a plan to synthetic rows: made by a model, or taken from a pool that was made centrally.

In a federation the coordinator samples one pool from the model, and each hospital takes from it what its own plan asks
for, so that no hospital's counts ever leave it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import Group, group_codes, level_code
from mcrage.data.repair import NO_REPAIRS, Repairs
from mcrage.data.schema import TableSchema
from mcrage.errors import SamplingError
from mcrage.rebalancing.plan import RebalancePlan, all_groups, text_table
from mcrage.rng import derive

ATTEMPTS = 3
"""How often a model is asked for rows of a group that it still owes, before the shortfall is reported."""


class ConditionalSampler(Protocol):
    """Anything that makes rows of given groups, such as :class:`mcrage.CDDPM`.

    Attributes:
        repairs_: What the schema's rules did to the rows of the last call.
    """

    repairs_: Repairs

    def sample(self, n: int, conditions: pd.DataFrame, *, random_state: int) -> pd.DataFrame:
        """``n`` rows; row i has the levels of row i of ``conditions``."""
        ...


@dataclass(frozen=True)
class Pool:
    """Synthetic rows for many hospitals to take from, and what the schema's rules did to them."""

    table: pd.DataFrame
    repairs: Repairs


@dataclass(frozen=True, kw_only=True)
class Rebalanced:
    """Synthetic rows and what became of the plan.

    Attributes:
        table: The synthetic rows, in the order of the plan's groups.
        asked: Rows that the plan asked for, by group.
        made: Rows that there are, by group.
        repairs: What the schema's rules did to the pool that the rows are from.
    """

    table: pd.DataFrame
    asked: Mapping[Group, int]
    made: Mapping[Group, int]
    repairs: Repairs = NO_REPAIRS

    @property
    def short(self) -> dict[Group, int]:
        """Rows asked for that could not be had, by group."""
        return {group: count - self.made[group] for group, count in self.asked.items() if count > self.made[group]}

    def __str__(self) -> str:
        lines = [(str(g), count, self.made[g], count - self.made[g]) for g, count in self.asked.items()]
        return "\n".join([text_table(("group", "asked", "made", "short"), lines), *self.repairs.lines])


class Rebalancer:
    """Takes what a plan asks for from a pool of synthetic rows.

    Args:
        pool: Rows with the schema's modelled columns.
        schema: The data dictionary.
        repairs: What its rules did to these rows.
    """

    def __init__(self, pool: pd.DataFrame, schema: TableSchema, *, repairs: Repairs = NO_REPAIRS) -> None:
        self.pool = pool
        self.schema = schema
        self.repairs = repairs

    @classmethod
    def from_pool(cls, pool: pd.DataFrame, schema: TableSchema) -> "Rebalancer":
        """A rebalancer over rows that were made elsewhere, as in a federation."""
        return cls(pool, schema)

    @classmethod
    def from_model(
        cls, model: ConditionalSampler, plan: Mapping[Group, int], schema: TableSchema, *, random_state: int
    ) -> "Rebalancer":
        """A rebalancer over a pool that a model makes for this plan."""
        made = make_pool(model, schema, plan, random_state=random_state)
        return cls(made.table, schema, repairs=made.repairs)

    def take(self, plan: RebalancePlan | Mapping[Group, int], generator: np.random.Generator) -> Rebalanced:
        """Rows for every group of the plan, each at most once; fewer than asked where the pool holds fewer.

        Args:
            plan: Rows to take per group. All groups are intersections of the same attributes.
            generator: Draws which of the pool's rows are taken.

        Raises:
            SamplingError: If the groups are not of the same attributes, or have levels that the schema lacks.
        """
        names = {tuple(name for name, _ in group.levels) for group in plan}
        if len(names) > 1:
            raise SamplingError("the groups of a plan must be intersections of the same attributes")
        positions = _rows_by_group(self.pool, self.schema, list(plan))
        taken = {
            group: generator.permutation(positions[group])[:count] if count else positions[group][:0]
            for group, count in plan.items()
        }
        rows = np.concatenate([np.zeros(0, dtype=np.int64), *taken.values()])
        return Rebalanced(
            table=self.pool.iloc[rows].reset_index(drop=True),
            asked=dict(plan),
            made={group: len(chosen) for group, chosen in taken.items()},
            repairs=self.repairs,
        )


def make_pool(
    model: ConditionalSampler, schema: TableSchema, per_group: int | Mapping[Group, int], *, random_state: int
) -> Pool:
    """Synthetic rows for many hospitals to take from, ordered by group.

    Args:
        model: Makes the rows.
        schema: The data dictionary.
        per_group: Rows for each group, or one number for every intersection of the schema's levels that
            its rules allow.
        random_state: Seed of the draws.

    Returns:
        Rows with the schema's modelled columns. A group has fewer rows than asked for only if the model still owes
        them after :data:`ATTEMPTS` rounds.
    """
    owed = dict.fromkeys(all_groups(schema), per_group) if isinstance(per_group, int) else dict(per_group)
    groups = list(owed)
    parts: list[pd.DataFrame] = []
    repairs = NO_REPAIRS
    for attempt in range(ATTEMPTS):
        conditions = pd.DataFrame([group.as_dict() for group, count in owed.items() for _ in range(count)])
        if conditions.empty:
            break
        seed = derive(random_state, "pool", attempt)
        rows = model.sample(len(conditions), conditions, random_state=seed)
        repairs += model.repairs_
        found = _rows_by_group(rows, schema, groups)
        kept = {group: positions[: owed[group]] for group, positions in found.items()}
        parts += [rows.iloc[positions] for positions in kept.values() if len(positions)]
        owed = {group: count - len(kept[group]) for group, count in owed.items()}
    if not parts:
        raise SamplingError(f"no row was made for any of the {len(groups)} groups; ask for at least one row")
    pool = pd.concat(parts, ignore_index=True)
    order = np.concatenate(list(_rows_by_group(pool, schema, groups).values()))
    return Pool(pool.iloc[order].reset_index(drop=True), repairs)


def _rows_by_group(table: pd.DataFrame, schema: TableSchema, groups: Sequence[Group]) -> dict[Group, NDArray[np.int64]]:
    """Positions of the rows of each group, in the order of the groups; groups share their attributes."""
    if not groups:
        return {}
    columns = tuple(schema.column(name) for name, _ in groups[0].levels)
    if not columns:
        return dict.fromkeys(groups, np.arange(len(table)))
    codes = group_codes(table, columns)
    keys, inverse = np.unique(codes, axis=0, return_inverse=True)
    order = np.argsort(inverse.ravel(), kind="stable")
    members = np.split(order, np.cumsum(np.bincount(inverse.ravel(), minlength=len(keys)))[:-1])
    by_key = {tuple(key): rows for key, rows in zip(keys.tolist(), members, strict=True)}
    empty = np.zeros(0, dtype=np.int64)
    return {
        group: by_key.get(
            tuple(level_code(column, level) for column, (_, level) in zip(columns, group.levels, strict=True)), empty
        )
        for group in groups
    }

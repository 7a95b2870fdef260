"""How many rows to make for which group: pure arithmetic on counts, printable, and without any model.

A plan for one hospital is made from that hospital's own exact counts, at that hospital, and stays there; a global plan
is made from the sum of counts that hospitals released. Groups are intersections of the sensitive features and the
label, in this order, as :meth:`GroupCounts.of` counts them over ``schema.attributes``. A group that is known to be
suppressed counts as 5 rows, half of what may be shown.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts, level_code
from mcrage.data.repair import forbidden
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError

PRIOR_ROWS = 20
"""Rows of the wider rate that are mixed into the label rate of a group: a group of three rows tells no rate."""


class RebalancePlan(Mapping[Group, int]):
    """Rows to make per group; printing it gives a table.

    Attributes:
        has: Rows there are, by group.
        short: Rows that the rule wanted but that a cap or the federation's own rows did not allow, by group.
    """

    def __init__(
        self,
        rows: Mapping[Group, int],
        *,
        has: Mapping[Group, int] | None = None,
        short: Mapping[Group, int] | None = None,
    ) -> None:
        if negative := [str(group) for group, count in rows.items() if count < 0]:
            raise ConfigError(f"a plan cannot ask for fewer than 0 rows ({'; '.join(negative)})")
        self._rows = {group: int(count) for group, count in rows.items()}
        self.has = {group: int((has or {}).get(group, 0)) for group in rows}
        self.short = {group: int(count) for group, count in (short or {}).items() if count > 0}

    @classmethod
    def to_parity(
        cls, counts: GroupCounts, *, known: Iterable[Group] = (), floor: int = 0, cap: int | None = None
    ) -> "RebalancePlan":
        """Raises every group, label included, to the largest one (MCRAGE, arXiv 2310.18430).

        Args:
            counts: Rows per group and label.
            known: Groups that are asked for although there may be no row of them, such as the federation's.
            floor: No group ends below this number of rows, even where the largest has fewer.
            cap: No group is given more than this number of rows.
        """
        has = {group: _rows(counts, group) for group in dict.fromkeys([*_listed(counts), *known])}
        goal = max([floor, *has.values()])
        wanted = {group: goal - count for group, count in has.items()}
        return cls._capped(wanted, wanted, has=has, cap=cap)

    @classmethod
    def to_group_parity(
        cls,
        counts: GroupCounts,
        *,
        label: str,
        federation: GroupCounts | None = None,
        floor: int = 0,
        cap: int | None = None,
    ) -> "RebalancePlan":
        """Raises every group of sensitive features to the largest one and keeps the label rate of each.

        Label rates and ``federation`` are as in :meth:`to_target`, ``floor`` and ``cap`` as in :meth:`to_parity`.
        """
        size = max([floor, *counts.without(label).values()])
        return cls.to_target(counts, size, label=label, federation=federation, limit=None, cap=cap)

    @classmethod
    def to_target(
        cls,
        counts: GroupCounts,
        size: int,
        *,
        label: str,
        federation: GroupCounts | None = None,
        limit: float | None = 1.0,
        cap: int | None = None,
    ) -> "RebalancePlan":
        """Raises every group of sensitive features to ``size`` rows, which may lie beyond the largest group.

        A group keeps the hospital's own label rate as far as there are rows to tell: :data:`PRIOR_ROWS` rows at the
        federation's rate of the group are mixed in, and into that one as many at the rate over all groups.

        Args:
            counts: Rows per group and label.
            size: Rows that each group should have, real and synthetic together.
            label: Name of the label among the attributes of the groups.
            federation: The same counts summed over all hospitals; its groups are asked for as well.
            limit: No group ends above this multiple of the rows that the federation holds of it; None for no limit.
            cap: No group of sensitive features and label is given more than this number of rows.
        """
        if size < 0:
            raise ConfigError(f"size must be at least 0 rows, got {size}")
        elsewhere = federation if federation is not None else GroupCounts({})
        cells_of = _cells([*_listed(counts), *_listed(elsewhere)], label)
        overall = np.sum([[_rows(counts + elsewhere, cell) for cell in cells] for cells in cells_of.values()], axis=0)
        has: dict[Group, int] = {}
        wanted: dict[Group, int] = {}
        allowed: dict[Group, int] = {}
        for cells in cells_of.values():
            own = np.array([_rows(counts, cell) for cell in cells])
            held = np.array([_rows(elsewhere, cell) for cell in cells])
            rates = _mixed(own, _mixed(held, overall / overall.sum()))
            limited = size
            if federation is not None and limit is not None:
                limited = min(size, int(limit * held.sum()))
            has |= zip(cells, own.tolist(), strict=True)
            wanted |= zip(cells, _lacking(own, rates, size), strict=True)
            allowed |= zip(cells, _lacking(own, rates, limited), strict=True)
        return cls._capped(wanted, allowed, has=has, cap=cap)

    @classmethod
    def to_federation(
        cls, counts: GroupCounts, *, federation: GroupCounts, multiple: float = 1.0, floor: int = 0
    ) -> "RebalancePlan":
        """Raises every group to a multiple of what the whole federation holds of it, small groups at least to a floor.

        With groups of sensitive features alone the label is left to the model, which knows its rate in every group.

        Args:
            counts: The hospital's rows per group.
            federation: Rows per group over all hospitals, over the same attributes.
            multiple: Rows that a group has in the end, per row that the federation holds of it.
            floor: Fewest rows that a group has in the end.
        """
        has = {group: _rows(counts, group) for group in dict.fromkeys([*_listed(counts), *_listed(federation)])}
        goals = {group: max(floor, int(multiple * _rows(federation, group))) for group in has}
        wanted = {group: max(goals[group] - count, 0) for group, count in has.items()}
        return cls._capped(wanted, wanted, has=has, cap=None)

    @classmethod
    def _capped(
        cls, wanted: Mapping[Group, int], allowed: Mapping[Group, int], *, has: Mapping[Group, int], cap: int | None
    ) -> "RebalancePlan":
        if cap is not None and cap < 0:
            raise ConfigError(f"cap must be at least 0 rows, got {cap}")
        rows = {group: count if cap is None else min(count, cap) for group, count in allowed.items()}
        return cls(rows, has=has, short={group: wanted[group] - count for group, count in rows.items()})

    @property
    def total(self) -> int:
        """Rows to make in all."""
        return sum(self._rows.values())

    def __getitem__(self, group: Group) -> int:
        return self._rows[group]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"RebalancePlan({len(self)} groups, {self.total:,} rows to make, {sum(self.short.values()):,} short)"

    def __str__(self) -> str:
        lines = [(str(g), self.has[g], n, self.has[g] + n, self.short.get(g, 0)) for g, n in self._rows.items()]
        return text_table(("group", "rows", "to make", "then", "short"), lines)


def all_groups(schema: TableSchema) -> tuple[Group, ...]:
    """Every intersection of the schema's sensitive features and label that its rules allow, without missing values."""
    levels = [
        [(column.name, level) for level in column.group_levels[: -1 if column.nullable else None]]
        for column in schema.attributes
    ]
    groups = [Group(pairs) for pairs in itertools.product(*levels)]
    if not schema.rules:
        return tuple(groups)
    codes = np.array([_codes(group, schema) for group in groups])
    return tuple(group for group, bad in zip(groups, forbidden(codes, schema), strict=True) if not bad)


def text_table(header: Sequence[str], lines: Sequence[tuple[str, *tuple[int, ...]]]) -> str:
    """A table for a terminal: one column of names, then counts, then a line of totals."""
    counts = [line[1:] for line in lines]
    totals = [sum(column) for column in zip(*counts, strict=True)] or [0] * (len(header) - 1)
    names = [header[0], *(line[0] for line in lines), "total"]
    cells = [list(header[1:]), *([f"{count:,}" for count in row] for row in [*counts, totals])]
    width = max(map(len, names))
    return "\n".join(
        f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in row) for name, row in zip(names, cells, strict=True)
    )


def _codes(group: Group, schema: TableSchema) -> list[int]:
    return [level_code(column, group.as_dict()[column.name]) for column in schema.attributes]


def _rows(counts: GroupCounts, group: Group) -> int:
    return counts.get(group, MINIMUM_CELL // 2 if group in counts.suppressed else 0)


def _listed(counts: GroupCounts) -> list[Group]:
    return [*counts, *sorted(counts.suppressed - counts.keys(), key=str)]


def _cells(groups: Iterable[Group], label: str) -> dict[Group, list[Group]]:
    """The groups with the label, by the group without it; each has every level of the label that occurs anywhere."""
    groups = list(groups)
    if any(not group.levels or group.levels[-1][0] != label for group in groups):
        raise ConfigError(f"groups must end with the label '{label}': count them over schema.attributes")
    labels = sorted({group.levels[-1] for group in groups})
    families = dict.fromkeys(group.without(label) for group in groups)
    return {family: [Group((*family.levels, pair)) for pair in labels] for family in families}


def _mixed(rows: NDArray[np.int64], rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each level of the label among these rows and :data:`PRIOR_ROWS` more at the given rates."""
    return np.asarray((rows + PRIOR_ROWS * rates) / (rows.sum() + PRIOR_ROWS))


def _lacking(own: NDArray[np.int64], rates: NDArray[np.float64], size: int) -> list[int]:
    """Rows to make of each level of the label for ``size`` rows at these rates, as far as there is room."""
    goals = np.floor(rates * size).astype(int)
    goals[np.argsort(goals - rates * size, kind="stable")[: size - goals.sum()]] += 1
    room = max(0, size - int(own.sum()))
    lacking = []
    for gap in np.maximum(0, goals - own).tolist():
        lacking.append(min(gap, room))
        room -= lacking[-1]
    return lacking

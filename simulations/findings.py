"""What a report shows beside scores: group sizes, distributions by group, and the fidelity of the model by round."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.coding import cell_edges, is_coded
from mcrage.data.groups import Group, GroupCounts, group_codes
from mcrage.data.marginals import Marginals, cell_codes, coded_levels, exact_cells
from mcrage.data.schema import MISSING, Column, TableSchema
from mcrage.evaluation.downstream import patient_codes
from mcrage.evaluation.report import ALL, GroupSize, Marginal
from mcrage.evaluation.strata import Strata
from mcrage.evaluation.suppression import Cells, hidden_cells
from mcrage.generator import Generator
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rng import derive
from simulations.arms import SiteTables

MOST_BINS = 10
"""Most bins of a number in plots and in the fidelity by round."""

_ROWS_PER_BIN = 20  # on average, so that few bins of a small group are too small to be shown

EVERYBODY_ELSE = "everybody else"
"""Name of the patients who are in no minority group. Everybody together is not shown beside a minority: the difference
of the two could be a small cell."""

Floats = NDArray[np.float64]


def modelled_counts(sampled: pd.DataFrame, schema: TableSchema, *, num_rows: int) -> GroupCounts:
    """Rows per group that the federation holds, as its model knows them.

    Hospitals release no count under 11, and a group that is small everywhere would count as none. What the model
    generates is derived from what it learned anyway, so that counting it releases nothing more.

    Args:
        sampled: Rows of the model, without condition.
        schema: The data dictionary.
        num_rows: Rows of all hospitals together.
    """
    counts = GroupCounts.of(sampled, schema.sensitive)
    return GroupCounts({group: round(count * num_rows / len(sampled)) for group, count in counts.items()})


def fidelity(rows: pd.DataFrame, marginals: Marginals, schema: TableSchema) -> float:
    """Mean over columns of 1 − total variation distance to the released histograms; 1 is perfect.

    Numbers are compared in at most :data:`MOST_BINS` bins. Needs no patient's row.
    """
    similar = []
    for column in schema.modelled:
        bins = _bins(marginals[column.name], column)
        real, made = (
            _binned(cells, bins) for cells in (marginals[column.name], exact_cells(rows[column.name], column))
        )
        if real.sum() and made.sum():
            similar.append(1 - np.abs(real / real.sum() - made / made.sum()).sum() / 2)
    return float(np.mean(similar))


def group_sizes(
    sites: Sequence[SiteTables], plans: Mapping[str, RebalancePlan], schema: TableSchema, *, minimum: int
) -> list[GroupSize]:
    """Training rows per group before and after, at each hospital and over all.

    A group whose number of patients is small, or could be worked out from those shown, has none.

    Args:
        sites: The hospitals' rows.
        plans: What the headline arm took from the pool, by hospital.
        schema: The data dictionary.
        minimum: Smallest number of patients that may be shown.
    """
    codes = [group_codes(tables.train, schema.sensitive) for tables in sites]
    strata = Strata(codes, schema)
    hidden = _hidden_sizes(sites, codes, strata, schema, minimum=minimum)
    real = np.array([[len(rows) for rows in strata.rows(of_site)] for of_site in codes])
    made = np.array([[_planned(plans[tables.site], group) for group in strata.groups] for tables in sites])
    found = []
    blocks = zip([ALL, *(tables.site for tables in sites)], [hidden[-1], *hidden], strict=False)
    for position, (site, hides) in enumerate(blocks):
        rows = (real.sum(axis=0), made.sum(axis=0)) if not position else (real[position - 1], made[position - 1])
        found += [
            GroupSize(site=site, group=str(group), real=None, synthetic=None)
            if hide
            else GroupSize(site=site, group=str(group), real=int(before), synthetic=int(added))
            for group, hide, before, added in zip(strata.groups, hides.tolist(), *rows, strict=True)
        ]
    return found


def minority_marginals(
    train: pd.DataFrame, model: Generator, groups: Iterable[str], *, num_rows: int, minimum: int, seed: int
) -> list[Marginal]:
    """Every column within each minority group of one attribute, and within everybody else: real and generated.

    Args:
        train: The training rows of all hospitals.
        model: Generates the rows, each group as large as it comes.
        groups: Names of the minority groups.
        num_rows: Rows to generate per group.
        minimum: Smallest number of rows that may be shown.
        seed: Seed of the draws.
    """
    schema = model.schema_
    minorities = [group for group in _single(schema) if str(group) in set(groups)]
    in_none = np.ones(len(train), dtype=bool)
    found = []
    for group in minorities:
        inside = _matches(train, group, schema)
        in_none &= ~inside
        made = model.sample(num_rows, group.as_dict(), random_state=derive(seed, "marginals", str(group)))
        found += _columns(str(group), train[inside], made, schema, minimum=minimum)
    made = model.sample(num_rows, random_state=derive(seed, "marginals"))
    in_none_made = np.ones(num_rows, dtype=bool)
    for group in minorities:
        in_none_made &= ~_matches(made, group, schema)
    name = EVERYBODY_ELSE if minorities else ALL
    return found + _columns(name, train[in_none], made[in_none_made], schema, minimum=minimum)


def _hidden_sizes(
    sites: Sequence[SiteTables],
    codes: Sequence[NDArray[np.int64]],
    strata: Strata,
    schema: TableSchema,
    *,
    minimum: int,
) -> NDArray[np.bool_]:
    """Whether a group's size may not be shown, by hospital and, last, over all; shape (hospitals + 1, groups)."""
    atoms = []
    for tables, of_site in zip(sites, codes, strict=True):
        patients = patient_codes(tables.train, schema)
        counts = strata.patients(of_site, np.ones(len(patients), dtype=bool), patients)
        atoms.append(np.repeat(counts[:, :1], 2, axis=1))  # sizes only: nothing is said of the outcome
    cells: Cells = strata.cells(atoms)
    hidden = hidden_cells(cells, minimum=minimum).reshape(cells.num_blocks, -1)
    return np.vstack([hidden, hidden]) if len(sites) == 1 else hidden


def _planned(plan: RebalancePlan, group: Group) -> int:
    return sum(count for cell, count in plan.items() if set(group.levels) <= set(cell.levels))


def _single(schema: TableSchema) -> list[Group]:
    """Groups of one sensitive feature, missing values left out."""
    return [
        Group(((column.name, level),))
        for column in schema.sensitive
        for level in column.group_levels[: -1 if column.nullable else None]
    ]


def _matches(table: pd.DataFrame, group: Group, schema: TableSchema) -> NDArray[np.bool_]:
    ((name, level),) = group.levels
    column = schema.column(name)
    return group_codes(table, (column,))[:, 0] == column.group_levels.index(level)


def _columns(
    group: str, real: pd.DataFrame, made: pd.DataFrame, schema: TableSchema, *, minimum: int
) -> list[Marginal]:
    found = []
    most = min(MOST_BINS, max(2, len(real) // _ROWS_PER_BIN))
    for column in schema.modelled:
        if group.startswith(f"{column.name}=") and not column.is_numeric:
            continue  # it defines the group
        cells = exact_cells(made[column.name], column)
        bins = _bins(cells, column, most=most)
        before = _binned(np.bincount(cell_codes(real[column.name], column), minlength=len(cells)), bins)
        after = _binned(cells, bins)
        labels = _labels(column, bins)
        if not column.nullable:
            before, after, labels = before[:-1], after[:-1], labels[:-1]
        shown = _shown(before, minimum=minimum)
        found.append(
            Marginal(
                column=column.name,
                group=group,
                labels=tuple(labels),
                real=tuple(int(n) if show else None for n, show in zip(before, shown, strict=True)),
                synthetic=tuple(int(n) if show else None for n, show in zip(after, shown, strict=True)),
            )
        )
    return found


def _shown(counts: Floats, *, minimum: int) -> list[bool]:
    """Which labels may be shown; the hidden ones, whose sum may be known, have no rows or at least ``minimum``."""
    shown = (counts == 0) | (counts >= minimum)
    while 0 < counts[~shown].sum() < minimum and (counts[shown] > 0).any():
        shown[np.flatnonzero(shown & (counts > 0))[np.argmin(counts[shown & (counts > 0)])]] = False
    return [bool(show) for show in shown]


def _bins(cells: Floats, column: Column, *, most: int = MOST_BINS) -> list[NDArray[np.int64]]:
    """Cells of a histogram grouped for a comparison: levels as they are, numbers into bins of about equal share.

    The last bin is that of the missing rows.
    """
    present = np.asarray(cells[:-1], dtype=np.float64)
    if is_coded(column) or len(present) <= most or not present.sum():
        return [np.array([cell]) for cell in range(len(cells))]
    middle = (np.cumsum(present) - present / 2) / present.sum()
    bins = np.minimum((middle * most).astype(np.int64), most - 1)
    return [np.flatnonzero(bins == number) for number in np.unique(bins)] + [np.array([len(present)])]


def _binned(cells: Any, bins: Sequence[NDArray[np.int64]]) -> Floats:
    return np.array([cells[members].sum() for members in bins], dtype=np.float64)


def _labels(column: Column, bins: Sequence[NDArray[np.int64]]) -> list[str]:
    if is_coded(column):
        return [*coded_levels(column), MISSING]
    edges = cell_edges(column)
    return [_range(edges[members[0]], edges[members[-1] + 1], column) for members in bins[:-1]] + [MISSING]


def _range(low: float, high: float, column: Column) -> str:
    """The values of a bin, whose edges lie half a rounding step outside them."""
    low, high = max(low + column.step / 2, column.low), min(high - column.step / 2, column.high)
    first, last = (_value(value, column) for value in (low, high))
    return first if first == last else f"{first} to {last}"


def _value(value: float, column: Column) -> str:
    if column.kind == "date":
        return str(np.datetime64(round(value), "D"))
    return f"{value:.{column.decimals}f}" if column.decimals is not None else f"{value:.4g}"

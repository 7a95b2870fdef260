"""How close generated rows are to real ones within each group: a generator can match a table and lose its small groups.

Every measure of :mod:`mcrage.evaluation.fidelity` stands beside what real training rows of the same group reach, at the
same number of rows. At a few hundred rows that ceiling lies far below 1, so the measures of a small group say something
only next to it; where rows are too few even for that, a measure is absent with a reason.

Columns that define the groups are the same in all rows of one, and are left out of its measures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import Group, GroupCounts, group_codes, level_code
from mcrage.data.schema import TableSchema
from mcrage.evaluation import fidelity

MEASURES = ("one_way", "all_pairs", "detection", "tstr")
FEWEST_ROWS = 100
"""Rows of each side below which joint tables of ten bins are noise."""
FEWEST_TO_TELL_APART = 200
"""Rows of each side for detection: the standard error of an AUROC of .5 is then .03 (Hanley and McNeil, 1982)."""
FEWEST_OF_A_LABEL = 30
"""Rows with and without the event, to train on and to test on, for TSTR: a standard error of about .05."""


@dataclass(frozen=True, kw_only=True)
class GroupFidelity:
    """The measures of one group.

    Attributes:
        group: The group.
        rows: Rows of each side in ``one_way``, ``all_pairs`` and ``detection``: an exact count, not to be released.
        synthetic: Generated rows against held-out ones, by measure.
        real: Training rows against the same held-out ones: what a perfect generator would reach.
        absent: Why a measure is in neither of them.
    """

    group: Group
    rows: int
    synthetic: Mapping[str, float] = field(default_factory=dict)
    real: Mapping[str, float] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)


def fidelity_by_group(
    synthetic: pd.DataFrame,
    train: pd.DataFrame,
    held_out: pd.DataFrame,
    schema: TableSchema,
    *,
    by: Sequence[str],
    generator: np.random.Generator,
    most_rows: int = 4000,
) -> list[GroupFidelity]:
    """The measures within every group that occurs among the held-out rows.

    Args:
        synthetic: Generated rows, of as many groups as there are.
        train: The rows that the generator has seen.
        held_out: Real rows that it has not seen.
        schema: The data dictionary.
        by: Sensitive features, and the label if wanted, whose intersections are the groups. TSTR needs the label
            open: it is absent in groups of one label.
        generator: Draws which rows of a larger group are taken.
        most_rows: Most rows of each side.
    """
    columns = tuple(schema.column(name) for name in by)
    fixed = {column.name for column in columns if not column.is_numeric}  # a bin of a number still holds many numbers
    within = schema.model_copy(update={"columns": tuple(c for c in schema.columns if c.name not in fixed)})
    tables = [table.iloc[generator.permutation(len(table))] for table in (synthetic, train, held_out)]
    codes = [group_codes(table, columns) for table in tables]
    results = []
    for group in GroupCounts.of(held_out, columns):
        wanted = np.array([level_code(column, level) for column, (_, level) in zip(columns, group.levels, strict=True)])
        members = [table[(code == wanted).all(axis=1)] for table, code in zip(tables, codes, strict=True)]
        results.append(_of_group(group, members, within, generator=generator, most_rows=most_rows))
    return results


def _of_group(
    group: Group, members: list[pd.DataFrame], schema: TableSchema, *, generator: np.random.Generator, most_rows: int
) -> GroupFidelity:
    """The measures of one group from its synthetic, training and held-out rows, in random order."""
    size = min(most_rows, *map(len, members))
    made, known, new = (rows.iloc[:size] for rows in members)
    synthetic: dict[str, float] = {}
    real: dict[str, float] = {}
    absent = _too_few(members, schema, most_rows)
    for values, rows in ((synthetic, made), (real, known)):
        if "one_way" not in absent:
            values["one_way"] = fidelity.one_way(new, rows, schema)
            values["all_pairs"] = fidelity.all_pairs(new, rows, schema)
        if "detection" not in absent:
            values["detection"] = fidelity.detection(new, rows, schema, generator=generator)
    if "tstr" not in absent:
        made, known, new = _trained_and_tested(members, most_rows)
        synthetic["tstr"] = fidelity.train_synthetic_test_real(made, new, schema)
        real["tstr"] = fidelity.train_synthetic_test_real(known, new, schema)
    return GroupFidelity(group=group, rows=size, synthetic=synthetic, real=real, absent=absent)


def _trained_and_tested(members: list[pd.DataFrame], most_rows: int) -> list[pd.DataFrame]:
    """Synthetic and training rows of equal number to train on, and all held-out rows to test on."""
    size = min(most_rows, len(members[0]), len(members[1]))
    return [members[0].iloc[:size], members[1].iloc[:size], members[2]]


def _too_few(members: list[pd.DataFrame], schema: TableSchema, most_rows: int) -> dict[str, str]:
    """Measures that these rows are too few for, with the reason."""
    counts = dict(zip(("synthetic", "training", "held-out"), map(len, members), strict=True))
    least = min(counts, key=lambda name: counts[name])
    needed = dict.fromkeys(MEASURES, FEWEST_ROWS) | {"detection": FEWEST_TO_TELL_APART}
    absent = {
        measure: f"fewer than {fewest} {least} rows" for measure, fewest in needed.items() if counts[least] < fewest
    }
    if not schema.has_target:
        return absent | {"tstr": "all rows of the group have one label, or the table has none"}
    for name, rows in zip(counts, _trained_and_tested(members, most_rows), strict=True):
        if _label_counts(rows, schema).min() < FEWEST_OF_A_LABEL:
            absent.setdefault("tstr", f"fewer than {FEWEST_OF_A_LABEL} {name} rows of the rarer label")
    return absent


def _label_counts(rows: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
    codes = group_codes(rows, (schema.target,))[:, 0]
    return np.bincount(codes, minlength=2).astype(np.int64)

"""Rows that break the schema's rules: how many there are in a table, and what becomes of generated ones.

A generated row that breaks a rule is drawn anew at most :data:`REDRAWS` times, which keeps the model's distribution of
rows that follow the rules. What is left then is repaired in one pass: levels change in as few columns as possible,
numbers move as little as the higher one has to rise, and a number that has to be there gets the column's median. What
rows were asked for never changes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.column import MISSING, Column
from mcrage.data.groups import bin_range, level_codes, numbers
from mcrage.data.problems import problem
from mcrage.data.rules import (
    THERE,
    Comparison,
    Floats,
    Implications,
    Rule,
    orders,
    rounded,
    rounded_down,
    rounded_up,
    states,
    tighten,
)
from mcrage.data.schema import TableSchema
from mcrage.data.series import level_series, numeric_series
from mcrage.errors import Problem, SamplingError

REDRAWS = 3
"""How often generated rows that break a rule are drawn anew before they are repaired."""

Booleans = NDArray[np.bool_]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Repairs:
    """What rules did to generated rows.

    Attributes:
        rows: Number of rows generated.
        redrawn: Rows that broke a rule when they were first drawn, by rule.
        repaired: Rows that broke it after the last draw and were repaired, by rule.
    """

    rows: int = 0
    redrawn: Mapping[str, int] = field(default_factory=dict)
    repaired: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: "Repairs") -> "Repairs":
        redrawn, repaired = (
            {rule: a.get(rule, 0) + b.get(rule, 0) for rule in {**a, **b}}
            for a, b in ((self.redrawn, other.redrawn), (self.repaired, other.repaired))
        )
        return Repairs(self.rows + other.rows, redrawn, repaired)

    @property
    def lines(self) -> list[str]:
        """The same in words, a line per rule that was broken."""
        return [
            f'rule "{rule}": {count:,} of {self.rows:,} generated rows broke it; {self.repaired[rule]:,} were '
            "repaired, the others drawn anew"
            for rule, count in self.redrawn.items()
            if count or self.repaired[rule]
        ]


NO_REPAIRS = Repairs()
"""What a schema without rules does to rows."""


def broken_rows(table: pd.DataFrame, schema: TableSchema) -> dict[str, Booleans]:
    """Which rows break each rule, by the rule's text; shape (rows,)."""
    return {str(rule): _breaks(rule, table, schema) for rule in schema.row_rules}


def rule_problems(table: pd.DataFrame, schema: TableSchema) -> list[Problem]:
    """A problem for every rule that rows of a table break."""
    rows = {rule: int(broken.sum()) for rule, broken in broken_rows(table, schema).items()}
    return [problem("E601", rows=n, total=len(table), broken=rule) for rule, n in rows.items() if n]


def forbidden(asked: Codes, schema: TableSchema) -> Booleans:
    """Which rows cannot follow the rules whatever the open columns are; shape (rows,).

    Comparisons count through columns in between even where those could be missing.

    Args:
        asked: Group level of each of the schema's attributes, −1 where open; shape (rows, attributes).
        schema: The data dictionary.
    """
    distinct, inverse = np.unique(asked, axis=0, return_inverse=True)
    columns = {column.name: column for column in schema.modelled}
    implications = Implications(columns, schema.row_rules)
    names = {name: THERE for name in _compared(schema)}
    low, high = _asked_bounds(distinct, schema, {name: np.zeros(len(distinct)) for name in names})
    tighten(low, high, orders(columns, schema.row_rules))
    bad = np.zeros(len(distinct), dtype=bool)
    for name in names:
        bad |= low[name] > high[name]
    for row, codes in enumerate(distinct):
        given = {name: state for name, state in _given(codes, schema).items() if name in implications.columns}
        bad[row] |= not implications.possible(given)
    return np.asarray(bad[inverse.ravel()])


def refuse_forbidden(asked: Codes, schema: TableSchema) -> None:
    """Raises where rows are asked for that no rule would let be.

    Raises:
        SamplingError: With a line per combination of levels.
    """
    if not schema.rules:
        return
    bad = np.unique(asked[forbidden(asked, schema)], axis=0)
    lines = []
    for codes in bad:
        levels = [
            (column.name, column.group_levels[code])
            for column, code in zip(schema.attributes, codes, strict=True)
            if code >= 0
        ]
        about = [str(rule) for rule in schema.row_rules if {*rule.columns} & {name for name, _ in levels}]
        wanted = ", ".join(f"{name}={level}" for name, level in levels)
        lines.append(f"no row with {wanted} can follow the schema's rules ({'; '.join(about)}): ask for other levels")
    if lines:
        raise SamplingError("\n".join(lines))


def follow_rules(
    table: pd.DataFrame, schema: TableSchema, asked: Codes, redraw: Callable[[Codes], pd.DataFrame]
) -> tuple[pd.DataFrame, Repairs]:
    """Generated rows that follow every rule, and what it took.

    Args:
        table: Generated rows with the schema's modelled columns, numbered from 0.
        schema: The data dictionary.
        asked: Group level of each of the schema's attributes, −1 where open; shape (rows, attributes). No row of it
            may be :func:`forbidden`.
        redraw: Draws rows of these numbers anew.
    """
    if not schema.rules:
        return table, Repairs(len(table))
    broken = broken_rows(table, schema)
    redrawn = _count(broken)
    for _ in range(REDRAWS):
        if (rows := _any(broken)).size:
            table = _replaced(table, rows, redraw(rows))
            broken = broken_rows(table, schema)
    if (rows := _any(broken)).size:
        repaired = _repaired(table.iloc[rows].reset_index(drop=True), schema, asked[rows], sampled=table)
        table = _replaced(table, rows, repaired)
    return table, Repairs(len(table), redrawn, _count(broken))


def _any(broken: Mapping[str, Booleans]) -> Codes:
    """Numbers of the rows that break a rule."""
    return np.flatnonzero(np.any([*broken.values()], axis=0))


def _count(broken: Mapping[str, Booleans]) -> dict[str, int]:
    return {rule: int(rows.sum()) for rule, rows in broken.items()}


def _replaced(table: pd.DataFrame, rows: Codes, by: pd.DataFrame) -> pd.DataFrame:
    kept = table.drop(index=rows)
    return pd.concat([kept, by.set_axis(rows)]).sort_index() if len(kept) else by.set_axis(rows)


def _breaks(rule: Rule, table: pd.DataFrame, schema: TableSchema) -> Booleans:
    first, second = (schema.column(name) for name in rule.columns)
    if isinstance(rule, Comparison):
        low, high = (numbers(table[column.name], column) for column in (first, second))
        if "float32" in {str(table[name].dtype).lower() for name in rule.columns}:
            low, high = (values.astype(np.float32).astype(np.float64) for values in (low, high))  # .1 differs there
        return np.asarray(low >= high if rule.is_strict else low > high)
    starts, then = (_states(table[column.name], column) for column in (first, second))
    allowed = np.array([rule.allows(state) for state in (*_present(second), MISSING)])
    return np.asarray((starts == _present(first).index(rule.level)) & ~allowed[then])


def _present(column: Column) -> tuple[str, ...]:
    return (THERE,) if column.is_numeric else column.levels


def _states(values: pd.Series, column: Column) -> Codes:
    """Place of each row's state among those of :func:`_present`, and then *missing*."""
    if column.is_numeric:
        return values.isna().to_numpy().astype(np.int64)
    return level_codes(values, column, len(column.levels))


def _compared(schema: TableSchema) -> list[str]:
    """Columns that comparisons are about."""
    rules = [rule for rule in schema.row_rules if isinstance(rule, Comparison)]
    return list(dict.fromkeys(name for rule in rules for name in rule.columns))


def _given(codes: Codes, schema: TableSchema) -> dict[str, str]:
    """What a row was asked to be, as states of implications."""
    given = {}
    for column, code in zip(schema.attributes, codes, strict=True):
        if code >= 0:
            level = column.group_levels[code]
            given[column.name] = THERE if column.is_numeric and level != MISSING else level
    return given


def _asked_bounds(
    asked: Codes, schema: TableSchema, values: Mapping[str, Floats]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Bounds of each column row by row: the schema's, or those of the bin asked for; NaN where a value is missing."""
    low, high = {}, {}
    places = {column.name: place for place, column in enumerate(schema.attributes)}
    for name, present in values.items():
        column = schema.column(name)
        ends = np.tile([[column.low], [column.high]], len(present))
        codes = asked[:, places[name]] if name in places else np.full(len(present), -1)
        for code in np.unique(codes[codes >= 0]):
            is_missing = column.group_levels[code] == MISSING
            ends[:, codes == code] = np.nan if is_missing else np.array([bin_range(column, int(code))]).T
        ends[:, np.isnan(present)] = np.nan
        low[name], high[name] = rounded_up(ends[0], column), rounded_down(ends[1], column)
    return low, high


def _repaired(part: pd.DataFrame, schema: TableSchema, asked: Codes, *, sampled: pd.DataFrame) -> pd.DataFrame:
    """The rows of ``part`` changed until they follow every rule; ``sampled`` tells what is common."""
    columns = {column.name: column for column in schema.modelled}
    part = _with_states(part, schema, asked, sampled=sampled)
    steps = orders(columns, schema.row_rules)
    values = {name: numbers(part[name], columns[name]) for name in _compared(schema)}
    low, high = _asked_bounds(asked, schema, values)
    tighten(low, high, steps)
    moved = {name: np.clip(rounded(values[name], columns[name]), low[name], high[name]) for name in values}
    for order in steps:
        raised = np.fmax(moved[order.high.name], order.least_high(moved[order.low.name]))
        moved[order.high.name] = np.where(np.isnan(moved[order.high.name]), np.nan, raised)
    return part.assign(**{name: numeric_series(moved[name], np.isnan(moved[name]), columns[name]) for name in moved})


def _with_states(part: pd.DataFrame, schema: TableSchema, asked: Codes, *, sampled: pd.DataFrame) -> pd.DataFrame:
    """The rows with the levels, and with numbers there or missing, that implications want."""
    by_name = {column.name: column for column in schema.modelled}
    columns = Implications(by_name, schema.row_rules).columns
    if not columns:
        return part
    common = {name: _by_frequency(sampled[name], column) for name, column in columns.items()}
    implications = Implications(by_name, schema.row_rules, preferred=common)
    before = np.stack([_states(part[name], column) for name, column in columns.items()], axis=1)
    kinds, first, inverse = np.unique(np.hstack([before, asked]), axis=0, return_index=True, return_inverse=True)
    texts = {name: (*_present(column), MISSING) for name, column in columns.items()}
    after = np.zeros((len(kinds), len(columns)), dtype=np.int64)
    for kind, row in enumerate(first):
        state = {name: text[code] for (name, text), code in zip(texts.items(), before[row], strict=True)}
        fixed = frozenset(_given(asked[row], schema)) & columns.keys()
        found = implications.nearest(state, fixed)
        if found is None:
            rules = "; ".join(map(str, implications.rules))
            raise SamplingError(
                f"no repair of a generated row was found that follows all of {rules}: simplify the rules"
            )
        after[kind] = [text.index(found[name]) for name, text in texts.items()]
    changed = after[inverse.ravel()]
    places = [place for place in range(len(columns)) if (changed[:, place] != before[:, place]).any()]
    names = [*columns]
    return part.assign(
        **{
            names[place]: _in_state(part[names[place]], changed[:, place], columns[names[place]], sampled)
            for place in places
        }
    )


def _in_state(values: pd.Series, states_: Codes, column: Column, sampled: pd.DataFrame) -> pd.Series:
    """A column with these levels, or with a number in the rows where there has to be one."""
    is_missing = states_ == len(_present(column))
    if not column.is_numeric:
        return level_series(states_, is_missing, column)
    there = numbers(sampled[column.name], column)
    usual = np.nanmedian(there) if not np.isnan(there).all() else (column.low + column.high) / 2
    filled = np.nan_to_num(numbers(values, column), nan=float(rounded_down(np.array([usual]), column)[0]))
    return numeric_series(filled, is_missing, column)


def _by_frequency(values: pd.Series, column: Column) -> list[str]:
    """States of a column, the most frequent first."""
    counts = np.bincount(_states(values, column), minlength=len(states(column)))
    return [states(column)[place] for place in np.argsort(-counts, kind="stable")]

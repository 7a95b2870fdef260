"""Rules that every row of a table follows, one line of text each, as part of the data dictionary::

    discharge >= admission
    if pregnant = yes then sex = F
    if outcome = 'still in hospital' then discharge is missing
    if stage = III then therapy = surgery or chemotherapy

A comparison is about two numbers or two dates, of the same kind, with ``<``, ``<=``, ``>=`` or ``>``. An implication
starts from one level of a column; the other column then has one of some levels, ``is missing`` or ``is not missing``.
A value that is missing breaks no rule, except where the rule itself is about missing. Names and levels with spaces,
quotes or any of ``= < >`` stand in single quotes, a quote inside twice.

Whether rules can be followed at all is checked here, when the schema is parsed; :mod:`mcrage.data.repair` finds and
repairs rows that break them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

import numpy as np
from numpy.typing import NDArray

from mcrage.data.column import MISSING, Column

Floats = NDArray[np.float64]

THERE = "there"
"""How implications call a number that is not missing."""

_NAME = r"(?:'(?:[^']|'')+'|[^\s'=<>]+)"
_COMPARISON = re.compile(rf"({_NAME})\s*(<=|>=|<|>)\s*({_NAME})")
_IMPLICATION = re.compile(
    rf"if\s+({_NAME})\s*=\s*({_NAME})\s+then\s+({_NAME})"
    rf"(?:\s*=\s*({_NAME}(?:\s+or\s+{_NAME})*)|\s+is\s+(not\s+)?missing)"
)
_BARE = re.compile(r"[^\s'=<>]+")
_MOST_STEPS = 5_000  # of the search for a row that follows all rules: entangled rules must not hang anything


@dataclass(frozen=True)
class Comparison:
    """Two numbers or dates in order, unless one of them is missing."""

    left: str
    operator: str
    right: str

    @property
    def columns(self) -> tuple[str, str]:
        """The column that is lower, and the one that is higher."""
        return (self.left, self.right) if self.operator.startswith("<") else (self.right, self.left)

    @property
    def is_strict(self) -> bool:
        """Whether the two must differ."""
        return len(self.operator) == 1

    def __str__(self) -> str:
        return f"{_quoted(self.left)} {self.operator} {_quoted(self.right)}"


@dataclass(frozen=True)
class Implication:
    """What a level of one column says about another column.

    Attributes:
        column: The column that it starts from.
        level: Its level.
        then: The other column.
        levels: Levels that it may have; empty if the rule is about missing.
        is_missing: Whether it is missing, for a rule about missing; else None.
    """

    column: str
    level: str
    then: str
    levels: tuple[str, ...] = ()
    is_missing: bool | None = None

    @property
    def columns(self) -> tuple[str, str]:
        """The column that it starts from, and the other."""
        return self.column, self.then

    def allows(self, state: str) -> bool:
        """Whether the other column may be in this state: a level, *there* or *missing*."""
        if self.is_missing is not None:
            return (state == MISSING) == self.is_missing
        return state == MISSING or state in self.levels

    def __str__(self) -> str:
        start = f"if {_quoted(self.column)} = {_quoted(self.level)} then {_quoted(self.then)}"
        if self.is_missing is not None:
            return f"{start} is missing" if self.is_missing else f"{start} is not missing"
        return f"{start} = {' or '.join(map(_quoted, self.levels))}"


Rule = Comparison | Implication


def parse_rule(text: str) -> Rule:
    """The rule of a line of text.

    Raises:
        ValueError: If it is not one, with what one looks like.
    """
    line = text.strip()
    if found := _IMPLICATION.fullmatch(line):
        column, level, then, levels, negation = found.groups()
        if levels is None:
            return Implication(_plain(column), _plain(level), _plain(then), is_missing=negation is None)
        allowed = tuple(_plain(name) for name in re.findall(_NAME, levels)[::2])
        return Implication(_plain(column), _plain(level), _plain(then), allowed)
    if found := _COMPARISON.fullmatch(line):
        left, operator, right = found.groups()
        return Comparison(_plain(left), operator, _plain(right))
    raise ValueError(
        f'\'{line}\' is no rule: write one like "discharge >= admission" or "if pregnant = yes then sex = F", '
        "names and levels with spaces or signs in single quotes"
    )


@dataclass(frozen=True)
class Order:
    """A comparison of two columns of a schema, for values on their grids.

    Attributes:
        low, high: The columns.
        is_strict: Whether values must differ.
    """

    low: Column
    high: Column
    is_strict: bool

    @cached_property
    def gap(self) -> float:
        """How far apart values are at least: one step of the finer column, or what a float32 can still tell apart."""
        if not self.is_strict:
            return 0.0
        if self.low.step and self.high.step:
            return min(self.low.step, self.high.step)
        unrounded = [column for column in (self.low, self.high) if not column.step]
        return max(max(1e-6 * (c.high - c.low), 5e-7 * max(abs(c.low), abs(c.high))) for c in unrounded)

    def least_high(self, low: Floats) -> Floats:
        """Smallest values of the higher column for values of the lower one."""
        return rounded_up(self._moved(low, self.gap), self.high)

    def largest_low(self, high: Floats) -> Floats:
        """Largest values of the lower column for values of the higher one."""
        return rounded_down(self._moved(high, -self.gap), self.low)

    def _moved(self, values: Floats, by: float) -> Floats:
        if not (self.low.step and self.high.step):
            return values + by
        return rounded(values + by, min(self.low, self.high, key=lambda column: column.step))


def rounded(values: Floats, column: Column) -> Floats:
    """Values as the column keeps them: the same numbers as those of decoded rows."""
    return np.round(values, column.decimals or 0) if column.step else values


def rounded_up(values: Floats, column: Column) -> Floats:
    """The smallest numbers that the column keeps and that are not below values."""
    near = rounded(values, column)
    return np.where(near < values, rounded(near + column.step, column), near)


def rounded_down(values: Floats, column: Column) -> Floats:
    """The largest numbers that the column keeps and that are not above values."""
    return -rounded_up(-values, column)


def orders(columns: Mapping[str, Column], rules: Sequence[Rule]) -> list[Order]:
    """All comparisons, from the lowest columns to the highest.

    Raises:
        CycleError: If they go round in a circle.
    """
    comparisons = [rule for rule in rules if isinstance(rule, Comparison)]
    sorter = TopologicalSorter[str]()
    for rule in comparisons:
        sorter.add(rule.columns[1], rule.columns[0])
    place = {name: position for position, name in enumerate(sorter.static_order())}
    comparisons.sort(key=lambda rule: place[rule.columns[0]])
    return [Order(columns[rule.columns[0]], columns[rule.columns[1]], rule.is_strict) for rule in comparisons]


def tighten(low: dict[str, Floats], high: dict[str, Floats], steps: Sequence[Order]) -> None:
    """Moves bounds of columns, row by row and in place, to what comparisons leave; NaN where a value is missing.

    Args:
        low, high: Bounds by column name; no value fits where the lower one ends above the higher one.
        steps: Comparisons from :func:`orders`.
    """
    for order in steps:
        raised = np.fmax(low[order.high.name], order.least_high(low[order.low.name]))
        low[order.high.name] = np.where(np.isnan(low[order.high.name]), np.nan, raised)
    for order in reversed(steps):
        lowered = np.fmin(high[order.low.name], order.largest_low(high[order.high.name]))
        high[order.low.name] = np.where(np.isnan(high[order.low.name]), np.nan, lowered)


def states(column: Column) -> tuple[str, ...]:
    """What implications can say about a column: its levels, or *there* for a number, and *missing*."""
    return (*((THERE,) if column.is_numeric else column.levels), *((MISSING,) if column.nullable else ()))


class Implications:
    """All implications of a schema together.

    Args:
        columns: Columns by name.
        rules: All rules; comparisons are left out.
        states: For each column its states from the most preferred one on, where not every one will do.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        rules: Sequence[Rule],
        *,
        preferred: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.rules = [rule for rule in rules if isinstance(rule, Implication)]
        self.columns = {name: columns[name] for rule in self.rules for name in rule.columns}
        self._choices = {
            name: self._distinct(name, (preferred or {}).get(name) or states(column))
            for name, column in self.columns.items()
        }
        self._steps = 0

    def nearest(self, row: Mapping[str, str], fixed: frozenset[str]) -> dict[str, str] | None:
        """The row with as few columns changed as possible so that it follows every rule.

        Where either column of a rule could change, a plain feature does before a sensitive one, that before the
        target, and the column that the rule ends with before the one that it starts from.

        Args:
            row: State of every column of the rules.
            fixed: Columns that must stay.

        Returns:
            None if there is no such row, or none was found in a bounded search.
        """
        self._steps = 0
        free = len(self.columns.keys() - fixed)
        for changes in range(free + 1):
            if (found := self._search(dict(row), fixed, changes)) is not None:
                return found
        return None

    def possible(self, given: Mapping[str, str]) -> bool:
        """Whether a row with these states can follow every rule."""
        start = {name: choices[0] for name, choices in self._choices.items()}
        return self.nearest({**start, **given}, frozenset(given)) is not None

    def _search(self, row: dict[str, str], fixed: frozenset[str], changes: int) -> dict[str, str] | None:
        self._steps += 1
        broken = next((r for r in self.rules if row[r.column] == r.level and not r.allows(row[r.then])), None)
        if broken is None:
            return row
        if not changes or self._steps > _MOST_STEPS:
            return None
        moves = {
            broken.then: [state for state in self._choices[broken.then] if broken.allows(state)],
            broken.column: [state for state in self._choices[broken.column] if state != broken.level],
        }
        for name in sorted(moves.keys() - fixed, key=lambda name: (self._rank(name), name != broken.then)):
            for state in moves[name]:
                found = self._search(row | {name: state}, fixed | {name}, changes - 1)
                if found is not None:
                    return found
        return None

    def _rank(self, name: str) -> int:
        return {"sensitive": 1, "target": 2}.get(self.columns[name].role, 0)

    def _distinct(self, name: str, ranked: Sequence[str]) -> list[str]:
        """The most preferred state of each kind that the rules treat alike: a thousand levels are then only a few."""
        kinds: dict[tuple[bool, ...], str] = {}
        for state in ranked:
            says = [state == rule.level for rule in self.rules if rule.column == name]
            says += [rule.allows(state) for rule in self.rules if rule.then == name]
            kinds.setdefault(tuple(says), state)
        return list(kinds.values())


def rule_problems(columns: Mapping[str, Column], rules: Sequence[Rule]) -> list[str]:
    """Why these rules cannot be followed in a table of these columns, a line each; empty if they can."""
    problems = [f'rule "{rule}": {words}' for rule in rules if (words := _misfit(columns, rule))]
    problems += [f'rule "{rule}" is there twice' for rule in dict.fromkeys(rules) if list(rules).count(rule) > 1]
    return problems or _contradictions(columns, rules)


def _misfit(columns: Mapping[str, Column], rule: Rule) -> str:
    """What is wrong with one rule by itself."""
    unknown = [name for name in rule.columns if name not in columns]
    if unknown:
        return f"there is no column '{unknown[0]}'"
    first, second = (columns[name] for name in rule.columns)
    if first.name == second.name:
        return f"it speaks of column '{first.name}' alone"
    if unmodelled := [column for column in (first, second) if not column.is_modelled]:
        return f"column '{unmodelled[0].name}' has role '{unmodelled[0].role}' and is not generated"
    return _uncompared(first, second) if isinstance(rule, Comparison) else _unfit_levels(first, second, rule)


def _uncompared(low: Column, high: Column) -> str:
    if plain := [column for column in (low, high) if not column.is_numeric]:
        return f"column '{plain[0].name}' has kind '{plain[0].kind}'; only numbers and dates are compared"
    return f"kinds '{low.kind}' and '{high.kind}' cannot be compared" if low.kind != high.kind else ""


def _unfit_levels(column: Column, then: Column, rule: Implication) -> str:
    if column.is_numeric:
        return f"it starts from column '{column.name}' of kind '{column.kind}', which has no levels"
    named = [(column, rule.level), *((then, level) for level in rule.levels)]
    for of, level in named:
        if of.is_numeric:
            return f"column '{of.name}' has kind '{of.kind}': say only that it 'is missing' or 'is not missing'"
        if level not in of.levels:
            return f"column '{of.name}' has no level '{level}'; it has {', '.join(of.levels)}"
    if rule.is_missing and not then.nullable:
        return f"column '{then.name}' is never missing"
    return ""


def _contradictions(columns: Mapping[str, Column], rules: Sequence[Rule]) -> list[str]:
    """What rules that are fine one by one cannot mean together."""
    try:
        steps = orders(columns, rules)
    except CycleError as error:
        return [f"rules compare columns in a circle: {', '.join(dict.fromkeys(error.args[1]))}"]
    involved = {column.name: column for order in steps for column in (order.low, order.high)}
    low = {name: rounded_up(np.array([column.low]), column) for name, column in involved.items()}
    high = {name: rounded_down(np.array([column.high]), column) for name, column in involved.items()}
    tighten(low, high, steps)
    problems = [
        f"rules leave no value between minimum and maximum of column '{name}'"
        for name in involved
        if low[name][0] > high[name][0]
    ]
    implications = Implications(columns, rules)
    starts = dict.fromkeys((rule.column, rule.level) for rule in implications.rules)
    problems += [
        f"rules leave no row with {_quoted(name)} = {_quoted(level)}: they contradict each other"
        for name, level in starts
        if not implications.possible({name: level})
    ]
    return problems


def _plain(name: str) -> str:
    return name[1:-1].replace("''", "'") if name.startswith("'") else name


def _quoted(name: str) -> str:
    return name if _BARE.fullmatch(name) else "'" + name.replace("'", "''") + "'"

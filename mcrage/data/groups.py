"""Groups of patients: intersections of sensitive features (and the label), and how many rows each has.

Shape: a table of n rows and a schema with A attributes (sensitive features, then the target) gives codes of shape
(n, A); code c of attribute a means ``schema.attributes[a].group_levels[c]``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.schema import MISSING, Column
from mcrage.errors import SamplingError

MINIMUM_CELL = 11
"""Smallest count that may be shown: no cell of 1 to 10 patients (CMS cell size suppression policy)."""


@dataclass(frozen=True)
class Group:
    """An intersection of attribute levels, such as race=Black, sex=F.

    Attributes:
        levels: Pairs of attribute and level, in the order of the schema's attributes.
    """

    levels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, **levels: str) -> "Group":
        """A group from keyword arguments: ``Group.of(race="Black", sex="F")``."""
        return cls(tuple(levels.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name}={level}" for name, level in self.levels) or "all"

    def as_dict(self) -> dict[str, str]:
        """Levels by attribute, as conditions for sampling."""
        return dict(self.levels)

    def without(self, name: str) -> "Group":
        """The same group with one attribute left open."""
        return Group(tuple(pair for pair in self.levels if pair[0] != name))


class GroupCounts(Mapping[Group, int]):
    """Rows per group. A group that is not listed has no rows that may be shown.

    Attributes:
        suppressed: Groups whose count is between 1 and the smallest count that may be shown; their number of rows is
            not in here at all.
    """

    def __init__(self, counts: Mapping[Group, int], *, suppressed: Iterable[Group] = ()) -> None:
        self._counts = {group: int(count) for group, count in counts.items() if count > 0}
        self.suppressed = frozenset(suppressed)

    @classmethod
    def of(cls, table: pd.DataFrame, columns: tuple[Column, ...]) -> "GroupCounts":
        """Exact counts of every intersection of ``columns`` that occurs in a table."""
        codes = group_codes(table, columns)
        rows, counts = np.unique(codes, axis=0, return_counts=True)
        return cls({_group(row, columns): int(count) for row, count in zip(rows, counts, strict=True)})

    def suppress(self, minimum: int = MINIMUM_CELL) -> "GroupCounts":
        """The same counts with every count from 1 to ``minimum`` − 1 taken out and its group listed as suppressed."""
        small = [group for group, count in self._counts.items() if count < minimum]
        return GroupCounts(
            {group: count for group, count in self._counts.items() if count >= minimum},
            suppressed=[*self.suppressed, *small],
        )

    def without(self, name: str) -> "GroupCounts":
        """Counts with one attribute summed out, such as the label."""
        totals: dict[Group, int] = {}
        for group, count in self._counts.items():
            totals[group.without(name)] = totals.get(group.without(name), 0) + count
        return GroupCounts(totals, suppressed=(group.without(name) for group in self.suppressed))

    def __add__(self, other: "GroupCounts") -> "GroupCounts":
        groups = dict.fromkeys([*self, *other])
        totals = {group: self.get(group, 0) + other.get(group, 0) for group in groups}
        return GroupCounts(totals, suppressed=self.suppressed | other.suppressed)

    def __getitem__(self, group: Group) -> int:
        return self._counts[group]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        return f"GroupCounts({ {str(group): count for group, count in self._counts.items()} })"


def group_codes(table: pd.DataFrame, columns: tuple[Column, ...]) -> NDArray[np.int64]:
    """Code of each row's level, by column; shape (rows, columns).

    A cell that is missing or that no level covers gets the code of *missing* where the column is nullable, −1 where
    it is not.
    """
    parts = [_codes(table[column.name], column) for column in columns]
    return np.stack(parts, axis=1) if parts else np.zeros((len(table), 0), dtype=np.int64)


def group_labels(table: pd.DataFrame, columns: tuple[Column, ...]) -> pd.DataFrame:
    """The level of each row as text, by column, on the table's index."""
    codes = group_codes(table, columns)
    named = {
        column.name: np.array([*column.group_levels, MISSING], dtype=object)[codes[:, position]]
        for position, column in enumerate(columns)
    }
    return pd.DataFrame(named, index=table.index)


def level_code(column: Column, level: object) -> int:
    """Code of one level that a person asked for: its name, or for a numeric column a value within the bin.

    Raises:
        SamplingError: If the column has no such level; the message lists those that it has.
    """
    levels = column.group_levels
    text = str(level)
    if text in levels:
        return levels.index(text)
    if column.kind == "boolean" and isinstance(level, bool | np.bool_ | int | np.integer):
        return int(bool(level))
    if column.is_numeric and isinstance(level, int | float | np.integer | np.floating):
        return int(np.searchsorted(np.asarray(column.bins), float(level), side="right"))
    raise SamplingError(f"column '{column.name}' has no level {text!r}; it has {', '.join(levels)}")


def bin_range(column: Column, code: int) -> tuple[float, float]:
    """Smallest and largest value of a bin."""
    edges = [column.low, *column.bins, column.high]
    low, high = edges[code], edges[code + 1]
    inner = high - (column.step or 1e-9 * (column.high - column.low))
    return low, high if code == len(column.bins) else max(low, inner)


def numbers(values: pd.Series, column: Column) -> NDArray[np.float64]:
    """A numeric column as float64 with NaN for missing; dates as days since 1970-01-01."""
    if column.kind == "date":
        days = pd.to_datetime(values).to_numpy(dtype="datetime64[D]")
        return np.where(np.isnat(days), np.nan, days.astype("int64").astype(np.float64))
    return pd.to_numeric(values).to_numpy(dtype=np.float64, na_value=np.nan)


def _codes(values: pd.Series, column: Column) -> NDArray[np.int64]:
    missing_code = len(column.group_levels) - 1 if column.nullable else -1
    if column.is_numeric:
        floats = numbers(values, column)
        codes = np.searchsorted(np.asarray(column.bins), np.nan_to_num(floats), side="right")
        return np.where(np.isnan(floats), missing_code, codes).astype(np.int64)
    return level_codes(values, column, missing_code)


def level_codes(values: pd.Series, column: Column, missing_code: int) -> NDArray[np.int64]:
    """Codes of a column that is not numeric: its level, the catch-all level for unseen values, or ``missing_code``."""
    lookup = {level: code for code, level in enumerate(column.levels)}
    if column.kind == "boolean":
        lookup = {"False": 0, "True": 1, "0": 0, "1": 1} | lookup
    unseen = lookup[column.other] if column.other is not None else missing_code
    if values.dtype == object:  # 1, 1.0 and True are equal objects of different texts
        values = values.map(_text, na_action="ignore")
    rows, uniques = pd.factorize(values)  # −1 where the value is missing: the table's last code
    texts = [_text(value) for value in uniques]
    table = [missing_code if text == "" else lookup.get(text, unseen) for text in texts]
    return np.array([*table, missing_code], dtype=np.int64)[rows]


def _text(value: object) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _group(row: NDArray[np.int64], columns: tuple[Column, ...]) -> Group:
    pairs = []
    for code, column in zip(row, columns, strict=True):
        pairs.append((column.name, MISSING if code < 0 else column.group_levels[code]))
    return Group(tuple(pairs))

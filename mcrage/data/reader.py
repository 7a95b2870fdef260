"""Tables from files, read by the schema alone: every cell starts as text and every problem is reported at once.

A problem names a column, a number of rows, a rule and a remedy, and never shows a cell.
"""

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.files import Cells, TextTable, read_text
from mcrage.data.parsing import MISSING_SPELLINGS, clean, parser
from mcrage.data.problems import NOTES, problem
from mcrage.data.repair import rule_problems
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import DataError, Problem

MINIMUM_ROWS = 50
"""Fewer rows are refused: too few to learn from, and too few to hide a patient in."""

UNSEEN_LIMIT = 0.05
"""Largest share of cells whose category the schema does not list, also where ``other`` takes them."""

_MOST_CATEGORIES = 200
_NEAR_NAME = 0.75
_BASE_DTYPES = {
    "continuous": "float64",
    "integer": "Int64",
    "boolean": "boolean",
    "date": "datetime64[s]",
    "text": "str",
}
_MISSING_COLUMN = {"target": "E202", "sensitive": "E203"}


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """What reading a file gave.

    Attributes:
        table: The rows; None where there are problems.
        problems: What has to be put right before the table can be used.
        notes: What is worth knowing, such as categories that were read as the catch-all one.
    """

    table: pd.DataFrame | None
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()


def read_table(path: str | Path, schema: TableSchema) -> pd.DataFrame:
    """The table of a CSV or Parquet file: the schema's columns in its order, with its dtypes.

    Columns with role ``ignored`` and columns that the schema does not know are left out.

    Raises:
        DataError: With every problem of the file.
    """
    report = inspect_table(path, schema)
    if report.table is None:
        raise DataError(report.problems, source=str(path))
    return report.table


def inspect_table(path: str | Path, schema: TableSchema) -> TableReport:
    """Reads like :func:`read_table`; problems and notes are returned instead of raised."""
    columns = [column for column in schema.columns if column.role != "ignored"]
    try:
        texts = read_text(path)
    except DataError as error:
        return TableReport(table=None, problems=error.problems)
    places, found = _locate(texts.header, columns, ignored={c.name for c in schema.columns if c.role == "ignored"})
    found += [p for p in texts.problems if not p.column or p.column in places]
    if texts.total < MINIMUM_ROWS:
        found.append(problem("E502", rows=texts.total, total=texts.total, minimum=MINIMUM_ROWS))
    series: dict[str, pd.Series] = {}
    for column in columns:
        if column.name in places:
            series[column.name], more = _read_column(texts, places[column.name], column)
            found += more
            if column.role == "target" and series[column.name].nunique() == 1:
                found.append(problem("E501", column=column.name, rows=texts.total, total=texts.total))
    if series.keys() >= {name for rule in schema.row_rules for name in rule.columns}:
        # As for bounds: what hospitals agreed on holds in every row, or the generator learns what it has to repair.
        found += rule_problems(pd.DataFrame(series), schema)
    problems = tuple(p for p in found if p.code not in NOTES)
    notes = tuple(p for p in found if p.code in NOTES)
    return TableReport(table=None if problems else pd.DataFrame(series), problems=problems, notes=notes)


def _locate(
    header: tuple[str, ...], columns: list[Column], *, ignored: set[str]
) -> tuple[dict[str, int], list[Problem]]:
    """Position in the header of every column that is there, and what is wrong with the header."""
    count = Counter(header)
    places = {column.name: header.index(column.name) for column in columns if count[column.name] == 1}
    found = [problem("E204", column=column.name) for column in columns if count[column.name] > 1]
    missing = [column for column in columns if not count[column.name]]
    if len(missing) == len(columns) and not any(_same_name(a, c.name) for a in header for c in columns):
        return {}, [problem("E206")]
    ours = ignored | {column.name for column in columns}
    spare = {name: place for place, name in enumerate(header, start=1) if name.strip() and name not in ours}
    for column in missing:
        code = _MISSING_COLUMN.get(column.role, "E201")
        found.append(problem(code, column=column.name, fix=_missing_fix(column, spare)))
    if unnamed := sum(not name.strip() for name in header):
        found.append(problem("E221", count=unnamed))
    if spare:
        found.append(problem("E220", count=len(spare)))
    return places, found


def _missing_fix(column: Column, spare: dict[str, int]) -> str:
    """Where to look for a column; by position, since a header may turn out to be a patient's row."""
    for other, place in spare.items():
        if _same_name(other, column.name):
            return f"Column {place} of the file differs from it in spaces or letter case only: rename that one."
    if near := difflib.get_close_matches(column.name, spare, n=1, cutoff=_NEAR_NAME):
        return f"Column {spare[near[0]]} of the file has a similar name: if it is the one, rename it."
    return "Export it, empty where this hospital does not record it." if column.nullable else "Export it."


def _same_name(a: str, b: str) -> bool:
    return "".join(clean(a).casefold().split()) == "".join(clean(b).casefold().split())


def _read_column(texts: TextTable, place: int, column: Column) -> tuple[pd.Series, list[Problem]]:
    """A column's values with the schema's dtype, and what was found; each distinct text is parsed once."""
    stored = column
    if place in texts.iso_dates and column.kind == "date":
        stored = column.model_copy(update={"date_format": "%Y-%m-%d"})
    codes, distinct = pd.factorize(texts.cells[place])
    values, faults = _parse_distinct(distinct, stored)
    counts = np.bincount(codes[codes >= 0], minlength=len(distinct))
    rows = Counter[str]()
    for fault, count in zip(faults, counts, strict=True):
        rows[fault] += int(count)
    rows["missing"] += int((codes < 0).sum())
    series = _as_series(values, codes, stored)
    found = _summarise(rows, Counter(faults), column, total=texts.total)
    if not any(p.code not in NOTES for p in found):
        dtype: Any = column.pandas_dtype
        try:
            series = series.astype(dtype)
        except (TypeError, ValueError):
            found.append(problem("E209", column=column.name, c=column))
    return series, found


def _parse_distinct(distinct: Cells, column: Column) -> tuple[list[object], list[str]]:
    """Value and fault of each distinct text; the fault is empty where there is none, ``missing`` for missing ones."""
    missing_codes = {clean(code) for code in column.missing_codes}
    parse = parser(column)
    values, faults = [], []
    for text in map(clean, distinct):
        value, fault = (None, "missing") if text in missing_codes else parse(text)
        if fault not in ("", "missing", "E406") and text.casefold() in MISSING_SPELLINGS:
            value, fault = None, "E210"
        values.append(value)
        faults.append(fault)
    return values, faults


def _as_series(values: list[object], codes: NDArray[np.intp], column: Column) -> pd.Series:
    """Values of the distinct texts dealt to the rows; code −1 is missing."""
    if column.kind in ("categorical", "ordinal") and column.levels:
        known = pd.Categorical(values, categories=[*column.levels], ordered=column.kind == "ordinal")
        return pd.Series(known.take(codes, allow_fill=True))
    dtype = _BASE_DTYPES.get(column.kind, "str")
    return pd.Series(pd.Series(values, dtype=dtype).array.take(codes, allow_fill=True))


def _summarise(rows: Counter[str], distinct: Counter[str], column: Column, *, total: int) -> list[Problem]:
    """Problems and notes of one column from the number of rows, and of distinct texts, by fault."""
    present = rows.total() - rows["missing"]
    found = {code: count for code, count in rows.items() if count and code not in ("", "missing")}
    unseen = found.get("E404", 0) + found.get("E405", 0)
    for code in ("E404", "E405"):
        if code in found and distinct[code] > _MOST_CATEGORIES:
            found["E407"] = found.pop(code)
        elif code in found and code == "E405" and unseen > UNSEEN_LIMIT * present:
            found["E510"] = found.pop(code)
    if found.get("E306", 0) > present / 2:
        found["E312"] = found.pop("E306")
    if rows["missing"] and not column.nullable:
        found["E208" if column.role == "target" else "E207"] = rows["missing"]
    elif present == 0:
        found["E222"] = rows["missing"]
    fields = {
        "c": column,
        "low": _shown(column.minimum),
        "high": _shown(column.maximum),
        "unit": f" in {column.unit}" if column.unit else "",
        "distinct": distinct["E404"] + distinct["E405"],
        "limit": UNSEEN_LIMIT,
    }
    return [problem(code, column=column.name, rows=n, total=total, **fields) for code, n in sorted(found.items())]


def _shown(bound: float | str | None) -> str:
    return f"{bound:,.10g}" if isinstance(bound, float | int) else str(bound)

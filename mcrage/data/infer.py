"""A first draft of the data dictionary from files, for people to correct before the hospitals share it.

Every field that the draft took from the data is named in ``to_review`` of its column: bounds, categories and bins of
one hospital's patients must not become public unread.
"""

import datetime as dt
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.files import read_text
from mcrage.data.parsing import MISSING_SPELLINGS, NUMBER, WHOLE_NUMBER, clean
from mcrage.data.problems import problem
from mcrage.data.schema import Role, TableSchema
from mcrage.errors import DataError, SchemaError

MOST_LEVELS = 50
"""Texts with more different values than this are drafted as free text."""

_BOOLEANS = ({"true", "false"}, {"yes", "no"}, {"y", "n"}, {"0", "1"})
_DEFAULT_MISSING_CODES = ("", "NA")
_SKEWED = 2.0
_MOST_DECIMALS = 12
_MOST_DIGITS = 15
_LARGEST, _NARROWEST = 1e15, 1e-9


@dataclass(frozen=True)
class _Texts:
    """Distinct clean texts of a column over all files that are not missing, with their counts."""

    distinct: tuple[str, ...]
    counts: NDArray[np.int64]
    missing_codes: tuple[str, ...]
    has_missing: bool


def draft_schema(
    paths: Sequence[str | Path],
    *,
    target: str | None = None,
    sensitive: Sequence[str] = (),
    patient_id: str | None = None,
    site: str | None = None,
    name: str = "table",
    most_levels: int = MOST_LEVELS,
) -> TableSchema:
    """A schema that fits every row of the files, with what a person has to review named in each column.

    Roles come from the arguments alone. A column that is not in every file, looks like an identifier or holds free
    text is drafted with role ``ignored``.

    Raises:
        DataError: If a file cannot be read.
        SchemaError: If a named column is in no file, or the target does not have two levels.
    """
    roles: dict[str, Role] = dict.fromkeys(sensitive, "sensitive")
    given: tuple[tuple[str | None, Role], ...] = ((target, "target"), (patient_id, "patient_id"), (site, "site"))
    roles |= {column: role for column, role in given if column is not None}
    cells = _collect(paths)
    if unknown := [column for column in roles if column not in cells]:
        # The names that are there stay out of the message: without a header they would be a patient's row.
        raise SchemaError(f"no file has the column {', '.join(unknown)}; check its spelling and the header line")
    columns = []
    for column, parts in cells.items():
        if len(parts) < len(paths) and column not in roles:
            columns.append(_ignored(column, f"Only in {len(parts)} of {len(paths)} files."))
        else:
            columns.append(_draft(column, roles.get(column), _texts(parts), most_levels))
    return TableSchema.parse({"name": name, "columns": columns})


def _collect(paths: Sequence[str | Path]) -> dict[str, list[NDArray[np.object_]]]:
    cells: dict[str, list[NDArray[np.object_]]] = {}
    for path in paths:
        try:
            texts = read_text(path)
        except DataError as error:
            raise DataError(error.problems, source=str(path)) from None
        if texts.problems:
            raise DataError(texts.problems, source=str(path))
        if twice := sorted({column for column in texts.header if column.strip() and texts.header.count(column) > 1}):
            raise DataError([problem("E204", column=column) for column in twice], source=str(path))
        for column, values in zip(texts.header, texts.cells, strict=True):
            if column.strip():
                cells.setdefault(column, []).append(values)
    return cells


def _texts(parts: list[NDArray[np.object_]]) -> _Texts:
    codes, raw = pd.factorize(np.concatenate(parts))
    counts: dict[str, int] = {}
    for text, count in zip(map(clean, raw), np.bincount(codes[codes >= 0], minlength=len(raw)), strict=True):
        counts[text] = counts.get(text, 0) + int(count)
    missing = sorted(text for text in counts if text.casefold() in MISSING_SPELLINGS)
    kept = {text: count for text, count in counts.items() if text not in missing}
    return _Texts(
        distinct=tuple(kept),
        counts=np.array(list(kept.values()), dtype=np.int64),
        missing_codes=tuple(missing),
        has_missing=bool(missing) or bool((codes < 0).any()),
    )


def _draft(name: str, role: Role | None, texts: _Texts, most_levels: int) -> dict[str, Any]:
    if role in ("patient_id", "site"):
        return {"name": name, "kind": "text", "role": role}
    fields = _kind_of(texts)(texts, role) if texts.distinct else {}
    num_levels = len(fields.get("categories", ()))
    if role is not None:
        _check_role(name, role, texts, too_many=num_levels > most_levels)
    elif not texts.distinct:
        return _ignored(name, "Empty in every row.")
    elif _is_identifier(texts):
        return _ignored(name, "Whole numbers that differ in every row or are very long: an identifier.")
    elif num_levels > most_levels:
        return _ignored(name, f"More than {most_levels} different texts.")
    new_codes = tuple(code for code in texts.missing_codes if code not in _DEFAULT_MISSING_CODES)
    if new_codes:
        fields["missing_codes"] = (*_DEFAULT_MISSING_CODES, *new_codes)
    fields["nullable"] = texts.has_missing and role != "target"
    return {"name": name, "role": role or "feature", **fields, "to_review": tuple(fields)}


def _check_role(name: str, role: Role, texts: _Texts, *, too_many: bool) -> None:
    if role == "target" and len(texts.distinct) != 2:
        raise SchemaError(f"column '{name}' has {len(texts.distinct)} levels; recode the target to two in the files")
    if too_many or not texts.distinct:
        raise SchemaError(f"column '{name}' is empty or free text and cannot define groups; take another, or bands")
    if all(map(_is_date, texts.distinct)):
        raise SchemaError(f"column '{name}' is a date and cannot define groups: export the age in years instead")


def _ignored(name: str, reason: str) -> dict[str, Any]:
    return {"name": name, "kind": "text", "role": "ignored", "description": reason, "to_review": ("role",)}


def _is_identifier(texts: _Texts) -> bool:
    every_row_differs = len(texts.distinct) > 1 and bool((texts.counts == 1).all())
    is_long = any(len(text) > _MOST_DIGITS for text in texts.distinct)
    return (every_row_differs or is_long) and all(WHOLE_NUMBER.fullmatch(text) for text in texts.distinct)


def _kind_of(texts: _Texts) -> Callable[[_Texts, Role | None], dict[str, Any]]:
    distinct = texts.distinct
    if {text.casefold() for text in distinct} in _BOOLEANS:
        return _boolean
    if all(map(_is_number, distinct)):
        # Two whole numbers such as 1 and 2 are codes of two levels.
        is_pair = len(distinct) == 2 and all(WHOLE_NUMBER.fullmatch(text) for text in distinct)
        return _categorical if is_pair else _number
    return _date if all(map(_is_date, distinct)) else _categorical


def _is_number(text: str) -> bool:
    """Whether the text measures something; a leading zero, as in 007, marks a code."""
    is_code = len(text) > 1 and text[0] == "0" and text[1].isdigit()
    return NUMBER.fullmatch(text) is not None and not is_code and abs(float(text)) < _LARGEST


def _is_date(text: str) -> bool:
    try:
        dt.datetime.strptime(text, "%Y-%m-%d")
    except ValueError:
        return False
    return True


def _boolean(_: _Texts, __: Role | None) -> dict[str, Any]:
    return {"kind": "boolean"}


def _categorical(texts: _Texts, role: Role | None) -> dict[str, Any]:
    categories = tuple(sorted(texts.distinct))
    if role == "target":
        return {"kind": "categorical", "categories": categories, "positive": categories[-1]}
    if role == "sensitive":
        return {"kind": "categorical", "categories": categories}
    other = next((level for level in categories if level.casefold() == "other"), "OTHER")
    return {"kind": "categorical", "categories": categories, "other": other}


def _date(texts: _Texts, _: Role | None) -> dict[str, Any]:
    first, last = min(texts.distinct), max(texts.distinct)
    return {"kind": "date", "minimum": f"{first[:4]}-01-01", "maximum": f"{last[:4]}-12-31"}


def _number(texts: _Texts, role: Role | None) -> dict[str, Any]:
    values = np.array([float(text) for text in texts.distinct])
    whole = all(WHOLE_NUMBER.fullmatch(text) for text in texts.distinct)
    low, high, unit = _round_bounds(float(values.min()), float(values.max()))
    fields: dict[str, Any] = {"kind": "integer" if whole else "continuous", "minimum": low, "maximum": high}
    decimals = max(len(text.partition(".")[2]) for text in texts.distinct)
    if not whole and decimals <= _MOST_DECIMALS and not any("e" in text.casefold() for text in texts.distinct):
        fields["decimals"] = decimals
    if low >= 0 and _skewness(np.repeat(values, texts.counts)) > _SKEWED:
        fields["scale"] = "log"
    if role == "sensitive":
        step = max(unit / 2, 1.0) if whole else unit / 2
        fields["bins"] = _round_quartiles(np.repeat(values, texts.counts), step, (low, high))
    return fields


def _round_bounds(low: float, high: float) -> tuple[float, float, float]:
    """The range widened to multiples of the power of ten below its width, and that power."""
    width = max(high - low or abs(high) or 1.0, _NARROWEST)
    unit = 10.0 ** math.floor(math.log10(width))
    start, stop = math.floor(low / unit), math.ceil(high / unit)
    return _times(start, unit), _times(max(stop, start + 1), unit), unit


def _times(count: int, unit: float) -> float:
    # Dividing by the inverse keeps 0.3 from becoming 0.30000000000000004.
    return count * unit if unit >= 1 else count / round(1 / unit)


def _round_quartiles(rows: NDArray[np.float64], step: float, bounds: tuple[float, float]) -> tuple[float, ...]:
    quartiles = np.quantile(rows, [0.25, 0.5, 0.75])
    rounded = sorted({_times(round(float(cut) / step), step) for cut in quartiles})
    return tuple(cut for cut in rounded if bounds[0] < cut < bounds[1]) or (float(np.mean(bounds)),)


def _skewness(rows: NDArray[np.float64]) -> float:
    spread = float(rows.std())
    return float((((rows - rows.mean()) / spread) ** 3).mean()) if spread else 0.0

"""What one text of a column means: a value, or the code of the problem with it.

Each kind of column has a parser: built once from the column, called once per distinct text. A code of
:data:`mcrage.data.problems.NOTES` comes with a value that may be used; any other code comes with None.
"""

import datetime as dt
import re
import unicodedata
from collections.abc import Callable, Mapping

from mcrage.data.schema import Column, Kind

Parser = Callable[[str], tuple[object, str]]

MISSING_SPELLINGS = frozenset({"", "na", "n/a", "#n/a", "nan", "none", "null", "nil", "?", ".", "-", "--", "missing"})
"""How people write *missing*, in lower case. Only spellings that the schema lists are read so."""

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE_NUMBER = re.compile(r"[+-]?\d+(\.0*)?", re.ASCII)

_NUMBER_FAULTS = (
    ("E305", re.compile(r"[+-]?inf(inity)?", re.ASCII | re.IGNORECASE)),
    ("E304", re.compile(r"[+-]?\d{1,3}([, '’]\d{3})+(\.\d*)?", re.ASCII)),
    ("E303", re.compile(r"[+-]?\d[\d. ]*,\d+", re.ASCII)),
    ("E302", re.compile(r"\D{0,4}\d+([.,]\d+)?\D{0,20}", re.ASCII)),
)
_SPELLINGS = {"true": True, "yes": True, "y": True, "1": True, "false": False, "no": False, "n": False, "0": False}
_ZERO_FRACTION = re.compile(r"(?<=\d)\.0+$", re.ASCII)
_INT64 = range(-(2**63), 2**63)
_EPOCH = dt.date(1970, 1, 1).toordinal()


def clean(text: str) -> str:
    """The text without spaces around it, no-break spaces as spaces, accents in their composed form (Unicode NFC)."""
    if text.isascii():
        return text.strip()
    return unicodedata.normalize("NFC", text.replace("\u00a0", " ").replace("\ufeff", "")).strip()


def parser(column: Column) -> Parser:
    """The parser of a column's clean texts that are not missing."""
    return _PARSERS[column.kind](column)


def _continuous(column: Column) -> Parser:
    low, high = _bounds(column)

    def parse(text: str) -> tuple[object, str]:
        if not NUMBER.fullmatch(text):
            return None, _number_fault(text)
        value = float(text)
        if value in (float("inf"), -float("inf")):
            return None, "E305"
        return (value, "") if low <= value <= high else (None, "E306")

    return parse


def _integer(column: Column) -> Parser:
    low, high = _bounds(column)

    def parse(text: str) -> tuple[object, str]:
        if not WHOLE_NUMBER.fullmatch(text):
            return None, "E307" if NUMBER.fullmatch(text) else _number_fault(text)
        digits = text.partition(".")[0]
        # Python refuses to turn more than 4,300 digits into a number.
        value = int(digits) if len(digits) < 100 else _INT64.stop
        if value not in _INT64:
            return None, "E308"
        return (value, "") if low <= value <= high else (None, "E306")

    return parse


def _number_fault(text: str) -> str:
    return next((code for code, pattern in _NUMBER_FAULTS if pattern.fullmatch(text)), "E301")


def _bounds(column: Column) -> tuple[float, float]:
    if column.minimum is None or column.maximum is None:
        return -float("inf"), float("inf")
    return column.low, column.high


def _date(column: Column) -> Parser:
    low, high = _bounds(column)
    example = _shape(dt.datetime(2000, 10, 20).strftime(column.date_format))

    def parse(text: str) -> tuple[object, str]:
        try:
            day = dt.datetime.strptime(text, column.date_format).date()
        except ValueError:
            return None, "E402" if _shape(text) == example else "E401"
        return (day, "") if low <= day.toordinal() - _EPOCH <= high else (None, "E403")

    return parse


def _shape(text: str) -> str:
    return re.sub(r"[0-9]", "9", text)


def _level(column: Column) -> Parser:
    exact = {clean(level): level for level in column.levels}
    loose: dict[str, set[str]] = {}
    for level in column.levels:
        loose.setdefault(_loose(clean(level)), set()).add(level)

    def parse(text: str) -> tuple[object, str]:
        if not column.levels or text in exact:
            return exact.get(text, text), ""
        near = loose.get(_loose(text), set())
        if len(near) == 1:
            return next(iter(near)), "E406"
        return (None, "E404") if column.other is None else (column.other, "E405")

    return parse


def _loose(text: str) -> str:
    return _ZERO_FRACTION.sub("", text).casefold()


def _boolean(column: Column) -> Parser:
    own = {clean(level).casefold(): truth for level, truth in zip(column.levels, (False, True), strict=True)}
    contradicts = any(_SPELLINGS.get(text, truth) != truth for text, truth in own.items())
    lookup = own if contradicts else _SPELLINGS | own

    def parse(text: str) -> tuple[object, str]:
        truth = lookup.get(_loose(text))
        return truth, "" if truth is not None else "E408"

    return parse


def _text(_: Column) -> Parser:
    return lambda text: (text, "")


_PARSERS: Mapping[Kind, Callable[[Column], Parser]] = {
    "continuous": _continuous,
    "integer": _integer,
    "categorical": _level,
    "ordinal": _level,
    "boolean": _boolean,
    "date": _date,
    "text": _text,
}

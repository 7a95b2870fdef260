"""Every problem that reading a table can find: its stable code, the rule in words, and what to do about it.

A line reads ``E306 column 'age': 17 of 5,210 rows outside 0 to 120. <remedy>``. Names and limits come from the
schema; no text of this catalogue has a place for a cell's value.
"""

from collections.abc import Mapping

from mcrage.errors import Problem

_CATALOGUE: Mapping[str, tuple[str, str]] = {
    # file
    "E101": ("there is no such file", "Check the path."),
    "E102": ("the file cannot be opened: {reason}", "Name a file that this account may read."),
    "E103": ("the file is not UTF-8 text: {reason}", 'Save it again as "CSV UTF-8".'),
    "E104": ("the file is not a table that can be read: {reason}", "{fix}"),
    "E105": ("the fields are parted by {found}, not by {expected}", "Save the file again, parted by {expected}."),
    "E106": ("the file is empty", "Export it again."),
    "E107": ("the file has a header and no rows", "Export it again."),
    "E108": ("NUL bytes, the first one at byte {offset:,}", "The file is damaged or binary: export it again."),
    "E109": (
        "with more fields than the header, the first one ending in line {line:,}",
        "Put fields that contain the delimiter into double quotes.",
    ),
    "E110": ("with fewer fields than the header, the first one ending in line {line:,}", "Export complete rows."),
    "E111": (
        "a quoted field is not closed, or text follows its closing quote, in the record that starts in line {line:,}",
        "Close every double quote and write one inside a field twice.",
    ),
    "E112": (
        "that repeat the header, the first one in line {line:,}",
        "Remove these lines; they come from joining files.",
    ),
    "E113": ("reading Parquet needs pyarrow, which is not installed", "Run: pip install 'mcrage[data]'."),
    "E114": ("holds {reason} in the Parquet file", "Export it as a number, text, boolean or date."),
    # schema
    "E201": ("is missing from the file", "{fix}"),
    "E202": ("the target is missing from the file", "{fix}"),
    "E203": ("the sensitive feature is missing from the file", "{fix}"),
    "E204": ("stands more than once in the header", "Keep one of them."),
    "E206": (
        "the first line has none of the schema's column names",
        "Add a header line, or check that file and schema belong together.",
    ),
    "E207": ("without a value", "Fill them in, or set nullable in the schema."),
    "E208": ("without an outcome", "Take rows without an outcome out of the file."),
    "E209": (
        "has cells that the schema's dtype '{c.dtype}' cannot hold",
        "Leave dtype out of the schema, or choose one that can be missing, such as Int64.",
    ),
    "E210": (
        "written as missing in a way that the schema does not list",
        "Add that spelling to missing_codes of the column.",
    ),
    "E220": ("the file has {count} columns that the schema does not know; they are ignored", "Nothing to do."),
    "E221": ("the file has {count} columns without a name; they are ignored", "Nothing to do."),
    "E222": ("without a value: the column is empty", "Check the export if this hospital records it."),
    # numbers
    "E301": ("not a number", "Correct them, or list the spelling of a missing value under missing_codes."),
    "E302": ("with a unit or symbol beside the number", "Export the bare number{unit}."),
    "E303": ("with a decimal comma", "Export numbers with a decimal point."),
    "E304": ("with a thousands separator", "Export numbers without it."),
    "E305": ("infinite, or too large for a number", "Correct them, or export them as missing."),
    "E306": ("outside {low} to {high}", "Correct them at the source, or widen the bounds in the schema."),
    "E307": ("not a whole number", "Correct them, or give the column kind 'continuous'."),
    "E308": ("too large for a 64-bit whole number", "Give the column kind 'text' if it is an identifier."),
    "E312": ("outside {low} to {high}, which is most of them", "Check the unit{unit}."),
    # text and dates
    "E401": ("not a date written as {c.date_format}", "Export dates so, or change date_format in the schema."),
    "E402": ("with a day that is not in the calendar", "Correct them at the source."),
    "E403": ("outside {low} to {high}", "Correct them at the source, or widen the bounds in the schema."),
    "E404": (
        "with a category that the schema does not list ({distinct:,} different)",
        "Correct the spelling, add the categories to the schema, or name a level for them under other.",
    ),
    "E405": ("with a category that the schema does not list, read as '{c.other}'", "Nothing to do."),
    "E406": (
        "with a category in another spelling (letter case, or .0 after a code), read as the schema's",
        "Nothing to do.",
    ),
    "E407": (
        "with {distinct:,} different texts that are no category: this looks like free text",
        "Check that it is the right column, or give it role 'ignored'.",
    ),
    "E408": ("neither true nor false", "Use true and false, yes and no, 1 and 0, or {c.levels[0]} and {c.levels[1]}."),
    # statistics
    "E501": ("have the same outcome", "Check the export; a site with one outcome cannot be evaluated."),
    "E502": ("are too few: at least {minimum} are needed", "Export more rows."),
    "E510": (
        "with a category that the schema does not list, which is more than {limit:.0%}",
        "Correct the spelling, or add the categories to the schema.",
    ),
    # rules
    "E601": (
        'break the schema\'s rule "{broken}"',
        "Correct them at the source, or take the rule out of the schema if it does not hold.",
    ),
}

NOTES = frozenset({"E220", "E221", "E222", "E405", "E406", "E501"})
"""Codes that are worth knowing and do not stop anybody from using the table."""


def problem(code: str, *, column: str = "", rows: int = 0, total: int = 0, **fields: object) -> Problem:
    """The catalogue's problem of this code, with its blanks filled from ``fields``."""
    rule, remedy = _CATALOGUE[code]
    return Problem(
        code=code, column=column, rows=rows, total=total, rule=rule.format(**fields), remedy=remedy.format(**fields)
    )

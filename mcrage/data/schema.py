"""The data dictionary that all hospitals share: one JSON file, public, agreed before anybody trains.

Nothing in it is computed from patients' rows without a person's review: bounds, categories and bins are what the
hospitals agreed on, and everything that mcrage needs for encoding a table comes from here.
"""

import datetime as dt
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mcrage.errors import SchemaError

Kind = Literal["continuous", "integer", "categorical", "ordinal", "boolean", "date", "text"]
Role = Literal["feature", "target", "sensitive", "patient_id", "site", "ignored"]

MODELLED_ROLES: tuple[Role, ...] = ("feature", "target", "sensitive")
MISSING = "missing"
"""How the level of a missing cell is called wherever levels are shown."""

_NUMERIC: tuple[Kind, ...] = ("continuous", "integer", "date")
_UNCHECKED = {"description", "to_review"}
_EPOCH = dt.date(1970, 1, 1).toordinal()
_DEFAULT_DTYPES: dict[Kind, str] = {
    "continuous": "float64",
    "integer": "Int64",
    "categorical": "category",
    "ordinal": "category",
    "boolean": "boolean",
    "date": "datetime64[s]",
    "text": "str",
}
_DTYPES = {
    *("float64", "float32", "Float64", "Float32", "int64", "int32", "int16", "int8", "Int64", "Int32", "Int16", "Int8"),
    *("bool", "boolean", "category", "str", "string", "object"),
    *("datetime64[s]", "datetime64[ms]", "datetime64[us]", "datetime64[ns]"),
}


class Column(BaseModel):
    """One column of the data dictionary.

    Attributes:
        name: Header of the column, exactly.
        kind: What its values are. ``text`` is read as it stands and allowed only for columns that are not modelled.
        role: ``feature``, ``target`` (the label, two levels), ``sensitive`` (defines the groups; modelled as well),
            ``patient_id`` and ``site`` (never modelled), ``ignored``.
        description: For people.
        unit: Unit of measurement, such as ``mmol/L``.
        minimum, maximum: Public bounds, required for numbers and dates (dates as ``YYYY-MM-DD``).
        decimals: Digits kept after the point of a continuous column; None keeps all.
        categories: Levels of a categorical or ordinal column (in order), or the two spellings (false, true) of a
            boolean one.
        other: Level that unseen categories fall into; None makes an unseen category a problem.
        bins: Inner cut points that turn a numeric sensitive column into groups: ``[45, 65]`` gives three.
        scale: How a number is spread before it is modelled: ``linear``, ``log`` (of value − minimum + 1 step), or
            ``quantile`` with ``grid``.
        grid: For ``quantile``: values at equally spaced probabilities, from a public source.
        missing_codes: Texts that mean *missing* in the files.
        nullable: Whether the column may be missing.
        positive: For the target: the level that counts as the event; the last one if None.
        date_format: For dates in text files, as in ``strptime``.
        dtype: pandas dtype that rows come back with; a sensible one per kind if empty.
        to_review: Fields of this column that a program drafted from data and that a person still has to approve.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    kind: Kind
    role: Role = "feature"
    description: str = ""
    unit: str = ""
    minimum: float | str | None = None
    maximum: float | str | None = None
    decimals: int | None = Field(default=None, ge=0, le=12)
    categories: tuple[str, ...] = ()
    other: str | None = None
    bins: tuple[float, ...] = ()
    scale: Literal["linear", "log", "quantile"] = "linear"
    grid: tuple[float, ...] = ()
    missing_codes: tuple[str, ...] = ("", "NA")
    nullable: bool = True
    positive: str | None = None
    date_format: str = "%Y-%m-%d"
    dtype: str = ""
    to_review: tuple[str, ...] = ()

    @property
    def is_modelled(self) -> bool:
        """Whether generated rows contain this column."""
        return self.role in MODELLED_ROLES

    @property
    def is_numeric(self) -> bool:
        """Whether values are numbers on a scale (dates count: days since 1970-01-01)."""
        return self.kind in _NUMERIC

    @property
    def low(self) -> float:
        """Lower bound as a number; days since 1970-01-01 for dates."""
        return _number(self.minimum)

    @property
    def high(self) -> float:
        """Upper bound as a number; days since 1970-01-01 for dates."""
        return _number(self.maximum)

    @property
    def step(self) -> float:
        """Distance between neighbouring values; 0 where the column is not rounded."""
        if self.kind in ("integer", "date"):
            return 1.0
        return 0.0 if self.decimals is None else 10.0**-self.decimals

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels of a column that is not numeric, the catch-all one last, without *missing*."""
        if self.kind == "boolean":
            return self.categories or ("False", "True")
        if self.other is not None and self.other not in self.categories:
            return (*self.categories, self.other)
        return self.categories

    @property
    def positive_level(self) -> str:
        """The level of the target that counts as the event."""
        return self.positive if self.positive is not None else self.levels[-1]

    @property
    def pandas_dtype(self) -> str:
        """The pandas dtype that rows come back with."""
        return self.dtype or _DEFAULT_DTYPES[self.kind]

    @property
    def group_levels(self) -> tuple[str, ...]:
        """Levels as a sensitive feature or target: categories, or the bins of a numeric column, then *missing*."""
        names = bin_names(self.bins, integer=self.kind == "integer") if self.is_numeric else self.levels
        return (*names, MISSING) if self.nullable else names

    @model_validator(mode="after")
    def _check(self) -> "Column":
        problems = [*_bounds_problems(self), *_level_problems(self), *_role_problems(self)]
        if problems:
            raise ValueError(f"column '{self.name}': " + "; ".join(problems))
        return self


class TableSchema(BaseModel):
    """The columns of a table, in order, with their roles.

    Raises:
        SchemaError: From :meth:`load` and :meth:`parse`, with a line per problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "table"
    version: str = "1"
    columns: tuple[Column, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> "TableSchema":
        problems = []
        names = [column.name for column in self.columns]
        problems += [f"column '{name}' is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
        for role in ("target", "patient_id", "site"):
            if len(found := [column.name for column in self.columns if column.role == role]) > 1:
                problems.append(f"role '{role}' is given to {len(found)} columns ({', '.join(found)}); one is allowed")
        if not self.modelled:
            problems.append("no column is a feature, a sensitive feature or the target")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def parse(cls, content: str | bytes | dict[str, Any]) -> "TableSchema":
        """A schema from JSON text or from a plain dict."""
        try:
            return cls.model_validate(content) if isinstance(content, dict) else cls.model_validate_json(content)
        except ValidationError as error:
            raise SchemaError("\n".join(_readable(error.errors()))) from None

    @classmethod
    def load(cls, path: str | Path) -> "TableSchema":
        """A schema from its JSON file."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise SchemaError(f"schema file '{path}' cannot be read: {error.strerror}") from None
        try:
            return cls.parse(content)
        except SchemaError as error:
            raise SchemaError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None

    def save(self, path: str | Path) -> None:
        """Writes the JSON file, one field a line, defaults left out."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    def to_json(self) -> str:
        """The schema as JSON text, defaults left out."""
        columns = [column.model_dump(mode="json", exclude_defaults=True) for column in self.columns]
        return json.dumps({"name": self.name, "version": self.version, "columns": columns}, indent=1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that matters to two sites that train together: not of descriptions, nor the version."""
        columns = [column.model_dump(mode="json", exclude=_UNCHECKED) for column in self.columns]
        return hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest()

    @property
    def modelled(self) -> tuple[Column, ...]:
        """Columns that generated rows contain, in order."""
        return tuple(column for column in self.columns if column.is_modelled)

    @property
    def features(self) -> tuple[Column, ...]:
        """What a downstream model may look at: features and sensitive features."""
        return tuple(column for column in self.columns if column.role in ("feature", "sensitive"))

    @property
    def sensitive(self) -> tuple[Column, ...]:
        """Columns whose values define the groups."""
        return tuple(column for column in self.columns if column.role == "sensitive")

    @property
    def attributes(self) -> tuple[Column, ...]:
        """What rows can be asked for: the sensitive features and then the target."""
        return (*self.sensitive, self.target) if self.has_target else self.sensitive

    @property
    def has_target(self) -> bool:
        """Whether there is a label."""
        return any(column.role == "target" for column in self.columns)

    @property
    def target(self) -> Column:
        """The label."""
        for column in self.columns:
            if column.role == "target":
                return column
        raise SchemaError("the schema has no column with role 'target'; give one column that role")

    @property
    def patient_id(self) -> Column | None:
        """The column that names the patient, if there is one."""
        return next((column for column in self.columns if column.role == "patient_id"), None)

    @property
    def site(self) -> Column | None:
        """The column that names the hospital, if there is one."""
        return next((column for column in self.columns if column.role == "site"), None)

    def column(self, name: str) -> Column:
        """The column of this name."""
        for column in self.columns:
            if column.name == name:
                return column
        raise SchemaError(f"the schema has no column '{name}'; it has {', '.join(c.name for c in self.columns)}")

    def diff(self, other: "TableSchema") -> list[str]:
        """What differs from ``other``, a line each, in words; empty when the fingerprints agree."""
        ours, theirs = ({column.name: column for column in schema.columns} for schema in (self, other))
        lines = [f"column '{name}' is missing there" for name in ours if name not in theirs]
        lines += [f"column '{name}' is there only" for name in theirs if name not in ours]
        for name in (name for name in ours if name in theirs):
            a, b = (column.model_dump(mode="json", exclude=_UNCHECKED) for column in (ours[name], theirs[name]))
            lines += [f"column '{name}': {key} is {a[key]!r} here, {b[key]!r} there" for key in a if a[key] != b[key]]
        if not lines and [*ours] != [*theirs]:
            lines.append(f"the columns stand in another order: {', '.join(ours)} here, {', '.join(theirs)} there")
        return lines


def bin_names(bins: tuple[float, ...], *, integer: bool) -> tuple[str, ...]:
    """What the groups of a numeric column are called: ``under 45``, ``45 to 64``, ``65 and over``."""
    if not bins:
        return ("any",)
    first, last = f"under {bins[0]:g}", f"{bins[-1]:g} and over"
    if integer:
        middle = [f"{low:g} to {high - 1:g}" for low, high in itertools.pairwise(bins)]
    else:
        middle = [f"{low:g} to under {high:g}" for low, high in itertools.pairwise(bins)]
    return (first, *middle, last)


def _number(bound: float | str | None) -> float:
    if isinstance(bound, str):
        return float(dt.date.fromisoformat(bound).toordinal() - _EPOCH)
    if bound is None:
        raise SchemaError("a column without bounds was asked for them")
    return float(bound)


def _bounds_problems(column: Column) -> list[str]:
    if not column.is_numeric:
        given = [key for key in ("minimum", "maximum", "decimals") if getattr(column, key) is not None]
        given += [key for key in ("bins", "grid") if getattr(column, key)]
        given += ["scale"] if column.scale != "linear" else []
        return [f"kind '{column.kind}' has no {key}" for key in given]
    if column.minimum is None or column.maximum is None:
        needed = f"kind '{column.kind}' needs minimum and maximum: public limits, not those of the data"
        return [needed] if column.is_modelled else []
    if (column.kind == "date") != isinstance(column.minimum, str) or type(column.minimum) is not type(column.maximum):
        return ['dates need bounds written as "YYYY-MM-DD", numbers need numbers']
    try:
        low, high = column.low, column.high
    except ValueError:
        return ["the bounds are not dates written as YYYY-MM-DD"]
    problems = []
    if not (low < high and math.isfinite(high - low)):
        problems.append(f"minimum {column.minimum} is not below maximum {column.maximum}, or not finite")
    if column.decimals is not None and column.kind != "continuous":
        problems.append("decimals belong to kind 'continuous'")
    return problems + _grid_problems(column, low, high)


def _grid_problems(column: Column, low: float, high: float) -> list[str]:
    problems = []
    if (column.scale == "quantile") != bool(column.grid):
        problems.append("scale 'quantile' and a grid go together")
    for key, values in (("bins", column.bins), ("grid", column.grid)):
        if any(b <= a for a, b in itertools.pairwise(values)):
            problems.append(f"{key} must rise")
        if values and not (low <= values[0] and values[-1] <= high):
            problems.append(f"{key} must lie within the bounds")
    if column.bins and column.bins[0] == low:
        problems.append("the first bin starts at minimum by itself: leave that cut point out")
    return problems


def _level_problems(column: Column) -> list[str]:
    spellings = [text.casefold() for text in column.categories]
    if column.kind == "boolean" and spellings and (len(spellings) != 2 or spellings[0] == spellings[1]):
        return ["a boolean's categories are its two spellings: (false, true)"]
    if column.kind in ("categorical", "ordinal"):
        if column.is_modelled and not column.categories:
            return [f"kind '{column.kind}' needs categories"]
        if len(set(column.levels)) != len(column.levels):
            return ["a category is there twice"]
        if MISSING in column.levels:
            return [f"'{MISSING}' cannot be a category: list it under missing_codes"]
        if both := [level for level in column.levels if level in column.missing_codes]:
            return [f"'{both[0]}' is a category and a missing code as well"]
    elif column.kind != "boolean" and column.categories:
        return [f"kind '{column.kind}' has no categories"]
    return []


def _role_problems(column: Column) -> list[str]:
    problems = _target_problems(column) if column.role == "target" else []
    if column.kind == "text" and column.is_modelled:
        problems.append("kind 'text' cannot be modelled: give it role 'ignored' or another kind")
    if column.role == "sensitive" and column.is_numeric and not column.bins:
        problems.append("a numeric sensitive feature needs bins, such as [45, 65]")
    if column.bins and column.role != "sensitive":
        problems.append("bins belong to sensitive features")
    if column.dtype and column.dtype not in _DTYPES:
        problems.append(f"dtype '{column.dtype}' is not one of {', '.join(sorted(_DTYPES))}")
    return problems


def _target_problems(column: Column) -> list[str]:
    problems = []
    if column.is_numeric or len(column.levels) != 2:
        problems.append("the target needs exactly two levels")
    elif column.positive is not None and column.positive not in column.levels:
        problems.append("positive is not one of the target's levels")
    if column.nullable:
        problems.append("the target cannot be nullable: rows without a label cannot be learned from")
    return problems


def _readable(problems: Sequence[Any]) -> list[str]:
    """A line per problem; without the complaint about an empty tuple that pydantic adds when a column is wrong."""
    lines = []
    any_column_is_wrong = any(len(problem["loc"]) > 1 for problem in problems)
    for problem in problems:
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if message.startswith("column '") or not where:
            lines.append(message)
        elif problem["type"] != "too_short" or not any_column_is_wrong:
            lines.append(f"{where}: {message}")
    return lines

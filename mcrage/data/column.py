"""One column of the data dictionary: what its values are, and what it is for."""

import datetime as dt
import itertools
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mcrage.errors import SchemaError

Kind = Literal["continuous", "integer", "categorical", "ordinal", "boolean", "date", "text"]
Role = Literal["feature", "target", "sensitive", "patient_id", "site", "ignored"]

MODELLED_ROLES: tuple[Role, ...] = ("feature", "target", "sensitive")
MISSING = "missing"
"""How the level of a missing cell is called wherever levels are shown."""

_NUMERIC: tuple[Kind, ...] = ("continuous", "integer", "date")
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
    elif column.step and any(round(bound, column.decimals or 0) != bound for bound in (low, high)):
        digits = f"{column.decimals} decimals" if column.decimals else "none"
        problems.append(f"minimum and maximum have more digits after the point than the column's values: {digits}")
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

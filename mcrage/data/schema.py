"""The data dictionary that all hospitals share: one JSON file, public, agreed before anybody trains.

Nothing in it is computed from patients' rows without a person's review: bounds, categories and bins are what the
hospitals agreed on, and everything that mcrage needs for encoding a table comes from here.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mcrage.data.column import MISSING as MISSING
from mcrage.data.column import Column as Column
from mcrage.data.column import Kind as Kind
from mcrage.data.column import Role as Role
from mcrage.data.column import bin_names as bin_names
from mcrage.data.rules import Rule, parse_rule, rule_problems
from mcrage.errors import SchemaError

_UNCHECKED = {"description", "to_review"}


class TableSchema(BaseModel):
    """The columns of a table, in order, with their roles, and the rules that every row follows.

    Attributes:
        name, version: For people.
        columns: The columns.
        rules: Rules as text, such as ``discharge >= admission``; :mod:`mcrage.data.rules` says what can be written.

    Raises:
        SchemaError: From :meth:`load` and :meth:`parse`, with a line per problem.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "table"
    version: str = "1"
    columns: tuple[Column, ...] = Field(min_length=1)
    rules: tuple[str, ...] = ()

    @field_validator("rules")
    @classmethod
    def _spelled(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(parse_rule(rule)) for rule in rules)

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
        problems += rule_problems({column.name: column for column in self.columns}, self.row_rules)
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
        rules = {"rules": self.rules} if self.rules else {}
        return json.dumps({"name": self.name, "version": self.version, "columns": columns} | rules, indent=1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that matters to two sites that train together: not of descriptions, nor the version."""
        columns = [column.model_dump(mode="json", exclude=_UNCHECKED) for column in self.columns]
        return hashlib.sha256(json.dumps([*columns, *sorted(self.rules)], sort_keys=True).encode()).hexdigest()

    @property
    def row_rules(self) -> tuple[Rule, ...]:
        """The rules that every row follows."""
        return tuple(parse_rule(rule) for rule in self.rules)

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
        lines += [f'rule "{rule}" is missing there' for rule in self.rules if rule not in other.rules]
        lines += [f'rule "{rule}" is there only' for rule in other.rules if rule not in self.rules]
        if not lines and [*ours] != [*theirs]:
            lines.append(f"the columns stand in another order: {', '.join(ours)} here, {', '.join(theirs)} there")
        return lines


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

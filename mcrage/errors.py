"""Every error that mcrage raises on purpose.

::

    McrageError
    ├── ConfigError       a setting is unknown, out of range or of the wrong type
    ├── SchemaError       a data dictionary is not valid, or two of them disagree
    ├── DataError         a table does not follow its schema; carries every problem at once
    ├── NotFittedError    a model was asked for rows before it was trained
    ├── SamplingError     a condition cannot be sampled
    ├── MessageError      what came over the wire is not what was agreed
    ├── FederationError   a federated run cannot go on: too few sites, or it diverged
    └── CheckpointError   a saved model or checkpoint is missing, damaged or of another run

Messages give names, shapes, counts and limits, never a value from a patient's row.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class McrageError(Exception):
    """Root of all errors that mcrage raises on purpose."""


class ConfigError(McrageError):
    """A setting is unknown, out of range or of the wrong type."""


class SchemaError(McrageError):
    """A data dictionary is not valid, or two of them disagree."""


class NotFittedError(McrageError):
    """A model was asked for rows before it was trained."""


class SamplingError(McrageError):
    """A condition cannot be sampled."""


class MessageError(McrageError):
    """What came over the wire is not what was agreed."""


class FederationError(McrageError):
    """A federated run cannot go on: too few sites, or it diverged."""


class CheckpointError(McrageError):
    """A saved model or checkpoint is missing, damaged or of another run."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with a table: printed as one line, without any cell value.

    Attributes:
        code: Stable code such as ``E301``; the first digit is the family (1 file, 2 schema, 3 numbers, 4 text and
            dates, 5 statistics, 6 rules).
        column: Column name; empty when the problem is the file's.
        rows: Number of rows concerned.
        total: Number of rows of the table; 0 when it could not be read.
        rule: What is wrong, in words.
        remedy: What to do.
    """

    code: str
    rule: str
    remedy: str
    column: str = ""
    rows: int = 0
    total: int = 0

    def __str__(self) -> str:
        where = f"column '{self.column}': " if self.column else ""
        count = f"{self.rows:,} of {self.total:,} rows " if self.total else ""
        return f"{self.code} {where}{count}{self.rule}. {self.remedy}"


class DataError(McrageError):
    """A table does not follow its schema; ``problems`` holds every problem, not the first.

    Args:
        problems: Everything that is wrong with the table.
        source: Name of the file, put before each line of the message.
    """

    def __init__(self, problems: Sequence[Problem], *, source: str = "") -> None:
        self.problems = tuple(problems)
        self.source = source
        prefix = f"{source}: " if source else ""
        super().__init__("\n".join(f"{prefix}{problem}" for problem in self.problems))

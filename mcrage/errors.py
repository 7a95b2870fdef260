"""Every error that mcrage raises on purpose.

::

    McrageError
    ├── ConfigError       a setting is unknown, out of range or of the wrong type
    ├── SchemaError       a data dictionary is not valid, or two of them disagree
    ├── DataError         a table does not follow its schema; carries every problem at once
    ├── NotFittedError    a model was asked for rows before it was trained
    ├── SamplingError     a condition cannot be sampled
    ├── MessageError      what came over the wire is not what was agreed
    │   └── ParameterError    parameters that came are not those of the model
    ├── FederationError   a federated run cannot go on: too few sites, or it diverged
    ├── CheckpointError   a saved model or checkpoint is missing, damaged or of another run
    └── PrivacyError      something that the privacy of patients rests on is not as it has to be
        ├── RefusedError         a hospital's own policy does not allow what was asked; carries a code
        ├── BudgetExceededError  what was asked would cost more than the hospital's privacy budget has left
        └── LedgerError          the record of what was spent is missing, damaged, older or another one

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


class ParameterError(MessageError):
    """Parameters that came are not those of the model.

    Args:
        fault: ``missing``, ``unknown``, ``dtype``, ``shape``, ``finite`` or ``size``.
        text: In words.
    """

    def __init__(self, fault: str, text: str) -> None:
        self.fault = fault
        super().__init__(text)


class FederationError(McrageError):
    """A federated run cannot go on: too few sites, or it diverged."""


class CheckpointError(McrageError):
    """A saved model or checkpoint is missing, damaged or of another run."""


class PrivacyError(McrageError):
    """Something that the privacy of patients rests on is not as it has to be."""


class RefusedError(PrivacyError):
    """A hospital's own policy does not allow what was asked.

    Args:
        code: Which rule; :data:`mcrage.refusals.REFUSALS` has the words. It is all that leaves the hospital.
        detail: More words, for the hospital's own log.
    """

    def __init__(self, code: int, detail: str = "") -> None:
        self.code = code
        super().__init__(f"refused with code {code}" + (f": {detail}" if detail else ""))


class BudgetExceededError(PrivacyError):
    """What was asked would cost more than the hospital's privacy budget has left."""


class LedgerError(PrivacyError):
    """The record of what was spent is missing, damaged, older or another one."""


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

"""Every field that crosses a site's border: the whole list of what a hospital is told and what it tells.

To the site (:mod:`mcrage.instructions`): :class:`DescribeInstruction`, :class:`TrainInstruction`,
:class:`SumInstruction`, :class:`CountInstruction`, :class:`EvaluateInstruction` and :class:`AccountInstruction`. From
the site: :class:`SiteDescription`, :class:`SiteUpdate`, :class:`SiteCounts` or :class:`SiteSum`, :class:`SiteLoss` or
:class:`SiteScores`, :class:`SiteAccount`, and nothing else, but for the site's signature of each
(:mod:`mcrage.signing`); an error leaves as a code and an id. Under differential privacy counts and scores are noisy,
parameters are computed from noisy gradients, sums are noisy and masked, and no loss leaves.

``to_wire`` gives plain values and arrays. ``from_wire`` lets in what was agreed and nothing more: exact names, types,
ranges, dtypes, shapes, finite numbers.
"""

import json
from collections.abc import Mapping
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SkipValidation, ValidationError

from mcrage.config import SITE_NAME
from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import check_parameters
from mcrage.errors import (
    BudgetExceededError,
    ConfigError,
    DataError,
    LedgerError,
    MessageError,
    PrivacyError,
    RefusedError,
    SchemaError,
)
from mcrage.instructions import AccountInstruction as AccountInstruction
from mcrage.instructions import CountInstruction as CountInstruction
from mcrage.instructions import DescribeInstruction as DescribeInstruction
from mcrage.instructions import EvaluateInstruction as EvaluateInstruction
from mcrage.instructions import Round, Sha256
from mcrage.instructions import SumInstruction as SumInstruction
from mcrage.instructions import TrainInstruction as TrainInstruction
from mcrage.privacy.statement import PrivacyAccount
from mcrage.refusals import FAILURES, REFUSALS, RUNTIME_FAILURES
from mcrage.wire import Parameters as Parameters
from mcrage.wire import Scalar as Scalar
from mcrage.wire import Wire as Wire
from mcrage.wire import WireMessage, checked, loads

_MOST_PATIENTS = 10**9
_LONGEST_OFFER = 400


class SiteDescription(WireMessage):
    """What a site tells about itself before training.

    Attributes:
        site: Name of the site.
        schema_fingerprint: Of its data dictionary.
        schema_text: The data dictionary, which is public.
        group_counts: Rows per group of the training part; no count from 1 to 10 is in it.
        marginals: One-way histograms of the training part, small cells merged, or with privacy as the noise left them,
            negative counts included; None where they were not asked for. No count from 1 to 10 is in them.
        versions: Versions of what computes, such as torch.
        mask_key: The site's key for masks with its signature (:mod:`mcrage.peers`); empty where none was asked for.
    """

    array_fields: ClassVar[frozenset[str]] = frozenset({"group_counts", "marginals", "versions"})

    site: Annotated[str, Field(pattern=SITE_NAME)]
    schema_fingerprint: Sha256
    schema_text: str
    group_counts: SkipValidation[GroupCounts]
    marginals: SkipValidation[Marginals | None]
    versions: dict[str, str]
    mask_key: Annotated[str, Field(max_length=_LONGEST_OFFER)] = ""

    @property
    def table_schema(self) -> TableSchema:
        """The site's data dictionary."""
        return TableSchema.parse(self.schema_text)

    def to_wire(self) -> Wire:
        """The message as plain data: counts and versions as JSON, histograms as arrays."""
        values = super().to_wire().values
        values["group-counts"] = counts_to_json(self.group_counts)
        values["versions"] = json.dumps(self.versions)
        values["has-marginals"] = self.marginals is not None
        histograms = {} if self.marginals is None else self.marginals.to_wire()
        return Wire(values, {name: np.asarray(cells, dtype=np.float64) for name, cells in histograms.items()})

    @classmethod
    def from_wire(cls, wire: Wire, *, noisy: bool = False) -> "SiteDescription":
        """Checks every field, against the schema that came with it; noisy histograms may have negative counts.

        Raises:
            MessageError: If anything is not as agreed.
        """
        values: dict[str, object] = dict(wire.values)
        try:
            schema = TableSchema.parse(str(values.get("schema-text", "")))
        except SchemaError as error:
            raise MessageError(f"the site's schema is not valid: {error}") from None
        if values.get("schema-fingerprint") != schema.fingerprint:
            raise MessageError("the schema's fingerprint is not that of the schema")
        values["group-counts"] = counts_from_json(str(values.get("group-counts", "")), schema)
        values["versions"] = loads(str(values.get("versions", "")), "versions")
        has_marginals = values.pop("has-marginals", None)
        if not isinstance(has_marginals, bool) or (wire.arrays and not has_marginals):
            raise MessageError("histograms came without being announced")
        marginals = Marginals.from_wire(wire.arrays, schema, noisy=noisy) if has_marginals else None
        return checked(cls, values, marginals=marginals)


class SiteUpdate(WireMessage):
    """What a site tells after training: its parameters and, without privacy, the mean loss of its steps.

    There is no weight in it: weights are the server's.
    """

    server_round: Round
    loss: float | None = None
    parameters: SkipValidation[Parameters]

    @classmethod
    def from_wire(cls, wire: Wire, *, shapes: Mapping[str, tuple[int, ...]]) -> "SiteUpdate":
        """Checks the values, and names, shapes, dtype and size of the parameters; puts them in the order of ``shapes``.

        Raises:
            MessageError: If anything is not as agreed.
        """
        check_parameters(wire.arrays, shapes)
        return checked(cls, wire.values, parameters={name: wire.arrays[name] for name in shapes})


class SiteSum(WireMessage):
    """What a site tells where noise is shared: the sum of its patients' gradients, or its counts, noisy and masked.

    By itself it is uniform; only the sum over all sites that were asked together means anything.
    """

    array_fields: ClassVar[frozenset[str]] = frozenset({"words"})

    server_round: Round
    words: SkipValidation[NDArray[np.uint32]]

    def to_wire(self) -> Wire:
        """The message as plain data."""
        return Wire(super().to_wire().values, {"words": self.words})

    @classmethod
    def from_wire(cls, wire: Wire, *, size: int) -> "SiteSum":
        """Checks every field; there are ``size`` words."""
        words = wire.arrays.get("words")
        if set(wire.arrays) != {"words"} or words is None or words.shape != (size,) or words.dtype != np.uint32:
            raise MessageError(f"expected {size:,} words and nothing else")
        return checked(cls, wire.values, words=words)


class _Counted(WireMessage):
    """Counts of patients in a round."""

    array_fields: ClassVar[frozenset[str]] = frozenset({"counts"})

    server_round: Round
    counts: SkipValidation[NDArray[np.float64]]

    def to_wire(self) -> Wire:
        """The message as plain data."""
        return Wire(super().to_wire().values, {"counts": self.counts})


class SiteCounts(_Counted):
    """What a site tells of its training patients in tables of counts: all cells, one table after the other.

    They are exact without privacy, and with it have noise on each, negative ones included.
    """

    @classmethod
    def from_wire(cls, wire: Wire, *, size: int) -> "SiteCounts":
        """Checks every field; there are ``size`` whole numbers."""
        return checked(cls, wire.values, counts=_counts(wire, (size,)))


class SiteLoss(WireMessage):
    """What a site tells about a model: its mean loss on the site's test rows."""

    server_round: Round
    loss: float

    @classmethod
    def from_wire(cls, wire: Wire) -> "SiteLoss":
        """Checks every field."""
        if wire.arrays:
            raise MessageError("a loss comes without arrays")
        return checked(cls, wire.values)


class SiteScores(_Counted):
    """What a site tells about a model under privacy: noisy numbers of test patients by group, label and score bin."""

    @classmethod
    def from_wire(cls, wire: Wire, *, shape: tuple[int, ...]) -> "SiteScores":
        """Checks every field; the counts are whole numbers of this shape."""
        return checked(cls, wire.values, counts=_counts(wire, shape))


class SiteAccount(WireMessage):
    """What a site tells about its ledger: the events, which depend on no patient, and what they cost."""

    array_fields: ClassVar[frozenset[str]] = frozenset({"account"})

    account: SkipValidation[PrivacyAccount]

    def to_wire(self) -> Wire:
        """The message as plain data: the account as JSON."""
        return Wire({"account": self.account.to_json()})

    @classmethod
    def from_wire(cls, wire: Wire) -> "SiteAccount":
        """Checks every field."""
        if wire.arrays or set(wire.values) != {"account"}:
            raise MessageError("an account comes alone")
        try:
            return cls(account=PrivacyAccount.from_json(str(wire.values["account"])))
        except PrivacyError as error:
            raise MessageError(str(error)) from None


class SiteError(WireMessage):
    """What a site tells about something that went wrong: the kind, and where its own log says more.

    Attributes:
        code: Kind of error.
        error_id: Eight hexadecimal digits that also stand in the site's log.
    """

    code: int
    error_id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]

    @classmethod
    def of(cls, error: BaseException, error_id: str) -> "SiteError":
        """The kind of an exception; its text stays behind."""
        if isinstance(error, RefusedError):
            return cls(code=error.code, error_id=error_id)
        codes = (code for code, (kind, _) in _ERRORS.items() if isinstance(error, kind))
        return cls(code=next(codes), error_id=error_id)

    def __str__(self) -> str:
        words = REFUSALS.get(self.code) or FAILURES.get(self.code) or _ERRORS[self.code][1]
        return f"{words} (the site's log has error {self.error_id})"

    @classmethod
    def readable(cls, code: int, reason: str | None) -> str:
        """Words for an error that came back, without repeating text that a site did not mean to send."""
        if code in RUNTIME_FAILURES:
            return RUNTIME_FAILURES[code]
        try:
            return str(cls(code=code, error_id=reason or ""))
        except (ValidationError, KeyError):
            return f"the site's runtime failed with code {code}"


_ERRORS: dict[int, tuple[type[BaseException], str]] = {
    1001: (ConfigError, "the site is not set up for this run"),
    1002: (SchemaError, "the site's schema is missing, not valid or another one"),
    1003: (DataError, "the site's table does not follow the schema"),
    1004: (MessageError, "the site could not accept the instruction"),
    1005: (BudgetExceededError, "the site's privacy budget does not allow it"),
    1006: (LedgerError, "the site's privacy ledger cannot be used"),
    1008: (MemoryError, "the site ran out of memory"),
    1007: (PrivacyError, "the site cannot protect its patients as asked"),
    1000: (BaseException, "the site failed unexpectedly"),
}

Outgoing = SiteDescription | SiteUpdate | SiteSum | SiteCounts | SiteLoss | SiteScores | SiteAccount
"""Everything that may leave a site when all is well."""


def _counts(wire: Wire, shape: tuple[int, ...]) -> NDArray[np.float64]:
    counts = wire.arrays.get("counts")
    if set(wire.arrays) != {"counts"} or counts is None or counts.shape != shape or counts.dtype != np.float64:
        raise MessageError(f"expected counts of shape {shape} and nothing else")
    if not ((np.abs(counts) <= _MOST_PATIENTS).all() and (counts == np.round(counts)).all()):
        raise MessageError(f"expected counts that are whole numbers within ±{_MOST_PATIENTS:,}")
    return counts


def counts_to_json(counts: GroupCounts) -> str:
    """Group counts as JSON text, in a fixed order."""
    shown = sorted([[list(pair) for pair in group.levels], count] for group, count in counts.items())
    hidden = sorted([list(pair) for pair in group.levels] for group in counts.suppressed)
    return json.dumps({"counts": shown, "suppressed": hidden})


def counts_from_json(text: str, schema: TableSchema) -> GroupCounts:
    """Group counts from JSON text: groups of the schema's attributes, none from 1 to 10.

    Raises:
        MessageError: If the text is anything else.
    """
    content = loads(text, "group counts")
    try:
        counts = {_group(levels, schema): count for levels, count in content["counts"]}
        suppressed = [_group(levels, schema) for levels in content["suppressed"]]
    except (KeyError, TypeError, ValueError):
        raise MessageError("group counts: expected pairs of a group of the schema and a count") from None
    if any(type(count) is not int or count < MINIMUM_CELL for count in counts.values()):
        raise MessageError(f"group counts: expected whole numbers of at least {MINIMUM_CELL}")
    return GroupCounts(counts, suppressed=suppressed)


def _group(levels: list[list[str]], schema: TableSchema) -> Group:
    pairs = tuple((name, level) for name, level in levels)
    if [name for name, _ in pairs] != [column.name for column in schema.attributes]:
        raise ValueError("not the schema's attributes")
    if any(level not in schema.column(name).group_levels for name, level in pairs):
        raise ValueError("not a level of the schema")
    return Group(pairs)

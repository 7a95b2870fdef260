"""Every field that crosses a site's border: the whole list of what a hospital is told and what it tells.

To the site: :class:`DescribeInstruction`, :class:`TrainInstruction`, :class:`EvaluateInstruction`.
From the site: :class:`SiteDescription`, :class:`SiteUpdate`, :class:`SiteLoss`, and nothing else; an error leaves as
a code and an id.

``to_wire`` gives plain values and arrays. ``from_wire`` lets in what was agreed and nothing more: exact names, types,
ranges, dtypes, shapes, finite numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SkipValidation, ValidationError

from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import check_parameters
from mcrage.errors import ConfigError, DataError, MessageError, SchemaError

Scalar = bool | int | float | str
Parameters = dict[str, NDArray[np.float32]]

SITE_NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""What a site may be called."""

_SPELLING = str.maketrans("-_", "_-")
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Round = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Wire:
    """A message as plain data: scalars by kebab-case name, arrays by name."""

    values: dict[str, Scalar]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class _Message(BaseModel):
    """What all messages share: frozen, strict, and one way onto the wire."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
    )
    array_fields: ClassVar[frozenset[str]] = frozenset({"parameters"})

    def to_wire(self) -> Wire:
        """The message as plain data."""
        values = self.model_dump(exclude=set(self.array_fields))
        kebab = {name.translate(_SPELLING): value for name, value in values.items()}
        return Wire(kebab, dict(getattr(self, "parameters", {})))


MessageT = TypeVar("MessageT", bound=_Message)


class DescribeInstruction(_Message):
    """Asks a site what it has: round zero.

    Attributes:
        test_fraction: Share of patients that the site keeps for testing; the rest is described.
        marginals: Whether one-way histograms are asked for.
    """

    test_fraction: _Share
    marginals: bool

    @classmethod
    def from_wire(cls, wire: Wire) -> "DescribeInstruction":
        """Checks every field."""
        return _checked(cls, wire.values)


class _ModelInstruction(_Message):
    """A model to work on.

    Attributes:
        server_round: Round, from 1.
        description: The untrained model: schema, transform and size as JSON. A site with another schema refuses.
        test_fraction: Share of patients that the site keeps for testing.
        seed: Root of the random streams.
        parameters: float32 by name.
    """

    server_round: _Round
    description: str
    test_fraction: _Share
    seed: Annotated[int, Field(ge=0)]
    parameters: SkipValidation[Parameters]


class TrainInstruction(_ModelInstruction):
    """Asks a site to train.

    Attributes:
        first_step: Global number of the first step.
        local_steps: Steps to take.
        total_steps: Steps of the whole run, for the learning-rate schedule.
        batch_size: Rows per step.
        learning_rate: Peak learning rate.
        warmup_steps: Steps of warm-up over the whole run.
        proximal_mu: Weight of FedProx's proximal term; 0 without it.
    """

    first_step: Annotated[int, Field(ge=0)]
    local_steps: Annotated[int, Field(ge=1)]
    total_steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)]
    proximal_mu: Annotated[float, Field(ge=0)]

    @classmethod
    def from_wire(cls, wire: Wire) -> "TrainInstruction":
        """Checks every value; the model checks the parameters when it loads them."""
        return _checked(cls, wire.values, parameters=wire.arrays)


class EvaluateInstruction(_ModelInstruction):
    """Asks a site for the loss on the rows that it keeps for testing."""

    @classmethod
    def from_wire(cls, wire: Wire) -> "EvaluateInstruction":
        """Checks every value; the model checks the parameters when it loads them."""
        return _checked(cls, wire.values, parameters=wire.arrays)


class SiteDescription(_Message):
    """What a site tells about itself before training.

    Attributes:
        site: Name of the site.
        schema_fingerprint: Of its data dictionary.
        schema_text: The data dictionary, which is public.
        group_counts: Rows per group of the training part; no count from 1 to 10 is in it.
        marginals: One-way histograms of the training part, small cells merged; None where they were not asked for.
        versions: Versions of what computes, such as torch.
    """

    array_fields: ClassVar[frozenset[str]] = frozenset({"group_counts", "marginals", "versions"})

    site: Annotated[str, Field(pattern=SITE_NAME)]
    schema_fingerprint: _Sha256
    schema_text: str
    group_counts: SkipValidation[GroupCounts]
    marginals: SkipValidation[Marginals | None]
    versions: dict[str, str]

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
    def from_wire(cls, wire: Wire) -> "SiteDescription":
        """Checks every field, against the schema that came with it.

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
        values["versions"] = _loads(str(values.get("versions", "")), "versions")
        has_marginals = values.pop("has-marginals", None)
        if not isinstance(has_marginals, bool) or (wire.arrays and not has_marginals):
            raise MessageError("histograms came without being announced")
        marginals = Marginals.from_wire(wire.arrays, schema) if has_marginals else None
        return _checked(cls, values, marginals=marginals)


class SiteUpdate(_Message):
    """What a site tells after training: its parameters and the mean loss of its steps.

    There is no weight in it: weights are the server's.
    """

    server_round: _Round
    loss: float
    parameters: SkipValidation[Parameters]

    @classmethod
    def from_wire(cls, wire: Wire, *, shapes: Mapping[str, tuple[int, ...]]) -> "SiteUpdate":
        """Checks the values, and names, shapes, dtype and size of the parameters; puts them in the order of ``shapes``.

        Raises:
            MessageError: If anything is not as agreed.
        """
        check_parameters(wire.arrays, shapes)
        return _checked(cls, wire.values, parameters={name: wire.arrays[name] for name in shapes})


class SiteLoss(_Message):
    """What a site tells about a model: its mean loss on the site's test rows."""

    server_round: _Round
    loss: float

    @classmethod
    def from_wire(cls, wire: Wire) -> "SiteLoss":
        """Checks every field."""
        if wire.arrays:
            raise MessageError("a loss comes without arrays")
        return _checked(cls, wire.values)


class SiteError(_Message):
    """What a site tells about something that went wrong: the kind, and where its own log says more.

    Attributes:
        code: Kind of error.
        error_id: Eight hexadecimal digits that also stand in the site's log.
    """

    code: int
    error_id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]

    @classmethod
    def of(cls, error: Exception, error_id: str) -> "SiteError":
        """The kind of an exception; its text stays behind."""
        codes = (code for code, (kind, _) in _ERRORS.items() if isinstance(error, kind))
        return cls(code=next(codes), error_id=error_id)

    def __str__(self) -> str:
        return f"{_ERRORS[self.code][1]} (the site's log has error {self.error_id})"

    @classmethod
    def readable(cls, code: int, reason: str | None) -> str:
        """Words for an error that came back, without repeating text that a site did not mean to send."""
        try:
            return str(cls(code=code, error_id=reason or ""))
        except (ValidationError, KeyError):
            return f"the site's runtime failed with code {code}"


_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1001: (ConfigError, "the site is not set up for this run"),
    1002: (SchemaError, "the site's schema is missing, not valid or another one"),
    1003: (DataError, "the site's table does not follow the schema"),
    1004: (MessageError, "the site could not accept the instruction"),
    1000: (Exception, "the site failed unexpectedly"),
}

Outgoing = SiteDescription | SiteUpdate | SiteLoss
"""Everything that may leave a site when all is well."""


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
    content = _loads(text, "group counts")
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


def _loads(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError(f"{what}: not JSON") from None


def _checked(cls: type[MessageT], values: Mapping[str, object], **arrays: object) -> MessageT:
    # Hyphens and underscores change places, so that a name in the other spelling is as unknown as any other.
    fields = {name.translate(_SPELLING): value for name, value in values.items()}
    if fields.keys() & arrays.keys():
        raise MessageError(f"{cls.__name__} is not as agreed: arrays came as values")
    try:
        return cls.model_validate({**fields, **arrays})
    except ValidationError as error:
        lines = [f"{str(problem['loc'][0]).translate(_SPELLING)}: {problem['msg']}" for problem in error.errors()]
        raise MessageError(f"{cls.__name__} is not as agreed: " + "; ".join(lines)) from None

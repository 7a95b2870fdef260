"""A message between server and site as plain data, and how one is checked: exact names, types and ranges."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mcrage.errors import MessageError

Scalar = bool | int | float | str
Parameters = dict[str, NDArray[np.float32]]

_SPELLING = str.maketrans("-_", "_-")


@dataclass(frozen=True)
class Wire:
    """A message as plain data: scalars by kebab-case name, arrays by name."""

    values: dict[str, Scalar]
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


class WireMessage(BaseModel):
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
        kebab = {name.translate(_SPELLING): value for name, value in values.items() if value is not None}
        return Wire(kebab, dict(getattr(self, "parameters", {})))


MessageT = TypeVar("MessageT", bound=WireMessage)


def loads(text: str, what: str) -> Any:
    """JSON text of something.

    Raises:
        MessageError: If it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise MessageError(f"{what}: not JSON") from None


def checked(cls: type[MessageT], values: Mapping[str, object], **arrays: object) -> MessageT:
    """A message of these values and arrays.

    Raises:
        MessageError: Naming every field that is not as agreed.
    """
    # Hyphens and underscores change places, so that a name in the other spelling is as unknown as any other.
    fields = {name.translate(_SPELLING): value for name, value in values.items()}
    if fields.keys() & arrays.keys():
        raise MessageError(f"{cls.__name__} is not as agreed: arrays came as values")
    try:
        return cls.model_validate({**fields, **arrays})
    except ValidationError as error:
        lines = [f"{str(problem['loc'][0]).translate(_SPELLING)}: {problem['msg']}" for problem in error.errors()]
        raise MessageError(f"{cls.__name__} is not as agreed: " + "; ".join(lines)) from None

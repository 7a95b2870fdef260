"""A message between server and site as plain data, and how one is checked: exact names, types and ranges."""

import json
import math
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


LAYOUT = "layout"
"""Name of the value that says which arrays are packed where."""

_MOST_ARRAYS = 10_000
_LONGEST_NAME = 200


def packed(wire: Wire) -> Wire:
    """The same message with all arrays of a type end to end in one.

    Flower sends every array as objects of their own, each with a signed request to the server and a row in its
    database; a model has some thirty arrays.
    """
    if not wire.arrays:
        return wire
    layout = [[name, str(array.dtype), list(array.shape)] for name, array in wire.arrays.items()]
    joined: dict[str, list[NDArray[Any]]] = {}
    for array in wire.arrays.values():
        joined.setdefault(str(array.dtype), []).append(array.reshape(-1))
    arrays = {dtype: np.concatenate(parts) for dtype, parts in joined.items()}
    return Wire({**wire.values, LAYOUT: json.dumps(layout)}, arrays)


def unpacked(wire: Wire) -> Wire:
    """What :func:`packed` packed; a message without a layout as it is.

    Raises:
        MessageError: If the layout is not one, or does not use up the arrays exactly.
    """
    if LAYOUT not in wire.values:
        return wire
    arrays: dict[str, NDArray[Any]] = {}
    used = dict.fromkeys(wire.arrays, 0)
    for name, dtype, shape in _layout(wire.values[LAYOUT]):
        size = math.prod(shape)
        if name in arrays or dtype not in used or used[dtype] + size > wire.arrays[dtype].size:
            raise MessageError("the layout of the arrays does not fit them")
        arrays[name] = wire.arrays[dtype].reshape(-1)[used[dtype] : used[dtype] + size].reshape(shape)
        used[dtype] += size
    if any(used[dtype] != array.size for dtype, array in wire.arrays.items()):
        raise MessageError("the layout of the arrays does not use them up")
    return Wire({name: value for name, value in wire.values.items() if name != LAYOUT}, arrays)


def _layout(text: object) -> list[tuple[str, str, list[int]]]:
    entries = loads(text, "the layout of the arrays") if isinstance(text, str) else None
    if not isinstance(entries, list) or len(entries) > _MOST_ARRAYS or not all(_is_entry(each) for each in entries):
        raise MessageError("the layout of the arrays: expected a list of names, types and shapes")
    return [(name, dtype, shape) for name, dtype, shape in entries]


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, list) or len(entry) != 3:
        return False
    name, dtype, shape = entry
    is_shape = isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**32 for n in shape)
    return isinstance(name, str) and len(name) <= _LONGEST_NAME and isinstance(dtype, str) and is_shape


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

"""What comes back is checked before anything is done with it: who, which round, what exactly.

A reply that is not as agreed costs its site the round and nothing else; the reason is kept, in the server's own words.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import Array, Message, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from mcrage.errors import MessageError
from mcrage.messages import Scalar, SiteError, Wire

T = TypeVar("T")

MAX_VALUES = 64
MAX_TEXT = 2**24
MAX_ARRAY_BYTES = 2**28


@dataclass(frozen=True)
class Replies(Generic[T]):
    """What sites answered, and why some answers are missing; both in the order of the names.

    Attributes:
        accepted: Checked replies by site.
        dropped: Reasons by site.
    """

    accepted: dict[str, T] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def check_replies(
    messages: Iterable[Message], *, asked: Mapping[int, str], read: Callable[[Wire], T], server_round: int | None = None
) -> Replies[T]:
    """The replies of the sites that were asked, each checked by ``read``.

    Args:
        messages: Whatever came back.
        asked: Site by node id.
        read: Gives a message of :mod:`mcrage.messages`, or raises MessageError.
        server_round: Round that a reply must be of; None where there is none.
    """
    accepted: dict[str, T] = {}
    dropped: dict[str, str] = {}
    seen: set[str] = set()
    for message in messages:
        site = asked.get(message.metadata.src_node_id)
        if site is None:
            continue  # An error of the SuperLink comes from its own node id: that site is counted as missing below.
        if site in seen:
            accepted.pop(site, None)
            dropped[site] = "answered twice"
            continue
        seen.add(site)
        try:
            accepted[site] = _read(message, read, server_round)
        except MessageError as error:
            dropped[site] = str(error)
    missing = {site: "did not answer in time" for site in asked.values() if site not in seen}
    return Replies(_sorted(accepted), _sorted(dropped | missing))


def _read(message: Message, read: Callable[[Wire], T], server_round: int | None) -> T:
    if message.has_error():
        raise MessageError(SiteError.readable(message.error.code, message.error.reason))
    reply = read(received(message.content))
    came = getattr(reply, "server_round", None)
    if came != server_round:
        raise MessageError(f"expected a reply of round {server_round}, got one of round {came}")
    return reply


def received(content: RecordDict) -> Wire:
    """The plain data of a reply.

    Raises:
        MessageError: If there are other records than ``config`` and ``arrays``, other values than scalars, or arrays
            that are not what they say.
    """
    if set(content.config_records) != {"config"} or set(content.array_records) != {"arrays"} or len(content) != 2:
        raise MessageError("expected the records 'config' and 'arrays' and no other")
    values: dict[str, Scalar] = {}
    for name, value in content.config_records["config"].items():
        if not isinstance(value, bool | int | float | str) or (isinstance(value, str) and len(value) > MAX_TEXT):
            raise MessageError(f"value '{name}': expected a number or a text of at most {MAX_TEXT} characters")
        values[name] = value
    if len(values) > MAX_VALUES:
        raise MessageError(f"expected at most {MAX_VALUES} values, got {len(values)}")
    return Wire(values, {name: read_array(array, name) for name, array in content.array_records["arrays"].items()})


def read_array(array: Array, name: str) -> NDArray[Any]:
    """The numbers of an array whose header is, byte by byte, the one that NumPy writes for what the array claims to be.

    Nothing that a site wrote is parsed, and no memory is taken on its word.

    Raises:
        MessageError: If it is not a plain array of floats, or is too large.
    """
    shape, dtype = tuple(array.shape), array.dtype
    if dtype not in ("float32", "float64") or not all(type(size) is int and size >= 0 for size in shape):
        raise MessageError(f"array '{name}': expected float32 or float64, got {dtype[:20]!r}")
    num_bytes = np.dtype(dtype).itemsize * math.prod(shape)
    if num_bytes > MAX_ARRAY_BYTES:
        raise MessageError(f"array '{name}': expected at most {MAX_ARRAY_BYTES} bytes, got {shape}")
    header = BytesIO()
    npy.write_array_header_1_0(header, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape})
    start = header.tell()
    is_plain = array.stype == "numpy.ndarray" and array.data[:start] == header.getvalue()
    if not is_plain or len(array.data) != start + num_bytes:
        raise MessageError(f"array '{name}': its bytes are not those of {dtype} {shape} in C order")
    return np.frombuffer(array.data, dtype=dtype, offset=start).reshape(shape)


def _sorted(by_site: dict[str, T]) -> dict[str, T]:
    return {site: by_site[site] for site in sorted(by_site)}

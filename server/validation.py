"""What comes back is checked before anything is done with it: who, which round, what exactly.

A reply that is not as agreed costs its site the round and nothing else; the reason is kept, in the server's own words.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, Generic, TypeVar

import numpy as np
from flwr.app import Array, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from mcrage.errors import MessageError
from mcrage.messages import Parameters, Scalar, SiteUpdate
from mcrage.signing import unsigned
from mcrage.wire import Wire, unpacked
from server.exchange import Answer, failure

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
    answers: Iterable[Answer],
    *,
    asked: Collection[str],
    read: Callable[[Wire], T],
    server_round: int | None = None,
) -> Replies[T]:
    """The replies of the sites that were asked, each checked by ``read``.

    Args:
        answers: Whatever came back.
        asked: Sites.
        read: Gives a message of :mod:`mcrage.messages`, or raises MessageError.
        server_round: Round that a reply must be of; None where there is none.
    """
    accepted: dict[str, T] = {}
    dropped: dict[str, str] = {}
    seen: set[str] = set()
    for answer in answers:
        site = answer.site
        if site not in asked:
            continue
        if site in seen:
            accepted.pop(site, None)
            dropped[site] = "answered twice"
            continue
        seen.add(site)
        try:
            accepted[site] = _read(answer, read, server_round)
        except MessageError as error:
            dropped[site] = str(error)
    missing = {site: "did not answer in time" for site in asked if site not in seen}
    return Replies(in_order(accepted), in_order(dropped | missing))


def _read(answer: Answer, read: Callable[[Wire], T], server_round: int | None) -> T:
    if not answer.is_from_there:
        raise MessageError("its reply came from another node")
    if answer.message.has_error():
        raise MessageError(failure(answer.message))
    wire = received(answer.message.content)
    instruction = answer.message.metadata.reply_to_message_id
    reply = read(unpacked(unsigned(wire, signer=answer.signer, instruction=instruction)))
    came = getattr(reply, "server_round", None)
    if came != server_round:
        raise MessageError(f"expected a reply of round {server_round}, got one of round {came}")
    return reply


def read_update(wire: Wire, *, sent: Parameters, max_norm: float) -> SiteUpdate:
    """A site's update, checked against the parameters that it was sent.

    Args:
        wire: What came.
        sent: The parameters, by name.
        max_norm: L2 norm of the difference above which an update is not taken; 0 for any.

    Raises:
        MessageError: If anything is not as agreed.
    """
    update = SiteUpdate.from_wire(wire, shapes={name: array.shape for name, array in sent.items()})
    if not max_norm:
        return update
    # Float64: the sum of a large network's squares would lose its small ones.
    moved = (array.astype(np.float64) - sent[name] for name, array in update.parameters.items())
    norm = math.sqrt(sum(float(np.square(part).sum()) for part in moved))
    if norm > max_norm:
        raise MessageError(f"its update has the norm {norm:.3g}, beyond max-update-norm={max_norm:g}")
    return update


def received(content: RecordDict) -> Wire:
    """The plain data of a reply, as it came.

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
    arrays = {name: read_array(array, name) for name, array in content.array_records["arrays"].items()}
    return Wire(values, arrays)


def read_array(array: Array, name: str) -> NDArray[Any]:
    """The numbers of an array whose header is, byte by byte, the one that NumPy writes for what the array claims to be.

    Nothing that a site wrote is parsed, and no memory is taken on its word.

    Raises:
        MessageError: If it is not a plain array of these types, or is too large.
    """
    shape, dtype = tuple(array.shape), array.dtype
    if dtype not in ("float32", "float64", "uint32") or not all(type(size) is int and size >= 0 for size in shape):
        raise MessageError(f"array '{name}': expected float32, float64 or uint32, got {dtype[:20]!r}")
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


def in_order(by_site: Mapping[str, T]) -> dict[str, T]:
    """The same in the order of the sites' names."""
    return {site: by_site[site] for site in sorted(by_site)}

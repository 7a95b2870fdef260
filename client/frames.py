"""What goes between the process that speaks with the network and the one with the data: a header and bytes.

A frame is the length of a JSON header and of a payload, each 8 bytes, then both. Nothing in it is executed.
"""

import json
from collections.abc import Mapping
from typing import IO, Any

from mcrage.errors import MessageError

_MOST_HEADER = 2**16
_MOST_PAYLOAD = 2**31


def write_frame(stream: IO[bytes], header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Writes a frame and flushes it."""
    head = json.dumps(dict(header)).encode()
    stream.write(len(head).to_bytes(8, "big") + len(payload).to_bytes(8, "big") + head)
    stream.write(payload)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """The next frame; None where the stream ends.

    Raises:
        MessageError: If it ends in the middle, is larger than a frame may be, or has another header than an object.
    """
    sizes = stream.read(16)
    if not sizes:
        return None
    head_size, payload_size = int.from_bytes(sizes[:8], "big"), int.from_bytes(sizes[8:], "big")
    if len(sizes) < 16 or head_size > _MOST_HEADER or payload_size > _MOST_PAYLOAD:
        raise MessageError("a frame between the site's processes is not as agreed")
    head, payload = stream.read(head_size), stream.read(payload_size)
    if len(head) < head_size or len(payload) < payload_size:
        raise MessageError("a frame between the site's processes ended in the middle")
    try:
        header = json.loads(head)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise MessageError("a frame between the site's processes has no header")
    return header, payload

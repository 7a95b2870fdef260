import io
import os
import threading
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.frames import read_frame, write_frame
from mcrage.errors import MessageError

HEADERS = st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | st.integers() | st.text(), max_size=4)


def framed(header: dict[str, Any], payload: bytes) -> bytes:
    stream = io.BytesIO()
    write_frame(stream, header, payload)
    return stream.getvalue()


def raw(head: bytes, payload: bytes = b"", *, head_size: int | None = None, payload_size: int | None = None) -> bytes:
    """A frame that may say other sizes than it has."""
    sizes = (len(head) if head_size is None else head_size, len(payload) if payload_size is None else payload_size)
    return b"".join(size.to_bytes(8, "big") for size in sizes) + head + payload


@given(st.lists(st.tuples(HEADERS, st.binary(max_size=300)), max_size=4))
def test_frames_come_back_as_they_went_in_one_after_the_other(frames: list[tuple[dict[str, Any], bytes]]) -> None:
    stream = io.BytesIO(b"".join(framed(*frame) for frame in frames))
    assert [read_frame(stream) for _ in frames] == frames
    assert read_frame(stream) is None


@pytest.mark.parametrize("size", [1, 2**16, 3 * 2**20])
def test_a_frame_crosses_a_pipe_whole(size: int) -> None:
    ends = os.pipe()
    payload = bytes(range(256)) * (size // 256) + b"x"
    with os.fdopen(ends[0], "rb") as reading, os.fdopen(ends[1], "wb") as writing:
        thread = threading.Thread(target=write_frame, args=(writing, {"n": size}, payload))
        thread.start()
        assert read_frame(reading) == ({"n": size}, payload)
        thread.join()


def test_a_frame_that_is_cut_off_anywhere_is_refused() -> None:
    whole = framed({"run_id": 7}, b"payload")
    for end in range(1, len(whole)):
        with pytest.raises(MessageError, match="a frame between the site's processes"):
            read_frame(io.BytesIO(whole[:end]))


@pytest.mark.parametrize("sizes", [{"head_size": 2**16 + 1}, {"payload_size": 2**31 + 1}, {"head_size": 2**64 - 1}])
def test_a_frame_that_says_to_be_larger_than_agreed_is_not_read(sizes: dict[str, int]) -> None:
    stream = io.BytesIO(raw(b"{}", **sizes))
    tracemalloc.start()
    try:
        with pytest.raises(MessageError, match="not as agreed"):
            read_frame(stream)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert stream.tell() == 16


@pytest.mark.parametrize("head", [b"", b"{", b"[1]", b"null", b'"a"', b"\xff", b"{} {}", b"[" * 60_000])
def test_a_header_is_a_json_object_and_nothing_else(head: bytes) -> None:
    with pytest.raises(MessageError, match="has no header"):
        read_frame(io.BytesIO(raw(head, b"payload")))


def test_what_is_no_json_does_not_go_into_a_header() -> None:
    stream = io.BytesIO()
    with pytest.raises(TypeError):
        write_frame(stream, {"object": object()})
    assert stream.getvalue() == b""

"""Arrays that travel end to end arrive as they were, and nothing else does."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mcrage.errors import MessageError
from mcrage.wire import LAYOUT, Wire, packed, unpacked

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(st.dictionaries(st.text(max_size=8), st.tuples(SHAPES, st.sampled_from(["float32", "float64"])), max_size=6))
def test_what_is_packed_is_unpacked_as_it_was(parts: dict[str, tuple[tuple[int, ...], str]]) -> None:
    draw = np.random.default_rng(0)
    arrays = {name: draw.normal(size=shape).astype(dtype) for name, (shape, dtype) in parts.items()}
    wire = Wire({"x": 1}, arrays)
    sent = packed(wire)
    assert set(sent.arrays) <= {"float32", "float64"}
    came = unpacked(sent)
    assert came.values == {"x": 1}
    assert list(came.arrays) == list(arrays)
    for name, array in arrays.items():
        assert came.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(came.arrays[name], array)


def test_a_message_without_arrays_has_no_layout() -> None:
    assert packed(Wire({"x": 1})) == Wire({"x": 1})


SIX: dict[str, NDArray[Any]] = {"float32": np.zeros(6, np.float32)}


@pytest.mark.parametrize(
    "layout",
    [
        "no json",
        "1",
        "[1]",
        json.dumps([["a", "float32"]]),
        json.dumps([["a", "float32", 6]]),
        json.dumps([["a", "float32", [-1, -6]]]),
        json.dumps([["a", "float32", [6.0]]]),
        json.dumps([["a", "float32", [True] * 6]]),
        json.dumps([["a", "float32", [5]]]),
        json.dumps([["a", "float32", [7]]]),
        json.dumps([["a", "float64", [6]]]),
        json.dumps([["a", "float32", [3]], ["a", "float32", [3]]]),
        json.dumps([["a", "float32", [2**31, 2**31, 4]]]),
        json.dumps([["a" * 201, "float32", [6]]]),
        json.dumps([["a", "float32", [1] * 9]]),
        json.dumps([["a", "float32", [0]]] * 10_001),
        "[" * 100_000,
    ],
)
def test_a_layout_that_does_not_fit_its_arrays_is_refused(layout: str) -> None:
    with pytest.raises(MessageError, match="layout"):
        unpacked(Wire({LAYOUT: layout}, SIX))


def test_a_layout_that_is_no_text_is_refused() -> None:
    with pytest.raises(MessageError, match="layout"):
        unpacked(Wire({LAYOUT: 1}, SIX))

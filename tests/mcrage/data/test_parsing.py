"""Parsing one text: its exact value, or the code of what is wrong with it."""

import datetime as dt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.data.parsing import clean, parser
from mcrage.data.schema import Column


def column(kind: Any, **fields: Any) -> Column:
    return Column(name="x", kind=kind, role="ignored", **fields)


@settings(deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_floats_are_read_bit_for_bit(value: float) -> None:
    assert parser(column("continuous"))(repr(value)) == (value, "")


@settings(deadline=None)
@given(value=st.integers(-(2**63), 2**63 - 1), zeros=st.sampled_from(["", ".", ".0", ".000"]))
def test_whole_numbers_of_64_bits_are_read_exactly(value: int, zeros: str) -> None:
    assert parser(column("integer"))(f"{value}{zeros}") == (value, "")


@settings(deadline=None)
@given(
    day=st.dates(min_value=dt.date(1000, 1, 1)),
    date_format=st.sampled_from(["%Y-%m-%d", "%d/%m/%Y", "%m.%d.%Y", "%Y%m%d"]),
)
def test_dates_are_read_in_the_format_that_is_declared(day: dt.date, date_format: str) -> None:
    # Before the year 1000, strftime leaves leading zeros out on some systems.
    assert parser(column("date", date_format=date_format))(day.strftime(date_format)) == (day, "")


@settings(deadline=None)
@given(text=st.text(max_size=30), kind=st.sampled_from(["continuous", "integer", "date", "boolean", "ordinal", "text"]))
def test_any_text_gives_a_value_or_a_code(text: str, kind: str) -> None:
    value, code = parser(column(kind, categories=("1", "2") if kind == "ordinal" else ()))(clean(text))
    assert (value is None) == (code not in ("", "E406"))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("70,5", "E303"),
        ("1.070,5", "E303"),
        ("1,000", "E304"),
        ("1'000'000.5", "E304"),
        ("70 kg", "E302"),
        ("<0.1", "E302"),
        ("€ 5", "E302"),
        ("INF", "E305"),
        ("1e999", "E305"),
        ("1_000", "E301"),
        ("0x10", "E301"),
        ("٣", "E301"),
        ("2020-01-31", "E301"),
    ],
)
def test_a_text_that_is_no_number_is_told_apart(text: str, code: str) -> None:
    assert parser(column("continuous"))(text) == (None, code)


@pytest.mark.parametrize("text", ["TRUE", "yes", "Y", "1", "1.0", "ever", "EVER"])
def test_booleans_are_read_in_common_spellings_and_the_columns_own(text: str) -> None:
    parse = parser(column("boolean", categories=("never", "ever")))
    assert parse(text) == (True, "")
    assert parse({"ever": "never", "EVER": "Never"}.get(text, "no")) == (False, "")
    assert parse("sometimes") == (None, "E408")


def test_a_booleans_own_spelling_beats_the_common_one() -> None:
    parse = parser(column("boolean", categories=("1", "2")))
    assert [parse(text) for text in ("1", "2", "0", "true")] == [
        (False, ""),
        (True, ""),
        (None, "E408"),
        (None, "E408"),
    ]


def test_a_category_is_matched_loosely_only_where_that_is_not_ambiguous() -> None:
    parse = parser(column("categorical", categories=("Mg", "mg", "Home", "1")))
    assert [parse(text) for text in ("mg", "Mg", "MG", "HOME", "1.0", "1.5")] == [
        ("mg", ""),
        ("Mg", ""),
        (None, "E404"),
        ("Home", "E406"),
        ("1", "E406"),
        (None, "E404"),
    ]


def test_clean_keeps_what_can_be_seen() -> None:
    assert clean(" a\tb ") == "a\tb"
    assert clean("\u00a0African\u00a0American\ufeff") == "African American"
    assert clean("Be\u0302ta") == "B\u00eata"

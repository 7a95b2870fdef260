"""Groups: which rows belong where, and counts that add up and hide the small ones."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.data.groups import (
    MINIMUM_CELL,
    Group,
    GroupCounts,
    group_codes,
    group_labels,
    level_code,
    level_codes,
    numbers,
)
from mcrage.data.schema import Column
from mcrage.errors import SamplingError

AGE = Column(name="age", kind="integer", role="sensitive", minimum=0, maximum=120, bins=(45, 65))
RACE = Column(name="race", kind="categorical", role="sensitive", categories=("Black", "White"), other="OTHER")
SEX = Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False)
DIED = Column(name="died", kind="boolean", role="target", nullable=False)
TABLE = pd.DataFrame(
    {
        "age": pd.array([44, 45, 64, 65, None], dtype="Int64"),
        "race": pd.Categorical(["Black", "Asian", None, "White", "OTHER"]),
        "sex": ["F", "M", "F", "X", None],
        "died": pd.array([True, False, True, False, True], dtype="boolean"),
    },
    index=[10, 11, 12, 13, 14],
)


def test_codes_follow_bins_levels_and_missing_cells() -> None:
    codes = group_codes(TABLE, (AGE, RACE, SEX, DIED))
    assert codes.T.tolist() == [[0, 1, 1, 2, 3], [0, 2, 3, 1, 2], [0, 1, 0, -1, -1], [1, 0, 1, 0, 1]]
    assert group_codes(TABLE, ()).shape == (5, 0)


def test_labels_say_the_codes_in_words_on_the_tables_index() -> None:
    labels = group_labels(TABLE, (AGE, RACE, SEX))
    assert labels["age"].tolist() == ["under 45", "45 to 64", "45 to 64", "65 and over", "missing"]
    assert labels["race"].tolist() == ["Black", "OTHER", "missing", "White", "OTHER"]
    assert labels["sex"].tolist() == ["F", "M", "F", "missing", "missing"]
    assert labels.index.tolist() == TABLE.index.tolist()


@pytest.mark.parametrize("dtype", ["boolean", "bool", "int64", "Int64", "float64", "object", "str"])
def test_a_boolean_has_the_same_codes_in_every_dtype(dtype: Any) -> None:
    values = pd.Series([True, False], dtype="boolean").astype(dtype)
    assert level_codes(values, DIED, -1).tolist() == [1, 0]


def test_a_booleans_own_spellings_beat_one_and_zero() -> None:
    coded = Column(name="sex", kind="boolean", categories=("1", "2"))
    assert level_codes(pd.Series(["1", "2", None]), coded, 2).tolist() == [0, 1, 2]
    assert level_codes(pd.Series([False, True]), coded, 2).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", ["category", "str", "object"])
def test_whole_numbers_and_their_texts_are_the_same_level(dtype: Any) -> None:
    stage = Column(name="stage", kind="ordinal", categories=("1", "2"))
    assert level_codes(pd.Series(["1", "2", None], dtype=dtype), stage, 2).tolist() == [0, 1, 2]
    assert level_codes(pd.Series([1.0, 2.0, None]), stage, 2).tolist() == [0, 1, 2]


def test_values_that_python_calls_equal_keep_their_own_levels() -> None:
    flag = Column(name="flag", kind="categorical", categories=("1", "True"))
    values = pd.Series([1, True, "1", "True", 1.0, None, ""], dtype=object)
    assert level_codes(values, flag, 2).tolist() == [0, 1, 0, 1, 0, 2, 2]


def test_numbers_of_dates_are_days_since_1970() -> None:
    day = Column(name="day", kind="date", minimum="1900-01-01", maximum="2030-01-01")
    days = pd.Series(["1970-01-02", None, "1969-12-31"], dtype="datetime64[s]")
    np.testing.assert_array_equal(numbers(days, day), [1.0, np.nan, -1.0])


def test_a_level_is_asked_for_by_name_or_by_a_value_in_the_bin() -> None:
    assert [level_code(AGE, level) for level in ("45 to 64", 44, 65.0, "missing")] == [1, 0, 2, 3]
    assert [level_code(DIED, level) for level in (True, False, "True", 1, np.bool_(False))] == [1, 0, 1, 1, 0]
    assert level_code(RACE, "OTHER") == 2
    with pytest.raises(SamplingError, match="column 'race' has no level 'Asian'; it has Black, White, OTHER, missing"):
        level_code(RACE, "Asian")


def test_a_group_reads_like_a_person_would_say_it() -> None:
    group = Group.of(race="Black", sex="F")
    assert str(group) == "race=Black, sex=F"
    assert str(Group(())) == "all"
    assert group.as_dict() == {"race": "Black", "sex": "F"}
    assert group.without("race") == Group.of(sex="F")


def test_counts_hold_every_row_of_the_intersections_that_occur() -> None:
    counts = GroupCounts.of(TABLE, (SEX, DIED))
    assert dict(counts) == {
        Group.of(sex="F", died="True"): 2,
        Group.of(sex="M", died="False"): 1,
        Group.of(sex="missing", died="False"): 1,
        Group.of(sex="missing", died="True"): 1,
    }
    assert len(counts) == 4
    assert dict(counts.without("died")) == {Group.of(sex="F"): 2, Group.of(sex="M"): 1, Group.of(sex="missing"): 2}
    assert repr(counts.without("sex")) == "GroupCounts({'died=False': 2, 'died=True': 3})"
    assert dict(GroupCounts.of(TABLE[:0], (SEX, DIED))) == {}


def test_small_counts_are_hidden_and_named() -> None:
    big, small, gone = Group.of(sex="F"), Group.of(sex="M"), Group.of(sex="missing")
    counts = GroupCounts({big: MINIMUM_CELL, small: MINIMUM_CELL - 1, gone: 0}).suppress()
    assert dict(counts) == {big: MINIMUM_CELL}
    assert counts.suppressed == {small}
    assert (counts + GroupCounts({small: 20})).suppressed == {small}
    assert dict(counts + GroupCounts({small: 20})) == {big: MINIMUM_CELL, small: 20}
    assert GroupCounts({}, suppressed=[Group.of(sex="M", died="True")]).without("died").suppressed == {small}


rows = st.lists(st.tuples(st.sampled_from(["F", "M", "X", None]), st.booleans()), max_size=40)


@settings(deadline=None)
@given(first=rows, second=rows)
def test_counts_of_two_sites_add_up_to_the_counts_of_both(first: list[Any], second: list[Any]) -> None:
    def counts(part: list[Any]) -> GroupCounts:
        return GroupCounts.of(pd.DataFrame(part, columns=["sex", "died"]), (SEX, DIED))

    both = counts(first + second)
    assert dict(counts(first) + counts(second)) == dict(both)
    assert sum(both.values()) == sum(both.without("sex").values()) == len(first) + len(second)

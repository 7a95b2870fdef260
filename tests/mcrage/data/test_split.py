"""Splitting by patient: a patient's side depends on the patient and the key, and on nobody else."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage.data.schema import TableSchema
from mcrage.data.split import split_by_patient
from mcrage.errors import ConfigError

FEATURE = {"name": "x", "kind": "boolean"}
WITH_ID = TableSchema.parse({"columns": [{"name": "id", "kind": "text", "role": "patient_id"}, FEATURE]})
WITHOUT_ID = TableSchema.parse({"columns": [FEATURE]})

patients = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=30)


def table_of(ids: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"id": ids, "x": [True] * len(ids)})


def patients_in_test(ids: list[str]) -> set[str]:
    return set(split_by_patient(table_of(ids), WITH_ID)[1]["id"])


@settings(deadline=None)
@given(ids=patients, newcomer=st.text(min_size=1, max_size=4), place=st.integers(0, 30))
def test_adding_a_patient_moves_nobody_else(ids: list[str], newcomer: str, place: int) -> None:
    joined = [*ids[:place], newcomer, *ids[place:]]
    assert patients_in_test(joined) - {newcomer} == patients_in_test(ids) - {newcomer}


@settings(deadline=None)
@given(ids=patients, order=st.randoms(use_true_random=False))
def test_the_order_of_rows_moves_nobody(ids: list[str], order: object) -> None:
    shuffled = [*ids]
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert patients_in_test(shuffled) == patients_in_test(ids)


@settings(deadline=None)
@given(ids=patients)
def test_every_row_lands_once_and_a_patients_rows_land_together(ids: list[str]) -> None:
    table = table_of(ids)
    train, test = split_by_patient(table, WITH_ID)
    assert not set(train["id"]) & set(test["id"])
    pd.testing.assert_frame_equal(pd.concat([train, test]).sort_index(), table)


def test_appending_a_row_without_patient_ids_moves_no_row() -> None:
    table = pd.DataFrame({"x": [True] * 200})
    before, after = (split_by_patient(part, WITHOUT_ID)[1].index for part in (table[:150], table))
    assert [*before] == [row for row in after if row < 150]


def test_a_missing_patient_id_goes_by_its_row() -> None:
    table = pd.DataFrame({"id": pd.Series([None] * 200, dtype="str"), "x": [True] * 200})
    assert [*split_by_patient(table, WITH_ID)[1].index] == [*split_by_patient(table[["x"]], WITHOUT_ID)[1].index]


def test_a_patient_named_like_a_row_is_another_draw() -> None:
    numbered = table_of([str(n) for n in range(200)])
    assert [*split_by_patient(numbered, WITH_ID)[1].index] != [*split_by_patient(numbered, WITHOUT_ID)[1].index]


def share_z(ids: list[str], fraction: float, *, expected: float) -> float:
    test = split_by_patient(table_of(ids), WITH_ID, test_fraction=fraction)[1]
    return (len(test) - expected * len(ids)) / math.sqrt(len(ids) * expected * (1 - expected))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
def test_the_share_of_test_patients_is_the_one_asked_for(fraction: float) -> None:
    # One draw fixed by the key; |z| < 4 has a false-alarm rate of 6e-5. A share that is off by .02 is caught.
    ids = [f"P{n}" for n in range(20_000)]
    assert abs(share_z(ids, fraction, expected=fraction)) < 4
    assert abs(share_z(ids, fraction + 0.02, expected=fraction)) > 4


def test_another_key_deals_independently() -> None:
    table = table_of([f"P{n}" for n in range(20_000)])
    first, second = (set(split_by_patient(table, WITH_ID, test_fraction=0.5, key=key)[1]["id"]) for key in ("a", "b"))
    # Independent halves share a quarter of 20,000 patients, standard deviation 61; 4 of them: 6e-5 false alarms.
    assert abs(len(first & second) - 5_000) < 4 * 61


def test_the_split_is_the_same_in_every_version() -> None:
    assert sorted(patients_in_test([f"P{n}" for n in range(20)])) == ["P0", "P14", "P2", "P9"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, 30.0, math.nan])
def test_a_fraction_outside_0_and_1_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_by_patient(table_of(["a"]), WITH_ID, test_fraction=fraction)

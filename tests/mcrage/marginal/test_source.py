"""A table answers with its counts as long as that is within its epsilon, and says what it released."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from mcrage.data.crossing import Axes, Axis
from mcrage.data.schema import TableSchema
from mcrage.errors import BudgetExceededError
from mcrage.marginal.source import LocalSource
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.pairs import noisy_tables, tables_event

KEY = bytes(range(32))
TABLES: list[Axes] = [(Axis("sex"), Axis("died")), (Axis("age"), Axis("smoker", (0, 1, 2)))]
Rows = Callable[..., pd.DataFrame]


def test_answers_are_the_releases_and_events_are_theirs(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = clinic_rows(300, 1)
    source = LocalSource(table, clinic_schema, epsilon=50.0, delta=1e-5, key=KEY)
    assert source.events == ()
    for ours, theirs in zip(
        source.tables(TABLES, noise=3.0),
        noisy_tables(table, clinic_schema, TABLES, noise=3.0, key=KEY).arrays,
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert source.events == (tables_event(clinic_schema, TABLES, noise=3.0),)
    assert source.deviation(3.0) == 3.0


def test_what_would_cost_too_much_is_refused_before_it_is_made(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    source = LocalSource(clinic_rows(50, 1), clinic_schema, epsilon=1.0, delta=1e-5, key=KEY)
    source.tables(TABLES, noise=10.0)
    before = source.events
    with pytest.raises(BudgetExceededError, match="would cost more than is left of epsilon 1"):
        source.tables(TABLES, noise=2.0)
    with pytest.raises(BudgetExceededError, match="a release without noise"):
        source.tables(TABLES, noise=0)
    assert source.events == before


def test_exact_answers_count_each_patient_once_and_say_that_nobody_is_protected(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    table = pd.concat([clinic_rows(200, 1)] * 3)
    source = LocalSource(table, clinic_schema, epsilon=math.inf, delta=1e-5, key=KEY)
    by_sex, by_age = source.tables(TABLES, noise=0.0)
    assert (by_sex.sum(), by_age.sum()) == (200, 200)
    assert by_sex[0].sum() == (clinic_rows(200, 1)["sex"] == "F").sum()
    assert set(source.events) == {PrivacyEvent(mechanism="unprotected")}

"""Sums of several hospitals' counts: how much noise is in them, and what it costs each hospital."""

import math

import numpy as np
import pandas as pd
import pytest

from mcrage.data.crossing import Axes, Axis, exact_counts
from mcrage.data.schema import TableSchema
from mcrage.errors import BudgetExceededError, PrivacyError
from mcrage.marginal.budget import Budget, precision
from mcrage.marginal.generator import MarginalGenerator
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.shared_counts import SMALLEST_SHARE
from simulations.privacy_budget.sums import SummedSource

HOSPITALS = 5
SIGMA = 40.0
DELTA = 1e-5
TABLES: list[Axes] = [(Axis("sex"), Axis("ill"))] * 500
"""2,000 cells: their standard deviation is within 10 % of the true one but for one in 10⁹ draws."""


def table_of(number: int, tiny_schema: TableSchema, rows: int = 200) -> pd.DataFrame:
    draw = np.random.default_rng(number)
    return pd.DataFrame(
        {
            "patient": [f"p{number}-{row}" for row in range(rows)],
            "sex": pd.Categorical(draw.choice(["F", "M"], rows), categories=["F", "M"]),
            "age": pd.array(draw.integers(18, 100, rows), dtype="Int64"),
            "lab": draw.normal(5, 1, rows).clip(0, 10).round(1),
            "ill": pd.array(draw.random(rows) < 0.3, dtype="boolean"),
        }
    )


def source_of(tiny_schema: TableSchema, *, colluders: int, limit: float = 500.0, key: int = 0) -> SummedSource:
    tables = {f"site-{number}": table_of(number, tiny_schema) for number in range(HOSPITALS)}
    return SummedSource(tables, tiny_schema, epsilon=limit, delta=DELTA, colluders=colluders, key=bytes([key] * 32))


def deviation(source: SummedSource, tiny_schema: TableSchema) -> float:
    """Of the noise on a cell of the sum."""
    rows = pd.concat([table_of(number, tiny_schema) for number in range(HOSPITALS)], ignore_index=True)
    noisy = np.concatenate([cells.ravel() for cells in source.tables(TABLES, noise=SIGMA)])
    return float(np.sqrt(np.mean((noisy - exact_counts(rows, TABLES, tiny_schema)) ** 2)))


@pytest.mark.parametrize("colluders", [1, 3])
def test_shared_noise_is_in_the_sum_once_even_without_the_colluders(tiny_schema: TableSchema, colluders: int) -> None:
    source = source_of(tiny_schema, colluders=colluders)
    found = deviation(source, tiny_schema)
    assert found == pytest.approx(source.deviation(SIGMA), rel=0.1)
    stated = SIGMA * math.sqrt(HOSPITALS / (HOSPITALS - colluders))
    assert found == pytest.approx(stated, rel=0.1)
    assert found * math.sqrt((HOSPITALS - colluders) / HOSPITALS) == pytest.approx(SIGMA, rel=0.1)


def test_local_noise_is_in_the_sum_as_often_as_there_are_hospitals(tiny_schema: TableSchema) -> None:
    source = source_of(tiny_schema, colluders=0)
    found = deviation(source, tiny_schema)
    assert found == pytest.approx(source.deviation(SIGMA), rel=0.1)
    assert found == pytest.approx(SIGMA * math.sqrt(HOSPITALS), rel=0.1)
    assert found != pytest.approx(SIGMA * math.sqrt(HOSPITALS / (HOSPITALS - 1)), rel=0.1)


def test_a_hospital_is_charged_for_the_sum_and_its_share_stands_beside_it(tiny_schema: TableSchema) -> None:
    local, shared = (source_of(tiny_schema, colluders=colluders) for colluders in (0, 1))
    for source in (local, shared):
        source.tables(TABLES[:3], noise=SIGMA)
    assert local.events == local.own_events == shared.events
    (own,) = shared.own_events
    assert own.noise_multiplier == pytest.approx(SIGMA / 2)
    assert own.steps == 3
    assert epsilon(shared.own_events, delta=DELTA) > epsilon(shared.events, delta=DELTA)


def test_no_share_is_so_small_that_the_sum_would_be_no_gaussian(tiny_schema: TableSchema) -> None:
    source = source_of(tiny_schema, colluders=1)
    source.tables(TABLES[:1], noise=1.0)
    assert source.own_events[0].noise_multiplier == SMALLEST_SHARE
    assert source.events[0].noise_multiplier == 1.0
    assert source.deviation(1.0) == SMALLEST_SHARE * math.sqrt(HOSPITALS)


def test_exact_counts_are_the_sum_of_the_hospitals(tiny_schema: TableSchema) -> None:
    source = source_of(tiny_schema, colluders=1, limit=math.inf)
    (cells,) = source.tables(TABLES[:1], noise=0)
    assert cells.sum() == 200 * HOSPITALS
    assert {event.mechanism for event in source.events} == {"unprotected"}


def test_answers_beyond_the_epsilon_are_refused(tiny_schema: TableSchema) -> None:
    source = source_of(tiny_schema, colluders=1, limit=1.0)
    with pytest.raises(BudgetExceededError):
        source.tables(TABLES, noise=SIGMA)
    assert source.events == ()


@pytest.mark.parametrize("colluders", [-1, HOSPITALS])
def test_somebody_has_to_be_honest(tiny_schema: TableSchema, colluders: int) -> None:
    with pytest.raises(PrivacyError, match="collude"):
        source_of(tiny_schema, colluders=colluders)


@pytest.mark.parametrize("colluders", [0, 1])
def test_a_generator_of_the_sum_keeps_to_the_epsilon_and_knows_the_number_of_rows(
    tiny_schema: TableSchema, colluders: int
) -> None:
    source = source_of(tiny_schema, colluders=colluders, limit=8.0)
    model = MarginalGenerator().estimate(tiny_schema, source, Budget(precision=precision(epsilon=8.0, delta=DELTA)))
    assert 7.5 < epsilon(source.events, delta=DELTA) <= 8.0
    total = np.median([cells.sum() for cells in model.model_.marginals.values()])
    assert total == pytest.approx(200 * HOSPITALS, rel=0.1)
    assert len(model.sample(50, {"sex": "F"})) == 50

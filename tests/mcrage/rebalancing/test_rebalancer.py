"""A hospital takes from the pool what its plan asks for, no row twice, and is told what is short."""

import numpy as np
import pandas as pd
import pytest

from mcrage.data.groups import Group, GroupCounts, group_labels
from mcrage.data.repair import Repairs
from mcrage.data.schema import TableSchema
from mcrage.errors import SamplingError
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rebalancing.rebalancer import Rebalancer, make_pool

OLD_WOMEN_DIED = Group.of(age="65 and over", sex="F", died="yes")
YOUNG_MEN_LIVED = Group.of(age="under 65", sex="M", died="no")


class Redraw:
    """Makes rows by drawing from a table: with ``yield_rate`` below 1, some are of another group than asked for."""

    repairs_ = Repairs(100, {"a <= b": 7, "b <= c": 0}, {"a <= b": 2, "b <= c": 0})

    def __init__(self, table: pd.DataFrame, schema: TableSchema, *, yield_rate: float = 1.0) -> None:
        self.table = table[[column.name for column in schema.modelled]]
        self.labels = group_labels(table, schema.attributes)
        self.yield_rate = yield_rate

    def sample(self, n: int, conditions: pd.DataFrame, *, random_state: int) -> pd.DataFrame:
        draw = np.random.default_rng(random_state)
        rows = []
        for condition in conditions.to_dict("records"):
            fits = np.flatnonzero((self.labels[list(condition)] == pd.Series(condition)).all(axis=1))
            pick = fits if draw.random() < self.yield_rate else np.arange(len(self.table))
            rows.append(int(draw.choice(pick)))
        assert len(rows) == n
        return self.table.iloc[rows].reset_index(drop=True)


@pytest.fixture(scope="module")
def pool(clinic_schema: TableSchema, clinic_rows) -> pd.DataFrame:
    return clinic_rows(600, 1)[[column.name for column in clinic_schema.modelled]]


def test_taken_rows_are_of_the_groups_asked_for_and_none_is_taken_twice(
    pool: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    numbered = pool.assign(lactate=np.arange(len(pool)) / 10.0)
    plan = {OLD_WOMEN_DIED: 20, YOUNG_MEN_LIVED: 7}
    taken = Rebalancer.from_pool(numbered, clinic_schema).take(plan, np.random.default_rng(0))
    counts = GroupCounts.of(taken.table, clinic_schema.attributes)
    assert dict(counts) == plan
    assert taken.table["lactate"].is_unique
    assert taken.short == {}
    assert taken.table.dtypes.equals(numbered.dtypes)


def test_what_the_pool_lacks_is_reported_short(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    there = GroupCounts.of(pool, clinic_schema.attributes)[OLD_WOMEN_DIED]
    taken = Rebalancer.from_pool(pool, clinic_schema).take({OLD_WOMEN_DIED: there + 5}, np.random.default_rng(0))
    assert taken.made == {OLD_WOMEN_DIED: there}
    assert taken.short == {OLD_WOMEN_DIED: 5}
    assert str(taken).splitlines()[-1].split() == ["total", str(there + 5), str(there), "5"]


def test_the_same_generator_takes_the_same_rows(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    plan = RebalancePlan.to_parity(GroupCounts.of(pool.head(80), clinic_schema.attributes), cap=10)
    one, two, other = (
        Rebalancer.from_pool(pool, clinic_schema).take(plan, np.random.default_rng(seed)).table for seed in (1, 1, 2)
    )
    assert one.equals(two)
    assert not one.equals(other)


def test_a_plan_over_part_of_the_attributes_takes_any_label(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    taken = Rebalancer.from_pool(pool, clinic_schema).take({Group.of(sex="F"): 50}, np.random.default_rng(0))
    assert set(taken.table["sex"]) == {"F"}
    assert set(taken.table["died"]) == {"no", "yes"}
    anybody = Rebalancer.from_pool(pool, clinic_schema).take({Group(()): 5}, np.random.default_rng(0))
    assert len(anybody.table) == 5


def test_an_empty_plan_takes_nothing(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    rebalancer = Rebalancer.from_pool(pool, clinic_schema)
    assert len(rebalancer.take({}, np.random.default_rng(0)).table) == 0
    assert len(rebalancer.take({OLD_WOMEN_DIED: 0}, np.random.default_rng(0)).table) == 0


def test_overlapping_groups_and_unknown_levels_are_refused(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    rebalancer = Rebalancer.from_pool(pool, clinic_schema)
    with pytest.raises(SamplingError, match="same attributes"):
        rebalancer.take({OLD_WOMEN_DIED: 1, Group.of(sex="F"): 1}, np.random.default_rng(0))
    with pytest.raises(SamplingError, match="has no level 'X'"):
        rebalancer.take({Group.of(sex="X"): 1}, np.random.default_rng(0))


def test_a_pool_has_what_was_asked_for_even_from_a_model_that_misses_at_times(
    pool: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    model = Redraw(pool, clinic_schema, yield_rate=0.9)
    asked = {OLD_WOMEN_DIED: 30, YOUNG_MEN_LIVED: 30}
    made = make_pool(model, clinic_schema, asked, random_state=3).table
    assert dict(GroupCounts.of(made, clinic_schema.attributes)) == asked
    assert made.equals(make_pool(model, clinic_schema, asked, random_state=3).table)


def test_one_number_fills_every_intersection_of_the_schema(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    made = make_pool(Redraw(pool, clinic_schema), clinic_schema, 3, random_state=0).table
    assert set(GroupCounts.of(made, clinic_schema.attributes).values()) == {3}
    assert len(made) == 8 * 3


def test_a_model_that_never_makes_the_group_ends_short_and_not_in_a_loop(
    pool: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    men = pool[pool["sex"] == "M"].reset_index(drop=True)
    model = Redraw(men, clinic_schema, yield_rate=0.0)
    made = make_pool(model, clinic_schema, {OLD_WOMEN_DIED: 5, YOUNG_MEN_LIVED: 5}, random_state=0).table
    assert set(GroupCounts.of(made, clinic_schema.attributes)) == {YOUNG_MEN_LIVED}
    with pytest.raises(SamplingError, match="no row was made"):
        make_pool(model, clinic_schema, {OLD_WOMEN_DIED: 5}, random_state=0)


def test_from_model_makes_what_the_plan_asks_for(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    plan = {OLD_WOMEN_DIED: 4}
    rebalancer = Rebalancer.from_model(Redraw(pool, clinic_schema), plan, clinic_schema, random_state=0)
    assert rebalancer.take(plan, np.random.default_rng(0)).short == {}


def test_the_report_says_what_rules_did_to_the_pool(pool: pd.DataFrame, clinic_schema: TableSchema) -> None:
    plan = {OLD_WOMEN_DIED: 4}
    model = Redraw(pool, clinic_schema)
    taken = Rebalancer.from_model(model, plan, clinic_schema, random_state=0).take(plan, np.random.default_rng(0))
    assert taken.repairs == model.repairs_
    assert str(taken).splitlines()[-1] == (
        'rule "a <= b": 7 of 100 generated rows broke it; 2 were repaired, the others drawn anew'
    )
    assert (model.repairs_ + model.repairs_).repaired == {"a <= b": 4, "b <= c": 0}
    untold = Rebalancer.from_pool(pool, clinic_schema).take(plan, np.random.default_rng(0))
    assert "rule" not in str(untold)

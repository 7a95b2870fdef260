"""The target size follows what synthetic rows do for held-out training rows."""

import pandas as pd
import pytest

from mcrage.data.groups import GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.evaluation.target import choose_target
from mcrage.rebalancing.rebalancer import Rebalancer


@pytest.fixture(scope="module")
def elsewhere(clinic_rows) -> pd.DataFrame:
    return clinic_rows(3000, 9)


def test_rows_that_tell_something_are_taken_and_misleading_ones_are_not(
    clinic_rows, elsewhere: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    train = clinic_rows(150, 1)
    federation = GroupCounts.of(elsewhere, clinic_schema.attributes)
    turned = elsewhere.assign(died=elsewhere["died"].cat.rename_categories({"no": "yes", "yes": "no"}))
    sizes = {}
    for name, pool in (("good", elsewhere), ("misleading", turned)):
        rebalancer = Rebalancer.from_pool(pool, clinic_schema)
        sizes[name] = choose_target([100, 400], train, rebalancer, federation=federation, seed=0)
    assert sizes["good"].size == 400
    assert sizes["misleading"].size == 0
    assert set(sizes["good"].auroc) == {0, 100, 400}


def test_too_few_rows_to_tell_take_the_largest_size(
    clinic_rows, elsewhere: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    rows = clinic_rows(100, 1)
    train = pd.concat([rows[rows["died"] == "no"], rows[rows["died"] == "yes"].head(2)])
    federation = GroupCounts.of(elsewhere, clinic_schema.attributes)
    rebalancer = Rebalancer.from_pool(elsewhere, clinic_schema)
    chosen = choose_target([50, 200], train, rebalancer, federation=federation, seed=0)
    assert chosen.size == 200
    assert chosen.auroc == {}

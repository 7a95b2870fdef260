"""What a report shows beside scores gives no small group away, and says how close generated rows are."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.rebalancing.plan import RebalancePlan
from simulations.arms import SiteTables, largest_request, site_plans
from simulations.findings import fidelity, group_sizes, modelled_counts
from simulations.sites import read_sites


@pytest.fixture(scope="module")
def tables(site_dir: Path) -> dict[str, pd.DataFrame]:
    return dict(read_sites(site_dir).tables)


def test_rows_like_the_real_ones_have_a_fidelity_near_1_and_others_less(
    tables: dict[str, pd.DataFrame], tiny_schema: TableSchema
) -> None:
    marginals = Marginals.of(tables["site-01"], tiny_schema)
    same = fidelity(tables["site-01"], marginals, tiny_schema)
    shifted = tables["site-01"].assign(age=lambda table: (table["age"] + 40).clip(18, 100))
    assert same > 0.9
    assert fidelity(shifted, marginals, tiny_schema) < same - 0.1


def test_modelled_counts_have_the_size_of_the_federation(
    tables: dict[str, pd.DataFrame], tiny_schema: TableSchema
) -> None:
    counts = modelled_counts(tables["site-01"], tiny_schema, num_rows=1200)
    assert sum(counts.values()) == 1200
    assert counts == {group: 10 * n for group, n in GroupCounts.of(tables["site-01"], tiny_schema.sensitive).items()}


def test_a_group_of_few_patients_has_no_size_nor_has_one_that_gives_it_away(
    tables: dict[str, pd.DataFrame], tiny_schema: TableSchema
) -> None:
    women = tables["site-01"]["sex"] == "F"
    few = pd.concat([tables["site-01"][women].head(5), tables["site-01"][~women].head(60)], ignore_index=True)
    sites = [
        SiteTables(site=s, train=t, test=t) for s, t in (("a", few), ("b", tables["site-02"]), ("c", tables["site-03"]))
    ]
    plan = RebalancePlan({Group.of(sex="F"): 7, Group.of(sex="M"): 1})
    sizes = {
        (size.site, size.group): size
        for size in group_sizes(sites, dict.fromkeys("abc", plan), tiny_schema, minimum=MINIMUM_CELL)
    }
    hidden = sizes["a", "sex=F"]
    assert (hidden.real, hidden.synthetic) == (None, None)
    shown = [sizes["a", group].real for group in ("all", "sex=M")]
    assert None in shown  # both would give the third away
    everywhere = [sizes[site, "sex=F"].real for site in ("all", "b", "c")]
    assert None in everywhere
    assert sizes["b", "all"].real == len(tables["site-02"])
    assert sizes["b", "all"].synthetic == 8


def test_the_larger_arm_raises_every_group_to_a_multiple_of_the_federations_rows_and_small_ones_to_a_floor(
    tiny_schema: TableSchema,
) -> None:
    train = pd.DataFrame({"sex": ["F"] * 4 + ["M"] * 20, "ill": [True, False] * 12})
    federation = GroupCounts({Group.of(sex="F"): 20, Group.of(sex="M"): 200})
    plans = site_plans(train, tiny_schema, federation=federation, multiple=2.0, floor=150)
    assert dict(plans["federated_target"]) == {Group.of(sex="F"): 150 - 4, Group.of(sex="M"): 400 - 20}
    assert {plans["federated_parity"].has[group] + n for group, n in plans["federated_parity"].items()} == {10}


def test_the_pool_holds_the_most_that_any_plan_asks_for() -> None:
    a, b = Group.of(sex="F"), Group.of(sex="M")
    assert largest_request([RebalancePlan({a: 3, b: 0}), RebalancePlan({a: 5, b: 0})]) == {a: 5}
    assert np.sum([*largest_request([]).values()]) == 0

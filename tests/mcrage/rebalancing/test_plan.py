"""Plans are arithmetic on counts: every rule follows the same list, and each rule its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrage.data.groups import Group, GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from mcrage.rebalancing.plan import PRIOR_ROWS, RebalancePlan, all_groups

RULES = {
    "parity": lambda counts, federation, cap: RebalancePlan.to_parity(counts, known=federation, cap=cap),
    "group parity": lambda counts, federation, cap: RebalancePlan.to_group_parity(
        counts, label="died", federation=federation, cap=cap
    ),
    "target": lambda counts, federation, cap: RebalancePlan.to_target(
        counts, 80, label="died", federation=federation, cap=cap
    ),
    "target without limit": lambda counts, federation, cap: RebalancePlan.to_target(
        counts, 80, label="died", federation=federation, limit=None, cap=cap
    ),
}
CELLS = [Group.of(race=race, died=died) for race in ("Black", "White", "Asian") for died in ("no", "yes")]


def cell(race: str, died: str) -> Group:
    return Group.of(race=race, died=died)


def table(*rows: tuple[str, int, int]) -> GroupCounts:
    return GroupCounts({cell(race, died): n for race, no, yes in rows for died, n in (("no", no), ("yes", yes))})


counted = st.lists(st.integers(0, 120), min_size=6, max_size=6).map(
    lambda numbers: GroupCounts(dict(zip(CELLS, numbers, strict=True)))
)


@pytest.mark.parametrize("rule", RULES)
@given(counts=counted, elsewhere=counted, cap=st.none() | st.integers(0, 50))
def test_every_rule_makes_no_negative_rows_and_reports_what_it_leaves_out(
    rule: str, counts: GroupCounts, elsewhere: GroupCounts, cap: int | None
) -> None:
    federation = counts + elsewhere
    plan, uncapped = RULES[rule](counts, federation, cap), RULES[rule](counts, federation, None)
    assert all(rows >= 0 for rows in plan.values())
    assert plan.has == {group: counts.get(group, 0) for group in plan}
    assert plan.total == sum(plan.values())
    for group in plan:
        assert plan[group] <= (uncapped[group] if cap is None else min(cap, uncapped[group]))
        assert plan[group] + plan.short.get(group, 0) == uncapped[group] + uncapped.short.get(group, 0)


@given(counts=counted, floor=st.integers(0, 200))
def test_parity_brings_every_cell_to_the_largest_or_the_floor(counts: GroupCounts, floor: int) -> None:
    plan = RebalancePlan.to_parity(counts, floor=floor)
    assert {plan.has[group] + rows for group, rows in plan.items()} <= {max([floor, *counts.values()])}


@given(counts=counted)
def test_group_parity_brings_every_group_to_the_largest(counts: GroupCounts) -> None:
    plan = RebalancePlan.to_group_parity(counts, label="died")
    totals: dict[Group, int] = {}
    for group, rows in plan.items():
        totals[group.without("died")] = totals.get(group.without("died"), 0) + plan.has[group] + rows
    assert set(totals.values()) <= {max(counts.without("died").values(), default=0)}


def test_parity_asks_for_known_groups_that_the_hospital_lacks() -> None:
    plan = RebalancePlan.to_parity(table(("White", 50, 20)), known=[cell("Black", "yes")])
    assert plan[cell("Black", "yes")] == 50


def test_group_parity_keeps_the_label_rate_of_a_group_that_is_large_enough_to_tell() -> None:
    counts = table(("White", 3000, 1000), ("Black", 600, 600))
    plan = RebalancePlan.to_group_parity(counts, label="died")
    assert plan[cell("White", "yes")] == plan[cell("White", "no")] == 0
    rate = (600 + plan[cell("Black", "yes")]) / 4000
    assert rate == pytest.approx(0.5, abs=0.005)


def test_a_target_raises_every_group_beyond_the_largest_and_asks_for_groups_seen_elsewhere() -> None:
    counts = table(("White", 300, 100), ("Black", 9, 1))
    federation = table(("White", 3000, 1000), ("Black", 500, 500), ("Asian", 700, 300))
    plan = RebalancePlan.to_target(counts, 1000, label="died", federation=federation)
    then = {group: plan.has[group] + rows for group, rows in plan.items()}
    for race in ("White", "Black", "Asian"):
        assert then[cell(race, "no")] + then[cell(race, "yes")] == 1000


def test_a_target_stops_at_what_the_federation_holds_and_says_what_is_short() -> None:
    counts, federation = table(("White", 300, 100), ("Black", 6, 4)), table(("White", 3000, 1000), ("Black", 60, 40))
    plan = RebalancePlan.to_target(counts, 1000, label="died", federation=federation)
    black = [cell("Black", died) for died in ("no", "yes")]
    assert sum(plan[group] for group in black) == 90
    assert sum(plan.short[group] for group in black) == 900
    doubled = RebalancePlan.to_target(counts, 1000, label="died", federation=federation, limit=2)
    assert sum(doubled[group] for group in black) == 190


def test_the_label_rate_of_a_tiny_group_is_the_federations_and_of_a_large_one_its_own() -> None:
    federation = table(("White", 5000, 5000), ("Black", 900, 100))
    counts = table(("White", 1800, 200), ("Black", 0, 2))
    plan = RebalancePlan.to_target(counts, 4000, label="died", federation=federation, limit=None)
    rates = {race: (counts.get(cell(race, "yes"), 0) + plan[cell(race, "yes")]) / 4000 for race in ("White", "Black")}
    assert rates["White"] == pytest.approx((200 + PRIOR_ROWS * 0.5) / (2000 + PRIOR_ROWS), abs=0.001)
    assert 0.1 < rates["Black"] < 0.2


def test_a_group_with_too_much_of_one_label_gets_the_other_until_the_room_is_full() -> None:
    counts, federation = table(("White", 0, 90)), table(("White", 5000, 5000))
    plan = RebalancePlan.to_target(counts, 92, label="died", federation=federation, limit=None)
    assert (plan[cell("White", "no")], plan[cell("White", "yes")]) == (2, 0)


def test_a_suppressed_group_counts_as_five_rows() -> None:
    counts = GroupCounts({cell("White", "no"): 50, cell("White", "yes"): 4}).suppress()
    plan = RebalancePlan.to_parity(counts)
    assert plan.has[cell("White", "yes")] == 5
    assert plan[cell("White", "yes")] == 45


def test_no_counts_make_an_empty_plan() -> None:
    assert RebalancePlan.to_parity(GroupCounts({})).total == 0
    assert len(RebalancePlan.to_group_parity(GroupCounts({}), label="died")) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RebalancePlan({cell("White", "no"): -1}), "fewer than 0 rows"),
        (lambda: RebalancePlan.to_parity(table(("White", 1, 1)), cap=-1), "cap must be at least 0"),
        (lambda: RebalancePlan.to_target(table(("White", 1, 1)), -1, label="died"), "size must be at least 0"),
        (lambda: RebalancePlan.to_target(table(("White", 1, 1)), 5, label="race"), "count them over schema.attributes"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_plan_prints_as_a_table_with_totals() -> None:
    plan = RebalancePlan.to_parity(table(("White", 1500, 20)), cap=1000)
    assert str(plan).splitlines() == [
        "group                     rows   to make      then     short",
        "race=White, died=no      1,500         0     1,500         0",
        "race=White, died=yes        20     1,000     1,020       480",
        "total                    1,520     1,000     2,520       480",
    ]
    assert repr(plan) == "RebalancePlan(2 groups, 1,000 rows to make, 480 short)"
    assert str(RebalancePlan({})).splitlines()[-1].split() == ["total", "0", "0", "0", "0"]


def test_all_groups_are_the_intersections_of_the_schemas_levels_without_missing(clinic_schema: TableSchema) -> None:
    groups = all_groups(clinic_schema)
    assert len(groups) == 2 * 2 * 2
    assert str(groups[0]) == "age=under 65, sex=F, died=no"


def test_no_group_that_the_rules_forbid_is_asked_for(clinic_schema: TableSchema) -> None:
    schema = TableSchema.parse(clinic_schema.model_dump(mode="json") | {"rules": ["if sex = F then died = no"]})
    assert [str(group) for group in all_groups(schema) if "sex=F, died=yes" in str(group)] == []
    assert len(all_groups(schema)) == 2 * 3


def test_every_group_is_raised_to_a_multiple_of_what_the_federation_holds_and_at_least_to_the_floor() -> None:
    few, many, absent = (Group.of(race=race) for race in ("few", "many", "absent"))
    own = GroupCounts({few: 15, many: 400})
    federation = GroupCounts({few: 120, many: 3000, absent: 20})
    plan = RebalancePlan.to_federation(own, federation=federation, multiple=2.0, floor=150)
    assert dict(plan) == {few: 240 - 15, many: 6000 - 400, absent: 150}
    unchanged = RebalancePlan.to_federation(own, federation=GroupCounts({}), multiple=2.0)
    assert dict(unchanged) == {few: 0, many: 0}

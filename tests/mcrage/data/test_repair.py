"""Every generated row follows every rule, whatever was drawn, and keeps bounds, dtypes and what was asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mcrage.data.groups import group_codes, level_code
from mcrage.data.reader import inspect_table
from mcrage.data.repair import REDRAWS, broken_rows, follow_rules, forbidden
from mcrage.data.schema import TableSchema
from mcrage.data.transform import Constraint, TableTransform, check_table
from mcrage.errors import DataError, SamplingError, SchemaError

ROWS = 40
LEVELS = ["x", "y", "z"]
FLOATS = ["float64", "float32", "Float64"]


NUMBERS = [(f"{kind}{place}", kind) for kind in ("integer", "continuous", "date") for place in range(3)]


@st.composite
def numbers(draw: st.DrawFn, name: str, kind: str) -> dict[str, Any]:
    low = draw(st.integers(-5, 5))
    column: dict[str, Any] = {"name": name, "kind": kind, "minimum": low, "maximum": low + draw(st.integers(3, 60))}
    if kind == "continuous":
        column |= {"decimals": draw(st.sampled_from([None, 0, 1, 3])), "dtype": draw(st.sampled_from(FLOATS))}
    if kind == "date":
        column |= {"minimum": f"2020-01-{low + 6:02d}", "maximum": f"2020-02-{draw(st.integers(1, 28)):02d}"}
    if kind == "integer" and draw(st.booleans()):
        column |= {"role": "sensitive", "bins": [low + 2]}
    return column | {"nullable": draw(st.booleans())}


@st.composite
def comparisons(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["integer", "continuous", "date"]))
    left, right = draw(st.permutations(range(3)))[:2]
    return f"{kind}{left} {draw(st.sampled_from(['<', '<=', '>', '>=']))} {kind}{right}"


@st.composite
def implications(draw: st.DrawFn, columns: dict[str, dict[str, Any]]) -> str:
    first = draw(st.sampled_from(["a", "b", "c", "died"]))
    then = draw(st.sampled_from([name for name in columns if name != first]))
    start = f"if {first} = {draw(st.sampled_from(LEVELS[:2]))} then {then}"
    nullable = columns[then]["nullable"]
    if "minimum" in columns[then] or (nullable and draw(st.booleans())):
        return start + (" is missing" if nullable and draw(st.booleans()) else " is not missing")
    return f"{start} = {' or '.join(draw(st.sets(st.sampled_from(LEVELS[:2]), min_size=1, max_size=2)))}"


@st.composite
def schemas(draw: st.DrawFn) -> TableSchema:
    """Three columns of each numeric kind and three with levels, some sensitive, a target, and rules between them."""
    columns = {name: draw(numbers(name, kind)) for name, kind in NUMBERS}
    for name in ("a", "b", "c"):
        kind = draw(st.sampled_from(["categorical", "ordinal"]))
        role = draw(st.sampled_from(["feature", "sensitive"]))
        columns[name] = {
            "name": name,
            "kind": kind,
            "role": role,
            "categories": LEVELS,
            "nullable": draw(st.booleans()),
        }
    columns["died"] = {
        "name": "died", "kind": "boolean", "role": "target", "categories": LEVELS[:2], "nullable": False,
    }  # fmt: skip
    rules = draw(st.lists(st.one_of(comparisons(), implications(columns)), max_size=7, unique=True))
    try:
        return TableSchema.parse({"columns": [*columns.values()], "rules": rules})
    except SchemaError:  # rules that contradict each other are the subject of other tests
        assume(False)
        raise


@st.composite
def conditions(draw: st.DrawFn, schema: TableSchema) -> dict[str, str]:
    """Levels of some of the attributes."""
    asked = {}
    for column in schema.attributes:
        if draw(st.booleans()):
            asked[column.name] = draw(st.sampled_from(column.group_levels))
    return asked


def sampler(schema: TableSchema, asked: Constraint, seed: int) -> Callable[[Any], pd.DataFrame]:
    """Draws rows that follow conditions and no rule, as an untrained model would."""
    transform = TableTransform(schema)
    generator = np.random.default_rng(seed)

    def draw(rows: Any) -> pd.DataFrame:
        part = asked.rows(rows)
        z = np.clip(generator.normal(size=part.low.shape), part.low.numpy(), part.high.numpy())
        sizes = np.array(transform.layout.block_sizes, dtype=np.int64)
        codes = np.where(part.codes.numpy() >= 0, part.codes.numpy(), generator.integers(0, sizes, part.codes.shape))
        given = part.attributes[:, -1].numpy()
        labels = np.where(given >= 0, given, generator.integers(0, 2, len(given)))
        return transform.decode(torch.from_numpy(z), torch.from_numpy(codes), torch.from_numpy(labels))

    return draw


def follows(rule: str, row: dict[str, Any]) -> bool:
    """An independent reading of a rule on one row of plain values; None is missing."""
    words = rule.split()
    if words[0] != "if":
        left, right = row[words[0]], row[words[2]]
        if left is None or right is None:
            return True
        return {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[words[1]]
    if row[words[1]] != words[3]:
        return True
    value, rest = row[words[5]], words[6:]
    if rest[0] == "is":
        return (value is None) == (rest == ["is", "missing"])
    return value is None or value in rest[1::2]


def plain(table: pd.DataFrame, schema: TableSchema) -> list[dict[str, Any]]:
    """Rows as plain values: numbers of float32 columns as they print, levels as text."""

    def cell(value: Any, name: str) -> Any:
        if pd.isna(value):
            return None
        if name == "died":
            return LEVELS[int(value)]
        return np.float32(value) if isinstance(value, float | np.floating) else value

    return [{str(name): cell(value, str(name)) for name, value in row.items()} for row in table.to_dict("records")]


@settings(max_examples=60, deadline=None)
@given(schema=schemas(), data=st.data(), seed=st.integers(0, 1000))
def test_every_row_follows_every_rule_and_nothing_else_gives_way(
    schema: TableSchema, data: st.DataObject, seed: int
) -> None:
    asked = data.draw(conditions(schema), label="asked")
    transform = TableTransform(schema)
    try:
        constraint = transform.constrain(ROWS, asked)
    except SamplingError:
        assume(False)
        raise
    draw = sampler(schema, constraint, seed)
    first = draw(np.arange(ROWS))
    rows, repairs = follow_rules(first, schema, constraint.attributes.numpy(), draw)

    assert len(rows) == ROWS
    assert list(rows.index) == list(range(ROWS))
    assert rows.dtypes.to_dict() == first.dtypes.to_dict()
    assert not any(broken.any() for broken in broken_rows(rows, schema).values())
    assert all(follows(rule, row) for rule in schema.rules for row in plain(rows, schema))
    check_table(rows, schema)
    for name, level in asked.items():
        column = schema.column(name)
        assert (group_codes(rows, (column,)) == level_code(column, level)).all()
    for column in (c for c in schema.modelled if c.is_numeric and c.kind != "date"):
        values = rows[column.name].dropna().astype(float)
        assert values.between(np.float32(column.low), np.float32(column.high)).all()
        if column.step:
            assert np.allclose(values / column.step, np.round(values / column.step), atol=1e-2)
    untouched = ~np.any([*broken_rows(first, schema).values(), np.zeros(ROWS, dtype=bool)], axis=0)
    pd.testing.assert_frame_equal(rows[untouched], first[untouched])
    assert sum(repairs.redrawn.values()) >= (~untouched).sum()


RULED = TableSchema.parse(
    {
        "columns": [
            {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"], "nullable": False},
            {"name": "pregnant", "kind": "categorical", "role": "sensitive", "categories": ["no", "yes"]},
            {"name": "age", "kind": "integer", "role": "sensitive", "minimum": 0, "maximum": 99, "bins": [50]},
            {"name": "onset", "kind": "integer", "minimum": 0, "maximum": 99, "nullable": False},
            {"name": "low", "kind": "continuous", "minimum": 0, "maximum": 10, "decimals": 1, "nullable": False},
            {"name": "high", "kind": "continuous", "minimum": 0, "maximum": 10, "decimals": 1, "nullable": False},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ],
        "rules": [
            "if pregnant = yes then sex = F",
            "onset <= age",
            "low < high",
            "if died = True then age is not missing",
        ],
    }
)


def made(
    asked: dict[str, Any] | None = None, *, seed: int = 0, rows: int = 500
) -> tuple[pd.DataFrame, pd.DataFrame, Any]:
    constraint = TableTransform(RULED).constrain(rows, asked)
    draw = sampler(RULED, constraint, seed)
    first = draw(np.arange(rows))
    return first, *follow_rules(first, RULED, constraint.attributes.numpy(), draw)


def test_rows_that_nobody_repaired_break_the_rules() -> None:
    first, rows, repairs = made()
    before = {rule: int(broken.sum()) for rule, broken in broken_rows(first, RULED).items()}
    assert min(before.values()) > 10
    assert repairs.redrawn == before
    assert 0 < sum(repairs.repaired.values()) < sum(before.values())
    assert not any(broken.any() for broken in broken_rows(rows, RULED).values())
    assert len(repairs.lines) == 4


def test_rows_are_drawn_anew_a_fixed_number_of_times_and_only_broken_ones() -> None:
    constraint = TableTransform(RULED).constrain(100, None)
    draw = sampler(RULED, constraint, 0)
    first, calls = draw(np.arange(100)), []

    def stubborn(rows: Any) -> pd.DataFrame:
        calls.append(len(rows))
        return first.iloc[rows].reset_index(drop=True)

    rows, repairs = follow_rules(first, RULED, constraint.attributes.numpy(), stubborn)
    broken = np.any([*broken_rows(first, RULED).values()], axis=0)
    assert calls == [int(broken.sum())] * REDRAWS
    assert repairs.repaired == repairs.redrawn
    assert not any(bad.any() for bad in broken_rows(rows, RULED).values())


def test_a_repair_changes_no_more_than_it_has_to() -> None:
    constraint = TableTransform(RULED).constrain(50, None)
    first = sampler(RULED, constraint, 1)(np.arange(50)).assign(low=6.0, high=3.0)
    first["pregnant"] = pd.Categorical([None] * 50, categories=["no", "yes"])
    first["died"] = pd.array([False] * 50, dtype="boolean")
    first["onset"] = pd.array([0] * 50, dtype="Int64")
    rows, _ = follow_rules(first, RULED, constraint.attributes.numpy(), lambda numbers: first.iloc[numbers])
    pd.testing.assert_frame_equal(rows.drop(columns="high"), first.drop(columns="high"))
    assert (rows["high"] == 6.1).all()


def test_what_was_asked_for_stays() -> None:
    _, rows, _ = made({"age": "under 50", "pregnant": "yes", "died": True})
    assert (rows["age"] < 50).all()
    assert (rows["sex"] == "F").all()
    assert rows["died"].all()
    assert (rows["pregnant"] == "yes").all()
    _, rows, _ = made({"age": "missing"})
    assert rows["age"].isna().all()
    assert not rows["died"].any()


@pytest.mark.parametrize(
    ("asked", "rules"),
    [
        ({"sex": "M", "pregnant": "yes"}, "if pregnant = yes then sex = F"),
        ({"age": "missing", "died": True}, "onset <= age; if died = True then age is not missing"),
    ],
)
def test_a_contradiction_that_is_asked_for_is_refused_with_its_rule(asked: dict[str, Any], rules: str) -> None:
    with pytest.raises(SamplingError) as caught:
        TableTransform(RULED).constrain(3, asked)
    wanted = ", ".join(f"{name}={level}" for name, level in asked.items())
    assert str(caught.value) == f"no row with {wanted} can follow the schema's rules ({rules}): ask for other levels"


def test_bins_that_no_comparison_allows_are_refused_through_columns_in_between() -> None:
    ages = [
        {"name": name, "kind": "integer", "role": "sensitive", "minimum": 0, "maximum": 99, "bins": [50]}
        for name in ("age", "at_death")
    ]
    between = {"name": "onset", "kind": "integer", "minimum": 0, "maximum": 99}
    schema = TableSchema.parse({"columns": [*ages, between], "rules": ["age <= onset", "onset <= at_death"]})
    asked = np.array([[1, 0], [0, 1], [0, 0], [1, -1], [2, 0]])
    assert forbidden(asked, schema).tolist() == [True, False, False, False, False]


def test_a_table_that_breaks_a_rule_is_refused_with_the_number_of_rows() -> None:
    _, rows, _ = made(rows=60)
    check_table(rows, RULED)
    rows.loc[:2, "high"] = 0.0
    with pytest.raises(DataError) as caught:
        check_table(rows, RULED)
    assert [(p.code, p.rows, p.total) for p in caught.value.problems] == [("E601", 3, 60)]
    assert 'break the schema\'s rule "low < high"' in str(caught.value)


def test_a_file_that_breaks_a_rule_is_refused_and_a_missing_value_breaks_none(tmp_path: Path) -> None:
    _, rows, _ = made(rows=60)
    rows["age"] = rows["age"].mask(~rows["died"].astype(bool))
    rows.to_csv(tmp_path / "good.csv", index=False)
    report = inspect_table(tmp_path / "good.csv", RULED)
    assert report.problems == ()
    rows.assign(low=9.0, high=8.0, onset="soon").to_csv(tmp_path / "broken.csv", index=False)
    found = inspect_table(tmp_path / "broken.csv", RULED).problems
    assert [(problem.code, problem.rows) for problem in found] == [("E301", 60), ("E601", 60)]
    rows.drop(columns="low").to_csv(tmp_path / "part.csv", index=False)
    assert [problem.code for problem in inspect_table(tmp_path / "part.csv", RULED).problems] == ["E201"]

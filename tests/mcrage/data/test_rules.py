"""Rules are read from one line each, refused when they cannot be followed, and part of what hospitals agree on."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrage.data.column import MISSING, Column
from mcrage.data.rules import Comparison, Implication, Implications, orders, parse_rule, states, tighten
from mcrage.data.schema import TableSchema
from mcrage.errors import SchemaError

COLUMNS: list[dict[str, Any]] = [
    {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"], "nullable": False},
    {"name": "pregnant", "kind": "boolean", "categories": ["no", "yes"]},
    {"name": "therapy", "kind": "categorical", "categories": ["none", "drug", "day surgery"]},
    {"name": "admission", "kind": "date", "minimum": "2020-01-01", "maximum": "2022-12-31", "nullable": False},
    {"name": "discharge", "kind": "date", "minimum": "2020-01-01", "maximum": "2022-12-31"},
    {"name": "systolic", "kind": "integer", "minimum": 60, "maximum": 250},
    {"name": "diastolic", "kind": "integer", "minimum": 30, "maximum": 160},
    {"name": "dose", "kind": "integer", "minimum": 300, "maximum": 900},
    {"name": "lactate", "kind": "continuous", "minimum": 0, "maximum": 20},
    {"name": "patient", "kind": "text", "role": "patient_id"},
    {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
]
RULES = [
    "discharge >= admission",
    "diastolic < systolic",
    "if pregnant = yes then sex = F",
    "if therapy = 'day surgery' then discharge is not missing",
    "if died = True then therapy = none or drug",
]


def schema_of(*rules: str) -> TableSchema:
    return TableSchema.parse({"columns": COLUMNS, "rules": rules})


def refusal(*rules: str) -> str:
    with pytest.raises(SchemaError) as caught:
        schema_of(*rules)
    return str(caught.value)


def test_rules_read_as_they_are_said() -> None:
    assert parse_rule(" discharge>=admission ") == Comparison("discharge", ">=", "admission")
    assert parse_rule("if pregnant = yes then sex = F") == Implication("pregnant", "yes", "sex", ("F",))
    assert parse_rule("if a=b then c = d  or 'e or f'") == Implication("a", "b", "c", ("d", "e or f"))
    assert parse_rule("if a = b then c is missing") == Implication("a", "b", "c", is_missing=True)
    assert parse_rule("if a = '<30' then 'the c' is not missing") == Implication("a", "<30", "the c", is_missing=False)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1, max_size=12)


@given(
    rule=st.one_of(
        st.builds(Comparison, NAMES, st.sampled_from(["<", "<=", ">=", ">"]), NAMES),
        st.builds(Implication, NAMES, NAMES, NAMES, st.lists(NAMES, min_size=1, max_size=3).map(tuple)),
        st.builds(Implication, NAMES, NAMES, NAMES, is_missing=st.booleans()),
    )
)
def test_a_rule_of_any_names_comes_back_from_its_text(rule: Comparison | Implication) -> None:
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize(
    "text",
    ["", "a", "a =< b", "a = b", "a >= b >= c", "if a = b", "if a then b", "if a = b then c =", "length of stay > x"],
)
def test_what_is_no_rule_is_refused_with_an_example(text: str) -> None:
    message = refusal(text)
    assert message.startswith(f"rules: '{text}' is no rule: write one like \"discharge >= admission\"")
    assert "\n" not in message


REFUSED = {
    "weight > systolic": "there is no column 'weight'",
    "sex > systolic": "column 'sex' has kind 'categorical'; only numbers and dates are compared",
    "lactate > systolic": "kinds 'integer' and 'continuous' cannot be compared",
    "systolic > systolic": "it speaks of column 'systolic' alone",
    "if sex = F then sex = M": "it speaks of column 'sex' alone",
    "if sex = X then pregnant = no": "column 'sex' has no level 'X'; it has F, M",
    "if sex = F then pregnant = maybe": "column 'pregnant' has no level 'maybe'; it has no, yes",
    "if systolic = 100 then sex = F": "it starts from column 'systolic' of kind 'integer', which has no levels",
    "if sex = F then systolic = 100": "say only that it 'is missing' or 'is not missing'",
    "if sex = F then admission is missing": "column 'admission' is never missing",
    "if sex = F then patient is missing": "column 'patient' has role 'patient_id' and is not generated",
}


@pytest.mark.parametrize("rule", REFUSED)
def test_a_rule_that_does_not_fit_the_columns_is_refused_in_one_line(rule: str) -> None:
    message = refusal(rule)
    assert message.startswith(f'rule "{rule}": ')
    assert REFUSED[rule] in message
    assert "\n" not in message


def test_rules_that_contradict_each_other_are_refused() -> None:
    assert refusal("diastolic < systolic", "systolic < diastolic") == (
        "rules compare columns in a circle: systolic, diastolic"
    )
    assert "no value between minimum and maximum of column 'diastolic'" in refusal("dose < diastolic")
    assert refusal(RULES[2], "if pregnant = yes then sex = M") == (
        "rules leave no row with pregnant = yes: they contradict each other"
    )
    assert refusal("dose > systolic", "dose>systolic") == 'rule "dose > systolic" is there twice'


def test_rules_that_can_be_followed_are_accepted() -> None:
    schema = schema_of(*RULES)
    assert list(schema.rules) == RULES
    assert schema_of("systolic > diastolic", "systolic >= diastolic").rules


def test_rules_are_part_of_the_file_the_fingerprint_and_the_diff() -> None:
    schema, without = schema_of(*RULES), schema_of()
    assert TableSchema.parse(schema.to_json()) == schema
    assert "rules" not in without.to_json()
    assert schema.fingerprint not in (without.fingerprint, schema_of(*RULES[1:]).fingerprint)
    assert (
        schema.fingerprint
        == schema_of(*RULES[::-1]).fingerprint
        == schema_of("discharge>=admission", *RULES[1:]).fingerprint
    )
    assert schema.diff(schema_of(*RULES[::-1])) == []
    assert schema.diff(schema_of(*RULES[1:], "dose > systolic")) == [
        'rule "discharge >= admission" is missing there',
        'rule "dose > systolic" is there only',
    ]


NUMBERS = {
    name: Column(name=name, kind="continuous", minimum=0, maximum=10, decimals=decimals)
    for name, decimals in (("a", 1), ("b", 0), ("c", 2), ("d", None))
}


@given(
    pairs=st.lists(st.permutations("abcd").map(lambda names: sorted(names[:2])), min_size=1, max_size=4),
    operator=st.sampled_from(["<", "<="]),
    start=st.floats(0, 10),
)
def test_tightened_bounds_are_what_comparisons_leave(pairs: list[list[str]], operator: str, start: float) -> None:
    rules = [Comparison(low, operator, high) for low, high in pairs]
    low, high = ({name: np.array([bound]) for name in NUMBERS} for bound in (0.0, 10.0))
    low["a"][0] = start = round(start, 1)
    tighten(low, high, orders(NUMBERS, rules))
    for rule in rules:
        assert low[rule.right][0] > low[rule.left][0] or operator == "<="
        assert low[rule.right][0] >= low[rule.left][0]
        assert high[rule.right][0] >= high[rule.left][0]
        # no further than needed: each rule moves a bound by less than two steps of the coarsest column
    assert low["d"][0] <= start + 2 * len(rules)


LEVELS = {
    name: Column(name=name, kind="categorical", categories=("x", "y", "z"), nullable=nullable)
    for name, nullable in (("a", False), ("b", True), ("c", False), ("d", True))
}


@st.composite
def implications(draw: st.DrawFn) -> list[Implication]:
    def one() -> Implication:
        column, then = draw(st.permutations("abcd"))[:2]
        level = draw(st.sampled_from("xyz"))
        if LEVELS[then].nullable and draw(st.booleans()):
            return Implication(column, level, then, is_missing=draw(st.booleans()))
        return Implication(
            column, level, then, tuple(sorted(draw(st.sets(st.sampled_from("xyz"), min_size=1, max_size=2))))
        )

    return [one() for _ in range(draw(st.integers(1, 5)))]


@given(rules=implications(), data=st.data())
def test_the_nearest_row_is_one_of_the_nearest_that_enumeration_finds(
    rules: list[Implication], data: st.DataObject
) -> None:
    together = Implications(LEVELS, rules)
    names = list(together.columns)
    row = {name: data.draw(st.sampled_from(states(LEVELS[name])), label=name) for name in names}
    fixed = frozenset(data.draw(st.sets(st.sampled_from(names)), label="fixed"))
    changes = []
    for values in itertools.product(*(states(LEVELS[name]) for name in names)):
        other = dict(zip(names, values, strict=True))
        follows = all(other[rule.column] != rule.level or rule.allows(other[rule.then]) for rule in rules)
        if follows and all(other[name] == row[name] for name in fixed):
            changes.append(sum(other[name] != row[name] for name in names))
    found = together.nearest(row, fixed)
    assert (found is None) == (not changes)
    if found is not None:
        assert sum(found[name] != row[name] for name in names) == min(changes)
        assert all(found[name] == row[name] for name in fixed)
        assert all(found[rule.column] != rule.level or rule.allows(found[rule.then]) for rule in rules)


def test_a_feature_changes_before_a_sensitive_feature_and_a_missing_value_breaks_nothing() -> None:
    columns = {column.name: column for column in schema_of().columns}
    together = Implications(columns, [parse_rule(RULES[2])], preferred={"pregnant": ["no", MISSING, "yes"]})
    assert together.nearest({"pregnant": "yes", "sex": "M"}, frozenset()) == {"pregnant": "no", "sex": "M"}
    assert together.nearest({"pregnant": "yes", "sex": "M"}, frozenset({"pregnant"})) == {"pregnant": "yes", "sex": "F"}
    assert together.nearest({"pregnant": MISSING, "sex": "M"}, frozenset()) == {"pregnant": MISSING, "sex": "M"}


def test_entangled_rules_end_in_a_refusal_and_not_in_a_search_without_end() -> None:
    # colouring the edges of a graph of fourteen columns that all differ, with three levels each, is impossible
    names = [f"c{place}" for place in range(14)]
    columns = [
        {"name": name, "kind": "categorical", "categories": ["x", "y", "z"], "nullable": False} for name in names
    ]
    others = {"x": "y or z", "y": "x or z", "z": "x or y"}
    rules = [
        f"if {a} = {level} then {b} = {rest}"
        for a, b in itertools.combinations(names, 2)
        for level, rest in others.items()
    ]
    with pytest.raises(SchemaError, match="rules leave no row with c0 = x"):
        TableSchema.parse({"columns": columns, "rules": rules})

"""The data dictionary: what it accepts, what it refuses and in which words, and what its fingerprint covers."""

import json
from pathlib import Path
from typing import Any

import pytest

from mcrage.data.schema import Column, TableSchema, bin_names
from mcrage.errors import SchemaError

AGE = {"name": "age", "kind": "integer", "role": "sensitive", "minimum": 0, "maximum": 120, "bins": [45, 65]}
SEX = {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"], "nullable": False}
LAB = {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 50, "decimals": 1, "unit": "mmol/L"}
DAY = {"name": "day", "kind": "date", "minimum": "2000-01-01", "maximum": "2030-12-31"}
DIED = {"name": "died", "kind": "boolean", "role": "target", "nullable": False}
PATIENT = {"name": "patient", "kind": "text", "role": "patient_id"}
SITE = {"name": "site", "kind": "text", "role": "site"}
COLUMNS = [PATIENT, SITE, AGE, SEX, LAB, DAY, DIED]


def schema_of(*columns: dict[str, Any], **fields: Any) -> TableSchema:
    return TableSchema.parse({"columns": columns or COLUMNS, **fields})


def refusal(*columns: dict[str, Any], **fields: Any) -> str:
    with pytest.raises(SchemaError) as caught:
        TableSchema.parse({"columns": columns, **fields})
    return str(caught.value)


def test_roles_are_found_by_name_and_in_order() -> None:
    schema = schema_of()
    assert [column.name for column in schema.modelled] == ["age", "sex", "lab", "day", "died"]
    assert [column.name for column in schema.features] == ["age", "sex", "lab", "day"]
    assert [column.name for column in schema.sensitive] == ["age", "sex"]
    assert [column.name for column in schema.attributes] == ["age", "sex", "died"]
    assert schema.target.name == "died"
    assert schema.patient_id is not None
    assert schema.patient_id.name == "patient"
    assert schema.site is not None
    assert schema.site.name == "site"
    assert schema.column("lab").unit == "mmol/L"


def test_a_schema_without_label_has_none_and_says_so() -> None:
    schema = schema_of(AGE)
    assert not schema.has_target
    assert schema.patient_id is None
    assert schema.site is None
    assert [column.name for column in schema.attributes] == ["age"]
    with pytest.raises(SchemaError, match="no column with role 'target'"):
        _ = schema.target
    with pytest.raises(SchemaError, match="no column 'weight'; it has age"):
        schema.column("weight")


def test_a_column_knows_its_range_and_levels() -> None:
    schema = schema_of()
    age, lab, day, died = (schema.column(name) for name in ("age", "lab", "day", "died"))
    assert (age.low, age.high, age.step, lab.step) == (0, 120, 1, 0.1)
    assert (day.low, day.high, day.step) == (10957, 22279, 1)
    assert Column(name="x", kind="continuous", minimum=0, maximum=1).step == 0
    assert age.group_levels == ("under 45", "45 to 64", "65 and over", "missing")
    assert schema.column("sex").group_levels == ("F", "M")
    assert died.levels == ("False", "True")
    assert died.positive_level == "True"
    assert Column(**{**DIED, "categories": ["no", "yes"], "positive": "no"}).positive_level == "no"
    assert Column(name="x", kind="categorical", categories=("a",), other="OTHER").levels == ("a", "OTHER")
    assert Column(name="x", kind="categorical", categories=("a", "b"), other="a").levels == ("a", "b")
    with pytest.raises(SchemaError, match="without bounds"):
        _ = Column(name="x", kind="integer", role="ignored").low


def test_bins_are_named_in_words() -> None:
    assert bin_names((), integer=True) == ("any",)
    assert bin_names((45,), integer=True) == ("under 45", "45 and over")
    assert bin_names((0.5, 2, 3), integer=False) == ("under 0.5", "0.5 to under 2", "2 to under 3", "3 and over")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("continuous", "float64"),
        ("integer", "Int64"),
        ("categorical", "category"),
        ("ordinal", "category"),
        ("boolean", "boolean"),
        ("date", "datetime64[s]"),
        ("text", "str"),
    ],
)
def test_each_kind_has_a_dtype_that_can_be_missing(kind: Any, dtype: str) -> None:
    assert Column(name="x", kind=kind, role="ignored").pandas_dtype == dtype
    assert Column(name="x", kind=kind, role="ignored", dtype="object").pandas_dtype == "object"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "number without bounds": ({"kind": "continuous"}, "kind 'continuous' needs minimum and maximum"),
    "bounds the wrong way": ({**LAB, "minimum": 60}, "minimum 60.0 is not below maximum 50.0"),
    "endless bounds": ({**LAB, "maximum": float("inf")}, "not finite"),
    "bounds that are no number": ({**LAB, "minimum": float("nan")}, "minimum nan is not below"),
    "text as a number's bound": ({**LAB, "minimum": "low", "maximum": "high"}, "numbers need numbers"),
    "number as a date's bound": ({**DAY, "minimum": 0}, "dates need bounds"),
    "wrong date": ({**DAY, "maximum": "2030-02-30"}, "not dates written as YYYY-MM-DD"),
    "bad bounds of an ignored column": ({**DAY, "role": "ignored", "maximum": "soon"}, "not dates"),
    "bounds between integers": ({**AGE, "minimum": 0.5}, "more digits after the point than the column's values: none"),
    "bounds between decimals": ({**LAB, "maximum": 9.95}, "than the column's values: 1 decimals"),
    "decimals of an integer": ({**AGE, "decimals": 1}, "decimals belong to kind 'continuous'"),
    "bounds of a category": ({**SEX, "minimum": 0}, "kind 'categorical' has no minimum"),
    "scale of a category": ({**SEX, "scale": "log"}, "kind 'categorical' has no scale"),
    "bins of a category": ({**SEX, "bins": [1]}, "kind 'categorical' has no bins"),
    "category without categories": ({"kind": "categorical"}, "needs categories"),
    "category twice": ({**SEX, "categories": ["F", "F"]}, "a category is there twice"),
    "missing as a category": ({**SEX, "categories": ["F", "missing"]}, "list it under missing_codes"),
    "missing code as a category": ({**SEX, "missing_codes": ["F"]}, "'F' is a category and a missing code as well"),
    "categories of a number": ({**LAB, "categories": ["a"]}, "kind 'continuous' has no categories"),
    "boolean with three spellings": ({**DIED, "categories": ["a", "b", "A"]}, "two spellings"),
    "boolean with one spelling": ({**DIED, "categories": ["x", "X"]}, "two spellings"),
    "text as a feature": ({"kind": "text"}, "kind 'text' cannot be modelled"),
    "numeric target": ({**LAB, "role": "target", "nullable": False}, "the target needs exactly two levels"),
    "unknown positive level": ({**DIED, "positive": "dead"}, "positive is not one of the target's levels"),
    "nullable target": ({**DIED, "nullable": True}, "the target cannot be nullable"),
    "numeric group without bins": ({**LAB, "role": "sensitive"}, "needs bins, such as [45, 65]"),
    "bins of a feature": ({**AGE, "role": "feature"}, "bins belong to sensitive features"),
    "bins that fall": ({**AGE, "bins": [65, 45]}, "bins must rise"),
    "bins out of bounds": ({**AGE, "bins": [45, 165]}, "bins must lie within the bounds"),
    "bin that is empty": ({**AGE, "bins": [0, 45]}, "leave that cut point out"),
    "quantiles without grid": ({**LAB, "scale": "quantile"}, "scale 'quantile' and a grid go together"),
    "grid without quantiles": ({**LAB, "grid": [0, 50]}, "scale 'quantile' and a grid go together"),
    "grid that falls": ({**LAB, "scale": "quantile", "grid": [5, 4]}, "grid must rise"),
    "unknown dtype": ({**LAB, "dtype": "flaot64"}, "dtype 'flaot64' is not one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_column_that_contradicts_itself_is_refused_in_one_line(case: str) -> None:
    fields, words = REFUSED[case]
    message = refusal({"name": "x", **fields})
    assert words in message
    assert message.startswith(f"column '{fields.get('name', 'x')}': ")
    assert "\n" not in message


def test_every_column_problem_is_reported_at_once() -> None:
    message = refusal({"name": "a", "kind": "continuous"}, {"name": "b", "kind": "number", "colour": "red"})
    lines = message.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("column 'a': ")
    assert lines[1].startswith("columns.1.kind: Input should be 'continuous'")
    assert lines[2] == "columns.1.colour: Extra inputs are not permitted"


def test_a_table_that_contradicts_itself_is_refused() -> None:
    assert refusal(AGE, AGE) == "column 'age' is there twice"
    assert "role 'target' is given to 2 columns (died, dead)" in refusal(DIED, {**DIED, "name": "dead"})
    assert refusal(PATIENT) == "no column is a feature, a sensitive feature or the target"
    assert refusal().startswith("columns: ")
    assert refusal(AGE, hospital="A") == "hospital: Extra inputs are not permitted"


def test_what_is_not_a_schema_file_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    with pytest.raises(SchemaError, match=r"schema\.json' cannot be read: No such file"):
        TableSchema.load(path)
    path.write_text("{")
    with pytest.raises(SchemaError, match=r"schema\.json: Invalid JSON"):
        TableSchema.load(path)
    path.write_text(
        json.dumps({"columns": [{"name": "a", "kind": "continuous"}, {"name": "b", "kind": "categorical"}]})
    )
    with pytest.raises(SchemaError) as caught:
        TableSchema.load(path)
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [str(path)] * 2


def test_a_saved_schema_comes_back_equal(tmp_path: Path) -> None:
    schema = schema_of(name="ICU", version="3")
    schema.save(tmp_path / "schema.json")
    assert TableSchema.load(tmp_path / "schema.json") == schema
    assert ": null" not in (tmp_path / "schema.json").read_text()


def test_the_fingerprint_covers_what_matters_and_nothing_else() -> None:
    schema = schema_of()
    same = schema_of(
        *({**column, "description": "for people", "to_review": ["kind"]} for column in COLUMNS), name="x", version="9"
    )
    assert same.fingerprint == schema.fingerprint
    assert same.diff(schema) == []
    changes: list[dict[str, Any]] = [{"maximum": 51}, {"decimals": 2}, {"unit": "mg/dL"}, {"missing_codes": ["?"]}]
    fingerprints = {schema_of(*COLUMNS[:4], {**LAB, **change}, *COLUMNS[5:]).fingerprint for change in changes}
    assert len(fingerprints | {schema.fingerprint}) == len(changes) + 1
    assert schema_of(*COLUMNS[::-1]).fingerprint != schema.fingerprint


def test_the_diff_names_every_difference() -> None:
    ours = schema_of(AGE, SEX, LAB)
    theirs = schema_of(AGE, {**LAB, "maximum": 900, "unit": "mg/dL"}, DAY)
    assert ours.diff(theirs) == [
        "column 'sex' is missing there",
        "column 'day' is there only",
        "column 'lab': unit is 'mmol/L' here, 'mg/dL' there",
        "column 'lab': maximum is 50.0 here, 900.0 there",
    ]
    assert ours.diff(schema_of(LAB, SEX, AGE)) == [
        "the columns stand in another order: age, sex, lab here, lab, sex, age there"
    ]

"""Drafting a schema: the files it came from follow it, and a person is told what to review."""

import datetime as dt
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcrage.data.infer import draft_schema
from mcrage.data.reader import inspect_table
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import DataError, McrageError, SchemaError

ROWS = 80


def draft(tmp_path: Path, **columns: list[str]) -> TableSchema:
    pd.DataFrame(columns).to_csv(tmp_path / "site.csv", index=False)
    return draft_schema([tmp_path / "site.csv"])


def column(tmp_path: Path, *texts: str) -> Column:
    """The draft of one column, with its texts repeated."""
    repeated = [*texts] * (ROWS // len(texts) + 1)
    return draft(tmp_path, x=repeated, anchor=["a", *["b"] * (len(repeated) - 1)]).column("x")


@pytest.mark.parametrize(
    ("texts", "kind"),
    [
        (("true", "False"), "boolean"),
        (("Y", "n"), "boolean"),
        (("0", "1"), "boolean"),
        (("1", "2"), "categorical"),
        (("1", "2", "3"), "integer"),
        (("1.0", "2.0", "30."), "integer"),
        (("1.5", "-2", "1e-3"), "continuous"),
        (("2020-01-31", "1999-12-01"), "date"),
        (("31/01/2020", "01/12/1999"), "categorical"),
        (("007", "012"), "categorical"),
        (("A", "1"), "categorical"),
        (("1e300", "1"), "categorical"),
    ],
)
def test_the_kind_follows_from_the_texts(tmp_path: Path, texts: tuple[str, ...], kind: str) -> None:
    assert column(tmp_path, *texts).kind == kind


def test_every_field_taken_from_the_data_is_to_be_reviewed(tmp_path: Path) -> None:
    for texts in (("1", "2", "7", "?"), ("1.25", "9", "3"), ("a", "b", "None"), ("2020-01-31",), ("yes", "no")):
        drafted = column(tmp_path, *texts)
        written = set(drafted.model_dump(exclude_defaults=True)) - {"name", "to_review"}
        assert written <= set(drafted.to_review)
        assert {"kind", "nullable"} <= set(drafted.to_review)


def test_bounds_are_round_and_hold_the_data(tmp_path: Path) -> None:
    def bounds(*texts: str) -> tuple[object, object]:
        drafted = column(tmp_path, *texts)
        return drafted.minimum, drafted.maximum

    assert bounds("18", "97", "45") == (10, 100)
    assert bounds("0.5", "9.4", "3") == (0, 10)
    assert bounds("0.31", "0.38", "0.33") == (0.31, 0.38)
    assert bounds("-12", "1234", "7") == (-1000, 2000)
    assert bounds("5", "5", "5") == (5, 6)
    assert bounds("2020-05-31", "1999-02-01") == ("1999-01-01", "2020-12-31")


def test_decimals_are_those_of_the_longest_number(tmp_path: Path) -> None:
    assert column(tmp_path, "1.5", "2.25", "3").decimals == 2
    assert column(tmp_path, "1.5", "2e-7").decimals is None


def test_skewed_positive_numbers_are_spread_on_a_log_scale(tmp_path: Path) -> None:
    assert column(tmp_path, *["1", "2", "3"] * 20, "900").scale == "log"
    assert column(tmp_path, *["1", "2", "3"] * 20, "-900").scale == "linear"
    assert column(tmp_path, "1", "2", "3").scale == "linear"


def test_categories_are_sorted_and_take_unseen_ones_except_in_groups_and_target(tmp_path: Path) -> None:
    pd.DataFrame({"ward": ["C", "A", "B", "A"] * 20, "race": ["X", "Other"] * 40, "dead": ["n", "y"] * 40}).to_csv(
        tmp_path / "site.csv", index=False
    )
    plain = draft_schema([tmp_path / "site.csv"])
    assert plain.column("ward").categories == ("A", "B", "C")
    assert plain.column("ward").other == "OTHER"
    assert plain.column("race").other == "Other"
    grouped = draft_schema([tmp_path / "site.csv"], sensitive=["race"], target="dead")
    assert grouped.column("race").other is None
    assert grouped.target.levels == ("False", "True")


def test_missing_codes_are_found_and_listed(tmp_path: Path) -> None:
    drafted = column(tmp_path, "1", "2", "7", "?", "None", "")
    assert drafted.missing_codes == ("", "NA", "?", "None")
    assert drafted.nullable
    assert "missing_codes" in drafted.to_review
    assert not column(tmp_path, "1", "2", "7").nullable


def test_what_cannot_be_modelled_is_drafted_as_ignored(tmp_path: Path) -> None:
    schema = draft(
        tmp_path,
        anchor=["a", "b"] * 40,
        row=[str(n) for n in range(80)],
        hash=["9007199254740993", "-1"] * 40,
        story=[f"story {n}" for n in range(80)],
        empty=["", "NA"] * 40,
    )
    assert {column.name for column in schema.columns if column.role == "ignored"} == {"row", "hash", "story", "empty"}
    assert all(column.to_review == ("role",) for column in schema.columns if column.role == "ignored")


def test_roles_come_from_the_options(tmp_path: Path) -> None:
    pd.DataFrame(
        {
            "id": range(80),
            "age": range(20, 100),
            "ward": ["1", "2"] * 40,
            "out": ["home", "dead"] * 40,
            "rh": [0.5] * 80,
        }
    ).to_csv(tmp_path / "site.csv", index=False)
    schema = draft_schema([tmp_path / "site.csv"], target="out", sensitive=["age"], patient_id="id", site="ward")
    assert [column.role for column in schema.columns] == ["patient_id", "sensitive", "site", "target", "feature"]
    assert schema.column("age").bins == (40, 60, 80)
    assert schema.target.positive_level == "home"
    assert "positive" in schema.target.to_review


def test_bins_of_a_skewed_or_tiny_range_lie_inside_the_bounds(tmp_path: Path) -> None:
    def bins(*texts: str) -> tuple[float, ...]:
        repeated = [*texts] * 20
        pd.DataFrame({"x": repeated}).to_csv(tmp_path / "site.csv", index=False)
        return draft_schema([tmp_path / "site.csv"], sensitive=["x"]).column("x").bins

    assert bins(*["0"] * 8, "3", "9") == (4.5,)
    assert bins("0.1", "0.2", "0.3", "0.4") == (0.2, 0.25, 0.3)
    assert bins("1", "2", "3", "4") == (2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "ward"}, "column 'ward' has 3 levels; recode the target to two"),
        ({"target": "absent"}, "no file has the column absent; check its spelling"),
        ({"sensitive": ["story"]}, "'story' is empty or free text"),
        ({"sensitive": ["empty"]}, "'empty' is empty or free text"),
        ({"sensitive": ["day"]}, "'day' is a date"),
    ],
)
def test_a_role_that_does_not_fit_is_refused_in_words(tmp_path: Path, options: dict[str, object], words: str) -> None:
    days = [str(dt.date(2020, 1, 1) + dt.timedelta(days=n)) for n in range(90)]
    pd.DataFrame(
        {"ward": ["A", "B", "C"] * 30, "story": [f"s{n}" for n in range(90)], "day": days, "empty": ""}
    ).to_csv(tmp_path / "site.csv", index=False)
    with pytest.raises(SchemaError, match=words):
        draft_schema([tmp_path / "site.csv"], **options)  # type: ignore[arg-type]


def test_several_files_give_one_schema_that_holds_them_all(tmp_path: Path) -> None:
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    pd.DataFrame({"x": ["1", "2", "3"] * 30, "ward": ["A"] * 90, "only": ["a"] * 90}).to_csv(first, index=False)
    pd.DataFrame({"ward": ["B"] * 90, "x": ["50", "2.5", ""] * 30}).to_csv(second, index=False)
    schema = draft_schema([first, second])
    assert schema.column("x").kind == "continuous"
    assert schema.column("ward").categories == ("A", "B")
    assert schema.column("only").role == "ignored"
    assert schema.column("only").description == "Only in 1 of 2 files."
    for path in (first, second):
        assert inspect_table(path, schema).problems == ()


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    cases = {"absent.csv": (None, "E101"), "ragged.csv": ("a,b\n1\n", "E110"), "twice.csv": ("a,a\n1,2\n", "E204")}
    for name, (content, code) in cases.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=f"{name}: {code}"):
            draft_schema([tmp_path / name])


def test_a_column_without_a_name_is_left_out(tmp_path: Path) -> None:
    pd.DataFrame({"x": ["yes", "no"] * 40}).to_csv(tmp_path / "site.csv")
    assert [column.name for column in draft_schema([tmp_path / "site.csv"]).columns] == ["x"]


cells = st.one_of(
    st.integers(-(10**20), 10**20).map(str),
    st.integers(0, 99).map(str),
    st.floats().map(repr),
    st.dates().map(str),
    st.sampled_from(["", "NA", "?", "yes", "no", "1e400", "007", "Ä"]),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=st.lists(cells, min_size=1, max_size=8))
def test_a_file_follows_the_schema_drafted_from_it(tmp_path: Path, values: list[str]) -> None:
    path = tmp_path / "site.csv"
    repeated = values * (ROWS // len(values) + 1)
    pd.DataFrame({"x": repeated, "anchor": ["a", *["b"] * (len(repeated) - 1)]}).to_csv(path, index=False)
    report = inspect_table(path, draft_schema([path]))
    assert report.problems == ()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=60))
def test_no_file_breaks_the_draft(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "site.csv"
    path.write_bytes(b"a,b\n1,2\n" + content)
    try:
        drafted = draft_schema([path])
    except McrageError:
        return
    assert {column.name for column in drafted.columns} == {"a", "b"}


REAL = {
    "heart-failure/heart_failure_clinical_records_dataset.csv": {"target": "DEATH_EVENT", "sensitive": ["sex", "age"]},
    "patient-treatment/data-ori.csv": {"target": "SOURCE", "sensitive": ["SEX", "AGE"]},
    "eicu-demo/patient.csv.gz": {"sensitive": ["ethnicity", "gender"], "patient_id": "uniquepid"},
}


@pytest.mark.skipif("MCRAGE_DATA" not in os.environ, reason="MCRAGE_DATA does not name the folder of public data sets")
@pytest.mark.parametrize("name", REAL)
def test_real_clinical_tables_follow_their_draft(name: str) -> None:
    path = Path(os.environ["MCRAGE_DATA"]) / name
    schema = draft_schema([path], **REAL[name])  # type: ignore[arg-type]
    report = inspect_table(path, schema)
    assert report.problems == ()
    assert report.table is not None
    assert TableSchema.parse(schema.to_json()) == schema

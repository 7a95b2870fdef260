"""Reading: every case of a broken file gets its code, all at once, and no message shows a cell."""

import gzip
import io
import os
import time
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcrage.data.infer import draft_schema
from mcrage.data.problems import NOTES
from mcrage.data.reader import MINIMUM_ROWS, inspect_table, read_table
from mcrage.data.schema import TableSchema
from mcrage.errors import DataError

ROWS = 60
SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "patient", "kind": "text", "role": "patient_id", "nullable": False},
            {"name": "age", "kind": "integer", "role": "sensitive", "minimum": 0, "maximum": 120, "bins": [45, 65]},
            {"name": "sex", "kind": "categorical", "role": "sensitive", "categories": ["F", "M"]},
            {"name": "weight", "kind": "continuous", "minimum": 20, "maximum": 300, "unit": "kg", "decimals": 1},
            {"name": "visits", "kind": "integer", "minimum": 0, "maximum": 2**62, "nullable": False},
            {"name": "drug", "kind": "categorical", "categories": ["diet", "statin", "Bêta"], "other": "OTHER"},
            {"name": "stage", "kind": "ordinal", "categories": ["1", "2", "3"]},
            {"name": "smoker", "kind": "boolean", "categories": ["never", "ever"]},
            {"name": "admitted", "kind": "date", "minimum": "2000-01-01", "maximum": "2030-12-31"},
            {"name": "notes", "kind": "text", "role": "ignored"},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)
TABLE = pd.DataFrame(
    {
        "patient": [f"00{n}" for n in range(ROWS)],
        "age": [str(20 + n) for n in range(ROWS)],
        "sex": ["F", "M"] * (ROWS // 2),
        "weight": [f"{50 + n}.5" for n in range(ROWS)],
        "visits": ["3"] * ROWS,
        "drug": ["diet", "statin", "Bêta"] * (ROWS // 3),
        "stage": ["1", "2", "3"] * (ROWS // 3),
        "smoker": ["never", "ever"] * (ROWS // 2),
        "admitted": ["2020-02-29"] * ROWS,
        "notes": ["stable"] * ROWS,
        "died": ["no", "yes", "no"] * (ROWS // 3),
    }
)


def text_of(table: pd.DataFrame) -> str:
    return table.to_csv(index=False)


def with_cells(column: str, *texts: str, table: pd.DataFrame = TABLE) -> str:
    """The CSV text with the first cells of a column replaced."""
    changed = table.copy()
    changed.loc[: len(texts) - 1, column] = list(texts)
    return text_of(changed)


def found(tmp_path: Path, content: str | bytes, *, name: str = "site.csv") -> dict[str, int]:
    """Rows by code over everything that reading found."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    report = inspect_table(path, SCHEMA)
    assert (report.table is None) == bool(report.problems)
    assert all(problem.code not in NOTES for problem in report.problems)
    assert all(note.code in NOTES for note in report.notes)
    return {problem.code: problem.rows for problem in (*report.problems, *report.notes)}


def test_a_good_table_comes_back_in_the_schemas_columns_order_and_dtypes(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    shuffled = TABLE[sorted(TABLE)].assign(extra="x")
    shuffled.to_csv(path, index=False)

    table = read_table(path, SCHEMA)

    assert [*table] == [column.name for column in SCHEMA.columns if column.role != "ignored"]
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {
        "patient": "str",
        "age": "Int64",
        "sex": "category",
        "weight": "float64",
        "visits": "Int64",
        "drug": "category",
        "stage": "category",
        "smoker": "boolean",
        "admitted": "datetime64[s]",
        "died": "boolean",
    }
    assert table["drug"].cat.categories.tolist() == ["diet", "statin", "Bêta", "OTHER"]
    assert table["stage"].cat.ordered
    assert table.loc[1].to_dict() == {
        "patient": "001",
        "age": 21,
        "sex": "M",
        "weight": 51.5,
        "visits": 3,
        "drug": "statin",
        "stage": "2",
        "smoker": True,
        "admitted": pd.Timestamp("2020-02-29"),
        "died": True,
    }


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("site.csv", text_of(TABLE))
    return buffer.getvalue()


GOOD = text_of(TABLE)
LINES = GOOD.splitlines(keepends=True)
BROKEN_FILES: dict[str, tuple[str | bytes, dict[str, int]]] = {
    "empty": ("", {"E106": 0}),
    "header only": (LINES[0], {"E107": 0}),
    "gzip named csv": (gzip.compress(GOOD.encode()), {"E104": 0}),
    "zip named csv": (zipped(), {"E104": 0}),
    "UTF-16": (GOOD.encode("utf-16"), {"E103": 0}),
    "Latin-1": (GOOD.encode("latin-1"), {"E103": 0}),
    "NUL bytes": (GOOD.replace("stable", "sta\0ble"), {"E108": 0}),
    "semicolons": (GOOD.replace(",", ";"), {"E105": 0}),
    "tabs": (GOOD.replace(",", "\t"), {"E105": 0}),
    "ragged long row": (GOOD.replace("stable", "stable, at home", 2), {"E109": 2}),
    "ragged short row": ("".join(LINES[:-1]) + LINES[-1].rpartition(",")[0], {"E110": 1}),
    "unclosed quote": (GOOD.replace("stable", '"stable', 1), {"E111": 0}),
    "repeated header": (GOOD + LINES[0], {"E112": 1}),
    "duplicate header": (GOOD.replace("notes", "age"), {"E204": 0}),
    "no header": ("".join(LINES[1:]), {"E206": 0}),
    "too few rows": ("".join(LINES[:MINIMUM_ROWS]), {"E502": MINIMUM_ROWS - 1}),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_gets_its_code(tmp_path: Path, case: str) -> None:
    content, expected = BROKEN_FILES[case]
    assert found(tmp_path, content) == expected


BROKEN_COLUMNS: dict[str, tuple[str, dict[str, int]]] = {
    "feature missing": (text_of(TABLE.drop(columns="weight")), {"E201": 0}),
    "target missing": (text_of(TABLE.drop(columns="died")), {"E202": 0}),
    "sensitive missing": (text_of(TABLE.drop(columns="sex")), {"E203": 0}),
    "header with spaces": (text_of(TABLE.rename(columns={"age": " age"})), {"E203": 0, "E220": 0}),
    "header with no-break space": (text_of(TABLE.rename(columns={"age": "age\u00a0"})), {"E203": 0, "E220": 0}),
    "header in capitals": (text_of(TABLE.rename(columns={"weight": "Weight"})), {"E201": 0, "E220": 0}),
    "unnamed column": (TABLE.to_csv(), {"E221": 0}),
    "extra column": (text_of(TABLE.assign(ward="A")), {"E220": 0}),
    "target cell missing": (with_cells("died", "", "NA"), {"E208": 2}),
    "not nullable but missing": (with_cells("visits", ""), {"E207": 1}),
    "missing in a way that is not listed": (with_cells("weight", "null", "?", "."), {"E210": 3}),
    "missing category that is not listed": (with_cells("drug", "None"), {"E210": 1}),
    "column empty": (with_cells("weight", *[""] * ROWS), {"E222": ROWS}),
    "text for a number": (with_cells("weight", "heavy"), {"E301": 1}),
    "number with unit": (with_cells("weight", "70 kg", "> 89", "12%", "$5"), {"E302": 4}),
    "decimal comma": (with_cells("weight", "70,5", "1.070,5"), {"E303": 2}),
    "thousands separator": (with_cells("visits", "1,000", "1,000,000"), {"E304": 2}),
    "infinite": (with_cells("weight", "inf", "-Infinity", "1e400"), {"E305": 3}),
    "not a number": (with_cells("weight", "NaN"), {"E210": 1}),
    "outside the bounds": (with_cells("age", "-1", "121"), {"E306": 2}),
    "another unit": (with_cells("weight", *["15000"] * 40), {"E312": 40}),
    "fraction in an integer column": (with_cells("visits", "3.5", "1e3"), {"E307": 2}),
    "beyond 64 bits": (with_cells("visits", "9223372036854775808", "9" * 5000), {"E308": 2}),
    "another date format": (with_cells("admitted", "29/02/2020", "29.02.20", "2020"), {"E401": 3}),
    "impossible date": (with_cells("admitted", "2021-02-29", "2021-13-01"), {"E402": 2}),
    "date beyond the bound": (with_cells("admitted", "2031-01-01", "1999-12-31"), {"E403": 2}),
    "unseen category": (with_cells("sex", "X", "Y", "X"), {"E404": 3}),
    "unseen category into other": (with_cells("drug", "aspirin", "heparin"), {"E405": 2}),
    "more than 5 % unseen": (with_cells("drug", *["aspirin"] * 4), {"E510": 4}),
    "case twins": (with_cells("sex", "f", "m"), {"E406": 2}),
    "codes written as decimals": (with_cells("stage", "1.0", "2.00"), {"E406": 2}),
    "not a boolean": (with_cells("smoker", "sometimes"), {"E408": 1}),
    "one outcome": (with_cells("died", *["no"] * ROWS), {"E501": ROWS}),
}


@pytest.mark.parametrize("case", BROKEN_COLUMNS)
def test_a_broken_column_gets_its_code(tmp_path: Path, case: str) -> None:
    content, expected = BROKEN_COLUMNS[case]
    assert found(tmp_path, content) == expected


def test_free_text_in_a_category_column_is_named_so(tmp_path: Path) -> None:
    long = pd.concat([TABLE] * 5, ignore_index=True)
    essays = [f"story {n}" for n in range(250)]
    assert found(tmp_path, with_cells("sex", *essays, table=long)) == {"E407": 250}
    assert found(tmp_path, with_cells("drug", *essays, table=long)) == {"E407": 250}


ACCEPTED: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: text.encode("utf-8-sig"),
    "carriage returns only": lambda text: text.replace("\n", "\r").encode(),
    "mixed line ends": lambda text: text.replace("\n", "\r\n", 20).encode(),
    "blank lines": lambda text: text.replace("\n", "\n\n", 5).encode(),
    "quoted fields": lambda text: text.replace("stable", '"said ""stable"", and\nleft"').encode(),
    "spaces around": lambda text: text.replace("stable,", "stable,  ").replace(",F,", ", F\u00a0,").encode(),
    "decomposed accents": lambda text: unicodedata.normalize("NFD", text).encode(),
    "whole numbers with a zero fraction": lambda text: text.replace(",3,", ",3.0,").encode(),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_another_way_to_write_the_same_table_is_read_the_same(tmp_path: Path, case: str) -> None:
    (tmp_path / "plain.csv").write_text(GOOD, encoding="utf-8")
    (tmp_path / "other.csv").write_bytes(ACCEPTED[case](GOOD))
    pd.testing.assert_frame_equal(
        read_table(tmp_path / "other.csv", SCHEMA), read_table(tmp_path / "plain.csv", SCHEMA)
    )


def test_whole_numbers_beyond_the_precision_of_floats_stay_exact(tmp_path: Path) -> None:
    exact = [2**53 + 1, 2**62 - 1, -0]
    (tmp_path / "site.csv").write_text(with_cells("visits", *map(str, exact)), encoding="utf-8")
    assert read_table(tmp_path / "site.csv", SCHEMA)["visits"][:3].tolist() == exact


def test_every_problem_is_reported_at_once_with_what_to_do(tmp_path: Path) -> None:
    table = TABLE.copy().rename(columns={"weight": "Weight "})
    table.loc[:2, "age"] = ["200", "200", "forty"]
    table.loc[:1, "died"] = ["", "perhaps"]
    path = tmp_path / "site.csv"
    table.to_csv(path, index=False)

    with pytest.raises(DataError) as caught:
        read_table(path, SCHEMA)

    assert str(caught.value).splitlines() == [
        f"{path}: E201 column 'weight': is missing from the file. Column 4 of the file differs from it in spaces or "
        "letter case only: rename that one.",
        f"{path}: E301 column 'age': 1 of 60 rows not a number. Correct them, or list the spelling of a missing value "
        "under missing_codes.",
        f"{path}: E306 column 'age': 2 of 60 rows outside 0 to 120. Correct them at the source, or widen the bounds "
        "in the schema.",
        f"{path}: E208 column 'died': 1 of 60 rows without an outcome. Take rows without an outcome out of the file.",
        f"{path}: E408 column 'died': 1 of 60 rows neither true nor false. Use true and false, yes and no, 1 and 0, "
        "or False and True.",
    ]


def test_a_similar_header_is_pointed_out_by_its_position(tmp_path: Path) -> None:
    path = tmp_path / "site.csv"
    TABLE.rename(columns={"admitted": "admited"}).to_csv(path, index=False)
    (problem,) = inspect_table(path, SCHEMA).problems
    assert problem.remedy == "Column 9 of the file has a similar name: if it is the one, rename it."


@pytest.mark.parametrize(("dtype", "fits"), [("Int32", True), ("float64", True), ("int64", False), ("str", True)])
def test_a_dtype_of_the_schema_that_cannot_be_missing_is_a_problem(tmp_path: Path, dtype: str, fits: bool) -> None:
    schema = TableSchema.parse(
        {"columns": [{"name": "age", "kind": "integer", "minimum": 0, "maximum": 120, "dtype": dtype}]}
    )
    (tmp_path / "site.csv").write_text("age\n" + "NA\n" + "40\n" * 60)
    report = inspect_table(tmp_path / "site.csv", schema)
    assert [problem.code for problem in report.problems] == ([] if fits else ["E209"])
    assert report.table is None or str(report.table["age"].dtype) == dtype


def test_a_column_that_is_not_modelled_needs_no_bounds(tmp_path: Path) -> None:
    schema = TableSchema.parse(
        {"columns": [{"name": "id", "kind": "integer", "role": "patient_id"}, {"name": "x", "kind": "boolean"}]}
    )
    (tmp_path / "site.csv").write_text("id,x\n" + "".join(f"{2**60 + n},1\n" for n in range(ROWS)))
    assert read_table(tmp_path / "site.csv", schema)["id"].tolist() == [2**60 + n for n in range(ROWS)]


# Parquet


def typed_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": pd.array([2**53 + 1 + n for n in range(ROWS)], dtype="Int64"),
            "age": pd.array([None, *range(21, 20 + ROWS)], dtype="Int64"),
            "sex": pd.Categorical(["F", "M"] * (ROWS // 2)),
            "weight": [np.nan, 1 / 3 + 60, *[70.5] * (ROWS - 2)],
            "visits": pd.array([2**62 - 1] * ROWS, dtype="int64"),
            "drug": ["diet", None, "statin"] * (ROWS // 3),
            "stage": [1.0, 2.0, np.nan] * (ROWS // 3),
            "smoker": pd.array([True, False, None] * (ROWS // 3), dtype="boolean"),
            "admitted": pd.Series(["2020-02-29", None, "1970-01-01"] * (ROWS // 3), dtype="datetime64[s]"),
            "notes": [["a", "list"]] * ROWS,
            "died": [True, False] * (ROWS // 2),
        }
    )


def test_parquet_is_read_exactly(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    path = tmp_path / "site.parquet"
    wide = SCHEMA.model_dump(mode="json")
    wide["columns"][8] |= {"minimum": "1900-01-01", "date_format": "%d/%m/%Y"}
    typed_table().to_parquet(path)

    table = read_table(path, TableSchema.parse(wide))

    assert table["patient"][:2].tolist() == ["9007199254740993", "9007199254740994"]
    assert table["weight"].isna()[0]
    assert table["weight"][1] == 1 / 3 + 60
    assert table["visits"][0] == 2**62 - 1
    assert table["stage"][:2].tolist() == ["1", "2"]
    assert table["drug"].isna().sum() == table["smoker"].isna().sum() == ROWS // 3
    assert table["admitted"][:3].tolist() == [pd.Timestamp("2020-02-29"), pd.NaT, pd.Timestamp("1970-01-01")]
    assert table["age"].isna()[0]
    assert table["died"][:2].tolist() == [True, False]


def test_a_parquet_column_that_is_no_cell_is_a_problem_only_where_it_is_needed(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    path = tmp_path / "site.parquet"
    typed_table().assign(sex=[["F"]] * ROWS, admitted=TABLE["admitted"]).to_parquet(path)
    assert {problem.code for problem in inspect_table(path, SCHEMA).problems} == {"E114"}


# What no file may do


def corruptions(size: int) -> st.SearchStrategy[list[tuple[str, int, int, bytes]]]:
    kind = st.sampled_from(["delete", "insert", "repeat", "flip"])
    place = st.integers(0, size - 1)
    junk = st.one_of(
        st.binary(max_size=8),
        st.sampled_from([b'"', b",", b"\n", b"\r\n", b"\0", b"\xff", b";", b"1e999", b"-", b"''"]),
    )
    return st.lists(st.tuples(kind, place, st.integers(1, 400), junk), min_size=1, max_size=6)


def corrupt(content: bytes, changes: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, start, length, junk in changes:
        stop = start + length
        replacement = {
            "delete": b"",
            "insert": junk + content[start:stop],
            "repeat": content[start:stop] * 2,
            "flip": bytes(byte ^ 0x15 for byte in content[start:stop]),
        }[kind]
        content = content[:start] + replacement + content[stop:]
    return content


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=10_000)
@given(changes=corruptions(len(GOOD.encode())))
def test_a_corrupted_file_gives_a_table_or_coded_problems(
    tmp_path: Path, changes: list[tuple[str, int, int, bytes]]
) -> None:
    path = tmp_path / "site.csv"
    path.write_bytes(corrupt(GOOD.encode(), changes))
    report = inspect_table(path, SCHEMA)
    if report.table is None:
        assert report.problems
    else:
        assert [*report.table] == [column.name for column in SCHEMA.columns if column.role != "ignored"]
        assert report.table["age"].dropna().between(0, 120).all()


CANARY = "CANARY"
CANARIES = [
    text_of(TABLE.assign(**{name: [f"PHI_{CANARY}_{n}" for n in range(ROWS)] for name in TABLE})),
    text_of(TABLE.assign(**{name: [f"{n} {CANARY}" for n in range(ROWS)] for name in TABLE})),
]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=10_000)
@given(content=st.sampled_from(CANARIES), changes=corruptions(len(CANARIES[1])))
def test_no_message_ever_shows_a_cell(tmp_path: Path, content: str, changes: list[tuple[str, int, int, bytes]]) -> None:
    path = tmp_path / "site.csv"
    path.write_bytes(corrupt(content.encode(), changes))
    report = inspect_table(path, SCHEMA)
    assert CANARY not in "\n".join(map(str, (*report.problems, *report.notes)))


def test_the_canaries_reach_the_parsers(tmp_path: Path) -> None:
    codes = set(found(tmp_path, CANARIES[0])) | set(found(tmp_path, CANARIES[1]))
    assert {"E301", "E302", "E401", "E404", "E408", "E510"} <= codes


@pytest.mark.slow
@pytest.mark.skipif("MCRAGE_DATA" not in os.environ, reason="MCRAGE_DATA does not name the folder of public data sets")
def test_a_hundred_thousand_real_rows_are_read_in_seconds() -> None:
    path = Path(os.environ["MCRAGE_DATA"]) / "diabetes130" / "diabetic_data.csv.gz"
    schema = draft_schema([path], sensitive=["race", "gender", "age"], patient_id="patient_nbr")
    start = time.process_time()
    table = read_table(path, schema)
    assert time.process_time() - start < 20
    assert table.shape == (101_766, 45)
    assert table["race"].isna().sum() == 2_273
    assert (table["A1Cresult"].isna().sum(), table["time_in_hospital"].sum()) == (84_748, 447_362)

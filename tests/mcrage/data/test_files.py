"""Files as text: nothing is inferred, nothing is rounded, and what cannot be read says why."""

import datetime as dt
import gzip
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mcrage.data.files import read_text
from mcrage.errors import DataError

CONTENT = "id,x\n007,1E5\n008,NA\n"


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_text(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("site.csv", CONTENT.encode()),
        ("SITE.CSV", CONTENT.encode("utf-8-sig")),
        ("site.v2.csv.gz", gzip.compress(CONTENT.encode(), mtime=0)),
        ("site.tsv", CONTENT.replace(",", "\t").encode()),
    ],
)
def test_texts_come_as_they_stand(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    texts = read_text(tmp_path / name)
    assert texts.header == ("id", "x")
    assert [cells.tolist() for cells in texts.cells] == [["007", "008"], ["1E5", "NA"]]
    assert (texts.total, texts.problems) == (2, ())


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("site.csv", b" \n\n", "E106 the file is empty. Export it again."),
        ("site.csv", b"PAR1", "E104 the file is not a table that can be read: it is a Parquet file. Name it .parquet."),
        (
            "site.csv",
            b"\xd0\xcf\x11\xe0",
            "E104 the file is not a table that can be read: it is an old Excel workbook. ",
        ),
        ("site.sas7bdat", b"a,b", "E104 the file is not a table that can be read: its name does not say what it is. "),
        ("site", b"a,b", "E104 the file is not a table that can be read: its name does not say what it is. "),
        ("site.csv.gz", b"a,b", "E104 the file is not a table that can be read: it is not compressed with gzip, or "),
        (
            "site.csv.gz",
            gzip.compress(b"a,b" * 99, mtime=0)[:-9],
            "E104 the file is not a table that can be read: it is not comp",
        ),
        (
            "site.csv",
            "a,b\nJosé,1".encode("latin-1"),
            "E103 the file is not UTF-8 text: the first wrong byte is number 7.",
        ),
        ("site.csv", b"a,b\n1,\0", "E108 NUL bytes, the first one at byte 6. "),
        ("site.csv", b"a|b\n1|2\n", "E105 the fields are parted by vertical bars, not by commas. "),
        ("site.tsv", b"a,b\n1,2\n", "E105 the fields are parted by commas, not by tabs. "),
        (
            "site.csv",
            b'a,b\n1,2\n1,"2"2\n',
            "E111 a quoted field is not closed, or text follows its closing quote, in the ",
        ),
        ("site.csv", b"a,b\n1," + b"2" * 200_000, "E111 "),
        (
            "site.parquet",
            b"PAR1",
            "E104 the file is not a table that can be read: it is not a Parquet file, or is damaged. ",
        ),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    assert refusal(tmp_path / name).startswith(line)


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent.csv") == "E101 there is no such file. Check the path."
    assert refusal(tmp_path).startswith("E102 the file cannot be opened: is a directory. ")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="an administrator may read every file")
def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    (tmp_path / "site.csv").write_text(CONTENT)
    (tmp_path / "site.csv").chmod(0)
    assert refusal(tmp_path / "site.csv").startswith("E102 the file cannot be opened: permission denied. ")


def test_rows_that_do_not_fit_the_header_are_counted_and_left_out(tmp_path: Path) -> None:
    (tmp_path / "site.csv").write_text("a,b\n1,2\n3\n4,5,6\n\na,b\n7,8,9\n10,11\n")
    texts = read_text(tmp_path / "site.csv")
    assert [cells.tolist() for cells in texts.cells] == [["1", "10"], ["2", "11"]]
    assert texts.total == 6
    assert [(problem.code, problem.rows) for problem in texts.problems] == [("E109", 2), ("E110", 1), ("E112", 1)]
    assert [problem.rule.rpartition(" ")[2] for problem in texts.problems] == ["4", "3", "6"]


# Parquet


def written(path: Path, **columns: tuple[list[Any], Any]) -> Path:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs pyarrow")
    pq.write_table(pa.table({name: pa.array(values, type=kind) for name, (values, kind) in columns.items()}), path)
    return path


def test_typed_values_become_texts_without_loss(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    path = written(
        tmp_path / "site.parquet",
        whole=([2**63 - 1, -(2**63), None], pa.int64()),
        floats=([0.1, 1 / 3, float("nan")], pa.float64()),
        codes=([1.0, -2.0, float("nan")], pa.float64()),
        huge=([1e300, 2.0**53, None], pa.float64()),
        flags=([True, False, None], pa.bool_()),
        levels=(["a", "b", None], pa.dictionary(pa.int8(), pa.string())),
        days=([dt.date(2020, 2, 29), dt.date(1850, 1, 1), None], pa.date32()),
        times=([dt.datetime(2020, 2, 29, 23, 59), None, None], pa.timestamp("us")),
        nothing=([None, None, None], pa.null()),
    )
    texts = read_text(path)
    assert {name: cells.tolist() for name, cells in zip(texts.header, texts.cells, strict=True)} == {
        "whole": ["9223372036854775807", "-9223372036854775808", None],
        "floats": ["0.1", repr(1 / 3), None],
        "codes": ["1", "-2", None],
        "huge": ["1e+300", "9.007199254740992e+15", None],
        "flags": ["true", "false", None],
        "levels": ["a", "b", None],
        "days": ["2020-02-29", "1850-01-01", None],
        "times": ["2020-02-29", None, None],
        "nothing": [None, None, None],
    }
    assert [texts.header[place] for place in sorted(texts.iso_dates)] == ["days", "times"]
    assert texts.problems == ()


def test_a_column_of_lists_is_a_problem_of_that_column(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    path = written(tmp_path / "site.parquet", notes=([["a"], ["b"]], pa.list_(pa.string())), x=([1, 2], pa.int8()))
    texts = read_text(path)
    assert [str(problem) for problem in texts.problems] == [
        "E114 column 'notes': holds list<element: string> in the Parquet file. "
        "Export it as a number, text, boolean or date."
    ]
    assert texts.cells[1].tolist() == ["1", "2"]


def test_parquet_without_rows_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    assert refusal(written(tmp_path / "site.parquet", x=([], pa.int8()))).startswith("E107 ")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "site.parquet").write_bytes(b"PAR1")
    assert refusal(tmp_path / "site.parquet") == (
        "E113 reading Parquet needs pyarrow, which is not installed. Run: pip install 'mcrage[data]'."
    )

"""The command line: exit codes, one line per problem on stderr, no traceback, and a fast --help."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import mcrage
from mcrage import cli
from mcrage.data.reader import read_table
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError

ROWS = 60


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.csv"
    pd.DataFrame(
        {
            "patient": [f"P{n}" for n in range(ROWS)],
            "age": [str(20 + n) for n in range(ROWS)],
            "race": ["Black", "White"] * (ROWS // 2),
            "died": ["no", "yes", "no"] * (ROWS // 3),
        }
    ).to_csv(path, index=False)
    return path


class Ran:
    """What one run of the command gave."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["mcrage", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return Ran(int(caught.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def schema(run, site: Path) -> Path:  # type: ignore[no-untyped-def]
    out = site.with_name("schema.json")
    options = ("--target", "died", "--sensitive", "race, age", "--patient-id", "patient")
    assert run("schema", "infer", site, "--out", out, *options).code == 0
    return out


def test_help_is_fast_and_imports_no_heavy_library() -> None:
    program = (
        "import sys; from mcrage.cli import main; sys.argv = ['mcrage', '--help']\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'pandas', 'numpy', 'sklearn', 'pydantic'} & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Commands:" in shown
    assert shown.endswith("[]\n")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_version_is_shown(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--version").out == f"mcrage {mcrage.__version__}\n"


def test_infer_writes_a_schema_that_the_file_follows(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    drafted = TableSchema.load(schema)
    assert [column.role for column in drafted.columns] == ["patient_id", "sensitive", "sensitive", "target"]
    checked = run("schema", "check", schema, site)
    assert checked.code == 0
    assert f"{site}: 60 rows follow the schema" in checked.out
    assert "drafted from data and not reviewed yet: age, race, died" in checked.err


def test_infer_names_what_to_review_and_does_not_replace_a_file(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    before = schema.read_text()
    refused = run("schema", "infer", site, "--out", schema)
    assert (refused.code, schema.read_text()) == (2, before)
    assert refused.err == f"'{schema}' is there already; give --force to replace it\n"
    forced = run("schema", "infer", site, "--out", schema, "--force")
    assert forced.code == 0
    assert "column 'race' (categorical, feature): to review: kind, categories, other, nullable\n" in forced.err
    assert run("schema", "infer", site, "--out", site / "below.json").code == 2


def test_check_prints_every_problem_of_every_file_on_a_line(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    broken = site.with_name("broken.csv")
    broken.write_text(site.read_text().replace("P3,23,White", "P3,old,white").replace("P4,24,Black", "P4,24,Asian"))
    checked = run("schema", "check", schema, site, broken, site.with_name("absent.csv"))
    assert checked.code == 2
    assert [line for line in checked.err.splitlines() if ".csv" in line] == [
        f"{broken}: E301 column 'age': 1 of 60 rows not a number. Correct them, or list the spelling of a missing "
        "value under missing_codes.",
        f"{broken}: E404 column 'race': 1 of 60 rows with a category that the schema does not list (1 different). "
        "Correct the spelling, add the categories to the schema, or name a level for them under other.",
        f"{broken}: note E406 column 'race': 1 of 60 rows with a category in another spelling (letter case, or .0 "
        "after a code), read as the schema's. Nothing to do.",
        f"{site.with_name('absent.csv')}: E101 there is no such file. Check the path.",
    ]


def test_check_as_json_is_for_programs(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    shown = run("schema", "check", schema, site, site.with_name("absent.csv"), "--json")
    result = json.loads(shown.out)
    assert shown.code == 2
    assert result["fingerprint"] == TableSchema.load(schema).fingerprint
    assert [[problem["code"] for problem in table["problems"]] for table in result["files"]] == [[], ["E101"]]
    assert set(result["to_review"]) == {"age", "race", "died"}


def test_a_broken_schema_is_reported_line_by_line(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "schema.json"
    path.write_text('{"columns": [{"name": "a", "kind": "continuous"}, {"name": "b", "kind": "categorical"}]}')
    shown = run("schema", "check", path)
    assert shown.code == 2
    assert len(shown.err.splitlines()) == 2
    assert all(line.startswith(f"{path}: column '") for line in shown.err.splitlines())


def test_diff_exits_with_0_for_equal_and_1_for_different_schemas(run, schema: Path) -> None:  # type: ignore[no-untyped-def]
    other = schema.with_name("other.json")
    other.write_text(schema.read_text().replace('"Black"', '"African American"'))
    assert run("schema", "diff", schema, schema).code == 0
    differ = run("schema", "diff", schema, other)
    assert differ.code == 1
    assert differ.out.startswith("column 'race': categories is ['Black', 'White'] here")
    assert run("schema", "diff", schema, schema.with_name("absent.json")).code == 2


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["schema", "check"], ["sample", "model", "--n", "0", "--out", "x.csv"]]
)
def test_wrong_usage_exits_with_2(run, arguments: list[str]) -> None:  # type: ignore[no-untyped-def]
    assert run(*arguments).code == 2


def test_an_unforeseen_error_shows_neither_its_text_nor_a_traceback(
    run, monkeypatch: pytest.MonkeyPatch, schema: Path
) -> None:  # type: ignore[no-untyped-def]
    def fail(_: Path) -> TableSchema:
        raise KeyError("MRN 00412")

    monkeypatch.setattr(TableSchema, "load", fail)
    shown = run("schema", "check", schema)
    assert (shown.code, shown.err) == (1, "unexpected KeyError; set MCRAGE_DEBUG=1 to see where\n")
    monkeypatch.setenv("MCRAGE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["mcrage", "schema", "check", str(schema)])
    with pytest.raises(KeyError):
        cli.main()


def test_csv_cells_that_a_spreadsheet_would_run_are_defused(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "text": ["=1+1", "+1", "-1", "@x", "\tx", "\rx", "plain", None],
            "level": pd.Categorical(["=A", "B"] * 4),
            "number": [-1.5] * 8,
            "flag": pd.array([True, None] * 4, dtype="boolean"),
        }
    )
    cli.write_rows(rows, tmp_path / "rows.csv")
    back = pd.read_csv(tmp_path / "rows.csv", dtype=str, keep_default_na=False)
    assert back["text"].tolist() == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "'\rx", "plain", ""]
    assert back["level"].tolist() == ["'=A", "B"] * 4
    assert back["number"].tolist() == ["-1.5"] * 8
    assert back["flag"].tolist() == ["True", ""] * 4


def test_fit_and_sample_go_from_a_file_to_a_file(run, site: Path, schema: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model, out = tmp_path / "model", tmp_path / "rows.csv"
    trained = run("fit", site, "--schema", schema, "--out", model, "--steps", 20, "--seed", 1)
    assert trained.code == 0, trained.err
    assert trained.out == f"{model}: trained on 60 rows for 20 steps\n"
    where = ("--where", "race=Black", "--where", "died=True", "--where", "age=50")
    drawn = run("sample", model, "--n", 50, *where, "--out", out)
    assert drawn.code == 0, drawn.err
    rows = pd.read_csv(out, dtype=str)
    assert (len(rows), set(rows["race"]), set(rows["died"])) == (50, {"Black"}, {"True"})
    assert [*rows] == ["age", "race", "died"]
    assert rows["age"].astype(int).between(50, 64).all()

    unknown = run("sample", model, "--n", 5, "--where", "race=Martian", "--out", tmp_path / "more.csv")
    assert (unknown.code, unknown.err) == (2, "column 'race' has no level 'Martian'; it has Black, White\n")
    assert run("sample", model, "--n", 5, "--where", "ward=A", "--out", tmp_path / "more.csv").code == 2


def test_rules_are_checked_in_files_and_what_they_did_to_rows_is_said(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    rule = "if race = Black then died = False"
    ruled, model, out = (site.with_name(name) for name in ("ruled.json", "ruled", "ruled.csv"))
    ruled.write_text(json.dumps(json.loads(schema.read_text()) | {"rules": [rule]}))
    broken = run("schema", "check", ruled, site)
    assert broken.code == 2
    assert f'E601 10 of 60 rows break the schema\'s rule "{rule}". Correct them at the source' in broken.err
    kept = [line for line in site.read_text().splitlines() if not line.endswith("Black,yes")]
    site.with_name("kept.csv").write_text("\n".join(kept) + "\n")
    assert run("fit", site.with_name("kept.csv"), "--schema", ruled, "--out", model, "--steps", 2).code == 0
    drawn = run("sample", model, "--n", 200, "--out", out)
    assert drawn.code == 0, drawn.err
    assert f'{out}: note rule "{rule}": ' in drawn.err
    rows = pd.read_csv(out, dtype=str)
    assert not ((rows["race"] == "Black") & (rows["died"] == "True")).any()
    asked = run("sample", model, "--n", 2, "--where", "race=Black", "--where", "died=True", "--out", "rows.csv")
    assert (asked.code, asked.err.count("\n")) == (2, 1)


def test_fit_says_that_the_length_is_a_default_and_what_changes_it(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    model = site.with_name("model")
    trained = run("fit", site, "--schema", schema, "--out", model)
    assert trained.err.startswith("training 60 steps (the default for 60 rows; steps changes it)\n")
    assert trained.out == f"{model}: trained on 60 rows for 60 steps, the default for so many; --steps changes it\n"


def test_sample_refuses_what_it_cannot_draw(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "rows.csv"
    for where in (["race"], ["=Black"], ["race=Black", "race=White"]):
        options = [part for text in where for part in ("--where", text)]
        shown = run("sample", tmp_path / "model", "--n", 5, "--out", out, *options)
        assert (shown.code, shown.err.count("\n")) == (2, 1)
    assert run("sample", tmp_path / "model", "--n", 5, "--out", tmp_path / "rows.xlsx").code == 2
    assert run("sample", tmp_path / "absent", "--n", 5, "--out", out).code == 2


def test_fit_refuses_a_table_that_does_not_follow_the_schema(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    site.write_text(site.read_text().replace("yes", "perhaps"))
    shown = run("fit", site, "--schema", schema, "--out", site.with_name("model"))
    assert shown.code == 2
    assert shown.err.startswith(f"{site}: E408 column 'died': 20 of 60 rows neither true nor false.")


def test_notes_are_shown_before_training(run, site: Path, schema: Path) -> None:  # type: ignore[no-untyped-def]
    site.write_text(site.read_text().replace("Black", "black", 1))
    shown = run("fit", site, "--schema", schema, "--out", site.with_name("model"), "--steps", 1)
    assert shown.code == 0
    assert f"{site}: note E406 column 'race': 1 of 60 rows" in shown.err


def test_rows_that_cannot_be_written_are_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.DataFrame({"x": [1]})
    with pytest.raises(ConfigError, match=r"rows\.csv' cannot be written: "):
        cli.write_rows(rows, tmp_path / "absent" / "rows.csv")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match="needs pyarrow"):
        cli.write_rows(rows, tmp_path / "rows.parquet")


def test_a_table_written_as_parquet_is_read_back_the_same(site: Path, schema: Path) -> None:
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    table = read_table(site, TableSchema.load(schema))
    cli.write_rows(table, site.with_suffix(".parquet"))
    pd.testing.assert_frame_equal(read_table(site.with_suffix(".parquet"), TableSchema.load(schema)), table)

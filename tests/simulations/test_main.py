"""``python -m simulations``: options reach the experiment, and what is wrong is one line and exit code 2."""

from pathlib import Path

import pytest

from simulations.__main__ import main


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    return int(ended.value.code or 0), output.out, output.err


def assert_one_line(error: str) -> None:
    assert len(error.strip().splitlines()) == 1, error
    assert "Traceback" not in error


def test_a_dry_run_prints_all_settings_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--rounds", "7", "--set", "target_multiple=2.5", "--set", "strategy=fedprox", "--dry-run"]
    code, text, _ = said(capsys, "demo", "--out", str(out), *options)
    assert code == 0
    for line in ("num_server_rounds = 7", "target_multiple = 2.5", "strategy = fedprox", "seed = 0"):
        assert line in text.splitlines()
    assert not out.exists()


def test_sites_writes_the_files_that_flower_needs(capsys: pytest.CaptureFixture[str], site_dir: Path) -> None:
    code, text, error = said(capsys, "sites", "--help")
    assert code == 0
    assert "schema.json" in text + error


def test_an_unknown_data_set_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = said(capsys, "demo", "--dataset", "nothing", "--out", str(tmp_path / "out"))
    assert code == 2
    assert_one_line(error)
    assert "there is no data set 'nothing'" in error
    assert "cohort" in error


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("no-such=1", "there is no such setting"),
        ("local_steps=0", "greater than or equal to 1"),
        ("local_steps=many", "valid integer"),
        ("target_multiple=-1", "greater than 0"),
        ("target_multiple", "KEY=VALUE"),
    ],
)
def test_a_wrong_setting_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, setting: str, problem: str
) -> None:
    code, _, error = said(capsys, "demo", "--out", str(tmp_path / "out"), "--set", setting)
    assert code == 2
    assert_one_line(error)
    assert problem in error
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = said(capsys, "demo", "--roundz", "3")
    assert code == 2
    assert "roundz" in error
    assert "Traceback" not in error


def test_a_missing_file_is_one_line(capsys: pytest.CaptureFixture[str], site_dir: Path, tmp_path: Path) -> None:
    schema, there = str(site_dir / "schema.json"), str(site_dir / "site-01.csv")
    code, _, error = said(capsys, "run", "--schema", schema, there, str(tmp_path / "nowhere.csv"))
    assert code == 2
    assert_one_line(error)
    assert "nowhere.csv" in error


def test_a_file_that_does_not_follow_the_schema_gives_a_line_per_problem_and_no_value(
    capsys: pytest.CaptureFixture[str], site_dir: Path, tmp_path: Path
) -> None:
    good = site_dir / "site-01.csv"
    bad = tmp_path / "bad.csv"
    header, first, *rest = (site_dir / "site-02.csv").read_text().splitlines()
    patient, *cells = first.split(",")
    bad.write_text("\n".join([header, ",".join([patient, "SECRET", *cells[1:]]), *rest]) + "\n")
    schema = str(site_dir / "schema.json")
    code, _, error = said(capsys, "run", "--schema", schema, str(good), str(bad), "--out", str(tmp_path / "out"))
    assert code == 2
    assert_one_line(error)
    assert "column 'sex'" in error
    assert "SECRET" not in error


def test_a_schema_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], site_dir: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text("not json")
    code, _, error = said(capsys, "run", "--schema", str(schema), str(site_dir / "site-01.csv"))
    assert code == 2
    assert_one_line(error)


def test_a_single_hospital_is_no_federation(capsys: pytest.CaptureFixture[str], site_dir: Path) -> None:
    schema = str(site_dir / "schema.json")
    code, _, error = said(capsys, "run", "--schema", schema, str(site_dir / "site-01.csv"), "--dry-run")
    assert code == 2
    assert_one_line(error)
    assert "at least 2 hospitals" in error


def test_a_comparison_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text('dataset = "cohort"\nseeds = [0\n')
    for path in (broken, tmp_path / "nowhere.toml"):
        code, _, error = said(capsys, "compare", str(path))
        assert code == 2
        assert_one_line(error)
        assert path.name in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--epsilon", "one"], "expected numbers"),
        (["--generator", "gan"], "generator: expected some of"),
        (["--set", "shared.dp_epsilon=3"], "the command sets it"),
        (["--dataset", "heart-disease", "--sites", "3", "--generator", "marginal", "--dry-run"], "of its own"),
    ],
)
def test_a_privacy_budget_that_cannot_be_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], problem: str
) -> None:
    out = tmp_path / "out"
    code, _, error = said(capsys, "privacy-budget", "--out", str(out), *options)
    assert code == 2
    assert_one_line(error)
    assert problem in error
    assert not out.exists()


def test_a_dry_run_of_a_privacy_budget_lists_cells_with_their_epsilon(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ["--sites", "2", "--patients", "30", "--generator", "marginal", "--epsilon", "1", "--epsilon", "inf"]
    code, text, _ = said(capsys, "privacy-budget", "--out", str(out), *options, "--dry-run")
    assert code == 0
    lines = text.splitlines()
    assert lines[1].startswith("cohort-2x30-seed0-marginal-local-eps1: epsilon at most 1.00, about ")
    assert lines[4].startswith("4 cells of 2 hospitals, about ")
    assert lines[-1].startswith("marginal, shared noise, epsilon 1: expected: ")
    assert not out.exists()

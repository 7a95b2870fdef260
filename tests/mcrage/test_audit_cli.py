"""``mcrage audit attacks``: what it prints, where, and what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from mcrage import cli
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema

Rows = Callable[..., pd.DataFrame]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clinic_rows: Rows, clinic_schema: TableSchema) -> Path:
    """A model of 120 rows that it has seen too often, and the files around it."""
    place = tmp_path_factory.mktemp("audit")
    schema = clinic_schema.model_copy(update={"rules": ()})
    schema.save(place / "schema.json")
    for seed, name in enumerate(["members", "others", "reference"]):
        clinic_rows(120, seed).to_csv(place / f"{name}.csv", index=False)
    model = CDDPM(width=32, depth=2, steps=300, batch_size=64, learning_rate=5e-3).fit(clinic_rows(120, 0), schema)
    model.save(place / "model")
    model.sample(100).to_csv(place / "synthetic.csv", index=False)
    return place


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    def call(*more: object, **files: str) -> tuple[int, str, str]:
        named = {"members": "members.csv", "others": "others.csv", "schema": "schema.json"} | files
        options = [part for name, file in named.items() for part in (f"--{name}", folder / file)]
        arguments = ["mcrage", "audit", "attacks", folder / "model", *options, *more]
        monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        shown = capsys.readouterr()
        return int(caught.value.code or 0), shown.out, shown.err

    return call


def test_attacks_are_shown_as_a_table_that_a_terminal_holds(run: Run) -> None:
    code, out, err = run()
    assert code == 0
    assert err == "sampling 120 rows\n"
    assert max(map(len, out.splitlines())) <= 100
    assert "120 members, 120 others, 120 synthetic" in out
    assert "everyone (120 members, 120 others)" in out
    assert "  loss against reference   absent, needs a model trained on reference rows" in out
    assert "most encounters: 5 % with most rows\n  absent, every patient has as many rows\n" in out
    assert "An AUC of .5 is a guess." in out
    assert "claim" not in out


def test_reference_rows_train_a_second_model_and_make_the_density_ratio_possible(run: Run) -> None:
    code, out, err = run("--json", reference="reference.csv", synthetic="synthetic.csv")
    assert code == 0
    assert "training a reference model on 120 rows\n" in err
    assert "training 300 steps (as asked)" in err, "with the settings of the model"
    assert "sampling" not in err
    content = json.loads(out)
    assert content["rows"] == {"members": 120, "others": 120, "reference rows": 120, "synthetic": 100}
    assert content["claim"] is None
    everyone = content["subsets"][0]["attacks"]
    assert all(figures["auc"]["low"] <= figures["auc"]["value"] for figures in everyone.values())
    assert everyone["calibrated loss"]["auc"]["low"] > 0.5


def test_a_claim_stands_beside_the_figures(run: Run) -> None:
    said = "The claim of epsilon {} and delta 1e-05"
    weak, strong, void = (run("--epsilon", epsilon, "--delta", 1e-5)[1] for epsilon in (1, 0.001, 8))
    assert f"{said.format(1)} allows a true positive rate of 0.027.\n" in weak
    assert f"{said.format(8)} says nothing about the true positive rate: it allows 1.\n" in void
    assert f"{said.format(0.001)} allows a true positive rate of 0.010.\n" in strong
    assert "  calibrated loss on everyone exceeds it with its whole interval\n" in strong
    assert "No interval lies above it, which does not prove the claim." in run("--epsilon", 4, "--delta", 0.01)[1]
    claim = json.loads(run("--epsilon", 1, "--delta", 1e-5, "--json")[1])["claim"]
    assert (claim["epsilon"], claim["delta"], claim["says_nothing"]) == (1, 1e-5, False)


def test_the_same_seed_gives_the_same_figures_and_more_rows_can_be_asked_for(run: Run) -> None:
    first, again, other = (run("--json", "--seed", seed, "--sampled", 30)[1] for seed in (1, 1, 2))
    assert first == again != other
    assert json.loads(first)["rows"]["synthetic"] == 30


@pytest.mark.parametrize(
    ("options", "files", "message"),
    [
        (("--epsilon", 1), {}, "--epsilon and --delta make a claim together: give both or neither\n"),
        (("--epsilon", 0, "--delta", 0), {}, "--epsilon must be above 0 and --delta from 0 to below 1, got 0 and 0\n"),
        (("--sampled", 50), {"synthetic": "synthetic.csv"}, "--sampled is for rows that the model generates"),
        ((), {"others": "members.csv"}, "patients of the members are among the others"),
        ((), {"others": "absent.csv"}, "absent.csv: E101 there is no such file"),
        ((), {"schema": "members.csv"}, "members.csv: "),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    run: Run, options: tuple[object, ...], files: dict[str, str], message: str
) -> None:
    code, out, err = run(*options, **files)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_another_schema_than_the_models_is_refused(run: Run, folder: Path) -> None:
    (folder / "other.json").write_text((folder / "schema.json").read_text().replace('"medical"', '"general"'))
    code, _, err = run(schema="other.json")
    assert code == 2
    assert "other.json: not the model's schema: column 'ward': categories" in err


def test_help_names_the_verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mcrage", "audit", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "attacks  Ask of patients' rows" in capsys.readouterr().out

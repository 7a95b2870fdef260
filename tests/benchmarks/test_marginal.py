import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_epsilon_is_measured_beside_real_rows() -> None:
    options = ["--data", "cohort", "--patients", "3000", "--seeds", "1", "--epsilon", "0.5", "inf"]
    command = [sys.executable, "-m", "benchmarks.marginal", *options]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)

    real, private, exact = (json.loads(line) for line in done.stdout.splitlines())
    assert [line["rows"] for line in (real, private, exact)] == ["real", "epsilon 0.5", "epsilon inf"]
    assert private["epsilon"] <= 0.5
    assert exact["epsilon"] is None
    assert private["all_pairs"] < exact["all_pairs"] < real["all_pairs"] + 0.02
    assert private["detection"] > exact["detection"] > real["detection"]
    assert private["tstr"] < real["tstr"] + 0.02
    assert set(real["tstr_by_race"]) == {"White", "Hispanic", "Asian", "Black"}
    assert "| cohort | 3000 | epsilon 0.5 |" in done.stderr


@pytest.mark.slow
def test_another_split_of_the_budget_can_be_tried() -> None:
    shares = ["--shares", "0.5", "0.1", "0.4", "0", "0"]
    options = ["--data", "cohort", "--patients", "2000", "--seeds", "1", "--epsilon", "8", *shares]
    command = [sys.executable, "-m", "benchmarks.marginal", *options]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)

    assert json.loads(done.stdout.splitlines()[1])["edges"] == 0

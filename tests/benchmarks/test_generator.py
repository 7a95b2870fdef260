import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import generator

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_every_length_is_measured_beside_real_rows() -> None:
    options = ["--data", "cohort", "--steps", "3", "60", "--seeds", "1"]
    command = [sys.executable, "-m", "benchmarks.generator", *options]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=500)

    real, short, longer = (json.loads(line) for line in done.stdout.splitlines())
    assert real["rows"] == "real training rows"
    assert (short["rows"], longer["rows"]) == ("3 steps of 512", "60 steps of 512")
    assert short["detection"] > longer["detection"] > real["detection"]
    assert real["detection"] == pytest.approx(0.5, abs=0.03)
    assert "| real training rows | 1 |" in done.stderr


def test_the_wide_table_has_200_columns_that_depend_on_each_other() -> None:
    train, test, schema = generator.wide_tables()
    assert (len(train), len(test), len(schema.modelled)) == (20_000, 10_000, 200)
    assert np.abs(train[["n0", "n1", "n2", "n3"]].corr().to_numpy()[np.triu_indices(4, 1)]).max() > 0.2


def test_an_interval_over_seeds_is_that_of_student() -> None:
    assert generator.interval(np.array([0.5])) == "0.5000"
    assert generator.interval(np.array([0.4, 0.6])) == "0.5000 ± 1.2706"  # 12.706 times the standard error of .1

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.small_tables import models

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
def test_the_benchmark_shows_that_a_long_training_gives_more_away() -> None:
    options = ["--rows", "60", "--seeds", "1", "--passes", "20", "2000", "--set", "width=32", "--set", "batch_size=60"]
    command = [sys.executable, "-m", "benchmarks.small_tables", *options]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)

    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["model"] for line in lines] == ["real", "20 steps", "2000 steps"]
    _, short, long = lines
    assert long["attack_auc"] > 0.8 > short["attack_auc"]
    assert long["attack_auc"] == max(value for name, value in long.items() if name.endswith(" AUC"))
    last = done.stdout.splitlines()[-1].split()
    assert last[:2] == ["2000", "steps"]
    assert f"{long['attack_auc']:.3f}" in last


@pytest.mark.skipif("MCRAGE_DATA" not in os.environ, reason="MCRAGE_DATA names no folder of data sets")
def test_a_table_that_is_too_small_for_a_holdout_is_named_with_the_reason() -> None:
    (line,) = models("heart-disease", 400, 0, None, {})
    assert line == {"model": "none", "reason": "1200 rows are needed, there are 920"}

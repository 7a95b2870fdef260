"""The main job as a newcomer runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SECONDS, MEGABYTES = 180, 4096
LOADED = 3
"""Other work on the machine may make the job this much slower before its test fails."""


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * LOADED + 60)
def test_the_demo_ends_in_time_and_within_memory_with_a_table_a_report_and_a_gap_that_closes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "simulations", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=SECONDS * LOADED + 30)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["run"]["seconds"] < SECONDS * LOADED
    # the main process alone takes over 500 MB, and each of two workers as much: less means that they were not counted
    assert 1200 < results["run"]["peak_memory_mb"] < MEGABYTES
    assert "race=Black" in done.stdout
    assert done.stdout.splitlines()[-4:-1] == [
        str(tmp_path / name) for name in ("report.html", "results.json", "synthetic.csv")
    ]
    assert len([line for line in done.stderr.splitlines() if line.startswith("federation: round")]) >= 10
    verdicts = {
        verdict["verdict"]
        for verdict in results["verdicts"]
        if (verdict["site"], verdict["group"], verdict["arm"]) == ("all", "race=Black", "federated_target")
    }
    assert verdicts == {"helps"}
    assert {"report.html", "synthetic.csv", "synthetic.parquet", "model"} <= {path.name for path in tmp_path.iterdir()}

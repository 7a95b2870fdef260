"""Cells from hospitals to files: what they cost, that a kill loses no finished cell, and that settings never mix."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mcrage.errors import CheckpointError, ConfigError
from mcrage.files import lock_file
from simulations.privacy_budget.cells import Sweep, parse_settings
from simulations.privacy_budget.report import PAGE, TABLE
from simulations.privacy_budget.results import CellResult
from simulations.privacy_budget.run import all_cells, cell_path, run_sweep

ROOT = Path(__file__).parents[3]
TINY = ["width=8", "depth=1", "dp_draws=1", "modelled_rows=200", "target_multiple=0.5", "minority_floor=5"]
ROUNDS = 2


def sweep_of(generators: tuple[str, ...], epsilons: tuple[float, ...]) -> Sweep:
    given = parse_settings(TINY, rounds=ROUNDS)
    return Sweep(sites=3, patients=80, generators=generators, epsilons=epsilons, given=given)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cells of both generators. Tests must not write to it."""
    folder = tmp_path_factory.mktemp("sweep")
    run_sweep(sweep_of(("cddpm", "marginal"), (3.0, math.inf)), folder, num_workers=2, verbose=False)
    return folder


@pytest.mark.slow
def test_a_cell_has_the_epsilon_of_the_events_that_its_hospitals_were_charged_for(out: Path) -> None:
    private = [cell for cell in all_cells(out) if cell.cell.noise != "none"]
    assert len(private) == 4
    for cell in private:
        assert set(cell.events) == {"site-01", "site-02", "site-03"}
        assert cell.epsilon_spent is not None
        assert cell.epsilon_alone is not None
        assert cell.epsilon_spent == cell.recomputed() <= 3.0
        assert (cell.epsilon_alone > cell.epsilon_spent) == (cell.cell.noise == "shared")
        # one event more, and it is another epsilon
        more = {site: [*events, events[-1]] for site, events in cell.events.items()}
        assert cell.model_copy(update={"events": more}).recomputed() > cell.epsilon_spent
    steps = {cell.cell.noise: _steps(cell) for cell in private if cell.cell.generator == "cddpm"}
    assert steps == {"local": ROUNDS, "shared": ROUNDS}


def _steps(cell: CellResult) -> int:
    return sum(event["steps"] for event in cell.events["site-01"] if event["mechanism"] == "dp-sgd")


@pytest.mark.slow
def test_a_cell_without_noise_claims_nothing(out: Path) -> None:
    free = [cell for cell in all_cells(out) if cell.cell.epsilon is None and cell.cell.generator != "real"]
    assert {cell.cell.generator for cell in free} == {"cddpm", "marginal"}
    assert all(cell.epsilon_spent is None and math.isinf(cell.recomputed()) for cell in free)


@pytest.mark.slow
def test_every_cell_has_figures_for_everybody_for_groups_and_of_attacks(out: Path) -> None:
    for cell in all_cells(out):
        assert not cell.problem
        found = {(row.rows, row.group, row.metric) for row in cell.rows}
        expected = {
            ("federated", "all", "auroc"),
            ("federated", "race=Black", "tpr"),
            ("federated", "race", "auroc_gap"),
        }
        if cell.cell.generator == "real":
            expected = {(rows, "race=Black", "auroc") for rows in ("local", "pooled")}
        elif cell.cell.generator == "cddpm":
            expected |= {("federated", "all", "advantage_loss"), ("federated", "all", "advantage_rows")}
        else:
            expected |= {("federated", "all", "advantage_rows")}
        assert expected <= found
    assert not list((out / "work").glob("*"))


@pytest.mark.slow
def test_a_folder_of_cells_is_gone_on_with_only_when_asked_and_with_the_same_settings(out: Path) -> None:
    sweep = sweep_of(("marginal",), (3.0,))
    with pytest.raises(ConfigError, match="--resume"):
        run_sweep(sweep, out, verbose=False)
    other = replace(sweep, given=parse_settings([*TINY, "shared.dp_sample_rate=0.4"], rounds=ROUNDS))
    with pytest.raises(CheckpointError, match="other settings"):
        run_sweep(other, out, resume=True, verbose=False)


def test_a_folder_has_one_sweep_at_a_time(tmp_path: Path) -> None:
    lock = lock_file(tmp_path / ".lock")
    assert lock is not None
    with pytest.raises(ConfigError, match="another sweep works"):
        run_sweep(sweep_of(("marginal",), (3.0,)), tmp_path, verbose=False)
    os.close(lock)


@pytest.mark.slow
def test_what_cannot_be_trained_stands_in_its_cell_and_is_tried_again(tmp_path: Path) -> None:
    given = parse_settings([*TINY, "learning_rate=1e300"], rounds=1)
    sweep = replace(sweep_of(("cddpm",), (8.0,)), noises=("shared",), given=given)
    written = []
    for attempt in (False, True):
        cell, real = run_sweep(sweep, tmp_path, resume=attempt, num_workers=1, verbose=False)
        assert "not finite" in cell.problem
        assert not cell.rows
        assert real.rows
        written.append([cell_path(tmp_path, each).stat().st_mtime_ns for each in sweep.cells])
    assert [first == second for first, second in zip(*written, strict=True)] == [True, False]


@pytest.mark.slow
def test_a_kill_loses_the_cell_that_ran_and_no_other(tmp_path: Path) -> None:
    sweep = sweep_of(("marginal",), (1.0, 3.0, math.inf))
    options = [item for setting in TINY for item in ("--set", setting)]
    command = [sys.executable, "-m", "simulations", "privacy-budget", "--out", str(tmp_path), "--workers", "1"]
    command += ["--sites", "3", "--patients", "80", "--generator", "marginal", "--epsilon", "1,3,inf"]
    command += ["--rounds", str(ROUNDS), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while len(list((tmp_path / "cells").glob("*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").glob("*.json")}
    assert 2 <= len(before) < len(sweep.cells)
    done = subprocess.run(
        [*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all(cell_path(tmp_path, cell).exists() for cell in sweep.cells)
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"cell {len(before) + 1}/{len(sweep.cells)} cohort-3x80-seed0-marginal")
    assert "own rows" in done.stdout
    assert (tmp_path / PAGE).exists()
    assert (tmp_path / TABLE).exists()


def test_a_file_that_is_none_of_a_cell_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    for text in ("", "{", json.dumps({"cell": 1})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="not the file of a cell"):
            CellResult.read(path)

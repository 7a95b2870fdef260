"""What every peer's script does, in the peer's own environment: read, train, sample, and measure both.

    python run_PEER.py FOLDER --budget CPU_SECONDS --seed SEED --rows ROWS [--steps STEPS]

FOLDER has ``train.csv`` and ``columns.json`` (the names of the columns that are not numbers); ``rows.csv`` and
``measured.json`` are written there. Time is that of the processor, in this process and in those that it started.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.machine import cpu_seconds, peak_memory_mb

MISSING = "(missing)"

Sampler = Callable[[int], pd.DataFrame]


@dataclass(frozen=True)
class Task:
    """What a peer is asked to do.

    Attributes:
        table: Training rows: numbers, and levels as texts.
        categories: Names of the columns that are not numbers.
        budget: CPU seconds that training may take, as nearly as the peer allows.
        seed: Seed of everything that is random.
        folder: A place for files.
        steps: Steps or epochs in place of the budget, if given.
    """

    table: pd.DataFrame
    categories: list[str]
    budget: float
    seed: int
    folder: Path
    steps: int | None


def run(train: Callable[[Task], tuple[Sampler, int | None]]) -> None:
    """Runs a peer.

    Args:
        train: Gives what samples, and the number of rows trained on (passes over the table count each) if known.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--budget", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int)
    options = parser.parse_args()
    folder = options.folder
    names = json.loads((folder / "columns.json").read_text(encoding="utf-8"))
    # "None" and "NA" may be levels: only an empty cell is missing.
    table = pd.read_csv(folder / "train.csv", dtype=dict.fromkeys(names, object), keep_default_na=False, na_values=[""])
    task = Task(table, names, options.budget, options.seed, folder, options.steps)
    started = cpu_seconds()
    sample, rows_trained = train(task)
    trained = cpu_seconds()
    rows = sample(options.rows)
    sampled = cpu_seconds()
    rows.to_csv(folder / "rows.csv", index=False)
    measured = {
        "training_cpu_seconds": trained - started,
        "rows_trained": rows_trained,
        "sampling_cpu_seconds": sampled - trained,
        "rows": len(rows),
        "peak_memory_mb": peak_memory_mb(),
    }
    (folder / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


class EpochBudget:
    """Says after each epoch whether to stop: at the end of the epoch that lies nearest to the budget.

    Args:
        budget: CPU seconds from now on.
    """

    def __init__(self, budget: float) -> None:
        self._end = cpu_seconds() + budget
        self._epoch_started = cpu_seconds()

    def restart_epoch(self) -> None:
        """An epoch begins now: what came before is no part of it."""
        self._epoch_started = cpu_seconds()

    def is_over(self) -> bool:
        """Whether the budget is used up now."""
        return cpu_seconds() > self._end

    def is_spent(self) -> bool:
        """Whether another epoch, as long as the last, would end further from the budget than now."""
        now = cpu_seconds()
        epoch, self._epoch_started = now - self._epoch_started, now
        return now + epoch / 2 > self._end


def filled(task: Task) -> pd.DataFrame:
    """The training table with missing categories as a category, for peers that take no missing values."""
    return task.table.fillna(dict.fromkeys(task.categories, MISSING))

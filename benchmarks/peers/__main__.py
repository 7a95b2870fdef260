"""The generator and its peers on diabetes-130: time, memory, and the quality of their rows by the same measures.

    MCRAGE_DATA=… python -m benchmarks.peers [--peers mcrage mostlyai-engine ctgan imbalanced-learn] [--seeds 1]
        [--budgets 45 120] [--ctgan-budget 300] [--mcrage-steps 1500 4000] [--cache runs/peers]

Each peer trains in an environment of its own (made once under ``--cache``, pinned versions, about 1.5 GB for one with
torch), in a process of its own with one thread, on the same training rows, for a number of CPU seconds. A run is a JSON
line; one table of all runs comes last. What fails is a line with the reason.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from benchmarks.generator import quality, tables
from benchmarks.machine import describe, described, markdown
from benchmarks.peers.environments import REQUIREMENTS, EnvironmentFailedError, interpreter, pinned, reason
from benchmarks.peers.tables import categories, exported, restored
from mcrage import TableSchema, rng

ROOT = Path(__file__).parents[2]
RUNNERS = Path(__file__).parent / "runners"
PEERS = {
    "mcrage": "run_mcrage.py",
    "mostlyai-engine": "run_mostlyai.py",
    "ctgan": "run_ctgan.py",
    "imbalanced-learn": "run_smotenc.py",
}
ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LOKY_MAX_CPU_COUNT", "POLARS_MAX_THREADS"), "1"
)
CALIBRATION = (50, 250)


class RunFailedError(Exception):
    """A peer's process failed; the message is one line."""


@dataclass(frozen=True)
class Bench:
    """Where the rows are, and where environments and results go.

    Attributes:
        cache: Holds an environment and a folder of results per peer.
        train: Training rows as peers read them.
        names: Columns that are not numbers.
        schema: The data dictionary.
        rows: Rows to make.
    """

    cache: Path
    train: pd.DataFrame
    names: list[str]
    schema: TableSchema
    rows: int = 20_000

    def run(
        self, peer: str, *, budget: float, seed: int, steps: int | None = None, rows: int | None = None
    ) -> tuple[dict[str, float | None], pd.DataFrame]:
        """What a peer's process measured, and the rows that it made.

        Raises:
            RunFailedError: If the process fails.
            EnvironmentFailedError: If its environment cannot be made.
        """
        python = Path(sys.executable) if peer == "mcrage" else interpreter(peer, self.cache)
        folder = self.cache / "runs" / f"{peer}-{budget:g}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        self.train.to_csv(folder / "train.csv", index=False)
        (folder / "columns.json").write_text(json.dumps(self.names), encoding="utf-8")
        self.schema.save(folder / "schema.json")
        options = ["--budget", str(budget), "--seed", str(seed), "--rows", str(rows or self.rows)]
        options += ["--steps", str(steps)] if steps else []
        command = [str(python), str(RUNNERS / PEERS[peer]), str(folder), *options]
        environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunFailedError(reason(done))
        made = pd.read_csv(
            folder / "rows.csv", dtype=dict.fromkeys(self.names, object), keep_default_na=False, na_values=[""]
        )
        return json.loads((folder / "measured.json").read_text(encoding="utf-8")), made

    def steps_within(self, budget: float) -> int:
        """Steps of the generator that take about this many CPU seconds."""
        rest, per_step = self._cost
        return max(int((budget - rest) / per_step), 1)

    @cached_property
    def _cost(self) -> tuple[float, float]:
        """CPU seconds of the generator's training without its steps, and of a step, from two short trainings."""
        few, many = (
            self.run("mcrage", budget=0, seed=0, steps=steps, rows=1)[0]["training_cpu_seconds"] or 0.0
            for steps in CALIBRATION
        )
        per_step = (many - few) / (CALIBRATION[1] - CALIBRATION[0])
        return few - CALIBRATION[0] * per_step, per_step


def main() -> None:
    """Prints a JSON line per run, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budgets", type=float, nargs="+", default=[45.0, 120.0])
    parser.add_argument("--ctgan-budget", type=float, default=300.0)
    parser.add_argument("--mcrage-steps", type=int, nargs="+", help="steps for each budget instead of a short timing")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "peers")
    options = parser.parse_args()
    if options.mcrage_steps and len(options.mcrage_steps) != len(options.budgets):
        parser.error("--mcrage-steps needs as many numbers as --budgets")
    train, test, schema = tables()
    bench = Bench(options.cache, exported(train, schema), categories(schema), schema)
    real = train.iloc[rng.stream(0, "benchmark").permutation(len(train))]
    lines = [line("real training rows", None, None) | flat(quality(real, test, schema, seed=0))]
    print(json.dumps(describe()), json.dumps(lines[0]), sep="\n", flush=True)
    for peer in options.peers:
        budgets = {"ctgan": [options.ctgan_budget], "imbalanced-learn": [0.0]}.get(peer, options.budgets)
        steps = options.mcrage_steps if peer == "mcrage" else None
        for position, budget in enumerate(budgets):
            for seed in range(options.seeds):
                result = measured(bench, peer, budget, seed, steps[position] if steps else None, test)
                print(json.dumps(result), flush=True)
                lines.append(result)
    print("\n" + summary(lines))


def measured(
    bench: Bench, peer: str, budget: float, seed: int, steps: int | None, test: pd.DataFrame
) -> dict[str, object]:
    """The line of one run."""
    head = line(peer, budget or None, seed)
    try:
        if peer == "mcrage" and steps is None:
            steps = bench.steps_within(budget)
        cost, rows = bench.run(peer, budget=budget, seed=seed, steps=steps)
    except (EnvironmentFailedError, RunFailedError) as error:
        return head | {"failed": str(error)}
    training, trained, sampling = cost["training_cpu_seconds"], cost["rows_trained"], cost["sampling_cpu_seconds"]
    assert training is not None
    assert sampling is not None
    speed = {
        "training CPU-s": round(training, 1),
        "training rows/CPU-s": round(trained / training) if trained else None,
        "sampling rows/CPU-s": round(len(rows) / sampling),
        "peak MB": None if cost["peak_memory_mb"] is None else round(cost["peak_memory_mb"]),
    }
    return head | speed | flat(quality(restored(rows, bench.schema), test, bench.schema, seed=seed))


def line(peer: str, budget: float | None, seed: int | None) -> dict[str, object]:
    """What a run is called."""
    release = pinned(peer) if peer in REQUIREMENTS else version("mcrage") if peer == "mcrage" else None
    return {"peer": peer, "version": release, "budget CPU-s": budget, "seed": seed}


def flat(measures: dict[str, object]) -> dict[str, object]:
    """Measures side by side, those by race with the race in their name."""
    by_race = measures["all_pairs_by_race"]
    assert isinstance(by_race, dict)
    return {
        "one-way": measures["one_way"],
        "all pairs": measures["all_pairs"],
        "detection": measures["detection"],
        "TSTR": measures["tstr"],
    } | {f"all pairs, {race}": value for race, value in by_race.items()}


def summary(lines: list[dict[str, object]]) -> str:
    """The table of all runs, and below it what failed."""
    done = [entry for entry in lines if "failed" not in entry]
    keys = list(max(done, key=len))
    failed = [f"{entry['peer']}: failed: {entry['failed']}" for entry in lines if "failed" in entry]
    return "\n".join([markdown([{key: entry.get(key) for key in keys} for entry in done]), *failed, described()])


if __name__ == "__main__":
    main()

"""Quality of the generator on diabetes-130 at a budget of training time, one thread.

    MCRAGE_DATA=… python -m benchmarks.generator --steps 4800 [--seeds 3] [--sampling-steps 12]

The measures are those of :mod:`mcrage.evaluation.fidelity`: all pairs at 10,000 rows, detection at 8,000 rows each,
TSTR at 20,000 rows. The table has every hospital stay; the label is readmission within 30 days; a fifth of the
patients is held out. The first line gives the same measures of real training rows.
"""

import argparse
import json
import time

import numpy as np
import pandas as pd
import torch

from mcrage import CDDPM, TableSchema, rng, split_by_patient
from mcrage.evaluation import fidelity
from simulations.datasets import diabetes130


def main() -> None:
    """Prints a JSON line per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sampling-steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test, schema = tables()
    real = train.iloc[rng.stream(0, "benchmark").permutation(len(train))]
    print(json.dumps({"rows": "real training rows"} | quality(real, test, schema, seed=0)), flush=True)
    for seed in range(options.seeds):
        started = time.process_time()
        model = CDDPM(steps=options.steps, sampling_steps=options.sampling_steps, random_state=seed)
        model.fit(train, schema)
        trained = time.process_time()
        rows = model.sample(20_000)
        speed = 20_000 / (time.process_time() - trained)
        spent = round(trained - started, 1)
        measured = {"seed": seed, "training_cpu_seconds": spent, "rows_per_cpu_second": round(speed)}
        print(json.dumps(measured | quality(rows, test, schema, seed=seed)), flush=True)


def tables() -> tuple[pd.DataFrame, pd.DataFrame, TableSchema]:
    """Training and test rows of diabetes-130: all stays, a fifth of the patients held out."""
    public = diabetes130.load(one_per_patient=False, within_30_days=True)
    return (*split_by_patient(public.table, public.schema, test_fraction=0.2), public.schema)


def quality(rows: pd.DataFrame, test: pd.DataFrame, schema: TableSchema, *, seed: int) -> dict[str, object]:
    """The measures of rows against held-out ones, all pairs by race as well."""
    generator: np.random.Generator = rng.stream(seed, "quality")
    shuffled = test.iloc[generator.permutation(len(test))]
    by_race = {}
    for race in schema.column("race").levels:
        a, b = shuffled[shuffled["race"] == race], rows[rows["race"] == race]
        size = min(len(a), len(b), 10_000)
        by_race[race] = round(fidelity.all_pairs(a.iloc[:size], b.iloc[:size], schema), 4) if size >= 100 else None
    return {
        "one_way": round(fidelity.one_way(test, rows.iloc[:10_000], schema), 4),
        "all_pairs": round(fidelity.all_pairs(test, rows.iloc[:10_000], schema), 4),
        "detection": round(fidelity.detection(shuffled.iloc[:8000], rows.iloc[:8000], schema, generator=generator), 3),
        "tstr": round(fidelity.train_synthetic_test_real(rows.iloc[:20_000], test, schema), 4),
        "all_pairs_by_race": by_race,
    }


if __name__ == "__main__":
    main()

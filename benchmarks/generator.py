"""Quality of the generator on a table at budgets of training time, one thread.

    MCRAGE_DATA=… python -m benchmarks.generator [--data diabetes130] --steps 2450 7500 41000 [--seeds 5]
    python -m benchmarks.generator --data wide|cohort --steps 2000

The measures are those of :mod:`mcrage.evaluation.fidelity`: one way and all pairs at 10,000 rows, detection at 8,000
rows each, TSTR at 20,000 rows, or fewer where there are no more. ``diabetes130``: every hospital stay; the label is
readmission within 30 days; a fifth of the patients is held out. ``heart-disease``: half of 920 rows is held out.
``wide``: 200 columns that depend on each other through five hidden numbers. ``cohort``: 20,000 simulated patients.
JSON lines go to the standard output, a table of means with 95 % intervals over the seeds to the standard error.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats

from benchmarks.machine import described, markdown
from mcrage import CDDPM, TableSchema, rng, split_by_patient
from mcrage.data.schema import Column
from mcrage.evaluation import fidelity
from simulations import datasets
from simulations.cohort import Cohort, CohortConfig
from simulations.datasets import diabetes130

MEASURES = ("one_way", "all_pairs", "detection", "tstr")
Split = tuple[pd.DataFrame, pd.DataFrame, TableSchema]


def main() -> None:
    """Prints a JSON line per seed and length, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=(*DATA,), default="diabetes130")
    parser.add_argument("--steps", type=int, nargs="*", default=[2450], help="none: the default for the table")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--sampling-steps", type=int, default=CDDPM().sampling_steps)
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, test, schema = DATA[options.data]()
    lines = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        real = train.iloc[rng.stream(seed, "benchmark").permutation(len(train))]
        lines.append({"rows": "real training rows", "seed": seed} | quality(real, test, schema, seed=seed))
        print(json.dumps(lines[-1]), flush=True)
        for steps in options.steps or [None]:
            settings = {"sampling_steps": options.sampling_steps, "precision": options.precision}
            lines.append(measured(CDDPM(steps=steps, random_state=seed, **settings), train, test, schema))
            print(json.dumps(lines[-1]), flush=True)
    print(table_of(lines), file=sys.stderr)


def measured(model: CDDPM, train: pd.DataFrame, test: pd.DataFrame, schema: TableSchema) -> dict[str, object]:
    """Time and quality of one training."""
    started = time.process_time()
    model.fit(train, schema)
    trained = time.process_time()
    rows = model.sample(20_000)
    sampled = time.process_time()
    return {
        "rows": f"{model.steps_} steps of {model.batch_size_}",
        "seed": model.random_state,
        "training_cpu_seconds": round(trained - started, 1),
        "rows_per_cpu_second": round(len(rows) / (sampled - trained)),
    } | quality(rows, test, schema, seed=model.random_state)


def table_of(lines: list[dict[str, object]]) -> str:
    """Means over the seeds, with 95 % t-intervals where there are several."""
    frame = pd.DataFrame(lines)
    columns = [name for name in ("training_cpu_seconds", "rows_per_cpu_second", *MEASURES) if name in frame]
    table = []
    for rows, part in frame.groupby("rows", sort=False):
        cells = {name: interval(part[name].dropna().to_numpy(dtype=float)) for name in columns}
        table.append({"rows": rows, "seeds": len(part)} | cells)
    return f"{described()}\n\n{markdown(table)}"


def interval(values: NDArray[np.float64]) -> str | None:
    """Mean and half the width of its interval."""
    if not len(values):
        return None
    digits = 0 if values.mean() > 10 else 4
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.{digits}f} ± {half:.{digits}f}"


def tables() -> Split:
    """Training and test rows of diabetes-130: all stays, a fifth of the patients held out."""
    public = diabetes130.load(one_per_patient=False, within_30_days=True)
    return (*split_by_patient(public.table, public.schema, test_fraction=0.2), public.schema)


def heart_disease_tables() -> Split:
    """Halves of heart-disease."""
    public = datasets.load("heart-disease")
    order = rng.stream(0, "benchmark", "heart-disease").permutation(len(public.table))
    half = len(order) // 2
    return public.table.iloc[order[half:]], public.table.iloc[order[:half]], public.schema


def cohort_tables() -> Split:
    """Patients of the simulated cohort."""
    cohort = Cohort(CohortConfig(seed=0))
    fresh = cohort.fresh(30_000)
    fresh = fresh.iloc[rng.stream(0, "benchmark", "cohort").permutation(len(fresh))]  # it comes by hospital
    return fresh.iloc[:20_000], fresh.iloc[20_000:], cohort.schema


def wide_tables() -> Split:
    """200 columns, half numbers and half levels, that five hidden numbers drive."""
    rows, columns = 30_000, 200
    draw = rng.stream(0, "benchmark", "wide")
    hidden, ways = draw.normal(size=(rows, 5)), draw.normal(size=(5, columns)) * 0.6
    seen = hidden @ ways + draw.normal(size=(rows, columns))
    label = draw.random(rows) < 1 / (1 + np.exp(2.0 - hidden[:, 0] - hidden[:, 1] * hidden[:, 2]))
    numbers = {f"n{k}": seen[:, k].clip(-8, 8).round(2) for k in range(columns // 2)}
    levels = {f"c{k}": np.digitize(seen[:, k], [-1.5, 0.0, 1.0]) for k in range(columns // 2, columns - 1)}
    texts = ["a", "b", "c", "d"]
    table = pd.DataFrame(
        numbers
        | {name: pd.Categorical.from_codes(codes, texts) for name, codes in levels.items()}
        | {"event": pd.array(label, dtype="boolean")}
    )
    schema = TableSchema(
        name="wide",
        columns=(
            *(Column(name=n, kind="continuous", minimum=-8, maximum=8, decimals=2, nullable=False) for n in numbers),
            *(Column(name=n, kind="categorical", categories=tuple(texts), nullable=False) for n in levels),
            Column(name="event", kind="boolean", role="target", nullable=False),
        ),
    )
    return table.iloc[:20_000], table.iloc[20_000:], schema


def quality(rows: pd.DataFrame, test: pd.DataFrame, schema: TableSchema, *, seed: int) -> dict[str, object]:
    """The measures of rows against as many held-out ones, all pairs by race as well if there is one."""
    generator: np.random.Generator = rng.stream(seed, "quality")
    shuffled = test.iloc[generator.permutation(len(test))]
    by_race = {}
    for race in schema.column("race").levels if any(column.name == "race" for column in schema.columns) else ():
        a, b = shuffled[shuffled["race"] == race], rows[rows["race"] == race]
        size = min(len(a), len(b), 10_000)
        by_race[race] = round(fidelity.all_pairs(a.iloc[:size], b.iloc[:size], schema), 4) if size >= 100 else None
    return {
        "one_way": round(fidelity.one_way(test, rows.iloc[: min(10_000, len(test))], schema), 4),
        "all_pairs": round(fidelity.all_pairs(test, rows.iloc[: min(10_000, len(test))], schema), 4),
        "detection": round(fidelity.detection(shuffled.iloc[:8000], rows.iloc[:8000], schema, generator=generator), 3),
        "tstr": round(fidelity.train_synthetic_test_real(rows.iloc[:20_000], test, schema), 4),
        "all_pairs_by_race": by_race,
    }


DATA: dict[str, Callable[[], Split]] = {
    "diabetes130": tables,
    "heart-disease": heart_disease_tables,
    "wide": wide_tables,
    "cohort": cohort_tables,
}


if __name__ == "__main__":
    main()

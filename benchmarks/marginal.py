"""Quality of the marginal generator by epsilon, beside real rows, one thread.

    MCRAGE_DATA=… python -m benchmarks.marginal [--data cohort diabetes130] [--patients 7000 35000] [--seeds 3]

``cohort``: patients of the simulated cohort. ``diabetes130``: the first stay of each patient; the label is readmission
at any time. Of both 20,000 patients are held out, and each seed trains on other patients of the rest. The measures are
those of ``benchmarks.generator``: one way and all pairs at 10,000 rows (all pairs by race at as many rows as there
are), detection at 8,000 rows each, TSTR at 20,000 generated rows, as AUROC over all and by race where at least 200
held-out patients are of it. ``real`` are the training rows themselves. Delta is 1e-5. ``--shares`` tries another split
of the budget: one-way histograms, groups, conditions, pairs, edges. JSON lines go to the standard output, a table of
means with 95 % intervals over the seeds to the standard error.
"""

import argparse
import hashlib
import json
import math
import sys
import time

import pandas as pd
from sklearn.metrics import roc_auc_score

from benchmarks.generator import interval, quality
from benchmarks.machine import described, markdown
from mcrage import MarginalGenerator, TableSchema, rng
from mcrage.evaluation import fidelity
from mcrage.evaluation.downstream import events
from mcrage.marginal.budget import Shares
from simulations.cohort import Cohort, CohortConfig
from simulations.datasets import diabetes130

HELD_OUT = 20_000
LEAST_PATIENTS = 200
"""Held-out patients of a race that an AUROC is given for."""

MEASURES = ("one_way", "all_pairs", "detection", "tstr")


def main() -> None:
    """Prints a JSON line per table, size, seed and epsilon, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("cohort", "diabetes130"), nargs="+", default=["cohort", "diabetes130"])
    parser.add_argument("--patients", type=int, nargs="+", default=[7_000, 35_000])
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0, math.inf])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs=5)
    options = parser.parse_args()
    shares = Shares(**dict(zip(vars(Shares()), options.shares, strict=True))) if options.shares else Shares()
    lines = []
    for name in options.data:
        pool, test, schema = tables(name)
        for patients in options.patients:
            for seed in range(options.seeds):
                train = pool.iloc[rng.stream(seed, "benchmark", patients).permutation(len(pool))[:patients]]
                about = {"data": name, "patients": patients, "seed": seed}
                found = [{"rows": "real"} | measures(train, test, schema, seed=seed)]
                for epsilon in options.epsilon:
                    model = MarginalGenerator(shares=shares, random_state=seed)
                    found.append(measured(model, train, test, schema, epsilon=epsilon))
                for line in found:
                    lines.append(about | line)
                    print(json.dumps(lines[-1]), flush=True)
    print(table_of(lines), file=sys.stderr)


def tables(name: str) -> tuple[pd.DataFrame, pd.DataFrame, TableSchema]:
    """Patients to train on, held-out ones, and their schema."""
    if name == "cohort":
        cohort = Cohort(CohortConfig(seed=0))
        table, schema = cohort.fresh(60_000), cohort.schema
    else:
        public = diabetes130.load()
        table, schema = public.table, public.schema
    table = table.iloc[rng.stream(0, "benchmark", name).permutation(len(table))]
    return table.iloc[HELD_OUT:], table.iloc[:HELD_OUT], schema


def measured(
    model: MarginalGenerator, train: pd.DataFrame, test: pd.DataFrame, schema: TableSchema, *, epsilon: float
) -> dict[str, object]:
    """Time and quality of one model."""
    # no patient is protected here, so that a key may follow from a seed
    key = hashlib.sha256(f"benchmark {model.random_state} {epsilon}".encode()).digest()
    started = time.process_time()
    model.fit(train, schema, epsilon=epsilon, key=key)
    fitted = time.process_time()
    rows = model.sample(20_000)
    return {
        "rows": f"epsilon {epsilon:g}",
        "epsilon": None if math.isinf(model.epsilon_) else round(model.epsilon_, 4),
        "edges": sum(column.parent >= 0 for column in model.model_.columns),
        "fit_cpu_seconds": round(fitted - started, 2),
        "sample_cpu_seconds": round(time.process_time() - fitted, 2),
    } | measures(rows, test, schema, seed=model.random_state)


def measures(rows: pd.DataFrame, test: pd.DataFrame, schema: TableSchema, *, seed: int) -> dict[str, object]:
    """The measures of ``benchmarks.generator``, and TSTR by race."""
    model = fidelity.boosting(schema.features)
    model.fit(fidelity.model_matrix(rows.iloc[:20_000], schema.features), events(rows.iloc[:20_000], schema))
    scores = pd.Series(model.predict_proba(fidelity.model_matrix(test, schema.features))[:, 1], index=test.index)
    outcome = pd.Series(events(test, schema), index=test.index)
    by_race = {}
    for race in schema.column("race").levels:
        of_race = test["race"] == race
        if of_race.sum() >= LEAST_PATIENTS:
            by_race[race] = round(float(roc_auc_score(outcome[of_race], scores[of_race])), 4)
    return quality(rows, test, schema, seed=seed) | {"tstr_by_race": by_race}


def table_of(lines: list[dict[str, object]]) -> str:
    """Means over the seeds, with 95 % t-intervals where there are several."""
    frame = pd.DataFrame(lines)
    for name in ("all_pairs_by_race", "tstr_by_race"):
        frame = frame.join(pd.DataFrame(frame[name].tolist(), index=frame.index).add_prefix(f"{name[:-8]} "))
    races = [name for name in frame if str(name).startswith(("all_pairs ", "tstr "))]
    table = []
    for (data, patients, rows), part in frame.groupby(["data", "patients", "rows"], sort=False):
        cells = {str(name): interval(part[name].dropna().to_numpy(dtype=float)) for name in (*MEASURES, *races)}
        edges = "" if rows == "real" else round(float(part["edges"].mean()), 1)
        table.append({"data": data, "patients": patients, "rows": rows, "edges": edges} | cells)
    return f"{described()}\n\n{markdown(table)}"


if __name__ == "__main__":
    main()

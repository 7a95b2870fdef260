"""What a model of a small table gives away about it, beside how good its rows are, by the length of the training.

    python -m benchmarks.small_tables [--data cohort] [--rows 100 300 1000] [--seeds 3] [--passes 25 50]
        [--set width=64] [--set learning_rate=0.002]

Without ``--passes`` the training has its default length; with it, it passes that often over the rows, for each number
given. ``--set`` changes another setting of the model. The public tables are found as in ``simulations`` (``--data
heart-disease``, ``diabetes130``). Each model sees n rows; n more are the hold-out of the attacks, and up to 1,500 are
the test rows of the quality measures. A line of JSON per model goes to stdout, and at the end a table of means over
the seeds: AUC of the strongest attack and of the plain one on the loss (.5 is a guess), copies beyond those of the
hold-out, share of rows nearest to a training row and its distance from half in standard errors; held-out loss, all
pairs (1 is perfect), detection (.5 is indistinguishable), TSTR. The rows named *real* compare the training rows.
"""

import argparse
import json
import time
from collections.abc import Iterator
from functools import cache

import pandas as pd
import torch

from mcrage import CDDPM, TableSchema, rng
from mcrage.evaluation import disclosure, fidelity
from mcrage.training.length import default_batch_size
from simulations.cohort import Cohort, CohortConfig
from simulations.datasets import diabetes130, heart_disease

PUBLIC = {"heart-disease": cache(heart_disease.load), "diabetes130": cache(diabetes130.load)}
TEST_ROWS = 1500


def main() -> None:
    """Prints a JSON line per model, then the table of means."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["cohort"], choices=["cohort", *PUBLIC])
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--passes", type=float, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = dict(pair.split("=") for pair in options.set)
    settings = {name: float(value) if "." in value or "e" in value else int(value) for name, value in given.items()}
    lines: list[dict[str, object]] = []
    for data in options.data:
        for n in options.rows:
            for seed in range(options.seeds):
                for line in models(data, n, seed, options.passes, settings):
                    lines.append({"data": data, "rows": n, "seed": seed} | line)
                    print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


def models(
    data: str, n: int, seed: int, passes: list[float] | None, settings: dict[str, float]
) -> Iterator[dict[str, object]]:
    """What is measured for the training rows themselves and for a model of each length."""
    rows, schema = draw(data, 2 * n + TEST_ROWS, seed)
    if len(rows) < 3 * n:
        yield {"model": "none", "reason": f"{3 * n} rows are needed, there are {len(rows)}"}
        return
    members, others, test = rows.iloc[:n], rows.iloc[n : 2 * n], rows.iloc[2 * n :]
    yield {"model": "real"} | quality(members, test, schema, seed)
    batch_size = int(settings.get("batch_size", default_batch_size(n)))
    lengths = [max(round(each * n / batch_size), 1) for each in passes] if passes else [None]
    for steps in lengths:
        started = time.process_time()
        model = CDDPM(steps=steps, random_state=seed).set_params(**settings).fit(members, schema)
        spent, taken = time.process_time() - started, model.steps_
        length = {"model": f"{taken} steps", "passes": round(taken * batch_size / n, 1), "cpu_seconds": round(spent, 1)}
        made = model.sample(len(test), random_state=seed)
        loss = {"held_out_loss": round(model.loss(test, random_state=0), 3)}
        yield length | given_away(model, made, members, others, seed) | loss | quality(made, test, schema, seed)


def draw(data: str, rows: int, seed: int) -> tuple[pd.DataFrame, TableSchema]:
    """Shuffled rows of a table, at most as many as asked for."""
    if data == "cohort":
        cohort = Cohort(CohortConfig(seed=seed))
        table, schema = cohort.fresh(rows), cohort.schema
    else:
        public = PUBLIC[data]()
        table, schema = public.table, public.schema
    order = rng.stream(seed, "small tables").permutation(len(table))[:rows]
    return table.iloc[order].reset_index(drop=True), schema


def given_away(
    model: CDDPM, made: pd.DataFrame, members: pd.DataFrame, others: pd.DataFrame, seed: int
) -> dict[str, object]:
    """The measures of disclosure, rounded."""
    attacks = disclosure.membership_attacks(model, members, others, random_state=seed)
    by_name = {f"{attack.name} AUC": rounded(attack.auc.value) for attack in attacks}
    schema, generator = model.schema_, rng.stream(seed, "disclosure")
    copies = disclosure.exact_copies(made, members, others, schema, generator=generator)
    closest = disclosure.closest_records(made, members, others, schema, generator=generator)
    off = None if closest.value is None else (closest.value - 0.5) / max(closest.error, 1e-12)
    return {
        "attack_auc": rounded(attacks[0].auc.value),
        "attack_error": rounded(attacks[0].auc.error),
        "attack_tpr": rounded(attacks[0].tpr.value),
        **by_name,
        "excess_copies": rounded(copies.excess.value),
        "closest": rounded(closest.value),
        "closest_off": rounded(off),
    }


def quality(rows: pd.DataFrame, test: pd.DataFrame, schema: TableSchema, seed: int) -> dict[str, object]:
    """The measures of fidelity on as many rows of either kind as there are."""
    size = min(len(rows), len(test), 1000)
    generator = rng.stream(seed, "quality")
    return {
        "all_pairs": rounded(fidelity.all_pairs(test.iloc[:size], rows.iloc[:size], schema)),
        "detection": rounded(fidelity.detection(test, rows, schema, generator=generator)),
        "tstr": rounded(fidelity.train_synthetic_test_real(rows, test, schema)),
    }


def rounded(value: float | None) -> float | None:
    """Four decimals, where there is a value."""
    return None if value is None else round(float(value), 4)


def table(lines: list[dict[str, object]]) -> str:
    """Means over the seeds as text."""
    frame = pd.DataFrame(lines)
    keys = ["data", "rows", "model"]
    means = frame.drop(columns=["seed", "reason"], errors="ignore").groupby(keys, sort=False).mean()
    order = ["passes", "cpu_seconds", "attack_auc", "loss AUC", "attack_tpr", "excess_copies", "closest", "closest_off"]
    shown = [name for name in [*order, "held_out_loss", "all_pairs", "detection", "tstr"] if name in means]
    return str(means[shown].to_string(float_format="%.3f", na_rep=""))


if __name__ == "__main__":
    main()

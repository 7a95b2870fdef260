"""What a federation costs against pooled rows at the same compute, and which of its settings matter.

    MCRAGE_DATA=… python -m benchmarks.federated_ablation diabetes130|heart-disease|cohort [--seeds 2] [--rounds 40]
        [--only defaults pooled …]

Eight hospitals whose mix of group and label is Dirichlet(.3) (Hsu et al., 2019), the four of heart-disease, or the
eight of the simulated cohort. The pooled model is trained by the same program as a federation of one hospital that
holds all rows, in batches so many times as large: both see as many rows. Measured on held-out patients, for all of
them and within groups: all pairs (1 is perfect), detection (.5 is indistinguishable), and the AUROC of boosting
trained on generated rows. JSON lines go to the standard output, a table to the standard error.
"""

import argparse
import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from benchmarks.federated_pooled import pooled, snapshots
from mcrage import CDDPM, TableSchema, rng, split_by_patient
from mcrage.config import RunConfig, Scalar
from mcrage.data.groups import group_labels
from mcrage.evaluation import fidelity
from mcrage.evaluation.subgroups import fidelity_by_group
from mcrage.training import optimisers
from simulations import datasets, partition
from simulations.cohort import Cohort, CohortConfig
from simulations.datasets import diabetes130
from simulations.sites import Hospitals

MOST_ROWS = 8000
"""Rows of each side of a measure."""
POOLED = "pooled"


@dataclass(frozen=True)
class Federation:
    """Hospitals, all of whose rows are trained on, and patients of none of them.

    Attributes:
        hospitals: Their tables.
        held_out: Other patients.
        by: Columns whose levels are the groups that are measured.
    """

    hospitals: Hospitals
    held_out: pd.DataFrame
    by: tuple[str, ...]


def diabetes(seed: int) -> Federation:
    """Diabetes-130, dealt to eight hospitals by race and label."""
    public = diabetes130.load(within_30_days=True)
    train, held_out = split_by_patient(public.table, public.schema, test_fraction=0.2)
    columns = tuple(public.schema.column(name) for name in ("race", public.schema.target.name))
    labels = group_labels(train, columns).agg(", ".join, axis=1)
    parts = partition.dirichlet_skew(labels, 8, alpha=0.3, generator=rng.stream(seed, "ablation"), minimum=500)
    return Federation(_named(public.schema, [train.iloc[rows] for rows in parts]), held_out, ("race",))


def heart_disease(seed: int) -> Federation:
    """The four hospitals of heart-disease, a third of each held out."""
    found = datasets.hospitals("heart-disease")
    kept, held_out = {}, []
    for name, table in found.tables.items():
        order = rng.stream(seed, "ablation", name).permutation(len(table))
        held_out.append(table.iloc[order[: len(table) // 3]])
        kept[name] = table.iloc[np.sort(order[len(table) // 3 :])]
    return Federation(Hospitals(found.schema, kept), pd.concat(held_out, ignore_index=True), ("sex",))


def cohort(seed: int) -> Federation:
    """The eight hospitals of the simulated cohort."""
    truth = Cohort(CohortConfig(seed=seed))
    return Federation(truth.hospitals(), truth.fresh(MOST_ROWS), ("race",))


DATA: dict[str, Callable[[int], Federation]] = {
    "diabetes130": diabetes,
    "heart-disease": heart_disease,
    "cohort": cohort,
}


def _named(schema: TableSchema, tables: list[pd.DataFrame]) -> Hospitals:
    return Hospitals(schema, {f"site-{number:02d}": table for number, table in enumerate(tables, start=1)})


def variants(usual: Mapping[str, Scalar]) -> dict[str, dict[str, Scalar]]:
    """Settings by name; all take as many steps at as many rows as the defaults."""
    steps = int(usual["num-server-rounds"]) * int(usual["local-steps"])
    lengths = {f"{each} local steps": _length(steps, each) for each in (5, 15, 60, 120)}
    rate = float(usual["learning-rate"])
    return {
        "defaults": {},
        **lengths,
        "half the learning rate": {"learning-rate": rate / 2},
        "a quarter of the learning rate": {"learning-rate": rate / 4},
        "FedAvg": {"strategy": "fedavg"},
        "server momentum .9": {"server-momentum": 0.9},
        "no average over rounds": {"ema-decay": 0.0},
        "FedProx .01": {"strategy": "fedprox", "proximal-mu": 0.01},
        "FedProx .1": {"strategy": "fedprox", "proximal-mu": 0.1},
        "weights by size": {"site-weights": "counts"},
        "optimiser state kept": {},
    }


def _length(steps: int, local_steps: int) -> dict[str, Scalar]:
    return {"local-steps": local_steps, "num-server-rounds": max(round(steps / local_steps), 1)}


@contextmanager
def kept_optimisers(num_sites: int) -> Iterator[None]:
    """Every site's optimisers go on in the next round with the moments that they had; sites take turns in one order.

    No deployed site does so: it has no memory between rounds, so that a restart changes nothing.
    """
    begin = optimisers._adam
    before: dict[int, deque[torch.optim.Optimizer]] = defaultdict(deque)  # by size: denoisers, hidden layers

    def go_on(part: optimisers.Flat, weight_decay: float) -> torch.optim.Optimizer:
        optimiser, turns = begin(part, weight_decay), before[part.values.numel()]
        if len(turns) == num_sites:
            optimiser.load_state_dict(turns.popleft().state_dict())
        turns.append(optimiser)
        return optimiser

    optimisers._adam = go_on
    try:
        yield
    finally:
        optimisers._adam = begin


def measures(model: CDDPM, federation: Federation, seed: int) -> Iterator[dict[str, object]]:
    """For all held-out patients, and within each group; real rows of the hospitals beside them."""
    held_out, schema = federation.held_out, model.schema_
    rows = model.sample(2 * MOST_ROWS, random_state=rng.derive(seed, "quality"))
    train = pd.concat(federation.hospitals.tables.values(), ignore_index=True)
    train = train.iloc[rng.stream(seed, "quality").permutation(len(train))]
    for name, made in (("rows", rows), ("real", train)):
        size = min(len(made), len(held_out), MOST_ROWS)
        draw = rng.stream(seed, "detection")
        test = held_out.iloc[draw.permutation(len(held_out))]
        yield {
            "group": "everybody" if name == "rows" else "everybody, real rows",
            "all_pairs": round(fidelity.all_pairs(test.iloc[:size], made.iloc[:size], schema), 4),
            "detection": round(fidelity.detection(test.iloc[:size], made.iloc[:size], schema, generator=draw), 3),
            "tstr": round(fidelity.train_synthetic_test_real(made.iloc[: 2 * MOST_ROWS], held_out, schema), 4),
        }
    draw = rng.stream(seed, "groups")
    for found in fidelity_by_group(rows, train, held_out, schema, by=federation.by, generator=draw):
        yield {"group": str(found.group), "n": found.rows} | {k: round(v, 4) for k, v in found.synthetic.items()}


def runs(name: str, seed: int, rounds: int, only: list[str] | None) -> Iterator[dict[str, object]]:
    """A line for every model and group."""
    federation = DATA[name](seed)
    hospitals, sites = federation.hospitals, len(federation.hospitals.tables)
    base: dict[str, Scalar] = {
        "num-server-rounds": rounds, "seed": seed, "evaluate-every": 0, "test-fraction": 1e-9
    }  # fmt: skip
    usual = RunConfig().to_flat() | base
    arms = {POOLED: {"batch-size": int(usual["batch-size"]) * sites}} | variants(usual)
    for arm, settings in arms.items():
        if only and arm not in only:
            continue
        keeping: AbstractContextManager[None] = nullcontext()
        if arm == "optimiser state kept":
            keeping = kept_optimisers(sites)
        tables = pooled(hospitals) if arm == POOLED else hospitals
        flat = base | settings
        with keeping:
            [(_, model)] = snapshots(tables, flat, [int(flat["num-server-rounds"])])
        for line in measures(model, federation, seed):
            yield {"data": name, "seed": seed, "model": arm} | line


def table_of(lines: list[dict[str, object]]) -> str:
    """Means over the seeds, and how many per cent of the pooled model's measure each one is."""
    frame = pd.DataFrame(lines).drop(columns=["data", "seed", "n"], errors="ignore")
    means = frame.groupby(["group", "model"], sort=False).mean()
    blocks = []
    for group, part in means.groupby(level=0, sort=False):
        part = part.droplevel(0)
        if POOLED in part.index:
            share = (100 * part / part.loc[POOLED]).round(1).add_suffix(", % of pooled")
            part = part.join(share)
        blocks.append(f"{group}\n{part.round(4).to_string()}")
    return "\n\n".join(blocks)


def main() -> None:
    """Prints a JSON line per seed, model and group, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=(*DATA,))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--only", nargs="+", choices=(POOLED, *variants(RunConfig().to_flat())))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    for seed in range(options.seeds):
        for line in runs(options.data, seed, options.rounds, options.only):
            lines.append(line)
            print(json.dumps(line), flush=True)
    print(table_of(lines), file=sys.stderr)


if __name__ == "__main__":
    main()

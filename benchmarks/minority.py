"""The minority first: what generated rows of small groups are worth, and which setting helps them.

    MCRAGE_DATA=… python -m benchmarks.minority groups [--steps 2400] [--seeds 1]
    python -m benchmarks.minority cohort [--seeds 2] [--patients-per-site 700]
    python -m benchmarks.minority collapse [--seeds 3] [--guidance 0 0.5] [--variant condition_dropout=0.3]

``groups``: fidelity within race × sex and race × sex × label of diabetes-130, rows asked for by group as the rebalancer
does, beside real training rows. ``cohort``: the same for the minority of the simulated cohort and a federated model of
eight hospitals, beside as many fresh real rows; and the effects on the outcome by group, in standard errors of an
estimate from the training rows. ``collapse``: rows of the minority of :mod:`benchmarks.collapse` from the model of
eight sites and from that of one, in standard errors of an estimate from the minority's 800 and 100 training rows.

A ``--variant`` (repeat it) sets fields of ``DiffusionConfig`` and keys of the run configuration; ``--set`` does so for
all models, of which the one without variant is the first. JSON lines go to the standard output, a table to the standard
error.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks import collapse
from client.app import app
from mcrage import CDDPM, ModelConfig, rng, split_by_patient
from mcrage.config import RunConfig, Scalar
from mcrage.data.groups import GroupCounts
from mcrage.diffusion.tabular import DiffusionConfig
from mcrage.evaluation.subgroups import fidelity_by_group
from mcrage.rebalancing.rebalancer import make_pool
from server.checkpoints import Checkpoint
from server.roster import Roster, call_roll
from server.rounds import RoundLoop
from simulations.cohort import Cohort, CohortConfig
from simulations.datasets import diabetes130
from simulations.effects import effects_within
from simulations.grid import InProcessGrid
from simulations.sites import Hospitals, write_sites
from simulations.truth import MINORITY, TARGET

ROWS = 8000
"""Rows that are asked for: their own sampling error is a third of that of 800 rows or less."""
_DIFFUSION = {field.name for field in fields(DiffusionConfig)}
Line = dict[str, object]


class VariedLoop(RoundLoop):
    """A federation whose model has other settings of the diffusion; sites take them from its description."""

    def __init__(self, grid: InProcessGrid, config: RunConfig, roster: Roster, diffusion: DiffusionConfig) -> None:
        self._diffusion = diffusion
        super().__init__(grid, config, roster)

    def _begun(self) -> Checkpoint:
        federation, roster = self._config.federation, self._roster
        config = ModelConfig(width=federation.width, depth=federation.depth, diffusion=self._diffusion)
        model = CDDPM.initialised(roster.schema, roster.marginals, config=config, random_state=federation.seed)
        return replace(super()._begun(), description=model.describe())


def federated(hospitals: Hospitals, settings: Mapping[str, float], *, seed: int, test_fraction: float = 0.3) -> CDDPM:
    """The model of a federation within this process; of one hospital it is that hospital's own, by the same program.

    Args:
        hospitals: Their tables.
        settings: Fields of the diffusion and keys of the run configuration that are not as usual.
        seed: Root of the draws.
        test_fraction: Share of the patients that sites keep back.
    """
    diffusion = DiffusionConfig(**{name: value for name, value in settings.items() if name in _DIFFUSION})
    usual = RunConfig().to_flat()
    changed: dict[str, Scalar] = {
        name: type(usual[name])(value) for name, value in settings.items() if name not in _DIFFUSION
    }
    with tempfile.TemporaryDirectory() as folder:
        sites = Path(folder) / "sites"
        write_sites(sites, hospitals)
        places: dict[str, Scalar] = {"site-dir": str(sites), "out-dir": str(Path(folder) / "out")}
        fixed = {"seed": seed, "evaluate-every": 0, "test-fraction": test_fraction, "min-sites": len(hospitals.tables)}
        run = RunConfig.parse({**changed, **places, **fixed})
        grid = InProcessGrid.of_folder(app, len(hospitals.tables), run)
        loop = VariedLoop(grid, run, call_roll(grid, run), diffusion)
        while loop.server_round < run.federation.num_server_rounds:
            loop.next_round()
        return loop.result().model


def groups(options: argparse.Namespace) -> Iterator[Line]:
    """Fidelity within the groups of diabetes-130, label open and label asked for."""
    public = diabetes130.load(one_per_patient=False, within_30_days=True)
    schema = public.schema
    train, test = split_by_patient(public.table, schema, test_fraction=0.2)
    for seed in range(options.seeds):
        model = CDDPM(steps=options.steps, random_state=seed).fit(train, schema)
        for columns in (schema.sensitive, schema.attributes):
            counts = GroupCounts.of(test, columns)
            asked = {group: min(max(count, 1000), 4000) for group, count in counts.items()}
            rows = make_pool(model, schema, asked, random_state=seed).table
            names = [column.name for column in columns]
            yield from _fidelity(rows, train, test, model, names, "diabetes-130", seed)


def cohort(options: argparse.Namespace) -> Iterator[Line]:
    """Fidelity and effects in the minority of the simulated cohort, and in everybody else."""
    for seed in range(options.seeds):
        truth = Cohort(CohortConfig(seed=seed, patients_per_site=options.patients_per_site))
        hospitals = truth.hospitals(test_patients=0)
        mix = {race: 1.0 for race in ("White", "Hispanic", "Asian")} | {MINORITY: 3.0}
        fresh = truth.fresh(2 * ROWS, races=mix)
        compared = fresh[fresh["race"].isin([MINORITY, "White"])]
        order = rng.stream(seed, "halves").permutation(len(compared))
        halves = [compared.iloc[rows] for rows in np.array_split(order, 2)]
        train = pd.concat(
            [split_by_patient(table, truth.schema, test_fraction=0.3)[0] for table in hospitals.tables.values()]
        )
        for name, settings in options.variants.items():
            model = federated(hospitals, settings, seed=seed)
            for guidance in options.guidance:
                model.set_params(guidance=guidance)
                made = {race: model.sample(ROWS, {"race": race}, random_state=seed) for race in (MINORITY, "White")}
                rows = pd.concat([table.iloc[: ROWS // 2] for table in made.values()])
                arm = f"{name}, guidance {guidance:g}"
                yield from _fidelity(rows, halves[0], halves[1], model, ["race"], f"cohort, {arm}", seed)
                label_asked = _label_asked(model, train, seed)
                for kind, table in {"label open": pd.concat(made.values()), "label asked for": label_asked}.items():
                    yield from _effects(table, train, truth, fresh, f"{arm}, {kind}", seed)
        yield from _effects(train, train, truth, fresh, "training rows", seed)
        yield from _effects(truth.fresh(2 * ROWS, races=mix, site=0), train, truth, fresh, "real rows", seed)


def _label_asked(model: CDDPM, train: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Rows of both groups whose label is asked for, at the rate of the training rows."""
    parts = []
    for race in (MINORITY, "White"):
        died = round(ROWS * float(train.loc[train["race"] == race, TARGET].mean()))
        labels = pd.Series(["yes"] * died + ["no"] * (ROWS - died))
        parts.append(model.sample(ROWS, pd.DataFrame({"race": race, TARGET: labels}), random_state=seed))
    return pd.concat(parts)


def _effects(
    rows: pd.DataFrame, train: pd.DataFrame, truth: Cohort, real: pd.DataFrame, name: str, seed: int
) -> Iterator[Line]:
    for minority in (True, False):
        trained_on = int(((train["race"] == MINORITY) == minority).sum())
        found = effects_within(rows, truth, real=real, minority=minority, num_rows=trained_on)
        strict = effects_within(rows, truth, real=real, minority=minority)
        yield {
            "what": "effects",
            "rows": name,
            "seed": seed,
            "group": "minority" if minority else "others",
            "training_rows": trained_on,
            "within_2_se": round(found.share_within, 3),
            "median_error": round(float(np.median(found.errors)), 2),
            "within_2_se_of_as_many_rows": round(strict.share_within, 3),
            "missed": [each for each, error in zip(found.names, found.errors, strict=True) if error > 2],
        }


def collapsed(options: argparse.Namespace) -> Iterator[Line]:
    """Rows of the minority from eight sites' model and from one site's, beside the training rows."""
    for seed in range(options.seeds):
        hospitals = collapse.hospitals(seed=seed, num_sites=options.sites)
        name, table = next(iter(hospitals.tables.items()))
        one = {"one site": replace(hospitals, tables={name: table})} if options.one_site else {}
        for where, known in ({"federated": hospitals} | one).items():
            real = pd.concat(known.tables.values())
            real = real[real["group"] == collapse.MINORITY]
            yield _distances(real, len(real), f"{where}: training rows", seed)
            for variant, settings in options.variants.items():
                model = federated(known, settings, seed=seed, test_fraction=1e-9)
                for guidance in options.guidance:
                    model.set_params(guidance=guidance)
                    rows = model.sample(ROWS, {"group": collapse.MINORITY}, random_state=seed)
                    yield _distances(rows, len(real), f"{where}: {variant}, guidance {guidance:g}", seed)


def _distances(rows: pd.DataFrame, num_rows: int, name: str, seed: int) -> Line:
    errors = collapse.distances(rows, collapse.MINORITY, num_rows=num_rows)
    found = collapse.statistics(rows)
    return {
        "what": "collapse",
        "rows": name,
        "seed": seed,
        "training_rows": num_rows,
        "heart_rate": round(found["heart_rate"], 2),
        "death_rate": round(found["died"], 3),
        "heart_rate_se": round(errors["heart_rate"], 1),
        "death_rate_se": round(errors["died"], 1),
        "within_2_se": round(float(np.mean([abs(error) <= 2 for error in errors.values()])), 3),
        "root_mean_square": round(float(np.sqrt(np.mean([error**2 for error in errors.values()]))), 2),
        "errors": {each: round(error, 1) for each, error in errors.items()},
    }


def _fidelity(
    rows: pd.DataFrame,
    train: pd.DataFrame,
    test: pd.DataFrame,
    model: CDDPM,
    by: list[str],
    name: str,
    seed: int,
) -> Iterator[Line]:
    for found in fidelity_by_group(rows, train, test, model.schema_, by=by, generator=rng.stream(seed, "groups")):
        line: Line = {"what": "fidelity", "rows": name, "seed": seed, "group": str(found.group), "n": found.rows}
        for measure, value in found.synthetic.items():
            line[measure], line[f"{measure}_real"] = round(value, 4), round(found.real[measure], 4)
        yield line | ({"absent": dict(found.absent)} if found.absent else {})


def table_of(lines: list[Line]) -> str:
    """Means over the seeds as text, a block per kind of line."""
    frame = pd.DataFrame(lines)
    blocks = []
    for what, part in frame.groupby("what", sort=False):
        keys = [key for key in ("rows", "group") if part.get(key) is not None and part[key].notna().all()]
        values = part.drop(columns=["seed", "what"]).dropna(axis=1, how="all").groupby(keys, sort=False)
        blocks.append(f"{what}\n{values.mean(numeric_only=True).round(3).to_string()}")
    return "\n\n".join(blocks)


def variant(text: str) -> dict[str, float]:
    """Settings from ``name=value,name=value``."""
    known = _DIFFUSION | RunConfig().to_flat().keys()
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no setting '{name}'")
        found[name] = float(value)
    return found


def main() -> None:
    """Prints a JSON line per measurement, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("groups", "cohort", "collapse"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--one-site", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--patients-per-site", type=int, default=700)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0])
    parser.add_argument("--set", type=variant, default={})
    parser.add_argument("--variant", type=variant, action="append", default=[])
    options = parser.parse_args()
    options.variants = {"defaults": options.set} | {
        ", ".join(f"{name} {value:g}" for name, value in settings.items()): options.set | settings
        for settings in options.variant
    }
    torch.set_num_threads(1)
    lines = []
    for line in {"groups": groups, "cohort": cohort, "collapse": collapsed}[options.part](options):
        lines.append(line)
        print(json.dumps(line), flush=True)
    print(table_of(lines), file=sys.stderr)


if __name__ == "__main__":
    main()

"""Fidelity of the federated model by round, beside a model of the same hospitals' pooled rows at the same compute.

    python -m benchmarks.federated_pooled [--seeds 3] [--rounds 40] [--every 10] [--test-rows 4000]
        [--plot curve.svg]

Eight hospitals of the simulated cohort, whose case mix and charting differ. The pooled model is trained by the same
program as a federation of one hospital that holds all rows; in each round it sees as many rows as all eight sites do,
once in steps with batches eight times as large, once in eight times as many steps. All are compared with
patients of no hospital: all pairs (1 is perfect), detection (.5 is indistinguishable), and the AUROC of boosting
trained on generated rows.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import torch

from client.app import app
from mcrage import CDDPM, rng
from mcrage.config import RunConfig, Scalar
from mcrage.evaluation import fidelity
from mcrage.render.plots import nice_ticks
from server.roster import call_roll
from server.rounds import RoundLoop
from simulations.cohort import Cohort, CohortConfig
from simulations.grid import InProcessGrid
from simulations.sites import Hospitals, write_sites

MEASURES = {
    "all_pairs": "all pairs: 1 is perfect",
    "detection": "detection AUROC: .5 is indistinguishable",
    "tstr": "AUROC of boosting trained on the rows",
}
COLOURS = {"federated": "#c2410c", "pooled, large batches": "#1d4ed8", "pooled, more steps": "#0f766e"}


def main() -> None:
    """Prints a JSON line per seed, model and point of the curve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--test-rows", type=int, default=4000)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    points = sorted({1, *range(options.every, options.rounds, options.every), options.rounds})
    lines: list[dict[str, object]] = []
    for seed in range(options.seeds):
        cohort = Cohort(CohortConfig(seed=seed))
        test, hospitals = cohort.fresh(options.test_rows), cohort.hospitals()
        base: dict[str, Scalar] = {"num-server-rounds": options.rounds, "seed": seed, "evaluate-every": 0}
        usual, sites = RunConfig().federation, len(hospitals.tables)
        models = {
            "federated": (hospitals, base),
            "pooled, large batches": (pooled(hospitals), base | {"batch-size": usual.batch_size * sites}),
            "pooled, more steps": (pooled(hospitals), base | {"local-steps": usual.local_steps * sites}),
        }
        for name, (tables, settings) in models.items():
            for server_round, model in snapshots(tables, settings, points):
                lines.append({"seed": seed, "model": name, "round": server_round} | quality(model, test, seed))
                print(json.dumps(lines[-1]), flush=True)
    if options.plot:
        options.plot.write_text(chart(pd.DataFrame(lines)), encoding="utf-8")


def pooled(hospitals: Hospitals) -> Hospitals:
    """One hospital with the rows of all."""
    table = pd.concat(hospitals.tables.values(), ignore_index=True)
    site = hospitals.schema.site
    if site is not None:
        name = site.levels[0] if site.kind == "categorical" else "all"
        table[site.name] = pd.Series([name] * len(table), dtype=table[site.name].dtype)
    return Hospitals(hospitals.schema, {"all": table})


def snapshots(hospitals: Hospitals, settings: Mapping[str, Scalar], points: list[int]) -> Iterator[tuple[int, CDDPM]]:
    """The averaged model after each of these rounds."""
    with tempfile.TemporaryDirectory() as folder:
        write_sites(Path(folder) / "sites", hospitals)
        places = {"site-dir": str(Path(folder) / "sites"), "out-dir": str(Path(folder) / "out")}
        run = RunConfig.parse({**settings, **places, "min-sites": len(hospitals.tables)})
        grid = InProcessGrid.of_folder(app, len(hospitals.tables), run)
        loop = RoundLoop(grid, run, call_roll(grid, run))
        while loop.server_round < points[-1]:
            loop.next_round()
            if loop.server_round in points:
                yield loop.server_round, loop.result().model


def quality(model: CDDPM, test: pd.DataFrame, seed: int) -> dict[str, float]:
    """The measures of as many generated rows as there are test rows."""
    rows = model.sample(len(test), random_state=rng.derive(seed, "quality"))
    generator: np.random.Generator = rng.stream(seed, "quality")
    return {
        "all_pairs": round(fidelity.all_pairs(test, rows, model.schema_), 4),
        "detection": round(fidelity.detection(test, rows, model.schema_, generator=generator), 3),
        "tstr": round(fidelity.train_synthetic_test_real(rows, test, model.schema_), 4),
    }


def chart(curves: pd.DataFrame) -> str:
    """Mean curves over the seeds as one SVG: a panel per measure, a line per model."""
    mean = curves.drop(columns="seed").groupby(["model", "round"], sort=False).mean()
    width, height = 300, 210
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width * len(MEASURES)} 280")
    ElementTree.SubElement(root, "rect", width="100%", height="100%", fill="#fff")
    for panel, (measure, title) in enumerate(MEASURES.items()):
        ticks = nice_ticks(mean[measure].min(), mean[measure].max())
        left, right, last = panel * width + 45, (panel + 1) * width - 15, curves["round"].max()
        slope, rise = (right - left) / last, (height - 40) / (ticks[-1] - ticks[0])
        write(root, left - 35, 20, title)
        for tick in ticks:
            y = height - (tick - ticks[0]) * rise
            line(root, [(left, y), (right, y)], "#ddd")
            write(root, left - 35, y + 4, f"{tick:.3g}")
        for at in (0, last // 2, last):
            write(root, left + at * slope - 5, height + 18, str(at))
        for model, colour in COLOURS.items():
            points = mean.loc[model][measure].items()
            line(root, [(left + at * slope, height - (value - ticks[0]) * rise) for at, value in points], colour)
    for number, (model, colour) in enumerate(COLOURS.items()):
        line(root, [(45 + 240 * number, 260), (75 + 240 * number, 260)], colour)
        write(root, 82 + 240 * number, 264, model)
    write(root, 790, 264, "by round")
    return ElementTree.tostring(root, encoding="unicode")


def line(root: ElementTree.Element, points: list[tuple[float, float]], colour: str) -> None:
    """A line through these points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    ElementTree.SubElement(root, "polyline", {"points": path, "fill": "none", "stroke": colour, "stroke-width": "2"})


def write(root: ElementTree.Element, x: float, y: float, text: str) -> None:
    """A text that begins here."""
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-family": "sans-serif", "font-size": "12", "fill": "#222"}
    ElementTree.SubElement(root, "text", place).text = text


if __name__ == "__main__":
    main()

"""Seconds per round beyond the local work: what the federation itself costs.

    python -m benchmarks.overhead [--sites 5 20 100] [--rounds 6] [--ray]

One optimiser step per round and site, with the default network, on tables of 100 patients. The local work is the same
steps in a plain loop over the sites. ``--ray`` adds Flower's own simulation, for the first number of sites. Times in
this process are CPU seconds of one thread, so that a busy machine does not change them; Ray's are wall-clock.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from client.app import app
from mcrage import rng
from mcrage.cddpm import CDDPM
from mcrage.config import RunConfig
from mcrage.data.reader import read_table
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig
from mcrage.training.local import TrainingConfig, train_steps
from server.rounds import run_federation
from simulations.cohort import Cohort, CohortConfig
from simulations.flower import flwr_run
from simulations.grid import InProcessGrid
from simulations.sites import write_sites

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Prints one JSON line per engine and number of sites."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for num_sites in options.sites:
        engines = [in_process, ray] if options.ray and num_sites == options.sites[0] else [in_process]
        with tempfile.TemporaryDirectory() as folder:
            cohort = Cohort(CohortConfig(num_sites=num_sites, patients_per_site=100))
            write_sites(Path(folder) / "sites", cohort.hospitals())
            local = local_work(Path(folder) / "sites")
            for engine in engines:
                print(json.dumps(measure(engine, Path(folder), num_sites, rounds=options.rounds, local=local)))


def measure(
    engine: Callable[[RunConfig, int], list[float]], folder: Path, num_sites: int, *, rounds: int, local: float
) -> dict[str, object]:
    """Median over all rounds but the first, which reads the tables."""
    settings = {"num-server-rounds": rounds, "local-steps": 1, "evaluate-every": 0}
    places = {"site-dir": str(folder / "sites"), "out-dir": str(folder / engine.__name__)}
    started = time.monotonic()
    seconds = statistics.median(engine(RunConfig.parse(settings | places), num_sites)[1:])
    return {
        "engine": engine.__name__,
        "sites": num_sites,
        "round_ms": round(1e3 * seconds, 1),
        "local_ms": round(1e3 * local, 1),
        "ratio_to_local": round(seconds / local, 2),
        "overhead_ms": round(1e3 * (seconds - local), 1),
        "overhead_ms_per_site": round(1e3 * (seconds - local) / num_sites, 2),
        "run_s": round(time.monotonic() - started, 1),
    }


def in_process(config: RunConfig, num_sites: int) -> list[float]:
    """CPU seconds of each round with the grid in this process."""
    ends = [time.process_time()]
    grid = InProcessGrid.of_folder(app, num_sites, config)
    run_federation(grid, config, progress=lambda _: ends.append(time.process_time()))
    return [end - start for start, end in itertools.pairwise(ends)]


def ray(config: RunConfig, num_sites: int) -> list[float]:
    """Wall-clock seconds of each round in Flower's simulation."""
    if flwr_run(ROOT, config, num_sites=num_sites):
        raise SystemExit("the run failed")
    record = json.loads((Path(config.places.out_dir) / "run.json").read_text(encoding="utf-8"))
    return [entry["seconds"] for entry in record["rounds"]]


def local_work(folder: Path, repeats: int = 5) -> float:
    """Median CPU seconds of one step at every site, one after the other, with nothing in between."""
    schema = TableSchema.load(folder / "schema.json")
    model = CDDPM.initialised(schema, None, config=ModelConfig())
    paths = sorted(folder.glob("site-*.csv"))
    encoded = [model.transform.encode(read_table(path, schema), generator=rng.stream(0, path.name)) for path in paths]
    parameters, config = model.parameters(), TrainingConfig(total_steps=100, batch_size=256)
    times = []
    for repeat in range(repeats):
        started = time.process_time()
        for rows in encoded:
            model.load_parameters(parameters)
            draw = rng.torch_stream(0, repeat)
            list(train_steps(model.network_, model.diffusion_, rows, config=config, steps=range(1), generator=draw))
        times.append(time.process_time() - started)
    return statistics.median(times)


if __name__ == "__main__":
    main()

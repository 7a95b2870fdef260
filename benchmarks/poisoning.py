"""What one lying site of five costs the model, by strategy.

    python -m benchmarks.poisoning [--seeds 3] [--rounds 40] [--only krum fedavg …] [--json poisoning.json]

Five hospitals of the simulated cohort. One of them, another one with every seed, trains as all do and then sends
something else (:data:`LIES`), in every round; its description is honest. Measured on patients of no hospital, larger
being better: all pairs and one way (1 is perfect), undetected rows (2 − 2 detection; 1 is indistinguishable), and the
AUROC of boosting trained on generated rows. Each is compared with the same strategy when nobody lies, and with the
plain mean of the other four, which is what one had who knew the liar. The tables show losses in per cent, means over
the seeds with 95 % intervals (Student's t); what the model before training loses is the scale to read them by.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from flwr.app import Array, Message, MessageType
from flwr.serverapp import Grid
from numpy.typing import NDArray
from scipy import stats

from client.app import app
from mcrage import CDDPM, rng
from mcrage.config import FederationConfig, RunConfig, Scalar
from mcrage.errors import FederationError, SamplingError
from mcrage.evaluation import fidelity
from server.roster import call_roll
from server.rounds import RoundLoop
from server.strategy import RoundGrid
from simulations.cohort import Cohort, CohortConfig
from simulations.grid import InProcessGrid
from simulations.sites import Hospitals, write_sites

Arrays = dict[str, NDArray[Any]]
Lie = Callable[[Arrays, Arrays, np.random.Generator], Arrays]
"""What is sent instead of an honest update: from the parameters that came, those after training, and a generator."""

STRATEGIES = ("fedavg", "fedavgm", "fedmedian", "fedtrimmedavg", "krum", "multikrum")
MEASURES = ("all_pairs", "one_way", "undetected", "tstr")
SITES = 5
UNTRAINED, HONEST, ABSENT = "before training", "nobody lies", "the liar is absent"
LARGE_NORM = 1e3


def moved(received: Arrays, trained: Arrays, factor: float) -> Arrays:
    """The parameters that came, moved by a multiple of the honest update."""
    return {name: (start + factor * (trained[name] - start)).astype(start.dtype) for name, start in received.items()}


def strayed(received: Arrays, norm: float, generator: np.random.Generator) -> Arrays:
    """The parameters that came, moved by a random direction of this length."""
    noise = {name: generator.normal(size=start.shape) for name, start in received.items()}
    scale = norm / length(noise)
    return {name: (start + scale * noise[name]).astype(start.dtype) for name, start in received.items()}


def length(arrays: Arrays) -> float:
    """Euclidean norm of all arrays together."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))


LIES: dict[str, Lie] = {
    "update x 10": lambda came, trained, _: moved(came, trained, 10.0),
    "update x -1": lambda came, trained, _: moved(came, trained, -1.0),
    "random, same norm": lambda came, trained, draw: strayed(
        came, length({name: trained[name] - came[name] for name in came}), draw
    ),
    "random, norm 1000": lambda came, _, draw: strayed(came, LARGE_NORM, draw),
}


class LyingGrid(RoundGrid):
    """A grid, one of whose nodes sends other parameters than it has trained.

    Args:
        grid: The grid behind it.
        liar: The node.
        lie: What it sends.
        seed: Root of its draws.
    """

    def __init__(self, grid: Grid, liar: int, lie: Lie, *, seed: int) -> None:
        super().__init__(grid, list(grid.get_node_ids()))
        self._liar, self._lie, self._draw = liar, lie, rng.stream(seed, "lie")
        self._asked: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the grid behind it; what the liar is asked to train is kept."""
        sent = list(messages)
        ids = list(super().push_messages(sent))
        for message_id, message in zip(ids, sent, strict=True):
            if (message.metadata.dst_node_id, message.metadata.message_type) == (self._liar, MessageType.TRAIN):
                self._asked[message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies of the grid behind it, but for the lies."""
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if asked is not None and not reply.has_error():
                came, sent = (message.content.array_records["arrays"] for message in (asked, reply))
                for name, array in self._lie(numbers(came), numbers(sent), self._draw).items():
                    sent[name] = Array(array)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """The replies of a grid that answers at once."""
        return self.pull_messages(self.push_messages(messages))


def numbers(record: Mapping[str, Array]) -> Arrays:
    """The arrays of a record."""
    return {name: array.numpy() for name, array in record.items()}


def trained(
    hospitals: Hospitals, settings: Mapping[str, Scalar], *, liar: int = 0, lie: Lie | None = None, rounds: int
) -> CDDPM:
    """The model after so many rounds; of none it is the model before training.

    Args:
        hospitals: Their tables.
        settings: Of the run, by key.
        liar: Place of the hospital that lies.
        lie: What it sends; None for the truth.
        rounds: Rounds that are trained.

    Raises:
        FederationError: If the training diverged.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_sites(Path(folder) / "sites", hospitals)
        places = {"site-dir": str(Path(folder) / "sites"), "out-dir": str(Path(folder) / "out"), "evaluate-every": 0}
        run = RunConfig.parse({**settings, **places})
        grid = InProcessGrid.of_folder(app, len(hospitals.tables), run)
        node = list(grid.get_node_ids())[liar]
        reached = LyingGrid(grid, node, lie, seed=run.federation.seed) if lie else grid
        loop = RoundLoop(reached, run, call_roll(reached, run))
        while loop.server_round < rounds:
            loop.next_round()
        return loop.result().model


def quality(model: CDDPM, test: pd.DataFrame, seed: int) -> dict[str, float]:
    """The measures of as many generated rows as there are test rows."""
    rows = model.sample(len(test), random_state=rng.derive(seed, "quality"))
    draw = rng.stream(seed, "detection")
    return {
        "all_pairs": fidelity.all_pairs(test, rows, model.schema_),
        "one_way": fidelity.one_way(test, rows, model.schema_),
        "undetected": 2 - 2 * fidelity.detection(test, rows, model.schema_, generator=draw),
        "tstr": fidelity.train_synthetic_test_real(rows, test, model.schema_),
    }


def runs(
    seed: int, strategies: Iterable[str], settings: Mapping[str, Scalar], *, rounds: int, test_rows: int
) -> Iterator[dict[str, Any]]:
    """A line for the model before training, for the mean without the liar, and for every strategy and case."""
    cohort = Cohort(CohortConfig(seed=seed, num_sites=SITES))
    test, everybody, liar = cohort.fresh(test_rows), cohort.hospitals(test_patients=0), seed % SITES
    others = {site: table for place, (site, table) in enumerate(everybody.tables.items()) if place != liar}
    cases: list[tuple[str, str, Hospitals, Lie | None, int]] = [
        ("fedavg", UNTRAINED, everybody, None, 0),
        ("fedavg", ABSENT, Hospitals(cohort.schema, others), None, rounds),
        *((strategy, HONEST, everybody, None, rounds) for strategy in strategies),
        *((strategy, case, everybody, lie, rounds) for strategy in strategies for case, lie in LIES.items()),
    ]
    for strategy, case, hospitals, lie, number in cases:
        needed = FederationConfig(strategy=strategy).needed_sites
        own: dict[str, Scalar] = {"strategy": strategy, "min-sites": needed, "quorum-retries": 0}
        run = own | {"seed": seed, "num-server-rounds": rounds} | settings
        found: dict[str, Any] = {"seed": seed, "strategy": strategy, "case": case}
        try:
            yield found | quality(trained(hospitals, run, liar=liar, lie=lie, rounds=number), test, seed)
        except (FederationError, SamplingError) as error:
            yield found | {"reason": str(error).splitlines()[0]}


def lost(lines: list[dict[str, Any]], measure: str, strategy: str, case: str, *, than: tuple[str, str]) -> list[float]:
    """Per cent of a measure lost against another strategy and case, by seed; NaN where there is no model."""
    value = {(line["seed"], line["strategy"], line["case"]): line.get(measure, math.nan) for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    return [100 * (1 - value[seed, strategy, case] / value[seed, *than]) for seed in seeds]


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over the seeds; the number of seeds without a model, if there are any."""
    missing = sum(math.isnan(value) for value in values)
    if missing:
        return f"no model ({missing} of {len(values)})"
    mean, half = float(np.mean(values)), math.nan
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"


def table_of(lines: list[dict[str, Any]]) -> str:
    """For each measure: its value where nobody lies, and what is lost against that and against the absent liar."""
    means, blocks = pd.DataFrame(lines).groupby(["strategy", "case"])[list(MEASURES)].mean(), []
    strategies = [name for name in STRATEGIES if (name, HONEST) in means.index]
    for measure in MEASURES:
        without = ("fedavg", ABSENT)
        rows = {(f"{ABSENT}, fedavg", "value"): {HONEST: f"{means.loc[without, measure]:.4f}"}}
        for strategy in strategies:
            rows[strategy, "value"] = {HONEST: f"{means.loc[(strategy, HONEST), measure]:.4f}"}
            for base, than in {"% lost": (strategy, HONEST), "% lost vs absent": without}.items():
                cells = {case: interval(lost(lines, measure, strategy, case, than=than)) for case in (HONEST, *LIES)}
                untrained = lost(lines, measure, "fedavg", UNTRAINED, than=than)
                rows[strategy, base] = {UNTRAINED: interval(untrained)} | cells
        table = pd.DataFrame(rows).T.reindex(columns=[UNTRAINED, HONEST, *LIES]).fillna("")
        blocks.append(f"{measure}\n{table.to_string()}")
    return "\n\n".join(blocks)


def main() -> None:
    """Prints the table; a line per model as they come goes to the standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=RunConfig().federation.num_server_rounds)
    parser.add_argument("--test-rows", type=int, default=4000)
    parser.add_argument("--only", nargs="+", choices=STRATEGIES, default=STRATEGIES)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the run")
    parser.add_argument("--json", type=Path, help="file for a line of JSON per model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    usual = RunConfig().to_flat()
    settings = {key: type(usual[key])(value) for key, value in (pair.split("=") for pair in options.set)}
    lines = []
    for seed in range(options.seeds):
        for line in runs(seed, options.only, settings, rounds=options.rounds, test_rows=options.test_rows):
            lines.append(line)
            print(json.dumps(line), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(table_of(lines))


if __name__ == "__main__":
    main()

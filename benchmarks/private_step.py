"""What privacy costs: a private training step against one without, in the same process, and the memory of each.

    python -m benchmarks.private_step [--batch 1024 4096] [--width 192 512 --depth 3 4] [--draws 1 4] [--repeats 30]

A batch is so many rows; with privacy it is a Poisson sample of as many patients over ``draws``, each with as many
rows. Both sides take complete steps of the library's own trainings: batch, random numbers, gradients, noise, optimiser.
The private one adds its batch up in parts that fit a cache, the other takes it whole.
The table is diabetes-130 where MCRAGE_DATA names the folder of data sets, else the simulated cohort. Times are CPU
milliseconds of one thread, medians of repeats in which all take turns; the interval is of the ratio of medians, from
1,000 resamples of the repeats. Opacus' own ghost clipping, which passes backward twice, takes turns too where a
patient has one draw: its norms, its losses, no noise.

Memory is by how much the first steps raise the peak of the resident memory over what the process held before them,
when table, network and diffusion were there; each in a process of its own, which has given back what it had freed.
"""

import argparse
import copy
import ctypes
import itertools
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

from benchmarks.generator import cohort_tables, tables
from benchmarks.machine import added_memory_mb, described, markdown
from mcrage import CDDPM, TableSchema, rng
from mcrage.data.marginals import Marginals
from mcrage.diffusion.network import ModelConfig
from mcrage.privacy.sampling import Patients
from mcrage.training.local import TrainingConfig, train_steps
from mcrage.training.optimisers import Optimisers
from mcrage.training.private import DPSGDConfig, PatientRows, RoundKeys, train_privately

WARM_UP = 3
STEPS_FOR_MEMORY = 5
PLAIN, PRIVATE, OPACUS = "plain", "private", "Opacus"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What is compared.

    Attributes:
        width, depth: Of the network.
        batch: Rows of a step.
        draws: Rows of a patient.
    """

    width: int
    depth: int
    batch: int
    draws: int

    @property
    def options(self) -> list[str]:
        """As on the command line."""
        return [word for name, value in vars(self).items() for word in (f"--{name}", str(value))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024])
    parser.add_argument("--width", type=int, nargs="+", default=[192])
    parser.add_argument("--depth", type=int, nargs="+", default=[3], help="one for each width")
    parser.add_argument("--draws", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--memory-of", choices=(PLAIN, PRIVATE), help="print the megabytes of this kind of step and no table"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = zip(options.width, options.depth, strict=True)
    settings = [Setting(*size, batch, draws) for size in sizes for batch in options.batch for draws in options.draws]
    if options.memory_of:
        print_memory(settings[0], options.memory_of)
        return
    table, schema, origin = table_of()
    lines = [line(setting, Bench(table, schema, setting).seconds(repeats=options.repeats)) for setting in settings]
    print(f"{described()}; one thread, medians of {options.repeats}, {origin}\n\n{markdown(lines)}")


class Bench:
    """Steps of every kind, each from the same start.

    Args:
        table: Rows of patients.
        schema: Describes them.
        setting: Of the comparison.
    """

    def __init__(self, table: pd.DataFrame, schema: TableSchema, setting: Setting) -> None:
        config = ModelConfig(width=setting.width, depth=setting.depth)
        model = CDDPM.initialised(schema, Marginals.of(table, schema), config=config)
        self.setting, self.diffusion, self._start = setting, model.diffusion_, model.network_
        encoded = model.transform.encode(table, generator=rng.stream(0, "private step"))
        self.rows = PatientRows(encoded, Patients(table, schema))
        self.config = TrainingConfig(total_steps=10_000, batch_size=setting.batch)
        self._generator = rng.torch_stream(0, "private step")

    def seconds(self, *, repeats: int) -> dict[str, Floats]:
        """CPU seconds of each repeat's steps."""
        others = {PLAIN: self.plain()} | ({OPACUS: self.opacus()} if self.setting.draws == 1 else {})
        taken: dict[str, list[float]] = {kind: [] for kind in (*others, PRIVATE)}

        def turns() -> Iterator[int]:
            """Numbers of the private steps; between them the others take theirs."""
            for step in range(repeats + WARM_UP):
                for kind, steps in others.items():
                    started = time.process_time()
                    next(steps)
                    taken[kind].append(time.process_time() - started)
                started = time.process_time()
                yield step
                taken[PRIVATE].append(time.process_time() - started)

        self.train_privately(turns())
        return {kind: np.array(times[WARM_UP:]) for kind, times in taken.items()}

    def train_privately(self, steps: Iterable[int]) -> None:
        """The library's private training."""
        patients = len(self.rows.patients)
        privacy = DPSGDConfig(
            noise_multiplier=1.0,
            sample_rate=self.setting.batch / self.setting.draws / patients,
            max_grad_norm=1.0,
            draws=self.setting.draws,
            patients=patients,
        )
        keys = RoundKeys.of(os.urandom(32), b"private step")
        network = copy.deepcopy(self._start)
        train_privately(network, self.diffusion, self.rows, config=self.config, privacy=privacy, keys=keys, steps=steps)

    def plain(self) -> Iterator[float]:
        """The library's training without privacy: every item is a step."""
        network, steps = copy.deepcopy(self._start), range(self.config.total_steps)
        return train_steps(
            network,
            self.diffusion,
            self.rows.encoded,
            config=self.config,
            steps=steps,
            generator=self._generator,
        )

    def opacus(self) -> Iterator[None]:
        """Ghost clipping as Opacus does it, on shuffled batches and without noise: every item is a step."""
        network = copy.deepcopy(self._start)
        moved = Optimisers(network, self.config)
        if network.label is not None:
            network.label.through_layers = True
        hooks = GradSampleHooksFastGradientClipping(network, strict=False, loss_reduction="sum", max_grad_norm=1.0)
        zeroed = SimpleNamespace(zero_grad=moved.zero)  # gradients are parts of one vector: they stay where they are
        for step in itertools.count():
            moved.zero()
            picked = torch.randperm(len(self.rows.encoded), generator=self._generator)[: self.setting.batch]
            batch = self.rows.encoded.rows(picked)
            losses = self.diffusion.loss(network.denoiser, batch, self._generator)
            if network.label is not None:
                losses = losses + network.label.loss(batch)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                DPTensorFastGradientClipping(hooks, zeroed, losses, loss_reduction="sum").backward()
            for part in moved.parts:
                part.gradient.div_(self.setting.batch)
            moved.step(step)
            yield


def line(setting: Setting, taken: dict[str, Floats]) -> dict[str, object]:
    """The table's line about a setting."""
    medians = {kind: float(np.median(times)) for kind, times in taken.items()}
    low, high = interval(taken[PRIVATE], taken[PLAIN])
    memory = {kind: memory_of(setting, kind) for kind in (PLAIN, PRIVATE)}
    return {
        "network": f"{setting.width} x {setting.depth}",
        "rows": setting.batch,
        "draws": setting.draws,
        "plain ms": f"{1e3 * medians[PLAIN]:.1f}",
        "private ms": f"{1e3 * medians[PRIVATE]:.1f}",
        "ratio": f"{medians[PRIVATE] / medians[PLAIN]:.2f}",
        "95 %": f"{low:.2f} to {high:.2f}",
        "Opacus' ratio": f"{medians[OPACUS] / medians[PLAIN]:.2f}" if OPACUS in medians else None,
        "plain MB": memory[PLAIN],
        "private MB": memory[PRIVATE],
    }


def interval(numerator: Floats, denominator: Floats) -> tuple[float, float]:
    """Of the ratio of medians: 95 % of 1,000 resamples of the repeats."""
    draw = rng.stream(0, "private step", "interval").integers(0, len(numerator), (1000, len(numerator)))
    low, high = np.quantile(np.median(numerator[draw], axis=1) / np.median(denominator[draw], axis=1), [0.025, 0.975])
    return float(low), float(high)


def memory_of(setting: Setting, kind: str) -> int | None:
    """Megabytes that the first steps of a process add at its peak."""
    command = [sys.executable, "-m", "benchmarks.private_step", *setting.options, "--memory-of", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def print_memory(setting: Setting, kind: str) -> None:
    """Measures it in this process."""
    table, schema, _ = table_of()
    bench = Bench(table, schema, setting)
    work = {
        PLAIN: lambda: list(itertools.islice(bench.plain(), STEPS_FOR_MEMORY)),
        PRIVATE: lambda: bench.train_privately(range(STEPS_FOR_MEMORY)),
    }[kind]
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed while the table was read would take the steps up unseen
    _, memory = added_memory_mb(work)
    print("unknown" if memory is None else round(memory))


def table_of() -> tuple[pd.DataFrame, TableSchema, str]:
    """Training rows, their schema, and where they are from."""
    known = "MCRAGE_DATA" in os.environ
    train, _, schema = tables() if known else cohort_tables()
    return train, schema, "rows of diabetes-130" if known else "rows of the simulated cohort"


if __name__ == "__main__":
    main()

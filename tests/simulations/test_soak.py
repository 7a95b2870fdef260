"""What a run gathers while its rounds go by: a line per round and site in its records, and nothing else.

Memory is what the process has for itself: what it shares with others shrinks when another one loads the same libraries.
"""

import ctypes
import gc
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message
from scipy.stats import theilslopes

from client.app import app
from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from server.rounds import run_federation
from simulations.grid import InProcessGrid

SETTLED = 3  # rounds after which caches are full and every file has its place
RECORDS = {"metrics.jsonl": 150, "history.jsonl": 250, "ledger.sqlite": 2048}  # bytes per site and round
OTHERS = 4096  # bytes by which all other files together may grow: numbers become longer
PRIVATE = {"dp": True, "dp_noise_multiplier": 2.0, "dp_sample_rate": 0.5, "dp_draws": 1}

_MEMORY = Path("/proc/self/smaps_rollup")
pytestmark = pytest.mark.skipif(not _MEMORY.exists(), reason="needs Linux's /proc")

Leak = Callable[[list[Message]], object]


@dataclass(frozen=True)
class Footprint:
    """What a process has after a round.

    Attributes:
        memory: Bytes of its own.
        objects: Python objects that can hold others, without weak references: pandas keeps up to 500 dead ones for each
            block of a table that is kept.
        handles: Open files.
        threads: Of the system.
        sizes: Bytes of the files of the run and of the hospitals, by name without the number of the round.
        num_files: How many they are.
    """

    memory: int
    objects: int
    handles: int
    threads: int
    sizes: Counter[str]
    num_files: int

    @classmethod
    def of(cls, folder: Path) -> "Footprint":
        """What this process has now, and what lies in the folder."""
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes: Counter[str] = Counter()
        for path in files:
            sizes[path.name] += path.stat().st_size
        return cls(
            memory=1024 * int(re.search(r"Anonymous: +(\d+)", _MEMORY.read_text())[1]),  # type: ignore[index]
            objects=sum(type(each) is not weakref.ReferenceType for each in gc.get_objects()),
            handles=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
            sizes=sizes,
            num_files=len(files),
        )


def grown(rounds: Sequence[Footprint], num_sites: int) -> set[str]:
    """What became more since the run had settled, memory aside."""
    settled, last, passed = rounds[SETTLED - 1], rounds[-1], len(rounds) - SETTLED
    found = {name for name in ("handles", "threads") if len({getattr(r, name) for r in rounds[SETTLED - 1 :]}) > 1}
    if last.objects - settled.objects >= passed * num_sites:
        found.add("objects")
    more = last.sizes - settled.sizes
    if any(more[name] > most * passed * num_sites for name, most in RECORDS.items()):
        found.add("records")
    if last.num_files != settled.num_files or sum(more.values()) - sum(more[name] for name in RECORDS) > OTHERS:
        found.add("files")
    return found


def memory_growth(rounds: Sequence[Footprint]) -> float:
    """By what share memory grows in ten rounds: ten times the median slope between two of them (Theil and Sen).

    A single step is none: the interpreter's table of interned strings doubles once, by 4 MB.
    """
    memory = [footprint.memory for footprint in rounds[SETTLED - 1 :]]
    return 10 * float(theilslopes(memory).slope) / memory[0]


class LeakingGrid(InProcessGrid):
    """A federation in which something is kept of all replies."""

    leak: Leak

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies."""
        replies = list(super().pull_messages(message_ids))
        self.leak(replies)
        return replies


Run = Callable[..., list[Footprint]]


@pytest.fixture
def run(tmp_path: Path, tiny_schema: TableSchema, tiny_config: Callable[..., RunConfig]) -> Run:
    """Runs tiny sites, each with a private folder of its own, and tells what there is after each round."""

    def run(num_sites: int, num_rounds: int, *, leak: Leak | None = None, **changes: object) -> list[Footprint]:
        sites = tmp_path / "sites"
        sites.mkdir()
        tiny_schema.save(sites / "schema.json")
        for number in range(num_sites):
            write_site(sites / f"site-{number:03d}.csv", number)
        config = tiny_config(site_dir=str(sites), num_server_rounds=num_rounds, evaluate_every=5, **changes)
        grid = (InProcessGrid if leak is None else LeakingGrid).of_folder(app, num_sites, config)
        if isinstance(grid, LeakingGrid):
            grid.leak = leak
        found: list[Footprint] = []
        gc.collect()
        gc.freeze()  # what other tests left is neither counted nor looked at again
        try:
            run_federation(grid, config, progress=lambda _: found.append(Footprint.of(tmp_path)))
        finally:
            gc.unfreeze()
        assert len(list((sites / "private").glob("*/ledger.sqlite"))) == num_sites
        return found

    return run


def write_site(path: Path, number: int) -> None:
    draw = np.random.default_rng([1, number])
    age = draw.integers(18, 100, 60)
    patients = [f"p{number}-{row}" for row in range(60)]
    lab = (age / 20 + draw.normal(0, 1, 60)).clip(0, 10).round(1)
    columns = {"patient": patients, "sex": draw.choice(["F", "M"], 60), "age": age, "lab": lab, "ill": lab > 3}
    pd.DataFrame(columns).to_csv(path, index=False)


@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["without privacy", "with privacy"])
def test_rounds_leave_only_their_records(run: Run, changes: dict[str, object]) -> None:
    assert grown(run(10, 8, **changes), 10) == set()


def test_what_is_left_behind_is_found(run: Run, tmp_path: Path) -> None:
    kept: list[Message] = []
    ended = threading.Event()
    with ExitStack() as stack:

        def leak(replies: list[Message]) -> None:
            kept.extend(replies)
            stack.enter_context(open(os.devnull))
            thread = threading.Thread(target=ended.wait)
            thread.start()
            stack.callback(thread.join)
            stack.callback(ended.set)
            (tmp_path / "out" / f"{len(kept)}").touch()
            with (tmp_path / "out" / "metrics.jsonl").open("a") as file:
                file.write("x" * 1000 + "\n")

        assert grown(run(3, 6, leak=leak), 3) == {"objects", "handles", "threads", "files", "records"}


@pytest.mark.soak
@pytest.mark.parametrize("changes", [{}, PRIVATE], ids=["without privacy", "with privacy"])
def test_a_hundred_sites_over_twenty_rounds_take_what_they_took_in_the_third(
    run: Run, changes: dict[str, object]
) -> None:
    rounds = run(100, 20, **changes)
    assert grown(rounds, 100) == set()
    assert memory_growth(rounds) < 0.01


@pytest.mark.soak
def test_memory_that_is_kept_is_found(run: Run) -> None:
    kept = []
    assert memory_growth(run(3, 13, leak=lambda _: kept.append(b"x" * 500_000))) > 0.01

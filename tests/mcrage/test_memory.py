"""What a training takes is estimated within a factor of two, and what does not fit is refused before it starts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mcrage import memory
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.data.transform import TableTransform
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import ConfigError
from mcrage.memory import free_bytes, require_memory, training_bytes
from mcrage.training.length import default_batch_size

ROOT = Path(__file__).parents[2]
FACTOR = 2
TARGET = {"name": "died", "kind": "boolean", "role": "target", "nullable": False}


def wide(*, numbers: int, categories: int, levels: int) -> TableSchema:
    names = [f"level {place}" for place in range(levels)]
    columns: list[dict[str, Any]] = [
        {"name": f"n{place}", "kind": "continuous", "minimum": -6, "maximum": 6, "decimals": 3}
        for place in range(numbers)
    ]
    columns += [{"name": f"c{place}", "kind": "categorical", "categories": names} for place in range(categories)]
    return TableSchema.parse({"columns": [*columns, TARGET]})


def rows_of(schema: TableSchema, rows: int) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    table = {}
    for column in schema.columns:
        if column.is_numeric:
            table[column.name] = pd.Series(draw.normal(size=rows).clip(-6, 6).round(3))
        elif column.kind == "boolean":
            table[column.name] = pd.Series(draw.random(rows) < 0.3)
        else:
            codes = draw.integers(0, len(column.levels), rows)
            table[column.name] = pd.Series(pd.Categorical.from_codes(codes, [*column.levels]))
    return pd.DataFrame(table)


MEASURED = """
import json, pathlib, runpy, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, ".")
here = runpy.run_path("tests/mcrage/test_memory.py")
asked = json.loads(sys.argv[1])
schema = here["wide"](**asked["schema"])
table = here["rows_of"](schema, asked["rows"])
def peak():  # getrusage would start from the peak of the process that this one was forked from
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
before = peak()
model = here["CDDPM"](steps=6, **asked["settings"]).fit(table, schema)
trained = peak()
model.sample(1024)
print(json.dumps([before, trained, peak()]))
"""


def measured(rows: int, settings: dict[str, int], **schema: int) -> list[int]:
    """Peak bytes of a process before training, after it and after sampling a few rows."""
    asked = json.dumps({"rows": rows, "settings": settings, "schema": schema})
    command = [sys.executable, "-c", MEASURED, asked]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout))


CASES: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "300 columns": (20_000, {}, {"numbers": 150, "categories": 150, "levels": 10}),
    "1,000 levels": (20_000, {}, {"numbers": 5, "categories": 1, "levels": 1000}),
    "20,000 levels": (2_000, {}, {"numbers": 0, "categories": 1, "levels": 20_000}),
    "many rows": (200_000, {}, {"numbers": 60, "categories": 30, "levels": 5}),
    "large batch": (5_000, {"batch_size": 8192}, {"numbers": 50, "categories": 50, "levels": 10}),
    "large network": (5_000, {"width": 2048}, {"numbers": 5, "categories": 5, "levels": 5}),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks are counted as Linux does")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_factor_of_two_of_the_measured_peak(case: str) -> None:
    rows, settings, schema = CASES[case]
    before, trained, sampled = measured(rows, settings, **schema)
    config = ModelConfig(width=settings.get("width", 192))
    layout = TableTransform(wide(**schema)).layout
    estimate = training_bytes(
        layout, config, rows=rows, batch_size=settings.get("batch_size", default_batch_size(rows))
    )
    peak = max(trained, sampled)
    assert (peak - before) / FACTOR < estimate < (peak - before) * FACTOR
    assert peak < 4e9


LAYOUT = TableTransform(wide(numbers=3, categories=2, levels=4)).layout
SIZES = {"rows": 1000, "batch_size": 256}
SMALL = ModelConfig()


def test_the_estimate_grows_with_everything_that_takes_memory() -> None:
    few = training_bytes(LAYOUT, SMALL, **SIZES)
    more_levels = TableTransform(wide(numbers=3, categories=2, levels=4000)).layout
    assert training_bytes(more_levels, SMALL, **SIZES) > 1.5 * few
    assert training_bytes(LAYOUT, ModelConfig(width=4096), **SIZES) > 1.5 * few
    assert training_bytes(LAYOUT, ModelConfig(depth=32), **SIZES) > 1.05 * few
    for name, value in SIZES.items():
        assert training_bytes(LAYOUT, SMALL, **SIZES | {name: 100 * value}) > 1.05 * few


def test_two_million_levels_are_refused_with_the_estimate_before_training_starts() -> None:
    schema = wide(numbers=0, categories=1, levels=2_000_000)
    with pytest.raises(ConfigError) as caught:
        CDDPM(width=4096).fit(rows_of(schema, 100), schema)
    message = str(caught.value)
    assert message.startswith("training needs about ")
    assert "(one column has 2,000,001 levels)" in message
    assert "\n" not in message


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_memory(LAYOUT, SMALL, **SIZES)
    limit, used = tmp_path / "limit", tmp_path / "used"
    monkeypatch.setattr(memory, "_CONTROL_GROUPS", ((limit, used),))
    needed = training_bytes(LAYOUT, SMALL, **SIZES)
    used.write_text("1000\n")
    limit.write_text(f"{needed + 1000}\n")
    require_memory(LAYOUT, SMALL, **SIZES)
    limit.write_text(f"{needed + 999}\n")
    with pytest.raises(
        ConfigError, match=r"needs about 0\.1 GB and 0\.1 GB are free: drop columns or merge rare levels,"
    ):
        require_memory(LAYOUT, SMALL, **SIZES)
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 1\n")
    require_memory(LAYOUT, SMALL, **SIZES)  # the cache can be had back
    (tmp_path / "memory.stat").unlink()
    limit.write_text("max\n")
    require_memory(LAYOUT, SMALL, **SIZES)


def test_free_memory_is_between_nothing_and_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_bytes()
    assert free is not None
    assert 10**7 < free < 10**14
    monkeypatch.setattr(memory, "_MEMINFO", ROOT / "absent")
    physical = free_bytes()
    assert physical is not None
    assert physical >= free

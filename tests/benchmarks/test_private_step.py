import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.private_step import interval

ROOT = Path(__file__).parents[2]
HEAD = [
    "network",
    "rows",
    "draws",
    "plain ms",
    "private ms",
    "ratio",
    "95 %",
    "Opacus' ratio",
    "plain MB",
    "private MB",
]


@pytest.mark.soak
def test_a_private_step_takes_no_more_than_three_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every complete line is checked; the bound is loose because other work on the machine sways short measurements."""
    monkeypatch.delenv("MCRAGE_DATA", raising=False)
    command = [sys.executable, "-m", "benchmarks.private_step", "--batch", "1024", "--repeats", "9"]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)

    first, *_ = done.stdout.splitlines()
    assert first.startswith("processor ")
    assert first.endswith("one thread, medians of 9, rows of the simulated cohort")
    head, _, *lines = [row.strip("| ").split(" | ") for row in done.stdout.splitlines() if row.startswith("|")]
    assert head == HEAD
    ((network, rows, draws, plain, private, ratio, ends, of_opacus, *memory),) = lines
    assert (network, rows, draws) == ("192 x 3", "1024", "1")
    assert float(private) / float(plain) == pytest.approx(float(ratio), abs=0.02), "the ratio is that of the times"
    low, high = map(float, ends.split(" to "))
    assert low <= float(ratio) <= high
    assert 0.5 < float(ratio) <= 3
    assert float(of_opacus) > 0.5
    if sys.platform == "linux":
        assert all(5 < int(size) < 1000 for size in memory)


def test_the_interval_covers_the_ratio_of_medians_and_narrows_with_repeats() -> None:
    draw, widths = np.random.default_rng(0), []
    for repeats in (20, 2000):
        low, high = interval(draw.normal(3.0, 0.3, repeats), draw.normal(2.0, 0.2, repeats))
        assert low < 1.5 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 5

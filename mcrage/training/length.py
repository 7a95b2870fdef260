"""How long and how boldly to train where nobody says so: gently on a small table, which is memorised otherwise.

Measured by ``benchmarks/small_tables.py``: with 1,000 rows, 150 steps at 1e-3 let an attack on the loss reach an AUC of
.522 on the simulated cohort and .547 on diabetes-130 (the strongest attack .547 and .612); 195 steps let it reach .525
and .559. Of the cohort at 2e-3 195 steps give away .541, and the 60 steps at 5e-3 that give away as little as 195 at
1e-3 know less of the label.
"""

import math

import numpy as np

PASSES = 15
"""Passes over a large table; smaller ones are passed more often, by smaller steps."""

_STEPS_OF_A_THOUSAND = 150
_RATE_OF_A_THOUSAND = 1e-3
_HIGHEST_RATE = 5e-3
_FEWEST, _MOST = 60, 4000
_LARGE = 20_000  # rows


def default_batch_size(rows: int) -> int:
    """Rows per step: 512 of a large table, where the same time then shows more rows; 256 of a smaller one."""
    return 512 if rows >= _LARGE else 256


def default_steps(rows: int, batch_size: int) -> int:
    """Training steps: 15 passes over a large table; 150 at 1,000 rows, and as the root of the rows; 60 to 4,000."""
    smaller = _STEPS_OF_A_THOUSAND * math.sqrt(rows / 1000)
    return int(np.clip(round(max(PASSES * rows / batch_size, smaller)), _FEWEST, _MOST))


def default_learning_rate(rows: int) -> float:
    """Highest learning rate: 1e-3 up to 1,000 rows, then as the root of the rows up to 5e-3 from 25,000 on."""
    return float(np.clip(_RATE_OF_A_THOUSAND * math.sqrt(rows / 1000), _RATE_OF_A_THOUSAND, _HIGHEST_RATE))


def opening(steps: int, rows: int, *, is_default: bool) -> str:
    """The line that says how long a training will be, and why."""
    reason = f"the default for {rows:,} rows; steps changes it" if is_default else "as asked"
    return f"training {steps:,} steps ({reason})"

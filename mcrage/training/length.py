"""How long a training lasts where nobody says so."""

import numpy as np

PASSES = 15
"""Passes over the table: with 1,000 rows an attack on the loss then has an AUC of .53 to .55; after 30 passes it has
.55 to .56, after 512 .99, and the held-out loss rises again after about 50 (``benchmarks/small_tables.py``)."""

_FEWEST = 60  # below it nothing is learned: tables of fewer than 1,000 rows are passed more often, and give more away
_MOST = 4000


def default_steps(rows: int, batch_size: int = 256) -> int:
    """Training steps that pass :data:`PASSES` times over a table, from 60 to 4,000: more would memorise a small one."""
    return int(np.clip(round(PASSES * rows / batch_size), _FEWEST, _MOST))


def opening(steps: int, rows: int, *, is_default: bool) -> str:
    """The line that says how long a training will be, and why."""
    reason = f"the default for {rows:,} rows; steps changes it" if is_default else "as asked"
    return f"training {steps:,} steps ({reason})"

"""Whether a training fits into memory, told before it starts instead of by the system's killing it.

The estimate counts what grows with the table: parameters with gradients and optimiser, the encoded table, and the
tensors of one batch or, if that is more, of the rows that are sampled at once. Its factors were measured on Linux;
tests/mcrage/test_memory.py holds it to measured peaks within a factor of two.
"""

import os
from pathlib import Path

from mcrage.data.transform import Layout
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import ConfigError

GIGABYTE = 10**9

_LIBRARIES = 10**8  # what torch loads when it first trains
_COPIES = 6  # parameters, gradients, two moments, the average and what an optimiser's step needs
_BATCH_TENSORS = 18  # of the width of a row: noise, one-hot levels, logits and what differentiation keeps of them
_SAMPLED_TENSORS = 10  # of the width of a row
_SAMPLED_ROWS = 1024  # at once
_HIDDEN_TENSORS = 6  # per layer
_WAVES = 4  # inputs of the network for every number, beside the number


def training_bytes(layout: Layout, config: ModelConfig, *, rows: int, batch_size: int) -> int:
    """Estimated bytes that training takes at its peak, beyond those of the table.

    Args:
        layout: Widths of the encoded row.
        config: What the network is.
        rows: Rows of the table.
        batch_size: Rows per step.
    """
    inputs = layout.width + _WAVES * layout.num_numeric + sum(layout.attribute_sizes)
    parameters = config.width * (inputs + layout.width + config.depth * config.width)
    encoded = rows * (16 * layout.num_numeric + 16 * len(layout.block_sizes) + 4 * layout.num_covariates)
    batch = max(batch_size * _BATCH_TENSORS, _SAMPLED_ROWS * _SAMPLED_TENSORS) * (inputs + layout.width) // 2
    batch += batch_size * _HIDDEN_TENSORS * config.width * config.depth
    return _LIBRARIES + 4 * (_COPIES * parameters + batch) + encoded


def free_bytes() -> int | None:
    """Bytes that this process can still have: of the machine, or of its control group if that is less.

    Returns:
        None where the system does not tell.
    """
    found = [_available(), *(_left(limit, used) for limit, used in _CONTROL_GROUPS)]
    return min((number for number in found if number is not None), default=None)


def require_memory(layout: Layout, config: ModelConfig, *, rows: int, batch_size: int) -> None:
    """Raises unless training fits.

    Raises:
        ConfigError: With the estimate, what is free, and what takes most of it.
    """
    needed = training_bytes(layout, config, rows=rows, batch_size=batch_size)
    free = free_bytes()
    if free is not None and needed > free:
        largest = max(layout.block_sizes, default=0)
        where = f" (one column has {largest:,} levels)" if 2 * largest > layout.width else ""
        raise ConfigError(
            f"training needs about {needed / GIGABYTE:,.1f} GB and {free / GIGABYTE:,.1f} GB are free: drop columns or "
            f"merge rare levels{where}, take fewer rows, a smaller batch_size or a smaller width"
        )


_MEMINFO = Path("/proc/meminfo")
_CONTROL_GROUPS = (  # the limit and what is used, in version 2 and in version 1 of control groups
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def _available() -> int | None:
    """What the machine can still give: without the swap, with the cache."""
    kilobytes = _field(_MEMINFO, "MemAvailable:")
    if kilobytes is not None:
        return kilobytes * 1024
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _left(limit: Path, used: Path) -> int | None:
    """What a control group's limit leaves, with the cache; None where there is no limit."""
    try:
        left = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None
    return max(0, left + (_field(limit.parent / "memory.stat", "inactive_file") or 0))


def _field(path: Path, name: str) -> int | None:
    """The number that follows a name in a file of names and numbers."""
    try:
        lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    return next((int(words[1]) for words in lines if words[0] == name), None)

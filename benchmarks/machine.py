"""What a benchmark ran on and with, so that its figures can be compared with others."""

import os
import platform
import resource
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NO_BF16 = "none in hardware"
"""What stands for bfloat16 instructions where there are none."""

_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")
_PACKAGES = ("torch", "numpy", "pandas", "scikit-learn")
_FAST_BF16 = ("amx_bf16", "avx512_bf16")


def describe() -> dict[str, str]:
    """Processor, its bfloat16 instructions, cores, and versions of what does the arithmetic."""
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in _cpuinfo())}
    flags = cpu.get("flags", "").split()
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "bf16": ", ".join(flag for flag in _FAST_BF16 if flag in flags) or NO_BF16,
        "cores": str(os.cpu_count()),
        "python": ".".join(map(str, sys.version_info[:3])),
    } | {name: version(name) for name in _PACKAGES}


def described() -> str:
    """The same on one line."""
    return ", ".join(f"{name} {value}" for name, value in describe().items())


def markdown(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as one table; None is a dash."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head)] + [["–" if row[key] is None else str(row[key]) for key in head] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_seconds() -> float:
    """Seconds that processors have worked for this process and for its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_memory_mb() -> float | None:
    """Largest resident memory of this process; None where the system does not tell.

    Linux's getrusage is of no use: it starts at the memory of the process that started this one.
    """
    return _memory_mb("VmHWM")


def added_memory_mb(work: Callable[[], T]) -> tuple[T, float | None]:
    """What a call returns, and by how much it raised the resident memory at its peak; None where no system tells.

    A second call of the same work shows less: it uses the memory that the first one left to the process.
    """
    try:
        _RESET_PEAK.write_text("5", encoding="utf-8")
    except OSError:
        return work(), None
    before = _memory_mb("VmRSS")
    result = work()
    peak = peak_memory_mb()
    return result, None if peak is None or before is None else peak - before


def _memory_mb(field: str) -> float | None:
    lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)


def _cpuinfo() -> list[str]:
    return _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []

"""An environment for each peer, made once, with pinned versions."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = ("torch==2.13.0",)

# What pip installs, call after call: torch first, so that a build that is at hand serves.
REQUIREMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "ctgan": (TORCH, ("ctgan==0.12.1", "rdt==2.0.0", "pandas==2.3.3", "numpy==2.4.6", "scikit-learn==1.9.1")),
    # Without what only its language models need: torchvision and torchaudio would bring another torch.
    "mostlyai-engine": (
        TORCH,
        ("--no-deps", "mostlyai-engine==2.7.3"),
        ("datasets==5.2.0", "opacus==1.6.0", "psutil==5.9.8", "pyarrow==26.0.1", "pandas==3.1.1", "numpy==2.4.6"),
        ("scikit-learn==1.9.1", "pydantic==2.14.4", "rich==15.0.0", "transformers==5.5.3"),
    ),
    "imbalanced-learn": (("imbalanced-learn==0.14.2", "pandas==3.1.1", "numpy==2.4.6", "scikit-learn==1.9.1"),),
    "sdmetrics": (("sdmetrics==0.32.0", "pandas==2.3.3", "numpy==2.4.6", "scipy==1.17.1"),),
}


class EnvironmentFailedError(Exception):
    """An environment could not be made; the message is one line."""


def interpreter(name: str, cache: Path) -> Path:
    """The Python of a peer's environment, which is made in ``cache`` unless one with these versions is there.

    Raises:
        EnvironmentFailedError: If a command fails, with the last line that it said.
    """
    folder, steps = cache / name, REQUIREMENTS[name]
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = hashlib.sha256(repr((steps, sys.version_info[:3])).encode()).hexdigest()
    if ready.exists() and ready.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", str(folder))
    for step in steps:
        _run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step)
    ready.write_text(wanted, encoding="utf-8")
    return python


def pinned(name: str) -> str:
    """The version of the peer itself."""
    pins = [requirement for step in REQUIREMENTS[name] for requirement in step]
    return next(pin.removeprefix(f"{name}==") for pin in pins if pin.startswith(f"{name}=="))


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed, in one line: the last that it said."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"ended with status {done.returncode} and without a message"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentFailedError(reason(done))

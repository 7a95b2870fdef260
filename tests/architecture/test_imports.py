import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = "import json, sys; {statement}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has after one statement."""
    command = [sys.executable, "-c", LOADED.format(statement=statement)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout))


def test_importing_mcrage_loads_nothing_heavy() -> None:
    assert not loaded_by("import mcrage") & {"torch", "pandas", "numpy", "sklearn", "flwr", "ray"}


def test_the_library_works_without_flower_and_ray() -> None:
    loaded = loaded_by("import mcrage; mcrage.CDDPM; import mcrage.cli, mcrage.messages, mcrage.render.html")
    assert "torch" in loaded
    assert not loaded & {"flwr", "ray"}


@pytest.mark.parametrize("package", ["client", "server", "simulations"])
def test_the_applications_resolve_inside_the_repository(package: str) -> None:
    # Others ship modules of these names; they must not win.
    assert Path(str(importlib.import_module(package).__file__)).parent == ROOT / package


def test_one_file_imports_opacus() -> None:
    pattern = re.compile(r"^\s*(?:from|import) opacus", re.MULTILINE)
    folders = ("mcrage", "client", "server", "simulations")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if pattern.search(path.read_text())]
    assert [str(path.relative_to(ROOT)) for path in found] == ["mcrage/privacy/dpsgd.py"]

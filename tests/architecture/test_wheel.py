"""What is installed: the library, its templates and its type marker, and nothing of the applications or the tests."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mcrage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built offline by the backend that pyproject.toml names."""
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["build-backend"] == "hatchling.build"
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_file_of_the_library_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (ROOT / "mcrage").rglob("*")
    library = {p.relative_to(ROOT).as_posix() for p in files if p.is_file() and p.suffix != ".pyc"}
    assert names == library


def test_the_wheel_says_that_it_is_typed_and_has_the_licence(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert "mcrage/py.typed" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_version_of_the_wheel_is_the_packages(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    assert f"\nVersion: {mcrage.__version__}\n" in wheel.read(name).decode()

"""Rules about the text itself: no machine's paths, no addresses of registries, and sizes that a reader can hold."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("mcrage", "client", "server", "simulations", "tests", "docs", "deploy", "benchmarks", ".ci")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".html", ".css", ".json", ".yml", ".yaml", ".sh", "")
MACHINE_PATH = re.compile(r"(?<![\w.~*}])/(?:work|home|root|Users|tmp)/\w")
REGISTRY = re.compile(r"pypi\.org|files\.pythonhosted|download\.pytorch|index-url|simple/pip")
UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
LONGEST_FILE = 400
LONGEST_FUNCTION = 50
PACKAGES = ("mcrage", "client", "server", "simulations")


def texts() -> list[Path]:
    """Text files of the project that people write, without this one, which names what is forbidden."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    found += [path for path in ROOT.iterdir() if path.name == "Makefile" or path.suffix in (".md", ".toml", ".txt")]
    return sorted(
        path for path in found if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__)
    )


def hits(pattern: re.Pattern[str]) -> list[str]:
    lines = [
        (path, number, line)
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    ]
    assert len(lines) > 10_000
    return [f"{path.relative_to(ROOT)}:{number}" for path, number, line in lines if pattern.search(line)]


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY, UNFINISHED], ids=["path", "registry", "unfinished"])
def test_no_text_has_what_belongs_to_a_machine_or_to_a_draft(pattern: re.Pattern[str]) -> None:
    assert hits(pattern) == []


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (MACHINE_PATH, "see /" + "work/somewhere"),
        (MACHINE_PATH, 'open("/home/me/x")'),
        (REGISTRY, "https://pypi.org/simple"),
        (UNFINISHED, "# TODO: later"),
    ],
)
def test_the_patterns_find_what_they_forbid(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_no_file_is_longer_than_a_person_reads_at_once() -> None:
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*PACKAGES, "tests")}
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > LONGEST_FILE} == {}


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring and decorators."""
    size = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        size -= (first.end_lineno or first.lineno) - first.lineno + 1
    return size


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines_of(node) > LONGEST_FUNCTION:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines_of(node)} lines")
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150

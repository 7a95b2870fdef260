"""Rules that no linter here knows: nothing unpickles, seeds the process, or prints from the library."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("mcrage", "client", "server", "simulations")
PICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LOADING = {"torch.load", "torch.save", "pandas.read_pickle", "pd.read_pickle", "joblib.load", "joblib.dump"}
SEEDING = {
    *("torch.manual_seed", "torch.random.manual_seed", "torch.cuda.manual_seed_all", "random.seed"),
    *("np.random.seed", "numpy.random.seed"),
}
PRINTING = {Path("mcrage/progress.py")}
"""Where the library writes to a terminal; its command goes through typer."""

Rule = Callable[[ast.AST, Path], str]


def sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def pickles(node: ast.AST, path: Path) -> str:
    if isinstance(node, ast.Import):
        return next((alias.name for alias in node.names if alias.name.split(".")[0] in PICKLING), "")
    if isinstance(node, ast.ImportFrom):
        return str(node.module) if str(node.module).split(".")[0] in PICKLING else ""
    if isinstance(node, ast.Call) and dotted(node.func) in LOADING:
        return dotted(node.func)
    if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
        return "" if isinstance(node.value, ast.Constant) and node.value.value is False else "allow_pickle"
    return ""


def seeds(node: ast.AST, path: Path) -> str:
    return dotted(node.func) if isinstance(node, ast.Call) and dotted(node.func) in SEEDING else ""


def prints(node: ast.AST, path: Path) -> str:
    if path.parts[0] != "mcrage" or path in PRINTING:
        return ""
    return "print" if isinstance(node, ast.Call) and dotted(node.func) == "print" else ""


def breaches(rule: Rule, tree: ast.AST, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        if found := rule(node, path):
            yield f"{path}: {found}"


@pytest.mark.parametrize("rule", [pickles, seeds, prints])
def test_no_source_breaks_the_rule(rule: Rule) -> None:
    paths = sources()
    assert len(paths) > 50
    trees = [(ast.parse((ROOT / path).read_text(encoding="utf-8")), path) for path in paths]
    assert [line for tree, path in trees for line in breaches(rule, tree, path)] == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (pickles, "import pickle"),
        (pickles, "from joblib import load"),
        (pickles, "import torch\ntorch.load('x')"),
        (pickles, "np.load('x', allow_pickle=True)"),
        (seeds, "import torch\ntorch.manual_seed(0)"),
        (seeds, "np.random.seed(1)"),
        (prints, "print('x')"),
    ],
)
def test_the_rule_finds_what_it_forbids(rule: Rule, source: str) -> None:
    assert list(breaches(rule, ast.parse(source), Path("mcrage/x.py")))

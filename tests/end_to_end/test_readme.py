"""Every command in README.md and docs/ is run, in its order, in a copy of the tree; long ones with smaller settings.

``make demo`` and ``make test`` are run by the pipeline: here the Makefile only has to have them.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from simulations.flower import flower_environment, processes_of

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.fab")
SMALLER = {
    "python -m simulations run": " --rounds 2 --local-steps 5 --set width=32 --set modelled_rows=200"
    " --set target_multiple=0.5 --set num_replicates=20 --set local_models=false",
    "flwr run": " --run-config 'local-steps=2 width=32'",
}
SHORTER = {"num-server-rounds=20": "num-server-rounds=2", "steps=300": "steps=10", "--steps 300": "--steps 10"}
MADE = (
    "runs/sites/site-08.csv",
    "runs/draft.json",
    "runs/own/report.html",
    "runs/own/results.json",
    "runs/own/synthetic.csv",
    "runs/own/synthetic.parquet",
    "runs/own/model/model.safetensors",
    "runs/flower/model/model.safetensors",
    "runs/model/model.safetensors",
    "runs/rows.csv",
    "runs/private/ledger.sqlite",
)


def blocks() -> list[tuple[str, str]]:
    """Language and text of each fenced block, except those that have a test of their own."""
    elsewhere = ("make ", "bash deploy/try-it.sh")  # test_try_it.py
    return [(language, text) for language, text in BLOCK.findall(README + DOCS) if not text.startswith(elsewhere)]


def shortened(text: str) -> str:
    """A block as the test runs it: the same commands with less to do."""
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    commands = text.rstrip().replace("\\\n", " ").splitlines()
    for start, options in SMALLER.items():
        commands = [command + options if command.startswith(start) else command for command in commands]
    return "\n".join(commands)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables as after activating the environment, with a Flower home that is emptied of processes in the end."""
    home = tmp_path / "flower"
    home.mkdir()
    yield flower_environment(home) | {"OMP_NUM_THREADS": "1"}
    for process_id in processes_of(home):
        os.kill(process_id, signal.SIGKILL)


@pytest.mark.slow
def test_every_command_of_the_readme_works_and_leaves_what_it_promises(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    tree = tmp_path / "mcrage"
    shutil.copytree(ROOT, tree, ignore=NOT_COPIED)
    for language, text in blocks():
        runner = [sys.executable, "-c"] if language == "python" else ["bash", "-euo", "pipefail", "-c"]
        done = subprocess.run(
            [*runner, shortened(text)], cwd=tree, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert [path for path in MADE if not (tree / path).exists()] == []


def test_the_two_commands_are_in_the_readme_and_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert re.search(rf"^make {target}\b", README, re.MULTILINE)
        assert re.search(rf"^{target}: \$\(READY\)", makefile, re.MULTILINE)


def test_no_command_of_the_readme_escapes_the_test() -> None:
    fences = re.findall(r"^```(\w*)$", README + DOCS, re.MULTILINE)
    shown = fences.count("text")  # what is not run
    assert [language for language in fences if language not in ("sh", "python", "text", "")] == []
    assert (len(BLOCK.findall(README + DOCS)) + shown) * 2 == len(fences) >= 16


def test_everything_that_the_readme_links_to_in_the_tree_is_there() -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert [target for target in targets if not (ROOT / target).exists()] == []

"""Our one-way fidelity beside the column shapes of SDMetrics, on the same rows, column by column.

    MCRAGE_DATA=… python -m benchmarks.sdmetrics_check [--steps 300] [--cache runs/peers]

SDMetrics runs in an environment of its own. Its total variation should be ours, of levels and of numbers in the same
bins, but for the millionth of a row that it adds where a level has no real row; its Kolmogorov-Smirnov score of the
numbers as they are stands beside it.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.generator import tables
from benchmarks.machine import described, markdown
from benchmarks.peers.environments import EnvironmentFailedError, interpreter, pinned, reason
from benchmarks.peers.tables import categories, exported
from mcrage import CDDPM, TableSchema
from mcrage.evaluation import fidelity

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-9


def main() -> None:
    """Prints a table with a line per column; fails if a column differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "peers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train, real, schema = tables()
    rows = CDDPM(steps=options.steps).fit(train, schema).sample(len(real))
    folder = options.cache / "runs" / "sdmetrics"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in (("real", real), ("synthetic", rows)):
        exported(table, schema).to_csv(folder / f"{name}.csv", index=False)
    theirs = scores(folder, options.cache, schema)
    lines, furthest = [], 0.0
    for column in schema.modelled:
        ours, score = fidelity.one_way(real, rows, TableSchema(columns=(column,))), theirs[column.name]
        furthest = max(furthest, abs(ours - score["tv"]))
        lines.append(
            {
                "column": column.name,
                "one-way": f"{ours:.6f}",
                "TVComplement": f"{score['tv']:.6f}",
                "difference": f"{ours - score['tv']:.1e}",
                "KSComplement": f"{score['ks']:.4f}" if "ks" in score else None,
            }
        )
    print(f"{markdown(lines)}\n\nlargest difference {furthest:.1e}; sdmetrics {pinned('sdmetrics')}, {described()}")
    if furthest > TOLERANCE:
        sys.exit(f"one-way fidelity is not SDMetrics' total variation: a column differs by {furthest:.1e}")


def scores(folder: Path, cache: Path, schema: TableSchema) -> dict[str, dict[str, float]]:
    """What SDMetrics says of each column of the two tables in the folder."""
    numeric = sorted({column.name for column in schema.modelled} - set(categories(schema)))
    script = Path(__file__).parent / "peers" / "runners" / "run_sdmetrics.py"
    try:
        command = [str(interpreter("sdmetrics", cache)), str(script), str(folder), *numeric]
    except EnvironmentFailedError as error:
        sys.exit(f"sdmetrics could not be installed: {error}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"sdmetrics failed: {reason(done)}")
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()

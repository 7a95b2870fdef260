"""What a sweep over epsilon says about runs of other sizes, as the lines of ``mcrage.prospects.MEASURED``.

    python -m simulations privacy-budget --out DIR --sites 10 --patients 700 --seeds 0,1,2,3,4
    python -m benchmarks.prospects DIR

Training patients are those that the hospitals do not keep for testing. A cell that is in several folders counts once.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import pandas as pd

from mcrage.prospects import Measured, signal
from simulations.privacy_budget.cells import REAL
from simulations.privacy_budget.results import CellResult
from simulations.privacy_budget.summary import KEYS, Findings, tidy
from simulations.settings import parse_config


def main() -> None:
    """Prints a line for each generator, place of the noise and epsilon of each data set and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    for each in measured(parser.parse_args().folder):
        print(
            f"    Measured({each.generator!r}, {each.data!r}, {each.signal:.0f}, {each.share:.2f}),".replace("'", '"')
        )


def measured(folders: list[Path]) -> list[Measured]:
    """What the sweeps in the folders came to, in the order of generator, data and signal."""
    by_name = {path.name: path for folder in folders for path in folder.glob("cells/*.json")}
    by_place: dict[tuple[object, ...], list[CellResult]] = defaultdict(list)
    for _, path in sorted(by_name.items()):
        cell = CellResult.read(path)
        if not cell.problem:
            by_place[tuple(getattr(cell.cell, key) for key in KEYS)].append(cell)
    found = [each for cells in by_place.values() for each in _of_place(cells)]
    return sorted(found, key=lambda each: (each.generator, each.data, each.signal))


def _of_place(cells: list[CellResult]) -> list[Measured]:
    findings = Findings(tidy(cells), [])
    sites, patients = findings.place["sites"], findings.place["patients"]
    any_private = next((cell for cell in cells if cell.cell.generator != REAL), None)
    if any_private is None or not sites or not patients:
        return []
    settings = parse_config(any_private.settings)
    train = sites * patients * (1 - settings.federation.test_fraction)
    found = []
    for line in findings.lines:
        share = findings.share(line, "all").value
        if line.noise == "none" or pd.isna(share):
            continue
        noises = 1 if line.noise == "shared" else sites
        at = signal(patients=train, epsilon=line.epsilon, delta=settings.privacy.dp_delta, noises=noises)
        found.append(Measured(line.generator, str(findings.place["dataset"]), at, share))
    return found


if __name__ == "__main__":
    main()

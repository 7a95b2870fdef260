"""The lines that plans rest on are what a sweep's cells say."""

from pathlib import Path

import pytest

from benchmarks.prospects import measured
from mcrage.prospects import signal
from simulations.privacy_budget.results import CellPlace, CellResult, Row


def cell(seed: int, generator: str, noise: str, epsilon: float | None, **auroc: float) -> CellResult:
    place = CellPlace(
        dataset="cohort", sites=4, patients=100, seed=seed, generator=generator, noise=noise, epsilon=epsilon
    )
    rows = tuple(Row(rows=rows, group="all", metric="auroc", value=value) for rows, value in auroc.items())
    settings = (
        {"test_fraction": 0.25} if epsilon is None else {"test_fraction": 0.25, "dp": True, "dp_epsilon": epsilon}
    )
    return CellResult(cell=place, settings=settings, epsilon_spent=epsilon, rows=rows)


def test_a_sweep_gives_a_line_for_each_place_of_the_noise_and_epsilon(tmp_path: Path) -> None:
    cells = [
        cell(seed, *kind, **auroc)
        for seed in (0, 1)
        for kind, auroc in (
            (("real", "none", None), {"local": 0.7, "pooled": 0.8}),
            (("marginal", "local", 1.0), {"federated": 0.65 + 0.02 * seed}),
            (("marginal", "shared", 1.0), {"federated": 0.75}),
            (("marginal", "none", None), {"federated": 0.79}),
        )
    ]
    for folder in ("first", "again"):  # a cell that is in both counts once
        for each in cells:
            path = tmp_path / folder / "cells" / f"{each.cell.seed}-{each.cell.generator}-{each.cell.noise}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(each.model_dump_json())
    found = measured([tmp_path / "first", tmp_path / "again"])
    at = signal(patients=4 * 100 * 0.75, epsilon=1.0, delta=1e-5, noises=4)
    assert [(each.generator, each.data) for each in found] == [("marginal", "cohort")] * 2
    assert [each.signal for each in found] == pytest.approx([at, 2 * at])
    assert [each.share for each in found] == pytest.approx([-0.4, 0.5])

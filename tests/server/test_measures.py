import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from client.app import app
from mcrage.config import RunConfig
from server.app import save_result
from server.rounds import FederationResult, run_federation
from simulations.grid import InProcessGrid

PRIVATE = {"dp": True, "dp_noise_multiplier": 1.0, "dp_sample_rate": 0.2, "dp_score_epsilon": 1.0, "evaluate_every": 2}


@pytest.fixture(scope="module")
def private_run(site_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, FederationResult]:
    out = tmp_path_factory.mktemp("private")
    sites = Path(shutil.copytree(site_dir, out / "sites", ignore=shutil.ignore_patterns("private")))
    given = {name.replace("_", "-"): value for name, value in PRIVATE.items()}
    places = {"site-dir": str(sites), "out-dir": str(out), "width": 16, "depth": 1, "num-server-rounds": 3}
    config = RunConfig.parse(given | places | {"local-steps": 2, "run-name": "test_measures"})
    return config, run_federation(InProcessGrid.of_folder(app, 3, config), config)


def test_sites_measure_after_the_rounds_that_were_fixed_before(
    private_run: tuple[RunConfig, FederationResult],
) -> None:
    _, result = private_run
    assert [len(record.scores) for record in result.history] == [0, 3, 3]
    assert all(not record.losses and not record.held_out for record in result.history)
    assert all(record.sites == ("site-01", "site-02", "site-03") for record in result.history)


def test_every_site_is_charged_for_exactly_what_was_planned(private_run: tuple[RunConfig, FederationResult]) -> None:
    _, result = private_run
    for account in result.accounts.values():
        charged = sorted((event.mechanism, event.noise_multiplier, event.steps) for event in account.events)
        assert charged == [
            ("discrete-gaussian", 20.0, 4),
            ("discrete-laplace", 1.0, 2),
            ("discrete-laplace", 2.0, 1),
            ("dp-sgd", 1.0, 6),
        ]


def test_fairness_comes_from_the_noisy_histograms_with_intervals_or_a_reason(
    private_run: tuple[RunConfig, FederationResult],
) -> None:
    config, result = private_run
    save_result(result, config, seconds=1.0)
    rows = json.loads((Path(config.places.out_dir) / "fairness.json").read_text(encoding="utf-8"))
    assert {(row["round"], row["site"]) for row in rows} == {(n, f"site-0{k}") for n in (2, 3) for k in (1, 2, 3)}
    assert {row["metric"] for row in rows} == {"auroc", "tpr", "fpr", "selection_rate"}
    assert {row["group"] for row in rows} == {"all", "sex=F", "sex=M"}
    assert [row for row in rows if row["against"] is not None]
    for row in rows:
        assert (row["value"] is None) == bool(row["reason"])
        if row["value"] is not None:
            assert row["low"] <= row["value"] <= row["high"]


def test_a_run_without_privacy_has_no_fairness_of_noisy_counts(
    tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = tiny_config(num_server_rounds=1, local_steps=1)
    save_result(run_federation(InProcessGrid.of_folder(app, 3, config), config), config, seconds=1.0)
    assert not (Path(config.places.out_dir) / "fairness.json").exists()
    assert np.isfinite(json.loads((Path(config.places.out_dir) / "run.json").read_text())["rounds"][0]["seconds"])

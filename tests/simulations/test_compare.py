"""Several seeds: what a configuration may say, that intervals are right, and that seeds that are done stay done."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mcrage.errors import ConfigError
from simulations import datasets
from simulations.compare import Comparison, mean_interval, ratio_interval, run_comparison, summarise, table_of
from simulations.study import COHORT

CONFIGS = Path(__file__).parents[2] / "simulations/configs"


@pytest.mark.parametrize(
    ("name", "draws"), [("known-truth", 10), ("unseen-truth", 5), ("diabetes130", 10), ("heart-disease", 20)]
)
def test_every_configuration_that_comes_along_is_valid(name: str, draws: int) -> None:
    comparison = Comparison.load(CONFIGS / f"{name}.toml")
    assert comparison.dataset in (COHORT, *datasets.names())
    assert len(comparison.seeds) == draws


def test_every_seed_has_a_truth_of_its_own_only_where_that_is_asked_for() -> None:
    fixed, redrawn = (Comparison.load(CONFIGS / f"{name}-truth.toml") for name in ("known", "unseen"))
    assert {fixed.cohort_config(seed).rule_seed for seed in fixed.seeds} == {None}
    assert [redrawn.cohort_config(seed).rule_seed for seed in redrawn.seeds] == redrawn.seeds


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seeds = [0]", "dataset: Field required"),
        ('dataset = "cohort"\nseeds = []', "seeds"),
        ('dataset = "cohort"\nseeds = [1, 1]', "stand there once"),
        ('dataset = "cohort"\nseeds = [0]\ntypo = 1', "typo"),
        ('dataset = "cohort"\nseeds = [0]\n[settings]\nlocal_step = 1', "local_step"),
        ('dataset = "cohort"\nseeds = [0]\n[cohort]\nnum_hospitals = 1', "num_hospitals"),
        ('dataset = "diabetes130"\nseeds = [0]\n[cohort]\nnum_sites = 3', "has its own hospitals"),
        ('dataset = "heart-disease"\nseeds = [0]\nredraw_rule = true', "has its own hospitals"),
        ("dataset = ", "Invalid value"),
    ],
)
def test_a_wrong_configuration_is_named(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        Comparison.load(path)


def test_the_interval_of_a_mean_is_students() -> None:
    mean, low, high = mean_interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0
    assert (high - low) / 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)  # t quantile with 2 degrees of freedom
    assert np.isnan(mean_interval(np.array([1.0]))[1])


def test_the_interval_of_a_ratio_covers_its_truth_in_19_of_20_runs_and_a_narrower_one_does_not() -> None:
    # 1,000 runs at 95 %: from 933 to 966 in all but one of 100 such tests
    draw = np.random.default_rng(0)
    covered = narrower = 0
    for _ in range(1000):
        gaps = draw.normal(0.10, 0.03, 10)
        gains = 0.8 * gaps + draw.normal(0, 0.02, 10)
        ratio, low, high = ratio_interval(gains, gaps)
        covered += low <= 0.8 <= high
        narrower += ratio - (ratio - low) * 0.7 <= 0.8 <= ratio + (high - ratio) * 0.7
    assert 933 <= covered <= 966
    assert narrower < 933


def test_without_a_gap_there_is_no_share_of_it() -> None:
    assert np.isnan(ratio_interval(np.array([0.1, 0.1, 0.2]), np.array([0.1, -0.1, 0.01]))).all()


def test_a_summary_has_a_row_per_arm_and_a_share_of_mean_gain_by_mean_gap() -> None:
    names = {"site": "all", "group": "sex=F", "model": "logistic_regression"}
    values = pd.DataFrame(
        names | {"arm": arm, "seed": seed, "auroc": 0.6 + gain, "gain": gain, "gap": 0.1 + 0.001 * seed}
        for seed in range(4)
        for arm, gain in (("local", 0.0), ("federated_target", 0.05 + 0.001 * seed))
    )
    summary = summarise(values).set_index("arm")
    assert summary.loc["federated_target", "seeds"] == 4
    assert summary.loc["federated_target", "share"] == pytest.approx(0.0515 / 0.1015)
    assert summary.loc["local", "share"] == 0
    text = table_of(summary.reset_index())
    assert "sex=F, logistic regression" in text
    assert "Federated, target" in text


@pytest.mark.slow
def test_seeds_that_are_done_are_not_run_again_nor_mixed_with_other_settings(tmp_path: Path) -> None:
    tiny = {"num_server_rounds": 1, "local_steps": 1, "width": 8, "depth": 1, "local_models": False}
    small = {"modelled_rows": 200, "num_replicates": 20, "target_multiple": 0.5, "minority_floor": 0}
    comparison = Comparison(
        dataset="cohort",
        seeds=[0, 1],
        cohort={"num_sites": 2, "patients_per_site": 60},
        settings=tiny | small,
    )
    first = run_comparison(comparison, tmp_path, num_workers=2, verbose=False)
    assert set(first.loc[first["group"] == "all", "seeds"]) == {2}
    written = (tmp_path / "seed-1/results.json").stat().st_mtime_ns
    again = run_comparison(comparison, tmp_path, num_workers=1, verbose=False)
    assert (tmp_path / "seed-1/results.json").stat().st_mtime_ns == written
    pd.testing.assert_frame_equal(again, first)
    other = comparison.model_copy(update={"settings": comparison.settings | {"local_steps": 2}})
    with pytest.raises(ConfigError, match="results of other settings"):
        run_comparison(other, tmp_path, num_workers=1, verbose=False)

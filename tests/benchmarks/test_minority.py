"""The minority's rows of a federated model are the minority's, and the benchmark says so."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import collapse, speed
from benchmarks.minority import federated, groups, variant
from mcrage import CDDPM
from mcrage.diffusion.tabular import DiffusionConfig
from simulations.datasets import diabetes130
from simulations.datasets.table import PublicTable

ROOT = Path(__file__).parents[2]
TINY: dict[str, float] = {"num-server-rounds": 2, "local-steps": 2, "width": 16, "depth": 1}


def is_nearer_to_the_minority(rows: pd.DataFrame) -> dict[str, bool]:
    """Whether mean heart rate and rate of death are nearer to the minority's truth than to the majority's."""
    found = collapse.statistics(rows)
    own, other = collapse.truths(collapse.MINORITY), collapse.truths(collapse.MAJORITY)
    return {
        name: abs(found[name] - own[name].truth) < abs(found[name] - other[name].truth)
        for name in ("heart_rate", "died")
    }


@pytest.fixture(scope="module")
def model() -> CDDPM:
    sites = collapse.hospitals(seed=0, num_sites=4, rows=1500, minority_rows=100)
    return federated(sites, {"num-server-rounds": 20}, seed=0, test_fraction=1e-9)


@pytest.mark.slow
def test_rows_asked_for_as_minority_are_not_the_majoritys(model: CDDPM) -> None:
    # Half-way is 8 standard errors of the mean and 3.7 of the rate away for an estimate from the 400 training rows: a
    # model that knows what they tell fails once in 10,000 seeds.
    rows = model.sample(4000, {"group": collapse.MINORITY}, random_state=0)
    assert is_nearer_to_the_minority(rows) == {"heart_rate": True, "died": True}


@pytest.mark.slow
def test_a_sampler_that_ignores_the_condition_would_be_found(model: CDDPM) -> None:
    rows = model.sample(4000, random_state=0)
    assert is_nearer_to_the_minority(rows) == {"heart_rate": False, "died": False}


def test_settings_of_a_variant_reach_the_model() -> None:
    sites = collapse.hospitals(seed=0, num_sites=2, rows=200, minority_rows=50)
    usual, other = (federated(sites, TINY | more, seed=0) for more in ({}, {"level_weight": 1.0}))
    assert usual.config_.diffusion == DiffusionConfig()
    assert other.config_.diffusion == DiffusionConfig(level_weight=1.0)
    assert usual.config_.width == other.config_.width == 16
    pairs = zip(usual.parameters().values(), other.parameters().values(), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


def test_a_variant_is_read_from_text_and_an_unknown_setting_refused() -> None:
    found: Mapping[str, float] = variant("level_weight=2,local-steps=10")
    assert found == {"level_weight": 2.0, "local-steps": 10.0}
    with pytest.raises(Exception, match="no setting 'levelweight'"):
        variant("levelweight=2")


@pytest.mark.soak
@pytest.mark.parametrize("part", ["collapse", "cohort"])
def test_the_benchmark_measures_every_variant(part: str) -> None:
    settings = ",".join(f"{name}={value}" for name, value in TINY.items())
    options = [part, "--sites", "2", "--patients-per-site", "300", "--set", settings, "--variant", "level_weight=1"]
    command = [sys.executable, "-m", "benchmarks.minority", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for name in ("defaults", "level_weight 1"):
        assert any(name in line["rows"] for line in lines)
    real = [line["within_2_se"] for line in lines if line["rows"].endswith("training rows")]
    made = [line["within_2_se"] for line in lines if "guidance" in line["rows"] and "within_2_se" in line]
    assert min(real) > 0.6
    assert min(made) < 0.6, "a model of four steps is found out"
    assert part in done.stderr or "effects" in done.stderr


@pytest.mark.slow
def test_groups_with_the_label_open_and_asked_for_are_measured_beside_real_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = speed.simulated(6000, diabetes130.SCHEMA).assign(patient_nbr=[str(number) for number in range(6000)])
    public = PublicTable(name="diabetes130", schema=diabetes130.SCHEMA, table=table, licence="", credit="")
    monkeypatch.setattr(diabetes130, "load", lambda **_: public)
    lines = list(groups(argparse.Namespace(seeds=1, steps=3)))
    of_label_open = [line for line in lines if "readmitted" not in str(line["group"])]
    of_label_given = [line for line in lines if "readmitted=yes" in str(line["group"])]
    assert of_label_open
    assert of_label_given
    largest = max(of_label_open, key=lambda line: int(str(line["n"])))
    assert float(str(largest["all_pairs"])) < float(str(largest["all_pairs_real"]))

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mcrage.data.schema import Column, TableSchema
from mcrage.rebalancing.baselines import ArmSpec
from simulations import paper
from simulations.paper import PaperConfig, Split
from simulations.paper_figures import ARMS, METRICS

needs_data = pytest.mark.skipif("MCRAGE_DATA" not in os.environ, reason="MCRAGE_DATA names no folder of data sets")

SCHEMA = TableSchema(
    name="blood",
    columns=(
        Column(name="sodium", kind="continuous", minimum=100, maximum=180, decimals=1, nullable=False),
        Column(name="platelets", kind="integer", minimum=1, maximum=900, scale="log", nullable=False),
        Column(name="age", kind="integer", minimum=0, maximum=110, nullable=False),
        Column(name="SOURCE", kind="categorical", role="target", categories=("out", "in"), nullable=False),
    ),
)


def blood(rows: int) -> pd.DataFrame:
    draw = np.random.default_rng(0)
    event = draw.random(rows) < 0.4
    return pd.DataFrame(
        {
            "sodium": (138 - 6 * event + 4 * draw.normal(size=rows)).round(1),
            "platelets": pd.array((250 * np.exp(0.4 * draw.normal(size=rows)) - 60 * event).astype(int), dtype="Int64"),
            "age": pd.array(draw.integers(18, 95, rows), dtype="Int64"),
            "SOURCE": pd.Categorical(np.where(event, "in", "out"), categories=["out", "in"]),
        }
    )


@pytest.fixture(scope="module")
def split() -> Split:
    return paper.draw_split(blood(3000), SCHEMA, number=1, seed=0)


def event_rate(table: pd.DataFrame) -> float:
    return float((table["SOURCE"] == "in").mean())


@needs_data
def test_the_table_has_the_papers_nine_numbers_and_no_sex() -> None:
    table, schema = paper.paper_table()
    assert table.shape == (4412, 10)
    assert [column.name for column in schema.features][-1] == "AGE"
    assert not schema.sensitive
    assert all(column.is_numeric for column in schema.features)
    assert "SEX" not in table


@needs_data
def test_the_first_split_is_the_papers() -> None:
    table, schema = paper.paper_table()
    split = paper.draw_split(table, schema, number=1, seed=0)
    assert (len(split.original), len(split.test)) == (3529, 883)
    assert split.original["SOURCE"].value_counts().to_dict() == {"out": 2110, "in": 1419}


def test_deletion_keeps_nine_tenths_of_one_class_and_one_tenth_of_the_other(split: Split) -> None:
    before, after = (part["SOURCE"].value_counts() for part in (split.original, split.imbalanced))
    for level, share in paper.KEPT.items():
        # Five standard errors of a binomial share: a false alarm in less than one of a million draws.
        error = 5 * np.sqrt(share * (1 - share) / before[level])
        assert abs(after[level] / before[level] - share) < error
        assert abs(after[level] / before[level] - (1 - share)) > error
    assert event_rate(split.test) > 0.3


def test_the_same_numbers_give_the_same_split_and_others_another() -> None:
    table = blood(500)
    first, again, other = (paper.draw_split(table, SCHEMA, number=n, seed=s) for n, s in ((1, 0), (1, 0), (1, 1)))
    pd.testing.assert_frame_equal(first.imbalanced, again.imbalanced)
    pd.testing.assert_frame_equal(first.test, other.test)
    assert len(first.imbalanced) != len(other.imbalanced) or not first.imbalanced.equals(other.imbalanced)


def test_the_gaussian_has_the_minoritys_mean_and_covariance(split: Split) -> None:
    rows = paper.gaussian_rows(split)
    minority = split.imbalanced.loc[split.imbalanced["SOURCE"] == "in", ["sodium", "platelets", "age"]].astype(float)
    assert len(rows) == len(split.imbalanced) - 2 * len(minority)
    error = 5 * minority.std().to_numpy() / np.sqrt(len(rows))
    assert (np.abs(rows.mean(axis=0) - minority.mean().to_numpy()) < error).all()
    np.testing.assert_allclose(np.cov(rows.T).diagonal(), minority.var().to_numpy(), rtol=0.25)


def test_a_perfect_training_set_scores_better_than_one_with_shuffled_labels(split: Split) -> None:
    good = paper.evaluate(ArmSpec(table=split.original), split)
    labels = np.random.default_rng(0).permutation(split.original["SOURCE"].astype(str))
    shuffled = split.original.assign(SOURCE=pd.Categorical(labels, categories=["out", "in"]))
    bad = paper.evaluate(ArmSpec(table=shuffled), split)
    assert list(good) == list(METRICS)
    assert good["auroc"] > 0.8
    assert abs(bad["auroc"] - 0.5) < 0.2


def test_weights_reach_the_forest(split: Split) -> None:
    weights = np.where(split.imbalanced["SOURCE"] == "in", 50.0, 0.01)
    assert paper.evaluate(ArmSpec(table=split.imbalanced), split)["f1"] < 0.3
    heavy = paper.evaluate(ArmSpec(table=split.imbalanced, weights=weights), split)
    assert heavy["f1"] > 0.4


@pytest.mark.slow
def test_all_arms_run_and_are_written(tmp_path: Path) -> None:
    config = PaperConfig(splits=2, epochs=1, steps=20, target=600, num_hospitals=2, num_server_rounds=2, local_steps=5)
    rows = paper.run_paper(blood(700), SCHEMA, config=config, out=tmp_path)
    assert [(row.arm, row.metric) for row in rows] == [(arm, metric) for arm in ARMS for metric in METRICS]
    assert all(0 <= row.value <= 1 for row in rows)
    written = json.loads((tmp_path / "paper.json").read_text())
    assert written["rows"][0]["value"] == rows[0].value
    assert len(written["splits"]) == config.splits
    text = (tmp_path / "paper.txt").read_text()
    assert all(title in text for title in (*ARMS.values(), *METRICS.values()))
    assert "[0.621] {0.599}" in text


def test_a_single_split_is_refused_because_it_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        paper.main(["--splits", "1"])
    assert stop.value.code == 2
    assert "splits" in capsys.readouterr().err

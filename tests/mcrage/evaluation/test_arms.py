"""Every arm at a hospital is scored on the same rows, or says why it is not."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
import pytest
from sklearn.neighbors import KNeighborsClassifier

from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from mcrage.evaluation.arms import SiteScores, evaluate_site
from mcrage.evaluation.downstream import train_and_score
from mcrage.rebalancing.baselines import ArmSpec

LOGISTIC = {"logistic_regression": "logistic_regression"}


@pytest.fixture(scope="module")
def tables(clinic_rows) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    return clinic_rows(200, 1), clinic_rows(150, 2), clinic_rows(600, 3)


@pytest.fixture(scope="module")
def scores(tables, clinic_schema: TableSchema) -> SiteScores:
    train, test, pooled = tables
    one_class = train[train["died"] == "no"]
    arms = {"federated_parity": one_class, "pooled": ArmSpec(table=pooled)}
    return evaluate_site("North", train, test, schema=clinic_schema, arms=arms, seed=0)


def test_baselines_come_first_and_then_the_arms_given(scores: SiteScores) -> None:
    assert scores.arms == (
        "local", "class_weights", "threshold", "oversampling", "smote", "federated_parity", "pooled"
    )  # fmt: skip
    assert scores.models == ("logistic_regression", "hist_gradient_boosting")
    assert scores.scores.shape == (7, 2, 150)
    assert scores.codes.shape == (150, 2)


def test_an_arm_that_cannot_be_trained_has_a_reason_and_no_scores(scores: SiteScores) -> None:
    assert set(scores.reasons) == {("federated_parity", model) for model in scores.models}
    assert "all of one class" in scores.reasons["federated_parity", "logistic_regression"]
    assert np.isnan(scores.scores[5]).all()
    assert np.isfinite(np.delete(scores.scores, 5, axis=0)).all()


def test_only_the_threshold_arm_moves_the_threshold(scores: SiteScores) -> None:
    moved = {scores.arms[i] for i, _ in np.argwhere(scores.thresholds != 0.5)}
    assert moved == {"threshold"}
    np.testing.assert_array_equal(scores.scores[0], scores.scores[2])


def test_an_arm_is_scored_as_it_would_be_alone(tables, scores: SiteScores, clinic_schema: TableSchema) -> None:
    _, test, pooled = tables
    alone = train_and_score(pooled, test, clinic_schema, model="logistic_regression")
    np.testing.assert_array_equal(scores.scores[6, 0], alone.scores)


def test_a_baseline_can_be_replaced_and_a_missing_extra_is_a_reason(
    tables, clinic_schema: TableSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test, pooled = tables
    monkeypatch.setitem(sys.modules, "imblearn.over_sampling", None)
    arms = {"local": pooled}
    found = evaluate_site("North", train, test, schema=clinic_schema, arms=arms, models=LOGISTIC, seed=0)
    alone = train_and_score(pooled, test, clinic_schema, model="logistic_regression")
    np.testing.assert_array_equal(found.scores[0, 0], alone.scores)
    assert "mcrage[bench]" in found.reasons["smote", "logistic_regression"]


def test_a_users_model_stands_beside_the_others_and_misses_what_it_cannot_do(
    tables, clinic_schema: TableSchema
) -> None:
    train, test, _ = tables
    models = LOGISTIC | {"custom": KNeighborsClassifier()}
    found = evaluate_site("North", train, test, schema=clinic_schema, arms={}, models=models, seed=0)
    assert set(found.reasons) == {("class_weights", "custom")}
    assert np.isfinite(found.scores[0]).all()


def test_an_unknown_model_stops_the_run_instead_of_becoming_a_reason(tables, clinic_schema: TableSchema) -> None:
    train, test, _ = tables
    with pytest.raises(ConfigError, match="predict_proba"):
        evaluate_site("North", train, test, schema=clinic_schema, arms={}, models={"forest": "forest"}, seed=0)


@pytest.mark.slow
def test_another_process_gives_the_same_scores(tables, clinic_schema: TableSchema) -> None:
    train, test, _ = tables
    settings = {"schema": clinic_schema, "arms": {}, "models": LOGISTIC, "seed": 0}
    here = evaluate_site("North", train, test, **settings)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        there = pool.submit(evaluate_site, "North", train, test, **settings).result()
    np.testing.assert_array_equal(here.scores, there.scores)
    np.testing.assert_array_equal(here.thresholds, there.thresholds)

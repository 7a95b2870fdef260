"""Downstream models learn from training rows alone and take whatever the schema allows."""

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError, DataError
from mcrage.evaluation.downstream import best_threshold, estimator, events, features, patient_codes, train_and_score
from mcrage.rebalancing.baselines import ArmSpec, class_weights

MODELS = [
    "logistic_regression",
    "hist_gradient_boosting",
    RandomForestClassifier(n_estimators=20, min_samples_leaf=5, random_state=0),
]
names = pytest.mark.parametrize("model", MODELS, ids=["logistic_regression", "hist_gradient_boosting", "custom"])


@pytest.fixture(scope="module")
def train(clinic_rows) -> pd.DataFrame:
    return clinic_rows(500, 1, women=0.1)


@pytest.fixture(scope="module")
def test(clinic_rows) -> pd.DataFrame:
    return clinic_rows(600, 2, women=0.1)


@names
def test_a_model_ranks_held_out_rows(model, train, test, clinic_schema: TableSchema) -> None:
    scored = train_and_score(train, test, clinic_schema, model=model)
    assert roc_auc_score(events(test, clinic_schema), scored.scores) > 0.7
    assert scored.threshold == 0.5
    assert ((scored.scores >= 0) & (scored.scores <= 1)).all()


@names
def test_a_rows_score_does_not_depend_on_the_other_test_rows(model, train, test, clinic_schema: TableSchema) -> None:
    together, alone = (train_and_score(train, rows, clinic_schema, model=model).scores for rows in (test, test.tail(3)))
    np.testing.assert_allclose(together[-3:], alone)


@names
def test_levels_and_missing_cells_that_training_never_saw_are_scored(
    model, train, test, clinic_schema: TableSchema
) -> None:
    plain = train.assign(lactate=1.0, ward="medical", smoker=True, age=50)
    odd = test.assign(lactate=np.nan, ward="elsewhere", smoker=pd.NA, age=pd.NA)
    assert np.isfinite(train_and_score(plain, odd, clinic_schema, model=model).scores).all()
    empty = train.assign(lactate=np.nan, smoker=pd.NA)
    assert np.isfinite(train_and_score(empty, test, clinic_schema, model=model).scores).all()


@names
def test_the_label_of_test_rows_is_never_looked_at(model, train, test, clinic_schema: TableSchema) -> None:
    blind = test.drop(columns=["died", "patient"])
    one, two = (train_and_score(train, rows, clinic_schema, model=model).scores for rows in (test, blind))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("model", ["logistic_regression", "hist_gradient_boosting"])
def test_class_weights_raise_the_scores_of_a_rare_event(model: str, clinic_rows, clinic_schema: TableSchema) -> None:
    rows = clinic_rows(800, 3)
    rare = rows[(rows["died"] == "no") | (np.arange(800) % 6 == 0)].reset_index(drop=True)
    plain, weighted = (
        train_and_score(arm, rows, clinic_schema, model=model).scores.mean()
        for arm in (rare, class_weights(rare, clinic_schema))
    )
    assert weighted > plain + 0.1


def test_a_tuned_threshold_is_chosen_on_training_rows_and_moves_no_score(
    train, test, clinic_schema: TableSchema
) -> None:
    plain = train_and_score(train, test, clinic_schema, model="logistic_regression")
    tuned = train_and_score(
        ArmSpec(table=train, tunes_threshold=True), test, clinic_schema, model="logistic_regression"
    )
    np.testing.assert_array_equal(plain.scores, tuned.scores)
    assert tuned.threshold != 0.5
    event = events(test, clinic_schema)
    reached = balanced_accuracy_score(event, tuned.scores >= tuned.threshold)
    assert reached >= balanced_accuracy_score(event, plain.scores >= 0.5) - 0.01


def test_a_threshold_is_tuned_with_weights_and_left_alone_where_one_patient_has_the_event(
    train, test, clinic_schema: TableSchema
) -> None:
    weighted = class_weights(train, clinic_schema)
    arm = ArmSpec(table=train, weights=weighted.weights, tunes_threshold=True)
    assert train_and_score(arm, test, clinic_schema, model="logistic_regression").threshold != 0.5
    lived = train[train["died"] == "no"]
    single = pd.concat([lived, train[train["died"] == "yes"].head(1)], ignore_index=True)
    arm = ArmSpec(table=single, tunes_threshold=True)
    assert train_and_score(arm, test, clinic_schema, model="logistic_regression").threshold == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_the_best_threshold_is_the_one_that_trying_all_finds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    event = draw.random(60) < 0.3
    scores = (draw.random(60) + 0.4 * event).round(1)
    found = best_threshold(event, scores)
    tried = [balanced_accuracy_score(event, scores >= t) for t in np.linspace(0.05, 1.45, 281)]
    assert balanced_accuracy_score(event, scores >= found) == pytest.approx(max(tried))


def test_equal_scores_keep_the_usual_threshold() -> None:
    assert best_threshold(np.array([True, False]), np.array([0.3, 0.3])) == 0.5


def test_rows_of_one_class_train_nobody(train, test, clinic_schema: TableSchema) -> None:
    with pytest.raises(DataError, match="all of one class"):
        train_and_score(train[train["died"] == "no"], test, clinic_schema, model="logistic_regression")


@pytest.mark.parametrize("model", ["forest", LinearSVC()])
def test_a_model_that_gives_no_probabilities_is_refused(model, clinic_schema: TableSchema) -> None:
    with pytest.raises(ConfigError, match="predict_proba"):
        estimator(clinic_schema, model)


def test_weights_need_a_model_that_takes_them(train, test, clinic_schema: TableSchema) -> None:
    with pytest.raises(ConfigError, match="KNeighborsClassifier takes no sample_weight"):
        train_and_score(class_weights(train, clinic_schema), test, clinic_schema, model=KNeighborsClassifier())


def test_the_users_estimator_is_left_unfitted(train, test, clinic_schema: TableSchema) -> None:
    model = RandomForestClassifier(n_estimators=2, random_state=0)
    train_and_score(train, test, clinic_schema, model=model)
    assert not hasattr(model, "estimators_")


def test_features_are_numbers_and_codes_by_the_schema_alone(clinic_schema: TableSchema, clinic_rows) -> None:
    table = clinic_rows(50, 0)
    encoded = features(table, clinic_schema)
    assert list(encoded) == ["age", "sex", "lactate", "ward", "frailty", "smoker", "admitted"]
    assert set(encoded.dtypes) == {np.dtype(np.float64)}
    assert encoded["sex"].tolist() == (table["sex"] == "M").astype(float).tolist()
    assert encoded["smoker"].isna().equals(table["smoker"].isna())
    texts = table.assign(sex=table["sex"].astype(str), ward="intensive care")
    assert features(texts, clinic_schema)["sex"].equals(encoded["sex"])
    assert set(features(texts, clinic_schema)["ward"]) == {2.0}, "an unseen level is the schema's other"


def test_the_event_is_the_targets_positive_level(clinic_schema: TableSchema, clinic_rows) -> None:
    table = clinic_rows(50, 0)
    turned = TableSchema(
        columns=tuple(
            column.model_copy(update={"positive": "no"}) if column.role == "target" else column
            for column in clinic_schema.columns
        )
    )
    assert events(table, clinic_schema).tolist() == (table["died"] == "yes").tolist()
    assert events(table, turned).tolist() == (table["died"] == "no").tolist()


def test_patients_are_told_apart_and_a_row_without_one_is_a_patient(clinic_schema: TableSchema) -> None:
    table = pd.DataFrame({"patient": pd.Series(["a", "b", "a", None, None], dtype="str")})
    codes = patient_codes(table, clinic_schema)
    assert codes[0] == codes[2]
    assert len(set(codes.tolist())) == 4
    assert patient_codes(table.drop(columns="patient"), clinic_schema).tolist() == [0, 1, 2, 3, 4]


def test_more_levels_than_trees_take_are_treated_as_numbers() -> None:
    draw = np.random.default_rng(0)
    levels = tuple(f"c{i}" for i in range(300))
    schema = TableSchema(
        columns=(
            Column(name="code", kind="categorical", categories=levels),
            Column(name="died", kind="boolean", role="target", nullable=False),
        )
    )
    codes = draw.integers(0, 300, 400)
    table = pd.DataFrame({"code": [levels[c] for c in codes], "died": codes > 150})
    scored = train_and_score(table, table, schema, model="hist_gradient_boosting")
    assert roc_auc_score(table["died"], scored.scores) > 0.99

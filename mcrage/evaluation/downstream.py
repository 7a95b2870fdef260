"""Models that a hospital would train on its table, and their scores on rows that it held out.

Shape: a table of n rows gives n scores in [0, 1], the predicted probability of the event.

Nothing is fitted on test rows. Categories come from the schema, so that a level that occurs in the test rows alone, or
in synthetic rows alone, changes no column.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin, clone
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.validation import has_fit_parameter
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from mcrage.data.groups import level_codes, numbers
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError, DataError, Problem
from mcrage.rebalancing.baselines import ArmSpec

ModelName = Literal["logistic_regression", "hist_gradient_boosting"]
Model: TypeAlias = ModelName | Any
"""The name of a model, or a scikit-learn classifier with ``predict_proba``."""

TREE_ITERATIONS = 80
TREE_LEAVES = 8
"""Small trees: at 500 to 9,000 rows they rank better than scikit-learn's 31 leaves and take a third of the time."""
MOST_TREE_CATEGORIES = 255
"""Levels that the boosted trees accept in one categorical column."""
FOLDS = 5
"""Folds for the scores that a threshold is tuned on."""
MISSING_CODE = -1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Scores of one trained model on test rows.

    Attributes:
        scores: Predicted probability of the event, by row.
        threshold: Rows with a score of at least this are predicted to have the event.
    """

    scores: NDArray[np.float64]
    threshold: float


def train_and_score(
    train: pd.DataFrame | ArmSpec, test: pd.DataFrame, schema: TableSchema, *, model: Model, random_state: int = 0
) -> Scored:
    """Trains one model on one training set and scores the test rows, on one thread.

    Args:
        train: Training rows, or an arm with its weights and its way to choose the threshold.
        test: Rows to score; only their features are looked at.
        schema: The data dictionary; features are its features and sensitive features.
        model: Name of a model, or a scikit-learn classifier with ``predict_proba``; it is cloned.
        random_state: Seed of the model and of the folds, below 2**32.

    Raises:
        DataError: If the training rows are of one class.
        ConfigError: If the model is not known or cannot do what the arm asks.
    """
    arm = train if isinstance(train, ArmSpec) else ArmSpec(table=train)
    rows = EncodedArm(arm, schema)
    return rows.fit_and_score(features(test, schema), model=model, random_state=random_state)


class EncodedArm:
    """A training set encoded once for several models."""

    def __init__(self, arm: ArmSpec, schema: TableSchema) -> None:
        self.schema = schema
        self.x = features(arm.table, schema)
        self.y = events(arm.table, schema)
        self._arm = arm

    def fit_and_score(self, test: pd.DataFrame, *, model: Model, random_state: int = 0) -> Scored:
        """As :func:`train_and_score`, for test rows that :func:`features` has encoded."""
        if not 0 < self.y.sum() < len(self.y):
            raise DataError([_one_class(self.schema.target)])
        pipeline = estimator(self.schema, model, random_state=random_state)
        with threadpool_limits(limits=1):
            scores = _fit(pipeline, self.x, self.y, self._arm.weights).predict_proba(test)[:, 1]
            threshold = self._tuned_threshold(pipeline, random_state) if self._arm.tunes_threshold else 0.5
        return Scored(scores=np.asarray(scores, dtype=np.float64), threshold=threshold)

    def _tuned_threshold(self, pipeline: Pipeline, random_state: int) -> float:
        patients = patient_codes(self._arm.table, self.schema)
        folds = min(FOLDS, *(len(np.unique(patients[self.y == label])) for label in (False, True)))
        if folds < 2:
            return 0.5
        scores = np.full(len(self.y), np.nan)
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=random_state)
        for inside, outside in splitter.split(self.x, self.y, patients):
            if 0 < self.y[inside].sum() < len(inside):
                weights = None if self._arm.weights is None else self._arm.weights[inside]
                fitted = _fit(pipeline, self.x.iloc[inside], self.y[inside], weights)
                scores[outside] = fitted.predict_proba(self.x.iloc[outside])[:, 1]
        scored = ~np.isnan(scores)
        return best_threshold(self.y[scored], scores[scored])


def features(table: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """The features as float64, by the schema alone: numbers as they are, levels as codes, NaN for missing."""
    encoded = {}
    for column in schema.features:
        values = table[column.name]
        encoded[column.name] = numbers(values, column) if column.is_numeric else _level_floats(values, column)
    return pd.DataFrame(encoded)


def events(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.bool_]:
    """Whether each row has the event: the target's positive level."""
    column = schema.target
    return _level_floats(table[column.name], column) == column.levels.index(column.positive_level)


def patient_codes(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
    """A number for the patient of each row; every row is a patient where the table does not name them."""
    column = schema.patient_id
    if column is None or column.name not in table:
        return np.arange(len(table))
    codes = pd.factorize(table[column.name])[0].astype(np.int64)
    return np.where(codes < 0, codes.max(initial=-1) + 1 + np.arange(len(table)), codes)


def estimator(schema: TableSchema, model: Model, *, random_state: int = 0) -> Pipeline:
    """A scikit-learn pipeline over what :func:`features` gives.

    ``logistic_regression`` (C = 1) and an estimator of the user's own see medians for missing numbers and a column that
    says so, standardised, and one column per level, *missing* among them. ``hist_gradient_boosting`` sees numbers,
    ordinal codes and categories as such, with NaN.
    """
    if model == "logistic_regression":
        return _linear_pipeline(schema, LogisticRegression(C=1.0, max_iter=1000))
    if model == "hist_gradient_boosting":
        return _tree_pipeline(schema, random_state)
    if isinstance(model, str) or not hasattr(model, "predict_proba"):
        raise ConfigError(
            f"model {model!r} is neither 'logistic_regression', 'hist_gradient_boosting' nor a scikit-learn classifier "
            "with predict_proba"
        )
    return _linear_pipeline(schema, clone(model))


def best_threshold(y: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """The threshold with the highest balanced accuracy; midway between two scores, the lowest one among equals."""
    values, inverse = np.unique(scores, return_inverse=True)
    if len(values) < 2:
        return 0.5
    positive = np.bincount(inverse, weights=y)
    negative = np.bincount(inverse, weights=~y)
    missed, spared = np.cumsum(positive)[:-1], np.cumsum(negative)[:-1]
    balanced = (1 - missed / positive.sum() + spared / negative.sum()) / 2
    best = int(np.argmax(balanced))
    return float((values[best] + values[best + 1]) / 2)


def _fit(pipeline: Pipeline, x: pd.DataFrame, y: NDArray[np.bool_], weights: NDArray[np.float64] | None) -> Any:
    fresh = clone(pipeline)
    if weights is None:
        return fresh.fit(x, y)
    if not has_fit_parameter(fresh[-1], "sample_weight"):
        raise ConfigError(f"{type(fresh[-1]).__name__} takes no sample_weight, which arm 'class_weights' needs")
    return fresh.fit(x, y, model__sample_weight=weights)


def _linear_pipeline(schema: TableSchema, model: BaseEstimator) -> Pipeline:
    numeric = [column.name for column in schema.features if column.is_numeric]
    discrete = [column for column in schema.features if not column.is_numeric]
    levels = [np.array([MISSING_CODE, *range(len(column.levels))]) for column in discrete]
    impute = SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)
    mark = SimpleImputer(strategy="constant", fill_value=MISSING_CODE, keep_empty_features=True)
    encode = OneHotEncoder(categories=levels, handle_unknown="ignore", sparse_output=False)
    parts = [
        ("numbers", Pipeline([("impute", impute), ("standardise", StandardScaler())]), numeric),
        ("levels", Pipeline([("mark", mark), ("encode", encode)]), [column.name for column in discrete]),
    ]
    columns = ColumnTransformer([part for part in parts if part[2]])
    return Pipeline([("columns", columns), ("model", model)])


def _tree_pipeline(schema: TableSchema, random_state: int) -> Pipeline:
    unordered = [
        column.name
        for column in schema.features
        if column.kind in ("categorical", "boolean") and len(column.levels) <= MOST_TREE_CATEGORIES
    ]
    model = HistGradientBoostingClassifier(
        max_iter=TREE_ITERATIONS,
        max_leaf_nodes=TREE_LEAVES,
        early_stopping=False,
        categorical_features=unordered or None,
        random_state=random_state,
    )
    return Pipeline([("fill", _EmptyFiller()), ("model", model)])


class _EmptyFiller(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Puts 0 into columns that training rows miss throughout: the trees cannot bin a column without a value."""

    def fit(self, x: pd.DataFrame, _y: NDArray[np.bool_] | None = None) -> "_EmptyFiller":
        """Remembers the columns without any value."""
        self.empty_ = list(x.columns[x.isna().all()])
        return self

    def transform(self, x: pd.DataFrame) -> pd.DataFrame:
        """The same rows with 0 in those columns, whatever these rows hold there."""
        return x.assign(**dict.fromkeys(self.empty_, 0.0))


def _one_class(target: Column) -> Problem:
    return Problem(
        code="E501",
        column=target.name,
        rule="the training rows are all of one class",
        remedy="Train on rows of both, or leave this hospital out of the comparison",
    )


def _level_floats(values: pd.Series, column: Column) -> NDArray[np.float64]:
    codes, uniques = pd.factorize(values)
    lookup = level_codes(pd.Series(uniques), column, int(MISSING_CODE)).astype(np.float64)
    return np.append(np.where(lookup < 0, np.nan, lookup), np.nan)[codes]

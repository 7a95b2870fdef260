"""How close generated rows are to real ones.

Measures at equal numbers of rows (definitions: all pairs as the mean over all column pairs of 1 − total variation of
the joint distribution, numbers in ten quantile bins of the real rows; detection as the AUROC of gradient boosting that
tells generated from held-out real rows; TSTR: train on synthetic, test on real).
"""

from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict

from mcrage.data.groups import level_codes, numbers
from mcrage.data.schema import Column, TableSchema

_BINS = 10


def one_way(real: pd.DataFrame, synthetic: pd.DataFrame, schema: TableSchema) -> float:
    """Mean over columns of 1 − total variation distance; 1 is perfect."""
    a, b, sizes = _binned(real, synthetic, schema)
    return float(np.mean([_overlap(a[:, [k]], b[:, [k]], sizes[[k]]) for k in range(len(sizes))]))


def all_pairs(real: pd.DataFrame, synthetic: pd.DataFrame, schema: TableSchema) -> float:
    """Mean over all pairs of columns of 1 − total variation distance of the joint distribution; 1 is perfect."""
    a, b, sizes = _binned(real, synthetic, schema)
    pairs = combinations(range(len(sizes)), 2)
    return float(np.mean([_overlap(a[:, pair], b[:, pair], sizes[list(pair)]) for pair in map(list, pairs)]))


def detection(
    real: pd.DataFrame, synthetic: pd.DataFrame, schema: TableSchema, *, generator: np.random.Generator
) -> float:
    """AUROC of three-fold gradient boosting that tells synthetic from real rows; .5 is indistinguishable."""
    rows = min(len(real), len(synthetic))
    picked = [frame.iloc[generator.permutation(len(frame))[:rows]] for frame in (real, synthetic)]
    features = np.concatenate([model_matrix(frame, schema.modelled) for frame in picked])
    label = np.repeat([0, 1], rows)
    order = generator.permutation(2 * rows)
    scores = cross_val_predict(boosting(schema.modelled), features[order], label[order], cv=3, method="predict_proba")
    return float(roc_auc_score(label[order], scores[:, 1]))


def train_synthetic_test_real(synthetic: pd.DataFrame, real: pd.DataFrame, schema: TableSchema) -> float:
    """AUROC on real rows of gradient boosting that has seen synthetic rows only."""
    model = boosting(schema.features)
    model.fit(model_matrix(synthetic, schema.features), _labels(synthetic, schema))
    return float(roc_auc_score(_labels(real, schema), model.predict_proba(model_matrix(real, schema.features))[:, 1]))


def model_matrix(table: pd.DataFrame, columns: tuple[Column, ...]) -> NDArray[np.float64]:
    """Columns as float64, levels as codes, NaN for missing; shape (rows, columns)."""
    parts = []
    for column in columns:
        if column.is_numeric:
            parts.append(numbers(table[column.name], column))
        else:
            codes = level_codes(table[column.name], column, -1).astype(np.float64)
            parts.append(np.where(codes < 0, np.nan, codes))
    return np.stack(parts, axis=1)


def boosting(columns: tuple[Column, ...]) -> HistGradientBoostingClassifier:
    """Gradient boosting for :func:`model_matrix`; levels without order as categories, where there are few enough."""
    is_category = [not c.is_numeric and c.kind != "ordinal" and len(c.levels) < 250 for c in columns]
    return HistGradientBoostingClassifier(categorical_features=is_category, random_state=0)


def _labels(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
    target = schema.target
    return (level_codes(table[target.name], target, -1) == target.levels.index(target.positive_level)).astype(np.int64)


def _binned(
    real: pd.DataFrame, synthetic: pd.DataFrame, schema: TableSchema
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Codes of both tables, shape (rows, columns), and the number of codes of each column."""
    parts, sizes = [], []
    for column in schema.modelled:
        if column.is_numeric:
            values = [numbers(frame[column.name], column) for frame in (real, synthetic)]
            inner = np.linspace(0, 1, _BINS + 1)[1:-1]
            edges = np.unique(np.nanquantile(values[0], inner)) if not np.isnan(values[0]).all() else np.zeros(0)
            coded = [np.where(np.isnan(v), len(edges) + 1, np.searchsorted(edges, v, side="right")) for v in values]
            sizes.append(len(edges) + 2)
        else:
            coded = [level_codes(frame[column.name], column, len(column.levels)) for frame in (real, synthetic)]
            sizes.append(len(column.levels) + 1)
        parts.append(coded)
    a, b = (np.stack([part[side] for part in parts], axis=1).astype(np.int64) for side in (0, 1))
    return a, b, np.array(sizes)


def _overlap(a: NDArray[np.int64], b: NDArray[np.int64], sizes: NDArray[np.int64]) -> float:
    weights = np.cumprod([1, *sizes[:-1]])
    cells = int(np.prod(sizes))
    shares = [np.bincount(codes @ weights, minlength=cells) / len(codes) for codes in (a, b)]
    return float(1 - 0.5 * np.abs(shares[0] - shares[1]).sum())

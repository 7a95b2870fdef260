"""The usual remedies for imbalance, as training sets: what synthetic rows of a federation have to beat.

Every one of them sees the hospital's own training rows alone. Each gives an :class:`ArmSpec`: the rows to train on, the
weights of the rows, and whether the decision threshold is tuned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import group_codes, numbers
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import ConfigError
from mcrage.rng import derive, stream

SMOTE_NEIGHBOURS = 5
"""Neighbours that SMOTE draws from (Chawla et al., 2002)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ArmSpec:
    """What one arm of a comparison trains on.

    Attributes:
        table: Rows with the schema's features and label.
        weights: Weight of each row; None for equal weights.
        tunes_threshold: Whether the threshold is chosen on cross-validated scores of the rows instead of being .5.
    """

    table: pd.DataFrame
    weights: NDArray[np.float64] | None = None
    tunes_threshold: bool = False


def baseline_builders(train: pd.DataFrame, schema: TableSchema, *, seed: int) -> dict[str, Callable[[], ArmSpec]]:
    """Makers of the arms local, class_weights, threshold, oversampling and smote of one hospital."""
    return {
        "local": lambda: ArmSpec(table=train),
        "class_weights": lambda: class_weights(train, schema),
        "threshold": lambda: ArmSpec(table=train, tunes_threshold=True),
        "oversampling": lambda: oversampled(train, schema, generator=stream(seed, "oversampling")),
        "smote": lambda: smote(train, schema, random_state=derive(seed, "smote") % 2**32),
    }


def augmented(train: pd.DataFrame, synthetic: pd.DataFrame, schema: TableSchema) -> ArmSpec:
    """The hospital's own rows and synthetic ones, as equals."""
    names = [column.name for column in schema.modelled]
    return ArmSpec(table=pd.concat([train[names], synthetic[names]], ignore_index=True))


def class_weights(train: pd.DataFrame, schema: TableSchema, *, over: Literal["label", "group"] = "label") -> ArmSpec:
    """Rows weighted so that each label (or each group × label) has the same total weight; the mean weight is 1.

    ``over="label"`` is scikit-learn's ``class_weight="balanced"``.
    """
    columns = (schema.target,) if over == "label" else schema.attributes
    cell, counts = _cells(train, columns)
    return ArmSpec(table=train, weights=len(train) / (len(counts) * counts[cell]))


def oversampled(train: pd.DataFrame, schema: TableSchema, *, generator: np.random.Generator) -> ArmSpec:
    """Rows drawn again at random until every group × label has as many as the largest."""
    cell, counts = _cells(train, schema.attributes)
    extra = [
        generator.choice(np.flatnonzero(cell == code), size=counts.max() - count) for code, count in enumerate(counts)
    ]
    return ArmSpec(table=train.iloc[np.concatenate([np.arange(len(train)), *extra])].reset_index(drop=True))


def smote(
    train: pd.DataFrame, schema: TableSchema, *, neighbours: int = SMOTE_NEIGHBOURS, random_state: int
) -> ArmSpec:
    """SMOTE over group × label up to the largest: SMOTENC, or SMOTE / SMOTEN where all columns are of one kind.

    SMOTE takes no missing values: for its rows a missing number counts as the column's median and a missing category
    as a category of its own, so its rows miss categories but no numbers. Numbers are standardised first, because
    neighbours are measured in their units. A cell with fewer rows than neighbours uses those that it has; a single row
    is repeated.

    Args:
        train: The hospital's training rows.
        schema: The data dictionary.
        neighbours: Nearest rows of the same cell to draw from.
        random_state: Seed below 2**32.

    Raises:
        ConfigError: If imbalanced-learn is not installed.
    """
    cell, counts = _cells(train, schema.attributes)
    cells = _CellTable(train, schema, cell)
    parts, codes = [cells.matrix], [cell]
    for k in range(1, neighbours + 1):
        chosen = np.flatnonzero((np.minimum(counts - 1, neighbours) == k) & (counts < counts.max()))
        if not len(chosen):
            continue
        sampler = _sampler(cells.categorical, cells.matrix.shape[1])(
            sampling_strategy=dict.fromkeys(chosen.tolist(), int(counts.max())),
            k_neighbors=k,
            random_state=random_state,
        )
        made, labels = sampler.fit_resample(cells.matrix, cell)
        parts.append(made[len(train) :].astype(np.float64))
        codes.append(labels[len(train) :])
    for code in np.flatnonzero((counts == 1) & (counts < counts.max())):
        copies = int(counts.max()) - 1
        parts.append(np.repeat(cells.matrix[cell == code], copies, axis=0))
        codes.append(np.full(copies, code))
    made, labels = np.concatenate(parts)[len(train) :], np.concatenate(codes)[len(train) :]
    return augmented(train, cells.restore(made, labels), schema)


def _cells(train: pd.DataFrame, columns: tuple[Column, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cell of each row and rows per cell; cells are the intersections that occur."""
    _, cell, counts = np.unique(group_codes(train, columns), axis=0, return_inverse=True, return_counts=True)
    return cell.ravel(), counts


def _sampler(categorical: list[int], num_columns: int) -> Any:
    try:
        from imblearn.over_sampling import SMOTE, SMOTEN, SMOTENC
    except ImportError:
        raise ConfigError("arm 'smote' needs imbalanced-learn: pip install 'mcrage[bench]', or leave it out") from None
    if not categorical:
        return SMOTE
    if len(categorical) == num_columns:
        return SMOTEN
    return lambda **settings: SMOTENC(categorical_features=categorical, **settings)


class _CellTable:
    """Training rows as the matrix that SMOTE works on, and the way back.

    Attributes:
        matrix: Numbers standardised and imputed, categories as codes; without the categorical attributes, which are
            constant in a cell.
        categorical: Positions of the categories in the matrix.
    """

    def __init__(self, train: pd.DataFrame, schema: TableSchema, cell: NDArray[np.int64]) -> None:
        self._train = train.reset_index(drop=True)
        self._schema = schema
        self._first = np.unique(cell, return_index=True)[1]
        fixed = {column.name for column in schema.attributes if not column.is_numeric}
        self._columns = [column for column in schema.modelled if column.name not in fixed]
        self.categorical = [i for i, column in enumerate(self._columns) if not column.is_numeric]
        self._uniques: dict[str, Any] = {}
        self._scales: dict[str, tuple[float, float]] = {}
        encoded = [self._encode(column) for column in self._columns]
        self.matrix = np.stack(encoded, axis=1) if encoded else np.zeros((len(train), 0))

    def _encode(self, column: Column) -> NDArray[np.float64]:
        values = self._train[column.name]
        if not column.is_numeric:
            codes, uniques = pd.factorize(values, use_na_sentinel=False)
            self._uniques[column.name] = uniques
            return codes.astype(np.float64)
        floats = numbers(values, column)
        known = floats[~np.isnan(floats)]
        floats = np.where(np.isnan(floats), np.median(known) if len(known) else 0.0, floats)
        mean, deviation = float(floats.mean()), float(floats.std()) or 1.0
        self._scales[column.name] = (mean, deviation)
        return np.asarray((floats - mean) / deviation)

    def restore(self, matrix: NDArray[np.float64], cell: NDArray[np.int64]) -> pd.DataFrame:
        """Rows of the matrix as a table with the dtypes of the training rows."""
        donors = self._train.iloc[self._first[cell]].reset_index(drop=True)
        restored = {name: donors[name] for name in (column.name for column in self._schema.modelled)}
        for position, column in enumerate(self._columns):
            values, dtype = matrix[:, position], self._train[column.name].dtype
            if not column.is_numeric:
                restored[column.name] = pd.Series(self._uniques[column.name].take(values.astype(np.int64)), dtype=dtype)
                continue
            mean, deviation = self._scales[column.name]
            series = _rounded(values * deviation + mean, column)
            if column.role == "sensitive":
                # a cell of rows without a value is a group of its own
                series = series.mask(donors[column.name].isna())
            restored[column.name] = series.astype(dtype)
        return pd.DataFrame(restored)


def _rounded(values: NDArray[np.float64], column: Column) -> pd.Series:
    values = np.clip(values, column.low, column.high)
    if column.kind == "date":
        return pd.Series(np.rint(values).astype("int64").astype("datetime64[D]"))
    if column.kind == "integer":
        return pd.Series(np.rint(values))
    return pd.Series(values if column.decimals is None else values.round(column.decimals))

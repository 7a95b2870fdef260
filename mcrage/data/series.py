"""Columns of generated rows: values and levels as a pandas series of the dtype that the schema names."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.schema import Column

_EPOCH = np.datetime64("1970-01-01", "D")


def numeric_series(values: NDArray[np.float64], missing: NDArray[np.bool_] | None, column: Column) -> pd.Series:
    """A numeric column from its values.

    Args:
        values: Numbers, or days since 1970-01-01 for dates; shape (rows,).
        missing: Rows without a value, whatever stands there; None if there are none.
        column: Its place in the schema.
    """
    dtype = column.pandas_dtype
    mask = np.zeros(len(values), dtype=bool) if missing is None else missing
    if column.kind == "date":
        days = _EPOCH + values.round().astype("timedelta64[D]")
        return pd.Series(np.where(mask, np.datetime64("NaT"), days)).astype(dtype)
    if not mask.any():
        return pd.Series(values).astype(dtype)
    if pd.api.types.is_extension_array_dtype(dtype):
        series = pd.Series(values).astype(dtype)
        series[mask] = pd.NA
        return series
    return pd.Series(np.where(mask, np.nan, values)).astype(dtype)


def level_series(codes: NDArray[np.int64], missing: NDArray[np.bool_] | None, column: Column) -> pd.Series:
    """A column that is modelled as levels from the code of each row's level; ``missing`` as above."""
    dtype = column.pandas_dtype
    codes = codes if missing is None else np.where(missing, -1, codes)
    if column.is_numeric:
        return numeric_series(column.low + np.maximum(codes, 0), codes < 0, column)
    if dtype == "category":
        ordered = column.kind == "ordinal"
        return pd.Series(pd.Categorical.from_codes(codes, categories=list(column.levels), ordered=ordered))
    if column.kind == "boolean" and dtype in ("boolean", "bool"):
        series = pd.Series(codes == 1).astype(dtype)
        if (codes < 0).any():
            series[codes < 0] = pd.NA
        return series
    texts = pd.Series(np.array([*column.levels, None], dtype=object)[codes])
    return texts.astype(dtype)

"""The form in which rows go to peers and come back: numbers as numbers, levels as texts, missing cells empty."""

import numpy as np
import pandas as pd

from mcrage.data.groups import level_codes
from mcrage.data.schema import Column, TableSchema


def exported(table: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """The modelled columns of a table; a level is its text in the schema."""
    return pd.DataFrame({column.name: _texts(table[column.name], column) for column in schema.modelled})


def restored(rows: pd.DataFrame, schema: TableSchema) -> pd.DataFrame:
    """Rows of a peer with the schema's dtypes; a level that the schema does not have counts as missing."""
    return pd.DataFrame({column.name: _typed(rows[column.name], column) for column in schema.modelled})


def categories(schema: TableSchema) -> list[str]:
    """Names of the columns that are not numbers."""
    return [column.name for column in schema.modelled if not column.is_numeric]


def _texts(values: pd.Series, column: Column) -> pd.Series:
    if column.is_numeric:
        return values
    levels = np.array([*column.levels, None], dtype=object)
    return pd.Series(levels[level_codes(values, column, len(column.levels))], index=values.index, dtype=object)


def _typed(values: pd.Series, column: Column) -> pd.Series:
    dtype = column.pandas_dtype
    if column.is_numeric:
        floats = pd.to_numeric(values)
        return (floats.round() if column.step == 1.0 else floats).astype(dtype)
    levels = list(column.levels)
    known = pd.Series(
        pd.Categorical(values.where(values.isin(levels)), categories=levels, ordered=column.kind == "ordinal"),
        index=values.index,
    )
    if column.kind == "boolean" and dtype != "category":
        return (known.cat.codes == 1).astype(dtype).mask(known.isna())
    return known.astype(dtype)

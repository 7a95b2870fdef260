"""What rows were asked for: conditions in words as codes of levels, checked against the schema and its rules."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import level_code
from mcrage.data.repair import refuse_forbidden
from mcrage.data.schema import TableSchema
from mcrage.errors import SamplingError


def asked_levels(
    rows: int, conditions: Mapping[str, object] | pd.DataFrame | None, schema: TableSchema
) -> NDArray[np.int64]:
    """Group level of each of the schema's attributes that every row was asked for; shape (rows, attributes).

    Args:
        rows: Number of rows.
        conditions: Level per attribute, or a table of them (missing = open); bins by name or by a value inside.
        schema: The data dictionary.

    Returns:
        −1 where a level is open.

    Raises:
        SamplingError: If a name is not an attribute, a level does not exist or the schema's rules forbid it.
    """
    codes = np.full((rows, len(schema.attributes)), -1, dtype=np.int64)
    if conditions is None:
        return codes
    names = [column.name for column in schema.attributes]
    unknown = [str(name) for name in conditions if name not in names]
    if unknown:
        raise SamplingError(f"rows cannot be asked for by {', '.join(unknown)}; they can by {', '.join(names)}")
    if isinstance(conditions, pd.DataFrame) and len(conditions) != rows:
        raise SamplingError(f"asked for {rows} rows with conditions for {len(conditions)}")
    for name, given in conditions.items():
        place = names.index(str(name))
        column = schema.attributes[place]
        if isinstance(given, pd.Series):
            uniques, inverse = np.unique(given.astype(object).where(given.notna(), None).map(str), return_inverse=True)
            lookup = {str(value): value for value in given.dropna().unique()}
            table = [level_code(column, lookup[text]) if text in lookup else -1 for text in uniques]
            codes[:, place] = np.array(table, dtype=np.int64)[inverse]
        else:
            codes[:, place] = level_code(column, given)
    refuse_forbidden(codes, schema)
    return codes

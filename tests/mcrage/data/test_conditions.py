from typing import Any

import numpy as np
import pandas as pd
import pytest

from mcrage.data.conditions import asked_levels
from mcrage.data.schema import TableSchema
from mcrage.errors import SamplingError


def test_a_level_asked_for_once_is_asked_for_in_every_row_and_others_are_open(clinic_schema: TableSchema) -> None:
    asked = asked_levels(3, {"sex": "M", "age": 70}, clinic_schema)
    np.testing.assert_array_equal(asked, [[1, 1, -1]] * 3)
    assert (asked_levels(2, None, clinic_schema) == -1).all()


def test_a_table_asks_row_by_row_and_a_missing_cell_is_open(clinic_schema: TableSchema) -> None:
    asked = asked_levels(3, pd.DataFrame({"died": ["yes", None, "no"], "sex": ["F", "M", None]}), clinic_schema)
    np.testing.assert_array_equal(asked[:, 1:], [[0, 1], [1, -1], [-1, 0]])


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"lactate": 2}, "rows cannot be asked for by lactate; they can by age, sex, died"),
        ({"sex": "X"}, "column 'sex' has no level 'X'"),
        (pd.DataFrame({"sex": ["F"]}), "asked for 2 rows with conditions for 1"),
    ],
    ids=["attribute", "level", "rows"],
)
def test_what_does_not_exist_cannot_be_asked_for(conditions: Any, message: str, clinic_schema: TableSchema) -> None:
    with pytest.raises(SamplingError, match=message):
        asked_levels(2, conditions, clinic_schema)


def test_what_the_rules_forbid_cannot_be_asked_for(clinic_schema: TableSchema) -> None:
    ruled = clinic_schema.model_copy(update={"rules": ("if died = yes then sex = F",)})
    asked_levels(1, {"died": "yes"}, ruled)
    with pytest.raises(SamplingError, match="no row with sex=M, died=yes can follow"):
        asked_levels(1, {"died": "yes", "sex": "M"}, ruled)

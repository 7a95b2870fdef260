"""A small clinic that several tests train on: every kind of column, and a label that the features tell about."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from mcrage.data.schema import Column, TableSchema


@pytest.fixture(scope="session")
def clinic_schema() -> TableSchema:
    return TableSchema(
        name="clinic",
        columns=(
            Column(name="patient", kind="text", role="patient_id"),
            Column(name="age", kind="integer", role="sensitive", minimum=18, maximum=100, bins=(65,), nullable=True),
            Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
            Column(name="lactate", kind="continuous", minimum=0, maximum=20, decimals=1),
            Column(name="ward", kind="categorical", categories=("medical", "surgical"), other="elsewhere"),
            Column(name="frailty", kind="ordinal", categories=("fit", "frail", "very frail")),
            Column(name="smoker", kind="boolean"),
            Column(name="admitted", kind="date", minimum="2020-01-01", maximum="2022-12-31", nullable=False),
            Column(name="died", kind="categorical", role="target", categories=("no", "yes"), nullable=False),
        ),
    )


@pytest.fixture(scope="session")
def clinic_rows(clinic_schema: TableSchema) -> Callable[..., pd.DataFrame]:
    """Rows by number and seed; ``women`` is the share of women, whose risk depends on lactate the other way round."""

    def make(n: int, seed: int, *, women: float = 0.5) -> pd.DataFrame:
        draw = np.random.default_rng(seed)
        sex = np.where(draw.random(n) < women, "F", "M")
        lactate = np.round(np.clip(draw.gamma(2.0, 1.2, n), 0, 20), 1)
        age = draw.integers(18, 101, n)
        frailty = draw.integers(0, 3, n)
        log_odds = np.where(sex == "F", -1, 1) * (lactate - 2.4) + 0.03 * (age - 60) + 0.5 * (frailty - 1) - 0.5
        died = draw.random(n) < 1 / (1 + np.exp(-log_odds))
        columns = {column.name: column for column in clinic_schema.columns}
        days = draw.integers(0, 1000, n).astype("timedelta64[D]")
        return pd.DataFrame(
            {
                "patient": pd.Series([f"p{seed}-{i}" for i in range(n)], dtype="str"),
                "age": pd.Series(age, dtype="Int64").mask(draw.random(n) < 0.05),
                "sex": pd.Categorical(sex, categories=["F", "M"]),
                "lactate": pd.Series(lactate).mask(draw.random(n) < 0.2),
                "ward": pd.Categorical(draw.choice(["medical", "surgical"], n), columns["ward"].levels),
                "frailty": pd.Categorical.from_codes(frailty, columns["frailty"].levels, ordered=True),
                "smoker": pd.Series(draw.random(n) < 0.3, dtype="boolean").mask(draw.random(n) < 0.1),
                "admitted": pd.Series(np.datetime64("2020-01-01", "s") + days),
                "died": pd.Categorical(np.where(died, "yes", "no"), categories=["no", "yes"]),
            }
        )

    return make

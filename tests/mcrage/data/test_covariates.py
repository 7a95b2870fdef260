import numpy as np
import pandas as pd
import pytest
import torch

from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.data.transform import TableTransform

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 500, "decimals": 1, "scale": "log"},
            {"name": "grade", "kind": "ordinal", "categories": ["low", "mid", "high"]},
            {"name": "visits", "kind": "integer", "minimum": 0, "maximum": 5, "nullable": False},
            {"name": "race", "kind": "categorical", "categories": ["a", "b"], "nullable": False},
            {"name": "died", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)


def make_table(rows: int, seed: int = 0) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    grades = pd.Categorical.from_codes(draw.integers(0, 3, rows), categories=["low", "mid", "high"], ordered=True)
    return pd.DataFrame(
        {
            "lab": np.where(draw.random(rows) < 0.2, np.nan, draw.gamma(2, 20, rows).round(1).clip(0, 500)),
            "grade": pd.Series(grades).mask(draw.random(rows) < 0.2),
            "visits": pd.array(draw.poisson(1, rows).clip(0, 5), dtype="Int64"),
            "race": pd.Categorical.from_codes(draw.integers(0, 2, rows), categories=["a", "b"]),
            "died": pd.array(draw.random(rows) < 0.3, dtype="boolean"),
        }
    )


def covariates(table: pd.DataFrame, transform: TableTransform, seed: int = 0) -> torch.Tensor:
    return transform.encode(table, generator=np.random.default_rng(seed)).covariates


@pytest.fixture(scope="module")
def transform() -> TableTransform:
    return TableTransform(SCHEMA, Marginals.of(make_table(5000), SCHEMA))


def test_a_number_has_four_views_and_an_ordered_level_one(transform: TableTransform) -> None:
    assert covariates(make_table(3), transform).shape == (3, 4 + 2)
    assert transform.layout.num_covariates == 6


def test_they_are_standardised_over_the_rows_that_have_a_value(transform: TableTransform) -> None:
    table = make_table(5000, seed=1)
    found = covariates(table, transform).numpy()
    has_lab, has_grade = table["lab"].notna().to_numpy(), table["grade"].notna().to_numpy()
    for position, rows in ((0, has_lab), (1, has_lab), (4, has_grade), (5, np.ones(5000, dtype=bool))):
        assert found[rows, position].mean() == pytest.approx(0, abs=0.06)  # four standard errors
        # the release widens the tail, whose small cells it merges
        assert found[rows, position].std() == pytest.approx(1, abs=0.15)


def test_a_missing_value_is_the_mean(transform: TableTransform) -> None:
    table = make_table(200)
    found = covariates(table, transform).numpy()
    assert (found[table["lab"].isna(), :4] == 0).all()
    assert (found[table["grade"].isna(), 4] == 0).all()


def test_they_rise_with_the_value_and_the_tails_are_flat_in_the_middle(transform: TableTransform) -> None:
    values = np.array([0.5, 5, 20, 30, 40, 80, 200, 500])
    table = make_table(8).assign(lab=values)
    value, score, above, below = covariates(table, transform).T.numpy()[:4]
    assert (np.diff(value) > 0).all()
    assert (np.diff(score) > 0).all()
    assert above[2] == above[4] < above[-1]
    assert below[0] > below[2] == below[-1]
    assert np.abs(covariates(table, transform).numpy()).max() <= 10


def test_the_draw_within_the_rounding_interval_changes_nothing(transform: TableTransform) -> None:
    assert torch.equal(covariates(make_table(100), transform, 1), covariates(make_table(100), transform, 2))


def test_without_histograms_the_bounds_standardise() -> None:
    found = covariates(make_table(100), TableTransform(SCHEMA))
    assert torch.isfinite(found).all()


def test_a_large_table_in_parts_has_the_covariates_of_the_whole(
    transform: TableTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = covariates(make_table(100), transform)
    monkeypatch.setattr("mcrage.data.covariates._AT_ONCE", 7)
    assert torch.equal(covariates(make_table(100), transform), whole)
    assert covariates(make_table(0), transform).shape == (0, 6)

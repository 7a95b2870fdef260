import numpy as np
import pandas as pd
import pytest

from mcrage.data.schema import TableSchema
from mcrage.evaluation.fidelity import all_pairs, detection, one_way, train_synthetic_test_real

SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "x", "kind": "continuous", "minimum": -10, "maximum": 10},
            {"name": "c", "kind": "categorical", "categories": ["a", "b", "c"], "role": "sensitive"},
            {"name": "y", "kind": "boolean", "role": "target", "nullable": False},
        ]
    }
)


def make_table(rows: int, seed: int) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, 3, rows)
    x = draw.normal(codes, 1.0)
    return pd.DataFrame(
        {
            "x": np.where(draw.random(rows) < 0.1, np.nan, x),
            "c": pd.Categorical.from_codes(codes, categories=["a", "b", "c"]),
            "y": pd.array(draw.random(rows) < 1 / (1 + np.exp(-2 * (x - 1))), dtype="boolean"),
        }
    )


def shuffled(table: pd.DataFrame) -> pd.DataFrame:
    """The same marginals without any dependence."""
    draw = np.random.default_rng(7)
    return pd.DataFrame({name: table[name].iloc[draw.permutation(len(table))].array for name in table})


def test_rows_of_the_same_distribution_score_nearly_one_and_cannot_be_told_apart() -> None:
    real, other = make_table(3000, 0), make_table(3000, 1)
    assert one_way(real, other, SCHEMA) > 0.97
    assert all_pairs(real, other, SCHEMA) > 0.94
    assert detection(real, other, SCHEMA, generator=np.random.default_rng(0)) == pytest.approx(0.5, abs=0.04)


def test_independent_marginals_pass_one_way_and_fail_pairs_detection_and_tstr() -> None:
    real, fake = make_table(3000, 0), shuffled(make_table(3000, 1))
    assert one_way(real, fake, SCHEMA) > 0.97
    assert all_pairs(real, fake, SCHEMA) < 0.85
    assert detection(real, fake, SCHEMA, generator=np.random.default_rng(0)) > 0.7
    assert train_synthetic_test_real(fake, real, SCHEMA) < 0.6


def test_real_rows_train_a_model_that_ranks_real_rows() -> None:
    assert train_synthetic_test_real(make_table(3000, 1), make_table(3000, 0), SCHEMA) > 0.8


def test_all_pairs_is_the_mean_overlap_of_joint_tables() -> None:
    schema = TableSchema.parse(
        {"columns": [{"name": name, "kind": "categorical", "categories": ["0", "1"]} for name in "ab"]}
    )
    real = pd.DataFrame({"a": ["0", "1"], "b": ["0", "1"]}).astype("category")
    fake = pd.DataFrame({"a": ["0", "1"], "b": ["1", "1"]}).astype("category")
    # joint shares {00: .5, 11: .5} against {01: .5, 11: .5}: total variation .5
    assert all_pairs(real, fake, schema) == pytest.approx(0.5)
    assert one_way(real, fake, schema) == pytest.approx((1.0 + 0.5) / 2)

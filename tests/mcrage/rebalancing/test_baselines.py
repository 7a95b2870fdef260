"""The usual remedies do what their names say, with the dtypes and bounds of the table."""

import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.utils.class_weight import compute_sample_weight

from mcrage.data.groups import GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from mcrage.rebalancing.baselines import augmented, baseline_builders, class_weights, oversampled, smote


@pytest.fixture(scope="module")
def train(clinic_rows) -> pd.DataFrame:
    return clinic_rows(240, 5, women=0.15)


def test_label_weights_are_scikit_learns_balanced_ones(train: pd.DataFrame, clinic_schema: TableSchema) -> None:
    weights = class_weights(train, clinic_schema).weights
    np.testing.assert_allclose(weights, compute_sample_weight("balanced", train["died"].astype(str)))


def test_group_weights_give_every_group_and_label_the_same_total(
    train: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    weights = class_weights(train, clinic_schema, over="group").weights
    assert weights is not None
    older = train["age"].astype("float64").ge(65).astype(str).mask(train["age"].isna(), "missing")
    totals = pd.Series(weights).groupby([older, train["sex"], train["died"]], observed=True).sum()
    assert totals.std() == pytest.approx(0)
    assert weights.mean() == pytest.approx(1)


def test_oversampling_repeats_rows_of_small_groups_up_to_the_largest(
    train: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    table = oversampled(train, clinic_schema, generator=np.random.default_rng(0)).table
    counts = GroupCounts.of(table, clinic_schema.attributes)
    assert set(counts.values()) == {max(GroupCounts.of(train, clinic_schema.attributes).values())}
    assert table.head(len(train)).equals(train)
    assert set(table["patient"]) == set(train["patient"])


def test_smote_reaches_parity_with_rows_that_follow_the_schema(train: pd.DataFrame, clinic_schema: TableSchema) -> None:
    names = [column.name for column in clinic_schema.modelled]
    table = smote(train, clinic_schema, random_state=0).table
    counts = GroupCounts.of(table, clinic_schema.attributes)
    assert set(counts.values()) == {max(GroupCounts.of(train, clinic_schema.attributes).values())}
    assert table.head(len(train)).equals(train[names])
    assert table.dtypes.equals(train[names].dtypes)
    made = table.iloc[len(train) :]
    assert made["lactate"].between(0, 20).all()
    assert np.allclose(made["lactate"] * 10, (made["lactate"] * 10).round())
    assert made["ward"].dropna().isin(["medical", "surgical"]).all()
    assert made["age"].isna().any(), "rows of the group of a missing age have no age"


def test_smote_makes_new_numbers_and_not_copies(train: pd.DataFrame, clinic_schema: TableSchema) -> None:
    table = smote(train, clinic_schema, random_state=0).table
    made = table.iloc[len(train) :]
    assert len(set(made["admitted"]) - set(train["admitted"])) > 10


def test_a_cell_of_one_row_is_repeated_and_one_of_two_uses_its_only_neighbour(
    clinic_schema: TableSchema, clinic_rows
) -> None:
    rows = clinic_rows(300, 7)
    rows["age"] = rows["age"].fillna(50)
    women = rows.index[(rows["sex"] == "F") & (rows["died"] == "yes") & (rows["age"] >= 65)]
    other = rows.index[(rows["sex"] == "F") & (rows["died"] == "yes") & (rows["age"] < 65)]
    train = rows.drop(index=[*women[1:], *other[2:]]).reset_index(drop=True)
    made = smote(train, clinic_schema, random_state=0).table.iloc[len(train) :]
    assert set(GroupCounts.of(pd.concat([train, made]), clinic_schema.attributes).values()) == {
        max(GroupCounts.of(train, clinic_schema.attributes).values())
    }
    alone = made[(made["sex"] == "F") & (made["died"] == "yes") & (made["age"] >= 65)]
    assert alone["admitted"].nunique() == 1


@pytest.mark.parametrize(
    "kept", [("lactate", "admitted", "sex", "died"), ("ward", "smoker", "sex", "died"), ("sex", "died", "frailty")]
)
def test_smote_takes_tables_of_one_kind_of_column(
    kept: tuple[str, ...], train: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    schema = TableSchema(columns=tuple(column for column in clinic_schema.columns if column.name in kept))
    table = smote(train, schema, random_state=0).table
    assert len(set(GroupCounts.of(table, schema.attributes).values())) == 1


def test_smote_does_not_round_a_column_without_decimals(train: pd.DataFrame, clinic_schema: TableSchema) -> None:
    columns = [c.model_copy(update={"decimals": None}) if c.name == "lactate" else c for c in clinic_schema.columns]
    made = smote(train, TableSchema(columns=tuple(columns)), random_state=0).table.iloc[len(train) :]
    assert not np.allclose(made["lactate"], made["lactate"].round(1))


def test_a_column_without_any_value_is_no_obstacle(train: pd.DataFrame, clinic_schema: TableSchema) -> None:
    empty = train.assign(lactate=np.nan)
    table = smote(empty, clinic_schema, random_state=0).table
    assert len(table) > len(train)


def test_smote_without_its_extra_says_what_to_install(
    train: pd.DataFrame, clinic_schema: TableSchema, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imblearn.over_sampling", None)
    with pytest.raises(ConfigError, match=r"pip install 'mcrage\[bench\]'"):
        smote(train, clinic_schema, random_state=0)


def test_own_and_synthetic_rows_stand_together_in_the_schemas_columns(
    train: pd.DataFrame, clinic_schema: TableSchema
) -> None:
    synthetic = train.head(10).drop(columns="patient")
    table = augmented(train, synthetic, clinic_schema).table
    assert len(table) == len(train) + 10
    assert list(table.columns) == [column.name for column in clinic_schema.modelled]


def test_the_baselines_are_built_in_order_and_by_seed(train: pd.DataFrame, clinic_schema: TableSchema) -> None:
    one, two = (
        {name: build() for name, build in baseline_builders(train, clinic_schema, seed=1).items()} for _ in "ab"
    )
    assert list(one) == ["local", "class_weights", "threshold", "oversampling", "smote"]
    assert all(one[name].table.equals(two[name].table) for name in one)
    assert one["local"].table.equals(train)
    assert [name for name, arm in one.items() if arm.tunes_threshold] == ["threshold"]

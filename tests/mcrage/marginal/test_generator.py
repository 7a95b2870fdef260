"""The generator is used as CDDPM is, keeps to its epsilon, and its rows follow schema, conditions and rules."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mcrage import MarginalGenerator
from mcrage.data.repair import rule_problems
from mcrage.data.schema import TableSchema
from mcrage.data.transform import check_table
from mcrage.errors import CheckpointError, ConfigError, DataError, NotFittedError, PrivacyError, SamplingError
from mcrage.marginal.budget import Budget, Shares
from mcrage.marginal.source import LocalSource
from mcrage.privacy import accounting
from mcrage.privacy.events import PrivacyEvent
from mcrage.rebalancing.rebalancer import make_pool
from mcrage.storage import StoredModel

KEY = bytes(range(32))
Rows = Callable[..., pd.DataFrame]


@pytest.fixture(scope="module")
def exact(clinic_schema: TableSchema, clinic_rows: Rows) -> MarginalGenerator:
    return MarginalGenerator(random_state=3).fit(clinic_rows(4000, 1), clinic_schema)


@pytest.fixture(scope="module")
def private(clinic_schema: TableSchema, clinic_rows: Rows) -> MarginalGenerator:
    return MarginalGenerator().fit(clinic_rows(4000, 1), clinic_schema, epsilon=2.0, key=KEY)


def test_rows_have_the_columns_order_and_dtypes_of_the_table(
    exact: MarginalGenerator, private: MarginalGenerator, clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    table = clinic_rows(50, 1)[[column.name for column in clinic_schema.modelled]]
    for model in (exact, private):
        rows = model.sample(300)
        assert rows.dtypes.to_dict() == table.dtypes.to_dict()
        assert list(rows.columns) == list(table.columns)
        assert list(rows.index) == list(range(300))
        check_table(rows, clinic_schema)
        assert rows["lactate"].dropna().between(0, 20).all()


def test_a_condition_holds_in_every_row_and_moves_the_others(exact: MarginalGenerator, clinic_rows: Rows) -> None:
    rows = exact.sample(200, {"sex": "F", "age": "65 and over", "died": "yes"})
    assert (rows["sex"] == "F").all()
    assert (rows["age"] >= 65).all()
    assert (rows["died"] == "yes").all()
    real = clinic_rows(20_000, 9)
    for sex in "FM":
        for died in ("yes", "no"):
            rows = exact.sample(3000, {"sex": sex, "died": died})
            same = real[(real["sex"] == sex) & (real["died"] == died)]
            assert rows["lactate"].mean() == pytest.approx(same["lactate"].mean(), abs=0.25)


def test_a_table_of_conditions_is_met_row_by_row(private: MarginalGenerator) -> None:
    asked = pd.DataFrame({"sex": ["M", "F"] * 20, "died": ["yes", None] * 20})
    rows = private.sample(40, asked)
    assert list(rows["sex"]) == ["M", "F"] * 20
    assert (rows["died"][::2] == "yes").all()


def test_open_conditions_give_the_mix_of_the_data(private: MarginalGenerator, clinic_rows: Rows) -> None:
    rows, real = private.sample(8000), clinic_rows(4000, 1)
    assert (rows["sex"] == "F").mean() == pytest.approx((real["sex"] == "F").mean(), abs=0.04)
    assert (rows["died"] == "yes").mean() == pytest.approx((real["died"] == "yes").mean(), abs=0.04)
    assert rows["lactate"].isna().mean() == pytest.approx(0.2, abs=0.04)
    assert rows["lactate"].mean() == pytest.approx(real["lactate"].mean(), abs=0.3)


def test_the_same_seed_gives_the_same_rows_and_another_seed_does_not(exact: MarginalGenerator) -> None:
    pd.testing.assert_frame_equal(exact.sample(20), exact.sample(20, random_state=3))
    assert not exact.sample(20, random_state=1).equals(exact.sample(20, random_state=2))


@pytest.mark.slow
def test_every_row_follows_the_rules(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    ruled = clinic_schema.model_copy(update={"rules": ("if died = yes then smoker is not missing",)})
    table = clinic_rows(2000, 1)
    table.loc[table["died"] == "yes", "smoker"] = table.loc[table["died"] == "yes", "smoker"].fillna(False)
    model = MarginalGenerator().fit(table, ruled, epsilon=3.0, key=KEY)
    rows = model.sample(2000, {"died": "yes"})
    assert rule_problems(rows, ruled) == []
    assert model.repairs_.rows == 2000
    assert sum(model.repairs_.redrawn.values()) > 0
    with pytest.raises(SamplingError, match="no level"):
        model.sample(2, {"died": "perhaps"})


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_all_that_is_released_costs_at_most_the_epsilon(
    epsilon: float, clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    model = MarginalGenerator().fit(clinic_rows(4000, 1), clinic_schema, epsilon=epsilon, key=KEY)
    assert model.epsilon_ == accounting.epsilon(model.events_, delta=1e-5)
    assert 0.7 * epsilon < model.epsilon_ <= epsilon, "a forest without an edge leaves a part unspent"
    assert {event.mechanism for event in model.events_} == {"discrete-gaussian"}
    assert model.events_[0].steps == len(clinic_schema.modelled)


def test_without_an_epsilon_nobody_is_protected_and_it_says_so(exact: MarginalGenerator) -> None:
    assert set(exact.events_) == {PrivacyEvent(mechanism="unprotected")}
    assert math.isinf(exact.epsilon_)


def shares_of(model: MarginalGenerator) -> list[list[float]]:
    return [each.shares.ravel().tolist() for each in model.model_.columns]


@pytest.mark.slow
def test_noise_follows_from_the_key_and_the_table_and_never_from_the_seed(
    private: MarginalGenerator, clinic_schema: TableSchema, clinic_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = clinic_rows(4000, 1)
    same = MarginalGenerator(random_state=77).fit(table, clinic_schema, epsilon=2.0, key=KEY)
    assert shares_of(same) == shares_of(private)
    other = MarginalGenerator().fit(table, clinic_schema, epsilon=2.0, key=KEY[::-1])
    assert shares_of(other) != shares_of(private)

    keys: list[bytes] = []
    ask = LocalSource.tables
    monkeypatch.setattr(
        LocalSource, "tables", lambda self, tables, *, noise: keys.append(self._key) or ask(self, tables, noise=noise)
    )
    for rows in (table, table.iloc[1:], table.iloc[::-1]):
        MarginalGenerator().fit(rows, clinic_schema, epsilon=2.0, key=KEY)
    assert len(set(keys)) == 3, "two tables of one noise would show their difference"


def test_a_finite_epsilon_needs_a_key(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    with pytest.raises(PrivacyError, match="needs a key of 32 bytes"):
        MarginalGenerator().fit(clinic_rows(9, 1), clinic_schema, epsilon=1.0)
    with pytest.raises(PrivacyError, match="32 bytes is needed, this one has 3"):
        MarginalGenerator().fit(clinic_rows(9, 1), clinic_schema, epsilon=1.0, key=b"abc")


@pytest.mark.slow
def test_an_empty_table_is_told_where_counts_are_exact_and_gives_noise_elsewhere(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    nobody = clinic_rows(3, 1).iloc[:0]
    with pytest.raises(ConfigError, match="no rows"):
        MarginalGenerator().fit(nobody, clinic_schema)
    model = MarginalGenerator().fit(nobody, clinic_schema, epsilon=1.0, key=KEY)
    check_table(model.sample(100), clinic_schema)


def test_a_table_that_does_not_follow_the_schema_is_refused(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    with pytest.raises(DataError, match="column 'ward': is missing"):
        MarginalGenerator().fit(clinic_rows(9, 1).drop(columns="ward"), clinic_schema)


def test_a_model_that_was_not_fitted_and_a_negative_number_of_rows_are_refused(
    exact: MarginalGenerator, tmp_path: Path
) -> None:
    for ask in (lambda: MarginalGenerator().sample(1), lambda: MarginalGenerator().save(tmp_path)):
        with pytest.raises(NotFittedError):
            ask()
    with pytest.raises(SamplingError, match="asked for -1 rows"):
        exact.sample(-1)
    assert len(exact.sample(0)) == 0


def test_a_rebalancer_takes_it_as_it_takes_any_model(private: MarginalGenerator, clinic_schema: TableSchema) -> None:
    pool = make_pool(private, clinic_schema, 7, random_state=0).table
    assert set(pool.groupby(["sex", "died"], observed=True).size()) == {14}


def test_it_can_be_made_of_sums_that_somebody_else_protects(
    exact: MarginalGenerator, clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    source = LocalSource(clinic_rows(4000, 1), clinic_schema, epsilon=math.inf, delta=1e-5, key=KEY)
    model = MarginalGenerator(random_state=3).estimate(clinic_schema, source, Budget(precision=math.inf))
    pd.testing.assert_frame_equal(model.sample(50), exact.sample(50))
    assert model.events_ == ()


@pytest.mark.parametrize("which", ["exact", "private"])
def test_a_saved_model_samples_the_same_rows(
    which: str, request: pytest.FixtureRequest, tmp_path: Path, clinic_schema: TableSchema
) -> None:
    model: MarginalGenerator = request.getfixturevalue(which)
    model.save(tmp_path / "model")
    loaded = MarginalGenerator.load(tmp_path / "model")
    pd.testing.assert_frame_equal(loaded.sample(200), model.sample(200))
    assert (loaded.events_, loaded.epsilon_, loaded.shares) == (model.events_, model.epsilon_, model.shares)
    assert loaded.schema_ == clinic_schema
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["model.json", "model.safetensors"]
    for path in (tmp_path / "model").iterdir():
        assert KEY not in path.read_bytes()
        assert KEY.hex() not in path.read_text(encoding="latin-1")


def altered(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Writes the model anew, with right checksums, after a change of what stands in it."""
    stored = StoredModel.read(folder)
    content, arrays = json.loads(stored.description), dict(stored.parameters)
    change(content, arrays)
    StoredModel(json.dumps(content), stored.settings, arrays, {}).write(folder)


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], object]] = {
    "format": lambda content, _: content.update(format=2),
    "no schema": lambda content, _: content.pop("schema"),
    "schema": lambda content, _: content.update(schema={"columns": []}),
    "histogram": lambda content, _: content["marginals"].update(sex=[1.0]),
    "merging": lambda content, _: content["columns"][0].update(merged=[0]),
    "merging of texts": lambda content, _: content["columns"][0].update(merged=["a"] * 202),
    "parent": lambda content, _: content["columns"][0].update(parent=3),
    "column": lambda content, _: content["columns"][0].update(name="nobody"),
    "event": lambda content, _: content.update(events=[{"mechanism": "none"}]),
    "no array": lambda _, arrays: arrays.pop("shares.lactate"),
    "array": lambda _, arrays: arrays.update({"shares.groups": np.full((3, 2, 2), np.nan, dtype=np.float32)}),
    "array of integers": lambda _, arrays: arrays.update({"shares.groups": np.ones((3, 2, 2), dtype=np.int32)}),
}


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_file_of_another_model_is_refused(change: str, exact: MarginalGenerator, tmp_path: Path) -> None:
    exact.save(tmp_path)
    altered(tmp_path, lambda *_: None)
    MarginalGenerator.load(tmp_path)
    altered(tmp_path, CHANGES[change])
    with pytest.raises(CheckpointError):
        MarginalGenerator.load(tmp_path)


@pytest.mark.slow
def test_shares_of_the_budget_can_be_chosen(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    shares = Shares(one_ways=0.5, groups=0.1, conditions=0.4, pairs=0.0, edges=0.0)
    model = MarginalGenerator(shares=shares).fit(clinic_rows(4000, 1), clinic_schema, epsilon=5.0, key=KEY)
    one_ways, groups, conditions = model.events_
    assert 0.5 / one_ways.steps * one_ways.noise_multiplier**2 == pytest.approx(0.1 * groups.noise_multiplier**2)
    assert conditions.steps == 2 * 5

"""The model follows from summed counts and the schema alone, and keeps what stands out of their noise."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from mcrage.data.crossing import Axes, to_json
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import MessageError
from mcrage.marginal.budget import Budget, Shares
from mcrage.marginal.estimation import Source, condition_sets, estimate
from mcrage.marginal.model import ColumnModel, MarginalModel
from mcrage.marginal.source import LocalSource
from mcrage.privacy.keyed import derive

Floats = NDArray[np.float64]

EXACT = Budget(precision=float("inf"))

SCHEMA = TableSchema(
    columns=(
        Column(name="sex", kind="categorical", role="sensitive", categories=("F", "M"), nullable=False),
        Column(name="race", kind="categorical", role="sensitive", categories=("a", "b", "c"), nullable=False),
        Column(name="first", kind="ordinal", categories=("0", "1", "2", "3"), nullable=False),
        Column(name="second", kind="ordinal", categories=("0", "1", "2", "3"), nullable=False),
        Column(name="third", kind="categorical", categories=("x", "y"), nullable=False),
        Column(name="ill", kind="boolean", role="target", nullable=False),
    )
)


def rows_of(number: int, seed: int = 0, *, linked: bool = True) -> pd.DataFrame:
    """Half of the rows have ``second`` equal to ``first``; ``third`` tells the label, the other way round in race c."""
    draw = np.random.default_rng(seed)
    race = draw.choice(3, number, p=[0.7, 0.2, 0.1])
    ill = draw.random(number) < 0.3
    first = draw.choice(4, number, p=[0.1, 0.4, 0.3, 0.2])
    second = np.where(draw.random(number) < 0.5 * linked, first, draw.choice(4, number))
    third = draw.random(number) < np.where(ill ^ (race == 2), 0.8, 0.3)
    levels = {"0123": (first, second), "abc": (race,), "xy": (third.astype(int),)}
    named = {text: [pd.Categorical.from_codes(each, list(text)) for each in codes] for text, codes in levels.items()}
    return pd.DataFrame(
        {
            "sex": pd.Categorical.from_codes((draw.random(number) < 0.4).astype(int), ["F", "M"]),
            "race": named["abc"][0],
            "first": named["0123"][0],
            "second": named["0123"][1],
            "third": named["xy"][0],
            "ill": pd.array(ill, dtype="boolean"),
        }
    )


class Sums:
    """Several sites that each add their own noise."""

    def __init__(self, tables: Sequence[pd.DataFrame], schema: TableSchema, *, key: bytes = bytes(32)) -> None:
        keys = [derive(key, number) for number in range(len(tables))]
        self.parts = [
            LocalSource(table, schema, epsilon=float("inf"), delta=1e-5, key=key)
            for table, key in zip(tables, keys, strict=True)
        ]
        self.asked: list[str] = []
        self.answers: list[list[Floats]] = []

    def tables(self, tables: Sequence[Axes], *, noise: float) -> list[Floats]:
        self.asked.append(f"{to_json(tables)} {noise}")
        answers = [part.tables(tables, noise=noise) for part in self.parts]
        self.answers.append([np.sum(each, axis=0) for each in zip(*answers, strict=True)])
        return self.answers[-1]

    def deviation(self, noise: float) -> float:
        return noise * len(self.parts) ** 0.5


class Replay:
    """Answers that were written down: there is no table behind them."""

    def __init__(self, recorded: Sums) -> None:
        self.deviation, self.answers = recorded.deviation, [*recorded.answers]
        self.asked: list[str] = []

    def tables(self, tables: Sequence[Axes], *, noise: float) -> list[Floats]:
        self.asked.append(f"{to_json(tables)} {noise}")
        return self.answers.pop(0)


def columns_of(model: MarginalModel) -> dict[str, ColumnModel]:
    return {each.grid.column.name: each for each in model.columns}


def edges_of(model: MarginalModel) -> list[set[str]]:
    names = [each.grid.column.name for each in model.columns]
    return [{names[each.parent], names[place]} for place, each in enumerate(model.columns) if each.parent >= 0]


def pair_shares(model: MarginalModel) -> Floats:
    """P(first, second) of a model in which one is the other's parent."""
    parent, child = (each for each in model.columns if each.grid.column.name in ("first", "second"))
    given, groups = parent.shares.reshape(-1, parent.grid.size, 1), model.groups.reshape(-1, 1, 1).astype(np.float64)
    share = (groups * given * child.shares.reshape(-1, parent.grid.size, child.grid.size)).sum(axis=0)
    return share if parent.grid.column.name == "first" else share.T


def test_the_model_follows_from_sums_of_noisy_counts_and_the_schema_alone() -> None:
    budget = Budget(precision=2.0)
    sites = Sums([rows_of(5000, seed) for seed in range(4)], SCHEMA)
    model = estimate(SCHEMA, sites, budget)
    replay = Replay(sites)
    again = estimate(SCHEMA, replay, budget)
    assert replay.asked == sites.asked
    assert replay.answers == []
    np.testing.assert_array_equal(model.groups, again.groups)
    for name, each in columns_of(model).items():
        np.testing.assert_array_equal(each.shares, columns_of(again)[name].shares)


def test_sums_over_sites_give_what_all_rows_have() -> None:
    table = rows_of(40_000)
    sites: Source = Sums([table.iloc[part::4] for part in range(4)], SCHEMA)
    model = estimate(SCHEMA, sites, Budget(precision=2.0))
    model.check(SCHEMA)
    truth = pd.crosstab(table["first"], table["second"], normalize=True).to_numpy()
    assert edges_of(model) == [{"first", "second"}]
    np.testing.assert_allclose(pair_shares(model), truth, atol=0.01)
    rates = columns_of(model)["third"].shares[..., 1].mean(axis=0)
    np.testing.assert_allclose(rates, [[0.3, 0.8], [0.3, 0.8], [0.8, 0.3]], atol=0.04)
    np.testing.assert_allclose(model.groups.sum(axis=(0, 2)), [0.7, 0.2, 0.1], atol=0.01)
    np.testing.assert_allclose(model.groups.sum(axis=(0, 1)), [0.7, 0.3], atol=0.01)


def test_exact_counts_give_the_tables_that_were_counted() -> None:
    table = rows_of(20_000)
    model = estimate(SCHEMA, Sums([table], SCHEMA), EXACT)
    truth = pd.crosstab(table["first"], table["second"], normalize=True).to_numpy()
    np.testing.assert_allclose(pair_shares(model), truth, atol=2e-3)
    by_group = table.groupby(["race", "ill"], observed=False)["third"].agg(lambda each: (each == "y").mean())
    rates = columns_of(model)["third"].shares[..., 1].mean(axis=0)
    np.testing.assert_allclose(rates, by_group.to_numpy().reshape(3, 2), atol=0.02)


def test_the_tables_of_all_columns_tell_the_label_rate_of_a_group_better_than_its_own_table() -> None:
    """Only race c, a tenth of 2,000 patients, has another rate: 1 - .3."""
    table = rows_of(2000)
    rare = (table["race"] == "c").to_numpy()
    table["ill"] = pd.array(np.where(rare, ~table["ill"].to_numpy(bool), table["ill"].to_numpy(bool)), dtype="boolean")
    true = float(table.loc[rare, "ill"].mean())
    budget, model_errors, table_errors = Budget(precision=0.1), [], []
    for number in range(20):
        sites = Sums([table], SCHEMA, key=derive(bytes(32), "draw", number))
        rows = estimate(SCHEMA, sites, budget).groups.sum(axis=0)[2]
        model_errors.append(rows[1] / rows.sum() - true)
        counted = sites.answers[1][0].sum(axis=0)[2]
        table_errors.append(counted[1] / counted.sum() - true)
    assert np.sqrt(np.mean(np.square(model_errors))) < 0.7 * np.sqrt(np.mean(np.square(table_errors)))


def test_columns_that_do_not_depend_on_each_other_have_no_edge() -> None:
    for budget in (EXACT, Budget(precision=2.0)):
        sites = Sums([rows_of(20_000, linked=False)], SCHEMA)
        assert edges_of(estimate(SCHEMA, sites, budget)) == []
        assert len(sites.asked) == 4, "histograms, groups, conditions and pairs; no edge is asked for"


def test_where_noise_limits_the_edges_their_budget_goes_to_the_conditions() -> None:
    for precision, questions in ((0.005, 3), (2.0, 5)):
        sites = Sums([rows_of(20_000)], SCHEMA)
        model = estimate(SCHEMA, sites, Budget(precision=precision))
        assert len(sites.asked) == questions
        assert len(edges_of(model)) == (questions == 5)
        shares = Shares() if questions == 5 else Shares().without_forest()
        spent = Budget(precision=precision, shares=shares).noise("conditions", 3 * 2)
        assert sites.asked[2].endswith(f"] {spent}")


def test_what_noise_drowns_is_left_out_and_not_made_up() -> None:
    """At a precision of 1e-5 the noise is larger than all rows together: every group has the same levels."""
    model = estimate(SCHEMA, Sums([rows_of(2000)], SCHEMA), Budget(precision=1e-5))
    for each in model.columns:
        flat = each.shares.reshape(-1, each.grid.size)
        assert np.isfinite(flat).all()
        np.testing.assert_allclose(flat.sum(axis=1), 1.0, rtol=1e-5)
    assert all(each.grid.size <= 2 for each in model.columns)


@pytest.mark.parametrize(
    ("dropped", "sets"),
    [
        ((), [(0, 2), (1, 2)]),
        (("ill",), [(0,), (1,)]),
        (("sex", "race"), [(0,)]),
        (("sex", "race", "ill"), []),
        (("first", "second", "third"), [(0, 2), (1, 2)]),
    ],
    ids=["all", "no label", "no group", "neither", "no features"],
)
def test_any_schema_will_do(dropped: tuple[str, ...], sets: list[tuple[int, ...]]) -> None:
    schema = SCHEMA.model_copy(update={"columns": tuple(c for c in SCHEMA.columns if c.name not in dropped)})
    assert condition_sets(schema) == sets
    for budget in (EXACT, Budget(precision=2.0)):
        model = estimate(schema, Sums([rows_of(20_000)], schema), budget)
        model.check(schema)
        assert model.groups.sum() == pytest.approx(1.0)
        assert edges_of(model) == ([] if "first" in dropped else [{"first", "second"}])


def test_a_model_that_is_none_of_the_schema_is_refused() -> None:
    model = estimate(SCHEMA, Sums([rows_of(20_000)], SCHEMA), EXACT)
    first, *others = model.columns
    wrong = {
        "shape": MarginalModel(model.marginals, model.groups[0], model.columns),
        "at least 0": MarginalModel(model.marginals, -model.groups, model.columns),
        "columns of the schema": MarginalModel(model.marginals, model.groups, tuple(others)),
        "parent has to come before": MarginalModel(
            model.marginals, model.groups, (ColumnModel(first.grid, 1, first.shares), *others)
        ),
        f"'{first.grid.column.name}': expected": MarginalModel(
            model.marginals, model.groups, (ColumnModel(first.grid, -1, first.shares[..., 0]), *others)
        ),
    }
    for message, each in wrong.items():
        with pytest.raises(MessageError, match=message):
            each.check(SCHEMA)

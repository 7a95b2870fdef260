"""Fidelity within groups: real rows reach their ceiling, rows of a shuffled group do not, small groups say why not."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from mcrage.data.groups import Group
from mcrage.data.schema import TableSchema
from mcrage.evaluation.fidelity import one_way
from mcrage.evaluation.subgroups import FEWEST_OF_A_LABEL, FEWEST_ROWS, MEASURES, GroupFidelity, fidelity_by_group

Rows = Callable[..., pd.DataFrame]
WOMEN, MEN = Group.of(sex="F"), Group.of(sex="M")


def measured(
    synthetic: pd.DataFrame, train: pd.DataFrame, held_out: pd.DataFrame, schema: TableSchema, *by: str
) -> dict[Group, GroupFidelity]:
    draw = np.random.default_rng(0)
    results = fidelity_by_group(synthetic, train, held_out, schema, by=by or ("sex",), generator=draw, most_rows=800)
    return {result.group: result for result in results}


def with_shuffled(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """The same table with one column dealt anew."""
    return table.assign(**{name: table[name].iloc[np.random.default_rng(3).permutation(len(table))].array})


def with_higher_lactate_in_women(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(lactate=table["lactate"].where(table["sex"] == "M", table["lactate"] + 1.5).clip(0, 20))


def test_rows_of_the_same_truth_reach_the_ceiling_of_every_group(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    results = measured(*(clinic_rows(2000, seed, women=0.4) for seed in range(3)), clinic_schema)
    assert list(results) == [WOMEN, MEN]
    for result in results.values():
        assert set(result.synthetic) == set(result.real) == set(MEASURES)
        assert not result.absent
        for measure in ("one_way", "all_pairs"):
            assert result.synthetic[measure] == pytest.approx(result.real[measure], abs=0.02)
        assert result.synthetic["detection"] == pytest.approx(0.5, abs=0.08)
        assert result.synthetic["tstr"] == pytest.approx(result.real["tstr"], abs=0.05)


def test_rows_whose_group_was_shuffled_score_clearly_worse(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    synthetic, train, held_out = (with_higher_lactate_in_women(clinic_rows(2500, seed, women=0.3)) for seed in range(3))
    women = measured(with_shuffled(synthetic, "sex"), train, held_out, clinic_schema)[WOMEN]
    # most of the rows are now of men, whose risk depends on lactate the other way round
    assert women.synthetic["one_way"] < women.real["one_way"] - 0.02
    assert women.synthetic["all_pairs"] < women.real["all_pairs"] - 0.02
    assert women.synthetic["detection"] > women.real["detection"] + 0.1
    assert women.synthetic["tstr"] < women.real["tstr"] - 0.2


def test_both_sides_have_the_same_rows_and_no_more_than_asked(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    results = measured(clinic_rows(2000, 0), clinic_rows(3000, 1), clinic_rows(1000, 2, women=0.15), clinic_schema)
    assert results[WOMEN].rows == (clinic_rows(1000, 2, women=0.15)["sex"] == "F").sum()
    assert results[MEN].rows == 800


def test_a_small_group_gives_reasons_and_no_number(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    train, held_out = clinic_rows(4000, 1), clinic_rows(4000, 2)
    few = clinic_rows(4000, 0)
    few = few[(few["sex"] == "F") & (np.cumsum(few["sex"] == "F") <= FEWEST_ROWS - 1)]
    women = measured(few, train, held_out, clinic_schema)[WOMEN]
    assert not women.synthetic
    assert not women.real
    assert set(women.absent) == set(MEASURES)
    assert women.absent["all_pairs"] == f"fewer than {FEWEST_ROWS} synthetic rows"


def test_a_generator_that_gives_a_group_one_label_has_no_tstr_there(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    synthetic, train, held_out = (clinic_rows(3000, seed) for seed in range(3))
    only = pd.Categorical(["no"] * len(synthetic), categories=["no", "yes"])
    women = measured(synthetic.assign(died=only), train, held_out, clinic_schema)[WOMEN]
    reason = f"fewer than {FEWEST_OF_A_LABEL} synthetic rows of the rarer label"
    assert women.absent == {"tstr": reason}
    assert set(women.synthetic) == set(MEASURES) - {"tstr"}


def test_groups_may_be_of_several_attributes_with_the_label(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    results = measured(*(clinic_rows(1500, seed) for seed in range(3)), clinic_schema, "sex", "died")
    assert set(results) == {Group.of(sex=sex, died=died) for sex in "FM" for died in ("no", "yes")}
    for result in results.values():
        assert "label" in result.absent["tstr"]
        assert set(result.synthetic) == {"one_way", "all_pairs", "detection"}


def test_what_defines_a_group_does_not_raise_its_measures(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    synthetic, train, held_out = (clinic_rows(150, seed, women=0) for seed in range(3))
    without = clinic_schema.model_copy(update={"columns": tuple(c for c in clinic_schema.columns if c.name != "sex")})
    men = measured(synthetic, train, held_out, clinic_schema)[MEN]
    assert men.synthetic["one_way"] == one_way(held_out, synthetic, without)
    assert men.synthetic["one_way"] < one_way(held_out, synthetic, clinic_schema)


def test_a_group_without_generated_rows_is_listed(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    synthetic, train, held_out = (clinic_rows(2000, seed) for seed in range(3))
    women = measured(synthetic[synthetic["sex"] == "M"], train, held_out, clinic_schema)[WOMEN]
    assert women.rows == 0
    assert set(women.absent) == set(MEASURES)
    assert women.absent["detection"] == "fewer than 200 synthetic rows"

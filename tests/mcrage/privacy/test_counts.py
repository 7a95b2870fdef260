"""What a site releases of its counts: one cell per patient, noise on every cell of the schema, thresholds after it."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from mcrage.data.groups import MINIMUM_CELL, Group, GroupCounts
from mcrage.data.marginals import Marginals, merge_small_cells, num_cells, without_negatives
from mcrage.data.schema import Column, TableSchema
from mcrage.errors import PrivacyError, SchemaError
from mcrage.privacy import counts
from mcrage.privacy.counts import (
    MOST_CELLS,
    SCORE_EDGES,
    NoisyCounts,
    NoisyScores,
    group_counts_event,
    marginals_event,
    noisy_group_counts,
    noisy_marginals,
    noisy_scores,
    patient_rows,
    scores_event,
)
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import derive

KEY = bytes(range(32))
FALSE_ALARMS = 1e-6
Rows = Callable[..., pd.DataFrame]
Release = Callable[[pd.DataFrame, TableSchema], NDArray[np.int64]]


def many_groups(num_groups: int) -> TableSchema:
    levels = tuple(f"g{number}" for number in range(num_groups))
    return TableSchema(
        columns=(
            Column(name="patient", kind="text", role="patient_id"),
            Column(name="group", kind="categorical", role="sensitive", categories=levels, nullable=False),
        )
    )


def groups_of(schema: TableSchema, num_patients: int) -> pd.DataFrame:
    """A table with as many patients in every group."""
    groups = [level for level in schema.column("group").levels for _ in range(num_patients)]
    return pd.DataFrame({"patient": [f"p{row}" for row in range(len(groups))], "group": groups})


def scores_of(table: pd.DataFrame) -> NDArray[np.float64]:
    """A score of each row that depends on that row alone."""
    return table["lactate"].fillna(3.0).to_numpy() / 20


def raw_groups(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
    return counts._noisy_groups(table, schema, epsilon=0.5, key=KEY).values


def raw_columns(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
    return counts._noisy_columns(table, schema, noise=4.0, key=KEY).values


def raw_scores(table: pd.DataFrame, schema: TableSchema) -> NDArray[np.int64]:
    return noisy_scores(table, schema, scores_of(table), epsilon=0.5, key=KEY).counts.values


RELEASES = [(raw_groups, 1), (raw_columns, 8), (raw_scores, 1)]
"""Each release before anything is done to its counts, and the number of cells that a patient is in."""


@pytest.mark.parametrize(("release", "cells"), RELEASES)
def test_a_new_patient_changes_that_patients_cells_by_one_and_nothing_else(
    release: Release, cells: int, clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    table = pd.concat([clinic_rows(150, 1), clinic_rows(150, 1).sample(100, random_state=0)])  # some with two rows
    for place, newcomer in enumerate(clinic_rows(20, 2).iloc[[row]] for row in range(20)):
        at = place * 12
        joined = pd.concat([table.iloc[:at], newcomer, table.iloc[at:]])
        change = release(joined, clinic_schema) - release(table, clinic_schema)
        assert np.array_equal(np.sort(change[change != 0]), np.ones(cells))


@pytest.mark.parametrize(("release", "cells"), RELEASES)
def test_a_patient_with_fifty_rows_counts_once(
    release: Release, cells: int, clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    table = clinic_rows(100, 1)
    stay = clinic_rows(50, 2).assign(patient="many stays")
    change = release(pd.concat([table, stay]), clinic_schema) - release(table, clinic_schema)
    assert np.array_equal(np.sort(change[change != 0]), np.ones(cells))


def test_the_same_test_fails_if_rows_are_counted(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    no_ids = clinic_schema.model_copy(update={"columns": clinic_schema.columns[1:]})
    stay = clinic_rows(50, 2).assign(patient="many stays")
    with pytest.raises(AssertionError):
        test_a_patient_with_fifty_rows_counts_once(lambda table, _: raw_groups(table, no_ids), 1, no_ids, clinic_rows)
    assert len(patient_rows(stay, no_ids, key=KEY)) == 50


def test_each_patient_has_one_row_whatever_is_in_it(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = pd.concat([clinic_rows(40, 1)] * 5)
    rows = patient_rows(table, clinic_schema, key=KEY)
    assert sorted(table["patient"].iloc[rows]) == sorted(set(table["patient"]))
    other_values = table.assign(lactate=0.0, sex="M", died="no")
    np.testing.assert_array_equal(rows, patient_rows(other_values, clinic_schema, key=KEY))


def test_another_patient_or_another_order_of_patients_changes_nobodys_row(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    patients = [clinic_rows(4, seed).assign(patient=f"p{seed}", stay=range(4)) for seed in range(60)]

    def chosen(parts: list[pd.DataFrame]) -> dict[str, int]:
        table = pd.concat(parts)
        rows = table.iloc[patient_rows(table, clinic_schema, key=KEY)]
        return dict(zip(rows["patient"], rows["stay"], strict=True))

    everybody = chosen(patients)
    assert chosen(patients[::-1]) == everybody
    assert chosen(patients[1:]) == {patient: stay for patient, stay in everybody.items() if patient != "p0"}


def test_every_row_of_a_patient_is_as_likely_and_another_key_chooses_anew(clinic_schema: TableSchema) -> None:
    """2,000 patients with 4 rows: each place is chosen by a quarter, a false alarm in 10⁶."""
    table = pd.DataFrame({"patient": np.repeat([f"p{n}" for n in range(2000)], 4)})
    places = [patient_rows(table, clinic_schema, key=derive(KEY, n)) % 4 for n in range(2)]
    for count in np.bincount(places[0]):
        assert binomtest(int(count), 2000, 1 / 4).pvalue > FALSE_ALARMS
    assert 0.2 < (places[0] == places[1]).mean() < 0.3


def test_a_row_without_an_id_is_a_patient_of_its_own(clinic_schema: TableSchema) -> None:
    table = pd.DataFrame({"patient": pd.Series([None, "7", None, "7", "row 0"], dtype="str")})
    rows = patient_rows(table, clinic_schema, key=KEY)
    assert set(rows) - {1, 3} == {0, 2, 4}
    assert len(rows) == 4
    assert len(patient_rows(table.iloc[:0], clinic_schema, key=KEY)) == 0


@pytest.mark.parametrize(("epsilon", "share"), [(0.05, 0.2957), (0.1, 0.1747), (0.2, 0.0609), (0.5, 0.0025)])
def test_a_group_of_nobody_is_shown_as_often_as_in_theory(epsilon: float, share: float) -> None:
    """20,000 groups of nobody; a false alarm in 10⁶."""
    schema = many_groups(MOST_CELLS)
    shown = noisy_group_counts(groups_of(schema, 0), schema, epsilon=epsilon, key=KEY)
    assert binomtest(len(shown), MOST_CELLS, share).pvalue > FALSE_ALARMS
    assert binomtest(len(shown), MOST_CELLS, 1.2 * share).pvalue < (1e-3 if epsilon < 0.5 else 1)


def shows_small_groups_as_often_as_in_theory(release: Callable[[pd.DataFrame, TableSchema], GroupCounts]) -> None:
    """Of groups of 5 patients P(z ≥ 6) = .0310 are shown, of 15 patients P(z ≥ −4) = .9489, at ε = .5."""
    schema = many_groups(2000)
    for patients, share in ((5, 0.0310), (15, 0.9489)):
        shown = release(groups_of(schema, patients), schema)
        assert binomtest(len(shown), 2000, share).pvalue > FALSE_ALARMS
        assert min(shown.values()) >= MINIMUM_CELL


def test_noise_comes_first_and_the_threshold_after() -> None:
    shows_small_groups_as_often_as_in_theory(lambda t, schema: noisy_group_counts(t, schema, epsilon=0.5, key=KEY))


def test_the_same_test_fails_if_the_threshold_sees_the_true_count() -> None:
    def broken(table: pd.DataFrame, schema: TableSchema) -> GroupCounts:
        exact = GroupCounts.of(table, schema.attributes).suppress()
        noisy = dict(zip(counts._groups(schema.attributes), raw_groups(table, schema), strict=True))
        return GroupCounts({group: max(int(noisy[group]), MINIMUM_CELL) for group in exact})

    with pytest.raises(AssertionError):
        shows_small_groups_as_often_as_in_theory(broken)


def test_noisy_counts_of_1_to_10_are_suppressed_and_others_below_are_not_listed() -> None:
    schema = many_groups(500)
    table = groups_of(schema, 4)
    shown = noisy_group_counts(table, schema, epsilon=0.2, key=KEY)
    noisy = counts._noisy_groups(table, schema, epsilon=0.2, key=KEY).values
    by_group = dict(zip(counts._groups(schema.attributes), noisy.tolist(), strict=True))
    assert dict(shown) == {group: count for group, count in by_group.items() if count >= 11}
    assert shown.suppressed == {group for group, count in by_group.items() if 1 <= count <= 10}
    assert min(by_group.values()) < 0


def test_the_groups_are_those_of_the_schema_and_not_of_the_table(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    men = clinic_rows(200, 1, women=0.0)
    noisy = raw_groups(men, clinic_schema)
    groups = counts._groups(clinic_schema.attributes)
    assert len(noisy) == len(groups) == 3 * 2 * 2
    of_women = [count for group, count in zip(groups, noisy, strict=True) if group.as_dict()["sex"] == "F"]
    assert np.count_nonzero(of_women) >= 4  # each is 0 with a probability of .24
    assert not any(group.as_dict()["sex"] == "F" for group in GroupCounts.of(men, clinic_schema.attributes))


def test_noise_is_around_the_exact_counts(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = clinic_rows(5000, 1)
    exact = GroupCounts.of(table, clinic_schema.attributes)
    noisy = noisy_group_counts(table, clinic_schema, epsilon=1.0, key=KEY)
    assert set(noisy) == set(exact)
    assert all(abs(noisy[group] - exact[group]) < 20 for group in exact)


def test_a_row_with_a_level_that_the_schema_lacks_is_in_no_group(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = clinic_rows(50, 1)
    odd = clinic_rows(3, 2).assign(sex=["X", None, "M"])
    change = raw_groups(pd.concat([table, odd]), clinic_schema) - raw_groups(table, clinic_schema)
    assert change.sum() == 1


def test_a_table_without_attributes_has_its_total_noised() -> None:
    schema = TableSchema(columns=(Column(name="age", kind="integer", minimum=0, maximum=9),))
    shown = noisy_group_counts(pd.DataFrame({"age": [1] * 1000}), schema, epsilon=1.0, key=KEY)
    assert list(shown) == [Group(())]
    assert abs(shown[Group(())] - 1000) < 20


def test_too_many_groups_are_refused_before_anything_is_charged_or_read() -> None:
    schema = many_groups(MOST_CELLS + 1)
    with pytest.raises(PrivacyError, match="20,001 cells of group"):
        group_counts_event(schema, epsilon=1.0)
    with pytest.raises(PrivacyError, match="merge levels"):
        noisy_group_counts(pd.DataFrame(), schema, epsilon=1.0, key=KEY)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), 1e-9, 4.0])
def test_an_epsilon_out_of_range_is_refused(epsilon: float, clinic_schema: TableSchema) -> None:
    for event in (group_counts_event, scores_event):
        with pytest.raises(PrivacyError):
            event(clinic_schema, epsilon=epsilon)


def test_each_release_has_its_event_before_it_is_made(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    table = clinic_rows(50, 1)
    laplace = PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=2.0, steps=1)
    gaussian = PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=4.0, steps=8)
    assert group_counts_event(clinic_schema, epsilon=0.5) == laplace
    assert scores_event(clinic_schema, epsilon=0.5) == laplace
    assert marginals_event(clinic_schema, noise=4.0) == gaussian
    assert noisy_scores(table, clinic_schema, scores_of(table), epsilon=0.5, key=KEY).counts.event == laplace
    columns = counts._noisy_columns(table, clinic_schema, noise=4.0, key=KEY)
    assert (columns.event, columns.scale, columns.mechanism) == (gaussian, 4.0, "discrete-gaussian")


def test_releases_of_one_key_do_not_share_their_noise(clinic_schema: TableSchema) -> None:
    """Else the difference of a release at two scales, or of two releases, would give the counts away."""
    schema = many_groups(1000)
    nobody = groups_of(schema, 0)
    drawn = [counts._noisy_groups(nobody, schema, epsilon=e, key=KEY).values for e in (0.5, 0.25)]
    drawn.append(counts._noisy_columns(nobody, schema, noise=2.0, key=KEY).values[:1000])
    drawn.append(counts._noisy_groups(nobody, schema, epsilon=0.5, key=derive(KEY, 1)).values)
    correlations = np.corrcoef(drawn)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(1000)


def test_columns_have_noise_on_every_cell_and_small_cells_merged_after_it(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    table = clinic_rows(400, 1)
    noisy = raw_columns(table, clinic_schema)
    exact = Marginals.of(table, clinic_schema, minimum=0)
    noise = noisy - np.concatenate(list(exact.values()))
    assert noise.std() == pytest.approx(4.0, rel=0.2)
    released = noisy_marginals(table, clinic_schema, noise=4.0, key=KEY)
    start = 0
    for column in clinic_schema.modelled:
        cells = without_negatives(noisy[start : start + num_cells(column) + 1])
        minimum = 12 if column.is_numeric else MINIMUM_CELL
        np.testing.assert_array_equal(released[column.name], merge_small_cells(cells, column, minimum))
        start += len(cells)
    assert start == len(noisy)
    assert Marginals.from_wire(released.to_wire(), clinic_schema).to_wire() == released.to_wire()


@pytest.mark.parametrize("noisy", [[5, -3, 40, 0, -1], [1], [0, 0], [-4, -9], [-4, 3, 1]])
def test_cells_without_negatives_keep_their_total_and_their_order(noisy: list[int]) -> None:
    cells = without_negatives(np.array(noisy))
    assert cells.min() >= 0
    assert cells.sum() == pytest.approx(max(sum(noisy), 0))
    assert (np.diff(cells[np.argsort(noisy, kind="stable")]) >= 0).all()


def test_a_noisy_histogram_of_many_cells_is_nearer_to_the_truth_than_one_cut_at_nothing(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    table = clinic_rows(2000, 1)
    exact, noisy = Marginals.of(table, clinic_schema, minimum=0), raw_columns(table, clinic_schema)
    released = noisy_marginals(table, clinic_schema, noise=4.0, key=KEY)
    start, distances = 0, []
    for column in clinic_schema.modelled:
        cut = np.maximum(noisy[start : start + num_cells(column) + 1], 0).astype(float)
        start += len(cut)
        truth = exact[column.name] / exact[column.name].sum()
        both = (released[column.name], merge_small_cells(cut, column, MINIMUM_CELL))
        distances.append([0.5 * np.abs(cells / cells.sum() - truth).sum() for cells in both])
    ours, cut_ones = np.mean(distances, axis=0)
    assert ours < 0.95 * cut_ones


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("deviation", [1.0, 4.0, 30.0])
def test_any_noisy_cells_can_be_merged(seed: int, deviation: float, clinic_schema: TableSchema) -> None:
    draw = np.random.default_rng([seed, int(deviation)])
    for column in clinic_schema.modelled:
        shape = num_cells(column) + 1
        occupied = draw.poisson(40, shape) * (draw.random(shape) < draw.random())
        cells = np.maximum(occupied + np.round(draw.normal(0, deviation, shape)), 0)
        merged = merge_small_cells(cells, column, MINIMUM_CELL)
        assert np.isfinite(merged).all()
        assert (merged >= 0).all()
        assert -1e-6 < cells.sum() - merged.sum() < MINIMUM_CELL  # what is left out is too small to be told


def test_an_empty_table_gives_noise_alone(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    nobody = clinic_rows(3, 1).iloc[:0]
    for release, _ in RELEASES:
        assert np.count_nonzero(release(nobody, clinic_schema)) > 0
    assert set(noisy_marginals(nobody, clinic_schema, noise=4.0, key=KEY)) == {c.name for c in clinic_schema.modelled}


@pytest.mark.parametrize("noise", [0.0, -1.0, 0.2, float("nan"), float("inf")])
def test_columns_without_enough_noise_are_refused(noise: float, clinic_schema: TableSchema) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        marginals_event(clinic_schema, noise=noise)


def test_scores_are_counted_by_group_label_and_bin(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    """The noise of the same key on an empty table taken away, the histogram is that of a loop over the rows."""
    table = clinic_rows(300, 1)
    scores = np.random.default_rng(0).choice([0.0, 0.005, 0.1, 0.0999, 0.5, 0.69, 0.7, 1.0, np.nan, 1.5, -1], 300)
    noisy = noisy_scores(table, clinic_schema, scores, epsilon=0.5, key=KEY)
    noise = noisy_scores(table.iloc[:0], clinic_schema, scores[:0], epsilon=0.5, key=KEY)
    expected = np.zeros((6, 2, 10), dtype=int)
    for (_, row), score in zip(table.iterrows(), scores, strict=True):
        age = "missing" if pd.isna(row["age"]) else "under 65" if row["age"] < 65 else "65 and over"
        if not np.isnan(score):
            group = noisy.groups.index(Group.of(age=age, sex=row["sex"]))
            place = sum(score >= edge for edge in SCORE_EDGES[1:-1])
            expected[group, int(row["died"] == "yes"), place] += 1
    np.testing.assert_array_equal(noisy.histogram - noise.histogram, expected)
    assert noisy.edges == SCORE_EDGES


def test_which_level_is_the_event_is_the_schemas(clinic_schema: TableSchema, clinic_rows: Rows) -> None:
    columns = [c.model_copy(update={"positive": "no"}) if c.role == "target" else c for c in clinic_schema.columns]
    turned = clinic_schema.model_copy(update={"columns": tuple(columns)})
    table = clinic_rows(4000, 1)
    both = [noisy_scores(table, s, scores_of(table), epsilon=3.0, key=KEY).histogram for s in (clinic_schema, turned)]
    np.testing.assert_allclose(both[0], both[1][:, ::-1], atol=15)


def test_scores_of_another_length_or_a_schema_without_target_are_refused(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    with pytest.raises(PrivacyError, match="5 rows, scores of shape"):
        noisy_scores(clinic_rows(5, 1), clinic_schema, np.zeros(4), epsilon=0.5, key=KEY)
    with pytest.raises(SchemaError, match="role 'target'"):
        scores_event(many_groups(3), epsilon=0.5)


@pytest.mark.parametrize("edges", [(), (0.0,), (0.1, 1.0), (0.0, 0.9), (0.0, 0.5, 0.5, 1.0), (0.0, 0.6, 0.4, 1.0)])
def test_edges_that_do_not_rise_from_0_to_1_are_refused(edges: tuple[float, ...], clinic_schema: TableSchema) -> None:
    with pytest.raises(PrivacyError, match="must rise from 0 to 1"):
        scores_event(clinic_schema, epsilon=0.5, edges=edges)


def test_too_many_score_bins_are_refused(clinic_schema: TableSchema) -> None:
    edges = tuple(np.linspace(0, 1, 2000).tolist())
    with pytest.raises(PrivacyError, match="23,988 cells"):
        scores_event(clinic_schema, epsilon=0.5, edges=edges)


def test_nobody_else_makes_noisy_counts_or_changes_them() -> None:
    event = group_counts_event(many_groups(3), epsilon=1.0)
    made = counts._noisy_groups(groups_of(many_groups(3), 20), many_groups(3), epsilon=1.0, key=KEY)
    with pytest.raises(PrivacyError, match="made by the functions of"):
        NoisyCounts(np.array([1, 2, 3]), event, None)
    with pytest.raises(TypeError):
        NoisyCounts(np.array([1, 2, 3]), event)  # type: ignore[call-arg]
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(made, values=np.array([1, 2, 3]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.values = np.array([1, 2, 3])  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        made.values[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        NoisyScores(counts=made, groups=(Group(()),), edges=(0.0, 0.5, 1.0)).counts.values[0] = 1

"""Attacks find what is there to be found, and nothing where there is nothing."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.evaluation import disclosure
from mcrage.evaluation.disclosure import Measured, auc, closest_records, exact_copies, membership_attacks

Rows = Callable[..., pd.DataFrame]
TABLE = TableSchema.parse(
    {
        "columns": [
            {"name": "x", "kind": "continuous", "minimum": 0, "maximum": 100},
            {"name": "c", "kind": "categorical", "categories": ["a", "b"]},
        ]
    }
)


def table(x: list[float], c: str) -> pd.DataFrame:
    levels = [None if level == "-" else level for level in c]
    return pd.DataFrame({"x": x, "c": pd.Categorical(levels, categories=["a", "b"])})


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def memoriser(clinic_rows: Rows, clinic_schema: TableSchema) -> CDDPM:
    """A model that passed 500 times over 40 rows."""
    return CDDPM(width=64, depth=2, steps=500, batch_size=40, learning_rate=5e-3).fit(clinic_rows(40, 0), clinic_schema)


def test_the_auc_is_that_of_scikit_learn_and_its_error_that_of_repeated_draws() -> None:
    draw = generator()
    members, others = draw.integers(2, 9, 60).astype(float), draw.integers(0, 7, 80).astype(float)
    expected = roc_auc_score(np.repeat([1, 0], [60, 80]), np.concatenate([members, others]))
    assert auc(members, others).value == pytest.approx(expected)
    found = [auc(draw.normal(0.5, 1, 100), draw.normal(0, 1.5, 50)) for _ in range(1000)]
    assert np.std([each.value for each in found]) == pytest.approx(np.mean([each.error for each in found]), rel=0.1)


def test_a_model_trained_far_too_long_is_found_out(memoriser: CDDPM, clinic_rows: Rows) -> None:
    attack = membership_attacks(memoriser, clinic_rows(40, 0), clinic_rows(400, 1))[0]
    assert attack.auc.value is not None
    assert attack.auc.value - 4 * attack.auc.error > 0.7
    assert attack.tpr.value is not None
    assert attack.tpr.value > 0.1


def test_rows_that_no_model_has_seen_are_told_apart_no_better_than_by_a_guess(
    memoriser: CDDPM, clinic_rows: Rows
) -> None:
    for attack in membership_attacks(memoriser, clinic_rows(400, 2), clinic_rows(400, 1)):
        assert attack.auc.value == pytest.approx(0.5, abs=4 * attack.auc.error)  # false alarms: 1 in 5,000


def test_a_mild_overfit_shows_best_when_the_loss_is_calibrated(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    members, others = clinic_rows(200, 0), clinic_rows(200, 1)
    model = CDDPM(width=48, depth=2, steps=400, batch_size=128, learning_rate=5e-3).fit(members, clinic_schema)
    strongest, *weaker = membership_attacks(model, members, others)
    assert strongest.name == "calibrated loss"
    assert strongest.auc.interval is not None
    assert strongest.auc.interval[0] > 0.55
    assert (strongest.auc.value or 0) > max(attack.auc.value or 0 for attack in weaker) + 0.02


def test_every_row_meets_the_same_noise(memoriser: CDDPM, clinic_rows: Rows) -> None:
    columns = [column.name for column in memoriser.schema_.modelled]
    row = clinic_rows(1, 5).assign(age=pd.array([None], dtype="Int64"), lactate=np.nan, admitted=pd.NaT)[columns]
    row["admitted"] = pd.Timestamp("2021-01-01")
    losses = memoriser.row_losses(pd.concat([row] * 3), times=(0.1, 0.5), draws=2, random_state=0)
    assert losses.shape == (3, 2, 2)
    assert np.ptp(losses, axis=0).max() < 0.01, "but for the jitter of the date, equal rows have equal losses"
    assert len(np.unique(losses[0])) == 4


def test_a_reference_model_takes_the_place_of_the_untrained_one(memoriser: CDDPM, clinic_rows: Rows) -> None:
    members, others = clinic_rows(40, 0), clinic_rows(400, 1)
    itself = {a.name: a.auc.value for a in membership_attacks(memoriser, members, others, reference=memoriser)}
    usual = {a.name: a.auc.value for a in membership_attacks(memoriser, members, others)}
    assert itself["loss"] == usual["loss"]
    assert (itself["calibrated loss"] or 0) < (usual["calibrated loss"] or 0)


def test_a_table_without_a_label_has_no_label_attack(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    columns = tuple(column for column in clinic_schema.columns if column.role != "target")
    schema = clinic_schema.model_copy(update={"columns": columns})
    model = CDDPM(width=8, depth=1, steps=2).fit(clinic_rows(30, 0), schema)
    names = [attack.name for attack in membership_attacks(model, clinic_rows(30, 0), clinic_rows(30, 1))]
    assert sorted(names) == ["calibrated loss", "loss"]


def test_copied_rows_are_counted_beside_those_of_a_holdout(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    training, holdout, fresh = (clinic_rows(200, seed) for seed in range(3))
    synthetic = pd.concat([fresh.iloc[:150], training.iloc[:50]])
    copies = exact_copies(synthetic, training, holdout, clinic_schema, generator=generator())
    assert (copies.of_training, copies.of_holdout) == (0.25, 0.0)
    assert copies.excess.value == 0.25
    assert copies.excess.value > 2 * copies.excess.error > 0
    none = exact_copies(fresh, training, holdout, clinic_schema, generator=generator())
    assert (none.of_training, none.excess) == (0.0, Measured(0.0, 0.0))


def test_copies_are_compared_in_every_column_and_missing_equals_missing() -> None:
    training, holdout = table([1, 1, 2, np.nan] * 10, "abab" * 10), table([3, 3, 2, 3] * 10, "abab" * 10)
    synthetic = table([1, 1, np.nan, np.nan, 2] * 10, "aabaa" * 10)
    copies = exact_copies(synthetic, training, holdout, TABLE, generator=generator())
    assert (copies.of_training, copies.of_holdout) == (0.8, 0.2)


def test_the_error_of_the_excess_is_that_of_exchanging_the_two_tables() -> None:
    draw = generator()
    synthetic, real = (table(draw.poisson(3, n).astype(float).tolist(), "a" * n) for n in (60, 40))
    real["x"] += draw.integers(0, 2, 40) * 6
    found = []
    for _ in range(1000):
        side = draw.random(40) < 0.5
        seen, unseen = (set(real.loc[part, "x"]) for part in (side, ~side))
        found.append(synthetic["x"].isin(seen).mean() - synthetic["x"].isin(unseen).mean())
    error = exact_copies(synthetic, real.iloc[:20], real.iloc[20:], TABLE, generator=generator()).excess.error
    assert error == pytest.approx(np.std(found), rel=0.1)


def test_noisy_copies_are_nearer_to_the_training_rows_and_fresh_rows_are_not(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    training, holdout, fresh = (clinic_rows(300, seed) for seed in range(3))
    noisy = training.assign(age=training["age"].clip(19, 99) + 1, lactate=training["lactate"] + 0.1)
    near, far = (
        closest_records(rows, training, holdout, clinic_schema, generator=generator()) for rows in (noisy, fresh)
    )
    assert near.interval is not None
    assert near.interval[0] > 0.85
    assert far.value == pytest.approx(0.5, abs=4 * far.error)  # false alarms: 1 in 15,000


def test_the_error_of_the_share_covers_rows_that_share_their_nearest_one(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    """Two tables are exchanged row by row: two standard errors hold about 95 % of the shares, as promised."""
    fresh, real, draw = clinic_rows(500, 0), clinic_rows(60, 1), generator()
    deviations = []
    for _ in range(150):
        order = draw.permutation(60)
        share = closest_records(fresh, real.iloc[order[:30]], real.iloc[order[30:]], clinic_schema, generator=draw)
        assert share.value is not None
        deviations.append((share.value - 0.5) / share.error)
    assert np.std(deviations) == pytest.approx(1.0, abs=0.15)
    binomial = np.array(deviations) * share.error / np.sqrt(0.25 / 500)
    assert np.std(binomial) > 1.5, "generated rows are no independent votes"


def test_distance_mixes_numbers_levels_and_missing_cells() -> None:
    training, holdout = table([0.0, 50.0, 100.0, np.nan] * 10, "abab" * 10), table([20.0] * 40, "b" * 40)
    cases = {
        (10.0, "a"): 1.0,  # a tenth of the range off and the same level
        (19.0, "b"): 0.0,
        (np.nan, "b"): 1.0,  # missing in both: no distance
        (np.nan, "a"): 1.0,  # one column differs, as for (20, b) both do
        (19.9, "-"): 0.0,  # the level is missing in none of the real rows
    }
    for (x, c), expected in cases.items():
        share = closest_records(table([x] * 20, c * 20), training, holdout, TABLE, generator=generator())
        assert share.value == expected, (x, c)


def test_ties_count_half_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, clinic_rows: Rows) -> None:
    same = table([1.0, 2.0] * 20, "ab" * 20)
    assert closest_records(same, same, same, TABLE, generator=generator()).value == 0.5
    tables = [table(generator().normal(50, 9, 40).tolist(), c * 40) for c in "abb"]
    whole = closest_records(tables[0], tables[1], tables[2], TABLE, generator=generator())
    monkeypatch.setattr(disclosure, "_CELLS", 100)
    assert closest_records(tables[0], tables[1], tables[2], TABLE, generator=generator()) == whole


def test_the_larger_real_table_is_thinned_so_that_it_has_no_better_chance(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    fresh, training, holdout = clinic_rows(300, 0), clinic_rows(900, 1), clinic_rows(200, 2)
    share = closest_records(fresh, training, holdout, clinic_schema, generator=generator())
    assert share.value == pytest.approx(0.5, abs=3 * share.error)


def test_too_few_rows_give_a_reason_and_no_number(memoriser: CDDPM, clinic_rows: Rows) -> None:
    few, enough = clinic_rows(19, 0), clinic_rows(40, 1)
    attacks = membership_attacks(memoriser, enough, few)
    share = closest_records(few, enough, enough, memoriser.schema_, generator=generator())
    copies = exact_copies(enough, few, enough, memoriser.schema_, generator=generator())
    for measured in (attacks[0].auc, attacks[0].tpr, share, copies.excess):
        assert (measured.value, measured.interval) == (None, None)
        assert "needs at least 20" in measured.reason
        assert "there are 19" in measured.reason

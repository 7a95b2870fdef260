"""Each attack finds what was put there, nothing where nothing is, and says so for the right patients."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from mcrage.evaluation.disclosure import Attack, Measured, auc, density_ratio, true_positives
from mcrage.evaluation.membership import MembershipReport, consistency, membership_report, subsets

Rows = Callable[..., pd.DataFrame]
GAP = 1.0  # standard deviations
SUBSETS = ["everyone", "minority", "most isolated", "most encounters"]
ATTACKS = ["loss", "calibrated loss", "loss against reference", "label", "label against reference", "density ratio"]


@dataclass(frozen=True)
class Teller:
    """A 'model' whose loss is noise around 5, and lower by half the gap's unit for the patients whom it has seen."""

    seen: frozenset[str] = frozenset()
    has_label: bool = True

    def row_losses(
        self, table: pd.DataFrame, *, times: tuple[float, ...], draws: int, random_state: int
    ) -> NDArray[np.float32]:
        losses = self._losses(table, random_state)
        return np.broadcast_to(losses[:, None, None], (len(table), len(times), draws))

    def label_losses(self, table: pd.DataFrame) -> NDArray[np.float32] | None:
        return self._losses(table, 1) if self.has_label else None

    def untrained(self) -> "Teller":
        return Teller()

    def _losses(self, table: pd.DataFrame, seed: int) -> NDArray[np.float32]:
        noise = np.random.default_rng([len(self.seen), seed]).normal(5, 0.5, len(table))
        return (noise - 0.5 * GAP * table["patient"].isin(self.seen).to_numpy()).astype(np.float32)


def teller(members: pd.DataFrame, **settings: bool) -> Teller:
    return Teller(frozenset(members["patient"]), **settings)


def by_name(report: MembershipReport, subset: str = "everyone") -> dict[str, Attack]:
    return {attack.name: attack for each in report.subsets if each.name == subset for attack in each.attacks}


def is_near(measured: Measured, value: float) -> bool:
    """Whether it is within three standard errors: false alarms 1 in 370."""
    assert measured.value is not None
    return abs(measured.value - value) <= 3 * measured.error


def test_every_attack_on_the_model_finds_the_gap_that_is_there(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    members, others, reference_rows = clinic_rows(400, 0), clinic_rows(1000, 1), clinic_rows(300, 2)
    report = membership_report(
        teller(members),
        clinic_rows(400, 3),
        members=members,
        others=others,
        schema=clinic_schema,
        reference_rows=reference_rows,
        reference=teller(reference_rows),
    )
    found = by_name(report)
    assert [*found] == ATTACKS
    assert [subset.name for subset in report.subsets] == SUBSETS
    for name in ("loss", "label"):
        assert is_near(found[name].auc, norm.cdf(GAP / np.sqrt(2)))
        at_limit = norm.sf(norm.isf(0.01) - GAP)
        low, high = found[name].tpr.interval or (1.0, 0.0)
        assert low < at_limit < high
    for name in ("calibrated loss", "loss against reference", "label against reference"):
        # the yardstick's own noise: the gap is smaller against the noise of two
        assert (found[name].auc.interval or (0,))[0] > 0.6
    assert is_near(found["density ratio"].auc, 0.5)
    assert report.strongest.name in ("loss", "label")


def test_a_model_that_has_seen_nobody_is_a_guess_in_every_subset(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    model = CDDPM.initialised(clinic_schema, None)
    report = membership_report(
        model,
        model.sample(300),
        members=clinic_rows(500, 0),
        others=clinic_rows(500, 1),
        schema=clinic_schema,
        reference_rows=clinic_rows(300, 2),
        reference=CDDPM.initialised(clinic_schema, None, random_state=1),
    )
    figures = [attack.auc for subset in report.subsets for attack in subset.attacks]
    assert len(figures) == 3 * len(ATTACKS)
    assert all(is_near(figure, 0.5) for figure in figures)


def test_copies_of_members_among_the_generated_rows_give_the_members_away(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    members, others, reference_rows = (clinic_rows(300, seed) for seed in range(3))

    def attacked(synthetic: pd.DataFrame) -> Measured:
        scores = [
            density_ratio(rows, synthetic=synthetic, reference_rows=reference_rows, schema=clinic_schema)
            for rows in (members, others)
        ]
        return auc(scores[0], scores[1])

    assert (attacked(members).value or 0) > 0.95
    half = (attacked(pd.concat([clinic_rows(300, 3), members.iloc[:150]])).value or 0) - 0.5
    assert half == pytest.approx(0.25, abs=0.06), "half of the members are copied, so that half are found"
    assert is_near(attacked(clinic_rows(300, 3)), 0.5)


def test_rows_near_the_members_are_enough_for_the_density_ratio(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    members, others, reference_rows = (clinic_rows(300, seed) for seed in range(3))
    near = pd.concat([members.assign(lactate=members["lactate"] + 0.3, admitted=others["admitted"])] * 3)
    report = membership_report(
        teller(members),
        near,
        members=members,
        others=others,
        schema=clinic_schema,
        reference_rows=reference_rows,
    )
    assert (by_name(report)["density ratio"].auc.interval or (0,))[0] > 0.7


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_intervals_cover_the_truth_as_often_as_they_say(shift: float) -> None:
    """Of 600 intervals 95 % cover; one standard error is .9 %. Those of the rate may cover more often."""
    draw = np.random.default_rng(0)
    truths = {auc: norm.cdf(shift / np.sqrt(2)), true_positives: norm.sf(norm.isf(0.01) - shift)}
    covered = dict.fromkeys(truths, 0)
    for _ in range(600):
        members, others = draw.normal(shift, 1, 80), draw.normal(0, 1, 200)
        for measure, truth in truths.items():
            low, high = measure(members, others).interval or (1.0, 0.0)
            covered[measure] += low <= truth <= high
    assert 0.92 < covered[auc] / 600 < 0.975
    assert 0.92 < covered[true_positives] / 600 <= 1


def test_the_true_positive_rate_names_at_most_one_in_a_hundred_others() -> None:
    others = np.arange(1000.0)
    assert true_positives(np.array([988.5, 989.5] * 20), others).value == 0.5
    assert true_positives(np.full(40, 2000.0), others).value == 1.0
    assert true_positives(np.zeros(40), np.zeros(100)).value == 0.0, "ties are not found"
    few = true_positives(np.zeros(40), np.zeros(99))
    assert (few.value, few.interval, few.reason) == (None, None, "needs at least 100 others")


@pytest.mark.parametrize("with_reference", [True, False])
def test_subsets_do_not_depend_on_who_was_trained_on(
    clinic_rows: Rows, clinic_schema: TableSchema, with_reference: bool
) -> None:
    members, others = repeated(clinic_rows(150, 0)), repeated(clinic_rows(250, 1, women=0.2))
    reference_rows = clinic_rows(200, 2) if with_reference else None
    found = subsets(members, others, schema=clinic_schema, reference_rows=reference_rows)
    exchanged = subsets(others, members, schema=clinic_schema, reference_rows=reference_rows)
    for one, other in zip(found, exchanged, strict=True):
        assert (one.name, one.detail, one.reason) == (other.name, other.detail, "")
        assert one.members.tolist() == other.others.tolist()
        assert one.others.tolist() == other.members.tolist()
    assert [int(each.members.sum() + each.others.sum()) for each in found] == [
        400,
        int((np.concatenate([first(members)["sex"], first(others)["sex"]]) == "F").sum()),
        20,
        30,
    ]
    assert found[1].detail == "sex=F"


def repeated(table: pd.DataFrame) -> pd.DataFrame:
    """The same patients with one row more for every tenth, and two more for the first fifteen."""
    return pd.concat([table, table.iloc[::10], table.iloc[:15], table.iloc[:15]], ignore_index=True)


def first(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop_duplicates("patient")


def test_the_patients_with_most_rows_are_those(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    found = subsets(repeated(clinic_rows(150, 0)), repeated(clinic_rows(250, 1)), schema=clinic_schema)[3]
    assert found.members.nonzero()[0].tolist() == list(range(15))
    assert found.others.nonzero()[0].tolist() == list(range(15))
    once = subsets(clinic_rows(50, 0), clinic_rows(50, 1), schema=clinic_schema)[3]
    assert once.reason == "every patient has as many rows"
    nameless = clinic_schema.model_copy(update={"columns": clinic_schema.columns[1:]})
    absent = subsets(clinic_rows(50, 0), clinic_rows(50, 1), schema=nameless)[3]
    assert absent.reason == "the schema names no patient"


def test_the_most_isolated_records_are_those_far_from_everybody_else(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    alike = [
        clinic_rows(200, seed).assign(**dict.fromkeys(clinic_rows(1, 0).columns[1:])).assign(lactate=lactate)
        for seed, lactate in enumerate([np.tile([1.0, 2.0], 100)] * 3)
    ]
    members, others, reference_rows = (each.astype(clinic_rows(1, 0).dtypes) for each in alike)
    members.loc[[7, 90], "lactate"] = [9.0, 17.0]
    others.loc[40, "lactate"] = 12.0
    # three rows of one patient are near each other, and no less isolated for that
    members = pd.concat([members, members.loc[[7, 7]]], ignore_index=True)
    for known in (None, reference_rows):
        found = subsets(members, others, schema=clinic_schema, reference_rows=known)[2]
        assert found.members.nonzero()[0].tolist() == [7, 90]
        assert found.others.nonzero()[0].tolist() == [40]
    same = subsets(reference_rows, reference_rows, schema=clinic_schema)[2]
    assert same.reason == "every record is as far from its nearest one"


def test_rows_of_one_patient_are_one_vote(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    members, others = clinic_rows(200, 0), clinic_rows(300, 1)

    class Constant(Teller):
        def _losses(self, table: pd.DataFrame, seed: int) -> NDArray[np.float32]:
            return table["lactate"].fillna(0).to_numpy(dtype=np.float32)

    once, thrice = (
        membership_report(
            Constant(),
            members,
            members=pd.concat([members] * times, ignore_index=True),
            others=pd.concat([others] * times, ignore_index=True),
            schema=clinic_schema,
        )
        for times in (1, 3)
    )
    assert once.unit == thrice.unit == "patient"
    assert by_name(once)["loss"].auc.value == pytest.approx(by_name(thrice)["loss"].auc.value)
    assert by_name(once)["loss"].auc.error == pytest.approx(by_name(thrice)["loss"].auc.error)


def test_what_cannot_be_computed_is_absent_with_a_reason(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    members, others = clinic_rows(60, 0), clinic_rows(60, 1, women=0.1)
    nameless = clinic_schema.model_copy(update={"columns": clinic_schema.columns[1:]})
    report = membership_report(
        teller(members, has_label=False), members, members=members, others=others, schema=nameless
    )
    found, content = by_name(report), report.as_dict()
    assert report.unit == "row"
    assert {name: attack.auc.reason for name, attack in found.items() if attack.auc.value is None} == {
        "loss against reference": "needs a model trained on reference rows",
        "label": "the model has no label",
        "label against reference": "the model has no label",
        "density ratio": "needs reference rows, which are in neither table",
    }
    assert found["loss"].tpr == Measured(None, reason="needs at least 100 others")
    assert {each.name: each.reason for each in report.subsets} == {
        "everyone": "",
        "minority": "",
        "most isolated": "needs at least 20 members and 20 others",
        "most encounters": "the schema names no patient",
    }
    assert content["subsets"][0]["attacks"]["label"]["auc"] == {"value": None, "reason": "the model has no label"}
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    few = membership_report(
        teller(members), members.iloc[:19], members=members, others=others, schema=nameless, reference_rows=others
    )
    assert by_name(few)["density ratio"].auc.reason == "needs at least 20 generated and 20 reference rows"


def test_the_minority_is_the_smallest_level_that_has_enough_patients(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    tables = [clinic_rows(400, seed, women=0.3) for seed in range(2)]
    assert subsets(tables[0], tables[1], schema=clinic_schema)[1].detail == "sex=F"
    rare = [clinic_rows(100, seed, women=0.1) for seed in range(2)]
    assert subsets(rare[0], rare[1], schema=clinic_schema)[1].detail.startswith("age=")
    ageless = clinic_schema.model_copy(update={"columns": (clinic_schema.columns[0], *clinic_schema.columns[2:])})
    reason = "no level of a sensitive feature has 20 members and 20 others"
    assert subsets(rare[0], rare[1], schema=ageless)[1].reason == reason, "the men are no minority"


def test_a_patient_in_two_tables_is_refused(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    members, others = clinic_rows(50, 0), clinic_rows(50, 1)
    mixed = pd.concat([others, members.iloc[:1]], ignore_index=True)
    with pytest.raises(ConfigError, match="patients of the members are among the others"):
        membership_report(teller(members), members, members=members, others=mixed, schema=clinic_schema)
    with pytest.raises(ConfigError, match="patients of the members are among the reference rows"):
        membership_report(
            teller(members), members, members=members, others=others, schema=clinic_schema, reference_rows=mixed
        )


def test_a_claim_bounds_the_true_positive_rate_or_says_that_it_does_not(
    clinic_rows: Rows, clinic_schema: TableSchema
) -> None:
    members, others = clinic_rows(300, 0), clinic_rows(600, 1)
    report = membership_report(teller(members), members, members=members, others=others, schema=clinic_schema)
    small, one, large = (consistency(report, epsilon=epsilon, delta=1e-5) for epsilon in (0.1, 1.0, 8.0))
    assert one.bound == pytest.approx(0.02719, abs=1e-5)
    assert (small.says_nothing, large.says_nothing, large.bound, large.exceeded) == (False, True, 1.0, ())
    assert ("everyone", "label") in small.exceeded
    assert consistency(report, epsilon=1e9, delta=0).says_nothing
    assert json.loads(json.dumps(small.as_dict()))["says_nothing"] is False
    for epsilon, delta in ((0.0, 0.0), (1.0, 1.0), (1.0, -0.1)):
        with pytest.raises(ConfigError, match="epsilon must be above 0"):
            consistency(report, epsilon=epsilon, delta=delta)


def test_a_model_that_overfits_is_found_out(clinic_rows: Rows, clinic_schema: TableSchema) -> None:
    """The power of the attacks: without it their finding nothing would say nothing."""
    members, others, reference_rows = clinic_rows(300, 0), clinic_rows(1000, 1), clinic_rows(300, 2)
    settings = {"width": 64, "depth": 2, "steps": 600, "batch_size": 128, "learning_rate": 5e-3}
    model = CDDPM(**settings).fit(members, clinic_schema)
    report = membership_report(
        model,
        model.sample(3000),
        members=members,
        others=others,
        schema=clinic_schema,
        reference_rows=reference_rows,
        reference=CDDPM(**settings, random_state=1).fit(reference_rows, clinic_schema),
    )
    found = by_name(report)
    assert (report.strongest.auc.value or 0) >= 0.6
    for name in ("loss", "calibrated loss", "loss against reference", "density ratio"):
        assert (found[name].auc.interval or (0,))[0] > 0.5, name
    assert (report.strongest.tpr.value or 0) > 0.02

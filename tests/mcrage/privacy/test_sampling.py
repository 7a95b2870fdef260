"""Who takes part, and with which numbers; a sampler that knows the size of the table fails the same checks."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from mcrage.data.schema import TableSchema
from mcrage.privacy.keyed import derive
from mcrage.privacy.sampling import KeyedDraws, Patients, normal

KEY = bytes(range(32))
SCHEMA = TableSchema.parse(
    {
        "columns": [
            {"name": "patient", "kind": "text", "role": "patient_id"},
            {"name": "lab", "kind": "continuous", "minimum": 0, "maximum": 1},
        ]
    }
)
Included = NDArray[np.bool_]
Schedule = Callable[[int], NDArray[np.int64]]


def names(number: int) -> tuple[str, ...]:
    return tuple(f"patient {place}" for place in range(number))


def keyed(patients: int, rate: float, *, key: bytes = KEY) -> Schedule:
    draws = KeyedDraws(key, names(patients))
    return lambda step: draws.included(step, sample_rate=rate)


def of_constant_size(patients: int, rate: float) -> Schedule:
    """A batch as a shuffled loader gives it."""
    draw = np.random.default_rng(0)
    return lambda step: draw.permutation(patients)[: int(patients * rate)]


def in_pairs(patients: int, rate: float) -> Schedule:
    """Two neighbours always come together."""
    single = keyed(patients // 2, rate)
    return lambda step: (2 * single(step)[:, None] + np.arange(2)).ravel()


def taken(schedule: Schedule, *, patients: int, steps: int) -> Included:
    """Whether each patient was in each step's batch; shape (steps, patients)."""
    included = np.zeros((steps, patients), dtype=bool)
    for step in range(steps):
        included[step, schedule(step)] = True
    return included


def counts_are_binomial(included: Included, rate: float) -> bool:
    """Chi-squared of how often patients took part, against Bin(steps, rate) in bins of at least 20 patients."""
    steps, patients = included.shape
    edges = np.unique(stats.binom.ppf(np.linspace(0, 1, patients // 25)[1:-1], steps, rate))
    expected = np.diff(stats.binom.cdf(np.array([-1, *edges, steps]), steps, rate)) * patients
    seen = np.histogram(included.sum(0), [-0.5, *(edges + 0.5), steps + 0.5])[0]
    return bool(stats.chisquare(seen, expected).pvalue > 1e-4)


def sizes_are_binomial(included: Included, rate: float) -> bool:
    """Mean and variance of batch sizes within 4 standard errors."""
    steps, patients = included.shape
    sizes, variance = included.sum(1), patients * rate * (1 - rate)
    mean_is_right = abs(sizes.mean() - patients * rate) < 4 * (variance / steps) ** 0.5
    return bool(mean_is_right and abs(sizes.var() / variance - 1) < 4 * (2 / steps) ** 0.5)


def largest_covariance(first: Included, second: Included, rate: float) -> float:
    """Of indicators of columns of one and columns of the other, in standard errors."""
    covariances = (first - rate).T @ (second - rate) / len(first)
    return float(np.abs(covariances).max() / (rate * (1 - rate) / len(first) ** 0.5))


def test_how_often_patients_take_part_is_binomial() -> None:
    for rate in (0.02, 0.25):
        included = taken(keyed(1000, rate), patients=1000, steps=1000)
        assert counts_are_binomial(included, rate)
        assert not counts_are_binomial(included, 1.05 * rate), "a rate that is 5 % off would be seen"


def test_an_epoch_of_shuffled_batches_would_be_seen_in_the_counts() -> None:
    order = np.random.default_rng(0)
    included = np.zeros((1000, 1000), dtype=bool)
    for epoch in range(20):
        for step, batch in enumerate(np.split(order.permutation(1000), 50)):
            included[50 * epoch + step, batch] = True
    assert not counts_are_binomial(included, 0.02)


def test_batch_sizes_vary_as_those_of_poisson_samples() -> None:
    for rate in (0.02, 0.25):
        assert sizes_are_binomial(taken(keyed(500, rate), patients=500, steps=2000), rate)
        constant = taken(of_constant_size(500, rate), patients=500, steps=2000)
        assert not sizes_are_binomial(constant, rate)


def test_no_two_patients_take_part_together_more_or_less_often_than_by_chance() -> None:
    patients, rate, steps = 24, 0.1, 10_000
    apart = np.arange(patients) % 2 == 0
    for schedule, expected in ((keyed(patients, rate), True), (in_pairs(patients, rate), False)):
        included = taken(schedule, patients=patients, steps=steps)
        assert (largest_covariance(included[:, apart], included[:, ~apart], rate) < 4) == expected


def test_taking_part_in_one_step_says_nothing_about_the_next() -> None:
    included = taken(keyed(200, 0.1), patients=200, steps=5000)
    now, then = included[:-1].reshape(-1, 1), included[1:].reshape(-1, 1)
    assert largest_covariance(now, then, 0.1) < 4
    assert largest_covariance(now[200:], now[:-200], 0.1) < 4
    sizes = included.sum(1)
    assert abs(np.corrcoef(sizes[:-1], sizes[1:])[0, 1]) < 4 / 5000**0.5


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5])
def test_the_measured_rate_is_the_asked_one(rate: float) -> None:
    draws = KeyedDraws(KEY, names(50_000))
    number = sum(len(draws.included(step, sample_rate=rate)) for step in range(40))
    assert number / 2_000_000 == pytest.approx(rate, rel=0.01)


def test_a_rate_of_nothing_draws_nobody_and_one_of_1_everybody() -> None:
    draws = KeyedDraws(KEY, names(1000))
    assert not any(len(draws.included(step, sample_rate=1e-9)) for step in range(20))
    assert np.array_equal(draws.included(0, sample_rate=1.0), draws.everyone)


def test_another_key_or_step_gives_an_unrelated_schedule() -> None:
    ours = taken(keyed(100, 0.2), patients=100, steps=1000)
    other = taken(keyed(100, 0.2, key=derive(KEY, "other")), patients=100, steps=1000)
    assert np.array_equal(ours, taken(keyed(100, 0.2), patients=100, steps=1000))
    assert largest_covariance(ours.reshape(-1, 1), other.reshape(-1, 1), 0.2) < 4


def clinic(patients: range, *, order: int | None = None) -> pd.DataFrame:
    """Patient n has n % 4 + 1 rows."""
    table = pd.DataFrame(
        [{"patient": str(patient), "lab": row / 4} for patient in patients for row in range(patient % 4 + 1)]
    )
    return table if order is None else table.sample(frac=1.0, random_state=order).reset_index(drop=True)


class Positional(KeyedDraws):
    """Numbers that go by the place in the table."""

    def __init__(self, key: bytes, names: tuple[str, ...]) -> None:
        super().__init__(key, tuple(map(str, range(len(names)))))


def story(table: pd.DataFrame, kind: type[KeyedDraws] = KeyedDraws) -> dict[tuple[str, int], tuple[float, ...]]:
    """The numbers of every patient and step in which the patient takes part."""
    patients = Patients(table, SCHEMA)
    draws, seen = kind(KEY, patients.names), {}
    for step in range(30):
        drawn = draws.included(step, sample_rate=0.3)
        for patient, numbers in zip(drawn, draws.uniform(drawn, step, size=7), strict=True):
            seen[patients.names[patient], step] = tuple(numbers.tolist())
    return seen


def differences(
    first: dict[tuple[str, int], tuple[float, ...]], second: dict[tuple[str, int], tuple[float, ...]]
) -> int:
    """Among the patients of both."""
    both = {name for name, _ in first} & {name for name, _ in second}
    of_both = [{key: value for key, value in story.items() if key[0] in both} for story in (first, second)]
    return len(of_both[0].items() ^ of_both[1].items())


def test_adding_or_removing_a_patient_or_reordering_rows_changes_nothing_for_anybody_else() -> None:
    alone = story(clinic(range(100, 200)))
    others = [
        clinic(range(100, 201)),
        clinic(range(99, 200)),
        clinic(range(101, 200)),
        clinic(range(100, 150)),
        clinic(range(1000)),
        clinic(range(100, 200), order=1),
        clinic(range(90, 200), order=2),
    ]
    assert len(alone) > 800
    assert [differences(alone, story(table)) for table in others] == [0] * len(others)
    assert differences(story(clinic(range(100, 200)), Positional), story(clinic(range(99, 200)), Positional)) > 0


def test_a_patient_keeps_the_schedule_whatever_the_number_of_rows() -> None:
    once = clinic(range(100, 200)).drop_duplicates("patient")
    assert differences(story(once), story(clinic(range(100, 200)))) == 0


def test_rows_of_a_patient_are_picked_uniformly_and_nobody_elses() -> None:
    table = clinic(range(100), order=0)
    patients = Patients(table, SCHEMA)
    draws = KeyedDraws(KEY, patients.names)
    picked = torch.stack([patients.pick(draws.everyone, draws.uniform(draws.everyone, s, size=4)) for s in range(500)])
    owners = "patient " + table["patient"]
    assert (owners.to_numpy()[picked.numpy()] == np.array(patients.names)[:, None]).all()
    times = np.bincount(picked.flatten().numpy(), minlength=len(table))
    for _, own in pd.Series(times).groupby(owners):
        assert own.sum() == 2000
        assert stats.chisquare(own).pvalue > 1e-4 / 100 if len(own) > 1 else own.item() == 2000


def test_a_uniform_number_next_to_1_picks_the_last_row() -> None:
    patients = Patients(clinic(range(3, 4)), SCHEMA)
    assert patients.pick(np.array([0]), torch.tensor([[1 - 2.0**-24, 2.0**-24]])).tolist() == [[3, 0]]


def test_places_and_owners_of_rows_follow_the_patients() -> None:
    table = clinic(range(40), order=3)
    patients = Patients(table, SCHEMA)
    assert patients.places().tolist() == table.groupby("patient").cumcount().tolist()
    assert [patients.names[number] for number in patients.of_rows()] == ("patient " + table["patient"]).tolist()
    assert len(set(patients.row_names())) == len(table)


def test_a_row_without_a_patient_is_a_patient_of_its_own() -> None:
    table = pd.DataFrame({"patient": ["1", None, "1", None], "lab": 0.0})
    assert Patients(table, SCHEMA).names == ("patient 1", "row 1", "row 3")


def test_the_numbers_of_patients_are_uniform_and_independent() -> None:
    draws = KeyedDraws(KEY, names(5000))
    numbers = draws.uniform(draws.everyone, 3, size=12).numpy().astype(float)
    assert 0 < numbers.min() < numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    next_step = draws.uniform(draws.everyone, 4, size=12).numpy()
    together = np.corrcoef(np.hstack([numbers, next_step]), rowvar=False) - np.eye(24)
    assert np.abs(together).max() < 4.5 / 5000**0.5
    assert not np.isin(numbers, next_step).all(axis=1).any()


def test_whether_a_patient_takes_part_says_nothing_about_the_patients_numbers() -> None:
    draws = KeyedDraws(KEY, names(20_000))
    drawn = draws.included(0, sample_rate=0.1)
    for column in draws.uniform(drawn, 0, size=8).numpy().T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4


def test_asking_for_more_numbers_leaves_the_first_ones_as_they_are() -> None:
    draws = KeyedDraws(KEY, names(10))
    few, many = (draws.uniform(draws.everyone, 0, size=size) for size in (3, 50))
    assert torch.equal(many[:, :3], few)


def test_normal_numbers_come_out_standard_and_independent() -> None:
    draws = KeyedDraws(KEY, names(5000))
    numbers = normal(draws.uniform(draws.everyone, 0, size=20)).numpy().astype(float)
    assert numbers.shape == (5000, 20)
    assert stats.kstest(numbers.ravel(), "norm").pvalue > 1e-4
    assert numbers.std() == pytest.approx(1.0, abs=4 / (2 * numbers.size) ** 0.5)
    for power in (1, 2):
        correlations = np.corrcoef(numbers**power, rowvar=False) - np.eye(20)
        assert np.abs(correlations).max() < 4.5 / 5000**0.5


def test_the_extreme_uniform_numbers_give_finite_normal_ones() -> None:
    extreme = torch.tensor([[2.0**-24, 2.0**-24], [1 - 2.0**-24, 0.5]])
    assert torch.isfinite(normal(extreme)).all()

"""A table of 1,000 rows at default settings: the model does not give away who is in it, and a long training would."""

import numpy as np
import pytest

from mcrage import CDDPM, rng
from mcrage.evaluation.disclosure import closest_records, exact_copies, membership_attacks
from simulations.cohort import Cohort, CohortConfig

SEEDS = range(3)
HIGHEST_AUC = 0.55


def given_away(rows: int, *, seed: int, steps: int | None = None) -> dict[str, float]:
    """AUC of the attack on the loss; copies and closest records in standard errors from what a hold-out has."""
    cohort = Cohort(CohortConfig(seed=seed))
    table = cohort.fresh(2 * rows)
    table = table.iloc[rng.stream(seed, "small table").permutation(len(table))]
    members, others = table.iloc[:rows], table.iloc[rows:]
    model = CDDPM(steps=steps, random_state=seed).fit(members, cohort.schema)
    attacks = {attack.name: attack.auc for attack in membership_attacks(model, members, others)}
    made, draw = model.sample(2000), np.random.default_rng(seed)
    copies = exact_copies(made, members, others, cohort.schema, generator=draw).excess
    closest = closest_records(made, members, others, cohort.schema, generator=draw)
    assert attacks["loss"].value is not None
    assert copies.value is not None
    assert closest.value is not None
    return {
        "loss": attacks["loss"].value,
        "copies": copies.value - 2 * copies.error,
        "closest": (closest.value - 0.5) / closest.error,
    }


def exceeded(found: list[dict[str, float]]) -> set[str]:
    """Which of the three limits a table exceeds on average; the last is two standard errors of one table."""
    mean = {name: float(np.mean([each[name] for each in found])) for name in found[0]}
    limits = {"loss": HIGHEST_AUC, "copies": 0.0, "closest": 2.0}
    return {name for name, limit in limits.items() if mean[name] > limit}


@pytest.mark.slow
def test_at_default_settings_a_thousand_rows_are_not_given_away() -> None:
    assert exceeded([given_away(1000, seed=seed) for seed in SEEDS]) == set()


@pytest.mark.slow
def test_a_training_that_is_twenty_times_too_long_exceeds_the_limits() -> None:
    """The power of the test above."""
    assert exceeded([given_away(200, seed=0, steps=20 * 60)]) >= {"loss", "closest"}

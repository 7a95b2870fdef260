"""All arms of a comparison at one hospital: each trained on rows of its own, all scored on the same test rows.

Hospitals are independent of each other, so that a process pool can map :func:`evaluate_site` over them;
:func:`mcrage.evaluation.summary.summarise` brings their scores together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mcrage.data.groups import group_codes
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError, DataError
from mcrage.evaluation.downstream import EncodedArm, Model, Scored, estimator, events, features, patient_codes
from mcrage.rebalancing.baselines import ArmSpec, baseline_builders
from mcrage.rng import derive

MODELS: Final[Mapping[str, Model]] = {
    "logistic_regression": "logistic_regression",
    "hist_gradient_boosting": "hist_gradient_boosting",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteScores:
    """Scores of every arm on one hospital's test rows.

    Attributes:
        site: Name of the hospital.
        event: Whether each test row has the event; shape (n,).
        patients: A number for the patient of each test row; shape (n,).
        codes: Codes of the sensitive features; shape (n, number of sensitive features).
        arms: Names of the arms.
        models: Names of the downstream models.
        scores: Predicted probabilities, shape (arms, models, n); NaN where there is a reason.
        thresholds: Of the decisions; shape (arms, models).
        reasons: Why an arm could not be trained, by arm and model.
    """

    site: str
    event: NDArray[np.bool_]
    patients: NDArray[np.int64]
    codes: NDArray[np.int64]
    arms: tuple[str, ...]
    models: tuple[str, ...]
    scores: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    reasons: Mapping[tuple[str, str], str]


def evaluate_site(
    site: str,
    train: pd.DataFrame,
    test: pd.DataFrame,
    *,
    schema: TableSchema,
    arms: Mapping[str, pd.DataFrame | ArmSpec],
    models: Mapping[str, Model] = MODELS,
    seed: int,
) -> SiteScores:
    """Trains every arm with every model at one hospital and scores the test rows.

    Args:
        site: Name of the hospital.
        train: Its training rows, from which the baselines of :mod:`mcrage.rebalancing.baselines` are made.
        test: Rows to score: its own held-out ones, or a test set that all hospitals share.
        schema: The data dictionary.
        arms: Further arms by name, such as ``federated_parity`` and ``pooled``: whole training sets, the hospital's own
            rows included. An arm with a baseline's name takes its place.
        models: Downstream models by the name they have in results.
        seed: Seed of the baselines, the models and the folds.

    Returns:
        The scores. An arm that cannot be trained has a reason instead.
    """
    builders: dict[str, Callable[[], ArmSpec]] = dict(baseline_builders(train, schema, seed=derive(seed, site)))
    builders |= {name: _given(arm) for name, arm in arms.items()}
    for model in models.values():
        estimator(schema, model)
    encoded = features(test, schema)
    scores = np.full((len(builders), len(models), len(test)), np.nan)
    thresholds = np.full((len(builders), len(models)), 0.5)
    reasons: dict[tuple[str, str], str] = {}
    for i, (arm, build) in enumerate(builders.items()):
        scored = _score(build, encoded, schema, models=models, random_state=derive(seed, site, "model") % 2**32)
        for j, (model_name, outcome) in enumerate(scored.items()):
            if isinstance(outcome, str):
                reasons[arm, model_name] = outcome
            else:
                scores[i, j], thresholds[i, j] = outcome.scores, outcome.threshold
    return SiteScores(
        site=site,
        event=events(test, schema),
        patients=patient_codes(test, schema),
        codes=group_codes(test, schema.sensitive),
        arms=tuple(builders),
        models=tuple(models),
        scores=scores,
        thresholds=thresholds,
        reasons=reasons,
    )


def _score(
    build: Callable[[], ArmSpec],
    test: pd.DataFrame,
    schema: TableSchema,
    *,
    models: Mapping[str, Model],
    random_state: int,
) -> dict[str, Scored | str]:
    """The scores of every model on one arm, or why there are none."""
    try:
        rows = EncodedArm(build(), schema)
    except ConfigError as error:
        return dict.fromkeys(models, str(error))
    outcomes: dict[str, Scored | str] = {}
    for name, model in models.items():
        try:
            outcomes[name] = rows.fit_and_score(test, model=model, random_state=random_state)
        except (ConfigError, DataError) as error:
            outcomes[name] = str(error)
    return outcomes


def _given(arm: pd.DataFrame | ArmSpec) -> Callable[[], ArmSpec]:
    return lambda: arm if isinstance(arm, ArmSpec) else ArmSpec(table=arm)

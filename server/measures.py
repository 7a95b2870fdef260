"""What sites said about a model under privacy, as metrics by group: computed from their noisy histograms alone."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from mcrage import rng
from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from mcrage.evaluation.private_metrics import PrivateMetrics
from mcrage.privacy.counts import received_scores
from server.records import RoundRecord

THRESHOLD = 0.5


def fairness_rows(records: Iterable[RoundRecord], schema: TableSchema, config: RunConfig) -> list[dict[str, Any]]:
    """A row per measured round, site, group and metric: value, 95 % interval of sampling and noise, or why not."""
    return [
        {"round": record.server_round, "site": site, **row}
        for record in records
        for site, histogram in record.scores.items()
        for row in _rows(
            PrivateMetrics(
                received_scores(np.asarray(histogram), schema, epsilon=config.privacy.dp_score_epsilon),
                threshold=THRESHOLD,
                generator=rng.stream(config.federation.seed, "fairness", record.server_round, site),
            )
        )
    ]


def _rows(metrics: PrivateMetrics) -> list[dict[str, Any]]:
    by_group = [
        {"group": str(group), "against": None, "metric": name, **vars(estimate)}
        for group in metrics.groups
        for name, estimate in metrics.of(group).items()
    ]
    gaps = [
        {"group": str(group), "against": str(groups[0]), "metric": name, **vars(estimate)}
        for groups in metrics.by.values()
        for group in groups[1:]
        for name, estimate in metrics.gap(group, groups[0]).items()
    ]
    return [*by_group, *gaps]

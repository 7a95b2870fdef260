"""The figures of the MCRAGE experiment: arms, metrics, what others found, and the table that compares them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

ARMS: Mapping[str, str] = {
    "original": "original, no imbalance",
    "imbalanced": "imbalanced, untouched",
    "oversampling": "random oversampling",
    "smote": "SMOTE",
    "class_weights": "class weights",
    "gaussian": "one Gaussian of the minority",
    "released": "MCRAGE as released",
    "central_parity": "CDDPM, minority to parity",
    "central_target": "CDDPM, both classes to a target",
    "federated_parity": "federated CDDPM, minority to parity",
    "federated_target": "federated CDDPM, both classes to a target",
}
METRICS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "f1": "F1",
    "auroc_labels": "AUROC (hard labels)",
    "auroc": "AUROC (scores)",
}

# Mean and half-width of the 95 % interval over ten other splits, from a reproduction that came before this program;
# in the order of METRICS. Its CDDPM had three layers of 256 and 200 steps of diffusion.
EARLIER: Mapping[str, tuple[tuple[float, float], ...]] = {
    "original": ((0.728, 0.007), (0.621, 0.012), (0.700, 0.007), (0.775, 0.008)),
    "imbalanced": ((0.592, 0.009), (0.000, 0.000), (0.500, 0.000), (0.765, 0.011)),
    "oversampling": ((0.723, 0.008), (0.636, 0.012), (0.703, 0.007), (0.765, 0.010)),
    "smote": ((0.720, 0.010), (0.634, 0.013), (0.700, 0.007), (0.760, 0.011)),
    "class_weights": ((0.721, 0.009), (0.628, 0.018), (0.699, 0.010), (0.766, 0.010)),
    "gaussian": ((0.718, 0.012), (0.647, 0.014), (0.704, 0.010), (0.758, 0.010)),
    "released": ((0.673, 0.008), (0.560, 0.025), (0.648, 0.012), (0.708, 0.008)),
    "central_parity": ((0.707, 0.011), (0.639, 0.018), (0.696, 0.010), (0.757, 0.010)),
}

# What the paper's authors print, for one split, with a deeper forest (4) for the augmented set only.
PRINTED: Mapping[str, Mapping[str, float]] = {
    "original": {"accuracy": 0.706, "f1": 0.599, "auroc_labels": 0.68},
    "imbalanced": {"f1": 0.019, "auroc_labels": 0.50},
    "released": {"accuracy": 0.702, "f1": 0.613, "auroc_labels": 0.68},
}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One metric of one arm over the splits.

    Attributes:
        arm, metric: Names of :data:`ARMS` and :data:`METRICS`.
        value: Mean over the splits.
        low, high: Ends of the 95 % interval of the mean (Student's t).
        n: Splits.
        earlier: What the earlier reproduction had; None where it had no such arm.
        printed: What the paper prints; None where it prints nothing.
    """

    arm: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    earlier: float | None
    printed: float | None


def summarise(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> list[Summary]:
    """Mean and interval of every arm and metric from its values in each split."""
    summaries = []
    for arm in ARMS:
        for place, metric in enumerate(METRICS):
            values = np.array([split[arm][metric] for split in scores])
            margin = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
            mean = float(values.mean())
            summaries.append(
                Summary(
                    arm=arm,
                    metric=metric,
                    value=mean,
                    low=mean - float(margin),
                    high=mean + float(margin),
                    n=len(values),
                    earlier=EARLIER[arm][place][0] if arm in EARLIER else None,
                    printed=PRINTED.get(arm, {}).get(metric),
                )
            )
    return summaries


def format_table(summaries: Sequence[Summary], *, epochs: int) -> str:
    """The table for a terminal: mean and half-width, the earlier figure in brackets, the paper's in braces."""
    width = max(map(len, ARMS.values()))
    lines = [f"{'training set':<{width}}" + "".join(f"{title:>30}" for title in METRICS.values())]
    for arm, title in ARMS.items():
        cells = [_cell(row) for row in summaries if row.arm == arm]
        lines.append(f"{title:<{width}}" + "".join(f"{cell:>30}" for cell in cells))
    lines += [
        "",
        f"mean ± half of the 95 % t-interval over {summaries[0].n} splits; [mean] of an earlier reproduction over ten "
        "other splits;",
        f"{{value}} as printed in arXiv 2310.18430; the released model trained for {epochs:,} epochs (paper: 1,000)",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(row: Summary) -> str:
    earlier = "       " if row.earlier is None else f" [{row.earlier:.3f}]"
    printed = "       " if row.printed is None else f" {{{row.printed:.3f}}}"
    return f"{row.value:.3f}±{(row.high - row.low) / 2:.3f}{earlier}{printed}"

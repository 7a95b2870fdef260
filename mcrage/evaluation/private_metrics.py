"""Metrics by group from a noisy histogram of scores: nothing else of the patients enters, so they cost nothing more.

Value and interval: sums of noisy counts are unbiased, so the value is their ratio as it stands, moved into its range.
The interval is that of a parametric bootstrap: patients are drawn from the histogram (Poisson in each cell) and get
fresh noise of the known scale, so that it holds sampling error and noise together. The histogram that they are drawn
from is the nearest one without negative counts and with the same number of patients with and without the event.

AUROC is that of the binned scores, ties half: a little below that of the scores themselves, which bins of public edges
cannot tell (:data:`~mcrage.privacy.counts.SCORE_EDGES` says how much).

Shape: K groups, R replicates and B bins; sums of shape (R, 2, B), patients without the event, then with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from mcrage.data.groups import Group
from mcrage.data.marginals import without_negatives
from mcrage.errors import PrivacyError
from mcrage.evaluation.metrics import Floats, interval
from mcrage.privacy.counts import NoisyScores

METRICS: Final = ("auroc", "tpr", "fpr", "selection_rate")

MINIMUM_DENOMINATOR = 50
"""Fewest patients, by the noisy count, that a rate is given of: at an ε of .5 and in ten bins, noise alone moves a rate
of 50 patients by about .09."""

_DENOMINATORS: Final = {
    "auroc": "with and without the event",
    "tpr": "with the event",
    "fpr": "without the event",
    "selection_rate": "in the group",
}
_NEGATIVE, _POSITIVE = 0, 1


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A metric with its 95 % interval.

    Attributes:
        value: None where there is none.
        low, high: Limits of the interval: sampling error and noise together.
        reason: Why there is no value.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""


class PrivateMetrics:
    """AUROC, true and false positive rate and selection rate of one model, by group, and gaps between groups.

    Args:
        scores: The noisy histogram.
        threshold: A patient with a score of at least this is predicted to have the event; an inner edge of the bins.
        generator: Draws the replicates of the intervals. Its draws protect nobody.
        num_replicates: Replicates.

    Attributes:
        groups: Everybody, every level of every attribute, and every intersection of all of them.
        by: Groups that can be compared, by the name of the attribute, or of all attributes together.

    Raises:
        PrivacyError: If ``scores`` is anything but noisy, or the threshold is no edge.
    """

    def __init__(
        self, scores: NoisyScores, *, threshold: float, generator: np.random.Generator, num_replicates: int = 1000
    ) -> None:
        if not isinstance(scores, NoisyScores):
            raise PrivacyError(f"metrics are made from NoisyScores only, got {type(scores).__name__}")
        if threshold not in scores.edges[1:-1]:
            edges = ", ".join(f"{edge:g}" for edge in scores.edges[1:-1])
            raise PrivacyError(f"the threshold must be an edge of the score bins ({edges}), got {threshold:g}")
        self._first = scores.edges.index(threshold)
        self.by = _comparable(scores.groups)
        self.groups = tuple(dict.fromkeys([Group(()), *(group for groups in self.by.values() for group in groups)]))
        self._found = {
            group: self._of_group(_members(group, scores), scores.counts.scale, generator, num_replicates)
            for group in self.groups
        }

    def of(self, group: Group) -> Mapping[str, Estimate]:
        """The metrics of a group, by name."""
        return MappingProxyType({name: self._estimate(group, name) for name in METRICS})

    def gap(self, first: Group, second: Group) -> Mapping[str, Estimate]:
        """Metrics of the first group less those of the second, by name; absent unless both groups have them.

        Raises:
            PrivacyError: If the groups may have patients in common: only two levels of one attribute, or two
                intersections of all, can be compared.
        """
        if first == second or not any(first in groups and second in groups for groups in self.by.values()):
            raise PrivacyError(f"groups '{first}' and '{second}' cannot be compared: they are not of one partition")
        return MappingProxyType({name: self._difference(first, second, name) for name in METRICS})

    def _estimate(self, group: Group, name: str) -> Estimate:
        found = self._found[group]
        if reason := found.reasons[name]:
            return Estimate(reason=reason)
        return _with_interval(found.values[name], found.spread[name], bounds=(0.0, 1.0))

    def _difference(self, first: Group, second: Group, name: str) -> Estimate:
        a, b = self._found[first], self._found[second]
        for group, reason in ((first, a.reasons[name]), (second, b.reasons[name])):
            if reason:
                return Estimate(reason=f"{group}: {reason}")
        return _with_interval(a.values[name] - b.values[name], a.spread[name] - b.spread[name], bounds=(-1.0, 1.0))

    def _of_group(
        self, atoms: NDArray[np.int64], scale: float, generator: np.random.Generator, num_replicates: int
    ) -> "_Found":
        """What is known of the union of these finest groups, given as their histograms of shape (atoms, 2, B)."""
        sums = atoms.sum(axis=0)
        reasons = _reasons(sums)
        if all(reasons.values()):
            return _Found(values={}, spread={}, reasons=reasons)
        expected = np.stack([without_negatives(cells) for cells in sums])
        replicates = generator.poisson(expected, size=(num_replicates, *sums.shape))
        replicates += _laplace_sums(scale, len(atoms), replicates.shape, generator)
        centre = self._values(expected[None])
        drawn = self._values(replicates.astype(np.float64))
        values = self._values(sums[None].astype(np.float64))
        return _Found(
            values={name: float(values[name][0]) for name in METRICS},
            spread={name: drawn[name] - centre[name] for name in METRICS},
            reasons=reasons,
        )

    def _values(self, sums: Floats) -> dict[str, Floats]:
        """Metrics of sums of shape (R, 2, B), by name; NaN where a denominator is not positive."""
        negative, positive = sums[:, _NEGATIVE], sums[:, _POSITIVE]
        num_negative, num_positive = negative.sum(axis=1), positive.sum(axis=1)
        false, true = (cells[:, self._first :].sum(axis=1) for cells in (negative, positive))
        below = np.cumsum(negative, axis=1) - negative / 2
        ranked = (positive * below).sum(axis=1)
        return {
            "auroc": _ratio(_ratio(ranked, num_positive), num_negative),
            "tpr": _ratio(true, num_positive),
            "fpr": _ratio(false, num_negative),
            "selection_rate": _ratio(true + false, num_positive + num_negative),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """Of one group, by metric: values, deviations of the replicates, and why a metric may not be given."""

    values: Mapping[str, float]
    spread: Mapping[str, Floats]
    reasons: Mapping[str, str]


def _with_interval(value: float, spread: Floats, *, bounds: tuple[float, float]) -> Estimate:
    below, above = interval(spread)
    if not np.isfinite(below):
        return Estimate(reason="insufficient: the noise is larger than the number of patients")
    # the value is moved into its range first: an interval of a value beyond it would have no width
    inside = float(np.clip(value, *bounds))
    low, high = np.clip([inside + min(float(below), 0.0), inside + max(float(above), 0.0)], *bounds).tolist()
    return Estimate(value=inside, low=low, high=high)


def _reasons(sums: NDArray[np.int64]) -> dict[str, str]:
    """Why each metric may not be given, empty where it may, from noisy sums of shape (2, B)."""
    negatives, positives = sums.sum(axis=1).tolist()
    smallest = {
        "auroc": min(negatives, positives),
        "tpr": positives,
        "fpr": negatives,
        "selection_rate": negatives + positives,
    }
    return {
        name: ""
        if patients >= MINIMUM_DENOMINATOR
        else f"insufficient: fewer than {MINIMUM_DENOMINATOR} patients {_DENOMINATORS[name]}, by the noisy count"
        for name, patients in smallest.items()
    }


def _laplace_sums(scale: float, num: int, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.int64]:
    """Sums of ``num`` discrete Laplace noises: differences of two negative binomials."""
    p = -np.expm1(-1 / scale)
    return generator.negative_binomial(num, p, size=shape) - generator.negative_binomial(num, p, size=shape)


def _ratio(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _comparable(groups: tuple[Group, ...]) -> dict[str, tuple[Group, ...]]:
    """Groups by the attribute that they are levels of; those of all attributes last, if there are several."""
    names = [name for name, _ in groups[0].levels]
    by = {
        name: tuple(dict.fromkeys(Group((group.levels[place],)) for group in groups))
        for place, name in enumerate(names)
    }
    return by | {" × ".join(names): groups} if len(names) > 1 else by


def _members(group: Group, scores: NoisyScores) -> NDArray[np.int64]:
    """Histograms of the finest groups within a group; shape (atoms, 2, B)."""
    wanted = set(group.levels)
    return scores.histogram[[wanted <= set(finest.levels) for finest in scores.groups]]

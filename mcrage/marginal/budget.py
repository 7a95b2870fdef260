"""How an epsilon is shared among the releases that the marginal model is made from.

All releases are Gaussian mechanisms. A release of m tables with the noise σ costs m/σ² of one common precision, and a
precision of μ² is (ε, δ)-differentially private with δ = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) (Dong, Roth and Su, 2022,
corollary 2.13). Tables may be chosen by what earlier releases showed as long as their sum does not depend on it (Smith
and Thakurta, 2022). A source that protects patients checks the events with :mod:`mcrage.privacy.accounting` before
each release; what stands here only plans.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field

from scipy.special import log_ndtr

from mcrage.errors import ConfigError
from mcrage.privacy.accounting import check_delta
from mcrage.privacy.events import SMALLEST_NOISE, PrivacyEvent

_KEPT = 0.999  # of an epsilon: the accountant's grid of losses rounds up
_GRID = 2e-4


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of the budget, which add up to 1; without a forest ``conditions`` has those of ``pairs`` and ``edges``.

    The defaults were found on the simulated cohort and on diabetes-130 (``docs/privacy-budget.md``).

    Attributes:
        one_ways: Histograms of single columns.
        groups: The table of groups and labels.
        conditions: Tables of each column with a sensitive feature and the label.
        pairs: Coarse tables of all pairs of columns, from which the forest is chosen; 0 for no forest.
        edges: Tables of the forest's pairs; 0 for no forest.
    """

    one_ways: float = 0.1
    groups: float = 0.05
    conditions: float = 0.55
    pairs: float = 0.1
    edges: float = 0.2

    def __post_init__(self) -> None:
        parts = astuple(self)
        if min(parts) < 0 or not all(parts[:3]) or bool(self.pairs) != bool(self.edges) or abs(sum(parts) - 1) > 1e-9:
            raise ConfigError(
                f"shares of a budget must be positive and add up to 1, got {', '.join(f'{part:g}' for part in parts)}; "
                "pairs and edges may both be 0"
            )

    def without_forest(self) -> "Shares":
        """The same for a model in which columns depend on group and label alone."""
        return Shares(
            one_ways=self.one_ways,
            groups=self.groups,
            conditions=1 - self.one_ways - self.groups,
            pairs=0.0,
            edges=0.0,
        )


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model may cost one site.

    Attributes:
        precision: Σ m/σ² over its releases; infinite for exact counts.
        shares: Of it.
    """

    precision: float
    shares: Shares = field(default_factory=Shares)

    def noise(self, share: str, tables: int) -> float:
        """Standard deviation on each cell of a release of so many tables; 0 for exact counts."""
        part = getattr(self.shares, share)
        if math.isinf(self.precision):
            return 0.0
        return max(math.sqrt(tables / (part * self.precision)), SMALLEST_NOISE) if part else math.inf

    def events(self, tables: Mapping[str, int]) -> tuple[PrivacyEvent, ...]:
        """What releases of so many tables by share cost; those of no table cost nothing."""
        return tuple(
            PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=self.noise(share, number), steps=number)
            for share, number in tables.items()
            if number
        )


def precision(*, epsilon: float, delta: float) -> float:
    """The largest precision μ² that costs at most epsilon; infinite for an infinite one.

    Raises:
        ConfigError: If epsilon is not above .001.
        PrivacyError: If delta is out of range.
    """
    check_delta(delta)
    if not epsilon > 1e-3:
        raise ConfigError(f"epsilon must be above .001, got {epsilon}")
    if math.isinf(epsilon):
        return math.inf
    limit = _KEPT * epsilon - _GRID
    low, high = 0.0, 1.0
    while _delta(high, limit) < delta:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(middle, limit) < delta else (low, middle)
    return low**2


def _delta(mu: float, epsilon: float) -> float:
    first, second = log_ndtr(mu / 2 - epsilon / mu), epsilon + log_ndtr(-mu / 2 - epsilon / mu)
    return math.exp(first) - math.exp(second)

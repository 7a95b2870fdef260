"""What rows of a private run are worth to hospitals of its size, known before anyone trains: from what was measured.

How well a private generator learns depends on how far the patients stand out of the noise. A budget (ε, δ) that is
spent on one count has a Gaussian noise of the standard deviation 1/μ (Dong, Roth and Su, 2022); n hospitals that each
add their own put √n times that into their sum. The *signal* of a run is all its training patients over that noise. Runs
of the same generator with the same signal closed about the same share of the gap from own to pooled rows, whether a
small epsilon, few patients or noise of every hospital's own made it small (``docs/privacy-budget.md``).

Other tables will differ: the two that were measured differ by as much as two epsilons do. What is said is therefore
what happened on each of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mcrage.marginal.budget import precision

_REMEDY = "a larger epsilon helps, more patients, or noise that hospitals share if it is not yet (dp-noise=shared)"


@dataclass(frozen=True)
class Measured:
    """What one setting came to, as ``python -m simulations privacy-budget`` has it.

    Attributes:
        generator: ``cddpm`` or ``marginal``.
        data: The data set.
        signal: As of :func:`signal`.
        share: Of the gap in AUROC (logistic regression) between own and pooled rows, closed over all patients.
    """

    generator: str
    data: str
    signal: float
    share: float


MEASURED: tuple[Measured, ...] = (
    Measured("cddpm", "diabetes130", 5029, 0.78),
    Measured("cddpm", "diabetes130", 11652, 0.93),
    Measured("marginal", "cohort", 415, -1.64),
    Measured("marginal", "cohort", 1113, -0.33),
    Measured("marginal", "cohort", 1312, -0.21),
    Measured("marginal", "cohort", 2579, -0.06),
    Measured("marginal", "cohort", 3520, 0.17),
    Measured("marginal", "cohort", 8157, 0.32),
    Measured("marginal", "diabetes130", 593, -0.68),
    Measured("marginal", "diabetes130", 1590, 0.09),
    Measured("marginal", "diabetes130", 1874, 0.36),
    Measured("marginal", "diabetes130", 3685, 0.51),
    Measured("marginal", "diabetes130", 5029, 0.71),
    Measured("marginal", "diabetes130", 11652, 0.66),
)
"""Three to five draws of ten hospitals for each, at δ = 1e-5 (``python -m benchmarks.prospects``)."""


def signal(*, patients: float, epsilon: float, delta: float, noises: int) -> float:
    """Training patients of all hospitals over the standard deviation of the noise on a sum that has the whole budget.

    Args:
        patients: That train, of all hospitals together.
        epsilon, delta: Of one hospital's patients for the whole run; infinite for no privacy.
        noises: How often the noise is in a sum: 1 where hospitals share it, else the number of hospitals.

    Raises:
        ConfigError: If epsilon is not above .001.
        PrivacyError: If delta is out of range.
    """
    return patients * math.sqrt(precision(epsilon=epsilon, delta=delta) / noises)


@dataclass(frozen=True)
class Prospect:
    """What rows of a run can be expected to do, by what they did elsewhere.

    Attributes:
        generator: ``cddpm`` or ``marginal``.
        shares: Of the gap, by data set, closed at the run's signal: between two measurements interpolated over the
            signal's logarithm, never more than what a higher signal came to, and above all of them that of the
            highest. With a lower signal than any that was measured nothing is known, unless the lowest did harm
            already. Empty without privacy.
    """

    generator: str
    shares: Mapping[str, float]

    @classmethod
    def of(cls, generator: str, at: float, *, measured: Sequence[Measured] = MEASURED) -> "Prospect":
        """The prospect of a run with a signal; infinite for one without privacy."""
        own = [each for each in measured if each.generator == generator and math.isfinite(at)]
        found = {}
        for data in dict.fromkeys(each.data for each in own):
            points = sorted((each.signal, each.share) for each in own if each.data == data)
            signals, shares = np.array(points).T
            at_most = np.minimum.accumulate(shares[::-1])[::-1]
            if at >= signals[0] or at_most[0] < 0:
                found[data] = float(np.interp(math.log(at), np.log(signals), at_most))
        return cls(generator, found)

    @property
    def harmed(self) -> tuple[str, ...]:
        """Data sets on which hospitals did worse than with their own rows."""
        return tuple(data for data, share in self.shares.items() if share < 0)

    def __str__(self) -> str:
        """As a sentence, which warns where hospitals did worse than with their own rows."""
        if not self.shares:
            return f"expected: of {self.generator} rows nothing was measured at this much noise"
        shares = ", ".join(f"{100 * share:.0f} % on {data}".replace("-", "−") for data, share in self.shares.items())
        said = f"expected: at this much noise, {self.generator} rows closed {shares} of the gap from own to pooled rows"
        if not self.harmed:
            return said
        return f"{said}: WORSE than a hospital's own rows on {' and '.join(self.harmed)}; {_REMEDY}"

"""Counts whose noise the sites share: each adds a part of it, and the sum of all sites has enough for all patients.

As :mod:`mcrage.privacy.shared`, for tables of counts: a site adds its share, a discrete Gaussian, to whole numbers and
masks them (:mod:`mcrage.privacy.masking`); nobody sees less than the sum of all sites that were asked together.

*Guarantee*: for whoever sees only such sums and knows what at most ``colluders`` sites added, a release of m tables is
the discrete Gaussian mechanism with the standard deviation ``noise`` composed m times: one ``discrete-gaussian`` event.
The noise of the honest sites is a sum of discrete Gaussians. From :data:`SMALLEST_SHARE` on its probabilities are
those of one discrete Gaussian of the summed variance up to a relative 1e-8 (Kairouz, Liu and Steinke, 2021), of which
a patient meets two in each table: with 1,000 tables 2e-5 of an epsilon, far less than planned budgets leave unspent.
What wraps around modulo 2³² is a function of the sum.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mcrage.errors import PrivacyError
from mcrage.privacy.discrete import discrete_gaussian
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.keyed import KeyedBits
from mcrage.privacy.shared import check_sharing

SMALLEST_SHARE = 1.5
"""Least standard deviation of a site's share: a sum of discrete Gaussians that are narrower is no Gaussian."""


@dataclass(frozen=True, kw_only=True)
class SharedCounts:
    """How much noise each of some sites adds to every cell.

    Attributes:
        noise: Standard deviation of the honest sites' noise together, at least.
        sites: Number of sites that are asked together.
        colluders: How many of them may tell what noise they added; the sites themselves are among those against whom
            the noise protects, so it is at least 1.

    Raises:
        PrivacyError: If nobody honest would be left, or the noise is none.
    """

    noise: float
    sites: int
    colluders: int

    def __post_init__(self) -> None:
        check_sharing(self.sites, self.colluders)
        if not self.noise > 0:
            raise PrivacyError(f"shared noise takes a standard deviation above 0, got {self.noise}")

    @property
    def own_noise(self) -> float:
        """Standard deviation of one site's share."""
        return max(self.noise / math.sqrt(self.sites - self.colluders), SMALLEST_SHARE)

    @property
    def deviation(self) -> float:
        """Standard deviation of all sites' shares together."""
        return self.own_noise * math.sqrt(self.sites)

    def event(self, whole: PrivacyEvent) -> PrivacyEvent:
        """What a release of the sum costs, with a site's share beside it, from what it costs with all of the noise."""
        return replace(whole, own_noise=min(self.own_noise, whole.noise_multiplier))

    def share(self, exact: NDArray[np.int64], *, key: bytes) -> NDArray[np.int64]:
        """A site's counts with its share of the noise on each, which protects nobody by itself.

        Args:
            exact: Counts of its patients.
            key: Of this request and this table, that nobody else knows.
        """
        return exact + discrete_gaussian(self.own_noise, size=len(exact), bits=KeyedBits(key))

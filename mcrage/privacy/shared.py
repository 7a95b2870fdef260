"""Noise that the sites share: each adds a part of it, and the sum of all sites has enough for everybody's patients.

A site rounds its sum to a lattice, adds Gaussian noise in whole steps of the lattice, and masks the result
(:mod:`mcrage.privacy.masking`), so that nobody sees less than the sum of all sites that were asked together. Up to
``colluders`` of them may tell each other, or the server, what noise they added: the others' shares alone are enough.

*Guarantee*: for whoever sees only such sums and knows what at most ``colluders`` sites did, a step is the Gaussian
mechanism with the noise multiplier of the sum, on a Poisson sample of the patients of all sites: one ``dp-sgd`` step
of the ledger. The noise of the honest sites is a sum of rounded Gaussians. At the integers its probabilities are those
of a Gaussian to which independent noise is added (one uniform on ±1/2 per site), but for a relative error below
exp(−2π²σ²) with σ of at least 10⁴ lattice steps: none that a float64 could hold; to add independent noise is
post-processing of the Gaussian mechanism. Rounding moves the sums of two neighbouring tables apart by at most one step
in every number, for which the noise makes up. What wraps around modulo 2³² is a function of the sum.

For whoever breaks the aggregation (the server and all but one of the sites, or a server that could read masks) only a
site's own share protects its patients; :attr:`SharedNoise.own_multiplier` is what the ledger has of it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from mcrage.errors import PrivacyError
from mcrage.privacy.noise import GaussianNoise

MOST_SITES = 1000
_LATTICE_BITS = 20  # a step is 2⁻²⁰ to 2⁻²¹ of the noise of the sum: rounding is lost in it
_LARGEST_SUM = 2**30  # of all sites' sums without noise, in steps; as much again is left for the noise


def check_sharing(sites: int, colluders: int) -> None:
    """Raises unless so many sites can share noise of which so many may collude: one at least is then honest.

    The sites themselves are among those against whom the noise protects, so that one colludes at least.

    Raises:
        PrivacyError: In any other case.
    """
    if not 1 <= colluders < sites <= MOST_SITES:
        raise PrivacyError(
            f"shared noise takes 2 to {MOST_SITES:,} sites of which 1 to all but one may collude, "
            f"got {sites} and {colluders}"
        )


@dataclass(frozen=True, kw_only=True)
class SharedNoise:
    """How much noise each of some sites adds, and on which lattice.

    Attributes:
        noise_multiplier: Standard deviation of the honest sites' noise together over the clipping norm.
        max_grad_norm: Clipping norm: how far one patient can move a site's sum.
        sites: Number of sites that are asked together.
        colluders: How many of them may tell what noise they added; the sites themselves are among those against whom
            the noise protects, so it is at least 1.

    Raises:
        PrivacyError: If nobody honest would be left, or a number is out of range.
    """

    noise_multiplier: float
    max_grad_norm: float
    sites: int
    colluders: int

    def __post_init__(self) -> None:
        check_sharing(self.sites, self.colluders)
        if not (0 < self.noise_multiplier < math.inf and 0 < self.max_grad_norm < math.inf):
            raise PrivacyError("shared noise takes a noise multiplier and a clipping norm above 0")

    @property
    def own_multiplier(self) -> float:
        """Standard deviation of one site's noise over the clipping norm."""
        return self.noise_multiplier / math.sqrt(self.sites - self.colluders)

    @property
    def spacing(self) -> float:
        """A step of the lattice: a power of two."""
        return float(2.0 ** (math.floor(math.log2(self.noise_multiplier * self.max_grad_norm)) - _LATTICE_BITS))

    @property
    def largest(self) -> int:
        """Largest number of a site's sum without noise, in steps; larger ones are cut off, before the noise."""
        return _LARGEST_SUM // self.sites

    def share(self, total: Float[Tensor, " n"], noise: GaussianNoise) -> NDArray[np.int64]:
        """A site's sum with its share of the noise, in steps of the lattice.

        Args:
            total: Clipped sum of its patients; one patient moves it by at most ``max_grad_norm`` in L2 norm.
            noise: From a key of this request that nobody else knows.
        """
        steps = total.double().div(self.spacing).round_()
        steps.nan_to_num_(nan=0.0).clamp_(-self.largest, self.largest)
        deviation = self.own_multiplier * (self.max_grad_norm / self.spacing + math.sqrt(len(total)))
        return np.asarray((steps.to(torch.int64) + noise.integers(len(total), deviation=deviation)).numpy())

    def value(self, steps: NDArray[np.int32]) -> Float[Tensor, " n"]:
        """The sum of all sites, float32, from its steps on the lattice."""
        return torch.from_numpy(steps.astype(np.float64) * self.spacing).float()


def as_words(steps: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Whole numbers modulo 2³²."""
    return (steps & 0xFFFFFFFF).astype(np.uint32)

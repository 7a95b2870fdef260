"""Gaussian noise that protects patients: cryptographic, on a lattice, and the same again only for the same key.

Floating-point Gaussians leak through the values that they cannot take (Mironov, 2012; Jin et al., 2022). So sum and
noise are both rounded to multiples of a power of two, less than a billionth of the noise's standard deviation, and
added as integers: every multiple is within reach, whatever the sum was. Each number is half the sum of four
independent Gaussians (Holohan and Braghin, 2021) of 52-bit uniforms from an AES-256 keystream; four numbers share the
same four through an orthogonal matrix of signs, which keeps them independent.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcrage.privacy.keyed import KeyedBits

_LATTICE_BITS = 32
_AT_ONCE = 2**15  # numbers at a time: what is computed of them stays in a processor's cache

INFLATION = 1.001
"""Factor of the noise that makes up for rounding to the lattice.

Even with a noise multiplier of 1,000, the largest that a ledger takes, rounding moves two sums of 10⁷ numbers apart by
less than a thousandth of the clipping norm.
"""


class GaussianNoise:
    """Adds noise to sums.

    Args:
        key: 32 bytes that nobody else knows. Each addition goes on where the last one ended.
    """

    def __init__(self, key: bytes) -> None:
        self._bits = KeyedBits(key)

    def add(self, total: Float[Tensor, " n"], *, deviation: float) -> Float[Tensor, " n"]:
        """A sum with noise of this standard deviation (0 for none) on every number, on the lattice, then as float32.

        *Guarantee*: of sums that one patient changes by at most 1 in L2 norm this is the Gaussian mechanism with a
        noise multiplier of ``deviation``; one ``dp-sgd`` step of the ledger covers it.
        """
        if deviation == 0.0:
            return total.float()
        spacing = lattice_spacing(deviation)
        released = torch.empty(len(total), dtype=torch.float32)
        for start in range(0, len(total), _AT_ONCE):
            part = total[start : start + _AT_ONCE].double().div(spacing).round_()
            noise = self._normals(len(part)).mul_(deviation * INFLATION / spacing).round_()
            released[start : start + _AT_ONCE] = part.add_(noise).mul_(spacing)
        return released

    def integers(self, size: int, *, deviation: float) -> Int[Tensor, " size"]:
        """Gaussian noise of this standard deviation, rounded to whole numbers; meant for deviations of 10⁴ and more."""
        noise = torch.empty(size, dtype=torch.int64)
        for start in range(0, size, _AT_ONCE):
            part = noise[start : start + _AT_ONCE]
            part.copy_(self._normals(len(part)).mul_(deviation).round_())
        return noise

    def _normals(self, size: int) -> Float[Tensor, " size"]:
        """Independent standard Gaussians, float64."""
        quarter = -(-size // 4)
        words = torch.from_numpy(self._bits.uint64(4 * quarter).view("int64")).view(4, quarter)
        uniform = (words >> 12).double().mul_(2.0**-52).add_(0.5 + 2.0**-53)  # the shift keeps the sign: in (0, 1)
        radius = uniform[:2].log().mul_(-0.5).sqrt_()  # half of Box and Muller's, for the mean of four
        angle = uniform[2:].mul_(2 * math.pi)
        first, second = radius * angle.sin(), radius.mul_(angle.cos_())
        sums, differences = first + second, first.sub_(second)
        out = torch.empty(4, quarter, dtype=torch.float64)
        for place, pair in ((0, sums), (2, differences)):
            torch.add(pair[0], pair[1], out=out[place])
            torch.sub(pair[0], pair[1], out=out[place + 1])
        return out.view(-1)[:size]


def lattice_spacing(deviation: float) -> float:
    """Distance between neighbouring released values: a power of two, 2⁻³² to 2⁻³³ of the standard deviation."""
    return float(2.0 ** (math.floor(math.log2(deviation)) - _LATTICE_BITS))

"""How much signal is left at each time of the diffusion.

Shape: times t of shape (batch,) in [0, 1] give signal and noise of shape (batch, 1), with signal² + noise² = 1.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """The cosine schedule in continuous time (Nichol and Dhariwal, 2021), cut so that it starts almost clean.

    At t = 1 nothing but noise is left (signal 0 up to rounding), so that sampling may start from pure noise.

    Attributes:
        least_noise: Noise at t = 0.
        spread: Training times are the logistic function of ``spread`` times a standard normal: most of them in the
            middle, where rows are decided.
    """

    least_noise: float = 0.02
    spread: float = 1.2

    def signal_noise(self, time: Float[Tensor, " batch"]) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
        """Factor of the clean row and standard deviation of the noise at each time."""
        first = math.asin(self.least_noise)
        angle = (first + (math.pi / 2 - first) * time)[:, None]
        return torch.cos(angle), torch.sin(angle)

    def draw_times(self, rows: int, generator: torch.Generator) -> Float[Tensor, " rows"]:
        """Random times for training."""
        return self.times(torch.randn(rows, generator=generator))

    def times(self, normal: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The times for training that standard normal numbers stand for."""
        return torch.sigmoid(self.spread * normal)

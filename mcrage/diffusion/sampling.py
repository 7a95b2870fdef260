"""From noise to rows: samplers are plain functions over a denoiser.

Shape: all work on rows of ``layout.width`` numbers and return numeric parts (rows, num_numeric) and levels
(rows, num_blocks).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcrage.data.transform import Constraint
from mcrage.diffusion.blocks import one_hot
from mcrage.diffusion.denoiser import Denoiser
from mcrage.diffusion.tabular import TabularDiffusion

_LAST = 0.05  # time of the last estimate

Estimate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def guided_estimate(
    denoiser: Denoiser,
    diffusion: TabularDiffusion,
    constraint: Constraint,
    *,
    guidance: float,
    numeric_limit: float,
) -> Estimate:
    """A function from (noisy, time) to the estimate of clean rows under a constraint.

    Estimates stay within ``numeric_limit`` and within the constraint, exactly.
    """
    low = constraint.low.clamp(min=-numeric_limit)
    high = constraint.high.clamp(max=numeric_limit)
    sizes = diffusion.layout.block_sizes
    fixed = one_hot(constraint.codes, sizes)
    is_fixed = (constraint.codes >= 0)[:, diffusion.blocks.of_level]
    any_fixed = bool(is_fixed.any())

    def estimate(noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        numeric, probabilities = diffusion.estimate(denoiser, noisy, time, constraint.attributes, guidance=guidance)
        return numeric.clamp(low, high), torch.where(is_fixed, fixed, probabilities) if any_fixed else probabilities

    return estimate


def dpm_solver(
    estimate: Estimate, diffusion: TabularDiffusion, *, rows: int, steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rows num_numeric"], Int[Tensor, "rows num_blocks"]]:
    """DPM-Solver++(2M) (Lu et al., 2022): second order, no fresh noise after the first."""
    times, signal, noise = _path(diffusion, steps)
    log_ratio = torch.log(signal / noise)
    row = torch.randn(rows, diffusion.layout.width, generator=generator)
    numeric = probabilities = previous = torch.zeros(0)
    for here in range(steps):
        numeric, probabilities = estimate(row, times[here : here + 1])
        if here == steps - 1:
            break
        clean = direction = diffusion.join(numeric, probabilities)
        gap = log_ratio[here + 1] - log_ratio[here]
        if here:
            weight = 0.5 * gap / (log_ratio[here] - log_ratio[here - 1])
            direction = torch.lerp(previous, clean, 1 + weight)
        row.mul_(noise[here + 1] / noise[here])
        row.sub_(direction, alpha=float(signal[here + 1] * torch.expm1(-gap)))
        previous = clean
    return numeric, diffusion.blocks.draw(probabilities, generator)


def ancestral(
    estimate: Estimate, diffusion: TabularDiffusion, *, rows: int, steps: int, generator: torch.Generator
) -> tuple[Float[Tensor, "rows num_numeric"], Int[Tensor, "rows num_blocks"]]:
    """The ancestral sampler (Ho et al., 2020, algorithm 2): fresh noise at each of many steps."""
    times, signal, noise = _path(diffusion, steps)
    row = torch.randn(rows, diffusion.layout.width, generator=generator)
    numeric = probabilities = torch.zeros(0)
    for here in range(steps):
        numeric, probabilities = estimate(row, times[here : here + 1])
        if here == steps - 1:
            break
        clean = diffusion.join(numeric, probabilities)
        kept = signal[here] / signal[here + 1]
        variance = noise[here] ** 2 - kept**2 * noise[here + 1] ** 2
        mean = kept * noise[here + 1] ** 2 * row + signal[here + 1] * variance * clean
        spread = noise[here + 1] * variance.sqrt() / noise[here]
        row = mean / noise[here] ** 2 + spread * torch.randn(row.shape, generator=generator)
    return numeric, diffusion.blocks.draw(probabilities, generator)


def _path(diffusion: TabularDiffusion, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Times at which estimates are made, from noise to all but clean rows, with the signal and the noise there."""
    times = torch.linspace(1.0, _LAST, steps)
    signal, noise = diffusion.schedule.signal_noise(times)
    return times, signal[:, 0].clamp(min=1e-4), noise[:, 0]

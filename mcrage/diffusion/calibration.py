"""Shares of levels, and the spread of numbers, in generated rows, brought to the released ones.

A denoiser is a little too sure: over a whole path from noise to rows, small errors favour frequent levels, and rare
ones come out some per cent too rare. The one-way histograms that sites released say how often each level should be.
So rows are generated, and the bias of every level in the network's output is moved by the log ratio of the two shares,
in a few rounds with falling rates (Robbins and Monro, 1951). It reads no record: what it uses was released already.

Numbers are measured in all of these rows; :mod:`mcrage.diffusion.quantiles` says what for.

Shape: numeric parts (rows, num_numeric), levels (rows, num_blocks), one per block.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcrage.diffusion.blocks import one_hot
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.quantiles import measured
from mcrage.diffusion.tabular import TabularDiffusion

Drawn = list[tuple[Float[Tensor, "rows num_numeric"], Int[Tensor, "rows num_blocks"]]]

_RATES = (0.5, 0.33, 0.25, 0.2)
_PRIOR_ROWS = 10.0  # added to both counts: a level that was hardly ever generated is not moved far
_MOST_ROWS, _LEAST_ROWS = 20_480, 1024
_ROWS_PER_ROW = 200  # a generated row costs as much as some four trained ones: the whole is a twelfth of training


def rows_per_round(trained_rows: int) -> int:
    """Rows to generate in each round after a training that saw so many; 0 if they would be too few to learn from."""
    rows = min(trained_rows // _ROWS_PER_ROW, _MOST_ROWS)
    return rows if rows >= _LEAST_ROWS else 0


def calibrate(
    denoiser: MLPDenoiser,
    diffusion: TabularDiffusion,
    draw: Callable[[torch.Generator], Drawn],
    *,
    generator: torch.Generator,
) -> Float[Tensor, "num_numeric knots"]:
    """Moves the denoiser's output biases, in place, so that levels have the shares of the prior.

    Args:
        denoiser: Its output biases move.
        diffusion: Gives the released share of each level.
        draw: Numeric parts and levels of generated rows, some at a time, with the denoiser as it is.
        generator: Draws them.

    Returns:
        Quantiles of the generated numbers.
    """
    drawn: Drawn = []
    released = diffusion.blocks.softmax(diffusion.log_prior[None])[0]
    for rate in _RATES:
        last = draw(generator)
        drawn += last
        levels = torch.cat([levels for _, levels in last])
        made = one_hot(levels, diffusion.blocks.sizes).sum(0)
        ratio = torch.log((released * len(levels) + _PRIOR_ROWS) / (made + _PRIOR_ROWS))
        with torch.no_grad():
            denoiser.outputs.bias[diffusion.layout.num_numeric :].add_(ratio, alpha=rate)
    numeric, levels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return measured(numeric, diffusion.present(levels) > 0)

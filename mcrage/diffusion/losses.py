"""Losses of a trained network on rows: of all of them, and one by one at the same noise.

Shape: an encoded table of n rows gives one number, or (n, times, draws).
"""

import numpy as np
import torch
from numpy.typing import NDArray

from mcrage.data.transform import EncodedTable
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion


@torch.no_grad()
def mean_loss(
    network: RowNetwork, diffusion: TabularDiffusion, rows: EncodedTable, *, generator: torch.Generator
) -> float:
    """Mean loss of the denoiser, with the condition given in full, and of the label model if there is one."""
    time = diffusion.schedule.draw_times(len(rows), generator)
    noise = torch.randn(len(rows), diffusion.layout.width, generator=generator)
    losses = diffusion.loss_at(network.denoiser, rows, time=time, noise=noise, attributes=rows.attributes)
    if network.label is not None:
        losses = losses + network.label.loss(rows)
    return float(losses.mean())


@torch.no_grad()
def row_losses(
    network: RowNetwork,
    diffusion: TabularDiffusion,
    rows: EncodedTable,
    *,
    times: tuple[float, ...],
    draws: int,
    generator: torch.Generator,
) -> NDArray[np.float32]:
    """The denoiser's loss of each row, with the same times and noise for all rows; shape (rows, times, draws)."""
    noise = torch.randn(len(times), draws, diffusion.layout.width, generator=generator)
    parts = [
        diffusion.loss_at(
            network.denoiser,
            rows,
            time=torch.full((len(rows),), at),
            noise=one.expand(len(rows), -1),
            attributes=rows.attributes,
        )
        for at, several in zip(times, noise, strict=True)
        for one in several
    ]
    return torch.stack(parts, dim=1).reshape(len(rows), len(times), draws).numpy()

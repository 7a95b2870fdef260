"""All parameters of a generator in one module: what sites train and exchange."""

import torch
from torch import nn

from mcrage.data.transform import TableTransform
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.label import LabelModel


class RowNetwork(nn.Module):
    """The denoiser of the row and, where there is a label, the model that draws it.

    Args:
        transform: Gives widths and shares.
        width: Hidden units per layer of the denoiser.
        depth: Hidden layers of the denoiser.
        generator: Draws the initial weights.
    """

    def __init__(self, transform: TableTransform, *, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        layout = transform.layout
        self.denoiser = MLPDenoiser(layout, width=width, depth=depth, generator=generator)
        self.label = (
            LabelModel(layout, log_prior=transform.log_prior(), label_log_odds=transform.label_log_odds())
            if layout.has_target
            else None
        )

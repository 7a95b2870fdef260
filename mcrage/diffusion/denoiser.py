"""The network: from a noisy row, the time and a condition to a guess of the clean row.

Shape: ``noisy`` (batch, width), ``time`` (batch,), ``attributes`` (batch, num_attributes) with −1 where the condition
is open, to an output (batch, width) that :class:`~mcrage.diffusion.tabular.TabularDiffusion` reads as a velocity for
numeric parts and as logits for levels.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mcrage.data.transform import Layout

_FREQUENCIES = 6
_CONDITION_WIDTH = 64
_WAVES = (1.0, 3.0)  # numbers enter as waves too, so that an edge such as an age of 65 can be sharp


class Denoiser(Protocol):
    """Anything that maps a noisy row, its time and its condition to an output of the same width."""

    def __call__(
        self,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " batch"],
        attributes: Int[Tensor, "batch num_attributes"],
    ) -> Float[Tensor, "batch width"]: ...


class MLPDenoiser(nn.Module):
    """A residual perceptron that sees the condition as inputs; time and condition also scale and shift every layer.

    All layers are linear with biases, so that gradients per patient are cheap and every parameter is float32; there
    is no layer with running statistics. The output is linear: no value is out of reach.

    Args:
        layout: Widths of the encoded row.
        width: Hidden units per layer.
        depth: Hidden layers.
        generator: Draws the initial weights.
    """

    def __init__(self, layout: Layout, *, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layout = layout
        condition = sum(layout.attribute_sizes) + 2 * _FREQUENCIES
        waves = 2 * len(_WAVES) * layout.num_numeric
        self.inputs = nn.Linear(layout.width + waves + sum(layout.attribute_sizes), width)
        self.condition = nn.Linear(condition, _CONDITION_WIDTH)
        self.modulation = nn.Linear(_CONDITION_WIDTH, 2 * width * depth)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outputs = nn.Linear(width, layout.width)
        self._waves = torch.tensor(_WAVES)
        self._frequencies = math.pi * 2.0 ** torch.arange(_FREQUENCIES).div(2.5)
        _initialise(self, generator)
        nn.init.zeros_(self.outputs.weight)
        nn.init.zeros_(self.modulation.weight)

    def forward(
        self,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " batch"],
        attributes: Int[Tensor, "batch num_attributes"],
    ) -> Float[Tensor, "batch width"]:
        """The guess; see the module."""
        angles = time[:, None] * self._frequencies
        given = one_hot(attributes, self.layout.attribute_sizes)
        condition = nn.functional.silu(self.condition(torch.cat([angles.sin(), angles.cos(), given], dim=1)))
        scales, shifts = self.modulation(condition).chunk(2, dim=1)
        waves = (noisy[:, : self.layout.num_numeric, None] * self._waves).flatten(1)
        hidden = self.inputs(torch.cat([noisy, waves.sin(), waves.cos(), given], dim=1))
        for layer, scale, shift in zip(
            self.layers, scales.chunk(len(self.layers), dim=1), shifts.chunk(len(self.layers), dim=1), strict=True
        ):
            hidden = hidden + layer(nn.functional.silu(hidden * (1 + scale) + shift))
        output: Tensor = self.outputs(nn.functional.silu(hidden))
        return output


def one_hot(codes: Int[Tensor, "batch blocks"], sizes: tuple[int, ...]) -> Float[Tensor, "batch width"]:
    """All blocks one-hot side by side; a code of −1 gives zeros."""
    starts = torch.tensor([sum(sizes[:place]) for place in range(len(sizes))], dtype=torch.int64)
    width = sum(sizes)
    flat = torch.where(codes < 0, width, codes + starts)
    out = torch.zeros(codes.shape[0], width + 1)
    return out.scatter_(1, flat, 1.0)[:, :width]


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)

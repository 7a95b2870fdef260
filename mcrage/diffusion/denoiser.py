"""The network: from a noisy row, the time and a condition to a guess of the clean row.

Shape: ``noisy`` (batch, width), ``time`` (batch,) or (1,) where it is the same for all rows, ``attributes`` (batch,
num_attributes) with −1 where the condition is open, to an output (batch, width) that
:class:`~mcrage.diffusion.tabular.TabularDiffusion` reads as a velocity for numeric parts and as logits for levels.
"""

import math
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mcrage.data.transform import Layout
from mcrage.diffusion.blocks import keep_constants, one_hot

_FREQUENCIES = 6
_TIME_WIDTH = 32
_WAVES = (1.0, 3.0)  # numbers enter as waves too, so that an edge such as an age of 65 can be sharp


class Denoiser(Protocol):
    """Anything that maps a noisy row, its time and its condition to an output of the same width."""

    def __call__(
        self,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " #batch"],
        attributes: Int[Tensor, "batch num_attributes"],
    ) -> Float[Tensor, "batch width"]: ...


class MLPDenoiser(nn.Module):
    """A residual perceptron; the time shifts what every layer sees.

    Attributes that a block of the row shows come in with it, as levels without noise; others are inputs of their own.

    All layers are linear with biases, so that gradients per patient are cheap and every parameter is float32; there
    is no layer with running statistics. The output is linear: no value is out of reach. Where ``in_bfloat16`` is set,
    matrix products are bfloat16.

    Args:
        layout: Widths of the encoded row.
        width: Hidden units per layer.
        depth: Hidden layers.
        generator: Draws the initial weights.
    """

    _free: Tensor
    _waves: Tensor
    _frequencies: Tensor

    def __init__(self, layout: Layout, *, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        self.in_bfloat16 = False
        self.num_numeric = layout.num_numeric
        self._sizes = [layout.attribute_sizes[place] for place in layout.free_attributes]
        waves = 2 * len(_WAVES) * layout.num_numeric
        self.inputs = nn.Linear(layout.width + waves + sum(self._sizes), width)
        self.time = nn.Linear(2 * _FREQUENCIES, _TIME_WIDTH)
        self.shifts = nn.Linear(_TIME_WIDTH, depth * width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outputs = nn.Linear(width, layout.width)
        keep_constants(
            self,
            _free=torch.tensor(layout.free_attributes, dtype=torch.int64),
            _waves=torch.tensor(_WAVES),
            _frequencies=math.pi * 2.0 ** torch.arange(_FREQUENCIES).div(2.5),
        )
        _initialise(self, generator)
        for last in (self.outputs, self.shifts):
            nn.init.zeros_(last.weight)

    def forward(
        self,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " #batch"],
        attributes: Int[Tensor, "batch num_attributes"],
    ) -> Float[Tensor, "batch width"]:
        """The guess; see the module."""
        if not self.in_bfloat16:
            return self._guess(noisy, time, attributes)
        with torch.autocast(noisy.device.type, torch.bfloat16):
            return self._guess(noisy, time, attributes).float()

    def _guess(self, noisy: Tensor, time: Tensor, attributes: Tensor) -> Tensor:
        angles = time[:, None] * self._frequencies
        when = nn.functional.silu(self.time(torch.cat([angles.sin(), angles.cos()], dim=1)))
        waves = (noisy[:, : self.num_numeric, None] * self._waves).flatten(1)
        given = one_hot(attributes.index_select(1, self._free), self._sizes)
        hidden = self.inputs(torch.cat([noisy, waves.sin(), waves.cos(), given], dim=1))
        shifts = self.shifts(when).chunk(len(self.layers), dim=1)
        for layer, shift in zip(self.layers, shifts, strict=True):
            hidden = hidden + layer(nn.functional.silu(hidden + shift))
        output: Tensor = self.outputs(nn.functional.silu(hidden))
        return output


def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.zeros_(layer.bias)

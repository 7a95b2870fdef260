"""All parameters of a generator in one module: what sites train and exchange."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mcrage.data.transform import TableTransform
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.label import LabelModel
from mcrage.diffusion.tabular import DiffusionConfig
from mcrage.errors import ConfigError, ParameterError

_LARGEST_WEIGHT = 1e3
_LABEL_UNITS = 32
_ROWS_FOR_INTERACTIONS = 30_000  # with fewer, a logistic model alone ranks new patients better


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the network and its diffusion are; the same at every site.

    Attributes:
        width: Hidden units per layer.
        depth: Hidden layers.
        diffusion: Scales and weights of the diffusion.
    """

    width: int = 192
    depth: int = 3
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)

    def __post_init__(self) -> None:
        for name, value, largest in (("width", self.width, 4096), ("depth", self.depth, 32)):
            if not 1 <= value <= largest:
                raise ConfigError(f"{name} must be between 1 and {largest}, got {value}")


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
            LabelModel(
                layout,
                log_prior=transform.log_prior(),
                label_log_odds=transform.label_log_odds(),
                hidden=_LABEL_UNITS if transform.released_rows() >= _ROWS_FOR_INTERACTIONS else 0,
                generator=generator,
            )
            if layout.has_target
            else None
        )


def check_parameters(parameters: Mapping[str, NDArray[np.float32]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises unless every parameter is there, and nothing else, each float32, of its shape, finite and not huge.

    Raises:
        ParameterError: Naming the first parameter that is wrong, never a value of it.
    """
    missing, extra = sorted(set(shapes) - set(parameters)), sorted(set(parameters) - set(shapes))
    if missing:
        raise ParameterError("missing", f"parameters do not match: {len(missing)} missing {missing[:3]}")
    if extra:
        raise ParameterError("unknown", f"parameters do not match: {len(extra)} unknown")
    for name, shape in shapes.items():
        value = parameters[name]
        if value.dtype != np.float32 or value.shape != shape:
            fault = "shape" if value.dtype == np.float32 else "dtype"
            raise ParameterError(
                fault, f"parameter '{name}': expected float32 {shape}, got {value.dtype} {value.shape}"
            )
        if not np.isfinite(value).all():
            raise ParameterError("finite", f"parameter '{name}' has values that are not finite")
        if np.abs(value).max(initial=0.0) > _LARGEST_WEIGHT:
            raise ParameterError("size", f"parameter '{name}' has values beyond ±{_LARGEST_WEIGHT:g}")

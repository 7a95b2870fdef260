"""The spread of generated numbers, brought to the released one.

Numbers are encoded so that those of all sites together are normal. What a denoiser generates is a little narrower, and
so is short of values at the ends, where a column's bounds are. The quantiles of generated numbers give the monotone map
to normal ones. It reads no record.

Shape: numeric parts (rows, num_numeric); quantiles (num_numeric, knots).
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

KNOTS = torch.linspace(-2.4, 2.4, 49, dtype=torch.float64)
"""Where the quantiles are taken, as normal scores: the outermost 0.8 % on each side are moved as a whole."""

_FEWEST = 2000  # rows in which a number is there; fewer say too little of its ends


def measured(
    numeric: Float[Tensor, "rows num_numeric"], present: Bool[Tensor, "rows num_numeric"]
) -> Float[Tensor, "num_numeric knots"]:
    """Quantiles of generated numbers where they are there; those of a normal distribution where these are few."""
    at = torch.special.ndtr(KNOTS)
    parts = [KNOTS]
    for values, there in zip(numeric.double().T, present.T, strict=True):
        enough = int(there.sum()) >= _FEWEST
        parts.append(torch.quantile(values[there], at) if enough else KNOTS)
    return torch.stack(parts)[1:].float()


def normalised(
    numeric: Float[Tensor, "rows num_numeric"],
    quantiles: Float[Tensor, "num_numeric knots"],
    free: Bool[Tensor, "rows num_numeric"],
) -> Float[Tensor, "rows num_numeric"]:
    """Numbers moved so that these quantiles become normal ones; those that are not free stay as they are."""
    knots = KNOTS.numpy()
    moved = numeric.clone()
    for place, (values, at) in enumerate(zip(numeric.double().numpy().T, quantiles.double().numpy(), strict=True)):
        beyond = values - values.clip(at[0], at[-1])
        moved[:, place] = torch.from_numpy(np.interp(values, at, knots) + beyond).float()
    return torch.where(free, moved, numeric)

"""The diffusion model of the MCRAGE paper (arXiv 2310.18430) with its faults, to compare with.

Layers as wide as the table (nine), GELU on the output too, so that noise below −0.17 cannot be predicted; 75 steps of a
linear schedule from 1e-4 to 0.02, at whose end 46 % of the variance is still signal, although sampling starts from pure
noise; rows are neither kept in bounds nor rounded.

A reconstruction from these published settings: how the layers are joined and the learning rate are ours.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import gelu

from mcrage.rng import torch_stream

Floats = NDArray[np.float64]

STEPS = 75
BETA = (1e-4, 0.02)
BATCH_SIZE = 16
LEARNING_RATE = 1e-3
CONDITION_DROPOUT = 0.1


class ReleasedNetwork(nn.Module):
    """Four layers of the table's width; the label scales and the time shifts what goes up.

    Args:
        width: Columns of the table.
        generator: Draws the weights.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.time = nn.ModuleList([nn.Linear(1, width), nn.Linear(width, width)])
        self.label = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width)])
        for layer in (*self.down, *self.up, *self.time, *self.label):
            bound = layer.weight.shape[1] ** -0.5
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            nn.init.uniform_(layer.bias, -bound, bound, generator=generator)

    def forward(
        self, noisy: Float[Tensor, "rows width"], time: Float[Tensor, "rows 1"], label: Float[Tensor, "rows 2"]
    ) -> Float[Tensor, "rows width"]:
        """The predicted noise; ``time`` in (0, 1], ``label`` one-hot or zeros where it is not given."""
        first = gelu(self.down[0](noisy))
        second = gelu(self.down[1](first))
        shift = self.time[1](gelu(self.time[0](time)))
        scale = self.label[1](gelu(self.label[0](label)))
        raised = gelu(self.up[0](torch.cat([scale * second + shift, second], dim=1)))
        return gelu(self.up[1](torch.cat([raised, first], dim=1)))


def released_rows(rows: Floats, event: NDArray[np.bool_], num_rows: int, *, epochs: int, seed: int) -> Floats:
    """Rows with the event from a model trained on standardised rows.

    Args:
        rows: Numbers, shape (n, columns).
        event: Label of each row.
        num_rows: Rows to make.
        epochs: Passes over the rows; the paper takes 1,000.
        seed: Root of the draws.
    """
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    clean = torch.from_numpy((rows - mean) / spread).float()
    label = nn.functional.one_hot(torch.from_numpy(event.astype(np.int64)), 2).float()
    network = ReleasedNetwork(rows.shape[1], torch_stream(seed, "initialise"))
    _train(network, clean, label, epochs=epochs, generator=torch_stream(seed, "train"))
    made = _sample(network, num_rows, rows.shape[1], generator=torch_stream(seed, "sample"))
    return np.asarray(made.double().numpy() * spread + mean)


def signal_left() -> Float[Tensor, " steps"]:
    """Share of the variance that is signal after 0 to 75 steps (Ho et al., 2020, eq. 4)."""
    return torch.cumprod(1 - _betas(), dim=0)


def _betas() -> Tensor:
    return torch.cat([torch.zeros(1), torch.linspace(*BETA, STEPS)])


def _train(network: nn.Module, clean: Tensor, label: Tensor, *, epochs: int, generator: torch.Generator) -> None:
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    left = signal_left()
    signal, noise_level = left.sqrt(), (1 - left).sqrt()
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - epoch / epochs)
        order = torch.randperm(len(clean), generator=generator)
        step = torch.randint(1, STEPS + 1, (len(clean), 1), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        kept = (torch.rand(len(clean), 1, generator=generator) >= CONDITION_DROPOUT).float()
        noisy = signal[step] * clean[order] + noise_level[step] * noise
        given = label[order] * kept
        for start in range(0, len(clean), BATCH_SIZE):
            rows = slice(start, start + BATCH_SIZE)
            loss = nn.functional.mse_loss(network(noisy[rows], step[rows] / STEPS, given[rows]), noise[rows])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()


def _sample(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    num_rows: int,
    width: int,
    *,
    generator: torch.Generator,
) -> Tensor:
    """The ancestral sampler with the event as condition, without guidance (Ho et al., 2020, algorithm 2)."""
    beta, left = _betas(), signal_left()
    label = torch.tensor([[0.0, 1.0]]).expand(num_rows, 2)
    rows = torch.randn(num_rows, width, generator=generator)
    with torch.no_grad():
        for step in range(STEPS, 0, -1):
            time = torch.full((num_rows, 1), step / STEPS)
            noise = network(rows, time, label)
            rows = (rows - noise * beta[step] / (1 - left[step]).sqrt()) / (1 - beta[step]).sqrt()
            if step > 1:
                rows = rows + beta[step].sqrt() * torch.randn(rows.shape, generator=generator)
    return rows

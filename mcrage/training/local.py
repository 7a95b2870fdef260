"""Training on one table: the same steps at a hospital and in the pooled comparison.

Shape: rows are drawn as batches with replacement-free passes over the table; the learning rate depends on the global
step, so that many short local trainings follow one schedule.
"""

from collections.abc import Iterator

import torch

from mcrage.data.transform import EncodedTable
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.training.optimisers import Optimisers
from mcrage.training.optimisers import TrainingConfig as TrainingConfig


class Averaged:
    """Exponential moving average of parameters, with a decay that warms up so that short trainings are not held back.

    The decay at update k is min(decay, (1 + k) / (10 + k)).
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = [parameter.detach().clone() for parameter in module.parameters()]

    def update(self, module: torch.nn.Module) -> None:
        """Moves the average towards the module's parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.values, list(module.parameters()), 1.0 - decay)

    def copy_to(self, module: torch.nn.Module) -> None:
        """Sets the module's parameters to the average."""
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), self.values, strict=True):
                parameter.copy_(value)


def train_steps(
    network: RowNetwork,
    diffusion: TabularDiffusion,
    table: EncodedTable,
    *,
    config: TrainingConfig,
    steps: range,
    generator: torch.Generator,
) -> Iterator[float]:
    """Trains in place and gives the loss of each step; stop iterating to stop training.

    Args:
        network: Its parameters move.
        diffusion: Loss of its denoiser.
        table: Rows of one site.
        config: How parameters move.
        steps: Global numbers of the steps to take.
        generator: Draws batches, times, noise and open conditions.
    """
    moved = Optimisers(network, config)
    anchors = [part.values.detach().clone() for part in moved.parts] if config.proximal_mu else []
    batches = _batches(len(table), config.batch_size, generator)
    for step in steps:
        moved.zero()
        loss = _loss(network, diffusion, table.rows(next(batches)), generator)
        torch.autograd.backward(loss)
        for part, start in zip(moved.parts, anchors, strict=bool(anchors)):
            part.gradient.add_(part.values.detach() - start, alpha=config.proximal_mu)
        moved.denoiser.clip(config.clip_norm)
        moved.step(step)
        yield float(loss.detach())


def _loss(
    network: RowNetwork, diffusion: TabularDiffusion, batch: EncodedTable, generator: torch.Generator
) -> torch.Tensor:
    loss = diffusion.loss(network.denoiser, batch, generator).mean()
    return loss if network.label is None else loss + network.label.loss(batch).mean()


def _batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Row numbers of batch after batch: shuffled passes over the table, never a short batch."""
    left = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]

"""Training on one table: the same steps at a hospital and in the pooled comparison.

Shape: rows are drawn as batches with replacement-free passes over the table; the learning rate depends on the global
step, so that many short local trainings follow one schedule.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mcrage.data.transform import EncodedTable
from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How parameters move.

    Attributes:
        total_steps: Steps of the whole training, over which the learning rate falls to zero.
        batch_size: Rows per step.
        learning_rate: Highest learning rate of AdamW.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: AdamW's.
        clip_norm: Largest norm of a step's gradient.
        label_learning_rate: Highest learning rate of the label model, by gradient descent with momentum: Adam's steps,
            scaled by what each site sees, would not meet where the gradients of all sites cancel.
        interaction_learning_rate, interaction_decay: Highest learning rate and weight decay of AdamW for the label
            model's hidden layer, if it has one.
        proximal_mu: Weight of FedProx's pull towards the incoming parameters (Li et al., 2020, eq. 2).
        ema_decay: Decay of the averaged parameters in training without a federation.
    """

    total_steps: int
    batch_size: int = 512
    learning_rate: float = 5e-3
    warmup_steps: int = 200
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    label_learning_rate: float = 2e-3
    interaction_learning_rate: float = 1e-3
    interaction_decay: float = 1.0
    proximal_mu: float = 0.0
    ema_decay: float = 0.995

    def rate(self, step: int) -> float:
        """Share of the highest learning rate at a global step: linear warm-up, then linear decay."""
        warmup = max(min(self.warmup_steps, self.total_steps // 10), 1)
        return min((step + 1) / warmup, max(1.0 - step / self.total_steps, 0.0))


@dataclass(frozen=True)
class LocalUpdate:
    """What a site's training gives: trainable parameters by name, and the mean loss of its steps."""

    parameters: dict[str, NDArray[np.float32]]
    loss: float


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
    denoiser = _Flat(network.denoiser)
    optimisers = [(_adam(denoiser, config.weight_decay), config.learning_rate)]
    parts = [denoiser]
    if network.label is not None:
        parts.append(_Flat(network.label.weights))
        optimisers.append(_descent(parts[-1], config))
        if network.label.interactions is not None:
            parts.append(_Flat(network.label.interactions))
            optimisers.append((_adam(parts[-1], config.interaction_decay), config.interaction_learning_rate))
    anchors = [part.values.detach().clone() for part in parts] if config.proximal_mu else []
    batches = _batches(len(table), config.batch_size, generator)
    for step in steps:
        for part in parts:
            part.gradient.zero_()
        loss = _loss(network, diffusion, table.rows(next(batches)), generator)
        torch.autograd.backward(loss)
        for part, start in zip(parts, anchors, strict=bool(anchors)):
            part.gradient.add_(part.values.detach() - start, alpha=config.proximal_mu)
        denoiser.clip(config.clip_norm)
        for optimiser, highest in optimisers:
            optimiser.param_groups[0]["lr"] = highest * config.rate(step)
            optimiser.step()
        yield float(loss.detach())


class _Flat:
    """All parameters of a module in one vector, and their gradients in another.

    The module's parameters become views of it: one call instead of one per layer clips, and one moves them.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        parameters = list(module.parameters())
        self.values = torch.nn.Parameter(torch.nn.utils.parameters_to_vector(parameters).detach())
        self.gradient = self.values.grad = torch.zeros_like(self.values)
        torch.nn.utils.vector_to_parameters(self.values, parameters)
        parts = torch.split(self.gradient, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def clip(self, largest: float) -> None:
        """Shortens the gradient to this norm where it is longer."""
        self.gradient.mul_((largest / (self.gradient.norm() + 1e-6)).clamp_(max=1.0))


def _loss(
    network: RowNetwork, diffusion: TabularDiffusion, batch: EncodedTable, generator: torch.Generator
) -> torch.Tensor:
    loss = diffusion.loss(network.denoiser, batch, generator).mean()
    return loss if network.label is None else loss + network.label.loss(batch).mean()


def _adam(part: _Flat, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([part.values], weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)


def _descent(label: _Flat, config: TrainingConfig) -> tuple[torch.optim.Optimizer, float]:
    """Gradient descent with momentum, and its highest learning rate.

    Standardised inputs have a curvature of at most their number: steps beyond its inverse may diverge.
    """
    highest = min(config.label_learning_rate, 1.0 / label.values.numel())
    return torch.optim.SGD([label.values], lr=highest, momentum=0.9), highest


def _batches(rows: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Row numbers of batch after batch: shuffled passes over the table, never a short batch."""
    left = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(rows, generator=generator)])
        yield left[:batch_size]
        left = left[batch_size:]

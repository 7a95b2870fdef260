"""How parameters move, whatever their gradients come from: AdamW for the denoiser, descent for the label model.

Shape: all parameters of a part of the network are one vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mcrage.diffusion.network import RowNetwork


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


class Optimisers:
    """The parts of a network and what moves each of them.

    Args:
        network: Its parameters move, and hold their gradients in ``grad``.
        config: How.
    """

    def __init__(self, network: RowNetwork, config: TrainingConfig) -> None:
        self._config = config
        self.parts = [Flat(part) for part in parts_of(network)]
        self.denoiser, *of_label = self.parts
        self._optimisers = [(_adam(self.denoiser, config.weight_decay), config.learning_rate)]
        if of_label:
            self._optimisers.append(_descent(of_label[0], config))
        if of_label[1:]:
            self._optimisers.append((_adam(of_label[1], config.interaction_decay), config.interaction_learning_rate))

    def zero(self) -> None:
        """Forgets all gradients."""
        for part in self.parts:
            part.gradient.zero_()

    def step(self, step: int) -> None:
        """Moves all parameters, at the rate of a global step."""
        for optimiser, highest in self._optimisers:
            optimiser.param_groups[0]["lr"] = highest * self._config.rate(step)
            optimiser.step()

    def state(self) -> dict[str, NDArray[np.float32]]:
        """What the next step depends on besides parameters and gradients, as float32 arrays by name."""
        return {
            f"{number}/{name}": np.array(value.numpy())
            for number, (optimiser, _) in enumerate(self._optimisers)
            for name, value in optimiser.state_dict()["state"].get(0, {}).items()
        }

    def restore(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Goes on from what :meth:`state` gave."""
        for number, (optimiser, _) in enumerate(self._optimisers):
            prefix = f"{number}/"
            own = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            tensors = {name: torch.from_numpy(np.array(array)) for name, array in own.items()}
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": {0: tensors} if tensors else {}, "param_groups": groups})


def parts_of(network: RowNetwork) -> list[torch.nn.Module]:
    """What is moved each in its own way: the denoiser, then of the label model the weights and the hidden layer."""
    label = network.label
    of_label = [] if label is None else [label.weights, label.interactions]
    return [network.denoiser, *(part for part in of_label if part is not None)]


class Flat:
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


def _adam(part: Flat, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([part.values], weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)


def _descent(label: Flat, config: TrainingConfig) -> tuple[torch.optim.Optimizer, float]:
    """Gradient descent with momentum, and its highest learning rate.

    On n standardised inputs the cross-entropy has a curvature of at most n/4: from 8/n on steps may diverge.
    """
    highest = min(config.label_learning_rate, 4.0 / label.values.numel())
    return torch.optim.SGD([label.values], lr=highest, momentum=0.9), highest

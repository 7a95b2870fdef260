"""A step that all sites take together: their noisy sums, and the optimiser that moves the model by them."""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mcrage.diffusion.network import RowNetwork
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.privacy.noise import GaussianNoise
from mcrage.privacy.shared import SharedNoise
from mcrage.training.optimisers import Optimisers, parts_of
from mcrage.training.private import DPSGDConfig, PatientGradients, PatientRows, RoundKeys

LABEL_WEIGHT = 0.2
"""Of the label model's loss at the sites; its gradient is divided by it before the optimiser sees it.

Between .1, with which diabetes-130 came to less at ε = 3, and .3, with which the simulated cohort came to less:
one seed each (``docs/privacy-budget.md``)."""
LABEL_LEARNING_RATE = 0.01
"""Highest learning rate of the label model: steps are few, and each is of many patients."""


def noisy_sum(
    network: RowNetwork,
    diffusion: TabularDiffusion,
    rows: PatientRows,
    *,
    privacy: DPSGDConfig,
    shared: SharedNoise,
    keys: RoundKeys,
    step: int,
) -> NDArray[np.int64]:
    """A site's part of a step: the clipped gradients of its patients and its share of the noise, on the lattice.

    *Guarantee*: :class:`~mcrage.privacy.shared.SharedNoise`, for whoever sees the sum over all sites.

    Args:
        network: Its parameters stay, its gradients do not.
        diffusion: Loss of its denoiser.
        rows: Of the site's patients.
        privacy: Sampling and clipping; the noise is that of ``shared``, and the label's weight is :data:`LABEL_WEIGHT`.
        shared: The noise.
        keys: Of this request.
        step: Global number of the step.

    Returns:
        Steps of the lattice, one per parameter, in the order of :func:`~mcrage.training.optimisers.parts_of`.
    """
    network.zero_grad(set_to_none=False)  # they may be parts of one vector
    weighted = replace(privacy, label_weight=LABEL_WEIGHT)
    gradients = PatientGradients(network, diffusion, rows, privacy=weighted, key=keys.sampling)
    try:
        gradients.add(step)
    finally:
        gradients.close()
    parameters = [parameter for part in parts_of(network) for parameter in part.parameters()]
    summed = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    return shared.share(torch.nn.utils.parameters_to_vector(summed), GaussianNoise(keys.noise))


def num_gradients(network: RowNetwork) -> int:
    """How many numbers a site's part has."""
    return sum(parameter.numel() for part in parts_of(network) for parameter in part.parameters())


def descend(optimisers: Optimisers, mean_gradient: torch.Tensor, *, step: int) -> None:
    """Moves a network by a gradient in the order of :func:`noisy_sum`."""
    sizes = [len(part.gradient) for part in optimisers.parts]
    for part, gradient in zip(optimisers.parts, torch.split(mean_gradient, sizes), strict=True):
        part.gradient.copy_(gradient)
    for part in optimisers.parts[1:]:
        part.gradient.div_(LABEL_WEIGHT)
    optimisers.step(step)

"""Diffusion of whole rows: numeric parts as Gaussians, levels as categories.

Numeric parts are noised and their velocity is predicted (Salimans and Ho, 2022), which is the preconditioning of EDM
(Karras et al., 2022) for rows of unit variance. Levels are noised as scaled one-hot vectors, but predicted as
categories: a softmax per block with cross-entropy (Dieleman et al., 2022). The evidence that a noisy one-hot block
holds about its own level is known in closed form (Gaussian likelihoods) and is added to the logits, as are the
released marginals, so that the network learns only what the other columns say.

The number of a missing cell is 0 in a diffused row. Its expectation is then, exactly, the probability that the cell is
there times the expectation given that it is: the network predicts the latter, from rows in which the cell is there.

Shape: a row of ``layout.width`` numbers, numeric parts first, then one one-hot vector per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mcrage.data.transform import EncodedTable, Layout
from mcrage.diffusion.denoiser import Denoiser, one_hot
from mcrage.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is part of the model's definition besides its network.

    The scale of a one-hot vector sets the noise at which its level is decided: a long one while the rest of the row is
    still noise, a short one when the rest is nearly clean.

    Attributes:
        level_scale: Length of a one-hot vector before noise.
        missing_scale: The same for whether a number is missing, which is decided before the number is.
        level_weight: Weight of the mean cross-entropy over levels against the mean numeric loss.
        condition_dropout: Probability that a sensitive feature of the condition is left open in training (Ho and
            Salimans, 2022), each on its own.
        target_dropout: The same for the label.
        condition_free: Probability that the whole condition is left open.
    """

    level_scale: float = 2.0
    missing_scale: float = 4.0
    level_weight: float = 4.0
    condition_dropout: float = 0.1
    target_dropout: float = 0.5
    condition_free: float = 0.1


class TabularDiffusion:
    """Loss of a denoiser on rows, and its estimate of clean rows.

    Args:
        layout: Widths of the encoded row.
        log_prior: Log share of each level where marginals were released, zeros elsewhere; shape (sum of block sizes,).
        config: Scales and weights.
        schedule: Noise levels.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        log_prior: Float[Tensor, " levels"] | None = None,
        config: DiffusionConfig | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        self.layout = layout
        self.config = config or DiffusionConfig()
        self.schedule = schedule or NoiseSchedule()
        levels = sum(layout.block_sizes)
        self.log_prior = torch.zeros(levels) if log_prior is None else log_prior
        self.block_of_level = torch.repeat_interleave(
            torch.arange(len(layout.block_sizes)), torch.tensor(layout.block_sizes, dtype=torch.int64)
        )
        self._starts = torch.tensor(_starts(layout.block_sizes), dtype=torch.int64)
        self._missing_block = torch.tensor(layout.missing_block, dtype=torch.int64)
        self._can_miss = self._missing_block >= 0
        scales = torch.full((len(layout.block_sizes),), self.config.level_scale)
        scales[self._missing_block[self._can_miss]] = self.config.missing_scale
        self._level_weight = self.config.level_weight / max(len(scales), 1)
        self._scale = scales[self.block_of_level]
        self._offset = self.probabilities(self.log_prior[None])[0] * self._scale

    def clean(self, batch: EncodedTable) -> Float[Tensor, "batch width"]:
        """Rows as they are diffused: levels one-hot, scaled and centred on the prior."""
        return self._clean(batch, one_hot(batch.codes, self.layout.block_sizes))

    def loss(self, denoiser: Denoiser, batch: EncodedTable, generator: torch.Generator) -> Float[Tensor, " batch"]:
        """One loss per row at a random time: velocity error plus weighted cross-entropy.

        Both are means over the row's parts, so that tables of any width train with the same learning rate.
        """
        rows = len(batch)
        time = self.schedule.draw_times(rows, generator)
        noise = torch.randn(rows, self.layout.width, generator=generator)
        attributes = self.drop_conditions(batch.attributes, generator)
        return self.loss_at(denoiser, batch, time=time, noise=noise, attributes=attributes)

    def loss_at(
        self,
        denoiser: Denoiser,
        batch: EncodedTable,
        *,
        time: Float[Tensor, " batch"],
        noise: Float[Tensor, "batch width"],
        attributes: Int[Tensor, "batch num_attributes"],
    ) -> Float[Tensor, " batch"]:
        """The loss with time, noise and condition given by the caller."""
        signal, sigma = self.schedule.signal_noise(time)
        levels = one_hot(batch.codes, self.layout.block_sizes)
        clean = self._clean(batch, levels)
        noisy = signal * clean + sigma * noise
        split = self.layout.num_numeric
        evidence = self._evidence(noisy, time)
        output = denoiser(self._network_input(noisy, evidence), time, attributes)
        velocity = signal * noise[:, :split] - sigma * clean[:, :split]
        present = 1.0 - self._missing(levels)
        error = (present * (output[:, :split] - velocity) ** 2).sum(1) / max(split, 1)
        logits = evidence + output[:, split:]
        picked = logits.gather(1, batch.codes + self._starts)
        entropy = self._level_weight * (self._log_sum(logits) - picked).sum(1)
        return error + entropy

    def drop_conditions(
        self, attributes: Int[Tensor, "batch num_attributes"], generator: torch.Generator
    ) -> Int[Tensor, "batch num_attributes"]:
        """The condition with attributes left open at random, one by one and all at once."""
        rates = torch.full((attributes.shape[1],), self.config.condition_dropout)
        if self.layout.has_target:
            rates[-1] = self.config.target_dropout
        each = torch.rand(attributes.shape, generator=generator) < rates
        every = torch.rand(attributes.shape[0], 1, generator=generator) < self.config.condition_free
        return attributes.masked_fill(each | every, -1)

    def estimate(
        self,
        denoiser: Denoiser,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " batch"],
        attributes: Int[Tensor, "batch num_attributes"],
        *,
        guidance: float = 0.0,
    ) -> tuple[Float[Tensor, "batch num_numeric"], Float[Tensor, "batch levels"]]:
        """Expected clean numeric parts, given that they are there, and probabilities of levels.

        Guidance w moves the output by w times the difference between the conditional and the open one (Ho and
        Salimans, 2022); 0 asks the network once.
        """
        signal, sigma = self.schedule.signal_noise(time)
        split = self.layout.num_numeric
        evidence = self._evidence(noisy, time)
        inputs = self._network_input(noisy, evidence)
        output = denoiser(inputs, time, attributes)
        if guidance:
            output = output + guidance * (output - denoiser(inputs, time, torch.full_like(attributes, -1)))
        numeric = signal * noisy[:, :split] - sigma * output[:, :split]
        return numeric, self.probabilities(evidence + output[:, split:])

    def join(
        self, numeric: Float[Tensor, "batch num_numeric"], probabilities: Float[Tensor, "batch levels"]
    ) -> Float[Tensor, "batch width"]:
        """The diffused row that an estimate stands for: a number that may be missing counts for less by as much."""
        numeric = numeric * (1.0 - self._missing(probabilities))
        return torch.cat([numeric, probabilities * self._scale - self._offset], dim=1)

    def probabilities(self, logits: Float[Tensor, "batch levels"]) -> Float[Tensor, "batch levels"]:
        """Softmax within each block."""
        _, powers, sums = self._powers(logits)
        return powers / self._over_levels(sums)

    def _clean(self, batch: EncodedTable, levels: Float[Tensor, "batch levels"]) -> Float[Tensor, "batch width"]:
        return torch.cat([batch.numeric.float(), levels * self._scale - self._offset], dim=1)

    def _missing(self, probabilities: Float[Tensor, "batch levels"]) -> Float[Tensor, "batch num_numeric"]:
        """Probability that each number is missing."""
        missing = torch.zeros(probabilities.shape[0], self.layout.num_numeric)
        missing[:, self._can_miss] = probabilities[:, self._starts[self._missing_block[self._can_miss]] + 1]
        return missing

    def _evidence(
        self, noisy: Float[Tensor, "batch width"], time: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch levels"]:
        """Log of prior times likelihood of each level, up to a constant per block.

        log N(noisy; signal · scale · e_k, sigma²) differs between levels k only in noisy_k · signal · scale / sigma².
        """
        signal, sigma = self.schedule.signal_noise(time)
        shifted = noisy[:, self.layout.num_numeric :] + signal * self._offset
        return self.log_prior + shifted * (signal * self._scale / sigma**2)

    def _network_input(
        self, noisy: Float[Tensor, "batch width"], evidence: Float[Tensor, "batch levels"]
    ) -> Float[Tensor, "batch width"]:
        """Numeric parts as they are; levels as what each block says of itself, which takes most of the noise out."""
        return torch.cat([noisy[:, : self.layout.num_numeric], self.probabilities(evidence)], dim=1)

    def _log_sum(self, logits: Float[Tensor, "batch levels"]) -> Float[Tensor, "batch blocks"]:
        largest, _, sums = self._powers(logits)
        return largest + torch.log(sums)

    def _powers(
        self, logits: Float[Tensor, "batch levels"]
    ) -> tuple[Float[Tensor, "batch blocks"], Float[Tensor, "batch levels"], Float[Tensor, "batch blocks"]]:
        """The largest logit of each block, exponentials of logits less that, and their sum over each block."""
        shape = (logits.shape[0], len(self.layout.block_sizes))
        with torch.no_grad():  # it cancels; and with levels as rows, because torch reduces those far faster
            index = self.block_of_level[:, None].expand(logits.T.shape)
            start = torch.full(shape[::-1], -torch.inf)
            largest = start.scatter_reduce_(0, index, logits.T.contiguous(), "amax").T
        powers = torch.exp(logits - self._over_levels(largest))
        return largest, powers, torch.zeros(shape).index_add_(1, self.block_of_level, powers)

    def _over_levels(self, per_block: Float[Tensor, "batch blocks"]) -> Float[Tensor, "batch levels"]:
        """What holds for a block, at each of its levels."""
        return per_block.index_select(1, self.block_of_level)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:place]) for place in range(len(sizes))]

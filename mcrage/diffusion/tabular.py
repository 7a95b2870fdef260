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

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mcrage.data.transform import EncodedTable, Layout
from mcrage.diffusion.blocks import LOGIT_LIMIT, Blocks, keep_constants
from mcrage.diffusion.denoiser import Denoiser
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
        condition_dropout: Probability that an attribute is left open in training (Ho and Salimans, 2022), each on its
            own.
    """

    level_scale: float = 2.0
    missing_scale: float = 4.0
    level_weight: float = 4.0
    condition_dropout: float = 0.5


_LEVEL_SPREAD = 0.5  # standard deviation of a frequent level in the network's input
_RARE = 0.01  # added to a level's variance: one that hardly occurs is not blown up without limit
_CERTAIN = 30.0  # evidence beyond ± this says no more: e^-60 is the chance that it is wrong


class TabularDiffusion(nn.Module):
    """Loss of a denoiser on rows, and its estimate of clean rows; a module without parameters.

    Args:
        layout: Widths of the encoded row.
        log_prior: Log share of each level where marginals were released, zeros elsewhere; shape (sum of block sizes,).
        config: Scales and weights.
        schedule: Noise levels.
    """

    log_prior: Tensor
    _can_miss: Tensor
    _may_miss: Tensor
    _scale_of_block: Tensor
    _scale: Tensor
    _per_spread: Tensor
    _centre: Tensor

    def __init__(
        self,
        layout: Layout,
        *,
        log_prior: Float[Tensor, " levels"] | None = None,
        config: DiffusionConfig | None = None,
        schedule: NoiseSchedule | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.config = config or DiffusionConfig()
        self.schedule = schedule or NoiseSchedule()
        self.blocks = Blocks(layout.block_sizes)
        log_prior = torch.zeros(self.blocks.levels) if log_prior is None else log_prior
        missing_block = torch.tensor(layout.missing_block, dtype=torch.int64)
        may_miss = missing_block[missing_block >= 0]
        scales = torch.full((self.blocks.number,), self.config.level_scale)
        scales[may_miss] = self.config.missing_scale
        share = self.blocks.softmax(log_prior[None])[0]
        per_spread = _LEVEL_SPREAD * (share * (1 - share) + _RARE).rsqrt()
        keep_constants(
            self,
            log_prior=log_prior,
            _can_miss=torch.nonzero(missing_block >= 0)[:, 0],
            _may_miss=may_miss,
            _scale_of_block=scales,
            _scale=scales[self.blocks.of_level],
            _per_spread=per_spread,
            _centre=share * per_spread,
        )

    def clean(self, batch: EncodedTable) -> Float[Tensor, "batch width"]:
        """Rows as they are diffused: numbers, and levels as scaled one-hot vectors."""
        levels = torch.zeros(len(batch), self.blocks.levels)
        levels.scatter_(1, self.blocks.places(batch.codes), self._scale_of_block.expand(batch.codes.shape))
        return torch.cat([batch.numeric.float(), levels], dim=1)

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
        split = self.layout.num_numeric
        numeric = batch.numeric.float()
        places = self.blocks.places(batch.codes)
        noisy = sigma * noise
        noisy[:, :split].addcmul_(signal, numeric)
        noisy[:, split:].scatter_add_(1, places, signal * self._scale_of_block)
        evidence = self._evidence(noisy, time, attributes)
        output = denoiser(self._network_input(noisy, evidence), time, attributes)
        velocity = signal * noise[:, :split] - sigma * numeric
        present = self.present(batch.codes)
        loss: Tensor = _RowLoss.apply(output, evidence, velocity, present, places, self)  # type: ignore[no-untyped-call]
        return loss

    def drop_conditions(
        self, attributes: Int[Tensor, "batch num_attributes"], generator: torch.Generator
    ) -> Int[Tensor, "batch num_attributes"]:
        """The condition with attributes left open at random, each on its own."""
        return self.open_conditions(attributes, torch.rand(attributes.shape, generator=generator))

    def open_conditions(
        self, attributes: Int[Tensor, "batch num_attributes"], uniform: Float[Tensor, "batch num_attributes"]
    ) -> Int[Tensor, "batch num_attributes"]:
        """The condition with those attributes left open whose uniform number is small."""
        return attributes.masked_fill(uniform < self.config.condition_dropout, -1)

    def estimate(
        self,
        denoiser: Denoiser,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " #batch"],
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
        evidence = self._evidence(noisy, time, attributes)
        output = denoiser(self._network_input(noisy, evidence), time, attributes)
        if guidance:
            nothing = torch.full_like(attributes, -1)
            unguided = self._network_input(noisy, self._evidence(noisy, time, nothing))
            output = output + guidance * (output - denoiser(unguided, time, nothing))
        numeric = signal * noisy[:, :split] - sigma * output[:, :split]
        return numeric, self.blocks.softmax(evidence.add_(output[:, split:]))

    def join(
        self, numeric: Float[Tensor, "batch num_numeric"], probabilities: Float[Tensor, "batch levels"]
    ) -> Float[Tensor, "batch width"]:
        """The diffused row that an estimate stands for: a number that may be missing counts for less by as much."""
        split = self.layout.num_numeric
        row = torch.empty(len(numeric), self.layout.width)
        row[:, :split] = numeric
        torch.mul(probabilities, self._scale, out=row[:, split:])
        if len(self._may_miss):
            missing = probabilities[:, self.blocks.starts[self._may_miss] + 1]
            row[:, :split][:, self._can_miss] *= 1.0 - missing
        return row

    def present(self, codes: Int[Tensor, "batch num_blocks"]) -> Float[Tensor, "batch num_numeric"]:
        """1 where a number is there, 0 where it is missing."""
        present = torch.ones(len(codes), self.layout.num_numeric)
        if len(self._may_miss):
            present[:, self._can_miss] = 1.0 - codes[:, self._may_miss].float()
        return present

    def _evidence(
        self,
        noisy: Float[Tensor, "batch width"],
        time: Float[Tensor, " #batch"],
        attributes: Int[Tensor, "batch num_attributes"],
    ) -> Float[Tensor, "batch levels"]:
        """Log of prior times likelihood of each level, up to a constant per block.

        log N(noisy; signal · scale · e_k, sigma²) differs between levels k only in noisy_k · signal · scale / sigma².
        From each is taken what lies half-way between a level that is the row's and one that is not, so that all are
        within reach of a float32 exponential, and what is beyond doubt is cut off.

        A level that the condition gives is beyond doubt at any time. To the network a condition is nothing else than a
        block without noise: what it learns from rows of open condition serves the conditional ones, and vice versa.
        """
        signal, sigma = self.schedule.signal_noise(time)
        length = signal * self._scale
        per_unit = length / sigma**2
        likelihood = torch.addcmul(-0.5 * length * per_unit, noisy[:, self.layout.num_numeric :], per_unit)
        evidence = likelihood.clamp_(-_CERTAIN, _CERTAIN).add_(self.log_prior)
        for place, block in enumerate(self.layout.attribute_block):
            if block >= 0:
                own = self.blocks.slices[block]
                given = attributes[:, place : place + 1]
                certain = torch.where(given == torch.arange(self.blocks.sizes[block]), _CERTAIN, -_CERTAIN)
                part = evidence[:, own]
                torch.where(given < 0, part, certain, out=part)
        return evidence

    def _network_input(
        self, noisy: Float[Tensor, "batch width"], evidence: Float[Tensor, "batch levels"]
    ) -> Float[Tensor, "batch width"]:
        """Numeric parts as they are; levels as what each block says of itself, which takes most of the noise out.

        Levels are standardised, so that a rare one is not a faint one.
        """
        split, seen = self.layout.num_numeric, torch.empty(len(evidence), self.layout.width)
        seen[:, :split] = noisy[:, :split]
        torch.mul(self.blocks.softmax(evidence), self._per_spread, out=seen[:, split:]).sub_(self._centre)
        return seen


class _RowLoss(torch.autograd.Function):
    """Squared error of velocities and cross-entropy of levels, one number per row, with its gradient in closed form.

    The gradient with respect to a block's logits is (probabilities − one-hot); written out here it takes a fifth of
    the passes over memory that automatic differentiation makes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Float[Tensor, "batch width"],
        evidence: Float[Tensor, "batch levels"],
        velocity: Float[Tensor, "batch num_numeric"],
        present: Float[Tensor, "batch num_numeric"],
        places: Int[Tensor, "batch num_blocks"],
        diffusion: TabularDiffusion,
    ) -> Float[Tensor, " batch"]:
        split, blocks = velocity.shape[1], diffusion.blocks
        weight = diffusion.config.level_weight / max(blocks.number, 1)
        gradient = torch.empty_like(output)
        difference = present * (output[:, :split] - velocity)
        torch.mul(difference, 2.0 / max(split, 1), out=gradient[:, :split])
        logits = evidence + output[:, split:]
        picked = logits.gather(1, places).clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
        powers = blocks.powers(logits)
        sums = blocks.sums(powers)
        torch.mul(powers, blocks.spread(weight / sums), out=gradient[:, split:])
        gradient[:, split:].scatter_add_(1, places, torch.full(places.shape, -weight))
        ctx.save_for_backward(gradient)
        entropy = weight * (sums.log() - picked).sum(1)
        return (difference**2).sum(1) / max(split, 1) + entropy

    @staticmethod
    def backward(ctx: Any, upstream: Float[Tensor, " batch"]) -> Any:
        (gradient,) = ctx.saved_tensors
        return upstream[:, None] * gradient, None, None, None, None, None

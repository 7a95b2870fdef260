"""Arithmetic on levels: one block per categorical part of a row, all side by side.

Sums over each block are one product with a 0/1 matrix, and logits are bounded instead of centred on each block's
largest: a loop or a reduction per block would cost as much as a layer of the network.

Shape: (rows, levels) for what holds for a level, (rows, blocks) for what holds for a block.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LOGIT_LIMIT = 60.0
"""Logits beyond ± this count as this: e^60 is still finite in float32, and so is a sum of them."""


_BELOW_ONE = 1 - 1e-12  # keeps the product of a uniform number and a block's total below that total after rounding


class Blocks(nn.Module):
    """The levels of all blocks of a row; a module without parameters, so that its constants move with a model.

    Args:
        sizes: Number of levels of each block.
    """

    of_level: Tensor
    starts: Tensor
    _last: Tensor
    _indicator: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.slices = tuple(slice(sum(self.sizes[:k]), sum(self.sizes[: k + 1])) for k in range(len(self.sizes)))
        counts = torch.tensor(self.sizes, dtype=torch.int64)
        self.number = len(self.sizes)
        self.levels = sum(self.sizes)
        of_level = torch.repeat_interleave(torch.arange(self.number), counts)
        indicator = torch.zeros(self.levels, self.number)
        indicator[torch.arange(self.levels), of_level] = 1.0
        keep_constants(
            self, of_level=of_level, starts=torch.cumsum(counts, 0) - counts, _last=counts - 1, _indicator=indicator
        )

    def places(self, codes: Int[Tensor, "rows blocks"]) -> Int[Tensor, "rows blocks"]:
        """Where each block's level stands among all levels."""
        return codes + self.starts

    def sums(self, values: Float[Tensor, "rows levels"]) -> Float[Tensor, "rows blocks"]:
        """Sums over each block."""
        return values @ self._indicator

    def spread(self, values: Float[Tensor, "rows blocks"]) -> Float[Tensor, "rows levels"]:
        """What holds for a block, at each of its levels."""
        return values.index_select(1, self.of_level)

    def powers(self, logits: Float[Tensor, "rows levels"]) -> Float[Tensor, "rows levels"]:
        """Exponentials of bounded logits."""
        return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp_()

    def softmax(self, logits: Float[Tensor, "rows levels"]) -> Float[Tensor, "rows levels"]:
        """Probabilities within each block."""
        powers = self.powers(logits)
        return powers.mul_(self.spread(self.sums(powers).reciprocal_()))

    def draw(
        self, probabilities: Float[Tensor, "rows levels"], generator: torch.Generator
    ) -> Int[Tensor, "rows blocks"]:
        """One level per block, drawn at its probabilities; a level of probability 0 is never drawn.

        All blocks at once: a level is the number of levels of its block whose cumulative probability a uniform number
        reaches. In float64, where equal cumulative sums stay equal.
        """
        below = probabilities.double().cumsum(1)
        before = torch.nn.functional.pad(below, (1, 0)).index_select(1, self.starts)
        totals = below.index_select(1, self.starts + self._last) - before
        uniform = torch.rand(totals.shape, generator=generator, dtype=torch.float64).mul_(_BELOW_ONE)
        reached = below <= (before + uniform * totals).index_select(1, self.of_level)
        return torch.minimum(self.sums(reached.float()).long(), self._last)


def keep_constants(module: nn.Module, **tensors: Tensor) -> None:
    """Attributes of a module that move with it to another device and are no part of its state."""
    for name, value in tensors.items():
        module.register_buffer(name, value, persistent=False)


def one_hot(codes: Int[Tensor, "rows blocks"], sizes: Sequence[int]) -> Float[Tensor, "rows levels"]:
    """All blocks one-hot side by side; a code of −1 gives zeros."""
    starts = torch.tensor([sum(sizes[:place]) for place in range(len(sizes))], dtype=torch.int64)
    width = sum(sizes)
    flat = torch.where(codes < 0, width, codes + starts)
    out = torch.zeros(codes.shape[0], width + 1)
    return out.scatter_(1, flat, 1.0)[:, :width]

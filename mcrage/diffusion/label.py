"""The label of a row, drawn last: a logistic model of everything else.

A generator that helps a hospital's model has to know how the label depends on the row better than the hospital does.
A deep network that sees some thousand rows hundreds of times knows it worse than a logistic regression; a logistic
model trained by all hospitals knows it as well as one that was fitted to their pooled rows. So rows are diffused
without their label, and the label is drawn from this model unless it was asked for.

Shape: codes (rows, B) and covariates (rows, C) give one logit per row, of the label's second level.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mcrage.data.transform import EncodedTable, Layout
from mcrage.diffusion.blocks import Blocks

_RARE = 0.01  # added to a level's variance: the weight of a level that hardly occurs stays moderate


class LabelModel(nn.Module):
    """Logistic regression on standardised levels and covariates; no weight has been learned at first.

    Args:
        layout: Widths of the encoded row.
        log_prior: Log share of each level of each block.
        label_log_odds: Log odds of the label's second level over all rows.
    """

    def __init__(self, layout: Layout, *, log_prior: Float[Tensor, " levels"], label_log_odds: float) -> None:
        super().__init__()
        self._blocks = Blocks(layout.block_sizes)
        self._share = log_prior.exp()
        self._scale = (self._share * (1 - self._share) + _RARE).rsqrt()
        self._log_odds = label_log_odds
        self.weights = nn.Linear(layout.num_covariates + sum(layout.block_sizes), 1)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)

    def forward(
        self, codes: Int[Tensor, "rows num_blocks"], covariates: Float[Tensor, "rows num_covariates"]
    ) -> Float[Tensor, " rows"]:
        """Log odds of the label's second level."""
        of_covariates, of_levels = torch.split(self.weights.weight[0], [covariates.shape[1], self._blocks.levels])
        per_level = of_levels * self._scale
        places = self._blocks.places(codes)
        levels = per_level.index_select(0, places.flatten()).view(places.shape).sum(1)
        return covariates @ of_covariates + levels + (self.weights.bias - self._share @ per_level + self._log_odds)

    def loss(self, batch: EncodedTable) -> Float[Tensor, " rows"]:
        """Cross-entropy of every row's label."""
        labels = batch.attributes[:, -1].float()
        logits = self(batch.codes, batch.covariates)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")

    def draw(
        self,
        codes: Int[Tensor, "rows num_blocks"],
        covariates: Float[Tensor, "rows num_covariates"],
        generator: torch.Generator,
    ) -> Int[Tensor, " rows"]:
        """One label per row, drawn at its probability."""
        probability = torch.sigmoid(self(codes, covariates))
        return (torch.rand(len(codes), generator=generator) < probability).long()

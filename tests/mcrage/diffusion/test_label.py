import math

import pytest
import torch

from mcrage.data.transform import EncodedTable, Layout
from mcrage.diffusion.label import LabelModel

LAYOUT = Layout(
    num_numeric=1,
    block_sizes=(2, 3),
    attribute_sizes=(2,),
    missing_block=(-1,),
    attribute_block=(-1,),
    num_covariates=4,
    has_target=True,
)
SHARES = torch.tensor([0.5, 0.5, 0.9, 0.09, 0.01])


def label_model(log_odds: float = 0.0) -> LabelModel:
    return LabelModel(LAYOUT, log_prior=SHARES.log(), label_log_odds=log_odds)


def rows(count: int, seed: int = 0) -> EncodedTable:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, size, (count,), generator=draw) for size in LAYOUT.block_sizes], dim=1)
    labels = torch.randint(0, 2, (count, 1), generator=draw)
    return EncodedTable(torch.zeros(count, 1), codes, labels, torch.randn(count, 4, generator=draw))


def test_untrained_it_draws_the_label_at_the_rate_of_the_histogram() -> None:
    batch = rows(20_000)
    drawn = label_model(math.log(0.2 / 0.8)).draw(batch.codes, batch.covariates, torch.Generator().manual_seed(0))
    assert float(drawn.float().mean()) == pytest.approx(0.2, abs=0.012)  # four standard errors
    assert drawn.unique().tolist() == [0, 1]


def test_its_loss_is_the_cross_entropy_of_every_row() -> None:
    model, batch = label_model(0.3), rows(50)
    torch.nn.init.normal_(model.weights.weight, generator=torch.Generator().manual_seed(0))
    probability = torch.sigmoid(model(batch.codes, batch.covariates))
    label = batch.attributes[:, 0]
    expected = -torch.where(label == 1, probability, 1 - probability).log()
    assert torch.allclose(model.loss(batch), expected, atol=1e-5)


def test_it_recovers_the_odds_that_labels_were_drawn_at() -> None:
    model, batch = label_model(), rows(20_000)
    truth = 0.8 * batch.covariates[:, 0] - 0.5 * batch.covariates[:, 3] + 1.0 * (batch.codes[:, 0] == 1) - 0.5
    labels = torch.rand(20_000, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(truth)
    batch = EncodedTable(batch.numeric, batch.codes, labels.long()[:, None], batch.covariates)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(1500):
        optimiser.zero_grad()
        torch.autograd.backward(model.loss(batch).mean())
        optimiser.step()
    error = (model(batch.codes, batch.covariates) - truth).detach()
    assert float(error.abs().mean()) < 0.06


def test_a_rare_level_weighs_more_than_a_common_one_but_not_without_limit() -> None:
    model = label_model()
    torch.nn.init.ones_(model.weights.weight)
    nothing = torch.zeros(3, 4)
    logits = model(torch.tensor([[0, 0], [0, 1], [0, 2]]), nothing).detach()
    assert float(logits[2] - logits[1]) > float(logits[1] - logits[0]) > 0
    assert float(logits.max()) < 15


def test_with_a_hidden_layer_that_has_learned_nothing_it_says_the_same_as_without() -> None:
    """The two ways to add up a row's levels agree, and the hidden layer sees the row."""
    draw, batch = torch.Generator().manual_seed(0), rows(200)
    plain = label_model(0.3)
    deep = LabelModel(LAYOUT, log_prior=SHARES.log(), label_log_odds=0.3, hidden=4, generator=draw)
    torch.nn.init.normal_(plain.weights.weight, generator=draw)
    torch.nn.init.constant_(plain.weights.bias, 0.7)
    deep.weights.load_state_dict(plain.weights.state_dict())
    expected = plain(batch.codes, batch.covariates)
    assert torch.allclose(deep(batch.codes, batch.covariates), expected, atol=1e-5)
    assert deep.interactions is not None
    torch.nn.init.ones_(deep.interactions[2].weight)
    assert not torch.allclose(deep(batch.codes, batch.covariates), expected, atol=1e-3)

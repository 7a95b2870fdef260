import pytest
import torch

from mcrage.diffusion.blocks import Blocks, one_hot

SIZES = (3, 1, 4)


def logits(rows: int = 50, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, sum(SIZES), generator=torch.Generator().manual_seed(0))


def test_probabilities_are_the_softmax_of_each_block() -> None:
    values = logits()
    expected = torch.cat([part.softmax(1) for part in values.split(SIZES, dim=1)], dim=1)
    assert torch.allclose(Blocks(SIZES).softmax(values), expected, atol=1e-6)


def test_probabilities_of_extreme_logits_are_finite_and_sum_to_one() -> None:
    probabilities = Blocks(SIZES).softmax(logits(spread=1e4))
    assert torch.isfinite(probabilities).all()
    for part in probabilities.split(SIZES, dim=1):
        assert torch.allclose(part.sum(1), torch.ones(50), atol=1e-5)


def test_sums_are_spread_back_over_the_levels_that_they_came_from() -> None:
    blocks, values = Blocks(SIZES), logits()
    sums = blocks.sums(values)
    assert torch.allclose(sums, torch.stack([part.sum(1) for part in values.split(SIZES, dim=1)], dim=1), atol=1e-5)
    assert blocks.spread(sums)[0].tolist() == [float(sums[0, k]) for k in (0, 0, 0, 1, 2, 2, 2, 2)]


def test_levels_are_drawn_at_their_probabilities() -> None:
    shares = torch.tensor([0.6, 0.3, 0.1, 1.0, 0.25, 0.25, 0.0, 0.5])
    drawn = Blocks(SIZES).draw(shares.expand(50_000, 8), torch.Generator().manual_seed(0))
    found = one_hot(drawn, SIZES).mean(0)
    assert torch.allclose(found, shares, atol=0.009)  # four standard errors


@pytest.mark.parametrize("level", range(4))
def test_a_level_without_probability_is_never_drawn(level: int) -> None:
    probabilities = torch.rand(200_000, 8, generator=torch.Generator().manual_seed(1)) + 1e-6
    probabilities[:, 4:] = 0.0
    probabilities[:, 4 + level] = 1.0
    drawn = Blocks(SIZES).draw(probabilities, torch.Generator().manual_seed(2))
    assert (drawn[:, 2] == level).all()
    assert (drawn[:, 1] == 0).all()


def test_blocks_are_drawn_independently_of_each_other() -> None:
    drawn = Blocks((2, 2)).draw(torch.full((50_000, 4), 0.5), torch.Generator().manual_seed(0)).double()
    # the correlation of independent levels has a standard error of .0045; four of them
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.018


def test_a_table_without_levels_has_nothing_to_draw() -> None:
    assert Blocks(()).draw(torch.zeros(5, 0), torch.Generator().manual_seed(0)).shape == (5, 0)


def test_an_open_code_is_all_zeros_one_hot() -> None:
    assert one_hot(torch.tensor([[1, -1]]), (3, 2)).tolist() == [[0, 1, 0, 0, 0]]

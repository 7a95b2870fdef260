import torch

from mcrage.diffusion.quantiles import KNOTS, measured, normalised

DRAW = torch.Generator().manual_seed(0)
NUMBERS = torch.randn(20_000, 3, generator=DRAW)
NARROW = torch.stack([0.8 * NUMBERS[:, 0] + 0.1, NUMBERS[:, 1].tanh(), NUMBERS[:, 2]], dim=1)
EVERYWHERE = torch.ones(20_000, 3, dtype=torch.bool)


def test_narrow_and_skewed_numbers_become_normal_where_they_are_free() -> None:
    free = EVERYWHERE.clone()
    free[:10_000] = False
    moved = normalised(NARROW, measured(NARROW, EVERYWHERE), free)
    assert torch.equal(moved[:10_000], NARROW[:10_000])
    at = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99])
    found = torch.quantile(moved[10_000:], at, dim=0)
    wanted = torch.special.ndtri(at)[:, None]
    assert (torch.quantile(NARROW, at, dim=0)[:, :2] - wanted).abs().max() > 0.4, "the check must be able to fail"
    assert (found - wanted).abs().max() < 0.12  # four standard errors of the outer quantiles, in 10,000 rows


def test_numbers_keep_their_order_beyond_the_measured_ones_too() -> None:
    quantiles = measured(NARROW, EVERYWHERE)
    values = torch.linspace(-6, 6, 500)[:, None].expand(-1, 3)
    moved = normalised(values, quantiles, torch.ones(500, 3, dtype=torch.bool))
    assert (moved.diff(dim=0) > 0).all()


def test_missing_cells_say_nothing_and_too_few_numbers_change_nothing() -> None:
    numbers, present = NARROW.clone(), EVERYWHERE.clone()
    numbers[:5000, 0], present[:5000, 0] = 0.0, False
    present[1000:, 1] = False
    quantiles = measured(numbers, present)
    assert torch.allclose(quantiles[0], measured(NARROW[5000:], EVERYWHERE[5000:])[0])
    assert torch.equal(quantiles[1], KNOTS.float())

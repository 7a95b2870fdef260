import numpy as np
import pytest
import torch

from mcrage.data.transform import EncodedTable, Layout
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.tabular import TabularDiffusion
from mcrage.training.local import Averaged, TrainingConfig, train_steps

LAYOUT = Layout(num_numeric=1, block_sizes=(2,), attribute_sizes=(2,), missing_block=(-1,))


def table(rows: int = 64) -> EncodedTable:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (rows, 1), generator=draw)
    return EncodedTable(2.0 * codes - 1.0, codes, codes)


def network() -> MLPDenoiser:
    return MLPDenoiser(LAYOUT, width=16, depth=1, generator=torch.Generator().manual_seed(0))


def train(module: MLPDenoiser, *, steps: range = range(40), **settings: float) -> list[float]:
    config = TrainingConfig(total_steps=100, batch_size=32, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    return list(train_steps(module, TabularDiffusion(LAYOUT), table(), config=config, steps=steps, generator=generator))


def flat(module: MLPDenoiser) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_training_lowers_the_loss() -> None:
    losses = train(network(), steps=range(100))
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:10])


def test_the_same_seed_gives_the_same_bytes() -> None:
    first, second = network(), network()
    train(first)
    train(second)
    assert torch.equal(flat(first), flat(second))


def test_a_proximal_term_holds_parameters_near_where_they_came_from() -> None:
    start = flat(network())
    moved = {}
    for mu in (0.0, 1.0, 100.0):
        module = network()
        train(module, proximal_mu=mu)
        moved[mu] = float((flat(module) - start).norm())
    assert moved[0.0] > moved[1.0] > moved[100.0]


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    config = TrainingConfig(total_steps=1000, warmup_steps=100, learning_rate=1.0)
    rates = [config.rate(step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(0.9, abs=0.02)
    assert rates[1000] == 0.0
    peak = rates.index(max(rates))
    assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)


def test_a_batch_larger_than_the_table_repeats_rows() -> None:
    config = TrainingConfig(total_steps=2, batch_size=100)
    generator = torch.Generator().manual_seed(0)
    losses = train_steps(
        network(), TabularDiffusion(LAYOUT), table(7), config=config, steps=range(2), generator=generator
    )
    assert len(list(losses)) == 2


def test_the_average_follows_a_constant_and_forgets_the_start() -> None:
    module = network()
    average = Averaged(module, decay=0.9)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(3.0)
    for _ in range(200):
        average.update(module)
    average.copy_to(module)
    assert torch.allclose(flat(module), torch.full_like(flat(module), 3.0), atol=1e-4)

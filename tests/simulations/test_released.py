import numpy as np
import pytest
import torch

from simulations.released import BETA, STEPS, ReleasedNetwork, released_rows, signal_left


def test_the_released_schedule_never_reaches_noise() -> None:
    beta = np.linspace(*BETA, STEPS)
    assert float(signal_left()[-1]) == pytest.approx(np.prod(1 - beta), rel=1e-5)
    assert 0.45 < float(signal_left()[-1]) < 0.47


def test_the_released_network_cannot_predict_noise_far_below_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    network = ReleasedNetwork(9, generator)
    noise = network(10 * torch.randn(500, 9, generator=generator), torch.rand(500, 1), torch.zeros(500, 2))
    assert noise.shape == (500, 9)
    assert float(noise.detach().min()) > -0.1701
    assert float(noise.detach().max()) > 0.1


def test_released_rows_are_reproducible_and_follow_the_table_roughly() -> None:
    draw = np.random.default_rng(0)
    event = draw.random(400) < 0.5
    rows = np.column_stack([draw.normal(100 + 30 * event, 10), draw.normal(5, 1, 400)])
    made, again = (released_rows(rows, event, 300, epochs=8, seed=1) for _ in range(2))
    np.testing.assert_array_equal(made, again)
    assert made.shape == (300, 2)
    assert abs(made[:, 1].mean() - 5) < 2
    assert not np.array_equal(made, released_rows(rows, event, 300, epochs=8, seed=2))

import pytest
import torch
from torch import Tensor

from mcrage.data.transform import Constraint, Layout
from mcrage.diffusion.sampling import Estimate, ancestral, dpm_solver, guided_estimate
from mcrage.diffusion.tabular import DiffusionConfig, TabularDiffusion

LAYOUT = Layout(num_numeric=1, block_sizes=(3,), attribute_sizes=(), missing_block=(-1,), attribute_block=())
MEAN, SPREAD = 1.5, 0.5
SHARES = torch.tensor([0.6, 0.3, 0.1])


def exact(diffusion: TabularDiffusion) -> Estimate:
    """The true conditional expectation for one normal column and one block that are independent."""

    def estimate(noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        signal, sigma = diffusion.schedule.signal_noise(time)
        gain = signal * SPREAD**2 / (signal**2 * SPREAD**2 + sigma**2)
        numeric = MEAN + gain * (noisy[:, :1] - signal * MEAN)
        evidence = noisy[:, 1:] * signal / sigma**2
        return numeric, torch.softmax(SHARES.log() + evidence, dim=1)

    return estimate


@pytest.mark.parametrize(("sampler", "steps"), [(dpm_solver, 10), (dpm_solver, 20), (ancestral, 200)])
def test_with_the_exact_estimate_samples_have_the_true_distribution(sampler: object, steps: int) -> None:
    diffusion = TabularDiffusion(LAYOUT, config=DiffusionConfig(level_scale=1.0))
    generator = torch.Generator().manual_seed(0)
    z, codes = sampler(exact(diffusion), diffusion, rows=20_000, steps=steps, generator=generator)  # type: ignore[operator]
    # four standard errors are .014 for the mean and for shares, .010 for the spread; the rest is discretisation
    assert float(z.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(z.std()) == pytest.approx(SPREAD, abs=0.03)
    shares = torch.bincount(codes[:, 0], minlength=3) / 20_000
    assert torch.allclose(shares, SHARES, atol=0.03)


def test_the_distribution_test_has_power_against_a_wrong_spread() -> None:
    diffusion = TabularDiffusion(LAYOUT, config=DiffusionConfig(level_scale=1.0))

    def shrunk(noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        numeric, probabilities = exact(diffusion)(noisy, time)
        return MEAN + 0.8 * (numeric - MEAN), probabilities

    z, _ = dpm_solver(shrunk, diffusion, rows=20_000, steps=20, generator=torch.Generator().manual_seed(0))
    assert abs(float(z.std()) - SPREAD) > 0.03


@pytest.mark.parametrize("sampler", [dpm_solver, ancestral])
def test_constraints_hold_exactly(sampler: object) -> None:
    diffusion = TabularDiffusion(LAYOUT, config=DiffusionConfig(level_scale=1.0))
    codes = torch.tensor([[2], [-1], [0]])
    constraint = Constraint(
        attributes=torch.zeros(3, 0, dtype=torch.int64),
        codes=codes,
        low=torch.tensor([[-0.2], [-torch.inf], [0.9]]),
        high=torch.tensor([[-0.1], [torch.inf], [1.0]]),
    )

    def network(noisy: Tensor, time: Tensor, attributes: Tensor) -> Tensor:
        return 3 * noisy

    estimate = guided_estimate(network, diffusion, constraint, guidance=0.0, numeric_limit=2.0)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        z, levels = sampler(estimate, diffusion, rows=3, steps=5, generator=generator)  # type: ignore[operator]
        assert levels[0, 0] == 2
        assert levels[2, 0] == 0
        assert -0.2 <= z[0, 0] <= -0.1
        assert 0.9 <= z[2, 0] <= 1.0
        assert abs(float(z[1, 0])) <= 2.0

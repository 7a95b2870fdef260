import torch

from mcrage.data.transform import Constraint, Layout
from mcrage.diffusion.blocks import one_hot
from mcrage.diffusion.calibration import calibrate, rows_per_round
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.sampling import dpm_solver, guided_estimate
from mcrage.diffusion.tabular import TabularDiffusion

LAYOUT = Layout(num_numeric=1, block_sizes=(3, 2), attribute_sizes=(), missing_block=(-1,), attribute_block=())
SHARES = torch.tensor([0.7, 0.25, 0.05, 0.9, 0.1])
ROWS = 6000


def biased_model() -> tuple[MLPDenoiser, TabularDiffusion]:
    """An untrained denoiser that favours the frequent levels."""
    denoiser = MLPDenoiser(LAYOUT, width=8, depth=1, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        denoiser.outputs.bias.copy_(torch.tensor([0.0, 0.3, 0.0, -0.3, 0.4, -0.4]))
    return denoiser, TabularDiffusion(LAYOUT, log_prior=SHARES.log())


def drawn(
    denoiser: MLPDenoiser, diffusion: TabularDiffusion, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    anything = Constraint(
        attributes=torch.zeros(ROWS, 0, dtype=torch.int64),
        codes=torch.full((ROWS, 2), -1),
        low=torch.full((ROWS, 1), -torch.inf),
        high=torch.full((ROWS, 1), torch.inf),
    )
    estimate = guided_estimate(denoiser, diffusion, anything, guidance=0.0, numeric_limit=6.0)
    with torch.no_grad():
        return dpm_solver(estimate, diffusion, rows=ROWS, steps=12, generator=generator)


def error(denoiser: MLPDenoiser, diffusion: TabularDiffusion) -> float:
    _, levels = drawn(denoiser, diffusion, torch.Generator().manual_seed(9))
    shares = one_hot(levels, LAYOUT.block_sizes).mean(0)
    return float((shares - SHARES).abs().max())


def test_levels_that_were_too_rare_come_out_at_their_released_share() -> None:
    denoiser, diffusion = biased_model()
    assert error(denoiser, diffusion) > 0.06, "the check must be able to fail"
    calibrate(
        denoiser,
        diffusion,
        lambda generator: [drawn(denoiser, diffusion, generator)],
        generator=torch.Generator().manual_seed(0),
    )
    # a share of .7 has a standard error of .006 in the rows that it is measured on, as much again in each round
    assert error(denoiser, diffusion) < 0.025


def test_only_the_biases_of_levels_move() -> None:
    denoiser, diffusion = biased_model()
    before = {name: value.detach().clone() for name, value in denoiser.named_parameters()}
    calibrate(
        denoiser,
        diffusion,
        lambda generator: [drawn(denoiser, diffusion, generator)],
        generator=torch.Generator().manual_seed(0),
    )
    moved = [name for name, value in denoiser.named_parameters() if not torch.equal(value, before[name])]
    assert moved == ["outputs.bias"]
    assert denoiser.outputs.bias[0] == before["outputs.bias"][0]


def test_it_costs_a_fixed_share_of_the_training_and_is_left_out_after_a_short_one() -> None:
    assert rows_per_round(300 * 256) == 0
    assert rows_per_round(2400 * 256) == 3072
    assert rows_per_round(10**8) == 20_480

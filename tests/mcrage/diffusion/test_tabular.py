import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mcrage.data.transform import EncodedTable, Layout
from mcrage.diffusion.denoiser import MLPDenoiser
from mcrage.diffusion.schedule import NoiseSchedule
from mcrage.diffusion.tabular import DiffusionConfig, TabularDiffusion

LAYOUT = Layout(
    num_numeric=2, block_sizes=(3, 2), attribute_sizes=(2, 2), missing_block=(-1, -1), attribute_block=(1, -1)
)


def rows(count: int = 64, seed: int = 0) -> EncodedTable:
    draw = torch.Generator().manual_seed(seed)
    return EncodedTable(
        numeric=torch.randn(count, 2, generator=draw),
        codes=torch.stack([torch.randint(0, size, (count,), generator=draw) for size in LAYOUT.block_sizes], dim=1),
        attributes=torch.randint(0, 2, (count, 2), generator=draw),
        covariates=torch.zeros(count, 0),
    )


def silent(noisy: Tensor, time: Tensor, attributes: Tensor) -> Tensor:
    """A network that has learned nothing."""
    return torch.zeros_like(noisy)


@pytest.fixture
def network() -> MLPDenoiser:
    network = MLPDenoiser(LAYOUT, width=16, depth=2, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.outputs.weight, generator=torch.Generator().manual_seed(1))
    return network


def test_the_schedule_ends_in_noise_and_starts_almost_clean() -> None:
    signal, noise = NoiseSchedule(least_noise=0.02).signal_noise(torch.tensor([0.0, 0.5, 1.0]))
    assert noise[0].item() == pytest.approx(0.02)
    assert abs(signal[2].item()) < 1e-6
    assert torch.allclose(signal**2 + noise**2, torch.ones(3, 1))


def test_training_times_lie_inside_the_schedule() -> None:
    times = NoiseSchedule().draw_times(10_000, torch.Generator().manual_seed(0))
    assert times.min() > 0
    assert times.max() < 1
    # the median of a logistic normal is one half; four standard errors
    assert abs(float(times.median()) - 0.5) < 0.02


@pytest.mark.parametrize("time", [0.05, 0.4, 0.8])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_without_a_network_levels_have_the_posterior_of_bayes_rule(time: float, scale: float) -> None:
    prior = torch.tensor([0.7, 0.2, 0.1, 0.5, 0.5])
    diffusion = TabularDiffusion(LAYOUT, log_prior=prior.log(), config=DiffusionConfig(level_scale=scale))
    batch = rows(32)
    at = torch.full((32,), time)
    signal, sigma = diffusion.schedule.signal_noise(at)
    noisy = signal * diffusion.clean(batch) + sigma * torch.randn(32, 7, generator=torch.Generator().manual_seed(3))
    _, probabilities = diffusion.estimate(silent, noisy, at, batch.attributes)
    # the oracle enumerates the three levels of the first block
    likelihoods = []
    for level in range(3):
        clean = torch.zeros(3)
        clean[level] = scale
        mean = signal * clean
        likelihoods.append(torch.exp(-((noisy[:, 2:5] - mean) ** 2).sum(1) / (2 * sigma[:, 0] ** 2)))
    posterior = torch.stack(likelihoods, dim=1) * prior[:3]
    assert torch.allclose(probabilities[:, :3], posterior / posterior.sum(1, keepdim=True), atol=2e-3)


def test_a_perfect_velocity_gives_back_the_clean_numbers() -> None:
    diffusion = TabularDiffusion(LAYOUT)
    batch = rows()
    time = torch.full((64,), 0.6)
    signal, sigma = diffusion.schedule.signal_noise(time)
    noise = torch.randn(64, 7, generator=torch.Generator().manual_seed(1))
    clean = diffusion.clean(batch)
    noisy = signal * clean + sigma * noise

    def oracle(_noisy: Tensor, _time: Tensor, _attributes: Tensor) -> Tensor:
        return signal * noise - sigma * clean

    numeric, _ = diffusion.estimate(oracle, noisy, time, batch.attributes)
    assert torch.allclose(numeric, batch.numeric, atol=1e-5)


def test_the_loss_of_an_untrained_network_on_levels_at_full_noise_is_their_prior_entropy() -> None:
    prior = torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5])
    diffusion = TabularDiffusion(LAYOUT, log_prior=prior.log(), config=DiffusionConfig(level_weight=1.0))
    batch = EncodedTable(
        numeric=torch.zeros(4, 2),
        codes=torch.tensor([[0, 0], [0, 1], [1, 0], [2, 1]]),
        attributes=torch.full((4, 2), -1),
        covariates=torch.zeros(4, 0),
    )
    loss = diffusion.loss_at(silent, batch, time=torch.ones(4), noise=torch.zeros(4, 7), attributes=batch.attributes)
    entropy = (1.5 * math.log(2) + math.log(2)) / 2
    assert float(loss.mean()) == pytest.approx(entropy, rel=1e-4)


@pytest.mark.parametrize("missing_block", [(-1, -1), (1, -1)])
def test_the_loss_and_its_gradient_are_those_of_automatic_differentiation(missing_block: tuple[int, int]) -> None:
    layout = replace(LAYOUT, missing_block=missing_block, attribute_block=(-1, -1))
    diffusion = TabularDiffusion(layout, config=DiffusionConfig(level_weight=3.0))
    batch, time = rows(16), torch.linspace(0.05, 0.95, 16)
    draw = torch.Generator().manual_seed(5)
    noise, outputs = torch.randn(16, 7, generator=draw), torch.randn(16, 7, generator=draw).requires_grad_()
    upstream = torch.rand(16, generator=draw)

    def network(noisy: Tensor, _time: Tensor, _attributes: Tensor) -> Tensor:
        return outputs

    loss = diffusion.loss_at(network, batch, time=time, noise=noise, attributes=batch.attributes)
    torch.autograd.backward(loss, upstream)
    gradient, outputs.grad = outputs.grad, None

    signal, sigma = diffusion.schedule.signal_noise(time)
    noisy = signal * diffusion.clean(batch) + sigma * noise
    likelihood = signal * diffusion._scale * noisy[:, 2:] / sigma**2
    logits = torch.split(likelihood + outputs[:, 2:], [3, 2], dim=1)
    entropies = [torch.nn.functional.cross_entropy(logits[k], batch.codes[:, k], reduction="none") for k in (0, 1)]
    velocity = signal * noise[:, :2] - sigma * batch.numeric
    present = torch.ones(16, 2)
    present[:, 0] = 1.0 if missing_block[0] < 0 else 1.0 - batch.codes[:, 1].float()
    expected = (present * (outputs[:, :2] - velocity) ** 2).mean(1) + 3.0 * (entropies[0] + entropies[1]) / 2
    torch.autograd.backward(expected, upstream)

    assert torch.allclose(loss, expected, rtol=1e-4, atol=1e-4)
    assert gradient is not None
    assert outputs.grad is not None
    assert torch.allclose(gradient, outputs.grad, rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other(network: MLPDenoiser) -> None:
    diffusion = TabularDiffusion(LAYOUT)
    batch = rows(8)
    time = torch.linspace(0.1, 0.9, 8)
    noise = torch.randn(8, 7, generator=torch.Generator().manual_seed(2))
    whole = diffusion.loss_at(network, batch, time=time, noise=noise, attributes=batch.attributes)
    part = diffusion.loss_at(
        network, batch.rows(torch.tensor([3])), time=time[3:4], noise=noise[3:4], attributes=batch.attributes[3:4]
    )
    assert torch.allclose(whole[3:4], part, atol=1e-5)


def test_conditions_are_left_open_at_the_rate_of_the_configuration() -> None:
    diffusion = TabularDiffusion(LAYOUT, config=DiffusionConfig(condition_dropout=0.2))
    dropped = diffusion.drop_conditions(torch.ones(20_000, 2, dtype=torch.int64), torch.Generator().manual_seed(0))
    # four standard errors are .011 and .006
    assert (dropped < 0).float().mean(0).tolist() == pytest.approx([0.2, 0.2], abs=0.011)
    assert float((dropped < 0).all(1).float().mean()) == pytest.approx(0.04, abs=0.006)


def seen(diffusion: TabularDiffusion, noisy: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees of the levels under a condition, and the probabilities without a network."""
    inputs = []

    def network(noisy: Tensor, _time: Tensor, _attributes: Tensor) -> Tensor:
        inputs.append(noisy)
        return torch.zeros_like(noisy)

    _, probabilities = diffusion.estimate(network, noisy, torch.full((len(noisy),), 0.7), attributes)
    return (inputs[0][:, 2:] + diffusion._centre) / diffusion._per_spread, probabilities


def test_a_given_attribute_is_seen_as_a_block_without_noise_and_leaves_the_other_blocks_alone() -> None:
    diffusion = TabularDiffusion(LAYOUT)
    noisy = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    given = torch.tensor([[0, -1], [1, -1], [0, 0], [1, 1], [0, 1], [1, 0]])
    levels, probabilities = seen(diffusion, noisy, given)
    open_levels, _ = seen(diffusion, noisy, torch.full_like(given, -1))
    assert torch.allclose(levels[:, 3:], torch.nn.functional.one_hot(given[:, 0], 2).float(), atol=1e-6)
    assert torch.equal(levels[:, :3], open_levels[:, :3])
    assert not torch.allclose(levels[:, 3:], open_levels[:, 3:], atol=0.05)
    assert torch.allclose(probabilities[:, 3:], levels[:, 3:], atol=1e-6)


def test_levels_reach_the_network_centred_and_a_rare_one_as_plainly_as_a_frequent_one() -> None:
    shares = torch.tensor([0.9, 0.09, 0.01, 0.5, 0.5])
    diffusion = TabularDiffusion(LAYOUT, log_prior=shares.log())
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(50_000, 5, generator=draw)
    evidence = shares.log() + 100.0 * torch.nn.functional.one_hot(
        torch.multinomial(shares[:3], 50_000, True, generator=draw), 5
    )
    inputs = diffusion._network_input(noise, evidence)[:, 2:5]
    assert inputs.mean(0).abs().max() < 0.02  # centred
    assert inputs.std(0).tolist() == pytest.approx([0.47, 0.47, 0.35], abs=0.05)


def test_an_attribute_that_no_block_shows_reaches_the_network_as_an_input(network: MLPDenoiser) -> None:
    noisy, time = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.full((4,), 0.5)
    outputs = [network(noisy, time, torch.tensor([[-1, label]]).expand(4, 2)) for label in (-1, 0, 1)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)


def test_a_time_for_all_rows_is_the_same_as_one_time_per_row(network: MLPDenoiser) -> None:
    diffusion = TabularDiffusion(LAYOUT)
    noisy = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    attributes = rows(4).attributes
    once = diffusion.estimate(network, noisy, torch.tensor([0.3]), attributes)
    each = diffusion.estimate(network, noisy, torch.full((4,), 0.3), attributes)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(once, each, strict=True))


def test_guidance_of_zero_asks_the_network_once_and_moves_nothing(network: MLPDenoiser) -> None:
    diffusion = TabularDiffusion(LAYOUT)
    batch = rows(4)
    time, noisy = torch.full((4,), 0.5), torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    plain, _ = diffusion.estimate(network, noisy, time, batch.attributes)
    zero, _ = diffusion.estimate(network, noisy, time, batch.attributes, guidance=0.0)
    guided, _ = diffusion.estimate(network, noisy, time, batch.attributes, guidance=2.0)
    open_, _ = diffusion.estimate(network, noisy, time, torch.full_like(batch.attributes, -1))
    assert torch.equal(plain, zero)
    assert torch.allclose(guided, plain + 2 * (plain - open_), atol=1e-4)


def test_logits_stay_finite_for_extreme_outputs() -> None:
    diffusion = TabularDiffusion(LAYOUT)
    noisy = 50 * torch.randn(16, 7, generator=torch.Generator().manual_seed(0))

    def wild(noisy: Tensor, _time: Tensor, _attributes: Tensor) -> Tensor:
        return 1e3 * torch.sign(noisy)

    for time in (0.0, 0.5, 1.0):
        _, probabilities = diffusion.estimate(wild, noisy, torch.full((16,), time), torch.zeros(16, 2).long())
        assert torch.isfinite(probabilities).all()
        assert torch.allclose(probabilities[:, :3].sum(1), torch.ones(16), atol=1e-3)


def test_whatever_a_step_computes_is_where_the_model_is(network: MLPDenoiser) -> None:
    """On the meta device tensors have no values: whoever makes or keeps one elsewhere is refused, as on a GPU."""
    diffusion = TabularDiffusion(replace(LAYOUT, missing_block=(1, -1))).to("meta")
    denoiser = copy.deepcopy(network).to("meta")
    with torch.device("meta"):
        rows = EncodedTable(
            torch.zeros(5, LAYOUT.num_numeric),
            torch.zeros(5, len(LAYOUT.block_sizes), dtype=torch.int64),
            torch.zeros(5, len(LAYOUT.attribute_sizes), dtype=torch.int64),
            torch.zeros(5, LAYOUT.num_covariates),
        )
        noise, time = torch.zeros(5, LAYOUT.width), torch.zeros(5)
        loss = diffusion.loss_at(denoiser, rows, time=time, noise=noise, attributes=rows.attributes)
        torch.autograd.backward(loss.sum())
        with torch.no_grad():
            clean = diffusion.join(*diffusion.estimate(denoiser, noise, time, rows.attributes, guidance=0.5))
            diffusion.clean(rows)
    assert clean.is_meta
    assert all(parameter.grad is not None and parameter.grad.is_meta for parameter in denoiser.parameters())

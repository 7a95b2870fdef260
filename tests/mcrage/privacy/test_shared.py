"""Shared noise: the honest shares alone reach what is claimed, and the lattice adds nothing to be seen."""

import itertools
import math

import numpy as np
import pytest
import torch

from mcrage.errors import PrivacyError
from mcrage.privacy.masking import MaskKey, opened
from mcrage.privacy.noise import GaussianNoise
from mcrage.privacy.shared import SharedNoise, as_words

SIZE = 200_000


def noise_of(shared: SharedNoise, sites: int, *, first: int = 0) -> np.ndarray:
    """Sum of the noise of some sites over the clipping norm."""
    shares = [shared.share(torch.zeros(SIZE), GaussianNoise(bytes([first + site]) * 32)) for site in range(sites)]
    return sum(shares) * shared.spacing / shared.max_grad_norm


def reaches(noise: np.ndarray, claimed: float) -> bool:
    """Whether noise has at least the claimed standard deviation, to 1 %, and does not add more than 1 %."""
    return bool(abs(noise.std() / claimed - 1) < 0.01)


def build(sites: int = 5, colluders: int = 1, noise_multiplier: float = 2.0, max_grad_norm: float = 0.5) -> SharedNoise:
    return SharedNoise(noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, sites=sites, colluders=colluders)


@pytest.mark.parametrize(("sites", "colluders"), [(2, 1), (5, 1), (5, 3), (10, 1), (10, 4)])
def test_the_noise_of_the_honest_sites_is_what_is_claimed(sites: int, colluders: int) -> None:
    shared = build(sites, colluders)
    assert reaches(noise_of(shared, sites - colluders), 2.0)
    assert reaches(noise_of(shared, sites), 2.0 * math.sqrt(sites / (sites - colluders)))


def test_after_a_drop_out_the_sites_that_are_left_add_as_much_together() -> None:
    assert reaches(noise_of(build(4), 3), 2.0)
    assert reaches(noise_of(build(3), 2), 2.0)


def test_a_site_that_forgets_its_share_is_found() -> None:
    assert not reaches(noise_of(build(5), 3), 2.0)


@pytest.mark.slow
def test_the_sum_of_all_sites_comes_back_within_the_lattice_of_the_plain_sum() -> None:
    """With the noise of known keys taken off again, over a thousand vectors."""
    shared = build(3)
    of = {f"s{number}": MaskKey(bytes([number]) * 32, b"") for number in range(3)}
    peers = {site: key.public for site, key in of.items()}
    for case in range(1000):
        draw = np.random.default_rng(case)
        plain = {site: torch.from_numpy(draw.normal(0, 10 ** draw.uniform(-3, 1), 30)).float() for site in of}
        sent, noise = [], np.zeros(30)
        for number, (site, key) in enumerate(of.items()):
            steps = shared.share(plain[site], GaussianNoise(bytes([number]) * 32))
            noise += shared.share(torch.zeros(30), GaussianNoise(bytes([number]) * 32)) * shared.spacing
            sent.append(as_words(steps) + key.mask(30, site=site, peers=peers, context=str(case).encode()))
        back = shared.value(opened(sent)).numpy() - noise
        np.testing.assert_allclose(back, sum(plain.values()).numpy(), atol=1e-5)


def test_every_pattern_of_drop_outs_of_five_sites_gives_the_sum_or_nothing() -> None:
    shared, size = build(5), 20_000
    of = {f"s{number}": MaskKey(bytes([number]) * 32, b"") for number in range(5)}
    peers = {site: key.public for site, key in of.items()}
    sent = {}
    for number, (site, key) in enumerate(of.items()):
        steps = shared.share(torch.full((size,), 3.0), GaussianNoise(bytes([number]) * 32))
        sent[site] = as_words(steps) + key.mask(size, site=site, peers=peers, context=b"round 1")
    for left in itertools.chain.from_iterable(itertools.combinations(sent, n) for n in range(1, 6)):
        value = shared.value(opened(sent[site] for site in left)).double()
        if len(left) == 5:
            assert abs(value.mean() - 15.0) < 0.05
        else:
            # Uniform on ±2³¹ steps: 2¹⁰ times as far apart as all noise together.
            assert value.std() > 500 * 2.0 * 0.5
            assert abs(value.mean()) < 0.05 * value.std()


@pytest.mark.slow
def test_rounding_moves_neighbours_apart_by_less_than_the_noise_makes_up_for() -> None:
    shared, size = build(5, noise_multiplier=30.0, max_grad_norm=1.0), 1_000_000
    draw = torch.Generator().manual_seed(0)
    total = torch.randn(size, generator=draw)
    moved = torch.randn(size, generator=draw)
    other = total + moved / moved.norm()  # one patient
    shares = [shared.share(each, GaussianNoise(bytes(32))) for each in (total, other)]
    apart = float(np.linalg.norm((shares[1] - shares[0]).astype(np.float64))) * shared.spacing
    deviation = shared.own_multiplier * (1 + 1000 * shared.spacing)
    assert apart <= 1 + 1000 * shared.spacing
    noise = shared.share(torch.zeros(size), GaussianNoise(bytes([9]) * 32)) * shared.spacing
    assert noise.std() == pytest.approx(deviation, rel=0.005)


def test_what_is_too_large_for_the_lattice_is_cut_off_before_the_noise() -> None:
    shared = build(4)
    huge = torch.tensor([1e30, -1e30, math.nan, math.inf, 0.0])
    steps = shared.share(huge, GaussianNoise(bytes(32))) - shared.share(torch.zeros(5), GaussianNoise(bytes(32)))
    assert steps.tolist() == [shared.largest, -shared.largest, 0, shared.largest, 0]
    all_sites = shared.value(np.array([4 * shared.largest], dtype=np.int32))
    assert all_sites[0] == pytest.approx(4 * shared.largest * shared.spacing)
    # Every patient of a large batch with the whole clipping norm in one coordinate fits.
    assert shared.largest * shared.spacing / shared.max_grad_norm > 250


def test_a_step_of_the_lattice_is_far_below_the_noise_and_a_share_far_above_a_step() -> None:
    for sites, multiplier in ((2, 0.3), (1000, 0.3), (1000, 1000.0), (5, 1.999)):
        shared = build(sites, 1, noise_multiplier=multiplier)
        assert 2**20 <= multiplier * shared.max_grad_norm / shared.spacing < 2**21
        assert shared.own_multiplier * shared.max_grad_norm / shared.spacing >= 10**4


@pytest.mark.parametrize(
    ("sites", "colluders", "multiplier", "norm"),
    [(1, 1, 1.0, 1.0), (5, 0, 1.0, 1.0), (5, 5, 1.0, 1.0), (1001, 1, 1.0, 1.0), (5, 1, 0.0, 1.0), (5, 1, 1.0, 0.0)],
)
def test_settings_that_protect_nobody_are_refused(sites: int, colluders: int, multiplier: float, norm: float) -> None:
    with pytest.raises(PrivacyError, match="shared noise takes"):
        build(sites, colluders, multiplier, norm)

"""The noise that is added, number by number; every statistical check also rejects a wrong one."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from mcrage.privacy import events
from mcrage.privacy.keyed import KeyedBits, derive
from mcrage.privacy.noise import INFLATION, GaussianNoise, lattice_spacing

KEY = bytes(range(32))
DEVIATION = 0.7
Draws = NDArray[np.float64]


class FloatNoise(GaussianNoise):
    """The noise without a lattice."""

    def add(self, total: torch.Tensor, *, deviation: float) -> torch.Tensor:
        return (total.double() + self._normals(len(total)) * deviation).float()


class SharedNoise(GaussianNoise):
    """The second half of the numbers gets the noise of the first."""

    def add(self, total: torch.Tensor, *, deviation: float) -> torch.Tensor:
        half = super().add(total[: len(total) // 2], deviation=deviation)
        return torch.cat([half, half])


def drawn(
    size: int, additions: int, *, key: bytes = KEY, deviation: float = DEVIATION, kind: type = GaussianNoise
) -> Draws:
    """The noise of each addition to each of so many numbers."""
    noise, total = kind(key), torch.linspace(-3.0, 3.0, size)
    return np.stack([(noise.add(total, deviation=deviation) - total).numpy() for _ in range(additions)]).astype(float)


def is_normal(values: Draws, *, deviation: float) -> bool:
    """Whether deviation (to 1 %), mean and shape are right; wrongly no with a chance of 2e-4 for 100,000 values."""
    expected = deviation * INFLATION
    return bool(
        abs(values.std() / expected - 1) < 0.01
        and abs(values.mean()) < 4 * expected / len(values) ** 0.5
        and stats.kstest(values / expected, "norm").pvalue > 1e-4
    )


def largest_correlation(columns: Draws) -> float:
    """Of any two columns, in standard errors."""
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    return float(np.abs(correlations).max() * len(columns) ** 0.5)


def test_every_number_gets_gaussian_noise_of_the_stated_deviation() -> None:
    noise = drawn(403, 1000)
    for group in np.array_split(noise, 4, axis=1):
        assert group.size > 1e5 - 1e3
        assert is_normal(group.ravel(), deviation=DEVIATION)


def test_a_deviation_that_is_5_percent_off_would_be_seen() -> None:
    for factor in (0.95, 1.05):
        assert not is_normal(drawn(400, 250, deviation=factor * DEVIATION).ravel(), deviation=DEVIATION)


def test_noise_that_is_not_gaussian_would_be_seen() -> None:
    uniform = np.random.default_rng(0).uniform(-1, 1, 100_000)
    assert not is_normal(uniform * 3**0.5 * DEVIATION * INFLATION, deviation=DEVIATION)


def test_two_million_draws_have_the_deviation_and_the_kurtosis_of_a_gaussian() -> None:
    values = drawn(500_000, 4, deviation=1.0).ravel()
    assert values.std() == pytest.approx(INFLATION, rel=4 / (2 * len(values)) ** 0.5)
    assert abs(stats.kurtosis(values)) < 4 * (24 / len(values)) ** 0.5
    assert abs(stats.skew(values)) < 4 * (6 / len(values)) ** 0.5
    beyond = float((np.abs(values) > 4 * INFLATION).mean())
    assert beyond == pytest.approx(2 * stats.norm.sf(4), rel=0.4), "tails are not cut off"


def test_the_noise_of_any_two_numbers_is_independent() -> None:
    """Squares too: four numbers come of the same four Gaussians."""
    noise = drawn(32, 10_000)
    assert largest_correlation(noise) < 4
    assert largest_correlation(noise**2) < 4
    assert largest_correlation(drawn(32, 2000, kind=SharedNoise)) > 40


def test_the_noise_of_one_addition_says_nothing_about_the_next() -> None:
    noise = drawn(100, 2000)
    for lag in (1, 2):
        together = np.stack([noise[:-lag].ravel(), noise[lag:].ravel()], axis=1)
        assert largest_correlation(together) < 4
        assert largest_correlation(together**2) < 4


def test_the_same_key_gives_the_same_bytes_and_another_key_independent_noise() -> None:
    assert np.array_equal(drawn(50_001, 3), drawn(50_001, 3))
    other = drawn(50_001, 3, key=derive(KEY, "other"))
    assert largest_correlation(np.stack([drawn(50_001, 3).ravel(), other.ravel()], axis=1)) < 4


def test_no_seed_of_torch_or_numpy_changes_the_noise_or_is_used_up_by_it() -> None:
    expected = drawn(1000, 3)
    for seed in (0, 1):
        torch.manual_seed(seed)  # noqa: TID251
        np.random.seed(seed)  # noqa: TID251, NPY002
        before = torch.get_rng_state()
        assert np.array_equal(drawn(1000, 3), expected)
        assert torch.equal(torch.get_rng_state(), before)


def is_on_lattice(released: torch.Tensor, spacing: float) -> bool:
    multiples = released.double() / spacing
    return torch.equal(multiples, multiples.round())


@pytest.mark.parametrize("deviation", [1e-4, 0.7, 1.0, 300.0])
def test_released_values_are_multiples_of_the_lattice_spacing(deviation: float) -> None:
    spacing = lattice_spacing(deviation)
    assert 2**-33 < spacing / deviation <= 2**-32
    total = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    total[::2] = 0.0
    for kind, expected in ((GaussianNoise, True), (FloatNoise, False)):
        assert is_on_lattice(kind(KEY).add(total, deviation=deviation), spacing) == expected


def test_of_the_sum_a_release_says_no_more_than_the_nearest_multiple() -> None:
    spacing = lattice_spacing(1.0)
    draw = torch.Generator().manual_seed(0)
    multiples = torch.randint(-(2**34), 2**34, (100_000,), generator=draw).double() * spacing
    between = multiples + (torch.rand(100_000, generator=draw, dtype=torch.float64) - 0.5) * 0.99 * spacing
    for kind, expected in ((GaussianNoise, True), (FloatNoise, False)):
        releases = [kind(KEY).add(total, deviation=1.0) for total in (multiples, between)]
        assert torch.equal(*releases) == expected


def moved_by_rounding(spacing: float, size: float) -> float:
    """How much further apart two sums of so many numbers may be, once each number has gone to the nearest multiple."""
    return spacing * size**0.5


def test_the_inflation_makes_up_for_rounding_at_the_largest_noise_of_ten_million_numbers() -> None:
    assert moved_by_rounding(lattice_spacing(events.LARGEST_NOISE), 1e7) < INFLATION - 1
    coarse = 2.0**-20 * events.LARGEST_NOISE
    assert moved_by_rounding(coarse, 1e5) > INFLATION - 1, "a millionth of the deviation would be too coarse"


class Words(KeyedBits):
    """The same word again and again."""

    def __init__(self, *words: int) -> None:
        self._words = words

    def uint64(self, n: int) -> NDArray[np.uint64]:
        return np.fromiter(itertools.cycle(self._words), dtype=np.uint64, count=n)


def test_the_rarest_words_of_the_stream_give_finite_noise() -> None:
    for word in (0, 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1):
        noise = GaussianNoise(KEY)
        noise._bits = Words(word)
        assert torch.isfinite(noise.add(torch.zeros(8), deviation=1.0)).all(), word


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_that_gets_noise_stays_as_it_is(dtype: torch.dtype) -> None:
    total = torch.linspace(-1.0, 1.0, 1000, dtype=dtype)
    GaussianNoise(KEY).add(total, deviation=1.0)
    assert torch.equal(total, torch.linspace(-1.0, 1.0, 1000, dtype=dtype))


def test_a_deviation_of_zero_adds_nothing() -> None:
    total = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(GaussianNoise(KEY).add(total, deviation=0.0), total)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 2**15 - 1, 2**15, 2**15 + 1])
def test_sums_of_any_length_get_noise_everywhere(size: int) -> None:
    released = GaussianNoise(KEY).add(torch.zeros(size), deviation=1.0)
    assert released.shape == (size,)
    assert released.dtype == torch.float32
    assert (released != 0).all()

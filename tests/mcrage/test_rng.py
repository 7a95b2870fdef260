"""Named streams: the same names give the same draws, other names unrelated ones, and nothing touches global state."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcrage import rng

names = st.lists(st.one_of(st.text(max_size=8), st.integers()), max_size=4)


@settings(deadline=None)
@given(seed=st.integers(), path=names)
def test_a_derived_seed_is_one_that_every_generator_takes(seed: int, path: list[str | int]) -> None:
    derived = rng.derive(seed, *path)
    assert 0 <= derived < 2**63
    assert derived == rng.derive(seed, *path)


def test_derived_seeds_are_the_same_in_every_version() -> None:
    assert rng.derive(0) == 2033344993903900207
    assert rng.derive(7, "rebalance", "site-3", 12) == 6184979032737447104


def test_every_name_and_their_order_count() -> None:
    derived = [rng.derive(*path) for path in [(0,), (1,), (0, "a"), (0, "b"), (0, "a", "b"), (0, "b", "a"), (0, "ab")]]
    assert len(set(derived)) == len(derived)


def test_a_stream_does_not_depend_on_draws_from_another() -> None:
    alone = rng.stream(0, "sampling").random(5)
    rng.stream(0, "training").random(1_000)
    np.testing.assert_array_equal(rng.stream(0, "sampling").random(5), alone)


def test_torch_streams_are_reproducible_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, again, other = (torch.rand(5, generator=rng.torch_stream(0, name)) for name in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_neighbouring_streams_are_not_correlated() -> None:
    # 2,000 streams of one draw each: their mean has a standard error of 1/sqrt(12 * 2000) = .0065, and the lag-one
    # correlation one of .022; five of them is a false alarm in two million. Streams seeded alike fail at once.
    draws = np.array([rng.stream(0, "patient", n).random() for n in range(2_000)])
    assert abs(draws.mean() - 0.5) < 5 * 0.0065
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 5 * 0.0224
    alike = np.array([rng.stream(0, "patient", n // 2).random() for n in range(2_000)])
    assert abs(np.corrcoef(alike[:-1], alike[1:])[0, 1]) > 5 * 0.0224

"""Masks: they cancel in the sum of all, and only there; what one site sends is uniform."""

import itertools
import time
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mcrage.errors import PrivacyError
from mcrage.privacy.masking import MaskKey, opened

STATE = b"table 1"


def keys(sites: int, state: bytes = STATE) -> dict[str, MaskKey]:
    return {f"site-{number:02d}": MaskKey(bytes([number]) * 32, state) for number in range(sites)}


def public(of: dict[str, MaskKey]) -> dict[str, bytes]:
    return {site: key.public for site, key in of.items()}


def masks(of: dict[str, MaskKey], size: int, context: bytes = b"one") -> dict[str, np.ndarray]:
    return {site: key.mask(size, site=site, peers=public(of), context=context) for site, key in of.items()}


def is_uniform(words: np.ndarray) -> bool:
    """Whether every byte of the words, and the difference of neighbours, could be drawn evenly."""
    planes = [words.view(np.uint8)[place::4] for place in range(4)] + [np.diff(words).view(np.uint8)[3::4]]
    worst = min(stats.chisquare(np.bincount(plane, minlength=256)).pvalue for plane in planes)
    return bool(worst > 1e-6)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_masks_cancel_in_the_sum_of_all_sites(sites: int, size: int, seed: int) -> None:
    draw, of = np.random.default_rng(seed), keys(sites)
    plain = {site: draw.integers(-(2**28), 2**28, size) for site in of}
    masked = [plain[site].astype(np.uint32) + mask for site, mask in masks(of, size).items()]
    np.testing.assert_array_equal(opened(masked), sum(plain.values()))


def test_what_one_site_sends_is_uniform_and_so_is_the_sum_of_any_but_all() -> None:
    of = keys(5)
    sent = {site: np.full(200_000, 7, np.uint32) + mask for site, mask in masks(of, 200_000).items()}
    for number in range(1, 5):
        for some in itertools.combinations(sent.values(), number):
            assert is_uniform(opened(some).view(np.uint32))
    np.testing.assert_array_equal(opened(sent.values()), 35)
    assert not is_uniform(np.full(200_000, 7, np.uint32)), "the check finds what has no mask"


def test_colluding_sites_learn_no_more_than_the_sum_of_the_others() -> None:
    """Sites 2 to 4 show the server everything; sites 0 and 1 still hide each other."""
    of, size = keys(5), 200_000
    sent = masks(of, size)
    known = np.zeros(size, np.uint32)
    for site in ("site-02", "site-03", "site-04"):
        pair = {name: key for name, key in of.items() if name in ("site-00", site)}
        known += pair["site-00"].mask(size, site="site-00", peers=public(pair), context=b"one")
    assert is_uniform(sent["site-00"] - known)


def sums_with(changed: dict[str, np.ndarray]) -> np.ndarray:
    return opened([*(masks(keys(4), 100_000) | changed).values()]).view(np.uint32)


@pytest.mark.parametrize("change", ["context", "state", "peers"])
def test_where_one_site_was_told_anything_else_the_sum_stays_closed(change: str) -> None:
    of = keys(4)
    key = of["site-01"]
    peers, context = public(of), b"one"
    if change == "context":
        context = b"two"
    elif change == "state":
        key = MaskKey(bytes([1]) * 32, b"table 2")
        peers = {**peers, "site-01": key.public}
    else:
        del peers["site-03"]
    other = key.mask(100_000, site="site-01", peers=peers, context=context)
    assert is_uniform(sums_with({"site-01": other}))
    assert not is_uniform(sums_with({}))


def test_no_two_requests_and_no_two_states_share_a_mask() -> None:
    of = keys(3)
    seen: list[Iterable[int]] = [masks(of, 8, context)["site-00"] for context in (b"one", b"two", b"")]
    seen.append(masks(keys(3, b"table 2"), 8)["site-00"])
    assert len({tuple(each) for each in seen}) == 4
    assert np.array_equal(masks(of, 8)["site-00"], masks(of, 8)["site-00"]), "the same request has the same mask"


def test_keys_that_could_take_masks_off_again_are_refused() -> None:
    of = keys(3)
    key = of["site-00"]

    def asked(peers: dict[str, bytes]) -> None:
        key.mask(4, site="site-00", peers=peers, context=b"one")

    with pytest.raises(PrivacyError, match="not the one that the server gave"):
        asked({**public(of), "site-00": of["site-01"].public})
    with pytest.raises(PrivacyError, match="not the one that the server gave"):
        asked({site: public(of)[site] for site in ("site-01", "site-02")})
    with pytest.raises(PrivacyError, match="at least two sites"):
        asked({"site-00": key.public})
    with pytest.raises(PrivacyError, match="a key of its own"):
        asked({**public(of), "site-02": of["site-01"].public})
    for none in (b"", b"short", bytes(32)):
        with pytest.raises(PrivacyError, match="none that masks can be made with"):
            asked({"site-00": key.public, "site-01": none})


@pytest.mark.slow
def test_a_million_parameters_of_ten_sites_take_less_than_a_second_of_computing() -> None:
    of, size = keys(10), 1_000_000
    started = time.process_time()
    total = opened(masks(of, size).values())
    assert time.process_time() - started < 1.0
    assert not total.any()

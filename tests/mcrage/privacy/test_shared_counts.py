"""Counts with shared noise: the honest sites' shares are as much as claimed, and never too narrow."""

import math

import numpy as np
import pytest

from mcrage.errors import PrivacyError
from mcrage.privacy.keyed import derive
from mcrage.privacy.shared_counts import SMALLEST_SHARE, SharedCounts

CELLS = 2000


@pytest.mark.parametrize("colluders", [1, 3])
def test_the_honest_sites_together_have_the_noise_that_is_claimed(colluders: int) -> None:
    shared = SharedCounts(noise=20.0, sites=5, colluders=colluders)
    shares = [shared.share(np.zeros(CELLS, np.int64), key=derive(bytes(32), site)) for site in range(5)]
    assert np.std(np.sum(shares[colluders:], axis=0)) == pytest.approx(20.0, rel=0.1)
    assert np.std(np.sum(shares, axis=0)) == pytest.approx(shared.deviation, rel=0.1)
    # power: if one honest site forgets its share it is found
    assert np.std(np.sum(shares[colluders + 1 :], axis=0)) < 0.9 * 20.0


def test_no_share_is_so_narrow_that_the_sum_would_be_no_gaussian() -> None:
    shared = SharedCounts(noise=2.0, sites=50, colluders=1)
    assert shared.own_noise == SMALLEST_SHARE
    assert shared.deviation == SMALLEST_SHARE * math.sqrt(50)


@pytest.mark.parametrize(("noise", "sites", "colluders"), [(1.0, 3, 3), (1.0, 3, 0), (1.0, 1, 1), (0.0, 3, 1)])
def test_what_protects_nobody_is_refused(noise: float, sites: int, colluders: int) -> None:
    with pytest.raises(PrivacyError, match="shared noise takes"):
        SharedCounts(noise=noise, sites=sites, colluders=colluders)

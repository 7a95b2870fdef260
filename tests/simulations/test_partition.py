"""Dealing rows to pretend hospitals: no row twice, sizes and mixes as asked."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mcrage import rng
from mcrage.errors import ConfigError
from simulations import partition


def _generator(seed: int = 0) -> np.random.Generator:
    return rng.stream(seed, "test")


def _labels(num_rows: int, seed: int) -> NDArray[np.object_]:
    labels = _generator(seed).choice(["a", "b", "c", None], size=num_rows, p=[0.6, 0.25, 0.1, 0.05])
    return np.asarray(labels, dtype=object)


def _assert_disjoint(parts: list[NDArray[np.int64]], num_rows: int) -> None:
    together = np.concatenate(parts)
    assert np.unique(together).size == together.size
    assert together.size == 0 or (together.min() >= 0 and together.max() < num_rows)
    for part in parts:
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@settings(max_examples=50, deadline=None)
@given(num_rows=st.integers(40, 300), num_sites=st.integers(1, 6), seed=st.integers(0, 100))
def test_every_row_is_dealt_once(num_rows: int, num_sites: int, seed: int) -> None:
    labels = _labels(num_rows, seed)
    for parts in (
        partition.size_skew(num_rows, num_sites, alpha=0.5, generator=_generator(seed)),
        partition.dirichlet_skew(labels, num_sites, alpha=1.0, generator=_generator(seed)),
    ):
        assert len(parts) == num_sites
        _assert_disjoint(parts, num_rows)
        assert sum(map(len, parts)) == num_rows
        assert min(map(len, parts)) >= 1


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 60), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_hospitals_get_the_sizes_they_ask_for_and_no_row_twice(sizes: list[int], seed: int) -> None:
    for parts in (
        partition.fixed_sizes(300, sizes, generator=_generator(seed)),
        partition.dirichlet_mix(_labels(300, seed), sizes, alpha=2.0, generator=_generator(seed)),
    ):
        assert [len(part) for part in parts] == sizes
        _assert_disjoint(parts, 300)


def test_every_row_can_be_dealt_by_mix_even_where_labels_run_out() -> None:
    parts = partition.dirichlet_mix(_labels(200, 1), [100, 100], alpha=0.1, generator=_generator())
    assert sorted(np.concatenate(parts)) == list(range(200))


def test_a_generator_of_the_same_seed_deals_the_same_rows() -> None:
    labels = _labels(500, 3)
    one, two, other = (partition.dirichlet_skew(labels, 4, alpha=0.5, generator=_generator(seed)) for seed in (7, 7, 8))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _spread(parts: list[NDArray[np.int64]], labels: NDArray[np.object_]) -> float:
    """Standard deviation of the share of label a over hospitals."""
    return float(np.std([(labels[part] == "a").mean() for part in parts]))


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    labels = _labels(20_000, 2)
    for deal in (
        lambda alpha: partition.dirichlet_skew(labels, 10, alpha=alpha, generator=_generator()),
        lambda alpha: partition.dirichlet_mix(labels, [1000] * 10, alpha=alpha, generator=_generator()),
    ):
        # Binomial noise alone gives about 0.015.
        assert _spread(deal(1e4), labels) < 0.03
        assert _spread(deal(1.0), labels) > 0.1


def test_a_small_alpha_skews_sizes_and_a_large_one_does_not() -> None:
    even = partition.size_skew(10_000, 10, alpha=1e6, generator=_generator())
    skewed = partition.size_skew(10_000, 10, alpha=0.5, generator=_generator(), minimum=50)
    assert max(map(len, even)) < 1.2 * min(map(len, even))
    assert max(map(len, skewed)) > 5 * min(map(len, skewed)) >= 250


def test_a_column_deals_rows_by_level_and_its_missing_rows_to_nobody() -> None:
    values = pd.Series(["west", None, "east", "west", "None"], dtype="category")
    parts = partition.by_column(values)
    assert {level: list(rows) for level, rows in parts.items()} == {"None": [4], "east": [2], "west": [0, 3]}


def test_labels_may_be_a_column_of_any_dtype() -> None:
    for labels in (
        pd.Series([True, False, None] * 40, dtype="boolean"),
        pd.Series(["x", "y", None] * 40, dtype="category"),
        pd.Series([1, 2, None] * 40, dtype="Int64"),
    ):
        _assert_disjoint(partition.dirichlet_skew(labels, 3, alpha=5.0, generator=_generator()), 120)


def test_what_cannot_be_dealt_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="add up to at most the 10 rows"):
        partition.fixed_sizes(10, [6, 6], generator=_generator())
    with pytest.raises(ConfigError, match="add up to at most the 4 rows"):
        partition.dirichlet_mix(["a"] * 4, [5], alpha=1.0, generator=_generator())
    with pytest.raises(ConfigError, match="at least 5 rows"):
        partition.size_skew(10, 3, alpha=1.0, generator=_generator(), minimum=5)
    with pytest.raises(ConfigError, match="alpha above 0"):
        partition.dirichlet_skew(["a"] * 10, 2, alpha=0.0, generator=_generator())
    with pytest.raises(ConfigError, match="choose a larger alpha"):
        partition.dirichlet_skew(["a"] * 20, 10, alpha=0.001, generator=_generator(), minimum=2)

"""Edges stand for dependence and not for noise, and are the strongest that a forest can have."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from mcrage.marginal.forest import FALSE_ALARMS, dependence, forest, rooted

Floats = NDArray[np.float64]

ROWS = 20_000
MARGINS = np.array([0.5, 0.3, 0.2])
PAIRS = 45


def table(strength: float) -> Floats:
    """Rows of two columns of three cells each; a share of ``strength`` is equal in both."""
    return ROWS * ((1 - strength) * np.outer(MARGINS, MARGINS) + strength * np.diag(MARGINS))


def information(cells: Floats) -> float:
    share = cells / cells.sum()
    return float((share * np.log(share / np.outer(share.sum(axis=1), share.sum(axis=0)))).sum())


def found(strength: float, noise: float, seed: int, *, variance: float | None = None) -> float:
    """Dependence that a noisy table of a sample of rows shows, whose single columns are known better."""
    draw = np.random.default_rng([seed, int(noise)])
    exact = draw.multinomial(ROWS, (table(strength) / ROWS).ravel()).reshape(3, 3)
    expected = np.outer(exact.sum(axis=1), exact.sum(axis=0)) / ROWS
    known = noise**2 if variance is None else variance
    return dependence(exact + draw.normal(0, noise, (3, 3)), expected, variance=known, pairs=PAIRS)


@pytest.mark.parametrize("noise", [0.0, 60.0, 400.0])
def test_columns_that_do_not_depend_on_each_other_rarely_have_an_edge(noise: float) -> None:
    """One family of 45 pairs in twenty may have an edge; of 200 more than 25 have one in one run of 50,000."""
    families = [any(found(0.0, noise, 1000 * run + pair) for pair in range(PAIRS)) for run in range(200)]
    assert sum(families) <= 25
    assert FALSE_ALARMS == 0.05


def test_the_same_test_fails_if_the_noise_is_not_known() -> None:
    assert all(found(0.0, 400.0, pair, variance=0.0) > 0 for pair in range(PAIRS))


def test_what_is_found_is_the_information_and_not_that_of_the_noise() -> None:
    truth = information(table(0.15))
    for noise in (0.0, 60.0, 120.0):
        mean = np.mean([found(0.15, noise, seed) for seed in range(100)])
        assert mean == pytest.approx(truth, rel=0.15)
    assert np.mean([found(0.15, 3000.0, seed) for seed in range(100)]) < 0.05, "noise drowns it"


def test_a_column_of_one_cell_depends_on_nothing() -> None:
    assert dependence(np.array([[5.0, 90.0]]), np.array([[50.0, 50.0]]), variance=0.0, pairs=1) == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_forest_has_more_dependence(seed: int) -> None:
    draw = np.random.default_rng(seed)
    strengths = {pair: float(draw.random() * (draw.random() < 0.7)) for pair in combinations(range(5), 2)}
    edges = forest(5, strengths)
    best = 0.0
    for number in range(5):
        for chosen in combinations(strengths, number):
            if len(rooted_columns(5, list(chosen))) == 5 and is_forest(5, list(chosen)):
                best = max(best, sum(strengths[pair] for pair in chosen))
    assert sum(strengths[pair] for pair in edges) == pytest.approx(best)
    assert is_forest(5, edges)
    assert all(strengths[pair] > 0 for pair in edges)


def is_forest(size: int, edges: list[tuple[int, int]]) -> bool:
    """Whether trees and edges are as many as columns."""
    roots = [column for column, parent in rooted(size, edges) if parent < 0] if not has_circle(size, edges) else []
    return len(roots) + len(edges) == size


def has_circle(size: int, edges: list[tuple[int, int]]) -> bool:
    tree = list(range(size))
    for first, second in edges:
        if tree[first] == tree[second]:
            return True
        tree = [tree[first] if number == tree[second] else number for number in tree]
    return False


def rooted_columns(size: int, edges: list[tuple[int, int]]) -> set[int]:
    return set(range(size)) if has_circle(size, edges) else {column for column, _ in rooted(size, edges)}


def test_every_column_comes_after_its_parent_and_hubs_are_roots() -> None:
    edges = [(0, 3), (3, 4), (2, 3), (1, 5)]
    order = rooted(6, edges)
    assert order[0] == (3, -1)
    assert (1, -1) in order
    assert sorted(column for column, _ in order) == [0, 1, 2, 3, 4, 5]
    assert {tuple(sorted(pair)) for pair in order if pair[1] >= 0} == {tuple(sorted(edge)) for edge in edges}
    seen = {-1}
    for column, parent in order:
        assert parent in seen
        seen.add(column)
    assert rooted(0, []) == []

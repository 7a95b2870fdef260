"""How rows are dealt to pretend hospitals: row positions only, so that no table is copied and no dtype touched.

Every function returns one sorted array of positions per hospital; no row is dealt twice. What is drawn comes from the
caller's generator.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from mcrage.errors import ConfigError

Rows = NDArray[np.int64]

_MOST_DRAWS = 1000


def by_column(values: "pd.Series[Any]") -> dict[str, Rows]:
    """Rows of each level of a column, by level in sorted order; rows where it is missing go to nobody."""
    texts = values.astype(object).where(values.notna(), None)
    levels = sorted({str(value) for value in texts if value is not None})
    return {level: np.flatnonzero((texts.astype(str) == level) & texts.notna()).astype(np.int64) for level in levels}


def fixed_sizes(num_rows: int, sizes: Sequence[int], *, generator: np.random.Generator) -> list[Rows]:
    """Rows at random, ``sizes[k]`` of them to hospital k; the rest is dealt to nobody.

    Raises:
        ConfigError: If more rows are asked for than there are.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > num_rows:
        raise ConfigError(f"sizes must be at least 0 and add up to at most the {num_rows:,} rows, not {sum(sizes):,}")
    order = generator.permutation(num_rows)
    ends = np.cumsum(sizes)
    return [np.sort(order[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def size_skew(
    num_rows: int, num_sites: int, *, alpha: float, generator: np.random.Generator, minimum: int = 1
) -> list[Rows]:
    """All rows at random, hospitals of Dirichlet(alpha) shares: the smaller alpha, the more unequal.

    Every hospital first gets ``minimum`` rows.
    """
    _check(num_rows, num_sites, alpha=alpha, minimum=minimum)
    spare = num_rows - num_sites * minimum
    sizes = minimum + generator.multinomial(spare, generator.dirichlet(np.full(num_sites, alpha)))
    return fixed_sizes(num_rows, [int(size) for size in sizes], generator=generator)


def dirichlet_skew(
    labels: ArrayLike, num_sites: int, *, alpha: float, generator: np.random.Generator, minimum: int = 1
) -> list[Rows]:
    """All rows, those of each label dealt in Dirichlet(alpha) shares (Hsu et al., 2019; label skew of Li et al., 2022).

    Small alpha gives hospitals that hold almost one label only; large alpha gives all the same mix. Sizes differ too.

    Args:
        labels: Label or group of each row, shape (rows,); missing counts as a label of its own.
        num_sites: Number of hospitals.
        alpha: Concentration.
        generator: Draws shares and order; shares are drawn again until every hospital has ``minimum`` rows.
        minimum: Fewest rows of a hospital.

    Raises:
        ConfigError: If the rows are too few, or no draw gave every hospital its minimum.
    """
    codes = _codes(labels)
    _check(len(codes), num_sites, alpha=alpha, minimum=minimum)
    for _ in range(_MOST_DRAWS):
        site = np.empty(len(codes), dtype=np.int64)
        for code in range(codes.max() + 1):
            rows = generator.permutation(np.flatnonzero(codes == code))
            shares = generator.dirichlet(np.full(num_sites, alpha))
            site[rows] = np.searchsorted(np.cumsum(shares)[:-1] * len(rows), np.arange(len(rows)), side="right")
        if np.bincount(site, minlength=num_sites).min() >= minimum:
            return [np.flatnonzero(site == number).astype(np.int64) for number in range(num_sites)]
    raise ConfigError(
        f"no hospital split gave all {num_sites} hospitals {minimum} rows with alpha {alpha}; "
        "choose a larger alpha, fewer hospitals or a smaller minimum"
    )


def dirichlet_mix(
    labels: ArrayLike, sizes: Sequence[int], *, alpha: float, generator: np.random.Generator
) -> list[Rows]:
    """``sizes[k]`` rows to hospital k, whose label mix is Dirichlet(alpha · overall mix); the rest goes to nobody.

    Where a label runs out, the hospital takes rows of the labels that are left, in their proportions.

    Raises:
        ConfigError: If more rows are asked for than there are.
    """
    codes = _codes(labels)
    if min(sizes, default=0) < 0 or sum(sizes) > len(codes):
        raise ConfigError(f"sizes must be at least 0 and add up to at most the {len(codes):,} rows, not {sum(sizes):,}")
    counts = np.bincount(codes)
    left = [[*generator.permutation(np.flatnonzero(codes == code))] for code in range(len(counts))]
    dealt = []
    for size in sizes:
        mix = generator.dirichlet(alpha * counts / counts.sum())
        wanted = _affordable(generator.multinomial(size, mix), np.array([len(rows) for rows in left]), generator)
        rows = [left[code].pop() for code, number in enumerate(wanted) for _ in range(number)]
        dealt.append(np.sort(np.array(rows, dtype=np.int64)))
    return dealt


def _affordable(wanted: Rows, stock: Rows, generator: np.random.Generator) -> Rows:
    """``wanted`` cut to ``stock``, with what is cut drawn from the rest of the stock."""
    taken = np.minimum(wanted, stock)
    extra = generator.multivariate_hypergeometric(stock - taken, int((wanted - taken).sum()))
    return np.asarray(taken + extra, dtype=np.int64)


def _codes(labels: ArrayLike) -> Rows:
    codes, _ = pd.factorize(np.asarray(pd.Series(labels).astype(object)), sort=False, use_na_sentinel=False)
    return np.asarray(codes, dtype=np.int64)


def _check(num_rows: int, num_sites: int, *, alpha: float, minimum: int) -> None:
    if num_sites < 1 or not alpha > 0 or minimum < 0:
        raise ConfigError(
            f"num_sites must be at least 1, alpha above 0 and minimum at least 0, not {num_sites}, {alpha}, {minimum}"
        )
    if num_sites * minimum > num_rows:
        raise ConfigError(
            f"{num_sites} hospitals of at least {minimum} rows need {num_sites * minimum:,}; got {num_rows:,}"
        )

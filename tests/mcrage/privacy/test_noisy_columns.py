"""Noisy histograms of several sites: added up first, and read after that."""

from collections.abc import Callable
from functools import reduce
from operator import add

import numpy as np
import pandas as pd

from mcrage.data.groups import MINIMUM_CELL
from mcrage.data.marginals import Marginals
from mcrage.data.schema import TableSchema
from mcrage.privacy.counts import noisy_columns, noisy_marginals, readable_marginals
from mcrage.privacy.keyed import derive

KEY = bytes(range(32))
Rows = Callable[..., pd.DataFrame]


def test_noise_alone_adds_up_to_nothing_over_sites_and_no_small_count_is_told(
    clinic_schema: TableSchema, clinic_rows: Rows
) -> None:
    """Where every site took its own negative counts out, levels that nobody has would be held by many."""
    tables = [clinic_rows(100, seed) for seed in range(20)]
    keys = [derive(KEY, seed) for seed in range(20)]
    released = [
        noisy_columns(table, clinic_schema, noise=8.0, key=key) for table, key in zip(tables, keys, strict=True)
    ]
    counts = np.abs(np.concatenate([cells for each in released for cells in each.values()]))
    assert counts[counts > 0].min() >= MINIMUM_CELL
    together = readable_marginals(reduce(add, released), clinic_schema, deviation=8.0 * np.sqrt(20))
    cut_first = reduce(
        add,
        [noisy_marginals(table, clinic_schema, noise=8.0, key=key) for table, key in zip(tables, keys, strict=True)],
    )
    exact = reduce(add, [Marginals.of(table, clinic_schema, minimum=0) for table in tables])
    held_by_nobody = [
        sum(each[name][exact[name] == 0].sum() / each[name].sum() for name in exact) for each in (together, cut_first)
    ]
    assert held_by_nobody[0] < 0.75 * held_by_nobody[1]
    assert Marginals.from_wire(together.to_wire(), clinic_schema).to_wire() == together.to_wire()

"""Column shapes of SDMetrics, of two tables in a folder: ``real.csv`` and ``synthetic.csv``.

    python run_sdmetrics.py FOLDER NUMERIC_COLUMN…

Prints JSON: by column the complement of the total variation and, for numbers, that of the Kolmogorov-Smirnov statistic.
SDMetrics drops missing cells, so that they are made a category; numbers are cut at the deciles of the real rows.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sdmetrics.single_column import KSComplement, TVComplement


def main() -> None:
    """Prints the scores."""
    folder, numeric = Path(sys.argv[1]), set(sys.argv[2:])
    real, synthetic = (
        pd.read_csv(folder / f"{name}.csv", dtype=object, keep_default_na=False) for name in ("real", "synthetic")
    )
    scores = {}
    for name in real.columns:
        columns, score = (real[name], synthetic[name]), {}
        if name in numeric:
            columns = tuple(pd.to_numeric(column) for column in columns)
            score["ks"] = float(KSComplement.compute(*columns))
            columns = tuple(binned(column, columns[0]) for column in columns)
        scores[name] = score | {"tv": float(TVComplement.compute(*columns))}
    print(json.dumps(scores))


def binned(values: pd.Series, real: pd.Series) -> pd.Series:
    """Deciles of the real column as intervals, closed on the left; missing as one of its own."""
    cuts = sorted({-np.inf, *real.quantile(np.linspace(0.1, 0.9, 9)), np.inf})
    return pd.cut(values, cuts, right=False).astype(str)


if __name__ == "__main__":
    main()

"""Effects on the outcome, estimated from generated rows and compared with the truth, by group.

Within a group of the simulated cohort the outcome is logistic in the findings, so that a logistic regression estimates
the true coefficients themselves. Distances are counted in the standard errors that an estimate from real rows has:
those of the Fisher information at the true coefficients, for a stated number of rows. Rows that follow the truth are
within two of them in 95 % of the coefficients.

Shape: a design of n rows and K coefficients, the intercept first, is an array (n, K).
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.linalg import LinAlgWarning
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from simulations.cohort import Cohort
from simulations.truth import MINORITY, TARGET, Floats, findings, matches

FEWEST_ROWS = 10
"""Rows in which a finding must not have its usual value, or its coefficient is not looked at."""
WITHIN = 2.0
"""Standard errors."""
_LARGEST = 15.0  # log odds per unit of a finding: beyond it the finding separates the outcomes


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Coefficients of one group, beside the truth.

    Attributes:
        names: Findings, the intercept first, that ``num_rows`` real rows tell about.
        truth: True coefficients; shape (K,).
        standard_error: Of an estimate from ``num_rows`` real rows; shape (K,).
        estimate: From the rows that are judged; NaN where they tell nothing, as when a finding does not occur in them.
        num_rows: Real rows that the standard errors are for.
    """

    names: tuple[str, ...]
    truth: Floats
    standard_error: Floats
    estimate: Floats
    num_rows: int

    @property
    def errors(self) -> Floats:
        """Distance of each estimate from the truth in standard errors; infinite where there is no estimate."""
        distance = np.abs(self.estimate - self.truth) / self.standard_error
        return np.where(np.isnan(distance), np.inf, distance)

    @property
    def share_within(self) -> float:
        """Share of the coefficients within :data:`WITHIN` standard errors; a coefficient that was lost is not."""
        return float(np.mean(self.errors <= WITHIN))


def effects_within(
    rows: pd.DataFrame, cohort: Cohort, *, real: pd.DataFrame, minority: bool, num_rows: int | None = None
) -> Effects:
    """The effects that rows of the minority, or of everybody else, show beside the true ones.

    Args:
        rows: Rows to judge; those of the other group are left out.
        cohort: Knows the truth.
        real: Many real rows of the cohort, which tell what a row says about each coefficient.
        minority: Which group.
        num_rows: Real rows that the standard errors are for; as many as ``rows`` has of the group if None. Many
            generated rows and the number of training rows show a generator's own error without that of the draw.
    """
    judged_rows, reference = (table[(matches(table["race"], MINORITY) == 1) == minority] for table in (rows, real))
    size = len(judged_rows) if num_rows is None else num_rows
    true = cohort.coefficients(minority=minority)
    expected = _design(reference)
    known = _unusual(expected) * size / len(expected) >= FEWEST_ROWS
    design = _design(judged_rows)
    seen = known & (_unusual(design) >= FEWEST_ROWS)
    estimate = np.full(len(true), np.nan)
    estimate[seen] = logistic(design[:, seen], judged_rows[TARGET].to_numpy(dtype=bool))
    truth = np.array([*true.values()])[known]
    return Effects(
        names=tuple(name for name, is_known in zip(true, known, strict=True) if is_known),
        truth=truth,
        standard_error=standard_errors(expected[:, known], truth, num_rows=size),
        estimate=estimate[known],
        num_rows=size,
    )


def logistic(design: Floats, event: NDArray[np.bool_]) -> Floats:
    """Maximum likelihood coefficients, shape (K,); NaN where the likelihood has no maximum."""
    lost = np.full(design.shape[1], np.nan)
    if np.unique(event).size < 2:
        return lost
    model = LogisticRegression(C=np.inf, fit_intercept=False, solver="newton-cholesky")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model.fit(design, event)
        except (ConvergenceWarning, LinAlgWarning):
            return lost
    return np.where(np.abs(model.coef_[0]) < _LARGEST, model.coef_[0], np.nan)


def standard_errors(design: Floats, coefficients: Floats, *, num_rows: int) -> Floats:
    """Standard errors, shape (K,), of maximum likelihood estimates from ``num_rows`` rows like those of a design."""
    risk = 1 / (1 + np.exp(-(design @ coefficients)))
    information = (design * (risk * (1 - risk))[:, None]).T @ design / len(design)
    errors: Floats = np.sqrt(np.diag(np.linalg.inv(information)) / num_rows)
    return errors


def _design(table: pd.DataFrame) -> Floats:
    """The intercept and the findings, as :meth:`Cohort.coefficients` orders them."""
    return np.stack([np.ones(len(table)), *findings(table).values()], axis=1)


def _unusual(design: Floats) -> NDArray[np.int64]:
    """Rows in which each column is not 0, the unremarkable value of a finding; shape (K,)."""
    return np.asarray((design != 0).sum(axis=0))

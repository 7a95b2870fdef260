"""From the scores of all hospitals to the rows of ``results.json``: metrics, gaps, gains, gap closed and verdicts.

Site ``all`` is the federation: every hospital's own model on its test rows. Intervals are 95 % percentile intervals
of a bootstrap over test patients, each hospital's drawn for itself. They say how sure we are of the models that were
trained, not how other training rows would have turned out. The federation's share of the gap closed draws the
hospitals as well.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mcrage.data.groups import MINIMUM_CELL
from mcrage.data.schema import TableSchema
from mcrage.errors import ConfigError
from mcrage.evaluation import metrics as metric
from mcrage.evaluation.arms import SiteScores
from mcrage.evaluation.fairness import GAP_CLOSED_METRICS, GAPS, LOCAL, POOLED, gap_closed, group_gaps, verdict
from mcrage.evaluation.metrics import METRICS, Floats
from mcrage.evaluation.strata import Strata
from mcrage.evaluation.suppression import REASON, hidden_cells
from mcrage.rng import stream

ALL_SITES: Final = "all"
NO_GAP: Final = "no gap: pooled rows do not do better than local ones beyond the interval"
TOO_FEW_GROUPS: Final = "insufficient: fewer than two groups can be shown"
UNDEFINED: Final = "not defined on these test rows"
NO_INTERVAL: Final = "no interval: too few bootstrap replicates have a value"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Records for the tables of the same names in ``results.json`` (:class:`mcrage.evaluation.report.Results`).

    Attributes:
        rows: One per site, group, arm, model and metric: value, low, high, n (test patients) and reason. The group of a
            gap is the feature whose groups are compared.
        gap_closed: One per site, group, arm, model and metric: the share, low, high and reason.
        verdicts: One per site, group, arm and model: ``helps``, ``no evidence`` or ``harms``, from the difference of
            AUROC to the hospital's own rows and its interval; none where there is no interval.
    """

    rows: list[Row] = field(default_factory=list)
    gap_closed: list[Row] = field(default_factory=list)
    verdicts: list[Row] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scope:
    """One hospital or the federation: metrics with the value first and its replicates after it.

    Attributes:
        site: Name of the hospital, or ``all``.
        arms: Names of the arms.
        models: Names of the models.
        values: Metrics, shape (arms, models, groups, metrics, 1 + R).
        drawn: The same with hospitals drawn as well; ``values`` at one hospital.
        num_patients: Test patients of each group.
        hidden: Why a group may not be shown; empty where it may.
        reasons: Why an arm has no metrics, by arm and model.
    """

    site: str
    arms: tuple[str, ...]
    models: tuple[str, ...]
    values: Floats
    drawn: Floats
    num_patients: NDArray[np.int64]
    hidden: list[str]
    reasons: Mapping[tuple[str, str], str]

    def gains(self, values: Floats) -> Floats:
        """What each arm adds to the hospital's own rows."""
        return values - values[[self.arms.index(LOCAL)]]

    def reason(self, group: int, model: str, *arms: str) -> str:
        """Why there is no number for a group, a model and any of these arms; empty where there is one."""
        return self.hidden[group] or next((self.reasons[a, model] for a in arms if (a, model) in self.reasons), "")


def summarise(
    sites: Sequence[SiteScores],
    schema: TableSchema,
    *,
    seed: int = 0,
    num_replicates: int = 500,
    minimum: int = MINIMUM_CELL,
    common_test: bool = False,
) -> Summary:
    """Metrics with intervals for every group at every hospital and over the federation.

    Args:
        sites: Scores of each hospital, for the same arms and models; arm ``local`` among them.
        schema: The data dictionary.
        seed: Seed of the bootstrap.
        num_replicates: Bootstrap replicates.
        minimum: Groups with fewer patients with or without the event are not shown. A lower number than
            :data:`MINIMUM_CELL` is for public data only.
        common_test: Whether all hospitals were tested on the same rows, in the same order.

    Raises:
        ConfigError: If there is no site, or if the sites differ in arms, models or a common test set.
    """
    _check(sites, common_test=common_test)
    strata = Strata([site.codes for site in sites], schema)
    groups = [str(group) for group in strata.groups]
    hidden = _hidden(sites[:1] if common_test else sites, strata, minimum=minimum)
    summary = Summary()
    for scope in _scopes(sites, strata, hidden, seed=seed, num_replicates=num_replicates, common_test=common_test):
        summary.rows.extend(_metric_rows(scope, groups))
        summary.rows.extend(_gap_rows(scope, strata.by))
        summary.gap_closed.extend(_gap_closed_rows(scope, groups))
        summary.verdicts.extend(_verdicts(scope, groups))
    return summary


def _check(sites: Sequence[SiteScores], *, common_test: bool) -> None:
    if not sites:
        raise ConfigError("there is no site to summarise; give the scores of at least one")
    names = [site.site for site in sites]
    if len(set(names)) < len(names) or ALL_SITES in names:
        raise ConfigError(f"site names must differ from each other and from '{ALL_SITES}', got {', '.join(names)}")
    first = sites[0]
    if LOCAL not in first.arms:
        raise ConfigError(f"arm '{LOCAL}' is what others are compared with; got only {', '.join(first.arms)}")
    for site in sites[1:]:
        if (site.arms, site.models) != (first.arms, first.models):
            raise ConfigError(f"sites {first.site} and {site.site} were not evaluated on the same arms and models")
        if common_test and not (np.array_equal(site.event, first.event) and np.array_equal(site.codes, first.codes)):
            raise ConfigError(f"sites {first.site} and {site.site} were not tested on the same rows")


def _hidden(tests: Sequence[SiteScores], strata: Strata, *, minimum: int) -> list[list[str]]:
    """Why a group may not be shown, by test set and, last, for all of them together."""
    cells = strata.cells([strata.patients(site.codes, site.event, site.patients) for site in tests])
    hidden = hidden_cells(cells, minimum=minimum).reshape(-1, len(strata.groups))
    reason = REASON.format(minimum=minimum)
    return [[reason if is_hidden else "" for is_hidden in of_test] for of_test in np.asarray(hidden).tolist()]


def _scopes(
    sites: Sequence[SiteScores],
    strata: Strata,
    hidden: list[list[str]],
    *,
    seed: int,
    num_replicates: int,
    common_test: bool,
) -> Iterator[_Scope]:
    """Each hospital in turn and then the federation, whose sums add up on the way."""
    num_sites = len(sites)
    draws_of_sites = stream(seed, "bootstrap", "sites").multinomial(
        num_sites, np.full(num_sites, 1 / num_sites), size=num_replicates
    )
    fixed: Floats = np.zeros(1)
    drawn: Floats = np.zeros(1)
    patients = []
    for position, site in enumerate(sites):
        # the same patients stand in the same replicates wherever hospitals share them
        generator = stream(seed, "bootstrap", "patients", "common" if common_test else site.site)
        sums = _sums(site, strata, num_replicates=num_replicates, generator=generator)
        fixed = fixed + sums
        drawn = drawn + sums * np.concatenate([[1], draws_of_sites[:, position]])
        reasons = hidden[0 if common_test else position]
        values = _shown_metrics(sums, reasons)
        patients.append(
            np.array([len(np.unique(site.patients[rows])) for rows in strata.rows(site.codes)], dtype=np.int64)
        )
        yield _Scope(
            site=site.site,
            arms=site.arms,
            models=site.models,
            values=values,
            drawn=values,
            num_patients=patients[-1],
            hidden=reasons,
            reasons=site.reasons,
        )
    yield _Scope(
        site=ALL_SITES,
        arms=sites[0].arms,
        models=sites[0].models,
        values=_shown_metrics(fixed, hidden[-1]),
        drawn=_shown_metrics(drawn, hidden[-1]),
        num_patients=patients[0] if common_test else np.sum(patients, axis=0),
        hidden=hidden[-1],
        reasons={key: f"{site.site}: {reason}" for site in sites for key, reason in site.reasons.items()},
    )


def _shown_metrics(sums: Floats, hidden: Sequence[str]) -> Floats:
    """Metrics of the groups that may be shown, NaN for the others."""
    values = metric.metrics(sums)
    values[:, :, np.array([bool(reason) for reason in hidden])] = np.nan
    return values


def _sums(site: SiteScores, strata: Strata, *, num_replicates: int, generator: np.random.Generator) -> Floats:
    """Sums of every arm, model and group, the observed ones first; shape (arms, models, groups, S, 1 + R)."""
    draws = metric.patient_draws(site.patients, num_replicates, generator)
    scores = site.scores.reshape(-1, len(site.event))
    missing = np.asarray(np.isnan(scores).any(axis=1))
    scores = np.where(missing[:, None], 0.0, scores)
    result = np.zeros((len(scores), len(strata.groups), metric.NUM_SUMS, 1 + num_replicates))
    for group, rows in enumerate(strata.rows(site.codes)):
        if len(rows):
            of_group = site.event[rows], scores[:, rows], site.thresholds.ravel()
            result[:, group, :, :1] = metric.sums(*of_group, np.ones((len(rows), 1)))
            result[:, group, :, 1:] = metric.sums(*of_group, draws[rows])
    result[missing] = np.nan
    return result.reshape(*site.thresholds.shape, *result.shape[1:])


def _metric_rows(scope: _Scope, groups: Sequence[str]) -> Iterator[Row]:
    for suffix, values in (("", scope.values), ("_difference", scope.gains(scope.values))):
        low, high = metric.interval(values[..., 1:])
        found = np.stack([values[..., 0], low, high], axis=-1)
        for i, j, g in np.ndindex(found.shape[:3]):
            arm, model = scope.arms[i], scope.models[j]
            if suffix and arm == LOCAL:
                continue
            reason = scope.reason(g, model, arm, LOCAL if suffix else arm)
            n = None if scope.hidden[g] else int(scope.num_patients[g])
            for name, of_metric in zip(METRICS, found[i, j, g].tolist(), strict=True):
                yield {**_row(scope.site, groups[g], arm, model, name + suffix), **_found(of_metric, reason), "n": n}


def _gap_rows(scope: _Scope, by: Mapping[str, NDArray[np.int64]]) -> Iterator[Row]:
    for feature, groups in by.items():
        shown = [group for group in groups.tolist() if not scope.hidden[group]]
        found = np.full((len(scope.arms), len(scope.models), len(GAPS), 3), np.nan)
        if len(shown) > 1:
            gaps = group_gaps(scope.values[:, :, shown])
            found = np.stack([gaps[..., 0], *metric.interval(gaps[..., 1:])], axis=-1)
        n = int(scope.num_patients[shown].sum()) if len(shown) > 1 else None
        for i, j in np.ndindex(found.shape[:2]):
            arm, model = scope.arms[i], scope.models[j]
            reason = scope.reasons.get((arm, model), "") if len(shown) > 1 else TOO_FEW_GROUPS
            for name, of_gap in zip(GAPS, found[i, j].tolist(), strict=True):
                yield {**_row(scope.site, feature, arm, model, name), **_found(of_gap, reason), "n": n}


def _gap_closed_rows(scope: _Scope, groups: Sequence[str]) -> Iterator[Row]:
    if POOLED not in scope.arms:
        return
    for name in GAP_CLOSED_METRICS:
        values = scope.drawn[..., METRICS.index(name), :]
        local, pooled = (values[[scope.arms.index(arm)]] for arm in (LOCAL, POOLED))
        found, is_gap = gap_closed(values, local, pooled)
        for i, j, g in np.ndindex(is_gap.shape):
            arm, model = scope.arms[i], scope.models[j]
            if arm in (LOCAL, POOLED):
                continue
            reason = scope.reason(g, model, arm, LOCAL, POOLED) or ("" if is_gap[i, j, g] else NO_GAP)
            yield {**_row(scope.site, groups[g], arm, model, name), **_found(found[i, j, g].tolist(), reason)}


def _verdicts(scope: _Scope, groups: Sequence[str]) -> Iterator[Row]:
    gains = scope.gains(scope.values[..., METRICS.index("auroc"), :])
    found = np.stack([gains[..., 0], *metric.interval(gains[..., 1:])], axis=-1)
    for i, j, g in np.ndindex(found.shape[:3]):
        arm, model = scope.arms[i], scope.models[j]
        if arm == LOCAL or scope.reason(g, model, arm, LOCAL) or not np.isfinite(found[i, j, g]).all():
            continue
        difference, low, high = (round(float(number), 6) for number in found[i, j, g])
        limits = {"difference": difference, "low": low, "high": high}
        whose = {"site": scope.site, "group": groups[g], "arm": arm, "model": model}
        yield {**whose, "verdict": verdict(low, high), **limits}


def _row(site: str, group: str, arm: str, model: str, metric_name: str) -> Row:
    return {"site": site, "group": group, "arm": arm, "model": model, "metric": metric_name}


def _found(numbers: Sequence[float], reason: str) -> Row:
    """Value, low and high rounded to six digits, or nulls and the reason for them."""
    if reason or not np.isfinite(numbers[0]):
        return {"value": None, "low": None, "high": None, "reason": reason or UNDEFINED}
    if not np.isfinite(numbers).all():
        return {"value": round(numbers[0], 6), "low": None, "high": None, "reason": NO_INTERVAL}
    value, low, high = (round(float(number), 6) for number in numbers)
    return {"value": value, "low": low, "high": high, "reason": ""}

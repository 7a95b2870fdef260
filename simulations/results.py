"""From scored arms to the files of a finished experiment."""

import math
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import pandas as pd

from mcrage import __version__
from mcrage.data.repair import Repairs
from mcrage.data.schema import TableSchema
from mcrage.evaluation.arms import SiteScores
from mcrage.evaluation.membership import MembershipReport
from mcrage.evaluation.report import ALL, HEADLINE_METRIC, RunResults
from mcrage.evaluation.summary import Summary, summarise
from mcrage.privacy.statement import PrivacyAccount, statements
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.render.html import write_report
from server.rounds import FederationResult, RoundRecord
from simulations.arms import COMMON, OWN, SiteTables, load_scores
from simulations.attacks import attack_rows
from simulations.findings import group_sizes, minority_marginals
from simulations.settings import ExperimentConfig, Places
from simulations.study import Study

RESULTS = "results.json"
REPORT = "report.html"
OWN_RESULTS = "results-own.json"
OWN_REPORT = "report-own.html"
"""The same arms on each hospital's own held-out rows, where the other two are about a common test set."""

ENGINE = "in-process grid: Flower's ServerApp and ClientApp, without Ray"
HEADLINE_ARM = "federated_target"
_PACKAGES = ("flwr", "torch", "numpy", "pandas", "scikit-learn", "imbalanced-learn")
_MARGINAL_ROWS = 2000

Plans = Mapping[str, Mapping[str, RebalancePlan]]
"""What each hospital takes from the pool, by hospital and arm."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """An experiment whose arms are scored.

    Attributes:
        study: Its hospitals.
        sites: Their rows, as they were divided.
        outcome: The federation.
        fidelity: Of the averaged model, by round.
        plans: What each hospital took from the pool.
        repairs: What the schema's rules did to the pool of the headline arm.
        attacks: What the model gives away.
        started: When it started, on the monotonic clock.
    """

    study: Study
    sites: Sequence[SiteTables]
    outcome: FederationResult
    fidelity: Mapping[int, float]
    plans: Plans
    repairs: Repairs
    attacks: MembershipReport
    started: float


def write_results(finished: Finished, config: ExperimentConfig, places: Places, pool: Executor) -> RunResults:
    """Writes results and report for each test set; returns those on the common one, if there is one.

    Args:
        finished: The experiment.
        config: Its settings.
        places: Where its scores are and its files go.
        pool: Summarises each test set in a process of its own; it is done with afterwards.
    """
    study = finished.study
    scores = [load_scores(places.scores(site_id)) for site_id in study.site_ids]
    summarised = {test_set: pool.submit(_summary, scores, test_set, study.schema, config) for test_set in scores[0]}
    summaries = {test_set: each.result() for test_set, each in summarised.items()}
    pool.shutdown()  # the system tells the memory of processes that have ended only
    headline = COMMON if COMMON in summaries else OWN
    run = _run(finished, config)
    minorities = _minority_groups(summaries[headline], run)
    shared = {
        "group_sizes": _group_sizes(finished, minimum=config.minimum_cell),
        "marginals": _marginals(finished, minorities, config),
        "history": _history(finished),
        "privacy": _privacy(finished),
        "attacks": attack_rows(finished.attacks),
    }
    run |= {
        "minority_groups": minorities,
        "seconds": round(time.monotonic() - finished.started, 1),
        "peak_memory_mb": _peak_memory_mb(places.num_workers),
    }
    found = {
        test_set: RunResults.parse(vars(summary) | shared | {"run": run | {"test_set": test_set}})
        for test_set, summary in summaries.items()
    }
    if headline == COMMON:
        write_report(found[OWN], places.out / OWN_REPORT)
        found[OWN].write(places.out / OWN_RESULTS)
    write_report(found[headline], places.out / REPORT)
    found[headline].write(places.out / RESULTS)  # the last file: what has it is done
    return found[headline]


def _summary(
    scores: Sequence[Mapping[str, SiteScores]], test_set: str, schema: TableSchema, config: ExperimentConfig
) -> Summary:
    return summarise(
        [of_site[test_set] for of_site in scores],
        schema,
        seed=config.seed,
        num_replicates=config.num_replicates,
        minimum=config.minimum_cell,
        common_test=test_set == COMMON,
    )


def _minority_groups(summary: Summary, run: Mapping[str, Any]) -> tuple[str, ...]:
    """The groups that the run names, else those that are few among the test patients."""
    rows = [row for row in summary.rows if (row["site"], row["arm"], row["metric"]) == (ALL, "local", HEADLINE_METRIC)]
    return RunResults.parse({"run": run, "rows": rows}).minority_groups


def _group_sizes(finished: Finished, *, minimum: int) -> list[dict[str, Any]]:
    plans = {site: of_site[HEADLINE_ARM] for site, of_site in finished.plans.items()}
    sizes = group_sizes(finished.sites, plans, finished.study.schema, minimum=minimum)
    return [size.model_dump() for size in sizes]


def _marginals(finished: Finished, minorities: Sequence[str], config: ExperimentConfig) -> list[dict[str, Any]]:
    marginals = minority_marginals(
        pd.concat([tables.train for tables in finished.sites], ignore_index=True),
        finished.outcome.model,
        minorities,
        num_rows=_MARGINAL_ROWS,
        minimum=config.minimum_cell,
        seed=config.seed,
    )
    return [marginal.model_dump() for marginal in marginals]


def _history(finished: Finished) -> list[dict[str, Any]]:
    names = dict(zip(finished.study.site_ids, finished.study.hospitals.tables, strict=True))
    return [_round(record, finished.fidelity, names) for record in finished.outcome.history]


def _privacy(finished: Finished) -> list[dict[str, Any]]:
    """What the ledgers say, hospitals of which the same can be said together."""
    names = dict(zip(finished.study.site_ids, finished.study.hospitals.tables, strict=True))
    named = {site: replace(account, site=names[site]) for site, account in finished.outcome.accounts.items()}
    by_name = {account.site: account for account in named.values()}
    return [_site_privacy(sites, text, by_name[sites[0]]) for sites, text in statements(named.values()).items()]


def _site_privacy(sites: Sequence[str], text: str, account: PrivacyAccount) -> dict[str, Any]:
    return {
        "site": ", ".join(sites),
        "statement": text,
        "since": account.since,
        "delta": account.delta,
        "epsilon_run": account.epsilon_run if math.isfinite(account.epsilon_run) else None,
        "epsilon": account.epsilon if math.isfinite(account.epsilon) else None,
        "events": tuple(event.in_words for event in account.events),
    }


def _round(record: RoundRecord, fidelity: Mapping[int, float], names: Mapping[str, str]) -> dict[str, Any]:
    return {
        "round": record.server_round,
        "loss": record.mean_loss if record.losses else None,
        "fidelity": fidelity.get(record.server_round),
        "sites": tuple(names[site] for site in record.sites),
        "dropped": tuple(names[site] for site in record.dropped),
    }


def _run(finished: Finished, config: ExperimentConfig) -> dict[str, Any]:
    study = finished.study
    return {
        "config": config.to_flat(),
        "seed": config.seed,
        "dataset": study.dataset,
        "sites": tuple(study.hospitals.tables),
        "minority_groups": study.minority_groups,
        "minimum_cell": config.minimum_cell,
        "engine": ENGINE,
        "repairs": tuple(finished.repairs.lines),
        "versions": {
            "mcrage": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        "seconds": 0.0,
        "peak_memory_mb": 0.0,
    }


def _peak_memory_mb(num_workers: int) -> float:
    """Highest resident memory of this process, plus that of the largest worker for every worker."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    own, child = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return round((own + num_workers * child) / unit, 1)

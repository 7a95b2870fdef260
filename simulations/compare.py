"""One experiment with several seeds: how much of a result is the draw of the hospitals, the training and the sampling.

A configuration is a TOML file::

    dataset = "cohort"
    seeds = [0, 1, 2]

    [cohort]            # size of the simulated cohort; not for other data sets
    num_sites = 8

    [settings]          # of the experiment and its federation
    target_multiple = 3.0

Every seed has a folder of its own, and a seed whose folder has results is not run again.
"""

import json
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from scipy import stats

from mcrage.errors import ConfigError
from mcrage.evaluation.report import ALL, HEADLINE_METRIC, RunResults
from mcrage.progress import ProgressReport
from mcrage.render.text import ARM_NAMES, MODEL_NAMES, name_of
from simulations.cohort import CohortConfig
from simulations.experiment import run_experiment
from simulations.results import RESULTS
from simulations.settings import ExperimentConfig, Places, parse_config
from simulations.study import COHORT, written_study
from simulations.workers import worker_pool

SUMMARY = "summary.json"
_KEYS = ["site", "group", "model", "arm"]


class Comparison(BaseModel):
    """What is compared.

    Attributes:
        dataset: Name of the data set.
        seeds: Each draws the cohort or deals the public data set anew, splits, trains and samples anew.
        sites: Hospitals to summarise; ``all`` is the federation.
        cohort: Size and rule of the simulated cohort; its seed is the experiment's.
        redraw_rule: Whether each seed draws another truth of the cohort as well: one that nothing was tuned on.
        settings: Of the experiment and its federation, without the seed; what it leaves out has its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    dataset: str
    seeds: list[int] = Field(min_length=1)
    sites: list[str] = [ALL]
    cohort: dict[str, int | float] = {}
    redraw_rule: bool = False
    settings: dict[str, bool | int | float | str] = {}

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        """The comparison of a TOML file.

        Raises:
            ConfigError: If it cannot be read, with a line for everything that is wrong in it.
        """
        try:
            comparison = cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
            comparison.cohort_config(0)
        except OSError as error:
            raise ConfigError(f"'{path}' cannot be read: {error.strerror}") from None
        except ValidationError as error:
            lines = [f"{path}: {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            raise ConfigError("\n".join(lines)) from None
        except (tomllib.TOMLDecodeError, TypeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
        if len(set(comparison.seeds)) < len(comparison.seeds) or min(comparison.seeds) < 0:
            raise ConfigError(f"{path}: seeds: each must be at least 0 and stand there once")
        if (comparison.cohort or comparison.redraw_rule) and comparison.dataset != COHORT:
            raise ConfigError(
                f"{path}: [cohort] and redraw_rule are for dataset '{COHORT}'; "
                f"'{comparison.dataset}' has its own hospitals"
            )
        comparison.config(comparison.seeds[0])
        return comparison

    def config(self, seed: int) -> ExperimentConfig:
        """The settings of one seed's experiment."""
        return parse_config(self.settings | {"seed": seed})

    def cohort_config(self, seed: int) -> CohortConfig:
        """The cohort of one seed."""
        seeds = {"seed": seed} | ({"rule_seed": seed} if self.redraw_rule else {})
        return CohortConfig(**(seeds | self.cohort))  # type: ignore[arg-type]  # TOML has no other types


def run_comparison(comparison: Comparison, out: Path, *, num_workers: int = 2, verbose: bool = True) -> pd.DataFrame:
    """Runs every seed that is not done yet and writes ``summary.json``.

    Args:
        comparison: What to run.
        out: Folder; each seed has a folder in it.
        num_workers: Experiments at the same time, each on one core.
        verbose: Whether to show progress.

    Returns:
        What :func:`summarise` gives.
    """
    with worker_pool(num_workers) as pool:
        runs = [pool.submit(_run_seed, comparison, seed, out / f"seed-{seed}") for seed in comparison.seeds]
        with ProgressReport("seed", len(runs), enabled=verbose) as progress:
            for run in as_completed(runs):
                progress.advance(run.result())
    values = pd.DataFrame(
        record
        for seed in comparison.seeds
        for record in _values(RunResults.read(out / f"seed-{seed}" / RESULTS), seed, comparison.sites)
    )
    summary = summarise(values)
    document = {
        "dataset": comparison.dataset,
        "seeds": comparison.seeds,
        "config": comparison.config(comparison.seeds[0]).to_flat() | {"seed": None},
        "summary": json.loads(summary.to_json(orient="records")),
        "values": json.loads(values.to_json(orient="records")),
    }
    (out / SUMMARY).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return summary


def _run_seed(comparison: Comparison, seed: int, folder: Path) -> str:
    """Runs one seed unless it is done; returns a remark."""
    config = comparison.config(seed)
    if (folder / RESULTS).exists():
        if RunResults.read(folder / RESULTS).run.config != config.to_flat():
            raise ConfigError(f"'{folder}' has results of other settings; choose another folder")
        return f"seed {seed} was done"
    study = written_study(comparison.dataset, folder / "sites", seed=seed, cohort=comparison.cohort_config(seed))
    results = run_experiment(study, config, Places(out=folder, resume=True, num_workers=1, verbose=False))
    return f"seed {seed}: {results.run.seconds:.0f} s"


def _values(results: RunResults, seed: int, sites: Iterable[str]) -> Iterator[dict[str, Any]]:
    """AUROC, gain over local rows and share of the gap closed of every arm, one record per group and model.

    The share is taken wherever pooled rows do better at all, in this seed or not: leaving out seeds whose gap is within
    its interval would favour large gaps.
    """
    for row in results.rows:
        if row.site not in sites or row.metric != HEADLINE_METRIC or row.value is None:
            continue
        names = {"site": row.site, "group": row.group, "model": row.model}
        local, pooled = (results.score(arm=arm, **names) for arm in ("local", "pooled"))
        if local is None or pooled is None or local.value is None or pooled.value is None:
            continue
        gain, gap = row.value - local.value, pooled.value - local.value
        yield names | {"arm": row.arm, "seed": seed, "auroc": row.value, "gain": gain, "gap": gap}


def summarise(values: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95 % intervals.

    Args:
        values: Columns site, group, model, arm, seed, auroc, gain and gap.

    Returns:
        One row per site, group, model and arm: the number of seeds, AUROC and gain with Student's intervals, and the
        share of the gap closed: mean gain by mean gap, with Fieller's interval, which is empty (NaN) where the mean
        gap is not beyond its own interval.
    """
    rows = []
    for names, part in values.groupby(_KEYS, sort=False):
        row: dict[str, Any] = dict(zip(_KEYS, names, strict=True)) | {"seeds": len(part)}
        for name in ("auroc", "gain"):
            row |= _named(name, mean_interval(part[name].to_numpy()))
        row |= _named("share", ratio_interval(part["gain"].to_numpy(), part["gap"].to_numpy()))
        rows.append(row)
    return pd.DataFrame(rows)


def mean_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float, float]:
    """Mean with its 95 % interval (Student); without interval for fewer than two values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return mean, float(mean - half), float(mean + half)


def ratio_interval(
    gains: np.ndarray[Any, np.dtype[np.float64]], gaps: np.ndarray[Any, np.dtype[np.float64]]
) -> tuple[float, float, float]:
    """Mean gain by mean gap with its 95 % interval (Fieller, 1954), all NaN unless the mean gap is beyond its interval.

    A mean of ratios would be ruled by the seeds whose gap is close to none.
    """
    nothing = (np.nan, np.nan, np.nan)
    if len(gaps) < 2 or not mean_interval(gaps)[1] > 0:
        return nothing
    mean_gain, mean_gap = float(np.mean(gains)), float(np.mean(gaps))
    covariance = np.cov(gains, gaps) / len(gaps)
    t2 = float(stats.t.ppf(0.975, len(gaps) - 1)) ** 2
    a = mean_gap**2 - t2 * covariance[1, 1]
    b = mean_gain * mean_gap - t2 * covariance[0, 1]
    c = mean_gain**2 - t2 * covariance[0, 0]
    half = float(np.sqrt(max(b * b - a * c, 0.0)))
    return mean_gain / mean_gap, float((b - half) / a), float((b + half) / a)


def table_of(summary: pd.DataFrame) -> str:
    """The summary of groups of at most one attribute as text for a terminal."""
    lines = []
    for (site, group, model), part in summary.groupby(["site", "group", "model"], sort=False):
        if "," in group:
            continue
        lines.append(f"{group}, {name_of(model, MODEL_NAMES)}" + (f", {site}" if site != ALL else ""))
        for row in part.to_dict("records"):
            auroc = f"{row['auroc']:.3f} [{row['auroc_low']:.3f}, {row['auroc_high']:.3f}]"
            gain = f"{row['gain']:+.3f} [{row['gain_low']:+.3f}, {row['gain_high']:+.3f}]"
            share = f"{row['share']:.2f} [{row['share_low']:.2f}, {row['share_high']:.2f}]"
            lines.append(f"  {name_of(row['arm'], ARM_NAMES):<22}{auroc:<24}{gain:<27}{share}")
    heading = f"  {'AUROC over seeds':<22}{'mean [95 %]':<24}{'gain over local':<27}share of the gap closed"
    return "\n".join([heading, *lines])


def _named(name: str, numbers: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), numbers, strict=True))

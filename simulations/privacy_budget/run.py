"""One cell from hospitals to its file, and all cells of a sweep, each in a process of its own.

In the folder of a sweep: ``cells/`` with a file per cell that is done, ``sweep.json`` with the settings, and, while a
cell runs, ``work/`` with its hospitals. A kill loses the cells that were running, and nothing else.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from mcrage import __version__
from mcrage.data.split import split_by_patient
from mcrage.errors import CheckpointError, ConfigError, McrageError
from mcrage.files import lock_file, replace_file
from mcrage.progress import ProgressReport
from mcrage.rebalancing.baselines import augmented
from mcrage.rebalancing.plan import RebalancePlan
from mcrage.rebalancing.rebalancer import Rebalancer, make_pool
from mcrage.rng import derive, stream
from simulations.arms import SiteTables, largest_request, site_plans
from simulations.cohort import CohortConfig
from simulations.findings import modelled_counts
from simulations.privacy_budget.cells import REAL, Cell, Sweep
from simulations.privacy_budget.membership import advantages
from simulations.privacy_budget.results import FEDERATED, LOCAL, POOLED, CellPlace, CellResult, Row
from simulations.privacy_budget.scoring import Scorer, Value
from simulations.privacy_budget.training import Trained, train
from simulations.settings import ExperimentConfig
from simulations.sites import Hospitals
from simulations.study import COHORT, Study, hospitals_of, written_study
from simulations.workers import worker_pool

_ARM = "federated_target"


@dataclass(frozen=True, kw_only=True)
class CellTask:
    """A cell to run in a folder."""

    cell: Cell
    sweep: Sweep
    out: Path


def cell_path(out: Path, cell: Cell) -> Path:
    """The file of a cell."""
    return out / "cells" / f"{cell.name}.json"


def run_sweep(
    sweep: Sweep, out: Path, *, resume: bool = False, num_workers: int = 2, verbose: bool = True
) -> list[CellResult]:
    """Runs every cell that has no file yet.

    Args:
        sweep: What is asked for.
        out: Folder; with ``resume`` it may hold cells of the same settings, other data sets, sizes and seeds too.
        resume: Whether to go on there. Cells that came to nothing are tried again.
        num_workers: Cells at the same time, each on one core.
        verbose: Whether to print a line per cell.

    Returns:
        All cells of the folder.

    Raises:
        ConfigError: If the folder has cells and ``resume`` is not set, another sweep works there, or a setting is not
            allowed.
        CheckpointError: If cells of other settings are there.
    """
    lock = _begin(sweep, out, resume=resume)
    try:
        _run(sweep, out, num_workers=num_workers, verbose=verbose)
    finally:
        os.close(lock)
    return all_cells(out)


def _run(sweep: Sweep, out: Path, *, num_workers: int, verbose: bool) -> None:
    left = [cell for cell in sweep.cells if not _is_done(cell_path(out, cell))]
    done = len(sweep.cells) - len(left)
    with (
        worker_pool(num_workers) as pool,
        ProgressReport("cell", len(sweep.cells), enabled=verbose, done=done) as progress,
    ):
        tasks = [pool.submit(run_cell, CellTask(cell=cell, sweep=sweep, out=out)) for cell in left]
        for task in as_completed(tasks):
            progress.advance(task.result())


def all_cells(out: Path) -> list[CellResult]:
    """Every cell of a folder, by name."""
    return [CellResult.read(path) for path in sorted((out / "cells").glob("*.json"))]


def run_cell(task: CellTask) -> str:
    """Runs a cell and writes its file; what goes wrong stands there as its problem. Returns a remark."""
    torch.set_num_threads(1)
    cell, work = task.cell, task.out / "work" / task.cell.name
    shutil.rmtree(work, ignore_errors=True)
    try:
        result = _result(cell, task.sweep, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result.write(cell_path(task.out, cell))
    return f"{cell.name}: {_remark(result)}"


def cohort_of(cell: Cell) -> CohortConfig:
    """The cohort of a cell's size."""
    size = {"num_sites": cell.sites, "patients_per_site": cell.patients}
    return CohortConfig(seed=cell.seed, **{name: value for name, value in size.items() if value is not None})


def hospitals_of_cell(cell: Cell) -> Hospitals:
    """The hospitals of a cell, without files."""
    dealt = (None, None) if cell.dataset == COHORT else (cell.sites, cell.patients)
    return hospitals_of(cell.dataset, seed=cell.seed, cohort=cohort_of(cell), dealt=dealt)


def _begin(sweep: Sweep, out: Path, *, resume: bool) -> int:
    """Makes the folder, or checks that it may be gone on with; returns what holds it until it is closed."""
    mark = out / "sweep.json"
    text = json.dumps({"version": __version__, "settings": sweep.given}, indent=1, sort_keys=True) + "\n"
    if mark.exists():
        if mark.read_text(encoding="utf-8") != text:
            raise CheckpointError(f"the cells in '{out}' have other settings or are of another version; choose another")
        if not resume:
            raise ConfigError(f"'{out}' has cells of a sweep: go on there with --resume, or choose another folder")
    (out / "cells").mkdir(parents=True, exist_ok=True)
    lock = lock_file(out / ".lock")
    if lock is None:
        raise ConfigError(f"another sweep works in '{out}': wait for its end, or choose another folder")
    shutil.rmtree(out / "work", ignore_errors=True)
    replace_file(mark, text.encode(), mode=0o644)
    return lock


def _is_done(path: Path) -> bool:
    return path.exists() and not CellResult.read(path).problem


def _result(cell: Cell, sweep: Sweep, work: Path) -> CellResult:
    started = time.monotonic()
    dealt = (None, None) if cell.dataset == COHORT else (cell.sites, cell.patients)
    study = written_study(cell.dataset, work / "sites", seed=cell.seed, cohort=cohort_of(cell), dealt=dealt)
    config = sweep.config(cell, columns=len(study.schema.modelled), sites=len(study.files))
    known = {
        "cell": CellPlace(**cell.to_dict()),
        "settings": config.to_flat(),
        "minority_groups": study.minority_groups,
        "delta": config.privacy.dp_delta,
    }
    sites = _divided(study, config)
    try:
        if cell.generator == REAL:
            scorer = Scorer(study, sites, seed=cell.seed)
            rows = _real_rows(scorer, sites)
            return CellResult(**known, rows=rows, seconds={"scoring": round(time.monotonic() - started, 1)})  # type: ignore[arg-type]
        trained = train(cell, study, sites, config, work)
        return _measured(known, trained, study, sites, config, started=started)
    except McrageError as error:
        return CellResult(**known, problem=str(error))  # type: ignore[arg-type]


def _measured(
    known: dict[str, object],
    trained: Trained,
    study: Study,
    sites: Sequence[SiteTables],
    config: ExperimentConfig,
    *,
    started: float,
) -> CellResult:
    seconds = {"training": round(time.monotonic() - started, 1)}
    values = [*_federated_rows(trained, study, sites, config)]
    seconds["scoring"] = round(time.monotonic() - started - seconds["training"], 1)
    values += advantages(trained.model, sites, study.schema, seed=config.seed)
    seconds["attacks"] = round(time.monotonic() - started - sum(seconds.values()), 1)
    return CellResult(
        **known,  # type: ignore[arg-type]
        epsilon_spent=_finite(trained.epsilon),
        epsilon_alone=_finite(trained.own_epsilon),
        events={site: [event.to_dict() for event in events] for site, events in trained.events.items()},
        own_events={site: [event.to_dict() for event in events] for site, events in trained.own_events.items()},
        rows=_rows(FEDERATED, values),
        seconds=seconds,
    )


def _divided(study: Study, config: ExperimentConfig) -> list[SiteTables]:
    """Every hospital's rows, divided as its own client divides them, under the name that the federation has for it."""
    found = []
    for site, table in zip(study.site_ids, study.hospitals.tables.values(), strict=True):
        train, test = split_by_patient(table, study.schema, test_fraction=config.federation.test_fraction)
        found.append(SiteTables(site=site, train=train.reset_index(drop=True), test=test.reset_index(drop=True)))
    return found


def _real_rows(scorer: Scorer, sites: Sequence[SiteTables]) -> tuple[Row, ...]:
    pooled = pd.concat([tables.train for tables in sites], ignore_index=True)
    local = [*scorer.values(lambda tables: tables.train), *scorer.sizes()]
    return (*_rows(LOCAL, local), *_rows(POOLED, scorer.values(lambda _: pooled)))


def _federated_rows(
    trained: Trained, study: Study, sites: Sequence[SiteTables], config: ExperimentConfig
) -> list[Value]:
    """Figures of hospitals that add to their own rows what their plans ask of the generator."""
    model, schema, seed = trained.model, study.schema, config.seed
    plans = _plans(trained, study, sites, config)
    pool = make_pool(model, schema, largest_request([*plans.values()]), random_state=derive(seed, "pool", _ARM)).table

    def training(tables: SiteTables) -> pd.DataFrame:
        generator = stream(seed, "take", _ARM, tables.site)
        taken = Rebalancer.from_pool(pool, schema).take(plans[tables.site], generator)
        return augmented(tables.train, taken.table, schema).table

    return Scorer(study, sites, seed=seed).values(training)


def _plans(
    trained: Trained, study: Study, sites: Sequence[SiteTables], config: ExperimentConfig
) -> dict[str, RebalancePlan]:
    of = study.schema
    sampled = trained.model.sample(config.modelled_rows, random_state=derive(config.seed, "modelled"))
    federation = modelled_counts(sampled, of, num_rows=trained.rows)
    return {
        tables.site: site_plans(
            tables.train, of, federation=federation, multiple=config.target_multiple, floor=config.minority_floor
        )[_ARM]
        for tables in sites
    }


def _rows(rows: str, values: Sequence[Value]) -> tuple[Row, ...]:
    return tuple(Row(rows=rows, group=each.group, metric=each.metric, value=each.value) for each in values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _remark(result: CellResult) -> str:
    if result.problem:
        return result.problem.splitlines()[0]
    found = {(row.rows, row.group): row.value for row in result.rows if row.metric == "auroc"}
    figures = ", ".join(f"AUROC {value:.3f} {rows}" for (rows, group), value in found.items() if group == "all")
    spent = "" if result.epsilon_spent is None else f", epsilon {result.epsilon_spent:.2f}"
    return f"{figures}{spent}, {sum(result.seconds.values()):.0f} s"

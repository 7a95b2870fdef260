"""One experiment from hospitals' files to a report: did synthetic rows of a federated model help the groups that each
hospital lacks?

::

    federation ──► model ──► pool of synthetic rows ──► plan per hospital ──► arms ──► scores ──► results.json
    local models, on another core ────────────────────────────────────────────┘                   report.html

In the folder of a run: ``results.json``, ``report.html``, ``synthetic.csv`` and ``.parquet``, ``model/``; where the
data set has a common test set, ``results-own.json`` has the same arms on each hospital's own held-out rows. What a
killed run has done lies beside them (``federation/``, ``local/``, ``scores/``), and is gone on from when asked.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from client.app import app
from client.pretend import PRIVATE
from mcrage import __version__
from mcrage.cli import write_rows
from mcrage.config import PlacesConfig, RunConfig
from mcrage.data.split import split_by_patient
from mcrage.errors import CheckpointError, ConfigError
from mcrage.evaluation.report import RunResults
from mcrage.progress import ProgressReport
from mcrage.rebalancing.rebalancer import Pool, make_pool
from mcrage.render.attacks import attacks_table
from mcrage.rng import derive
from server.app import write_card
from server.roster import call_roll
from server.rounds import FederationResult, RoundLoop, RoundRecord, run_federation
from simulations.arms import (
    LocalTraining,
    SiteTables,
    SiteTask,
    largest_request,
    score_site,
    site_plans,
    train_local,
)
from simulations.attacks import attack
from simulations.findings import fidelity, modelled_counts
from simulations.grid import InProcessGrid
from simulations.results import HEADLINE_ARM, OWN_REPORT, OWN_RESULTS, REPORT, RESULTS, Finished, Plans, write_results
from simulations.settings import ExperimentConfig, Places
from simulations.study import Study
from simulations.workers import worker_pool

SYNTHETIC = "synthetic.csv"
MODEL = "model"

_FIDELITY_ROWS = 1000


def run_experiment(study: Study, config: ExperimentConfig, places: Places) -> RunResults:
    """Runs an experiment and writes its folder.

    Returns:
        The results on the common test set where there is one, else on each hospital's own held-out rows.

    Raises:
        ConfigError: If the folder has an unfinished run and ``resume`` is not set, or there are fewer than two
            hospitals.
        CheckpointError: If ``resume`` is set and the run there had other settings or tables.
        SchemaError: If the schema lacks a target.
    """
    started = time.monotonic()
    torch.set_num_threads(1)
    check_study(study)
    _begin(study, config, places)
    sites = _split(study, config)
    with worker_pool(places.num_workers) as pool:
        # The federation takes one core: local models, which need nothing of it, take the others meanwhile.
        local = [pool.submit(train_local, task) for task in _local_trainings(study, sites, config, places)]
        outcome, curve = _federate(study, config, places)
        _wait(local, "local model", verbose=places.verbose)
        outcome.model.save(places.out / MODEL)
        plans = _plans(sites, outcome, config)
        pools = _pools(outcome, plans, config)
        write_rows(pools[HEADLINE_ARM].table, places.out / SYNTHETIC)
        write_rows(pools[HEADLINE_ARM].table, (places.out / SYNTHETIC).with_suffix(".parquet"))
        attacks = attack(outcome.model, pools[HEADLINE_ARM].table, sites, study.schema, seed=config.seed)
        write_card(outcome, places.out / MODEL, dp=config.privacy.dp, audit=attacks_table(attacks))
        tasks = _site_tasks(study, sites, plans, pools, config=config, places=places)
        _wait([pool.submit(score_site, task) for task in tasks], "evaluation: hospital", verbose=places.verbose)
        finished = Finished(
            study=study,
            sites=sites,
            outcome=outcome,
            fidelity=curve,
            plans=plans,
            repairs=pools[HEADLINE_ARM].repairs,
            attacks=attacks,
            started=started,
        )
        return write_results(finished, config, places, pool)


def check_study(study: Study) -> None:
    """Raises unless an experiment can be made of these hospitals.

    Raises:
        ConfigError: If there are fewer than two hospitals, or no sensitive feature.
        SchemaError: If the schema has no target.
    """
    if len(study.files) < 2:
        raise ConfigError(f"a federation needs at least 2 hospitals, one file each; got {len(study.files)}")
    if not study.schema.sensitive:
        raise ConfigError("the schema has no column with role 'sensitive', so there are no groups to compare")
    if len(study.schema.target.levels) < 2:
        raise ConfigError(f"the target '{study.schema.target.name}' is a number; a target needs at least two levels")


def _begin(study: Study, config: ExperimentConfig, places: Places) -> None:
    """Clears the folder for a new run, or checks that it may be gone on from."""
    mark, fingerprint = places.out / "experiment.json", _fingerprint(study, config)
    done = (places.out / RESULTS).exists()
    if places.resume and mark.exists():
        if json.loads(mark.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise CheckpointError(f"the run in '{places.out}' had other settings or tables; it cannot be resumed")
    elif mark.exists() and not done:
        raise ConfigError(f"'{places.out}' has an unfinished run: resume it, or choose another folder")
    else:
        places.out.mkdir(parents=True, exist_ok=True)
        for part in ("federation", "local", "scores", PRIVATE):
            shutil.rmtree(places.out / part, ignore_errors=True)
        for name in (RESULTS, REPORT, OWN_RESULTS, OWN_REPORT):
            (places.out / name).unlink(missing_ok=True)
        mark.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
    places.scores("").parent.mkdir(exist_ok=True)


def _fingerprint(study: Study, config: ExperimentConfig) -> str:
    digest = hashlib.sha256((__version__ + config.model_dump_json() + study.schema.fingerprint).encode())
    for path in study.files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _split(study: Study, config: ExperimentConfig) -> list[SiteTables]:
    """Every hospital's rows, divided as its own client divides them."""
    found = []
    for site, table in study.hospitals.tables.items():
        train, test = split_by_patient(table, study.schema, test_fraction=config.federation.test_fraction)
        found.append(SiteTables(site=site, train=train.reset_index(drop=True), test=test.reset_index(drop=True)))
    return found


def _local_trainings(
    study: Study, sites: Sequence[SiteTables], config: ExperimentConfig, places: Places
) -> Iterator[LocalTraining]:
    """The local models that are not there yet."""
    for site_id, tables in zip(study.site_ids, sites, strict=True):
        folder = places.local_model(site_id)
        if config.local_models and not (folder / "model.json").exists():
            yield LocalTraining(
                folder=folder,
                train=tables.train,
                schema=study.schema,
                federation=config.federation,
                seed=derive(config.seed, "local", site_id),
            )


def _federate(study: Study, config: ExperimentConfig, places: Places) -> tuple[FederationResult, dict[int, float]]:
    """The trained model, and its fidelity by round."""
    run = RunConfig(
        federation=config.federation,
        privacy=config.privacy,
        places=PlacesConfig(out_dir=str(places.federation), resume=places.resume),
    )
    grid = InProcessGrid(app, study.node_configs(places.out), run)
    if config.federation.generator == "marginal":  # there is no model between two rounds, and so no curve
        with ProgressReport("federation: question", config.federation.rounds, enabled=places.verbose) as progress:
            return run_federation(grid, run, progress=lambda _: progress.advance("")), {}
    loop = RoundLoop(grid, run, call_roll(grid, run))
    curve = Curve(places.federation / "fidelity.json", done=loop.server_round)
    rounds, every = config.federation.num_server_rounds, config.fidelity_every
    with ProgressReport("federation: round", rounds, enabled=places.verbose, done=loop.server_round) as progress:
        while loop.server_round < rounds:
            record = loop.next_round()
            if every and (record.server_round % every == 0 or record.server_round in (1, rounds)):
                curve.measure(record.server_round, loop.result(), seed=config.seed)
            progress.advance(_note(record, curve))
    return replace(loop.result(), accounts=loop.accounts()), curve.values


class Curve:
    """Fidelity of the averaged model by round, kept in a file so that a resumed run has all of it.

    Args:
        path: The file.
        done: Rounds that are done; later ones in the file are forgotten.
    """

    def __init__(self, path: Path, *, done: int) -> None:
        self._path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if done and path.exists() else {}
        self.values = {int(number): float(value) for number, value in kept.items() if int(number) <= done}

    def measure(self, server_round: int, result: FederationResult, *, seed: int) -> None:
        """Adds the round; nothing where the hospitals released no histograms."""
        if result.marginals is None:
            return
        rows = result.model.sample(_FIDELITY_ROWS, random_state=derive(seed, "fidelity"))
        self.values[server_round] = fidelity(rows, result.marginals, result.model.schema_)
        self._path.write_text(json.dumps(self.values) + "\n", encoding="utf-8")


def _note(record: RoundRecord, curve: Curve) -> str:
    notes = [f"loss {record.mean_loss:.3f}"] if record.losses else []
    if record.server_round in curve.values:
        notes.append(f"fidelity {curve.values[record.server_round]:.3f}")
    return ", ".join([*notes, *([f"without {', '.join(record.dropped)}"] if record.dropped else [])])


def _plans(sites: Sequence[SiteTables], outcome: FederationResult, config: ExperimentConfig) -> Plans:
    model = outcome.model
    sampled = model.sample(config.modelled_rows, random_state=derive(config.seed, "modelled"))
    federation = modelled_counts(sampled, model.schema_, num_rows=num_rows(outcome))
    return {
        tables.site: site_plans(
            tables.train,
            model.schema_,
            federation=federation,
            multiple=config.target_multiple,
            floor=config.minority_floor,
        )
        for tables in sites
    }


def _pools(outcome: FederationResult, plans: Plans, config: ExperimentConfig) -> dict[str, Pool]:
    """Synthetic rows for all hospitals to take from, sampled once for each arm."""
    model, seed = outcome.model, config.seed
    requests = {
        arm: largest_request([of_site[arm] for of_site in plans.values()]) for arm in next(iter(plans.values()))
    }
    return {
        arm: make_pool(model, model.schema_, request, random_state=derive(seed, "pool", arm))
        for arm, request in requests.items()
    }


def num_rows(outcome: FederationResult) -> int:
    """Training rows of the federation, as far as hospitals released them."""
    if outcome.marginals is not None:
        return round(max(cells.sum() for cells in outcome.marginals.values()))
    return sum(outcome.group_counts.values())


def _site_tasks(
    study: Study,
    sites: Sequence[SiteTables],
    plans: Plans,
    pools: Mapping[str, Pool],
    *,
    config: ExperimentConfig,
    places: Places,
) -> Iterator[SiteTask]:
    """The hospitals that are not evaluated yet."""
    pooled = pd.concat([tables.train for tables in sites], ignore_index=True)
    tables_of = {arm: pool.table for arm, pool in pools.items()}
    for site_id, tables in zip(study.site_ids, sites, strict=True):
        if not places.scores(site_id).exists():
            yield SiteTask(
                tables=tables,
                schema=study.schema,
                plans=plans[tables.site],
                pools=tables_of,
                pooled=pooled,
                common_test=study.hospitals.test,
                local_model=places.local_model(site_id) if config.local_models else None,
                seed=config.seed,
                path=places.scores(site_id),
            )


def _wait(futures: Sequence[Future[Any]], title: str, *, verbose: bool) -> None:
    """Shows every task as it finishes, and raises what one of them raised."""
    with ProgressReport(title, len(futures), enabled=verbose and bool(futures)) as progress:
        for future in as_completed(futures):
            short = future.result()
            progress.advance(f"{short:,} rows of its plans could not be had" if short else "")

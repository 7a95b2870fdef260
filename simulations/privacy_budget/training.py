"""One generator of a cell, trained on its hospitals, and what that cost them."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.app import app
from mcrage.config import PlacesConfig, RunConfig
from mcrage.errors import FederationError
from mcrage.generator import Generator
from mcrage.marginal.budget import Budget, precision
from mcrage.marginal.generator import MarginalGenerator
from mcrage.privacy.accounting import alone, epsilon
from mcrage.privacy.events import PrivacyEvent
from mcrage.rng import derive
from server.rounds import run_federation
from simulations.arms import SiteTables
from simulations.experiment import num_rows
from simulations.grid import InProcessGrid
from simulations.privacy_budget.cells import Cell
from simulations.privacy_budget.sums import SummedSource
from simulations.settings import ExperimentConfig
from simulations.study import Study

Events = tuple[PrivacyEvent, ...]
_UNPROTECTED = (PrivacyEvent(mechanism="unprotected"),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A generator and what is known of its training.

    Attributes:
        model: The generator.
        rows: Training rows of all hospitals, as far as they released their number.
        events: What each hospital was charged for.
        own_events: The same where all other hospitals collude; as ``events`` where the noise is not shared.
        delta: Of the guarantee.
    """

    model: Generator
    rows: int
    events: Mapping[str, Events]
    own_events: Mapping[str, Events]
    delta: float

    @property
    def epsilon(self) -> float:
        """Of the hospital that paid most, recomputed from its events; infinite without privacy."""
        return _largest(self.events, self.delta)

    @property
    def own_epsilon(self) -> float:
        """The same where all other hospitals collude."""
        return _largest(self.own_events, self.delta)


def train(cell: Cell, study: Study, sites: Sequence[SiteTables], config: ExperimentConfig, folder: Path) -> Trained:
    """Trains a cell's generator.

    Args:
        cell: Which one.
        study: Hospitals with their files.
        sites: The same hospitals' rows, divided.
        config: The cell's settings.
        folder: For whatever the training writes; each cell needs its own, for it has the hospitals' ledgers.

    Raises:
        FederationError: If the training diverged, or a hospital tells no account of its ledger.
        PrivacyError: If no noise is enough for the cell's epsilon.
    """
    if cell.generator == "marginal":
        return _marginal(cell, study, sites, config)
    return _federated(study, config, folder)


def _marginal(cell: Cell, study: Study, sites: Sequence[SiteTables], config: ExperimentConfig) -> Trained:
    privacy = config.privacy
    source = SummedSource(
        {tables.site: tables.train for tables in sites},
        study.schema,
        epsilon=cell.epsilon,
        delta=privacy.dp_delta,
        colluders=privacy.dp_colluders if cell.noise == "shared" else 0,
        key=hashlib.sha256(cell.name.encode()).digest(),
    )
    budget = Budget(precision=precision(epsilon=cell.epsilon, delta=privacy.dp_delta))
    model = MarginalGenerator(random_state=derive(cell.seed, "marginal"))
    model.estimate(study.schema, source, budget)
    return Trained(
        model=model,
        rows=round(float(np.median([cells.sum() for cells in model.model_.marginals.values()]))),
        events={tables.site: source.events for tables in sites},
        own_events={tables.site: source.own_events for tables in sites},
        delta=privacy.dp_delta,
    )


def _federated(study: Study, config: ExperimentConfig, folder: Path) -> Trained:
    run = RunConfig(
        federation=config.federation,
        privacy=config.privacy,
        places=PlacesConfig(out_dir=str(folder / "federation")),
    )
    outcome = run_federation(InProcessGrid(app, study.node_configs(folder), run), run)
    events: dict[str, Events] = dict.fromkeys(study.site_ids, _UNPROTECTED)
    if config.privacy.dp:
        if missing := [site for site in study.site_ids if site not in outcome.accounts]:
            raise FederationError(f"no account of the privacy ledger came from {', '.join(missing)}")
        events = {site: outcome.accounts[site].events for site in study.site_ids}
    return Trained(
        model=outcome.model,
        rows=num_rows(outcome),
        events=events,
        own_events={site: alone(charged) for site, charged in events.items()},
        delta=config.privacy.dp_delta,
    )


def _largest(events: Mapping[str, Events], delta: float) -> float:
    if any(event.mechanism == "unprotected" for charged in events.values() for event in charged):
        return math.inf
    return max(epsilon(charged, delta=delta) for charged in set(events.values()))

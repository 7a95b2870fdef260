"""What a sweep would do: its cells, what each costs the patients of a hospital, and about how long it takes."""

import math
from collections.abc import Iterator

from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from mcrage.prospects import Prospect, signal
from server.budget import planned_epsilon
from simulations.privacy_budget.cells import NONE, REAL, Cell, Sweep
from simulations.privacy_budget.run import hospitals_of_cell
from simulations.settings import ExperimentConfig
from simulations.sites import Hospitals

# Seconds on one core of a machine of 2020; a private step has a part for the message and one for each gradient.
_STEP, _MESSAGE, _GRADIENT = 0.006, 0.04, 2e-5
_ROWS, _FIXED = 4e-5, 15.0


def plan_lines(sweep: Sweep) -> Iterator[str]:
    """A line per cell, one for all of them, and what rows of each kind of cell are worth by earlier measurements.

    Raises:
        ConfigError: If a setting is not allowed.
        PrivacyError: If no noise is enough for an epsilon.
    """
    cells = sweep.cells
    hospitals = hospitals_of_cell(cells[0])
    schema, sites = hospitals.schema, len(hospitals.tables)
    known: dict[tuple[str, str, float], float] = {}
    total = 0.0
    for cell in cells:
        config = sweep.config(cell, columns=len(schema.modelled), sites=sites)
        kind = (cell.generator, cell.noise, cell.epsilon)
        if kind not in known:
            known[kind] = _planned(cell, config, schema)
        seconds = _seconds(cell, config, hospitals)
        total += seconds
        cost = "no epsilon" if math.isinf(known[kind]) else f"epsilon at most {known[kind]:.2f}"
        yield f"{cell.name}: {cost}, about {_duration(seconds)}"
    yield f"{len(cells)} cells of {sites} hospitals, about {_duration(total)} on one core"
    config = sweep.config(cells[0], columns=len(schema.modelled), sites=sites)
    trained = hospitals.training_patients(config.federation.test_fraction)
    for generator, noise, epsilon in known:
        if noise != NONE:
            noises = 1 if noise == "shared" else sites
            at = signal(patients=trained, epsilon=epsilon, delta=config.privacy.dp_delta, noises=noises)
            yield f"{generator}, {noise} noise, epsilon {epsilon:g}: {Prospect.of(generator, at)}"


def _planned(cell: Cell, config: ExperimentConfig, schema: TableSchema) -> float:
    if cell.generator != "cddpm":
        return cell.epsilon
    run = RunConfig(federation=config.federation, privacy=config.privacy)
    return planned_epsilon(run, schema) if config.privacy.dp else math.inf


def _seconds(cell: Cell, config: ExperimentConfig, hospitals: Hospitals) -> float:
    rows = sum(len(table) for table in hospitals.tables.values())
    scoring = _FIXED + len(hospitals.tables) * rows * config.target_multiple * _ROWS
    if cell.generator == REAL:
        return _FIXED
    if cell.generator == "marginal":
        return scoring
    federation, privacy = config.federation, config.privacy
    steps = len(hospitals.tables) * federation.total_steps
    if not privacy.dp:
        return scoring + steps * _STEP
    gradients = privacy.dp_sample_rate * rows * federation.total_steps * privacy.dp_draws
    messages = len(hospitals.tables) * federation.num_server_rounds
    return scoring + messages * _MESSAGE + gradients * _GRADIENT * (federation.width / 64) ** 2


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"

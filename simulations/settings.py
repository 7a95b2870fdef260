"""The settings of an experiment: what changes its result, and where it works."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mcrage.config import FederationConfig, PrivacyConfig, RunConfig, Scalar
from mcrage.data.groups import MINIMUM_CELL
from mcrage.errors import ConfigError

_SECTIONS = {"federation", "privacy"}


class ExperimentConfig(BaseModel):
    """What changes the result of an experiment.

    Attributes:
        federation: Settings of the federation; its seed is the root of every draw.
        privacy: What its privacy guarantee rests on; without one by default.
        target_multiple: Rows that the larger federated arm gives a group, per row that the whole federation holds of
            it. Above 1, because synthetic rows say less than real ones.
        minority_floor: Fewest rows of a group there.
        modelled_rows: Rows sampled to estimate what the federation holds of each group.
        local_models: Whether each hospital also trains a model of its own, for arm ``local_cddpm``.
        fidelity_every: Rounds between two measurements of the fidelity; 0 for none.
        num_replicates: Bootstrap replicates.
        minimum_cell: Smallest count of patients that is shown; less than 11 for public data only.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    federation: FederationConfig = FederationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    target_multiple: float = Field(default=5.0, gt=0)
    minority_floor: int = Field(default=250, ge=0)
    modelled_rows: int = Field(default=10_000, ge=100)
    local_models: bool = True
    fidelity_every: int = Field(default=5, ge=0)
    num_replicates: int = Field(default=200, ge=20)
    minimum_cell: int = Field(default=MINIMUM_CELL, ge=1)

    @property
    def seed(self) -> int:
        """Root of every draw."""
        return self.federation.seed

    def to_flat(self) -> dict[str, Scalar]:
        """Every setting by its name: what :func:`parse_config` reads."""
        return self.federation.model_dump() | self.privacy.model_dump() | self.model_dump(exclude=_SECTIONS)


def parse_config(given: Mapping[str, Any]) -> ExperimentConfig:
    """Settings of the experiment and of its federation from one flat mapping; what it leaves out has its default.

    Args:
        given: Values by name; ``local-steps`` and ``local_steps`` are the same.

    Raises:
        ConfigError: With a line for every unknown key and every value that is not allowed.
    """
    flat = {key.replace("-", "_"): value for key, value in given.items()}
    own = {key: flat.pop(key) for key in ExperimentConfig.model_fields if key not in _SECTIONS and key in flat}
    of_run = [*FederationConfig.model_fields, *PrivacyConfig.model_fields]
    unknown = [key for key in flat if key not in of_run]
    if unknown:
        known = [*of_run, *(key for key in ExperimentConfig.model_fields if key not in _SECTIONS)]
        raise ConfigError(
            "\n".join(f"{key}: there is no such setting; there are {', '.join(known)}" for key in unknown)
        )
    run = RunConfig.parse({key.replace("_", "-"): value for key, value in flat.items()})
    try:
        return ExperimentConfig(federation=run.federation, privacy=run.privacy, **own)
    except ValidationError as error:
        lines = [f"{problem['loc'][0]}: {problem['msg']}; it is {problem['input']!r}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where an experiment works and how much of the machine it takes; nothing here changes the result.

    Attributes:
        out: Folder for everything that it writes.
        resume: Whether to go on from what a killed run left there.
        num_workers: Processes for local models and for the evaluation.
        verbose: Whether to show progress.
    """

    out: Path
    resume: bool = False
    num_workers: int = 2
    verbose: bool = True

    @property
    def federation(self) -> Path:
        """Checkpoints and metrics of the federation."""
        return self.out / "federation"

    def local_model(self, site: str) -> Path:
        """The model of one hospital."""
        return self.out / "local" / site

    def scores(self, site: str) -> Path:
        """The scores of one hospital."""
        return self.out / "scores" / f"{site}.npz"

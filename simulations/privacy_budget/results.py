"""What stands in the file of a cell."""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mcrage.config import Scalar
from mcrage.errors import CheckpointError
from mcrage.files import replace_file
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.events import PrivacyEvent

LOCAL, POOLED, FEDERATED = "local", "pooled", "federated"


class CellPlace(BaseModel):
    """Fields of a :class:`simulations.privacy_budget.cells.Cell`; an infinite epsilon is None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    sites: int | None
    patients: int | None
    seed: int
    generator: str
    noise: str
    epsilon: float | None


class Row(BaseModel):
    """A figure: rows are ``local``, ``pooled`` or ``federated``, and group is of patients, or a feature for a gap."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: str
    group: str
    metric: str
    value: float


class CellResult(BaseModel):
    """What a cell found.

    Attributes:
        cell: Which one.
        settings: All of its federation and of the rows that were asked for.
        minority_groups: The groups that the headline of the data set is about; empty where their share decides.
        delta: Of the guarantee.
        epsilon_spent: Of the hospital that paid most, from ``events``; None without privacy.
        epsilon_alone: The same from ``own_events``: where all other hospitals collude.
        events, own_events: What each hospital was charged for.
        rows: Figures.
        seconds: That each part took.
        problem: Why there are no figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cell: CellPlace
    settings: dict[str, Scalar]
    minority_groups: tuple[str, ...] = ()
    delta: float = 1e-5
    epsilon_spent: float | None = None
    epsilon_alone: float | None = None
    events: dict[str, list[dict[str, Any]]] = {}
    own_events: dict[str, list[dict[str, Any]]] = {}
    rows: tuple[Row, ...] = ()
    seconds: dict[str, float] = {}
    problem: str = ""

    def recomputed(self) -> float:
        """Epsilon of the events that stand there; infinite for a release without noise."""
        charged = [[PrivacyEvent(**event) for event in of_site] for of_site in self.events.values()]
        if any(event.mechanism == "unprotected" for of_site in charged for event in of_site):
            return math.inf
        return max((epsilon(of_site, delta=self.delta) for of_site in charged), default=math.inf)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        replace_file(path, (self.model_dump_json(indent=1) + "\n").encode(), mode=0o644)

    @classmethod
    def read(cls, path: Path) -> "CellResult":
        """What :meth:`write` wrote.

        Raises:
            CheckpointError: If it cannot be read.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            raise CheckpointError(f"'{path}' is not the file of a cell; remove it to run the cell again") from None

"""From cells to what they say together: means over seeds with 95 % intervals, and what to make of them.

A line is one generator, one place of the noise and one epsilon, at hospitals of one data set and size. Differences are
between cells of the same seed, that is of the same hospitals and the same patients.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mcrage.data.schema import MISSING
from simulations.compare import mean_interval, ratio_interval
from simulations.privacy_budget.results import FEDERATED, LOCAL, POOLED, CellResult

KEYS = ["dataset", "sites", "patients"]
FEWEST_SEEDS = 3
"""Seeds from which an interval says anything: Student's of two is 12.7 standard errors wide to each side."""

MINORITY_SHARE = 0.25
"""Share of the training rows below which a group is a minority where the data set names none."""


@dataclass(frozen=True, kw_only=True, order=True)
class Line:
    """One generator, place of the noise and epsilon."""

    generator: str
    noise: str
    epsilon: float

    @property
    def name(self) -> str:
        """In words."""
        if math.isinf(self.epsilon):
            return f"{self.generator} without noise"
        return f"{self.generator}, {self.noise} noise, ε = {self.epsilon:g}"


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; NaN ends where there are too few seeds, NaN where there is no value."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def is_below(self) -> bool:
        """Whether the interval lies below 0."""
        return self.high < 0

    @property
    def is_above(self) -> bool:
        """Whether it lies above 0."""
        return self.low > 0


NOTHING = Estimate(math.nan, math.nan, math.nan, 0)


def tidy(cells: Iterable[CellResult]) -> pd.DataFrame:
    """A row per cell, group and metric; the gain over local rows and the gap to pooled ones are among the metrics.

    Returns:
        Columns dataset, sites, patients, seed, generator, noise, epsilon (asked for), epsilon_spent, rows (``local``,
        ``pooled`` or ``federated``), group, metric and value. Sizes that a data set has of its own are 0; an infinite
        epsilon is infinite.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        place = cell.cell.model_dump() | {
            "sites": cell.cell.sites or 0,
            "patients": cell.cell.patients or 0,
            "epsilon": math.inf if cell.cell.epsilon is None else cell.cell.epsilon,
            "epsilon_spent": math.inf if cell.epsilon_spent is None else cell.epsilon_spent,
        }
        rows += [place | row.model_dump() for row in cell.rows]
    columns = [*KEYS, "seed", "generator", "noise", "epsilon", "epsilon_spent", "rows", "group", "metric", "value"]
    frame = pd.DataFrame(rows, columns=columns)
    return pd.concat([frame, *_differences(frame)], ignore_index=True)


def _differences(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Gains over local rows, and gaps from local to pooled ones, in AUROC."""
    auroc = frame[frame["metric"] == "auroc"]
    on = [*KEYS, "seed", "group"]
    local = auroc[auroc["rows"] == LOCAL].set_index(on)["value"].rename("of_local")
    found = []
    for rows, metric in ((FEDERATED, "gain"), (POOLED, "gap_to_pooled")):
        part = auroc[auroc["rows"] == rows].join(local, on=on, how="inner")
        part = part.assign(metric=metric, value=part["value"] - part["of_local"]).drop(columns="of_local")
        if len(part):
            found.append(part)
    return found


class Findings:
    """Everything about hospitals of one data set and size.

    Args:
        values: Of :func:`tidy`, of one data set and size.
        named: The groups that the data set's headline is about; empty where their share decides.
    """

    def __init__(self, values: pd.DataFrame, named: Sequence[str]) -> None:
        self._values = values
        self.place = {key: values[key].iloc[0] for key in KEYS}
        made = values[values["rows"] == FEDERATED]
        lines = made[["generator", "noise", "epsilon"]].drop_duplicates().sort_values(["epsilon", "generator", "noise"])
        self.lines = [Line(**line) for line in lines.to_dict("records")]
        self.seeds = sorted(int(seed) for seed in values["seed"].unique())
        self.minorities = tuple(named) or self._small_groups()

    @property
    def title(self) -> str:
        """Data set and size, in words."""
        sites, patients = self.place["sites"], self.place["patients"]
        size = f"{sites} hospitals of {patients:,} patients" if sites and patients else "hospitals as they come"
        return f"{self.place['dataset']}, {size}"

    @property
    def groups(self) -> list[str]:
        """Everybody and the minorities."""
        return ["all", *self.minorities]

    @property
    def feature(self) -> str:
        """The sensitive feature whose gaps are shown: that of the first minority, else ``race``."""
        return self.minorities[0].partition("=")[0] if self.minorities else "race"

    @property
    def epsilons(self) -> list[float]:
        """Every epsilon, rising."""
        return sorted({line.epsilon for line in self.lines})

    def of_rows(self, rows: str, group: str, metric: str) -> Estimate:
        """A figure of local or of pooled rows."""
        return estimated(self._of(rows, group, metric))

    def of_line(self, line: Line, group: str, metric: str) -> Estimate:
        """A figure of a line."""
        return estimated(self._of_line(line, group, metric))

    def spent(self, line: Line) -> float:
        """The highest epsilon that a cell of the line cost."""
        return float(self._part(line)["epsilon_spent"].max())

    def name_of(self, line: Line) -> str:
        """The line in words, and how many seeds it has where others have more: its mean is of other hospitals then."""
        number = self._part(line)["seed"].nunique()
        return line.name if number == len(self.seeds) else f"{line.name} ({number} of {len(self.seeds)} seeds)"

    def share(self, line: Line, group: str) -> Estimate:
        """Share of the gap from local to pooled rows that is closed: mean gain by mean gap."""
        return shared(self._of_line(line, group, "gain"), self._of(POOLED, group, "gap_to_pooled"))

    def lost(self, line: Line, group: str) -> Estimate:
        """Share of that gap that the same generator closes without noise and not with it."""
        without = Line(generator=line.generator, noise="none", epsilon=math.inf)
        loss = self._of_line(without, group, "gain") - self._of_line(line, group, "gain")
        return NOTHING if line == without else shared(loss.dropna(), self._of(POOLED, group, "gap_to_pooled"))

    def lost_more(self, line: Line, group: str) -> Estimate:
        """By how much more AUROC the noise of a line costs a group than all patients together."""
        without = Line(generator=line.generator, noise="none", epsilon=math.inf)
        of_group, of_all = (
            self._of_line(without, each, "auroc") - self._of_line(line, each, "auroc") for each in (group, "all")
        )
        return NOTHING if line == without else estimated((of_group - of_all).dropna())

    def difference(self, line: Line, other: Line, group: str) -> Estimate:
        """By how much the AUROC of a line is higher than that of another one."""
        return estimated((self._of_line(line, group, "auroc") - self._of_line(other, group, "auroc")).dropna())

    def _of(self, rows: str, group: str, metric: str) -> "pd.Series[float]":
        """Values by seed."""
        part = self._values
        part = part[(part["rows"] == rows) & (part["group"] == group) & (part["metric"] == metric)]
        return part.set_index("seed")["value"]

    def _part(self, line: Line) -> pd.DataFrame:
        part = self._values[self._values["rows"] == FEDERATED]
        same = (part["generator"] == line.generator) & (part["noise"] == line.noise) & (part["epsilon"] == line.epsilon)
        return part[same]

    def _of_line(self, line: Line, group: str, metric: str) -> "pd.Series[float]":
        part = self._part(line)
        return part[(part["group"] == group) & (part["metric"] == metric)].set_index("seed")["value"]

    def _small_groups(self) -> tuple[str, ...]:
        """Groups with figures that are a minority of the training rows; missing is no group."""
        shares = self._values[self._values["metric"] == "train_share"].groupby("group", sort=False)["value"].mean()
        known = set(self._values.loc[self._values["metric"] == "gain", "group"])
        names = [str(name) for name, share in shares.items() if share < MINORITY_SHARE and name in known]
        return tuple(name for name in names if not name.endswith(f"={MISSING}"))


def findings(cells: Sequence[CellResult]) -> list[Findings]:
    """One for each data set and size that has cells of real rows and of a generator."""
    named = {cell.cell.dataset: cell.minority_groups for cell in cells}
    found = [Findings(part, named[str(key[0])]) for key, part in tidy(cells).groupby(KEYS, sort=True)]
    return [each for each in found if each.lines and each.of_rows(LOCAL, "all", "auroc").seeds]


def estimated(values: "pd.Series[float]") -> Estimate:
    """The mean over seeds, with an interval where there are enough."""
    if not len(values):
        return NOTHING
    mean, low, high = mean_interval(values.to_numpy(dtype=np.float64))
    return Estimate(mean, low, high, len(values)) if len(values) >= FEWEST_SEEDS else _point(mean, len(values))


def shared(gains: "pd.Series[float]", gaps: "pd.Series[float]") -> Estimate:
    """Mean gain by mean gap; no value where the gap is none, or not beyond its interval where there is one."""
    gaps = gaps.reindex(gains.index)
    if not len(gains) or not gaps.mean() > 0:
        return NOTHING
    if len(gains) < FEWEST_SEEDS:
        return _point(float(gains.mean() / gaps.mean()), len(gains))
    return Estimate(*ratio_interval(gains.to_numpy(dtype=np.float64), gaps.to_numpy(dtype=np.float64)), len(gains))


def _point(value: float, seeds: int) -> Estimate:
    return Estimate(value, math.nan, math.nan, seeds)

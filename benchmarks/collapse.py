"""A table whose small minority differs in every way, with known truth: does a generator take it for the majority?

At each of eight sites 100 of 5,000 patients are of the minority. Their mean heart rate is 90 instead of 80, .29 of them
die instead of .12, and ten further columns, a correlation and what drives death differ too. Whoever asks a model for
rows of the minority should get these.

The outcome is drawn first and every number is normal given group and outcome (on the log scale where it says so), so
that all statistics have a closed form. Distances from the truth are counted in standard errors of an estimate from
the real rows of the minority that the model was trained on: 800 from eight sites, 100 from one. A model that knows
what its rows tell, and no more, is within two of them in 95 % of the statistics.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mcrage import Column, TableSchema, rng
from simulations.sites import Hospitals

MINORITY, MAJORITY = "minority", "majority"
DEATH = {MAJORITY: 0.12, MINORITY: 0.29}
# Correlation of heart rate and systolic pressure given the outcome: compensated in one group, shock in the other.
CORRELATION = {MAJORITY: 0.4, MINORITY: -0.4}


@dataclass(frozen=True)
class Number:
    """A numeric column.

    Attributes:
        deviation: Standard deviation given group and outcome; of the logarithm where ``is_log``.
        means: Mean of each group, majority first.
        shifts: By how many deviations the mean of the dead lies above that of the others, majority first.
        bounds: Public bounds.
        decimals: Digits after the point.
        is_log: Whether the logarithm is normal.
    """

    deviation: float
    means: tuple[float, float]
    shifts: tuple[float, float]
    bounds: tuple[float, float]
    decimals: int = 1
    is_log: bool = False

    def of(self, group: str) -> tuple[float, float]:
        """Mean and shift in a group."""
        place = int(group == MINORITY)
        return self.means[place], self.shifts[place]


NUMBERS = {
    "heart_rate": Number(12, (80, 90), (0.3, 0.8), (20, 220)),
    "systolic": Number(18, (130, 118), (-0.4, -0.2), (40, 260)),
    "age": Number(10, (65, 52), (0.6, 0.1), (10, 130)),
    "temperature": Number(0.7, (37.2, 37.2), (0.2, 0.2), (32, 43), 2),
    "sodium": Number(4, (139, 136), (-0.1, -0.5), (110, 170)),
    "lactate": Number(0.4, (0.4, 0.7), (0.6, 0.2), (0.1, 30), 2, is_log=True),
    "creatinine": Number(0.45, (0.1, 0.5), (0.3, 0.7), (0.1, 30), 2, is_log=True),
}
LEVELS = {
    "sex": {"F": (0.50, 0.60), "M": (0.50, 0.40)},
    "ward": {"medical": (0.4, 0.1), "surgical": (0.3, 0.2), "intensive": (0.2, 0.3), "other": (0.1, 0.4)},
    "smoker": {"no": (0.80, 0.60), "yes": (0.20, 0.40)},
    "diabetes": {"no": (0.85, 0.65), "yes": (0.15, 0.35)},
}
"""Share of each level by group, majority first."""

SCHEMA = TableSchema(
    name="collapse",
    columns=(
        Column(name="group", kind="categorical", role="sensitive", categories=(MAJORITY, MINORITY), nullable=False),
        *(
            Column(
                name=name, kind="continuous", minimum=number.bounds[0], maximum=number.bounds[1],
                decimals=number.decimals, scale="log" if number.is_log else "linear", nullable=False,
            )
            for name, number in NUMBERS.items()
        ),
        *(
            Column(name=name, kind="categorical", categories=tuple(levels), nullable=False)
            for name, levels in LEVELS.items()
        ),
        Column(name="died", kind="boolean", role="target", nullable=False),
    ),
)  # fmt: skip


def hospitals(*, seed: int, num_sites: int = 8, rows: int = 5000, minority_rows: int = 100) -> Hospitals:
    """Sites of equal size and mix."""
    tables = {}
    for site in range(num_sites):
        draw = rng.stream(seed, "collapse", site)
        parts = [patients(MAJORITY, rows - minority_rows, draw), patients(MINORITY, minority_rows, draw)]
        tables[f"site-{site + 1:02d}"] = pd.concat(parts, ignore_index=True)
    return Hospitals(SCHEMA, tables)


def patients(group: str, count: int, draw: np.random.Generator) -> pd.DataFrame:
    """Rows of one group."""
    died = draw.random(count) < DEATH[group]
    noise = {name: draw.normal(size=count) for name in NUMBERS}
    rho = CORRELATION[group]
    noise["systolic"] = rho * noise["heart_rate"] + np.sqrt(1 - rho**2) * noise["systolic"]
    columns: dict[str, object] = {"group": pd.Categorical([group] * count, [MAJORITY, MINORITY])}
    for name, number in NUMBERS.items():
        mean, shift = number.of(group)
        values = mean + number.deviation * (noise[name] + shift * (died - DEATH[group]))
        values = np.exp(values) if number.is_log else values
        columns[name] = np.clip(values.round(number.decimals), *number.bounds)
    for name, levels in LEVELS.items():
        shares = [share[int(group == MINORITY)] for share in levels.values()]
        columns[name] = pd.Categorical.from_codes(draw.choice(len(levels), count, p=shares), [*levels])
    columns["died"] = pd.array(died, dtype="boolean")
    return pd.DataFrame(columns)


@dataclass(frozen=True)
class Statistic:
    """A number of a group with its truth.

    Attributes:
        truth: Its value in the group.
        deviation: Standard error of an estimate from one row; n rows have this over the root of n.
    """

    truth: float
    deviation: float


def truths(group: str) -> dict[str, Statistic]:
    """The statistics of a group: means, shares, the rate of death, the correlation, the heart rate of the dead."""
    rate = DEATH[group]
    spread = np.sqrt(rate * (1 - rate))
    found = {"died": Statistic(rate, float(spread))}
    for name, number in NUMBERS.items():
        mean, shift = number.of(group)
        found[name] = Statistic(mean, float(number.deviation * np.sqrt(1 + (shift * spread) ** 2)))
    for name, levels in LEVELS.items():
        for level, shares in [*levels.items()][1:]:
            share = shares[int(group == MINORITY)]
            found[f"{name}={level}"] = Statistic(share, float(np.sqrt(share * (1 - share))))
    heart, systolic = (NUMBERS[name].of(group)[1] * spread for name in ("heart_rate", "systolic"))
    correlation = (CORRELATION[group] + heart * systolic) / np.sqrt((1 + heart**2) * (1 + systolic**2))
    # Fisher's transform has a standard error of one over the root of the rows, whatever the correlation.
    found["correlation"] = Statistic(float(np.arctanh(correlation)), 1.0)
    number = NUMBERS["heart_rate"]
    found["heart_rate of the dead"] = Statistic(
        number.of(group)[1] * number.deviation, float(number.deviation / spread)
    )
    return found


def statistics(rows: pd.DataFrame) -> dict[str, float]:
    """The same statistics of rows of one group; NaN where nobody or everybody died."""
    died = rows["died"].to_numpy(dtype=bool)
    numbers = {
        name: np.log(rows[name].to_numpy(dtype=float)) if number.is_log else rows[name].to_numpy(dtype=float)
        for name, number in NUMBERS.items()
    }
    found = {"died": float(died.mean())} | {name: float(values.mean()) for name, values in numbers.items()}
    for name, levels in LEVELS.items():
        found |= {f"{name}={level}": float((rows[name] == level).mean()) for level in [*levels][1:]}
    heart = numbers["heart_rate"]
    found["correlation"] = float(np.arctanh(np.corrcoef(heart, numbers["systolic"])[0, 1]))
    both = died.any() and not died.all()
    found["heart_rate of the dead"] = float(heart[died].mean() - heart[~died].mean()) if both else float("nan")
    return found


def distances(rows: pd.DataFrame, group: str, *, num_rows: int) -> dict[str, float]:
    """Distance of each statistic from a group's truth in standard errors of an estimate from ``num_rows`` real rows."""
    found = statistics(rows)
    return {
        name: (found[name] - statistic.truth) / statistic.deviation * float(np.sqrt(num_rows))
        for name, statistic in truths(group).items()
    }

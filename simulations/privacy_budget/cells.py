"""The cells of a sweep over epsilon: what each one trains, with which settings and noise.

A cell is one draw of hospitals, one generator, one place where the noise is added, and one epsilon:

* ``local``: every hospital adds all of the noise, and whatever leaves it is protected by itself;
* ``shared``: the noise is in the sum of all hospitals once, and each adds its share;
* ``none``: without privacy, which is what an infinite epsilon means: the ordinary federation of the CDDPM, and the
  exact counts of the marginal model.

Each draw of hospitals has one cell more, of real rows: every hospital's own, and those of all together.

Epsilon is that of one hospital's patients for all that leaves during training: counts, histograms and steps. The
defaults of :data:`RECIPES` come from trials that ``docs/privacy-budget.md`` lists.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Final

from mcrage.config import Scalar
from mcrage.errors import ConfigError
from mcrage.marginal.budget import precision
from simulations.settings import ExperimentConfig, parse_config
from simulations.study import COHORT

REAL: Final = "real"
GENERATORS: Final = ("cddpm", "marginal")
NONE: Final = "none"
NOISES: Final = ("local", "shared")

RECIPES: Final[Mapping[str, Mapping[str, Scalar]]] = {
    NONE: {"evaluate_every": 0},
    "local": {
        "evaluate_every": 0, "num_server_rounds": 40, "local_steps": 1, "warmup_steps": 10,
        "dp_sample_rate": 0.5, "dp_draws": 8,
    },
    "shared": {
        "evaluate_every": 0, "num_server_rounds": 200, "local_steps": 1, "warmup_steps": 20, "width": 64,
        "learning_rate": 2e-3, "ema_decay": 0.97, "dp_sample_rate": 0.3, "dp_draws": 4,
    },
}  # fmt: skip
"""Settings of a federation by where its noise is added; whatever is given takes their place."""

_HISTOGRAMS = 0.4  # share of the precision that the one-way histograms have
_COUNTS = (0.1, 0.5)  # epsilon of the counts by group: a tenth of all, at most a half


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell.

    Attributes:
        dataset: Name of the data set.
        sites, patients: Number of hospitals and patients of each; None where the data set has its own.
        seed: Root of every draw but that of the noise.
        generator: ``cddpm``, ``marginal`` or ``real``.
        noise: ``none``, ``local`` or ``shared``.
        epsilon: That was asked for; infinite for ``none``.
    """

    dataset: str
    sites: int | None
    patients: int | None
    seed: int
    generator: str
    noise: str = NONE
    epsilon: float = math.inf

    @property
    def name(self) -> str:
        """A name for files and lines."""
        size = f"{self.sites or 'own'}x{self.patients or 'own'}"
        how = "" if self.generator == REAL else f"-{self.noise}-eps{self.epsilon:g}"
        return f"{self.dataset}-{size}-seed{self.seed}-{self.generator}{how}"

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON; an infinite epsilon is None."""
        return asdict(self) | {"epsilon": None if math.isinf(self.epsilon) else self.epsilon}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is asked for.

    Attributes:
        dataset, sites, patients: As in :class:`Cell`.
        seeds, generators, noises, epsilons: Every combination is a cell.
        given: Settings by where the noise is added; those under "" are for all.
    """

    dataset: str = COHORT
    sites: int | None = None
    patients: int | None = None
    seeds: tuple[int, ...] = (0,)
    generators: tuple[str, ...] = GENERATORS
    noises: tuple[str, ...] = NOISES
    epsilons: tuple[float, ...] = (1.0, 3.0, 8.0, math.inf)
    given: Mapping[str, Mapping[str, Scalar]]

    def __post_init__(self) -> None:
        _check_known("generator", self.generators, GENERATORS)
        _check_known("noise", self.noises, NOISES)
        for name, values in (("epsilon", self.epsilons), ("seeds", self.seeds)):
            if len(set(values)) < len(values) or not values:
                raise ConfigError(f"{name}: each has to stand there once, and one at least")
        if min(self.epsilons) < 0.1 or min(self.seeds) < 0:
            raise ConfigError("epsilon has to be at least .1, and a seed at least 0")

    @property
    def cells(self) -> list[Cell]:
        """All cells, those of real rows first: what the others are compared with."""
        place = {"dataset": self.dataset, "sites": self.sites, "patients": self.patients}
        found = [Cell(**place, seed=seed, generator=REAL) for seed in self.seeds]  # type: ignore[arg-type]
        for seed, generator in product(self.seeds, self.generators):
            for epsilon in self.epsilons:
                for noise in self.noises if math.isfinite(epsilon) else (NONE,):
                    found.append(
                        Cell(**place, seed=seed, generator=generator, noise=noise, epsilon=epsilon)  # type: ignore[arg-type]
                    )
        return found

    def config(self, cell: Cell, *, columns: int, sites: int) -> ExperimentConfig:
        """The settings of a cell.

        Args:
            cell: One of :attr:`cells`.
            columns: Number of columns that are modelled.
            sites: Number of hospitals, all of which take part in every round.

        Raises:
            ConfigError: With a line for every setting that is not allowed.
        """
        asked = dict(self.given.get("", {})) | dict(self.given.get(cell.noise, {}))
        forced: dict[str, Scalar] = {"seed": cell.seed, "min_sites": sites, "local_models": False}
        if cell.noise == NONE:
            private = dict.fromkeys(key for key in asked if key.startswith("dp_") and key != "dp_delta")
            asked = {key: value for key, value in asked.items() if key not in private}
            return parse_config(dict(RECIPES[NONE]) | asked | forced)
        forced |= {"dp": True, "dp_epsilon": cell.epsilon, "dp_noise": cell.noise}
        delta = float(asked.get("dp_delta", 1e-5))
        return parse_config(
            dict(RECIPES[cell.noise]) | _counts(cell.epsilon, delta=delta, columns=columns) | asked | forced
        )


def parse_settings(items: Iterable[str], *, rounds: int | None) -> dict[str, dict[str, Scalar]]:
    """Settings such as ``width=64`` and ``shared.dp_sample_rate=0.3``, by where the noise is added, "" for all.

    Raises:
        ConfigError: If one is not KEY=VALUE, names another place, or sets what the options of the command set.
    """
    found: dict[str, dict[str, Scalar]] = {"": {}, NONE: {}, "local": {}, "shared": {}}
    if rounds is not None:
        found[""]["num_server_rounds"] = rounds
    for text in items:
        key, equals, value = text.partition("=")
        noise, dot, name = key.rpartition(".")
        name = name.replace("-", "_")
        if not equals or not name or (dot and noise not in (NONE, *NOISES)):
            raise ConfigError(f"--set takes KEY=VALUE, or KEY with {NONE}., local. or shared. before it; got '{text}'")
        if name in ("seed", "dp", "dp_epsilon", "dp_noise", "dp_noise_multiplier", "min_sites", "local_models"):
            raise ConfigError(f"--set {name}: the command sets it by itself for each cell")
        found[noise][name] = _scalar(value)
    return found


def numbers(items: Sequence[str], *, option: str) -> tuple[float, ...]:
    """Numbers that are given one by one or with commas between them; ``inf`` is one of them.

    Args:
        items: What was given.
        option: Of the command, for its message.

    Raises:
        ConfigError: If one is no number.
    """
    wrong = ConfigError(f"{option}: expected numbers with commas between them, got '{','.join(items)}'")
    try:
        found = tuple(float(part) for item in items for part in item.split(",") if part.strip())
    except ValueError:
        raise wrong from None
    if any(math.isnan(number) for number in found):
        raise wrong
    return found


def whole_numbers(text: str, *, option: str) -> tuple[int, ...]:
    """The same of whole numbers.

    Raises:
        ConfigError: If one is none.
    """
    found = numbers([text], option=option)
    if not all(number.is_integer() for number in found):
        raise ConfigError(f"{option}: expected whole numbers with commas between them, got '{text}'")
    return tuple(map(int, found))


def _counts(epsilon: float, *, delta: float, columns: int) -> dict[str, Scalar]:
    """Noise of the histograms and of the counts by group, as shares of what the whole run may cost."""
    noise = math.sqrt(columns / (_HISTOGRAMS * precision(epsilon=epsilon, delta=delta)))
    part, most = _COUNTS
    return {"dp_histogram_noise": float(f"{max(noise, 1.0):.3g}"), "dp_count_epsilon": min(part * epsilon, most)}


def _check_known(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    if not values or len(set(values)) < len(values) or not set(values) <= set(known):
        raise ConfigError(f"{name}: expected some of {', '.join(known)}, each once; got '{', '.join(values)}'")


def _scalar(text: str) -> Scalar:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text

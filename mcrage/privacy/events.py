"""What was done to a site's data, as plain facts: the only thing that a ledger keeps, and all that an epsilon rests on.

The unit of privacy is one patient with all rows, neighbours differ by adding or removing one.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mcrage.errors import PrivacyError

Mechanism = Literal["dp-sgd", "discrete-gaussian", "discrete-laplace", "unprotected"]

SMALLEST_NOISE, LARGEST_NOISE = 0.3, 1e3
LARGEST_RATE = 0.5
MOST_STEPS = 1_000_000

_LARGEST_SCALE = 1e6  # of counts: their noise is not multiplied by anything


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """One use of a site's data.

    Attributes:
        mechanism: ``dp-sgd``: Poisson samples of patients, clipped, Gaussian noise. ``discrete-gaussian`` and
            ``discrete-laplace``: integer noise on counts of which a patient changes ``steps`` by one each.
            ``unprotected``: a release without noise; no epsilon covers it.
        noise_multiplier: Standard deviation over the clipping norm (``dp-sgd``), standard deviation of a count
            (``discrete-gaussian``), or scale of a count, 1/ε (``discrete-laplace``).
        sample_rate: Probability that a patient is in a step's batch (``dp-sgd``); else 1.
        steps: Noisy steps (``dp-sgd``), or counts that one patient changes.
        own_noise: Where sites share Gaussian noise (:mod:`mcrage.privacy.shared`,
            :mod:`mcrage.privacy.shared_counts`), that of this site's share alone, which is all that is left against
            whoever breaks the aggregation; 0 where all of ``noise_multiplier`` is this site's.
    """

    mechanism: Mechanism
    noise_multiplier: float = 0.0
    sample_rate: float = 1.0
    steps: int = 1
    own_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism) or type(self.steps) is not int:
            raise PrivacyError("not a privacy event: its mechanism or its number of steps is of no known kind")
        if self.mechanism == "unprotected":
            return
        is_sgd = self.mechanism == "dp-sgd"
        lowest, highest = (SMALLEST_NOISE, LARGEST_NOISE) if is_sgd else (SMALLEST_NOISE, _LARGEST_SCALE)
        if not lowest <= self.noise_multiplier <= highest:
            raise PrivacyError(f"noise_multiplier must lie in [{lowest:g}, {highest:g}], got {self.noise_multiplier}")
        if is_sgd and not 0 < self.sample_rate <= LARGEST_RATE:
            raise PrivacyError(f"sample_rate must lie in (0, {LARGEST_RATE:g}], got {self.sample_rate}")
        if not 1 <= self.steps <= MOST_STEPS:
            raise PrivacyError(f"steps must lie in [1, {MOST_STEPS:,}], got {self.steps}")
        if self.own_noise and not (
            self.mechanism != "discrete-laplace" and 0 < self.own_noise <= self.noise_multiplier
        ):
            raise PrivacyError("own_noise is a share of Gaussian noise, above 0 and at most all of it")

    @property
    def in_words(self) -> str:
        """The event for people."""
        counted = f"{self.steps:,} {'count' if self.steps == 1 else 'counts'} per patient"
        shared = f" shared by the sites, {self.own_noise:.3g} of it this site's" if self.own_noise else ""
        match self.mechanism:
            case "dp-sgd":
                noise = f"noise multiplier {self.noise_multiplier:g}{shared}"
                return f"{self.steps:,} steps, sample rate {self.sample_rate:g}, {noise}"
            case "discrete-gaussian":
                return f"{counted} with Gaussian noise of standard deviation {self.noise_multiplier:g}{shared}"
            case "discrete-laplace":
                return f"{counted} with Laplace noise of scale {self.noise_multiplier:g}"
            case _:
                return "a release without noise"

    def to_json(self) -> str:
        """Canonical text: the same event always gives the same bytes."""
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Its fields, without a share where there is none: as it was written before noise could be shared."""
        fields = asdict(self)
        return fields if self.own_noise else {name: fields[name] for name in fields if name != "own_noise"}

    @classmethod
    def from_json(cls, text: str) -> "PrivacyEvent":
        """The event of :meth:`to_json`.

        Raises:
            PrivacyError: If it is anything else.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            return cls(**content)
        except (TypeError, ValueError):
            raise PrivacyError("not the text of a privacy event") from None

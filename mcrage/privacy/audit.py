"""Whether a training did to made-up patients what its ledger says: four checks, each against the ledger's events.

``bound``: what guessing the canaries' coins proves about epsilon does not exceed the claim. It is a proof, and a blunt
one. ``signal``: canaries stand out as much as sampling, steps and noise say. ``noise``: where nobody takes part there
is as much noise as claimed. ``events``: as many steps were taken, and patients were in as many batches.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mcrage.errors import PrivacyError
from mcrage.privacy import bounds
from mcrage.privacy.accounting import epsilon, merge
from mcrage.privacy.bounds import Estimate, Included, Scores
from mcrage.privacy.events import PrivacyEvent

Check = Literal["bound", "signal", "noise", "events"]

MOST_SIGNAL_Z, MOST_NOISE_Z, MOST_BATCHES_Z = 4.0, 5.0, 5.0
"""Standard errors by which a figure may be off: a right build exceeds them in fewer than one of 10,000 audits."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was seen of a training; sums and squares in units of the clipping norm.

    Attributes:
        scores: Of each canary, the sum over all steps of the noisy gradient at its coordinate.
        squares: The same of squares.
        included: Which canaries took part.
        steps: Steps that moved the parameters.
        patients: Patients in the table.
        turns: How often any of them was in a batch, over all steps.
    """

    scores: Scores
    squares: NDArray[np.float64]
    included: Included
    steps: int
    patients: int
    turns: int


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What an audit found.

    Attributes:
        events: Of the ledger, equal ones merged.
        delta: Of the claim.
        epsilon: What the events cost at ``delta``, by privacy loss distributions.
        confidence: Of the lower bounds.
        canaries, included: How many there were, and how many took part.
        one_run: Lower bound of epsilon, for any mechanism.
        one_run_gaussian: The same for one that is as hard to tell apart as Gaussians.
        auc: Probability that a canary that took part has a higher score than one that did not.
        signal: Distance of both kinds' mean scores in standard deviations.
        noise: Standard deviation of the scores of canaries that took no part.
        step_noise: The same of a single step.
        steps, charged_steps: Steps that were taken, and steps in the ledger.
        turns: How often a patient was in a batch, over all patients and steps.
    """

    events: tuple[PrivacyEvent, ...]
    delta: float
    epsilon: float
    confidence: float
    canaries: int
    included: int
    one_run: float
    one_run_gaussian: float
    auc: float
    signal: Estimate
    noise: Estimate
    step_noise: Estimate
    steps: int
    charged_steps: int
    turns: Estimate

    @property
    def failed(self) -> tuple[Check, ...]:
        """Names of the checks that did not hold."""
        held: dict[Check, bool] = {
            "bound": max(self.one_run, self.one_run_gaussian) <= self.epsilon,
            "signal": abs(self.signal.z) <= MOST_SIGNAL_Z,
            "noise": max(abs(self.noise.z), abs(self.step_noise.z)) <= MOST_NOISE_Z,
            "events": self.steps == self.charged_steps and abs(self.turns.z) <= MOST_BATCHES_Z,
        }
        return tuple(name for name, holds in held.items() if not holds)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON has; a number without bound is None."""
        return _finite(asdict(self) | {"failed": list(self.failed)})

    def text(self) -> str:
        """A few lines for people; numbers, and no word of safety."""
        failed = self.failed
        figures: dict[Check, str] = {
            "bound": f"epsilon is at least {self.one_run:.2f}, or {self.one_run_gaussian:.2f} if it is like a Gaussian "
            f"({self.confidence:.0%} confidence; {self.epsilon:.2f} claimed)",
            "signal": f"mu {_in_words(self.signal)}, AUC {self.auc:.3f}",
            "noise": f"deviation {_in_words(self.noise)}; of a step {_in_words(self.step_noise)}",
            "events": f"{self.steps:,} steps taken and {self.charged_steps:,} charged; "
            f"patients in batches {self.turns.value:,.0f} times, {self.turns.expected:,.0f} expected, "
            f"z {self.turns.z:+.1f}",
        }
        return "\n".join(
            [
                f"claimed epsilon {self.epsilon:.2f} at delta {self.delta:g}; {self.canaries:,} canaries, "
                f"{self.included:,} of them in the training",
                *(f"{name:<7} {'DIFFERS' if name in failed else 'agrees '} {line}" for name, line in figures.items()),
            ]
        )


def judge(seen: Seen, events: Sequence[PrivacyEvent], *, delta: float, confidence: float = 0.95) -> AuditReport:
    """Compares what was seen of a training with the events in its ledger.

    Raises:
        PrivacyError: If an event is none of training, there is none, or too few canaries were in or out.
    """
    if not events or any(event.mechanism != "dp-sgd" for event in events):
        raise PrivacyError("an audit needs the dp-sgd events of a training, and no others")
    steps = sum(event.steps for event in events)
    rate = sum(event.steps * event.sample_rate for event in events)
    chance = sum(event.steps * event.sample_rate * (1 - event.sample_rate) for event in events)
    deviation = math.sqrt(sum(event.steps * event.noise_multiplier**2 for event in events))
    claim: dict[str, Any] = {
        "delta": delta,
        "guesses": bounds.pre_registered(len(seen.scores)),
        "confidence": confidence,
    }
    outside = ~seen.included
    per_step = np.sqrt(seen.squares[outside] / max(seen.steps, 1))
    expected_turns = seen.patients * rate
    return AuditReport(
        events=merge(events),
        delta=delta,
        epsilon=epsilon(events, delta=delta),
        confidence=confidence,
        canaries=len(seen.scores),
        included=int(seen.included.sum()),
        one_run=bounds.one_run_bound(seen.scores, seen.included, **claim),
        one_run_gaussian=bounds.one_run_bound_gaussian(seen.scores, seen.included, **claim),
        auc=bounds.auc(seen.scores, seen.included),
        signal=bounds.signal(seen.scores, seen.included, expected=rate / deviation),
        noise=bounds.noise(seen.scores[outside], expected=deviation),
        step_noise=bounds.noise(
            per_step, expected=deviation / math.sqrt(steps), number=int(outside.sum()) * max(seen.steps, 1)
        ),
        steps=seen.steps,
        charged_steps=steps,
        turns=Estimate(
            float(seen.turns), expected_turns, (seen.turns - expected_turns) / math.sqrt(seen.patients * chance)
        ),
    )


def _in_words(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} for {estimate.expected:.3f}, z {estimate.z:+.1f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

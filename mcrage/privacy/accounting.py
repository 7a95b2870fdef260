"""What events cost, as an epsilon: exactly enough to print, or fast and a little higher.

:func:`epsilon` is the number: privacy loss distributions (dp-accounting), rounded towards more cost, in a process of
its own with limits on memory and time, because what it is asked may come from a server. :func:`epsilon_bound` is never
below it: Rényi divergences with numpy, in milliseconds. Both take one patient with all rows as the unit and
adding or removing one as the neighbours, and neither depends on the order of events.
"""

import json
import math
import os
import signal
import subprocess
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from mcrage.errors import PrivacyError
from mcrage.privacy.events import LARGEST_NOISE, MOST_STEPS, SMALLEST_NOISE, Mechanism, PrivacyEvent

LARGEST_DELTA = 1e-3
SAMPLE_RATES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
STEPS_PER_ROUND = (1, 4, 16, 64)

_LOW_ORDERS = np.concatenate([[1.01, 1.02, 1.05], np.arange(11, 40) / 10, np.arange(8, 22) / 2])
_HIGH_ORDERS = np.unique(np.concatenate([np.arange(11, 64), np.geomspace(64, 512, 25).round()])).astype(int)
_ORDERS = np.concatenate([_LOW_ORDERS, _HIGH_ORDERS, np.geomspace(1e3, 1e7, 13)])
_LOG_FACTORIALS = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, _HIGH_ORDERS[-1] + 1)))])
_ROUNDING = 1e-12  # more than the sums of a divergence lose
_INTERVALS = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_FINEST_UP_TO = 40.0
_PLANNING_INTERVAL = 1e-3  # ten times as fast, and noise that is less than 1 % too high
_TOLERATED_NOISE = 1.1
_USUAL_EXCESS = 1.09  # of the fast accountant over the slow one
_THREE_DIGITS = tuple(
    number
    for power in range(-3, 2)
    for digits in range(100, 1000)
    if SMALLEST_NOISE <= (number := float(f"{digits}e{power}")) <= LARGEST_NOISE
)


def default_delta(patients: int) -> float:
    """The delta of a site for its lifetime: far less than one in the number of patients that it declares."""
    if patients < 1:
        raise PrivacyError(f"patients must be at least 1, got {patients}")
    return min(1e-5, 0.1 / patients)


def merge(events: Sequence[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """The same cost in the fewest events, in an order of their own; ``unprotected`` ones are kept as one."""
    steps: Counter[PrivacyEvent] = Counter()
    for event in events:
        if event.mechanism not in get_args(Mechanism) or not isinstance(event.steps, int):
            raise PrivacyError("not a privacy event: its mechanism or its steps are of no known kind")
        steps[_kind(event)] += event.steps
    merged: list[PrivacyEvent] = []
    for kind, total in sorted(steps.items(), key=lambda item: item[0].to_json()):
        if kind.mechanism == "unprotected":
            merged.append(kind)
            continue
        whole, rest = divmod(total, MOST_STEPS)
        merged += [replace(kind, steps=number) for number in (*[MOST_STEPS] * whole, rest) if number]
    return tuple(merged)


def _kind(event: PrivacyEvent) -> PrivacyEvent:
    if event.mechanism == "unprotected":
        return PrivacyEvent(mechanism="unprotected")
    rate = float(event.sample_rate) if event.mechanism == "dp-sgd" else 1.0
    noise, own = float(event.noise_multiplier), float(event.own_noise)
    return PrivacyEvent(mechanism=event.mechanism, noise_multiplier=noise, sample_rate=rate, own_noise=own)


def alone(events: Sequence[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """What is left of the events for whoever breaks the aggregation: of shared noise, the site's own share.

    A share that is too small to be accounted for protects nobody: its event becomes ``unprotected``.
    """
    return tuple(map(_alone, events))


def _alone(event: PrivacyEvent) -> PrivacyEvent:
    if not event.own_noise:
        return event
    if event.own_noise < SMALLEST_NOISE:
        return PrivacyEvent(mechanism="unprotected")
    return replace(event, noise_multiplier=event.own_noise, own_noise=0.0)


def epsilon(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """The epsilon of all events together at ``delta``; infinite if one of them is ``unprotected``.

    Noise that sites share counts whole, as for somebody who sees their sums; :func:`alone` gives the other case.
    A first answer takes about 1.5 seconds, the same events again nothing.

    Raises:
        PrivacyError: If ``delta`` is out of range, or the accountant needs more memory or time than it may have.
    """
    merged = _checked(events, delta)
    bound = _bound(merged, delta)
    return bound if bound == 0 or math.isinf(bound) else _cost(merged, delta)


def epsilons(groups: Sequence[Sequence[PrivacyEvent]], *, delta: float) -> tuple[float, ...]:
    """:func:`epsilon` of each of several groups of events, with one start of the accountant for all of them."""
    with _Accountant() as accountant:
        return tuple(accountant.cost(_checked(events, delta), delta) for events in groups)


def epsilon_bound(events: Sequence[PrivacyEvent], *, delta: float) -> float:
    """An epsilon that is at least :func:`epsilon`, without a process and in milliseconds.

    Divergences of Poisson-sampled Gaussians (Mironov, Talwar and Zhang, 2019, section 3.3), of the Gaussian for
    discrete Gaussians (Canonne, Kamath and Steinke, 2020, theorem 4), and of the discrete Laplace, whose loss takes two
    values; then proposition 12 of the second paper, or the Laplace losses added up where that is less.
    """
    return _bound(_checked(events, delta), delta)


def costs_at_most(limit: float, events: Sequence[PrivacyEvent], *, delta: float) -> bool:
    """Whether :func:`epsilon` is within a limit; asks the slow accountant only where the fast one cannot tell."""
    return math.isinf(limit) or epsilon_bound(events, delta=delta) <= limit or epsilon(events, delta=delta) <= limit


def _checked(events: Sequence[PrivacyEvent], delta: float) -> tuple[PrivacyEvent, ...]:
    check_delta(delta)
    return merge(events)


def check_delta(delta: float) -> None:
    """Raises a PrivacyError unless ``delta`` can mean anything."""
    if not 0 < delta <= LARGEST_DELTA:
        raise PrivacyError(f"delta must lie in (0, {LARGEST_DELTA:g}], got {delta}")


@lru_cache(maxsize=4096)
def _cost(merged: tuple[PrivacyEvent, ...], delta: float) -> float:
    with _Accountant() as accountant:
        return accountant.cost(merged, delta)


class _Accountant:
    """:mod:`mcrage.privacy.pld` as a running process.

    Args:
        finest: Distance between the losses that it tells apart where costs are small.
    """

    def __init__(self, *, finest: float = _INTERVALS[0]) -> None:
        self._finest = finest

    def __enter__(self) -> "_Accountant":
        # Python's own path of this process, so that the worker is of the same version.
        environment = {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        for name in ("PATH", "LD_LIBRARY_PATH"):
            if name in os.environ:
                environment[name] = os.environ[name]
        command = [sys.executable, "-P", "-m", "mcrage.privacy.pld"]
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True
            )
        except OSError as error:
            raise PrivacyError(f"the privacy accountant cannot be started: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # of a question that was never read
                stream.close()
        self._process.wait()

    def cost(self, merged: tuple[PrivacyEvent, ...], delta: float) -> float:
        """Both accountants give upper bounds; near 0 the grid of losses is coarse and the fast one can be lower."""
        bound = _bound(merged, delta)
        if bound == 0 or math.isinf(bound):
            return bound
        events = [event.to_dict() for event in merged]
        question = json.dumps({"events": events, "delta": delta, "interval": max(self._finest, _interval(bound))})
        answer = self._ask(question)
        value = answer.get("epsilon")
        if not isinstance(value, float | int) or not value >= 0:
            raise PrivacyError(f"the privacy accountant failed: {answer.get('error', 'it gave no epsilon')}")
        return min(float(value), bound)

    def _ask(self, question: str) -> dict[str, object]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
            return dict(json.loads(self._process.stdout.readline()))
        except (OSError, ValueError):
            status = self._process.wait()
        reason = "it took too long" if status == -signal.SIGALRM else f"it ended with status {status}"
        raise PrivacyError(f"the privacy accountant failed: {reason}")


def calibrate_noise_multiplier(
    *, epsilon: float, delta: float, sample_rate: float, steps: int, also: Sequence[PrivacyEvent] = ()
) -> float:
    """The least ``dp-sgd`` noise of three digits with which a training and ``also`` cost at most ``epsilon``.

    Raises:
        PrivacyError: If the noise that it takes is out of range, or a setting is.
    """
    with _Accountant() as accountant:
        training = PrivacyEvent(
            mechanism="dp-sgd", noise_multiplier=LARGEST_NOISE, sample_rate=sample_rate, steps=steps
        )
        noise = _calibrated(accountant, training, also, epsilon=epsilon, delta=delta)
    if noise is None:
        raise PrivacyError(f"no noise_multiplier up to {LARGEST_NOISE:g} keeps the cost within epsilon {epsilon:g}")
    return noise


def _calibrated(
    accountant: _Accountant, training: PrivacyEvent, also: Sequence[PrivacyEvent], *, epsilon: float, delta: float
) -> float | None:
    """Narrows down a place among three-digit numbers; the fast bound tells where to ask the slow accountant."""

    def events(place: int) -> tuple[PrivacyEvent, ...]:
        return _checked([*also, replace(training, noise_multiplier=_THREE_DIGITS[place])], delta)

    def place_by_bound(limit: float) -> int:
        return bisect_left(range(len(_THREE_DIGITS)), True, key=lambda place: _bound(events(place), delta) <= limit)

    too_little, enough = -1, place_by_bound(epsilon)
    excess = _USUAL_EXCESS
    while enough - too_little > 1:
        place = min(max(place_by_bound(epsilon * excess), too_little + 1), enough - 1)
        cost = accountant.cost(events(place), delta)
        if cost <= epsilon:
            enough = place
        else:
            too_little = place
        if 0 < cost < math.inf:
            excess = _bound(events(place), delta) / cost
    return _THREE_DIGITS[enough] if enough < len(_THREE_DIGITS) else None


@dataclass(frozen=True, kw_only=True)
class PlannedTraining:
    """One way to spend an epsilon on training.

    Attributes:
        sample_rate: Probability that a patient is in a step's batch.
        steps: Over all rounds.
        noise_multiplier: The least that keeps to the epsilon.
        noise: Standard deviation of the noise on the mean gradient, per coordinate and in units of the clipping norm.
        is_advised: Of the choices with as many steps, the one with the smallest batches whose noise is at most 10 %
            above the least: larger batches take longer and buy no more.
    """

    sample_rate: float
    steps: int
    noise_multiplier: float
    noise: float
    is_advised: bool


def plan(
    *,
    patients: int,
    epsilon: float,
    delta: float,
    num_rounds: int,
    also: Sequence[PrivacyEvent] = (),
    sample_rates: Sequence[float] = SAMPLE_RATES,
    steps_per_round: Sequence[int] = STEPS_PER_ROUND,
) -> tuple[PlannedTraining, ...]:
    """What an epsilon buys at a site with so many patients, from public numbers only; ordered by steps, then rate.

    Args:
        patients: The number that the site declares.
        epsilon: For the training and ``also`` together.
        delta: See :func:`default_delta`.
        num_rounds: Rounds of the run.
        also: Other releases that are planned.
        sample_rates: To choose from; those that draw less than one patient a step are left out.
        steps_per_round: To choose from; choices that would need more noise than there may be are left out.

    Raises:
        PrivacyError: If a setting is out of range, or no choice is left.
    """
    if patients < 1 or num_rounds < 1:
        raise PrivacyError(f"patients and num_rounds must be at least 1, got {patients} and {num_rounds}")
    rates = sorted(rate for rate in sample_rates if rate * patients >= 1)
    choices: list[PlannedTraining] = []
    with _Accountant(finest=_PLANNING_INTERVAL * min(1.0, epsilon)) as accountant:
        for steps in sorted(number * num_rounds for number in steps_per_round):
            noises: dict[float, float] = {}
            for rate in rates:
                training = PrivacyEvent(
                    mechanism="dp-sgd", noise_multiplier=LARGEST_NOISE, sample_rate=rate, steps=steps
                )
                needed = _calibrated(accountant, training, also, epsilon=epsilon, delta=delta)
                if needed is not None:
                    noises[rate] = needed
            choices += _compared(noises, patients=patients, steps=steps)
    if not choices:
        raise PrivacyError(f"no choice keeps the cost of {patients:,} patients within epsilon {epsilon:g}")
    return tuple(choices)


def _compared(noises: Mapping[float, float], *, patients: int, steps: int) -> list[PlannedTraining]:
    relative = {rate: noise / (rate * patients) for rate, noise in noises.items()}
    least = min(relative.values(), default=0.0)
    advised = next((rate for rate, noise in relative.items() if noise <= _TOLERATED_NOISE * least), None)
    return [
        PlannedTraining(
            sample_rate=rate,
            steps=steps,
            noise_multiplier=noise,
            noise=relative[rate],
            is_advised=rate == advised,
        )
        for rate, noise in noises.items()
    ]


def _interval(bound: float) -> float:
    """Coarser for large costs, so that a hostile request stays within memory; such an epsilon protects nobody."""
    wanted = _INTERVALS[0] * bound / _FINEST_UP_TO
    return next((interval for interval in _INTERVALS if interval >= wanted), wanted)


def _bound(merged: tuple[PrivacyEvent, ...], delta: float) -> float:
    if any(event.mechanism == "unprotected" for event in merged):
        return math.inf
    others = [event for event in merged if event.mechanism != "discrete-laplace"]
    pure = sum(event.steps / event.noise_multiplier for event in merged if event.mechanism == "discrete-laplace")
    return min(_from_divergences(merged, delta), pure + _from_divergences(others, delta))


def _from_divergences(merged: Sequence[PrivacyEvent], delta: float) -> float:
    if not merged:
        return 0.0
    total = np.zeros_like(_ORDERS)
    for event in merged:
        total += event.steps * _divergences(event.mechanism, event.noise_multiplier, event.sample_rate)
    values = total + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    return max(0.0, float(values.min()))


@lru_cache(maxsize=4096)
def _divergences(mechanism: Mechanism, noise: float, rate: float) -> NDArray[np.float64]:
    """Rényi divergences of one step at all orders."""
    if mechanism == "dp-sgd":
        high = np.array([_high_moment(order, noise, rate) for order in _HIGH_ORDERS])
        moments = np.concatenate([_low_moments(noise, rate), high, np.full(len(_ORDERS), np.inf)])[: len(_ORDERS)]
    elif mechanism == "discrete-gaussian":
        moments = _ORDERS * (_ORDERS - 1) / (2 * noise**2)
    else:
        likely, unlikely = -np.log1p(np.exp(-1 / noise)), -np.log1p(np.exp(1 / noise))
        powers = (_ORDERS - 1) / noise
        moments = np.logaddexp(likely + powers, unlikely - powers)
    return np.asarray((np.maximum(moments, 0) * (1 + _ROUNDING) + _ROUNDING) / (_ORDERS - 1))


def _low_moments(noise: float, rate: float) -> NDArray[np.float64]:
    """The integral of the same paper's section 3.3 at any order.

    The trapezoid rule is exact to rounding: the integrand is analytic around the real line up to pi times the variance.
    """
    points = np.arange(-10 * noise, _LOW_ORDERS[-1] + 10 * noise, noise / 16)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * points - 1) / (2 * noise**2))
    logs = _LOW_ORDERS[:, None] * ratio - points**2 / (2 * noise**2) - math.log(16 * math.sqrt(2 * math.pi))
    return np.asarray(np.logaddexp.reduce(logs, axis=1))


def _high_moment(order: int, noise: float, rate: float) -> float:
    draws = np.arange(order + 1)
    logs = _LOG_FACTORIALS[order] - _LOG_FACTORIALS[draws] - _LOG_FACTORIALS[order - draws]
    logs += draws * math.log(rate) + (order - draws) * math.log1p(-rate) + (draws**2 - draws) / (2 * noise**2)
    return float(np.logaddexp.reduce(logs))

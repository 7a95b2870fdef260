"""The worker of :mod:`mcrage.privacy.accounting`: privacy loss distributions in a process with limits of its own.

A question comes as one line of JSON on standard input, its answer goes as one line to standard output. What would take
more than 2 GB or 60 seconds ends this process and not the one that asked.
"""

import json
import math
import resource
import signal
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

MOST_MEMORY = 2 << 30
MOST_SECONDS = 60

_WIDEST_GAUSSIAN = 1e4  # the table of a wider one takes seconds and, from 1e6 on, more than the memory
_SHARE_OF_DELTA = 1e-3


def cost(events: Iterable[Mapping[str, Any]], *, delta: float, interval: float) -> float:
    """Smallest epsilon that the composition of events has at ``delta``: an upper bound, for adding or removing one.

    Args:
        events: Fields of :class:`~mcrage.privacy.events.PrivacyEvent`, without ``unprotected``.
        delta: Of the whole composition.
        interval: Distance between the losses that are told apart; every loss counts as no less than it is.
    """
    from dp_accounting.pld import privacy_loss_distribution

    total = privacy_loss_distribution.identity(value_discretization_interval=interval)
    for event in events:
        total = total.compose(_distribution(event, delta=delta, interval=interval))
    return float(total.get_epsilon_for_delta(delta))


def _distribution(event: Mapping[str, Any], *, delta: float, interval: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as pld

    noise, steps = event["noise_multiplier"], event["steps"]
    grid = {"value_discretization_interval": interval, "use_connect_dots": True}
    if event["mechanism"] == "dp-sgd":
        return pld.from_gaussian_mechanism(noise, sampling_prob=event["sample_rate"], **grid).self_compose(steps)
    if event["mechanism"] == "discrete-laplace":
        return pld.from_discrete_laplace_mechanism(1 / noise, sensitivity=1, **grid).self_compose(steps)
    if event["mechanism"] != "discrete-gaussian":
        raise ValueError("unknown mechanism")
    if noise <= _WIDEST_GAUSSIAN:
        return pld.from_discrete_gaussian_mechanism(noise, sensitivity=1, **grid).self_compose(steps)
    # Bun and Steinke (2016), proposition 1.3, spends a small share of delta on what costs next to nothing.
    rho, share = steps / (2 * noise**2), delta * _SHARE_OF_DELTA
    epsilon = rho + 2 * math.sqrt(rho * math.log(1 / share))
    parameters = common.DifferentialPrivacyParameters(epsilon, share)
    return pld.from_privacy_parameters(parameters, value_discretization_interval=interval)


def answer(question: str) -> dict[str, Any]:
    """``{"epsilon": …}``, or ``{"error": …}`` with a few words."""
    try:
        fields = json.loads(question)
        return {"epsilon": cost(fields["events"], delta=fields["delta"], interval=fields["interval"])}
    except MemoryError:
        return {"error": "it takes more than 2 GB of memory"}
    except ImportError:
        return {"error": "dp-accounting cannot be imported"}
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        return {"error": type(error).__name__}


def main() -> None:
    """Answers until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    signal.alarm(MOST_SECONDS)
    for question in sys.stdin:
        sys.stdout.write(json.dumps(answer(question)) + "\n")
        sys.stdout.flush()
        signal.alarm(MOST_SECONDS)


if __name__ == "__main__":
    main()

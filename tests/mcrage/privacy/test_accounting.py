"""The accountants against each other, against exact sums, and against what a hostile server may ask."""

import itertools
import math
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binom

from mcrage.errors import PrivacyError
from mcrage.privacy import accounting, pld
from mcrage.privacy.accounting import (
    alone,
    calibrate_noise_multiplier,
    costs_at_most,
    default_delta,
    epsilon,
    epsilon_bound,
    epsilons,
    merge,
    plan,
)
from mcrage.privacy.events import PrivacyEvent

ROOT = Path(__file__).parents[3]
DELTA = 1e-5


def sgd(noise: float, rate: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(mechanism="dp-sgd", noise_multiplier=noise, sample_rate=rate, steps=steps)


def laplace(scale: float, steps: int = 1) -> PrivacyEvent:
    return PrivacyEvent(mechanism="discrete-laplace", noise_multiplier=scale, steps=steps)


def gaussian(noise: float, steps: int = 1) -> PrivacyEvent:
    return PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=noise, steps=steps)


def by_pld(*events: PrivacyEvent, delta: float = DELTA) -> float:
    """The slow accountant, in this process."""
    return pld.cost([asdict(event) for event in merge(events)], delta=delta, interval=1e-4)


GRID = [
    *[(sgd(*setting),) for setting in itertools.product((1.0, 2.0, 8.0), (0.05, 0.25), (100, 1000))],
    *[(sgd(*setting),) for setting in ((0.7, 0.05, 100), (0.8, 0.01, 1000), (2.0, 0.01, 1000))],
    *[(laplace(*setting),) for setting in itertools.product((0.5, 1, 2, 20), (1, 4, 100))],
    *[(gaussian(*setting),) for setting in itertools.product((1, 8, 100, 1000), (1, 4, 100))],
    (sgd(1.8, 0.0512, 500), laplace(2, 4), laplace(10)),
    (sgd(1.8, 0.0512, 500), gaussian(8, 4), laplace(10)),
    (sgd(3, 0.5, 1), sgd(1, 0.01, 200), gaussian(20)),
]
FEW_SMALL_BATCHES = [sgd(0.3, 0.001, 1), sgd(0.4, 0.001, 10), sgd(0.7, 0.01, 100), sgd(1.0, 0.01, 100)]


def agrees(bound: float, number: float) -> bool:
    """The second accountant confirms the first: not below it, and not far above."""
    return number - 1e-4 <= bound <= 1.25 * number + 0.2


def named(events: tuple[PrivacyEvent, ...]) -> str:
    return "+".join(f"{e.mechanism}-{e.noise_multiplier:g}-{e.sample_rate:g}-{e.steps}" for e in events)


@pytest.mark.parametrize("events", GRID, ids=named)
def test_the_fast_bound_is_not_below_the_number_and_not_far_above(events: tuple[PrivacyEvent, ...]) -> None:
    assert agrees(epsilon_bound(events, delta=DELTA), by_pld(*events))


@pytest.mark.parametrize("events", [case for case in GRID if case[0].steps == 1000], ids=named)
def test_the_comparison_of_accountants_finds_that_half_of_the_steps_were_forgotten(
    events: tuple[PrivacyEvent, ...],
) -> None:
    half = [PrivacyEvent(**{**asdict(event), "steps": event.steps // 2}) for event in events]
    assert not agrees(epsilon_bound(half, delta=DELTA), by_pld(*events))


@pytest.mark.parametrize("event", FEW_SMALL_BATCHES, ids=lambda event: named((event,)))
def test_the_fast_bound_stays_above_the_number_where_it_is_far_from_it(event: PrivacyEvent) -> None:
    number = by_pld(event)
    assert number < epsilon_bound([event], delta=DELTA) < number + 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "setting", [(1.8, 0.0512, 500), (8.05, 0.256, 500), (3.3, 0.05, 2000), (1.03, 0.02, 500), (1.0, 0.1, 50)]
)
def test_the_accountant_of_opacus_gives_the_same_number(setting: tuple[float, float, int]) -> None:
    from opacus.accountants import PRVAccountant

    other = PRVAccountant()
    other.history = [setting]
    assert other.get_epsilon(delta=DELTA) == pytest.approx(by_pld(sgd(*setting)), abs=0.02)


@pytest.mark.parametrize(("scale", "counts"), [(1.0, 3), (0.4, 20), (5.0, 60)])
def test_noisy_counts_cost_what_the_exact_sum_over_their_two_losses_says(scale: float, counts: int) -> None:
    """A discrete Laplace count has a loss of plus or minus one over its scale, so that several add up binomially."""
    likely = 1 / (1 + math.exp(-1 / scale))
    ups = np.arange(counts + 1)

    def delta_at(cost: float) -> float:
        gain = -np.expm1(np.minimum(cost - (2 * ups - counts) / scale, 0))
        return float(binom.pmf(ups, counts, likely) @ gain)

    cost = by_pld(laplace(scale, counts))
    assert delta_at(cost) <= DELTA
    assert delta_at(cost - 0.005) > DELTA


@pytest.mark.parametrize(("noise", "rate"), [(0.3, 0.5), (1.0, 0.01), (2.0, 0.1), (30.0, 0.3)])
def test_divergences_are_the_integral_that_defines_them(noise: float, rate: float) -> None:
    """Renyi divergence of the sampled Gaussian mixture from the plain Gaussian, by another quadrature."""
    found = accounting._divergences("dp-sgd", noise, rate)
    for order in (1.1, 1.5, 2.0, 3.7, 9.5, 12.0, 20.0):

        def log_density(x: float, order: float = order) -> float:
            ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * noise**2))
            return float(order * ratio) - x**2 / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))

        peaks = [0.0, order / 2, order]
        top = max(map(log_density, peaks))
        moment, _ = quad(
            lambda x, f=log_density, top=top: math.exp(f(x) - top),
            *(-12 * noise, order + 12 * noise),
            points=peaks,
            limit=400,
            epsabs=0,
            epsrel=1e-11,
        )
        at = int(np.flatnonzero(np.isclose(accounting._ORDERS, order))[0])
        assert found[at] == pytest.approx((math.log(moment) + top) / (order - 1), rel=1e-6, abs=1e-11)


def test_two_runs_cost_what_they_cost_together() -> None:
    runs = [[sgd(1.8, 0.0512, 500)] * number for number in (1, 2, 4)]
    assert epsilons(runs, delta=DELTA) == pytest.approx((3.0, 4.4, 6.5), abs=0.05)


EVENTS = st.one_of(
    st.builds(sgd, st.floats(0.5, 50), st.floats(0.001, 0.5), st.integers(1, 2000)),
    st.builds(laplace, st.floats(0.3, 100), st.integers(1, 20)),
    st.builds(gaussian, st.floats(0.3, 100), st.integers(1, 20)),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(EVENTS, min_size=1, max_size=5), st.randoms(), st.floats(1e-9, 1e-3))
def test_the_bound_grows_with_every_event_and_does_not_depend_on_their_order(
    events: list[PrivacyEvent], draw: "np.random.Generator", delta: float
) -> None:
    cost = epsilon_bound(events, delta=delta)
    assert cost >= 0
    assert epsilon_bound(events[1:], delta=delta) <= cost
    longer = [PrivacyEvent(**{**asdict(events[0]), "steps": 2 * events[0].steps}), *events[1:]]
    assert epsilon_bound(longer, delta=delta) >= cost
    assert epsilon_bound([events[0], *events], delta=delta) == epsilon_bound(longer, delta=delta)
    draw.shuffle(events)
    assert epsilon_bound(events, delta=delta) == cost


def test_the_number_grows_with_steps() -> None:
    costs = [by_pld(sgd(1.3, 0.05, steps), laplace(5)) for steps in (1, 10, 100, 101, 1000)]
    assert costs == sorted(costs)
    assert len(set(costs)) == len(costs)


def test_equal_events_in_any_order_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = epsilon([sgd(2.5, 0.05, 60), laplace(3), sgd(2.5, 0.05, 40)], delta=DELTA)
    monkeypatch.setattr(sys, "executable", "no such program")
    assert epsilon([laplace(3), sgd(2.5, 0.05, 100)], delta=DELTA) == first
    with pytest.raises(PrivacyError, match="cannot be started"):
        epsilon([laplace(3), sgd(2.5, 0.05, 101)], delta=DELTA)


def test_more_steps_than_an_event_may_have_are_kept() -> None:
    merged = merge([sgd(900, 0.5, 10**6), sgd(900, 0.5, 5), sgd(900, 0.5, 10**6)])
    assert [event.steps for event in merged] == [10**6, 10**6, 5]
    one = sgd(900 / math.sqrt(2), 0.5, 10**6)
    assert epsilon_bound(merged, delta=DELTA) == pytest.approx(epsilon_bound([one], delta=DELTA), rel=1e-3)


def test_nothing_costs_nothing_and_no_number_covers_a_release_without_noise() -> None:
    release = PrivacyEvent(mechanism="unprotected")
    assert epsilon([], delta=DELTA) == epsilon_bound([], delta=DELTA) == 0
    assert epsilon([sgd(2, 0.1, 5), release], delta=DELTA) == math.inf
    assert epsilon_bound([release], delta=DELTA) == math.inf
    assert not costs_at_most(100, [release], delta=DELTA)
    assert costs_at_most(math.inf, [release], delta=DELTA)


@pytest.mark.parametrize("delta", [0, -1e-5, 2e-3, 1, math.nan])
def test_a_delta_that_means_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta must lie in"):
        epsilon([laplace(1)], delta=delta)
    with pytest.raises(PrivacyError, match="delta must lie in"):
        epsilon_bound([], delta=delta)


@pytest.mark.parametrize(("mechanism", "steps"), [("dp-sgd", 1.5), ("gaussian", 1)])
def test_what_only_looks_like_an_event_is_refused(mechanism: str, steps: float) -> None:
    event = sgd(2, 0.1, 5)
    object.__setattr__(event, "mechanism", mechanism)
    object.__setattr__(event, "steps", steps)
    with pytest.raises(PrivacyError, match="not a privacy event"):
        epsilon_bound([event], delta=DELTA)


def test_a_server_that_asks_for_next_to_no_noise_is_refused_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(PrivacyError, match="noise_multiplier must lie in"):
        epsilon([sgd(0.05, 0.1, 100)], delta=DELTA)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("event", [sgd(0.3, 0.5, 10**6), sgd(0.4, 0.25, 2000), laplace(0.3, 10**6)], ids=str)
def test_the_worst_that_a_server_may_ask_is_answered_within_seconds(event: PrivacyEvent) -> None:
    start = time.perf_counter()
    assert not costs_at_most(10, [event], delta=DELTA)
    assert epsilon([event], delta=DELTA) > 1000
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize("noise", [2e4, 1e6])
def test_counts_with_very_wide_noise_cost_a_little_and_take_no_memory(noise: float) -> None:
    assert 0 <= by_pld(gaussian(noise, 100)) < 0.01
    assert epsilon([gaussian(noise, 100), laplace(2)], delta=DELTA) == pytest.approx(0.5, abs=0.01)


def test_a_request_for_more_than_2_gb_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_interval", lambda _: 0.0)
    message = r"accountant failed: it takes more than 2 GB of memory$"
    with accounting._Accountant(finest=1e-9) as accountant, pytest.raises(PrivacyError, match=message):
        accountant.cost((sgd(0.31, 0.5, 3),), DELTA)


@pytest.mark.parametrize(
    ("does", "message"),
    [("kill -ALRM $$", "it took too long"), ("exit 7", "status 7"), ("echo '{}'; sleep 5", "it gave no epsilon")],
)
def test_an_accountant_that_dies_is_an_error_of_one_line(
    does: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(PrivacyError, match=f"accountant failed: .*{message}"):
        epsilon([sgd(2.25, 0.1, 17)], delta=DELTA)


def test_the_worker_ends_itself_when_its_time_is_over() -> None:
    program = "from mcrage.privacy import pld; pld.MOST_SECONDS = 1; pld.main()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, cwd=ROOT) as worker:
        assert worker.wait(timeout=30) == -signal.SIGALRM


@pytest.mark.parametrize("question", ["no json", "{}", '{"events": [{}], "delta": 1e-5, "interval": 1e-4}'])
def test_the_worker_answers_a_broken_question_with_an_error(question: str) -> None:
    assert set(pld.answer(question)) == {"error"}
    unknown = {"mechanism": "other", "noise_multiplier": 1.0, "steps": 1}
    with pytest.raises(ValueError, match="unknown mechanism"):
        pld.cost([unknown], delta=DELTA, interval=1e-4)


@pytest.mark.parametrize(
    ("error", "words"), [(MemoryError, "more than 2 GB"), (ImportError, "dp-accounting cannot be imported")]
)
def test_the_worker_answers_line_by_line_within_its_limits(
    error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> float:
        raise error

    asked: list[object] = []
    monkeypatch.setattr(pld.resource, "setrlimit", lambda *limit: asked.append(limit))
    monkeypatch.setattr(pld.signal, "alarm", asked.append)
    monkeypatch.setattr(sys, "stdin", ['{"events": [], "delta": 1e-5, "interval": 1e-4}', "no json"])
    monkeypatch.setattr(pld, "cost", fail)
    pld.main()
    first, second = capsys.readouterr().out.splitlines()
    assert words in first
    assert second == '{"error": "JSONDecodeError"}'
    assert asked == [(resource.RLIMIT_AS, (2 << 30, 2 << 30)), 60, 60, 60]


def test_importing_the_accounting_imports_nothing_heavy() -> None:
    program = (
        "import sys, mcrage.privacy.ledger\n"
        "print(sorted({'torch', 'pandas', 'scipy', 'dp_accounting', 'opacus'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout == "[]\n"


@pytest.mark.parametrize(
    ("target", "rate", "steps", "also"),
    [(3, 0.256, 500, ()), (8, 0.25, 40, ()), (3, 0.1, 100, (laplace(2, 2), sgd(3, 0.1, 200)))],
)
def test_the_calibrated_noise_is_the_least_that_keeps_to_the_budget(
    target: float, rate: float, steps: int, also: tuple[PrivacyEvent, ...]
) -> None:
    noise = calibrate_noise_multiplier(epsilon=target, delta=DELTA, sample_rate=rate, steps=steps, also=also)
    assert float(f"{noise:.3g}") == noise
    assert by_pld(*also, sgd(noise, rate, steps)) <= target
    less = noise - 10.0 ** (math.floor(math.log10(noise)) - 2)
    assert by_pld(*also, sgd(less, rate, steps)) > target


@pytest.mark.parametrize(
    ("target", "also"), [(0.01, ()), (0.5, (laplace(1),)), (3, (PrivacyEvent(mechanism="unprotected"),))], ids=str
)
def test_a_budget_that_no_noise_keeps_to_is_refused(target: float, also: tuple[PrivacyEvent, ...]) -> None:
    with pytest.raises(PrivacyError, match="no noise_multiplier up to 1000"):
        calibrate_noise_multiplier(epsilon=target, delta=DELTA, sample_rate=0.5, steps=10_000, also=also)


@pytest.mark.parametrize(
    ("patients", "rate", "rounds", "noise_multiplier", "noise"),
    [(500, 0.256, 50, 8.05, 0.063), (2000, 0.128, 50, 4.10, 0.016), (10_000, 0.0512, 200, 3.30, 0.0064)],
)
def test_the_plan_gives_the_noise_that_was_measured_before(
    patients: int, rate: float, rounds: int, noise_multiplier: float, noise: float
) -> None:
    [choice] = plan(
        patients=patients, epsilon=3, delta=DELTA, num_rounds=rounds, sample_rates=[rate], steps_per_round=[10]
    )
    assert choice.noise_multiplier == pytest.approx(noise_multiplier, rel=0.03)
    assert choice.noise == pytest.approx(noise, rel=0.03)
    assert (choice.steps, choice.is_advised) == (10 * rounds, True)


def test_the_plan_shows_that_few_large_steps_beat_many_small_ones() -> None:
    choices = plan(
        patients=400, epsilon=3, delta=DELTA, num_rounds=20, sample_rates=(0.5, 0.125, 0.002), steps_per_round=(16, 1)
    )
    assert [(choice.steps, choice.sample_rate) for choice in choices] == [
        *((20, 0.125), (20, 0.5)),
        *((320, 0.125), (320, 0.5)),
    ]
    noises = {(choice.steps, choice.sample_rate): choice.noise for choice in choices}
    assert noises[20, 0.5] < noises[20, 0.125] < noises[320, 0.5] < noises[320, 0.125]
    advised = [choice for choice in choices if choice.is_advised]
    assert [choice.steps for choice in advised] == [20, 320]
    assert advised[1].sample_rate == 0.125, "at so many steps, larger batches buy less than a tenth"


def test_a_plan_without_a_choice_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no choice keeps"):
        plan(patients=100, epsilon=1e-4, delta=DELTA, num_rounds=40)
    with pytest.raises(PrivacyError, match="must be at least 1, got 0 and 40"):
        plan(patients=0, epsilon=1, delta=DELTA, num_rounds=40)


def test_the_default_delta_is_far_below_one_in_the_number_of_patients() -> None:
    assert default_delta(500) == 1e-5
    assert default_delta(50_000) == pytest.approx(2e-6)
    with pytest.raises(PrivacyError, match="patients must be at least 1"):
        default_delta(0)


def test_shared_noise_costs_as_a_whole_what_the_same_noise_of_one_site_does_and_alone_what_the_share_does() -> None:
    whole = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=2.0, sample_rate=0.1, steps=50)
    shared = replace(whole, own_noise=0.7)
    assert epsilon([shared], delta=1e-5) == epsilon([whole], delta=1e-5)
    assert alone([shared, whole]) == (replace(whole, noise_multiplier=0.7), whole)
    assert alone([replace(shared, own_noise=0.2)]) == (PrivacyEvent(mechanism="unprotected"),)
    assert len(merge([shared, whole, shared])) == 2, "a share is not forgotten when events are merged"
    assert merge([shared, shared]) == (replace(shared, steps=100),)


def test_an_event_is_written_as_before_unless_its_noise_is_shared() -> None:
    whole = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=2.0, sample_rate=0.1, steps=50)
    assert whole.to_json() == '{"mechanism": "dp-sgd", "noise_multiplier": 2.0, "sample_rate": 0.1, "steps": 50}'
    assert PrivacyEvent.from_json(whole.to_json()) == whole
    shared = replace(whole, own_noise=0.7)
    assert PrivacyEvent.from_json(shared.to_json()) == shared
    assert shared.in_words == "50 steps, sample rate 0.1, noise multiplier 2 shared by the sites, 0.7 of it this site's"


@pytest.mark.parametrize(
    "changes", [{"own_noise": -0.1}, {"own_noise": 2.1}, {"mechanism": "discrete-laplace", "own_noise": 0.5}]
)
def test_a_share_is_a_part_of_the_noise_of_training(changes: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="own_noise"):
        PrivacyEvent(**({"mechanism": "dp-sgd", "noise_multiplier": 2.0, "sample_rate": 0.1} | changes))

import json
from dataclasses import replace

import numpy as np
import pytest

from mcrage.errors import PrivacyError
from mcrage.privacy.audit import AuditReport, Seen, judge
from mcrage.privacy.events import PrivacyEvent

NOISE, RATE, STEPS, RECORDS, DELTA = 3.0, 0.128, 800, 1000, 1e-5
ROUND = PrivacyEvent(mechanism="dp-sgd", noise_multiplier=NOISE, sample_rate=RATE, steps=STEPS // 4)
EVENTS = (ROUND,) * 4


def simulated(seed: int, *, noise: float = NOISE, rate: float = RATE, gain: float = 1.0, mean: float = 0.0) -> Seen:
    """What an audit sees of the mechanism alone: who is in a batch, times what one contributes, plus noise."""
    draw = np.random.default_rng(seed)
    included = draw.random(1000) < 0.5
    steps = draw.normal(mean, noise, size=(STEPS, 1000))
    turns = draw.random((STEPS, 1000)) < rate
    steps += gain * (turns & included)
    patients = RECORDS + int(included.sum())
    return Seen(
        scores=steps.sum(0),
        squares=(steps**2).sum(0),
        included=included,
        steps=STEPS,
        patients=patients,
        turns=int((turns & included).sum() + draw.binomial(RECORDS * STEPS, rate)),
    )


@pytest.fixture(scope="module")
def right() -> Seen:
    return simulated(0)


@pytest.fixture(scope="module")
def report(right: Seen) -> AuditReport:
    return judge(right, EVENTS, delta=DELTA)


def test_a_training_that_did_what_its_ledger_says_agrees_in_everything(report: AuditReport) -> None:
    assert report.failed == ()
    assert report.epsilon == pytest.approx(5.72, abs=0.01)
    assert report.signal.expected == pytest.approx(RATE * STEPS**0.5 / NOISE)
    assert report.noise.expected == pytest.approx(NOISE * STEPS**0.5)
    assert report.step_noise.expected == pytest.approx(NOISE)
    assert 1 < report.one_run < report.one_run_gaussian < report.epsilon


def test_ten_right_trainings_agree() -> None:
    assert [judge(simulated(seed), EVENTS, delta=DELTA).failed for seed in range(1, 11)] == [()] * 10


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ({"noise": NOISE / 2}, {"signal", "noise"}),
        ({"noise": NOISE / 4}, {"bound", "signal", "noise"}),
        ({"noise": 0.0}, {"bound", "signal", "noise"}),
        ({"gain": 4.0}, {"bound", "signal"}),
        ({"gain": 0.0}, {"signal"}),
        ({"rate": 2 * RATE}, {"signal", "events"}),
        ({"mean": 1.0}, {"noise"}),
    ],
)
def test_a_training_that_did_not_is_found_out(wrong: dict[str, float], found: set[str]) -> None:
    assert found <= set(judge(simulated(0, **wrong), EVENTS, delta=DELTA).failed)


def test_steps_that_are_not_in_the_ledger_are_found_out(right: Seen) -> None:
    assert {"noise", "events"} <= set(judge(right, EVENTS[:2], delta=DELTA).failed)


def test_steps_that_were_charged_and_not_taken_are_found_out(right: Seen) -> None:
    assert "events" in judge(replace(right, steps=STEPS - 1), EVENTS, delta=DELTA).failed


def test_noise_that_is_the_same_in_every_step_is_found_out(right: Seen) -> None:
    repeated = replace(right, scores=right.scores * STEPS**0.5)
    assert "noise" in judge(repeated, EVENTS, delta=DELTA).failed


def test_events_of_different_settings_add_up(right: Seen) -> None:
    other = replace(ROUND, noise_multiplier=1.0, sample_rate=0.5)
    report = judge(right, (ROUND, other), delta=DELTA)
    assert report.noise.expected == pytest.approx((200 * (NOISE**2 + 1)) ** 0.5)
    assert report.signal.expected == pytest.approx(200 * (RATE + 0.5) / report.noise.expected)
    assert report.turns.expected == pytest.approx(right.patients * 200 * (RATE + 0.5))
    assert report.charged_steps == 400


def test_a_report_is_json_even_where_a_number_has_no_bound() -> None:
    content = judge(simulated(0, noise=0.0), EVENTS, delta=DELTA).as_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["signal"]["value"] is None
    assert content["failed"] == ["bound", "signal", "noise"]
    assert content["events"] == [
        {"mechanism": "dp-sgd", "noise_multiplier": NOISE, "sample_rate": RATE, "steps": STEPS, "own_noise": 0.0}
    ]


def test_the_text_gives_every_figure_and_says_which_differ(report: AuditReport) -> None:
    lines = report.text().splitlines()
    assert lines[0].startswith("claimed epsilon 5.72 at delta 1e-05; 1,000 canaries")
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, "agrees"] for name in ("bound", "signal", "noise", "events")
    ]
    wrong = judge(simulated(0, rate=2 * RATE), EVENTS, delta=DELTA).text().splitlines()
    assert [line.split()[1] for line in wrong[2:]] == ["DIFFERS", "agrees", "DIFFERS"]


@pytest.mark.parametrize("events", [(), (ROUND, PrivacyEvent(mechanism="unprotected"))])
def test_other_events_than_a_trainings_are_refused(right: Seen, events: tuple[PrivacyEvent, ...]) -> None:
    with pytest.raises(PrivacyError, match="dp-sgd events"):
        judge(right, events, delta=DELTA)

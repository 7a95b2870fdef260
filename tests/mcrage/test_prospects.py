"""What a plan says of the rows that a private run would give, before anyone trains."""

import math

import pytest

from mcrage.errors import ConfigError
from mcrage.prospects import MEASURED, Measured, Prospect, signal

KNOWN = (
    Measured("marginal", "one", 1_000, -0.5),
    Measured("marginal", "one", 4_000, 0.5),
    Measured("marginal", "one", 16_000, 0.4),
    Measured("marginal", "other", 2_000, 0.2),
)


def test_a_signal_is_patients_over_the_noise_of_the_whole_budget() -> None:
    alone = signal(patients=7_000, epsilon=1, delta=1e-5, noises=1)
    assert signal(patients=7_000, epsilon=1, delta=1e-5, noises=10) == pytest.approx(alone / math.sqrt(10))
    assert signal(patients=14_000, epsilon=1, delta=1e-5, noises=4) == pytest.approx(alone)
    # A Gaussian count of noise 3.73 is (1, 1e-5)-private (Balle and Wang, 2018, the analytic Gaussian mechanism).
    assert alone == pytest.approx(7_000 / 3.73, rel=5e-3)
    assert math.isinf(signal(patients=7_000, epsilon=math.inf, delta=1e-5, noises=1))
    with pytest.raises(ConfigError, match="epsilon must be above"):
        signal(patients=7_000, epsilon=0, delta=1e-5, noises=1)


def at(signal_of_run: float, generator: str = "marginal") -> Prospect:
    return Prospect.of(generator, signal_of_run, measured=KNOWN)


def test_between_measurements_it_is_interpolated_and_never_more_than_with_less_noise() -> None:
    assert at(2_000).shares == pytest.approx({"one": -0.05, "other": 0.2})
    assert at(4_000).shares["one"] == pytest.approx(0.4), "16,000 came to no more"
    assert at(1e9).shares == pytest.approx({"one": 0.4, "other": 0.2})


def test_with_more_noise_than_was_measured_nothing_is_known_but_that_harm_stays_harm() -> None:
    assert at(10).shares == pytest.approx({"one": -0.5})
    assert at(10, "cddpm").shares == {}
    assert at(math.inf).shares == {}


def test_a_plan_warns_where_hospitals_did_worse_than_alone() -> None:
    said = "expected: at this much noise, marginal rows closed"
    assert str(at(900)).startswith(
        f"{said} −50 % on one of the gap from own to pooled rows: WORSE than a hospital's own"
    )
    assert "rows on one; a larger epsilon helps" in str(at(900))
    assert str(at(20_000)) == f"{said} 40 % on one, 20 % on other of the gap from own to pooled rows"
    assert at(2_000).harmed == ("one",)
    for unknown in (at(1_000, "cddpm"), at(math.inf)):
        assert str(unknown).startswith("expected: of ")


def test_what_was_measured_is_of_both_tables_and_has_runs_that_did_harm() -> None:
    for generator in ("marginal",):
        own = [each for each in MEASURED if each.generator == generator]
        assert {each.data for each in own} == {"cohort", "diabetes130"}
        assert min(each.share for each in own) < 0 < max(each.share for each in own) < 1.2
        assert all(each.signal > 0 for each in own)

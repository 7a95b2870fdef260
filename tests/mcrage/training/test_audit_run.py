"""The audit of the production code, and its teeth: it passes the code as it is, and fails it with one piece broken.

A canary's coordinate gets nothing from any record. So the broken builds train few records with a small network; only
the first test needs the network as it is used.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcrage import cli
from mcrage.data.transform import TableTransform
from mcrage.errors import ConfigError, LedgerError
from mcrage.privacy.audit import AuditReport
from mcrage.privacy.dpsgd import ClippedSum
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Charge, PrivacyLedger
from mcrage.privacy.noise import GaussianNoise
from mcrage.privacy.sampling import KeyedDraws
from mcrage.privacy.shared import SharedNoise
from mcrage.training import audit_run, private
from mcrage.training.audit_run import SCHEMA, AuditConfig, _Denoiser, audit

SMALL = {"records": 20, "width": 8, "rounds": 2, "steps_per_round": 100}
MUCH, LITTLE = 1.5, 8.5
"""Noise at which the small training claims an epsilon of 6.7, and one of 0.8."""

Audit = Callable[..., AuditReport]


@pytest.fixture
def run(tmp_path: Path) -> Audit:
    """Audits with a ledger of its own, by default the production one."""

    def call(ledger: type[PrivacyLedger] = PrivacyLedger, **settings: Any) -> AuditReport:
        (tmp_path / "witness").mkdir()
        with ledger.create(tmp_path / "ledger.sqlite", witness=tmp_path / "witness" / "w.json") as opened:
            return audit(AuditConfig(**settings), ledger=opened)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "epsilon", "one_run"), [(3.0, 5.72, 1.0), (17.0, 0.78, 0.0)])
def test_the_training_does_what_its_ledger_says(run: Audit, noise: float, epsilon: float, one_run: float) -> None:
    report = run(noise_multiplier=noise)
    assert report.failed == ()
    assert report.epsilon == pytest.approx(epsilon, abs=0.01)
    assert report.steps == 800
    assert one_run <= report.one_run <= report.epsilon


class QuarterOfNoise(GaussianNoise):
    def add(self, total: Tensor, *, deviation: float) -> Tensor:
        return super().add(total, deviation=deviation / 4)


class NoNoise(GaussianNoise):
    def add(self, total: Tensor, *, deviation: float) -> Tensor:
        return super().add(total, deviation=0.0)


class EachDrawClippedAlone(ClippedSum):
    def __init__(self, module: torch.nn.Module, *, max_grad_norm: float, draws: int) -> None:
        super().__init__(module, max_grad_norm=max_grad_norm, draws=1)


class NothingClipped(ClippedSum):
    def _factors(self) -> Tensor:
        return torch.ones_like(super()._factors())


class TwiceAsOften(KeyedDraws):
    def included(self, step: int, *, sample_rate: float) -> Any:
        return super().included(step, sample_rate=2 * sample_rate)


class EverySecondRoundFree(PrivacyLedger):
    _asked = 0

    def charge(self, events: Sequence[PrivacyEvent], **asked: Any) -> Charge:
        self._asked += 1
        return super().charge(events, **asked) if self._asked % 2 else self.rows[-1]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [MUCH, LITTLE])
def test_the_small_training_does_too(run: Audit, noise: float) -> None:
    assert run(noise_multiplier=noise, **SMALL).failed == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "piece", "found"),
    [
        (MUCH, QuarterOfNoise, {"bound", "signal", "noise"}),
        (MUCH, NoNoise, {"bound", "signal", "noise"}),
        (MUCH, EachDrawClippedAlone, {"bound", "signal"}),
        (MUCH, NothingClipped, {"bound", "signal"}),
        (MUCH, TwiceAsOften, {"signal", "events"}),
        (LITTLE, QuarterOfNoise, {"signal", "noise"}),
        (LITTLE, NoNoise, {"bound", "signal", "noise"}),
        (LITTLE, EachDrawClippedAlone, {"signal"}),
        (LITTLE, NothingClipped, {"bound", "signal"}),
        (LITTLE, TwiceAsOften, {"events"}),
    ],
)
def test_a_training_with_a_broken_piece_is_found_out(
    run: Audit, monkeypatch: pytest.MonkeyPatch, noise: float, piece: type, found: set[str]
) -> None:
    monkeypatch.setattr(private, piece.__base__.__name__, piece)
    assert found <= set(run(noise_multiplier=noise, **SMALL).failed)


TOGETHER = SMALL | {"sites": 4, "colluders": 2, "canaries": 600}


@pytest.mark.slow
@pytest.mark.parametrize("noise", [MUCH, LITTLE])
def test_a_training_with_shared_noise_does_what_its_ledger_says(run: Audit, noise: float) -> None:
    report = run(noise_multiplier=noise, **TOGETHER)
    assert report.failed == ()
    assert {event.own_noise for event in report.events} == {noise / 2**0.5}


class SharesUntold(SharedNoise):
    """Noise for all sites together, as if none could take its own off again."""

    @property
    def own_multiplier(self) -> float:
        return self.noise_multiplier / self.sites**0.5


class OneForgets(SharedNoise):
    """Of the honest sites every second one, which is one of two here, adds nothing."""

    _asked = 0

    def share(self, total: Tensor, noise: GaussianNoise) -> Any:
        OneForgets._asked += 1
        added = super().share(total, noise)
        is_forgetful = OneForgets._asked % self.sites == 2  # the second site of each step
        return added * 0 if is_forgetful else added


@pytest.mark.slow
@pytest.mark.parametrize("broken", [SharesUntold, OneForgets])
def test_a_share_that_is_missing_is_found_out(run: Audit, monkeypatch: pytest.MonkeyPatch, broken: type) -> None:
    monkeypatch.setattr(audit_run, "SharedNoise", broken)
    assert {"noise"} <= set(run(noise_multiplier=MUCH, **TOGETHER).failed)


@pytest.mark.slow
@pytest.mark.parametrize("noise", [MUCH, LITTLE])
def test_rounds_that_were_not_charged_are_found_out(run: Audit, noise: float) -> None:
    report = run(EverySecondRoundFree, noise_multiplier=noise, **SMALL)
    assert {"noise", "events"} <= set(report.failed)
    assert (report.steps, report.charged_steps) == (200, 100)


def test_a_canary_pulls_at_its_own_coordinate_alone() -> None:
    config = AuditConfig(canaries=6, draws=4, width=4)
    denoiser = _Denoiser(TableTransform(SCHEMA), config, torch.Generator())
    layer = denoiser.canaries
    for canary in range(-1, 6):
        loss = denoiser.pull(torch.full((config.draws,), canary), 5.0).mean()
        gradients = torch.autograd.grad(loss, [layer.bias, layer.weight])
        expected = torch.zeros(6)
        if canary >= 0:
            expected[canary] = 5.0
        assert torch.equal(torch.cat([part.flatten() for part in gradients]), expected)


def test_the_audit_charges_every_round_to_its_ledger(run: Audit, tmp_path: Path) -> None:
    report = run(canaries=40, records=5, width=4, rounds=3, steps_per_round=2)
    with PrivacyLedger.open(tmp_path / "ledger.sqlite", witness=tmp_path / "witness" / "w.json") as ledger:
        assert [event.steps for event in ledger.events] == [2, 2, 2]
    assert report.events == (PrivacyEvent(mechanism="dp-sgd", noise_multiplier=3.0, sample_rate=0.128, steps=6),)
    assert report.steps == report.charged_steps == 6


def test_the_same_seed_gives_the_same_report(tmp_path: Path) -> None:
    reports = []
    for name in ("a", "b"):
        (tmp_path / name / "witness").mkdir(parents=True)
        witness = tmp_path / name / "witness" / "w.json"
        with PrivacyLedger.create(tmp_path / name / "ledger.sqlite", witness=witness) as ledger:
            settings = {"canaries": 40, "records": 5, "width": 4, "rounds": 1, "steps_per_round": 2}
            reports.append(audit(AuditConfig(**settings), ledger=ledger))
    assert reports[0] == reports[1]


def test_a_ledger_with_charges_is_left_alone(run: Audit, tmp_path: Path) -> None:
    run(canaries=40, records=5, width=4, rounds=1, steps_per_round=1)
    with (
        PrivacyLedger.open(tmp_path / "ledger.sqlite", witness=tmp_path / "witness" / "w.json") as used,
        pytest.raises(LedgerError, match="empty ledger"),
    ):
        audit(AuditConfig(), ledger=used)


_TWO = {"sites": 2, "colluders": 2}


@pytest.mark.parametrize(
    "wrong",
    [_TWO, {"canaries": 7}, {"draws": 1}, {"records": 0}, {"rounds": 0}, {"sites": 0}, {"sites": 2, "colluders": 2}],
)
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(reversed(wrong)).removesuffix("ers")):
        AuditConfig(**wrong)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Exit code and output of ``mcrage audit run`` with options."""

    def call(*options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["mcrage", "audit", "run", *map(str, options)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().out

    return call


TINY = ("--canaries", 100, "--records", 20, "--steps", 20)


def test_the_command_prints_the_report(command: Callable[..., tuple[int, str]]) -> None:
    code, shown = command(*TINY)
    assert code == 0
    assert shown.startswith("claimed epsilon ")
    assert "DIFFERS" not in shown


def test_the_command_gives_json_and_exit_code_1_where_a_check_differs(
    command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(private, "GaussianNoise", NoNoise)
    code, shown = command(*TINY, "--json")
    assert code == 1
    assert "noise" in json.loads(shown)["failed"]

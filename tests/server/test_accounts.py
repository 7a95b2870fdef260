import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from client.app import app
from client.protection import Protection
from mcrage.config import RunConfig
from mcrage.privacy.statement import PrivacyAccount
from server.accounts import collect_accounts
from server.exchange import Exchange, Subject
from server.roster import Roster, call_roll
from simulations.grid import InProcessGrid

PRIVATE = {"dp": True, "dp-noise-multiplier": 1.0, "dp-sample-rate": 0.2, "run-name": "test_accounts"}


@pytest.fixture
def config(site_dir: Path, tmp_path: Path) -> RunConfig:
    sites = shutil.copytree(site_dir, tmp_path / "sites", ignore=shutil.ignore_patterns("private"))
    return RunConfig.parse(PRIVATE | {"site-dir": str(sites), "round-timeout-seconds": 30.0})


def described(config: RunConfig, grid: InProcessGrid, timeout: float = 30.0) -> Roster:
    return call_roll(grid, config, exchange=Exchange(grid, timeout=timeout))


def test_every_site_tells_what_its_ledger_says_of_the_run(config: RunConfig) -> None:
    accounts = collect_accounts(config, described(config, InProcessGrid.of_folder(app, 3, config)))
    assert list(accounts) == ["site-01", "site-02", "site-03"]
    assert all(account.events for account in accounts.values())


@pytest.mark.parametrize("lie", [{"epsilon": 0.001}, {"site": "site-02"}])
def test_a_site_that_lies_about_its_ledger_costs_the_run_nothing_but_its_statement(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lie: dict[str, Any]
) -> None:
    roster = described(config, InProcessGrid.of_folder(app, 3, config))
    true_ones = collect_accounts(config, roster)
    honest = Protection.account

    def account(protection: Protection, run: str) -> PrivacyAccount:
        true = honest(protection, run)
        return replace(true, **lie) if protection.site == "site-01" else true

    monkeypatch.setattr(Protection, "account", account)
    assert collect_accounts(config, roster) == {site: true_ones[site] for site in ("site-02", "site-03")}
    assert "the privacy account of site site-01 is left out" in caplog.text


def test_a_busy_site_is_asked_and_one_that_is_gone_is_named(
    config: RunConfig, staged_grid: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid = staged_grid.of_folder(app, 3, config)
    roster = described(config, grid, timeout=0.2)
    grid.is_held = lambda reply: True
    instruction = {"site-01": next(each for each in grid.sent if each.metadata.dst_node_id == roster.nodes["site-01"])}
    roster.exchange.ask(instruction, Subject("training", 1))
    assert list(roster.standing(roster.nodes).busy) == ["site-01"]
    grid.is_held, grid.offline = (lambda reply: False), {roster.nodes["site-03"]}
    assert list(collect_accounts(config, roster)) == ["site-01", "site-02"]
    assert "the privacy account of site site-03 is left out: is not connected" in caplog.text

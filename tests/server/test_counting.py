"""Runs of the marginal generator: every site's counts, once, exact or noisy, whoever falls silent or is killed."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import Message

from client import tables
from client.app import app
from client.places import LEDGER, WITNESS
from mcrage.config import RunConfig
from mcrage.data.schema import TableSchema
from mcrage.errors import CheckpointError, ConfigError, FederationError
from mcrage.generator import load_generator
from mcrage.marginal.budget import Budget
from mcrage.marginal.generator import MarginalGenerator
from mcrage.privacy.accounting import alone, epsilon
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import PrivacyLedger
from server.app import save_result
from server.budget import planned_epsilon, planned_events
from server.overview import Record, read_part
from server.rebalance import rebalance
from server.report import render
from server.rounds import FederationResult, run_federation
from simulations.grid import InProcessGrid
from simulations.privacy_budget.sums import SummedSource

pytestmark = pytest.mark.slow  # each run asks the privacy accountant

Config = Callable[..., RunConfig]
LOCAL: dict[str, Any] = {"dp": True, "dp_epsilon": 20.0, "dp_noise_seed": 3}
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "local": LOCAL,
    "shared": LOCAL | {"dp_noise": "shared", "dp_spare_rounds": 1},
}
in_every_mode = pytest.mark.parametrize("mode", MODES)
ALL = ("site-01", "site-02", "site-03")


@pytest.fixture
def config(tiny_config: Config) -> Config:
    usual = {"generator": "marginal", "round_timeout_seconds": 0.5}
    return lambda mode, **changes: tiny_config(**(usual | MODES[mode] | changes))


def plain(config: RunConfig, **more: Any) -> FederationResult:
    return run_federation(InProcessGrid.of_folder(app, 3, config), config, **more)


def digest(model: Any, folder: Path) -> str:
    model.save(folder)
    return hashlib.sha256(
        b"".join((folder / f"model.{kind}").read_bytes() for kind in ("json", "safetensors"))
    ).hexdigest()


def charged(config: RunConfig, site: str) -> list[PrivacyEvent]:
    folder = Path(config.places.site_dir) / "private" / site
    with PrivacyLedger.open(folder / LEDGER, witness=folder / WITNESS) as ledger:
        return [event for row in ledger.rows if row.run == config.run for event in row.events]


def silent(site: int, *questions: int) -> Callable[[Message], bool]:
    """Keeps back what a site answers to these questions."""

    def is_held(reply: Message) -> bool:
        told = reply.content.config_records["config"] if reply.has_content() else {}
        return reply.metadata.src_node_id == 1000 + site and told.get("server-round") in questions

    return is_held


@in_every_mode
def test_the_generator_is_made_of_the_counts_of_all_sites(
    config: Config, mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mcrage.server"):
        result = plain(config(mode))
    assert ("expected: " in caplog.text) == (mode != "none"), "what such runs came to is said after the first question"
    assert [record.server_round for record in result.history] == [*range(1, len(result.history) + 1)]
    assert {tuple(record.sites) for record in result.history} == {ALL}
    rows = result.model.sample(2000, random_state=1)
    assert rows["sex"].value_counts(normalize=True)["M"] == pytest.approx(0.7, abs=0.15)
    told = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (told["state"], told["server_round"], told["num_server_rounds"]) == ("done", *[len(result.history)] * 2)


def test_without_noise_it_is_the_generator_of_the_summed_counts(
    config: Config, tiny_schema: TableSchema, tmp_path: Path
) -> None:
    settings = config("none", seed=5)
    result = plain(settings)
    site_dir = Path(settings.places.site_dir)
    keys = {
        site: tables.TableKey(site, tables.stamp(site_dir / f"{site}.csv"), tables.stamp(site_dir / "schema.json"), 0.3)
        for site in ALL
    }
    source = SummedSource(
        {site: tables.split(key)[1] for site, key in keys.items()},
        tiny_schema,
        epsilon=np.inf,
        delta=1e-5,
        colluders=0,
        key=bytes(32),
    )
    model = MarginalGenerator(random_state=5).estimate(tiny_schema, source, Budget(precision=np.inf))
    assert digest(model, tmp_path / "summed") == digest(result.model, tmp_path / "federated")


@pytest.mark.parametrize("mode", ["local", "shared"])
def test_each_site_is_charged_what_was_planned_and_never_more_than_the_epsilon(
    config: Config, mode: str, tiny_schema: TableSchema
) -> None:
    settings = config(mode, dp_epsilon=3.0, dp_noise_seed=-1, run_name=f"planned {mode}", dp_spare_rounds=0)
    result = plain(settings)
    planned = planned_epsilon(settings, tiny_schema)
    assert 2.9 < planned <= 3.0
    for site in ALL:
        events = charged(settings, site)
        assert {event.mechanism for event in events} == {"discrete-gaussian"}
        spent = epsilon(events, delta=1e-5)
        assert spent <= planned + 1e-3
        assert result.accounts[site].epsilon_run == pytest.approx(spent, abs=0.01)
        if len(result.history) == len(planned_events(settings, tiny_schema)) or len(result.history) == 3:
            assert spent == pytest.approx(planned, abs=0.05)
        assert (epsilon(alone(events), delta=1e-5) > spent) == (mode == "shared")


def test_closed_sums_are_planned_for(config: Config, tiny_schema: TableSchema) -> None:
    settings = config("shared", dp_epsilon=3.0, dp_spare_rounds=2)
    events = planned_events(settings, tiny_schema)
    assert events[0] == events[-1] == events[-2]
    assert 2.9 < planned_epsilon(settings, tiny_schema) <= 3.0
    none = config("shared", dp_epsilon=3.0, dp_spare_rounds=0)
    assert planned_events(none, tiny_schema)[0].noise_multiplier < events[0].noise_multiplier


@in_every_mode
def test_a_run_that_was_killed_goes_on_to_the_same_bytes_and_asks_nothing_twice(
    config: Config, mode: str, tmp_path: Path, staged_grid: Any
) -> None:
    class KilledError(Exception):
        pass

    def kill(record: Any) -> None:
        if record.server_round == 2:
            raise KilledError

    whole = digest(plain(config(mode)).model, tmp_path / "whole")
    place = str(tmp_path / "killed")
    with pytest.raises(KilledError):
        plain(config(mode, out_dir=place), progress=kill)
    with pytest.raises(ConfigError, match="has a run after 2 of 5 rounds: set resume=true"):
        plain(config(mode, out_dir=place))
    settings = config(mode, out_dir=place, resume=True)
    grid = staged_grid.of_folder(app, 3, settings)
    result = run_federation(grid, settings)
    assert grid.asked(1001, "train.count") == [*range(3, len(result.history) + 1)]
    assert digest(result.model, tmp_path / "again") == whole


@pytest.mark.parametrize("mode", ["local", "shared"])
def test_a_run_that_was_killed_while_sites_answered_pays_once(
    config: Config, mode: str, tmp_path: Path, staged_grid: Any
) -> None:
    class KilledError(Exception):
        pass

    def kill(reply: Message) -> bool:
        if reply.metadata.src_node_id == 1003 and silent(3, 1)(reply):
            raise KilledError
        return False

    changes = {"out_dir": str(tmp_path / "killed"), "dp_noise_seed": -1, "run_name": f"once {mode}"}
    settings = config(mode, **changes)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = kill
    with pytest.raises(KilledError):
        run_federation(grid, settings)
    assert len(charged(settings, "site-01")) == 1
    result = plain(config(mode, **changes, resume=True))
    assert len(charged(settings, "site-01")) == len(result.history)


def test_a_site_that_fails_the_first_question_is_left_out_where_noise_is_local(
    config: Config, staged_grid: Any
) -> None:
    settings = config("local", quorum_wait_seconds=0.0)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = silent(2, 1)
    result = run_federation(grid, settings)
    assert {tuple(record.sites) for record in result.history} == {("site-01", "site-03")}
    assert result.history[0].dropped == {"site-02": "did not answer in time"}
    assert sorted(result.site_counts) == ["site-01", "site-03"]


def test_a_closed_sum_is_asked_for_anew_of_the_others_with_noise_of_its_own(config: Config, staged_grid: Any) -> None:
    settings = config("shared", dp_noise_seed=-1, run_name="closed", dp_epsilon=8.0)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = silent(2, 1)
    result = run_federation(grid, settings)
    assert {tuple(record.sites) for record in result.history} == {("site-01", "site-03")}
    assert result.history[0].dropped == {"site-02": "did not answer in time"}
    assert len(charged(settings, "site-01")) == len(result.history) + 1
    assert epsilon(charged(settings, "site-01"), delta=1e-5) <= 8.0


def test_more_closed_sums_than_were_planned_end_the_run_and_resuming_does_not_pay_for_more(
    config: Config, staged_grid: Any
) -> None:
    settings = config("shared", dp_spare_rounds=0)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = silent(2, 1)
    with pytest.raises(FederationError, match=r"1 sums .* more than dp-spare-rounds=0"):
        run_federation(grid, settings)
    again = config("shared", dp_spare_rounds=0, resume=True)
    grid = staged_grid.of_folder(app, 3, again)
    with pytest.raises(FederationError, match="than was planned"):
        run_federation(grid, again)
    assert not grid.asked(1001, "train.count")


@pytest.mark.parametrize("mode", ["local", "shared"])
def test_a_site_that_fails_later_stops_the_run_which_goes_on_once_it_is_back(
    config: Config, mode: str, staged_grid: Any, tmp_path: Path
) -> None:
    whole = digest(plain(config(mode, out_dir=str(tmp_path / "whole"))).model, tmp_path / "whole-model")
    settings = config(mode)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = silent(2, 3)
    with pytest.raises(
        FederationError, match=r"round 3: 2 sites answered, 3 are needed; resume=true goes on after round 2"
    ):
        run_federation(grid, settings)
    result = plain(config(mode, resume=True))
    assert {tuple(record.sites) for record in result.history} == {ALL}
    assert digest(result.model, tmp_path / "again") == whole


def test_a_site_that_comes_back_in_time_is_asked_the_same_and_pays_once(config: Config, staged_grid: Any) -> None:
    settings = config("shared", dp_noise_seed=-1, run_name="back", quorum_retries=3)
    grid = staged_grid.of_folder(app, 3, settings)

    first: list[float] = []

    def is_late(reply: Message) -> bool:
        if not silent(2, 3)(reply):
            return False
        first.append(time.monotonic())
        return time.monotonic() - first[0] < 0.8  # longer than the server waits at once

    grid.is_held = is_late
    result = run_federation(grid, settings)
    assert {tuple(record.sites) for record in result.history} == {ALL}
    assert len(charged(settings, "site-02")) == len(result.history)


def test_a_checkpoint_of_other_questions_is_not_gone_on_from(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plain(config("none"))
    monkeypatch.setattr("server.counting._digest", lambda tables, noise: "another")
    with pytest.raises(CheckpointError, match="answers other questions"):
        plain(config("none", resume=True))


def test_sites_tell_nothing_of_their_rows_before_the_first_question(config: Config, staged_grid: Any) -> None:
    settings = config("local")
    grid = staged_grid.of_folder(app, 3, settings)
    run_federation(grid, settings)
    (asked, *_) = [m for m in grid.sent if m.metadata.message_type == "query.describe"]
    told = dict(asked.content.config_records["config"])
    assert (told["counts"], told["marginals"], told["count-epsilon"], told["histogram-noise"]) == (
        False,
        False,
        0.0,
        0.0,
    )


@pytest.mark.parametrize("mode", ["none", "shared"])
def test_what_takes_a_runs_model_takes_this_one(config: Config, mode: str, tmp_path: Path) -> None:
    settings = config(mode)
    result = plain(settings)
    save_result(result, settings, seconds=1.0)
    folder = tmp_path / "out"
    loaded = load_generator(folder / "model")
    pd.testing.assert_frame_equal(loaded.sample(20, random_state=3), result.model.sample(20, random_state=3))
    assert (
        "A model of counts of few columns at a time of the table 'tiny'" in (folder / "model" / "card.md").read_text()
    )
    page = render("a-run", read_part(folder / "run.json", Record), folder=folder, traffic={}, since=None)
    assert "marginal" in page
    lines = rebalance(folder, rows=0, seed=0, force=False)
    assert lines[-1].endswith("their plan and a report")
    made = pd.read_csv(folder / "synthetic" / "synthetic.csv")
    plan = json.loads((folder / "synthetic" / "plan.json").read_text())
    assert len(made) == plan["rows"] > 0
    total = sum(group["counted"] for group in plan["groups"])
    assert total == pytest.approx(sum(result.group_counts.values()))
    assert total == pytest.approx(252, abs=80)


def test_nothing_is_claimed_of_a_site_that_charges_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config("local")
    shutil.copytree(given.places.site_dir, tmp_path / "sites", ignore=shutil.ignore_patterns("private"))
    settings = config("local", site_dir=str(tmp_path / "sites"), dp_noise_seed=-1)
    charge = PrivacyLedger.charge
    monkeypatch.setattr(PrivacyLedger, "charge", lambda self, events, **more: None)
    save_result(plain(settings), settings, seconds=1.0)
    card = tmp_path / "out" / "model" / "card.md"
    assert "its ledger is empty" in card.read_text()
    assert "So nothing is claimed of the model as a whole." in card.read_text()
    monkeypatch.setattr(PrivacyLedger, "charge", charge)
    save_result(plain(settings), settings, seconds=1.0)
    assert "-differential privacy at patient level" in card.read_text()

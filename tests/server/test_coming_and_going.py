"""Runs in which sites are slow, leave, return and join, in which the folder is taken, and what is told meanwhile."""

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client.app import app
from mcrage.config import RunConfig
from mcrage.errors import FederationError
from server.checkpoints import one_writer
from server.exchange import Exchange
from server.rounds import FederationResult, RoundRecord, run_federation
from simulations.grid import InProcessGrid

Config = Callable[..., RunConfig]


def digest(result: FederationResult) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in result.model.parameters().values())).hexdigest()


def told(config: RunConfig) -> dict[str, Any]:
    return json.loads((Path(config.places.out_dir) / "status.json").read_text(encoding="utf-8"))


def is_training(reply: Message, node_id: int, server_round: int) -> bool:
    config = reply.content.config_records["config"] if reply.has_content() else {}
    came = (reply.metadata.src_node_id, reply.metadata.message_type, config.get("server-round"))
    return came == (node_id, "train", server_round)


def test_a_slow_site_is_left_alone_until_it_has_answered_and_then_takes_part_again(
    tiny_config: Config, staged_grid: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(num_server_rounds=5, round_timeout_seconds=0.5, evaluate_every=2)
    grid = staged_grid.of_folder(app, 3, config)
    grid.is_held = lambda reply: is_training(reply, 1002, 1) and grid.training_round < 3
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        result = run_federation(grid, config)
    assert [record.dropped for record in result.history] == [
        {"site-02": "did not answer in time"},
        {"site-02": "still busy with round 1"},
        {"site-02": "still busy with round 1"},
        {},
        {},
    ]
    assert grid.asked(1002) == [1, 4, 5]
    assert grid.asked(1002, "evaluate") == [4, 5]  # in round 2 it was busy
    assert grid.asked(1001) == [1, 2, 3, 4, 5]
    assert caplog.text.count("site site-02 answered about the training of round 1 too late") == 1


def test_a_late_update_has_no_part_in_any_round(tiny_config: Config, staged_grid: Any, tmp_path: Path) -> None:
    digests = []
    for name, spoil in (("a", 0.0), ("b", 5.0)):
        config = tiny_config(
            out_dir=str(tmp_path / name), round_timeout_seconds=0.5, num_server_rounds=2, evaluate_every=0
        )

        def client_app(message: Message, context: Any, spoil: float = spoil) -> Message:
            reply = app(message, context)
            if is_training(reply, 1002, 1):
                arrays = reply.content.array_records["arrays"]
                for key, array in arrays.items():
                    arrays[key] = type(array)(array.numpy() + np.float32(spoil))
            return reply

        grid = staged_grid.of_folder(client_app, 3, config)
        grid.is_held = lambda reply, grid=grid: is_training(reply, 1002, 1) and grid.training_round < 2
        digests.append(digest(run_federation(grid, config)))
    assert digests[0] == digests[1]


def test_a_slow_site_whose_node_is_gone_and_back_is_asked_again(tiny_config: Config, staged_grid: Any) -> None:
    config = tiny_config(num_server_rounds=4, round_timeout_seconds=0.5, evaluate_every=0)
    grid = staged_grid.of_folder(app, 3, config)
    grid.is_held = lambda reply: is_training(reply, 1002, 1)

    def restart(record: RoundRecord) -> None:
        grid.offline = {1002} if record.server_round == 2 else set()

    result = run_federation(grid, config, progress=restart)
    assert [record.dropped.get("site-02") for record in result.history] == [
        "did not answer in time",
        "still busy with round 1",
        "is not connected",
        None,
    ]


def test_a_site_that_answers_after_the_deadline_saves_a_round_below_quorum(
    tiny_config: Config, staged_grid: Any
) -> None:
    config = tiny_config(
        num_server_rounds=1, min_sites=3, round_timeout_seconds=0.5, evaluate_every=0, quorum_wait_seconds=0.01
    )
    grid = staged_grid.of_folder(app, 3, config)
    waited: list[str] = []
    grid.is_held = lambda reply: is_training(reply, 1002, 1) and not waited
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Exchange, "pause", lambda exchange, seconds: waited.append(told(config)["state"]))
        (record,) = run_federation(grid, config).history
    assert record.dropped == {}
    assert waited == ["waiting for sites"]
    assert grid.asked(1002) == [1]


def test_a_run_goes_on_without_a_site_that_left_for_ever(tiny_config: Config, staged_grid: Any) -> None:
    config = tiny_config(num_server_rounds=4, min_sites=2)
    grid = staged_grid.of_folder(app, 3, config)

    def leave(record: RoundRecord) -> None:
        if record.server_round == 2:
            grid.offline = {1003}

    result = run_federation(grid, config, progress=leave)
    gone = {"site-03": "is not connected"}
    assert [record.dropped for record in result.history] == [{}, {}, gone, gone]
    assert list(result.site_counts) == ["site-01", "site-02", "site-03"]


def test_below_min_sites_it_waits_and_then_ends_where_it_can_go_on(
    tiny_config: Config, staged_grid: Any, tmp_path: Path
) -> None:
    config = tiny_config(min_sites=3)
    grid = staged_grid.of_folder(app, 3, config)

    def leave(record: RoundRecord) -> None:
        grid.offline = {1003}

    with pytest.raises(FederationError, match=r"round 2: 2 sites answered, 3 are needed; resume=true .* after round 1"):
        run_federation(grid, config, progress=leave)
    status = told(config)
    assert (status["state"], status["server_round"]) == ("failed", 1)
    assert status["error"].startswith("round 2: 2 sites answered")
    assert status["sites"]["site-03"] == {"state": "absent", "reason": "is not connected", "round": 2}
    again = tiny_config(min_sites=3, resume=True)
    resumed = run_federation(InProcessGrid.of_folder(app, 3, again), again)
    whole = tiny_config(min_sites=3, out_dir=str(tmp_path / "whole"))
    assert digest(resumed) == digest(run_federation(InProcessGrid.of_folder(app, 3, whole), whole))


@pytest.mark.parametrize("rule", ["uniform", "counts"])
def test_a_joiner_counts_in_the_weights_the_totals_and_the_checkpoint_but_not_in_the_histograms(
    rule: str, tiny_config: Config, staged_grid: Any
) -> None:
    config = tiny_config(num_server_rounds=3, site_weights=rule)
    grid = staged_grid.of_folder(app, 3, config)
    grid.offline = {1001}
    described: list[Any] = []

    def join(record: RoundRecord) -> None:
        grid.offline = set()
        checkpoint = Path(config.places.out_dir) / "checkpoints" / f"round-{record.server_round:05d}" / "state.json"
        described.append(json.loads(checkpoint.read_text()))

    result = run_federation(grid, config, progress=join)
    assert [list(record.losses) for record in result.history] == [["site-02", "site-03"]] + [
        ["site-01", "site-02", "site-03"]
    ] * 2
    assert [sorted(state["site_counts"]) for state in described] == [["site-02", "site-03"]] + [
        ["site-01", "site-02", "site-03"]
    ] * 2
    assert len({state["description"] for state in described}) == 1
    assert result.group_counts == sum(result.site_counts.values(), type(result.group_counts)({}))
    assert result.marginals is not None
    start = json.loads(described[0]["description"])["marginals"]
    assert {name: list(cells) for name, cells in result.marginals.items()} == start


KILLED = """
import json, os, signal, sys
from client.app import app
from mcrage.config import RunConfig
from server.rounds import run_federation
from simulations.grid import InProcessGrid
config = RunConfig.parse(json.loads(sys.argv[1]))
class Grid(InProcessGrid):
    done = 0
    def get_node_ids(self):
        return [[1001, 1002], [1001, 1002, 1003], [1002, 1003]][min(self.done, 2)]
grid = Grid.of_folder(app, 3, config)
def stop(record):
    grid.done = record.server_round
    if record.server_round == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
run_federation(grid, config, progress=stop)
"""


@pytest.mark.parametrize(("strategy", "rule"), [("fedavgm", "counts"), ("fedadam", "uniform")])
def test_a_run_that_is_killed_after_a_site_joined_and_one_left_goes_on_to_the_same_bytes(
    strategy: str, rule: str, tiny_config: Config, staged_grid: Any, tmp_path: Path
) -> None:
    settings = {"strategy": strategy, "site_weights": rule, "num_server_rounds": 5, "num_threads": 1}
    config = tiny_config(**settings)
    command = [sys.executable, "-c", KILLED, json.dumps(config.to_flat()), "3"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert told(config)["state"] == "training"
    again = tiny_config(**settings, resume=True)
    grid = staged_grid.of_folder(app, 3, again)
    grid.offline = {1001}
    resumed = run_federation(grid, again)
    whole = tiny_config(**settings, out_dir=str(tmp_path / "whole"))
    grid = staged_grid.of_folder(app, 3, whole)
    grid.offline = {1003}

    def move(record: RoundRecord) -> None:
        grid.offline = {1: set(), 2: {1001}}.get(record.server_round, grid.offline)

    uninterrupted = run_federation(grid, whole, progress=move)
    assert digest(resumed) == digest(uninterrupted)
    assert resumed.site_counts == uninterrupted.site_counts
    assert [record.losses for record in resumed.history] == [record.losses for record in uninterrupted.history]
    assert [sorted(record.losses) for record in resumed.history][1:3] == [
        ["site-01", "site-02", "site-03"],
        ["site-02", "site-03"],
    ]


def test_two_runs_cannot_write_the_same_folder(tiny_config: Config) -> None:
    config = tiny_config(num_server_rounds=1)
    grid = InProcessGrid.of_folder(app, 3, config)
    with one_writer(Path(config.places.out_dir)), pytest.raises(FederationError, match="another run writes to"):
        run_federation(grid, config)
    assert not (Path(config.places.out_dir) / "status.json").exists()
    assert len(run_federation(grid, config).history) == 1


def test_what_the_run_does_can_be_read_at_any_time(tiny_config: Config, staged_grid: Any) -> None:
    config = tiny_config(num_server_rounds=2)
    grid = staged_grid.of_folder(app, 3, config)
    seen: list[dict[str, Any]] = []
    grid.on_push = lambda message: seen.append(told(config))
    result = run_federation(grid, config, progress=lambda record: seen.append(told(config)))
    assert seen[0]["state"] == "waiting for sites"
    training = [status for status in seen if status["state"] == "training"]
    assert {site["state"] for site in training[0]["sites"].values()} == {"training"}
    after_one, last = (next(status for status in seen if status["server_round"] == number) for number in (1, 2))
    assert {site["state"] for site in after_one["sites"].values()} == {"answered"}
    assert after_one["seconds_per_round"] == result.history[0].seconds
    assert after_one["eta_seconds"] == pytest.approx(result.history[0].seconds, abs=0.1)
    assert last["eta_seconds"] == 0.0
    assert (told(config)["state"], told(config)["server_round"]) == ("done", 2)
    assert "epsilon_planned" not in last


def test_why_a_run_does_not_begin_stands_there_by_node(tiny_config: Config, site_dir: Path, tmp_path: Path) -> None:
    sites = shutil.copytree(site_dir, tmp_path / "sites", ignore=shutil.ignore_patterns("private"))
    (sites / "site-02.csv").write_text("nothing\n")
    config = tiny_config(min_sites=3, site_dir=str(sites))
    with pytest.raises(FederationError, match="2 sites are there, 3 are needed"):
        run_federation(InProcessGrid.of_folder(app, 3, config), config)
    status = told(config)
    assert (status["state"], status["error"]) == ("failed", "2 sites are there, 3 are needed")
    assert list(status["sites"]) == ["node 1002"]
    assert "does not follow the schema" in status["sites"]["node 1002"]["reason"]


def test_with_privacy_the_planned_epsilon_stands_there(tiny_config: Config, site_dir: Path, tmp_path: Path) -> None:
    sites = shutil.copytree(site_dir, tmp_path / "sites", ignore=shutil.ignore_patterns("private"))
    private = {"dp": True, "dp_epsilon": 8.0, "dp_sample_rate": 0.2, "run_name": "status", "local_steps": 1}
    config = tiny_config(num_server_rounds=1, site_dir=str(sites), **private)
    result = run_federation(InProcessGrid.of_folder(app, 3, config), config)
    assert 7.0 < told(config)["epsilon_planned"] <= 8.0
    spent = max(account.epsilon for account in result.accounts.values())
    assert spent <= told(config)["epsilon_planned"] + 1e-6

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord

from client.app import app
from mcrage.config import RunConfig, StrategyName
from mcrage.errors import CheckpointError, ConfigError, FederationError
from mcrage.wire import Wire, packed, unpacked
from server.rounds import FederationResult, RoundRecord, moved_average, run_federation
from server.validation import received
from simulations.grid import App, InProcessGrid

CANARY = "Mrs Jane Doe 1951-02-03"
Config = Callable[..., RunConfig]


def run(config: RunConfig, client_app: App = app, **kwargs: Any) -> FederationResult:
    return run_federation(InProcessGrid.of_folder(client_app, 3, config), config, **kwargs)


def digest(result: FederationResult) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in result.model.parameters().values())).hexdigest()


def test_a_run_gives_a_model_counts_and_a_record_of_every_round(tiny_config: Config) -> None:
    seen: list[RoundRecord] = []
    result = run(tiny_config(), progress=seen.append)
    assert [record.server_round for record in seen] == [1, 2, 3]
    assert tuple(seen) == result.history
    assert all(list(record.losses) == ["site-01", "site-02", "site-03"] for record in seen)
    assert all(np.isfinite(list(record.losses.values())).all() and not record.dropped for record in seen)
    assert [sorted(record.held_out) for record in seen] == [[], [], ["site-01", "site-02", "site-03"]]
    assert result.group_counts == sum(result.site_counts.values(), type(result.group_counts)({}))
    assert result.marginals is not None
    assert len(result.model.sample(7)) == 7


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny_config: Config) -> None:
    one, again, other = (
        digest(run(tiny_config(out_dir=str(Path(tiny_config().places.out_dir) / name), seed=seed)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == again != other


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedprox", "fedadam", "fedyogi"])
def test_every_strategy_trains(strategy: StrategyName, tiny_config: Config) -> None:
    config = tiny_config(strategy=strategy, num_server_rounds=12, local_steps=6, learning_rate=0.02, evaluate_every=1)
    history = run(config).history
    first, last = (np.mean(list(record.held_out.values())) for record in (history[0], history[-1]))
    assert last < first


def test_a_line_per_round_and_site_is_written(tiny_config: Config) -> None:
    config = tiny_config(evaluate_every=2)
    result = run(config)
    lines = (Path(config.places.out_dir) / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 9
    assert json.loads(lines[3]) == {
        "round": 2,
        "site": "site-01",
        "loss": result.history[1].losses["site-01"],
        "held_out_loss": result.history[1].held_out["site-01"],
        "dropped": None,
    }


# What a site may do wrong, or wickedly, to the reply that it owes.
def _nan(reply: Message) -> None:
    _change(reply, lambda array: array * np.float32("nan"))


def _wrong_shape(reply: Message) -> None:
    _change(reply, lambda array: np.zeros((*array.shape, 2), np.float32))


def _broadcasts(reply: Message) -> None:
    _change(reply, lambda array: np.zeros((1,) * max(array.ndim, 1), np.float32))


def _double(reply: Message) -> None:
    _change(reply, lambda array: array.astype(np.float64))


def _huge(reply: Message) -> None:
    _change(reply, lambda array: array + np.float32(1e12))


def _extra_array(reply: Message) -> None:
    _repack(reply, {**_arrays(reply), "backdoor": np.zeros(1, np.float32)})


def _unlisted_numbers(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["float32"] = Array(np.append(arrays["float32"].numpy(), np.float32(1)))


def _no_arrays(reply: Message) -> None:
    reply.content["arrays"] = ArrayRecord()


def _weight(reply: Message) -> None:
    reply.content.config_records["config"]["weight"] = 1e9


def _metrics(reply: Message) -> None:
    reply.content["metrics"] = MetricRecord({"num-examples": 10**9})


def _old_round(reply: Message) -> None:
    reply.content.config_records["config"]["server-round"] = 1


def _raises(reply: Message) -> None:
    raise ValueError(CANARY)


def _change(reply: Message, how: Callable[[Any], Any]) -> None:
    _repack(reply, {name: how(array) for name, array in _arrays(reply).items()})


def _arrays(reply: Message) -> dict[str, Any]:
    return unpacked(received(reply.content)).arrays


def _repack(reply: Message, arrays: dict[str, Any]) -> None:
    wire = packed(Wire(unpacked(received(reply.content)).values, arrays))
    reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in wire.arrays.items()})
    reply.content["config"] = ConfigRecord(dict(wire.values))


def faulty(fault: Callable[[Message], None], *, sites: Iterable[int] = (1,), rounds: Iterable[int] = (2,)) -> App:
    """The real client, whose replies to the training of some rounds are spoilt at some sites."""

    def client_app(message: Message, context: Context) -> Message:
        reply = app(message, context)
        config = message.content.config_records["config"]
        is_hit = message.metadata.message_type == "train" and config["server-round"] in rounds
        if is_hit and context.node_config["partition-id"] in sites:
            fault(reply)
        return reply

    return client_app


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_raises, "runtime failed with code 2"),
        (_nan, "finite"),
        (_wrong_shape, "expected float32"),
        (_broadcasts, "expected float32"),
        (_double, "expected float32"),
        (_huge, "beyond"),
        (_extra_array, "unknown"),
        (_no_arrays, "does not fit"),
        (_unlisted_numbers, "does not use them up"),
        (_weight, "weight"),
        (_metrics, "expected the records"),
        (_old_round, "expected a reply of round 2"),
    ],
)
def test_a_round_goes_on_without_the_site_that_failed(
    fault: Callable[[Message], None], reason: str, tiny_config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config()
    with caplog.at_level(logging.WARNING):
        result = run(config, faulty(fault))
    dropped = [record.dropped for record in result.history]
    assert [list(sites) for sites in dropped] == [[], ["site-02"], []]
    assert reason in dropped[1]["site-02"]
    assert list(result.history[1].losses) == ["site-01", "site-03"]
    assert "round 2 goes on without site site-02" in caplog.text
    kept = b"".join(path.read_bytes() for path in Path(config.places.out_dir).rglob("*") if path.is_file())
    assert CANARY.encode() not in kept
    assert CANARY not in caplog.text


def test_the_failed_site_has_no_part_in_the_average(tiny_config: Config) -> None:
    out = Path(tiny_config().places.out_dir)
    without = [
        digest(run(tiny_config(out_dir=str(out / name)), faulty(f))) for name, f in (("a", _nan), ("b", _weight))
    ]
    assert without[0] == without[1] != digest(run(tiny_config(out_dir=str(out / "c"))))


@pytest.mark.parametrize(("copies", "reason"), [(0, "did not answer in time"), (2, "answered twice")])
def test_lost_and_repeated_replies_cost_the_site_the_round(
    copies: int, reason: str, tiny_config: Config, staged_grid: Any
) -> None:
    config = tiny_config(num_server_rounds=2, evaluate_every=0, round_timeout_seconds=0.5)
    grid = staged_grid.of_folder(app, 3, config)

    def tamper(replies: Sequence[Message]) -> Sequence[Message]:
        is_hit = [grid.training_round == 2 and reply.metadata.src_node_id == 1002 for reply in replies]
        return [each for reply, hit in zip(replies, is_hit, strict=True) for each in [reply] * (copies if hit else 1)]

    grid.tamper = tamper
    assert run_federation(grid, config).history[1].dropped == {"site-02": reason}


def test_a_site_that_is_not_connected_is_not_waited_for(tiny_config: Config) -> None:
    class LeavingGrid(InProcessGrid):
        calls = 0

        def get_node_ids(self) -> list[int]:
            self.calls += 1
            return list(super().get_node_ids())[: 3 if self.calls < 2 else 2]

    config = tiny_config(num_server_rounds=1)
    (record,) = run_federation(LeavingGrid.of_folder(app, 3, config), config).history
    assert record.dropped == {"site-03": "is not connected"}


def test_below_quorum_the_missing_are_asked_again_and_then_the_run_stops_resumably(tiny_config: Config) -> None:
    config = tiny_config(min_sites=3)
    failing = faulty(_nan, rounds=(3,))
    trained: list[Any] = []

    def count(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            trained.append(context.node_config["partition-id"])
        return failing(message, context)

    with pytest.raises(FederationError, match=r"round 3: 2 sites answered, 3 are needed; resume=true .* after round 2"):
        run(config, count)
    assert trained == [0, 1, 2] * 3 + [1]
    resumed = run(tiny_config(min_sites=3, resume=True))
    whole = run(tiny_config(min_sites=3, out_dir=config.places.out_dir + "-whole"))
    assert digest(resumed) == digest(whole)


def test_a_site_that_answers_when_asked_again_saves_the_round(tiny_config: Config) -> None:
    asked = []

    def once(reply: Message) -> None:
        asked.append(1)
        if len(asked) == 1:
            raise OSError("no route")

    result = run(tiny_config(min_sites=3), faulty(once))
    assert result.history[1].dropped == {}
    assert len(asked) == 2


def test_a_run_without_any_site_stops(tiny_config: Config) -> None:
    with pytest.raises(FederationError, match="round 1: 0 sites answered, 1 are needed"):
        run(tiny_config(min_sites=1), faulty(_nan, sites=(0, 1, 2), rounds=(1, 2, 3)))


def test_a_site_that_fails_to_evaluate_is_left_out_of_the_losses(tiny_config: Config) -> None:
    def client_app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 0:
            raise ValueError(CANARY)
        return app(message, context)

    result = run(tiny_config(), client_app)
    assert list(result.history[-1].held_out) == ["site-02", "site-03"]
    assert list(result.history[-1].losses) == ["site-01", "site-02", "site-03"]


def test_the_held_out_loss_can_be_left_out(tiny_config: Config) -> None:
    assert all(not record.held_out for record in run(tiny_config(evaluate_every=0)).history)


STOPPED = """
import os, signal, sys
from client.app import app
from mcrage.config import RunConfig
from server.rounds import run_federation
from simulations.grid import InProcessGrid
import json
config = RunConfig.parse(json.loads(sys.argv[1]))
def stop(record):
    if record.server_round == 2:
        os.kill(os.getpid(), signal.SIGKILL)
run_federation(InProcessGrid.of_folder(app, 3, config), config, progress=stop)
"""


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
def test_a_killed_run_goes_on_to_the_same_bytes(strategy: StrategyName, tiny_config: Config, tmp_path: Path) -> None:
    settings = {"strategy": strategy, "num_server_rounds": 4, "num_threads": 1}
    config = tiny_config(**settings)
    command = [sys.executable, "-c", STOPPED, json.dumps(config.to_flat())]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    killed = subprocess.run(command, env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = run(tiny_config(**settings, resume=True))
    whole = run(tiny_config(**settings, out_dir=str(tmp_path / "whole")))
    assert digest(resumed) == digest(whole)
    assert [record.losses for record in resumed.history] == [record.losses for record in whole.history]
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("out", "whole")]
    assert lines[0] == lines[1]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tiny_config: Config, tmp_path: Path) -> None:
    whole = run(tiny_config())
    (tmp_path / "out" / "checkpoints" / "round-00003" / "state.json").write_text("{}")
    assert digest(run(tiny_config(resume=True))) == digest(whole)


def test_resuming_where_nothing_was_begun_begins(tiny_config: Config) -> None:
    assert len(run(tiny_config(resume=True)).history) == 3


def test_resuming_a_finished_run_gives_its_result(tiny_config: Config) -> None:
    assert digest(run(tiny_config())) == digest(run(tiny_config(resume=True)))


def test_a_run_with_other_settings_is_not_resumed(tiny_config: Config) -> None:
    run(tiny_config())
    with pytest.raises(CheckpointError, match="other settings"):
        run(tiny_config(resume=True, learning_rate=0.1))


def test_an_unfinished_run_is_not_overwritten_by_accident(tiny_config: Config) -> None:
    def stop(record: RoundRecord) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_config(), progress=stop)
    with pytest.raises(ConfigError, match="after 1 of 3 rounds: set resume=true, or another out-dir"):
        run(tiny_config())
    assert len(run(tiny_config(resume=True)).history) == 3
    assert len(run(tiny_config()).history) == 3


def test_the_average_warms_up_and_stays_float32() -> None:
    start, step = {"w": np.zeros(2, np.float32)}, {"w": np.ones(2, np.float32)}
    first = moved_average(start, step, decay=0.9, server_round=1)["w"]
    late = moved_average(start, step, decay=0.9, server_round=10**6)["w"]
    assert first.dtype == late.dtype == np.float32
    np.testing.assert_allclose(first, 1 - 2 / 11, rtol=1e-6)
    np.testing.assert_allclose(late, 0.1, rtol=1e-5)
    np.testing.assert_array_equal(moved_average(start, step, decay=0.0, server_round=5)["w"], step["w"])


def test_a_federation_that_would_not_fit_is_refused_before_the_first_round(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcrage.memory.free_bytes", lambda: 1000)
    seen: list[RoundRecord] = []
    with pytest.raises(ConfigError, match=r"^training needs about 0\.1 GB and 0\.0 GB are free"):
        run(tiny_config(), progress=seen.append)
    assert seen == []

"""Runs with shared noise: the sum opens whole or not at all, whoever falls silent, and goes on to the same bytes."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message

from client.app import app
from client.places import LEDGER, WITNESS
from mcrage.config import RunConfig
from mcrage.errors import FederationError
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.privacy.masking import MaskKey
from mcrage.wire import Wire, packed, unpacked
from server.checkpoints import CheckpointFolder
from server.rounds import CHECKPOINTS, FederationResult, run_federation
from server.shared_steps import ROUNDS_LEFT_OUT, SharedSteps
from server.validation import received
from simulations.grid import InProcessGrid

Config = Callable[..., RunConfig]
SHARED: dict[str, Any] = {
    "dp": True,
    "dp_noise": "shared",
    "dp_noise_multiplier": 0.7,
    "dp_sample_rate": 0.3,
    "dp_noise_seed": 3,
    "local_steps": 1,
    "num_server_rounds": 8,
    "evaluate_every": 0,
    "round_timeout_seconds": 0.5,
    "quorum_wait_seconds": 0.0,
}


@pytest.fixture
def config(tiny_config: Config) -> Config:
    return lambda **changes: tiny_config(**(SHARED | changes))


def digest(result: FederationResult) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in result.model.parameters().values())).hexdigest()


def plain(config: RunConfig) -> FederationResult:
    return run_federation(InProcessGrid.of_folder(app, 3, config), config)


def charged(config: RunConfig, site: str) -> int:
    folder = Path(config.places.site_dir) / "private" / site
    with PrivacyLedger.open(folder / LEDGER, witness=folder / WITNESS) as ledger:
        return sum(row.task == "sum" for row in ledger.rows)


def silent(site: int, *rounds: int) -> Callable[[Message], bool]:
    """Keeps back what a site answers about these rounds."""

    def is_held(reply: Message) -> bool:
        told = reply.content.config_records["config"] if reply.has_content() else {}
        return reply.metadata.src_node_id == 1000 + site and told.get("server-round") in rounds

    return is_held


def test_every_site_takes_part_in_every_step_and_the_same_seed_gives_the_same_bytes(
    config: Config, tmp_path: Path, site_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mcrage.server"):
        first = plain(config())
    assert caplog.text.count("expected: ") == 1, "before the first step it is said what such runs came to"
    shutil.rmtree(site_dir / "private")  # other secrets, and so other masks
    assert [record.sites for record in first.history] == [("site-01", "site-02", "site-03")] * 8
    assert all(not record.dropped and not record.losses for record in first.history)
    assert digest(plain(config(out_dir=str(tmp_path / "again")))) == digest(first)


def test_masks_leave_no_trace_in_the_model(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = digest(plain(config()))
    monkeypatch.setattr(MaskKey, "mask", lambda self, size, **_: np.zeros(size, np.uint32))
    assert digest(plain(config(out_dir=str(tmp_path / "bare")))) == masked


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(config: Config, tmp_path: Path) -> None:
    whole = digest(plain(config()))

    class StoppedError(Exception):
        pass

    def stop(record: Any) -> None:
        if record.server_round == 4:
            raise StoppedError

    place = str(tmp_path / "stopped")
    stopped = config(out_dir=place)
    with pytest.raises(StoppedError):
        run_federation(InProcessGrid.of_folder(app, 3, stopped), stopped, progress=stop)
    assert digest(plain(config(out_dir=place, resume=True))) == whole


def test_a_sum_with_a_silent_site_stays_closed_and_is_asked_for_anew_of_the_others(
    config: Config, staged_grid: Any, caplog: pytest.LogCaptureFixture
) -> None:
    grid = staged_grid.of_folder(app, 3, config(dp_noise_seed=-1, run_name="silent"))
    grid.is_held = silent(2, 3)
    opened: list[tuple[str, ...]] = []
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        settings = config(dp_noise_seed=-1, run_name="silent")
        result = run_federation(grid, settings, progress=lambda record: opened.append(tuple(record.sites)))
    both, all_three = ("site-01", "site-03"), ("site-01", "site-02", "site-03")
    # Busy, as it still owes an answer; it would be left out for five rounds in any case.
    assert opened == [all_three] * 2 + [both] * 6
    assert result.history[2].dropped == {"site-02": "did not answer in time"}
    assert "round 3: the sum stays closed, site site-02 is missing: did not answer in time" in caplog.text
    # Every request is charged where it was answered: the closed one as well, since a late answer may open it.
    assert [charged(settings, f"site-0{number}") for number in (1, 2, 3)] == [9, 3, 9]
    assert set(result.accounts) == {"site-01", "site-02", "site-03"}


def test_a_late_answer_to_a_closed_sum_is_dropped(
    config: Config, staged_grid: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever kept it could open the closed sum, which was charged; the round's own sum needs it no more."""
    models = {}
    for name, until in (("never", 99), ("late", 4)):
        settings = config(out_dir=str(tmp_path / name), num_server_rounds=5)
        grid = staged_grid.of_folder(app, 3, settings)
        asked = grid.sent
        held = silent(2, 3)
        grid.is_held = lambda reply, until=until, held=held, asked=asked: held(reply) and last_round(asked) < until
        with caplog.at_level(logging.WARNING, logger="mcrage.server"):
            models[name] = digest(run_federation(grid, settings))
    assert "site site-02 answered about the training of round 3 too late" in caplog.text
    assert models["late"] == models["never"]


def last_round(asked: Sequence[Message]) -> int:
    sums = [message for message in asked if message.metadata.message_type == "train.sum"]
    return max((int(message.content["config"]["server-round"]) for message in sums), default=0)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_site_that_failed_is_left_out_for_some_rounds_and_then_takes_part_again(
    number: int, config: Config, staged_grid: Any
) -> None:
    settings = config(num_server_rounds=9)
    grid = staged_grid.of_folder(app, 3, settings)
    seen = []

    def once(replies: Sequence[Message]) -> Sequence[Message]:
        for reply in replies:
            told = reply.content["config"] if reply.has_content() else {}
            if reply.metadata.src_node_id == 1000 + number and told.get("server-round") == 2 and not seen:
                seen.append(reply)
                reply.content["arrays"] = ArrayRecord({"words": Array(np.zeros(3, np.uint32))})
        return replies

    grid.tamper = once
    history = run_federation(grid, settings).history
    name = f"site-0{number}"
    took_part = [name in record.sites for record in history]
    assert took_part == [True, *[False] * (1 + ROUNDS_LEFT_OUT), True, True]
    assert "layout" in history[1].dropped[name]
    assert "left out until round 7" in history[2].dropped[name]


def test_more_closed_sums_than_were_planned_end_the_run_after_the_last_round(config: Config, staged_grid: Any) -> None:
    settings = config(dp_spare_rounds=0)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = silent(2, 3)
    with pytest.raises(FederationError, match=r"round 3: 1 sums of this run stayed closed, .*dp-spare-rounds=0"):
        run_federation(grid, settings)
    latest = CheckpointFolder(Path(settings.places.out_dir) / CHECKPOINTS).latest()
    assert latest is not None
    assert latest.server_round == 2
    again = config(dp_spare_rounds=0, resume=True)
    anew = staged_grid.of_folder(app, 3, again)
    with pytest.raises(FederationError, match="round 3: 1 sums of this run stayed closed"):
        run_federation(anew, again)
    assert not anew.asked(1001, "train.sum"), "a start anew pays for no more than was planned"


def test_a_run_that_is_killed_after_a_closed_sum_counts_it_and_goes_on_to_the_same_bytes(
    config: Config, staged_grid: Any, tmp_path: Path
) -> None:
    class KilledError(Exception):
        pass

    def run(name: str, *, dies: bool) -> str:
        settings = config(out_dir=str(tmp_path / name), num_server_rounds=4)
        grid = staged_grid.of_folder(app, 3, settings)
        grid.is_held = silent(2, 3)
        asked = grid.sent

        def kill(message: Message) -> None:
            if last_round(asked) == 3 and message.metadata.message_type == "train.sum" and attempt_of(message) == 1:
                raise KilledError

        if dies:
            grid.on_push = kill
            with pytest.raises(KilledError):
                run_federation(grid, settings)
            settings = config(out_dir=str(tmp_path / name), num_server_rounds=4, resume=True)
            grid = staged_grid.of_folder(app, 3, settings)
            grid.offline = {1002}
        result = run_federation(grid, settings)
        assert {attempt_of(each) for each in grid.sent if each.metadata.message_type == "train.sum"} >= {1}
        return digest(result)

    assert run("killed", dies=True) == run("whole", dies=False)


def attempt_of(message: Message) -> int:
    return int(message.content["config"]["attempt"])


def test_below_the_fewest_sites_no_sum_is_asked_for(config: Config, staged_grid: Any) -> None:
    settings = config(min_sites=3, quorum_retries=1)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.is_held = silent(2, 3)
    with pytest.raises(FederationError, match="round 3: 2 sites are there, 3 are needed"):
        run_federation(grid, settings)
    assert len(grid.asked(1001, "train.sum")) == 3, "the two that are left were not asked again"


def swapped(replies: Sequence[Message], change: Callable[[Wire], Wire]) -> Sequence[Message]:
    for reply in replies:
        if reply.metadata.message_type == "query.describe" and reply.metadata.src_node_id == 1002:
            wire = packed(change(unpacked(received(reply.content))))
            reply.content["config"] = ConfigRecord(dict(wire.values))
    return replies


def test_a_site_whose_key_is_not_signed_shares_nothing(config: Config, staged_grid: Any) -> None:
    settings = config(num_server_rounds=2)
    grid = staged_grid.of_folder(app, 3, settings)
    grid.tamper = lambda replies: swapped(replies, lambda w: Wire(w.values | {"mask-key": "{}"}, w.arrays))
    history = run_federation(grid, settings).history
    assert all(record.sites == ("site-01", "site-03") for record in history)
    assert "a key for masks: expected a key" in history[0].dropped["site-02"]


def test_a_lie_to_one_site_about_the_others_leaves_nothing_but_noise_of_the_whole_lattice(
    config: Config, staged_grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site is told of other parameters: no masks cancel, and the step is visibly none."""
    settings = config(num_server_rounds=1)
    grid = staged_grid.of_folder(app, 3, settings)
    sums: list[np.ndarray] = []

    def lie(message: Message) -> None:
        if message.metadata.message_type == "train.sum" and message.metadata.dst_node_id == 1002:
            message.content = message.content.copy()
            message.content["config"] = ConfigRecord({**message.content["config"], "attempt": 1})

    noise = SharedSteps._noise
    value = lambda self, sites: _seen(noise(self, sites), sums)  # noqa: E731
    monkeypatch.setattr(SharedSteps, "_noise", value)
    honest_grid = staged_grid.of_folder(app, 3, settings)
    run_federation(honest_grid, settings)
    grid.on_push = lie
    lied = config(num_server_rounds=1, out_dir=settings.places.out_dir + "-lied")
    run_federation(grid, lied)
    honest, lie_sum = sums
    assert lie_sum.std() > 500 * honest.std()


class _Seen:
    def __init__(self, noise: Any, sums: list[np.ndarray]) -> None:
        self._noise, self._sums = noise, sums

    def value(self, steps: np.ndarray) -> Any:
        opened = self._noise.value(steps)
        self._sums.append(opened.numpy())
        return opened / opened.abs().max()


def _seen(noise: Any, sums: list[np.ndarray]) -> Any:
    return _Seen(noise, sums)

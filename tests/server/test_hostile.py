"""What a site, or somebody between, may do to replies on their way: it costs that site the round and nothing else."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Message
from flwr.common.constant import SUPERLINK_NODE_ID

from client.app import app
from client.places import SECRET
from client.pretend import pretend_private_folder
from mcrage.config import RunConfig
from mcrage.privacy.keyed import read_secret
from mcrage.signing import public_key
from server.exchange import Answer
from server.rounds import FederationResult, run_federation

Config = Callable[..., RunConfig]
LAST = 3


@pytest.fixture
def config(tiny_config: Config) -> Config:
    def make(**changes: Any) -> RunConfig:
        usual = {"num_server_rounds": LAST, "evaluate_every": 0, "round_timeout_seconds": 0.5}
        return tiny_config(**usual | changes)

    return make


def dropped(result: FederationResult) -> list[dict[str, str]]:
    return [dict(record.dropped) for record in result.history]


def in_last_round(grid: Any, change: Callable[[Sequence[Message]], Sequence[Message]]) -> None:
    grid.tamper = lambda replies: change(replies) if grid.training_round == LAST else replies


def test_a_reply_of_round_2_replayed_in_round_3_is_not_taken(config: Config, staged_grid: Any) -> None:
    grid, kept = staged_grid.of_folder(app, 3, config()), []

    def tamper(replies: Sequence[Message]) -> Sequence[Message]:
        if grid.training_round == 2:
            kept.extend(replies)
        return [*kept, *replies[1:]] if grid.training_round == 3 else replies

    grid.tamper = tamper
    result = run_federation(grid, config())
    assert dropped(result) == [{}, {}, {"site-01": "did not answer in time"}]


def test_a_reply_of_round_2_that_claims_to_answer_round_3_is_not_taken(config: Config, staged_grid: Any) -> None:
    grid, kept = staged_grid.of_folder(app, 3, config()), []

    def tamper(replies: Sequence[Message]) -> Sequence[Message]:
        if grid.training_round == 2:
            kept.extend(replies)
        if grid.training_round == 3:
            kept[0].metadata.__dict__["_reply_to_message_id"] = replies[0].metadata.reply_to_message_id
            return [kept[0], *replies[1:]]
        return replies

    grid.tamper = tamper
    result = run_federation(grid, config())
    assert dropped(result) == [{}, {}, {"site-01": "expected a reply of round 3, got one of round 2"}]


@pytest.mark.parametrize("key", ["_reply_to_message_id", "_src_node_id"])
def test_two_sites_replies_that_are_swapped_are_of_neither(key: str, config: Config, staged_grid: Any) -> None:
    grid = staged_grid.of_folder(app, 3, config(min_sites=1))

    def swap(replies: Sequence[Message]) -> Sequence[Message]:
        one, other, *_ = (reply.metadata.__dict__ for reply in replies)
        one[key], other[key] = other[key], one[key]
        return replies

    in_last_round(grid, swap)
    result = run_federation(grid, config(min_sites=1))
    assert dropped(result)[-1] == dict.fromkeys(["site-01", "site-02"], "its reply came from another node")


def test_the_swap_would_go_unnoticed_if_nobody_looked_at_who_sent_a_reply(
    config: Config, staged_grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = staged_grid.of_folder(app, 3, config())

    def swap(replies: Sequence[Message]) -> Sequence[Message]:
        one, other, *_ = (reply.metadata.__dict__ for reply in replies)
        one["_reply_to_message_id"], other["_reply_to_message_id"] = (
            other["_reply_to_message_id"],
            one["_reply_to_message_id"],
        )
        return replies

    in_last_round(grid, swap)
    monkeypatch.setattr(Answer, "is_from_there", True)
    assert dropped(run_federation(grid, config())) == [{}, {}, {}]


@pytest.mark.parametrize("are_keys_known", [True, False])
def test_what_two_sites_sent_cannot_change_places_where_their_keys_are_known(
    are_keys_known: bool, config: Config, staged_grid: Any, site_dir: Path, tmp_path: Path
) -> None:
    """Whoever reached into the SuperLink could put one site's parameters under the other's name and instruction."""
    sites = {}
    for number in (1, 2, 3):
        private = pretend_private_folder(site_dir, f"site-0{number}", site_dir / f"site-0{number}.csv")
        key = public_key(read_secret(private / SECRET)).hex() if are_keys_known else ""
        sites[f"site-0{number}"] = {"node_ids": [1000 + number], "signing_key": key}
    (tmp_path / "sites.json").write_text(json.dumps(sites))
    listed = config(sites_file=str(tmp_path / "sites.json"), min_sites=1)
    grid = staged_grid.of_folder(app, 3, listed)

    def swap(replies: Sequence[Message]) -> Sequence[Message]:
        (one, other, *_), values = replies, ("config", "arrays")
        for name in values:
            one.content[name], other.content[name] = other.content[name], one.content[name]
        return replies

    in_last_round(grid, swap)
    reason = "its reply is not signed by this site as an answer to what it was asked"
    expected = dict.fromkeys(["site-01", "site-02"], reason) if are_keys_known else {}
    assert dropped(run_federation(grid, listed)) == [{}, {}, expected]


def test_an_update_in_the_superlinks_name_is_not_taken(config: Config, staged_grid: Any) -> None:
    grid = staged_grid.of_folder(app, 3, config())

    def forge(replies: Sequence[Message]) -> Sequence[Message]:
        replies[0].metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return replies

    in_last_round(grid, forge)
    assert dropped(run_federation(grid, config()))[-1] == {"site-01": "its reply came from another node"}


def test_a_reply_in_the_name_of_a_site_that_was_not_asked_is_ignored(config: Config, staged_grid: Any) -> None:
    grid = staged_grid.of_folder(app, 3, config())

    def add(replies: Sequence[Message]) -> Sequence[Message]:
        return [*replies, Message(replies[0].content, reply_to=grid.sent[0])]

    in_last_round(grid, add)
    assert dropped(run_federation(grid, config())) == [{}, {}, {}]


@pytest.mark.parametrize("factor", [np.float32(30.0), np.float32(-30.0)])
def test_an_update_beyond_the_bound_costs_its_site_the_round_and_the_model_stays_near(
    factor: np.float32, config: Config, staged_grid: Any, tmp_path: Path
) -> None:
    def pushed_far(replies: Sequence[Message]) -> Sequence[Message]:
        arrays = replies[0].content.array_records["arrays"]
        for name, array in arrays.items():
            arrays[name] = Array(array.numpy() + factor)
        return replies

    honest = {}
    for bound in (0.0, 100.0):
        given = {"max_update_norm": bound, "out_dir": str(tmp_path / str(bound))}
        grid = staged_grid.of_folder(app, 3, config(**given))
        in_last_round(grid, pushed_far)
        result = run_federation(grid, config(**given))
        honest[bound] = max(np.abs(array).max() for array in result.model.parameters().values())
        reason = dropped(result)[-1].get("site-01", "")
        assert ("beyond max-update-norm=100" in reason) == bool(bound)
    assert honest[100.0] < 5 < honest[0.0]


def test_honest_updates_are_far_below_a_bound_that_stops_a_hostile_one(config: Config, staged_grid: Any) -> None:
    grid = staged_grid.of_folder(app, 3, config(max_update_norm=20.0))
    assert dropped(run_federation(grid, config(max_update_norm=20.0))) == [{}, {}, {}]

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from hypothesis import given
from hypothesis import strategies as st

from client.app import app
from client.pretend import pretend_private_folder
from mcrage.config import RunConfig, Scalar
from mcrage.data.groups import Group, GroupCounts
from mcrage.data.schema import TableSchema
from mcrage.errors import FederationError, SchemaError
from server.exchange import Exchange, Subject
from server.roster import ROUNDS_UNTIL_ASKED_AGAIN, Roster, call_roll, site_weights, total_counts, version_objection
from simulations.grid import InProcessGrid

CANARY = "Mrs Jane Doe 1951-02-03"


def hospitals(
    site_dir: Path, names: Iterable[str], *, schemas: dict[str, Path] | None = None
) -> list[dict[str, Scalar]]:
    schemas, private = schemas or {}, Path(tempfile.mkdtemp(dir=site_dir))
    return [
        {
            "site": name,
            "data-path": str(site_dir / f"site-{number:02d}.csv"),
            "schema-path": str(schemas.get(name, site_dir / "schema.json")),
            "private-dir": str(
                pretend_private_folder(private, f"{name}-{number}", site_dir / f"site-{number:02d}.csv")
            ),
        }
        for number, name in enumerate(names, start=1)
    ]


def test_sites_are_listed_by_name_with_what_they_told(site_dir: Path, tiny_schema: TableSchema) -> None:
    roster = call_roll(InProcessGrid(app, hospitals(site_dir, ["c", "a", "b"]), RunConfig()), RunConfig())
    assert list(roster.nodes) == list(roster.descriptions) == ["a", "b", "c"]
    assert roster.nodes["c"] < roster.nodes["a"] < roster.nodes["b"]
    assert roster.schema == tiny_schema
    assert roster.absent == {}
    assert roster.marginals is not None
    each = [description.marginals for description in roster.descriptions.values()]
    assert roster.marginals["age"].sum() == pytest.approx(sum(m["age"].sum() for m in each if m is not None))


def test_weights_are_equal_or_follow_the_released_counts(site_dir: Path) -> None:
    roster = call_roll(InProcessGrid(app, hospitals(site_dir, ["a", "b"]), RunConfig()), RunConfig())
    counts = {site: description.group_counts for site, description in roster.descriptions.items()}
    assert site_weights(counts, "uniform") == {"a": 1.0, "b": 1.0}
    shown = {site: sum(groups.values()) for site, groups in counts.items()}
    assert shown["a"] > 11 > shown["b"]
    assert site_weights(counts, "counts") == {"a": float(shown["a"]), "b": 11.0}


def test_without_histograms_there_is_no_sum(site_dir: Path) -> None:
    config = RunConfig.parse({"marginals": False})
    assert call_roll(InProcessGrid(app, hospitals(site_dir, ["a", "b"]), config), config).marginals is None


def test_another_schema_stops_the_run_and_is_shown(site_dir: Path, tmp_path: Path, tiny_schema: TableSchema) -> None:
    content = tiny_schema.model_dump(mode="json")
    content["columns"][2]["maximum"] = 120
    TableSchema.parse(content).save(tmp_path / "other.json")
    nodes = hospitals(site_dir, ["a", "b", "c"], schemas={"a": tmp_path / "other.json"})
    with pytest.raises(SchemaError) as caught:
        call_roll(InProcessGrid(app, nodes, RunConfig()), RunConfig())
    first, *lines = str(caught.value).splitlines()
    assert "nothing was trained" in first
    # The two that agree are the reference, although the other one comes first by name.
    assert lines == ["site 'b' (here) and site 'a' (there): column 'age': maximum is 100.0 here, 120.0 there"]


def test_two_sites_of_one_name_stop_the_run(site_dir: Path) -> None:
    with pytest.raises(FederationError, match="several nodes call themselves a"):
        call_roll(InProcessGrid(app, hospitals(site_dir, ["a", "a", "b"]), RunConfig()), RunConfig())


def test_a_site_that_cannot_describe_itself_is_left_out_with_a_reason(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    folder = shutil.copytree(site_dir, tmp_path / "sites")
    (folder / "site-02.csv").write_text(f"patient,sex,age,lab,ill\n{CANARY},X,1,2,3\n")
    roster = call_roll(InProcessGrid(app, hospitals(folder, ["a", "b", "c"]), RunConfig()), tiny_config())
    assert list(roster.nodes) == ["a", "c"]
    (reason,) = roster.absent.values()
    assert "does not follow the schema" in reason
    assert CANARY not in reason


def test_too_few_sites_are_waited_for_and_then_named(site_dir: Path, tiny_config: Callable[..., RunConfig]) -> None:
    calls = []

    def count(message: Message, context: Context) -> Message:
        calls.append(str(context.node_config["site"]))
        return app(message, context)

    nodes = hospitals(site_dir, ["a", "b"])
    nodes[1]["data-path"] = "nowhere.csv"
    with pytest.raises(FederationError, match=r"1 sites are there, 2 are needed\nnode \d+: the site is not set up"):
        call_roll(InProcessGrid(count, nodes, RunConfig()), tiny_config(quorum_retries=2))
    assert calls == ["a", "b", "b", "b"]


def test_a_site_that_comes_late_is_welcome(site_dir: Path, tiny_config: Callable[..., RunConfig]) -> None:
    class LateGrid(InProcessGrid):
        asked = 0

        def get_node_ids(self) -> list[int]:
            self.asked += 1
            return list(super().get_node_ids())[: self.asked]

    roster = call_roll(LateGrid(app, hospitals(site_dir, ["a", "b", "c"]), RunConfig()), tiny_config())
    assert list(roster.nodes) == ["a", "b"]


def staged(
    staged_grid: Any, nodes: Iterable[dict[str, Scalar]], config: RunConfig, **kwargs: Any
) -> tuple[Any, Roster]:
    """A federation whose first two nodes were there at the roll call."""
    grid = staged_grid(app, list(nodes), config)
    everybody = list(grid.get_node_ids())
    grid.offline = set(everybody[2:])
    exchange = Exchange(grid, timeout=config.execution.round_timeout_seconds)
    return grid, call_roll(grid, config, exchange=exchange, **kwargs)


def test_who_comes_later_joins_at_the_next_round_and_is_asked_once(
    site_dir: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    grid, roster = staged(staged_grid, hospitals(site_dir, ["b", "c", "a"]), tiny_config())
    assert list(roster.nodes) == ["b", "c"]
    grid.offline = set()
    for server_round in (1, 2, 3):
        roster.update(server_round)
    assert roster.nodes == {"a": 1003, "b": 1001, "c": 1002}
    assert list(roster.descriptions) == ["a", "b", "c"]
    assert [message.metadata.dst_node_id for message in grid.sent] == [1001, 1002, 1003]


def test_nobody_waits_for_a_slow_newcomer_who_joins_once_it_has_answered(
    site_dir: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    grid, roster = staged(staged_grid, hospitals(site_dir, ["a", "b", "c"]), tiny_config())
    grid.offline, grid.is_held = set(), lambda reply: reply.metadata.src_node_id == 1003
    roster.update(1)
    roster.update(2)
    assert list(roster.nodes) == ["a", "b"]
    grid.is_held = lambda reply: False
    roster.update(3)
    assert list(roster.nodes) == ["a", "b", "c"]
    assert len(grid.sent) == 3


def test_who_missed_the_roll_call_by_being_slow_joins_later(
    site_dir: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    config = tiny_config(round_timeout_seconds=0.2)
    grid = staged_grid(app, hospitals(site_dir, ["a", "b", "c"]), config)
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1003
    roster = call_roll(grid, config)
    assert roster.absent == {"node 1003": "did not answer in time"}
    grid.is_held = lambda reply: False
    roster.update(1)
    assert list(roster.nodes) == ["a", "b", "c"]
    assert roster.absent == {}


def test_a_newcomer_that_fails_is_asked_again_after_some_rounds(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    nodes = hospitals(site_dir, ["a", "b", "c"])
    table = Path(str(nodes[2]["data-path"]))
    nodes[2]["data-path"] = str(tmp_path / "later.csv")
    grid, roster = staged(staged_grid, nodes, tiny_config())
    grid.offline = set()
    asked = []
    for server_round in range(1, 2 + 2 * ROUNDS_UNTIL_ASKED_AGAIN):
        before = len(grid.sent)
        roster.update(server_round)
        asked += [server_round] * (len(grid.sent) - before)
        if server_round == 1 + ROUNDS_UNTIL_ASKED_AGAIN:
            assert "the site is not set up" in roster.absent["node 1003"]
            shutil.copy(table, tmp_path / "later.csv")
    assert asked == [1, 6, 11]
    assert list(roster.nodes) == ["a", "b", "c"]


def test_a_newcomer_with_another_schema_is_refused_with_the_difference_and_the_run_goes_on(
    site_dir: Path,
    tmp_path: Path,
    tiny_schema: TableSchema,
    tiny_config: Callable[..., RunConfig],
    staged_grid: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = tiny_schema.model_dump(mode="json")
    content["columns"][2]["maximum"] = 120
    TableSchema.parse(content).save(tmp_path / "other.json")
    nodes = hospitals(site_dir, ["a", "b", "c"], schemas={"c": tmp_path / "other.json"})
    grid, roster = staged(staged_grid, nodes, tiny_config())
    grid.offline = set()
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        roster.update(1)
        roster.update(2)
    reason = "site c has another schema than the run (here): column 'age': maximum is 100.0 here, 120.0 there"
    assert roster.absent == {"node 1003": reason}
    assert caplog.text.count(reason) == 1
    assert len(grid.sent) == 3


def test_a_run_that_goes_on_leaves_out_who_has_another_schema_even_if_they_are_many(
    site_dir: Path, tmp_path: Path, tiny_schema: TableSchema, tiny_config: Callable[..., RunConfig]
) -> None:
    content = tiny_schema.model_dump(mode="json")
    content["columns"][2]["maximum"] = 120
    TableSchema.parse(content).save(tmp_path / "other.json")
    schemas = dict.fromkeys("bc", tmp_path / "other.json")
    config = tiny_config(min_sites=1)
    grid = InProcessGrid(app, hospitals(site_dir, ["a", "b", "c"], schemas=schemas), config)
    roster = call_roll(grid, config, schema=tiny_schema)
    assert list(roster.nodes) == ["a"]
    assert all("another schema" in reason for reason in roster.absent.values())


def test_a_name_that_is_taken_is_not_given_to_another_node(
    site_dir: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    grid, roster = staged(staged_grid, hospitals(site_dir, ["a", "b", "a"]), tiny_config())
    grid.offline = {1001}
    roster.update(1)
    assert roster.nodes["a"] == 1001
    assert "calls itself a, as another node does" in roster.absent["node 1003"]
    assert roster.standing(["a", "b"]).absent == {"a": "is not connected"}


def write_sites(path: Path, **nodes: list[int]) -> str:
    path.write_text(json.dumps({site: {"node_ids": node_ids, "since": "x"} for site, node_ids in nodes.items()}))
    return str(path)


def test_a_node_that_is_not_listed_is_not_even_asked(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    config = tiny_config(sites_file=write_sites(tmp_path / "sites.json", a=[1001], b=[1002]))
    grid = staged_grid(app, hospitals(site_dir, ["a", "b", "c"]), config)
    roster = call_roll(grid, config)
    roster.update(1)
    assert roster.absent == {"node 1003": "is not in the sites file"}
    assert {message.metadata.dst_node_id for message in grid.sent} == {1001, 1002}
    write_sites(tmp_path / "sites.json", a=[1001], b=[1002], c=[1003])
    roster.update(2)
    assert roster.nodes["c"] == 1003
    assert roster.absent == {}


def test_a_node_that_takes_another_name_than_the_listed_one_is_refused_until_the_list_agrees(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    config = tiny_config(sites_file=write_sites(tmp_path / "sites.json", a=[1001], b=[1002], d=[1003]))
    roster = call_roll(InProcessGrid(app, hospitals(site_dir, ["a", "b", "c"]), config), config)
    assert list(roster.nodes) == ["a", "b"]
    assert roster.absent == {"node 1003": "calls itself c, the sites file says d"}
    write_sites(tmp_path / "sites.json", a=[1001], b=[1002], c=[1003])
    roster.update(1)
    assert roster.nodes["c"] == 1003


def test_two_hospitals_that_swap_their_names_are_both_refused(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    config = tiny_config(quorum_retries=0, sites_file=write_sites(tmp_path / "sites.json", a=[1001], b=[1002]))
    with pytest.raises(FederationError, match="node 1001: calls itself b, the sites file says a"):
        call_roll(InProcessGrid(app, hospitals(site_dir, ["b", "a"]), config), config)


def test_a_site_that_is_taken_off_the_list_is_asked_no_more(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    config = tiny_config(sites_file=write_sites(tmp_path / "sites.json", a=[1001], b=[1002]))
    roster = call_roll(InProcessGrid(app, hospitals(site_dir, ["a", "b"]), config), config)
    write_sites(tmp_path / "sites.json", a=[1001])
    roster.update(1)
    standing = roster.standing(roster.nodes)
    assert (list(standing.free), standing.absent) == (["a"], {"b": "is not in the sites file any more"})


def test_a_site_with_a_new_key_takes_its_old_place_once_its_old_node_is_gone(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    config = tiny_config(sites_file=write_sites(tmp_path / "sites.json", a=[1001, 1003], b=[1002]))
    grid, roster = staged(staged_grid, hospitals(site_dir, ["a", "b", "a"]), config)
    told = roster.descriptions["a"]
    grid.offline = set()
    roster.update(1)
    assert roster.nodes["a"] == 1001  # both are there: the one that has the place keeps it
    grid.offline = {1001}
    roster.update(2)
    assert roster.nodes["a"] == 1003
    assert roster.descriptions["a"] is told
    assert list(roster.nodes) == ["a", "b"]
    grid.offline = set()
    roster.update(3)
    assert roster.nodes["a"] == 1003


def test_a_retired_node_gives_its_place_up_though_it_is_there(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    config = tiny_config(sites_file=write_sites(tmp_path / "sites.json", a=[1001, 1003], b=[1002]))
    grid, roster = staged(staged_grid, hospitals(site_dir, ["a", "b", "a"]), config)
    grid.offline = set()
    roster.update(1)
    write_sites(tmp_path / "sites.json", a=[1003], b=[1002])
    roster.update(2)
    assert roster.nodes["a"] == 1003


def test_of_two_listed_nodes_at_the_roll_call_the_newer_one_has_the_place(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    config = tiny_config(sites_file=write_sites(tmp_path / "sites.json", a=[1003, 1001], b=[1002]))
    roster = call_roll(InProcessGrid(app, hospitals(site_dir, ["a", "b", "a"]), config), config)
    assert roster.nodes == {"a": 1001, "b": 1002}


def test_a_site_of_another_version_is_refused_with_both_versions(
    site_dir: Path, tiny_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(quorum_retries=0, min_sites=2)
    calls: list[str] = []

    def older(message: Message, context: Context) -> Message:
        reply = app(message, context)
        calls.append(str(context.node_config["site"]))
        if context.node_config["site"] == "c":
            values = reply.content.config_records["config"]
            values["versions"] = json.dumps(json.loads(str(values["versions"])) | {"mcrage": "0.0.9"})
        return reply

    roster = call_roll(InProcessGrid(older, hospitals(site_dir, ["a", "b", "c"]), config), config)
    roster.update(9)
    assert list(roster.nodes) == ["a", "b"]
    (reason,) = roster.absent.values()
    assert "site c has mcrage 0.0.9, the coordinator has 0.1.0" in reason
    assert calls == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("version", "is_fine"),
    [("0.1.0", True), ("0.1.9", True), ("0.1.0rc1", True), ("0.1", True), ("0.2.0", False), ("1.1.0", False)],
)
def test_the_first_two_numbers_of_a_version_count(version: str, is_fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.roster.__version__", "0.1.0")
    assert (version_objection(version) == "") == is_fine
    assert is_fine or f"has mcrage {version}, the coordinator has 0.1.0" in version_objection(version)


@pytest.mark.parametrize("version", ["", CANARY, "0.1.0\n" + CANARY, "0.1." + "9" * 99])
def test_a_text_that_is_no_version_is_not_repeated(version: str) -> None:
    assert "of an unknown version" in version_objection(version)
    assert CANARY not in version_objection(version)


def test_a_site_is_free_busy_or_absent(
    site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig], staged_grid: Any
) -> None:
    config = tiny_config(round_timeout_seconds=0.2)
    grid = staged_grid(app, hospitals(site_dir, ["a", "b", "c"]), config)
    roster = call_roll(grid, config)
    content = grid.sent[0].content
    grid.is_held = lambda reply: True
    subject = Subject("training", 4)
    roster.exchange.ask({"b": Message(content, roster.nodes["b"], "query.describe")}, subject)
    grid.offline = {roster.nodes["c"]}
    standing = roster.standing(["c", "b", "a"])
    assert (list(standing.free), standing.busy) == (["a"], {"b": subject})
    assert standing.reasons == {"b": "still busy with round 4", "c": "is not connected"}


@given(st.lists(st.dictionaries(st.sampled_from("FM"), st.integers(11, 1000)), max_size=5))
def test_totals_are_sums_over_sites(sites: list[dict[str, int]]) -> None:
    by_site = {
        str(place): GroupCounts({Group.of(sex=sex): n for sex, n in shown.items()}, suppressed=[Group.of(sex="X")])
        for place, shown in enumerate(sites)
    }
    total = total_counts(by_site)
    for sex in "FM":
        assert total.get(Group.of(sex=sex), 0) == sum(shown.get(sex, 0) for shown in sites)
    assert total.suppressed == (frozenset({Group.of(sex="X")}) if sites else frozenset())

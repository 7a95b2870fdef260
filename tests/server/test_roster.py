import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

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
from server.roster import call_roll, total_counts
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
    assert roster.weights("uniform") == {"a": 1.0, "b": 1.0}
    shown = {site: sum(description.group_counts.values()) for site, description in roster.descriptions.items()}
    assert shown["a"] > 11 > shown["b"]
    assert roster.weights("counts") == {"a": float(shown["a"]), "b": 11.0}


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

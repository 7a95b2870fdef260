import json
import logging
from pathlib import Path

import pytest

from mcrage.errors import ConfigError
from mcrage.signing import Signer
from server.registry import SitesFile, read_registry


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_every_node_has_the_name_of_its_site_and_other_fields_are_somebody_elses(tmp_path: Path) -> None:
    content = {
        "b": {"node_ids": [7, 2**63 + 1], "since": "2025"},
        "a": {"node_ids": [3], "key": {"x": 1}},
        "c": {"node_ids": []},
    }
    registry = read_registry(written(tmp_path / "sites.json", content))
    assert dict(registry.site_of) == {7: "b", 2**63 + 1: "b", 3: "a"}
    assert list(registry.site_of)[:2] == [7, 2**63 + 1]


def test_every_node_of_a_site_has_to_sign_with_the_key_of_the_site(tmp_path: Path) -> None:
    content = {"b": {"node_ids": [7, 9], "signing_key": "0f" * 32}, "a": {"node_ids": [3]}}
    registry = read_registry(written(tmp_path / "sites.json", content))
    assert registry.signers == dict.fromkeys([7, 9], Signer("b", b"\x0f" * 32))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "expected an object"),
        ({"Hospital A": {"node_ids": [1]}}, "no name of a site"),
        ({"../x": {"node_ids": [1]}}, "no name of a site"),
        ({"a": [1]}, "expected node_ids"),
        ({"a": {}}, "expected node_ids"),
        ({"a": {"node_ids": ["1"]}}, "expected node_ids"),
        ({"a": {"node_ids": [True]}}, "expected node_ids"),
        ({"a": {"node_ids": [-1]}}, "expected node_ids"),
        ({"a": {"node_ids": [1]}, "b": {"node_ids": [1]}}, "node 1 is that of two sites"),
        ({"a": {"node_ids": [1], "signing_key": "aa"}}, "expected signing_key, 64 hexadecimal digits"),
        ({"a": {"node_ids": [1], "signing_key": [1]}}, "expected signing_key, 64 hexadecimal digits"),
    ],
)
def test_a_list_that_is_not_as_agreed_is_refused_in_one_line(tmp_path: Path, content: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read_registry(written(tmp_path / "sites.json", content))
    assert len(str(caught.value).splitlines()) == 1
    assert "sites.json" in str(caught.value)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json': No such file"):
        SitesFile(str(tmp_path / "nowhere.json")).current()


def test_without_a_file_there_is_no_list() -> None:
    assert SitesFile("").current() is None


def test_the_list_is_read_anew_each_time(tmp_path: Path) -> None:
    path = written(tmp_path / "sites.json", {"a": {"node_ids": [1]}})
    sites_file = SitesFile(str(path))
    assert sites_file.current().site_of == {1: "a"}
    written(path, {"b": {"node_ids": [2]}})
    assert sites_file.current().site_of == {2: "b"}


def test_a_half_written_list_leaves_the_one_before_it_in_force(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path / "sites.json", {"a": {"node_ids": [1]}})
    sites_file = SitesFile(str(path))
    sites_file.current()
    written(path, '{"a": {"node')
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        assert sites_file.current().site_of == {1: "a"}
    assert "stays in force" in caplog.text
    written(path, {})
    assert sites_file.current().site_of == {}

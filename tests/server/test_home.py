"""The coordinator's folder: what it may hold, who may read it, and what is said of a damaged one."""

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mcrage.errors import ConfigError
from server.home import CoordinatorSettings, Home, SiteEntry, SiteKey, read_json, set_environment, write_json

SETTINGS = CoordinatorSettings(names=("fed.example.org", "192.0.2.7"))
LINKS_OUT = ("../x", "..", ".", "", "a/b", "a\\b", "/etc", "C:\\", "a\0", "a\n", "a ", " a", "a.b", "~", "%2e%2e")
NO_NAMES = (*LINKS_OUT, "CON", "NUL", "Upper", "-a", "_a", "a" * 65, "a" * 300, "ä", "a*", "a?", "settings.json")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", SETTINGS)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def entry(*keys: str) -> SiteEntry:
    now = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
    return SiteEntry(
        keys=tuple(SiteKey(serial="AB", public_key=key, expires=now) for key in keys), signing_key="0f" * 32, added=now
    )


def test_what_is_made_is_read_back(home: Home, tmp_path: Path) -> None:
    assert Home.open(tmp_path / "home") == home
    assert home.settings == SETTINGS
    assert home.settings.address == ("0.0.0.0", 8443)
    assert (home.sites(), home.read_registry(), home.former_keys(), home.runs()) == ({}, {}, {}, [])


def test_nobody_else_may_look_into_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        home = Home.create(tmp_path / "home", SETTINGS)
        home.write_sites({"hosp-a": entry("k")})
        write_json(home.registry, {})
    finally:
        os.umask(before)
    folders = [home.folder, *(path for path in home.folder.rglob("*") if path.is_dir())]
    files = [path for path in home.folder.rglob("*") if path.is_file()]
    assert {mode(path) for path in folders} == {0o700}
    assert {path.name for path in files} == {"coordinator.toml", "sites.json", "registry.json", "runtime.secret"}
    assert {mode(path) for path in files} == {0o600}


def test_every_coordinator_has_a_secret_of_its_own(home: Home, tmp_path: Path) -> None:
    other = Home.create(tmp_path / "other", SETTINGS)
    assert len(home.secret.read_bytes()) == 32
    assert home.secret.read_bytes() != other.secret.read_bytes()


def test_a_folder_is_made_once(home: Home) -> None:
    secret = home.secret.read_bytes()
    home.write_sites({"hosp-a": entry("k")})
    with pytest.raises(ConfigError, match="is a coordinator's folder already") as refused:
        Home.create(home.folder, SETTINGS)
    assert "\n" not in str(refused.value)
    assert home.secret.read_bytes() == secret
    assert list(home.sites()) == ["hosp-a"]


def test_a_folder_without_settings_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no coordinator's folder: 'python -m server init' makes one"):
        Home.open(tmp_path)


@pytest.mark.parametrize("name", NO_NAMES, ids=repr)
def test_a_name_that_could_lead_elsewhere_is_no_run(home: Home, name: str) -> None:
    with pytest.raises(ConfigError, match="run name") as refused:
        home.run(name)
    assert str(refused.value).isprintable()


@given(name=st.text(max_size=80))
def test_whatever_it_is_called_a_run_lies_right_below_the_runs(name: str) -> None:
    home = Home(Path("/nowhere"))
    try:
        folder = home.run(name)
    except ConfigError:
        return
    assert folder.resolve().parent == Path("/nowhere/runs")
    assert folder.name == name


@pytest.mark.parametrize("name", ["a", "0", "first_run-2", "a" * 64])
def test_a_folder_of_a_good_name_is_a_run(home: Home, name: str) -> None:
    assert home.runs() == []
    home.run(name).mkdir()
    (home.folder / "runs" / "Not a run").mkdir()
    write_json(home.folder / "runs" / "file", {})
    assert home.runs() == [name]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": ()}, "names"),
        ({"names": "fed.example.org"}, "names"),
        ({"listen": "8443"}, "listen: expected an IP address and a port, such as 0.0.0.0:8443"),
        ({"listen": "0.0.0.0:0"}, "listen"),
        ({"listen": "0.0.0.0:65536"}, "listen"),
        ({"listen": "0.0.0.0:x"}, "listen"),
        ({"listen": "fed.example.org:8443"}, "listen"),
        ({"listen": "; evil:1"}, "listen"),
        ({"superlink_port": 0}, "superlink_port"),
        ({"superlink_port": 8443}, "listen and superlink_port have the same port, 8443"),
        ({"max_body_mb": 5}, "max_body_mb"),
        ({"requests_per_second": "many"}, "requests_per_second"),
        ({"supernode_port": 1}, "supernode_port"),
    ],
    ids=repr,
)
def test_wrong_settings_are_a_line_each_that_names_file_and_key(
    home: Home, change: dict[str, object], told: str
) -> None:
    content = json.loads(SETTINGS.model_dump_json()) | {key: value for key, value in change.items()}
    path = home.folder / "coordinator.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in content.items()))
    with pytest.raises(ConfigError) as refused:
        _ = home.settings
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"{path}: {told}")


def test_all_wrong_settings_are_told_at_once(home: Home) -> None:
    (home.folder / "coordinator.toml").write_text("names = []\nsuperlink_port = -1\nlistne = 1\n")
    with pytest.raises(ConfigError) as refused:
        _ = home.settings
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert all(key in line for key, line in zip(("names", "superlink_port", "listne"), lines, strict=True))


@pytest.mark.parametrize("content", [b"names = [", b"\xff\xfe", b"[names]\n[names]"])
def test_settings_that_are_no_toml_are_one_line(home: Home, content: bytes) -> None:
    (home.folder / "coordinator.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"coordinator\.toml") as refused:
        _ = home.settings
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("listen", ["0.0.0.0:443", "[::]:8443", "127.0.0.1:1"])
def test_an_address_is_host_and_port(listen: str) -> None:
    host, port = CoordinatorSettings(names=("a",), listen=listen).address
    assert (host, port) == (listen.rpartition(":")[0].strip("[]"), int(listen.rpartition(":")[2]))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": {"keys": []}}',
        b'{"a": {"keys": [], "added": "2030-01-01T00:00:00Z"}}',
        b'{"a": {"keys": [{"serial": "AB"}], "added": "2030-01-01T00:00:00Z"}}',
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_a_damaged_list_of_sites_is_one_line_and_no_empty_list(home: Home, content: bytes) -> None:
    home.list_of_sites.write_bytes(content)
    with pytest.raises(ConfigError, match=r"sites\.json' cannot be used") as refused:
        home.sites()
    assert "\n" not in str(refused.value)


def test_a_list_of_sites_that_is_gone_is_no_empty_list(home: Home) -> None:
    home.list_of_sites.unlink()
    with pytest.raises(ConfigError, match="FileNotFoundError"):
        home.sites()


def test_sites_and_keys_come_back_as_they_were_written(home: Home) -> None:
    sites = {"hosp-b": entry("k1", "k2"), "hosp-a": entry("k3")}
    home.write_sites(sites)
    assert home.sites() == sites
    assert list(home.sites()) == ["hosp-a", "hosp-b"]
    home.write_former_keys({"k0": "hosp-a"})
    assert home.former_keys() == {"k0": "hosp-a"}


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"7", b"\xff"])
def test_a_damaged_registry_is_empty_as_it_is_made_anew(home: Home, content: bytes) -> None:
    home.registry.write_bytes(content)
    assert home.read_registry() == {}


def test_a_key_says_how_long_its_certificate_is_valid() -> None:
    soon = datetime.now(UTC) + timedelta(days=3, minutes=1)
    key = SiteKey(serial="AB", public_key="k", expires=soon)
    assert key.days_left == 3
    assert key.model_copy(update={"expires": soon - timedelta(days=4)}).days_left == -1
    with pytest.raises(ValidationError):
        SiteEntry(keys=(), signing_key="0f" * 32, added=soon)


def test_json_that_is_not_there_is_empty_and_damaged_json_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert read_json(path) == {}
    for content, told in ((b"{", "cannot be used"), (b"[]", "does not hold a JSON object"), (b"\xff", "cannot be")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            read_json(path)
    write_json(path, {"a": [1, "ä"]})
    assert read_json(path) == {"a": [1, "ä"]}
    with pytest.raises(ConfigError, match="NotADirectoryError"):
        read_json(path / "below")


def test_flower_is_told_to_send_nothing_home_and_install_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("OF_THE_USER", "kept")
    environment = set_environment(home)
    assert environment["FLWR_HOME"] == str(home.flower)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["FLWR_LOG_LEVEL"] != "DEBUG", "it would log what stands in the database"
    assert environment["OF_THE_USER"] == "kept"
    assert home.secret.read_bytes().hex() not in json.dumps(environment)

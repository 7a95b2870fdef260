import os
import time
from pathlib import Path
from typing import Any

import pytest

from client.settings import SiteSettings
from client.site import Site
from mcrage.errors import ConfigError

SITE = '[site]\nname = "st-mary"\ndata = "table.csv"\nschema_file = "schema.json"\n'
SERVER = '[server]\naddress = "federation.example.org:8443"\n'
GOOD = SITE + SERVER


def write(folder: Path, text: str | bytes, *, mode: int = 0o600) -> Path:
    path = folder / "site.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


def problems(path: Path) -> list[str]:
    """Lines of the error, of which none can move the cursor or hide another one."""
    with pytest.raises(ConfigError) as caught:
        SiteSettings.load(path)
    lines = str(caught.value).split("\n")
    assert all(line.isprintable() and line for line in lines)
    assert all(str(path) in line for line in lines)
    return lines


def test_a_file_of_four_lines_is_enough(tmp_path: Path) -> None:
    settings = SiteSettings.load(write(tmp_path, GOOD))
    assert settings.site.private == tmp_path / "private"
    assert settings.server.key == tmp_path / "keys" / "site.key"
    assert settings.daemon.approved == tmp_path / "approved.json"
    assert not settings.server.proxy_from_environment
    assert settings.daemon.max_memory_gb == 0


def test_paths_count_from_the_file_wherever_the_program_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    text = GOOD.replace('"table.csv"', '"../data/table.csv"').replace('"schema.json"', '"/srv/schema.json"')
    write(tmp_path, text)
    seen = []
    for folder, path in ((tmp_path, "site.toml"), (tmp_path / "elsewhere", "../site.toml")):
        monkeypatch.chdir(folder)
        settings = SiteSettings.load(Path(path))
        seen.append(os.path.realpath(settings.site.data))
        assert settings.site.data.is_absolute()
        assert settings.server.ca.is_absolute()
        assert settings.site.schema_file == Path("/srv/schema.json")
    assert seen == [os.path.realpath(tmp_path / "../data/table.csv")] * 2


def test_the_app_takes_the_site_as_it_is_written_here(tmp_path: Path) -> None:
    settings = SiteSettings.load(write(tmp_path, GOOD.replace("[server]", "num_threads = 3\n[server]")))
    assert Site.of(settings.node_config, {}) == Site(
        "st-mary", tmp_path / "table.csv", tmp_path / "schema.json", tmp_path / "private", num_threads=3
    )


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("10.0.0.5:443", "10.0.0.5", 443), ("[::1]:8443", "::1", 8443), ("a.example.org:65535", "a.example.org", 65535)],
)
def test_an_address_is_a_host_and_a_port(address: str, host: str, port: int, tmp_path: Path) -> None:
    server = SiteSettings.load(write(tmp_path, f'{SITE}[server]\naddress = "{address}"\n')).server
    assert (server.host, server.port) == (host, port)


ADDRESSES = ["", "host", "host:", ":8443", "host:0", "host:65536", "host:-1", "host:٣", "https://host:1", "a b:1"]
FAULTS: list[tuple[str | bytes, str]] = [
    (SERVER, "site: field required"),
    (SITE, "server: field required"),
    ("", "site: field required"),
    (GOOD + "[proxy]\n", "proxy: extra inputs"),
    (GOOD + "[daemon]\nprot = 9094\n", "daemon.prot: extra inputs"),
    (GOOD + "[daemon]\nmax_task_seconds = 0\n", "daemon.max_task_seconds"),
    *((GOOD + f"[daemon]\nmax_task_seconds = {value}\n", "max_task_seconds") for value in ("nan", "inf", "'slow'")),
    *((GOOD + f"[daemon]\nmax_memory_gb = {value}\n", "max_memory_gb") for value in ("-1", "1e300")),
    *((GOOD + f"[daemon]\nport = {value}\n", "daemon.port") for value in ("0", "65536", "'x'", "[1]")),
    ("site = 3\n" + SERVER, "site: "),
    (SITE.replace("st-mary", "St Mary") + SERVER, "site.name: "),
    (SITE.replace("st-mary", "../x") + SERVER, "site.name: "),
    (SITE.replace('"table.csv"', "7") + SERVER, "site.data: "),
    (SITE.replace("table.csv", r"a\u0000b") + SERVER, "site.data: a path has printable characters only"),
    (SITE.replace("table.csv", r"a\u001b[2Jb") + SERVER, "site.data: a path has printable characters only"),
    (GOOD.replace("[server]", "num_threads = 0\n[server]"), "site.num_threads: "),
    *((f'{SITE}[server]\naddress = "{address}"\n', "server.address: expected host:port") for address in ADDRESSES),
    ('file = "/etc/other.toml"\n' + GOOD, "file: extra inputs"),
    (GOOD + '"a\\nb\\u001b[31m" = 1\n', r"'a\nb\x1b[31m': extra inputs"),
    (GOOD + "[site]\n", "is not TOML"),
    (GOOD + "name = \n", "is not TOML"),
    (b"\xff\xfe" + GOOD.encode(), "is not TOML"),
    (GOOD + "\x00", "is not TOML"),
    (GOOD + "x = " + "[" * 10_000, "is not TOML"),
    (GOOD + "x = " + "9" * 10_000, "is not TOML"),
    (GOOD + "x." * 3_000 + "y = 1", "x: extra inputs"),
    (GOOD + "#" * 2**14, "at most 16,384 are read"),
]


@pytest.mark.parametrize(("text", "words"), FAULTS)
def test_a_fault_is_one_line_that_names_the_file_and_the_setting(text: str | bytes, words: str, tmp_path: Path) -> None:
    started = time.monotonic()
    lines = problems(write(tmp_path, text))
    assert any(words in line for line in lines)
    assert len(lines) == len(set(lines)) <= 2
    assert time.monotonic() - started < 5


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = '[site]\nname = "X"\ndata = "table.csv"\n[server]\naddress = "host"\nextra = 1\n[daemon]\nport = -1\n'
    named = {line.split(": ")[1] for line in problems(write(tmp_path, text))}
    assert named == {"site.name", "site.schema_file", "server.address", "server.extra", "daemon.port"}


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o664, 0o666, 0o722])
def test_a_file_that_others_can_write_is_refused(mode: int, tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, mode=mode)
    assert problems(path) == [f"'{path}' can be written by others: chmod go-w"]
    path.chmod(mode & ~0o022)
    assert SiteSettings.load(path).site.name == "st-mary"


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "link").symlink_to("link")
    words = {"pipe": "is not a file", "link": "symbolic links", "nothing": "No such file", ".": "Is a directory"}
    for name, text in words.items():
        assert text in problems(tmp_path / name)[0]
    assert problems(Path("/dev/zero"))


@pytest.mark.parametrize("change", [{"address": "other:1"}, {"port": 1}])
def test_settings_cannot_be_changed(change: dict[str, Any], tmp_path: Path) -> None:
    settings = SiteSettings.load(write(tmp_path, GOOD))
    section = settings.server if "address" in change else settings.daemon
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match="frozen"):
        setattr(section, name, value)

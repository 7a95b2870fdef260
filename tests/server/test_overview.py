import json
import os
import shutil
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given, settings
from hypothesis import strategies as st

from client.app import app
from mcrage.config import RunConfig
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.pki import Authority
from server import jobs
from server.app import save_result
from server.home import CoordinatorSettings, Home, SiteEntry, SiteKey, write_json
from server.overview import duration, overview, overview_lines, site_rows
from server.rounds import run_federation
from simulations.grid import InProcessGrid

FILES = ("job.json", "status.json", "settings.json", "run.json")
NOW = {
    "run": "a" * 64,
    "state": "training",
    "server_round": 7,
    "num_server_rounds": 40,
    "sites": {
        "hosp-a": {"state": "training", "reason": "", "round": 8},
        "hosp-b": {"state": "answered", "reason": "", "round": 8},
        "hosp-c": {"state": "absent", "reason": "its node is not connected", "round": 8},
        "hosp-d": {"state": "training", "reason": "", "round": 8},
    },
    "seconds_per_round": 6.1,
    "eta_seconds": 200.2,
    "error": "",
    "epsilon_planned": 2.987,
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.create(tmp_path / "home", CoordinatorSettings(names=("fed.example.org",), superlink_port=1))


def wanted(home: Home, name: str, **files: Any) -> Path:
    """A run that was wanted, with these files; dp is set unless the settings say otherwise."""
    folder = home.run(name)
    folder.mkdir()
    for file, content in {"settings": {"dp": True, "num-server-rounds": 40}, **files}.items():
        write_json(folder / f"{file}.json", content)
    return folder


def entry(*, days: int, keys: int = 1) -> SiteEntry:
    expires = datetime.now(UTC) + timedelta(days=days, hours=1)
    key = SiteKey(serial="AB", public_key="k" * 16, expires=expires)
    return SiteEntry(keys=(key,) * keys, signing_key="0f" * 32, added=datetime.now(UTC))


def lines_of(home: Home) -> list[str]:
    lines = overview_lines(overview(home))
    assert all(len(line) <= 100 and line.isprintable() for line in lines)
    return lines


def test_where_nothing_runs_all_is_told_in_under_two_seconds(home: Home) -> None:
    started = time.monotonic()
    lines = lines_of(home)
    assert time.monotonic() - started < 2
    assert lines[0] == "coordinator fed.example.org: not running; 'python -m server up' starts it"
    assert lines[1].startswith("  proxy on 0.0.0.0:8443,")
    assert lines[-2:] == [
        "sites: none; 'python -m server site add' lets one in",
        "runs: none; 'python -m server start' wants one",
    ]


def test_a_coordinator_runs_as_long_as_its_lock_is_held(home: Home) -> None:
    path = home.folder / "state" / "up.lock"
    assert not overview(home)["coordinator"]["running"]
    assert not path.exists(), "looking must leave nothing behind"
    lock = lock_file(path)
    assert lock is not None
    assert overview(home)["coordinator"]["running"]
    assert lines_of(home)[0] == "coordinator fed.example.org: running, but its SuperLink does not answer"
    os.close(lock)
    assert not overview(home)["coordinator"]["running"]


def test_the_server_certificate_says_how_long_it_is_valid(home: Home) -> None:
    assert overview(home)["coordinator"]["certificate_days_left"] is None
    Authority.create(home.pki, name="test").issue_server(["fed.example.org"], days=20)
    days = overview(home)["coordinator"]["certificate_days_left"]
    assert days in (19, 20)
    assert lines_of(home)[1].endswith(f"server certificate {days} days: renew")


def test_without_a_superlink_a_site_is_unknown_or_not_registered_yet(home: Home) -> None:
    home.write_sites({"hosp-a": entry(days=100), "hosp-b": entry(days=-3, keys=2), "hosp-c": entry(days=5)})
    write_json(home.registry, {"hosp-a": {"node_ids": [7]}, "hosp-c": {"node_ids": "?"}})
    assert site_rows(home) == [
        {"site": "hosp-a", "state": "unknown", "days_left": 100, "keys": 1, "node_ids": [7], "reason": ""},
        {"site": "hosp-b", "state": "not registered yet", "days_left": -3, "keys": 2, "node_ids": [], "reason": ""},
        {"site": "hosp-c", "state": "not registered yet", "days_left": 5, "keys": 1, "node_ids": [], "reason": ""},
    ]
    text = "\n".join(lines_of(home))
    assert "hosp-b                   not registered yet certificate expired 3 days ago, 2 keys" in text
    assert "certificate 5 days: renew" in text


@pytest.mark.parametrize(
    ("requests", "told"),
    [
        ([("401", "12:10:00")], "turned away: its clock is 600 s ahead of this machine's"),
        ([("401", "11:50:00.4")], "turned away: its clock is 600 s behind this machine's"),
        ([("200", "12:00:00"), ("401", "12:00:07+00:00")], "turned away: its clock is 7 s ahead of this machine's"),
        ([("401", "12:10:00"), ("200", "12:00:00")], ""),
        ([("401", "12:00:00")], ""),  # it was turned away for something else
        ([("401", "")], ""),
        ([("401", "yesterday")], ""),
        ([], ""),
    ],
)
def test_a_site_whose_clock_is_wrong_is_told_by_the_second(
    home: Home, requests: list[tuple[str, str]], told: str
) -> None:
    home.write_sites({"hosp-a": entry(days=100)})
    told_by = [
        {"time": "2026-11-30T13:00:00+01:00", "site": site, "status": status, "clock": clock and f"2026-11-30T{clock}"}
        for site, (status, clock) in [*(("hosp-a", each) for each in requests), ("-", ("401", "12:30:00"))]
    ]
    lines = [json.dumps(line) for line in told_by]
    (home.proxy / "access.log").write_text("\n".join(['half a line"}', "3", *lines, '{"time": "20']))
    assert [row["reason"] for row in site_rows(home)] == [told]
    assert told in "\n".join(lines_of(home)).replace("\n    ", " ")


@contextmanager
def superlink(certificates: Path, nodes: dict[int, str]) -> Iterator[int]:
    """Stands for Flower's: answers every request with these nodes and their status; gives its port."""
    infos = [NodeInfo(node_id=node, public_key=b"k" * 12, status=status) for node, status in nodes.items()]
    content = ListNodesResponse(nodes_info=infos).SerializeToString()

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Is quiet."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a look without a handshake is none
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.filterwarnings("ignore:.verify=<str>. is deprecated:DeprecationWarning")
def test_a_site_is_connected_if_any_of_its_nodes_is_and_only_the_own_superlink_is_believed(tmp_path: Path) -> None:
    own = Authority.create(tmp_path / "own", name="own")
    own.issue_server(["fed.example.org"])
    Authority.create(tmp_path / "other", name="other").issue_server(["fed.example.org"])
    states = {}
    for who in ("own", "other"):
        with superlink(tmp_path / who, {7: "offline", 8: "online", 9: "offline"}) as port:
            named = CoordinatorSettings(names=("fed.example.org",), superlink_port=port)
            home = Home.create(tmp_path / f"home-{who}", named)
            shutil.copytree(tmp_path / "own", home.pki)
            home.write_sites({"hosp-a": entry(days=9, keys=2), "hosp-b": entry(days=9), "hosp-c": entry(days=9)})
            node_ids = {"hosp-a": [7, 8], "hosp-b": [9], "hosp-c": [12]}
            write_json(home.registry, {site: {"node_ids": ids} for site, ids in node_ids.items()})
            states[who] = [row["state"] for row in site_rows(home)]
            assert overview(home)["coordinator"]["superlink"] == (who == "own")
    assert states == {"own": ["connected", "not connected", "not connected"], "other": ["unknown"] * 3}


def test_a_run_that_goes_on_says_how_far_it_is_and_where_it_waits(home: Home) -> None:
    now = NOW | {"updated": datetime.now(UTC).isoformat()}
    wanted(home, "trial", job={"state": "running"}, status=now)
    assert lines_of(home)[-5:] == [
        "run trial: running, 7 of 40 rounds, 6.1 s a round, about 3 min 20 s left",
        "  absent: hosp-c (its node is not connected)",
        "  answered: hosp-b",
        "  training: hosp-a, hosp-d",
        "  epsilon 2.99 planned for the patients of each site",
    ]


def test_a_run_without_a_sign_of_life_is_told(home: Home) -> None:
    before = datetime.now(UTC) - timedelta(minutes=5)
    wanted(home, "trial", job={"state": "running"}, status=NOW | {"updated": before.isoformat()})
    assert any(line.startswith("  no sign of life for 5 min") for line in lines_of(home))


def test_a_run_that_nobody_has_begun_is_wanted(home: Home) -> None:
    wanted(home, "trial", settings={"num-server-rounds": 12})
    assert lines_of(home)[-1] == "run trial: wanted, 0 of 12 rounds, no privacy claim"


def test_why_a_run_failed_is_told_in_lines_that_steer_no_terminal(home: Home) -> None:
    error = "round 3: 1 sites answered, 2 are needed\nhosp-a: \x1b[2J\x07gone"
    wanted(home, "trial", job={"state": "failed", "error": error}, status=NOW)
    lines = lines_of(home)
    assert "  error: round 3: 1 sites answered, 2 are needed" in lines
    assert "  error: hosp-a: ?[2J?gone" in lines


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content", [b"", b'{"state": "runn', b"[]", b"\xff\xfe", b'{"sites": 3, "state": 3, "num-server-rounds": []}']
)
def test_a_damaged_file_is_a_line_and_the_other_runs_are_shown(home: Home, file: str, content: bytes) -> None:
    wanted(home, "bad", job={"state": "running"}, status=NOW)
    wanted(home, "good", job={"state": "stopped"})
    (home.folder / "runs" / "stray").write_text("a file among the runs")
    (home.run("bad") / file).write_bytes(content)
    bad, good = overview(home)["runs"]
    assert len(bad["problems"]) == 1
    assert file in bad["problems"][0]
    assert "damaged" in bad["problems"][0]
    assert (bad["state"] == "damaged") == (file in ("job.json", "settings.json"))
    assert (good["state"], good["problems"]) == ("stopped", [])
    assert any("damaged" in line for line in lines_of(home))


def test_a_folder_that_was_never_wholly_begun_is_a_line(home: Home) -> None:
    home.run("half").mkdir()
    (run,) = overview(home)["runs"]
    assert run["state"] == "damaged"
    assert run["problems"] == [f"'{home.run('half') / 'settings.json'}' is not there: the run was never wholly begun"]


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
_KEYS = st.sampled_from([*NOW, "config", "privacy", "rounds", "absent", "epsilon", "dp", "num-server-rounds"])
_JSON = st.recursive(
    _SCALARS, lambda of: st.lists(of, max_size=3) | st.dictionaries(_KEYS, of, max_size=6), max_leaves=12
)


@pytest.fixture(scope="module")
def folder_of_a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = CoordinatorSettings(names=("fed.example.org",), superlink_port=1)
    folder = Home.create(tmp_path_factory.mktemp("any") / "home", named).run("trial")
    folder.mkdir()
    return folder


@given(contents=st.tuples(*[_JSON] * 4))
@settings(max_examples=60, deadline=None)
def test_whatever_stands_in_the_files_of_a_run_is_told_in_lines(
    contents: tuple[Any, ...], folder_of_a_run: Path
) -> None:
    for file, content in zip(FILES, contents, strict=True):
        (folder_of_a_run / file).write_text(json.dumps(content))
    home = Home.open(folder_of_a_run.parents[1])
    assert any(line.startswith("run trial: ") for line in lines_of(home))
    json.dumps(overview(home), allow_nan=False)


def test_damaged_settings_of_the_coordinator_are_one_line(home: Home) -> None:
    (home.folder / "sites.json").write_text("{")
    with pytest.raises(ConfigError, match=r"sites\.json"):
        overview(home)


def test_a_run_that_is_done_says_what_each_site_spent(
    home: Home, site_dir: Path, tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    sites = Path(shutil.copytree(site_dir, tmp_path / "own", ignore=shutil.ignore_patterns("private")))
    private: dict[str, Any] = {"dp": True, "dp_noise_multiplier": 1.0, "dp_sample_rate": 0.2, "run_name": "trial"}
    config = tiny_config(site_dir=str(sites), out_dir=str(home.run("trial")), **private)
    folder = wanted(home, "trial", job={"state": "done"}, settings={"dp": True, "num-server-rounds": 3})
    result = run_federation(InProcessGrid.of_folder(app, 3, config), config)
    save_result(result, config, seconds=1.0)
    assert jobs.read(home, "trial").state == "done"
    (run,) = overview(home)["runs"]
    assert run["epsilon"] == {
        site: {"run": account.epsilon_run, "total": account.epsilon} for site, account in result.accounts.items()
    }
    spent = f"{result.accounts['site-01'].epsilon:.2f}"
    assert lines_of(home)[-1] == f"  epsilon {spent} of this run, {spent} in all: site-01, site-02, site-03"

    record = json.loads((folder / "run.json").read_text())
    record["privacy"]["site-01"]["epsilon"] = None  # as an account says infinite
    del record["privacy"]["site-02"]
    write_json(folder / "run.json", record)
    assert lines_of(home)[-3:] == [
        f"  epsilon {spent} of this run, without bound in all: site-01",
        "  no account came: site-02",
        f"  epsilon {spent} of this run, {spent} in all: site-03",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.4, "9.4 s"),
        (12.4, "12 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (86399.9, "1 d 0 h"),
        (273600, "3 d 4 h"),
    ],
)
def test_times_are_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text

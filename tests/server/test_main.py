"""``python -m server``: exit codes, what is written, and a line for everything that is wrong."""

import json
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mcrage.config import RunConfig, Scalar
from mcrage.pki import site_request, verify
from mcrage.signing import as_extension, public_key
from server import __main__ as command
from server import jobs
from server.home import Home, read_json, write_json
from server.jobs import Jobs
from server.status import LiveStatus

ROOT = Path(command.__file__).parents[1]


class Ran(NamedTuple):
    """What one call of the command gave."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["server", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            command.main()
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert "PRIVATE KEY" not in shown.out + shown.err
        return Ran(int(caught.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def home(tmp_path: Path, run: Run) -> Home:
    assert run("init", tmp_path / "home", "--name", "fed.example.org", "--name", "192.0.2.7").code == 0
    return Home.open(tmp_path / "home")


def refused(ran: Ran) -> str:
    """The one line on stderr of a call that did nothing."""
    assert ran.code == 2, ran
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    return line


def request_file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.csr"
    path.write_bytes(site_request(name, as_extension(public_key(sha256(name.encode()).digest()))).request_pem)
    return path


def settings_of(home: Home, name: str) -> dict[str, Any]:
    return read_json(home.run(name) / "settings.json")


def test_init_makes_all_that_a_coordinator_needs_and_says_what_hospitals_get(tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "home"
    ran = run("init", folder, "--name", "fed.example.org", "--listen", "127.0.0.1:9443", "--superlink-port", 18001)
    assert ran.code == 0
    home = Home.open(folder)
    assert (home.settings.address, home.settings.superlink_port) == (("127.0.0.1", 9443), 18001)
    verify((home.pki / "server.crt").read_bytes(), (home.pki / "ca.crt").read_bytes(), purpose="server")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert ran.out.splitlines() == [
        f"{home.pki / 'ca.crt'}: send it to every hospital",
        f"{home.bundle}: send it to every hospital; SHA-256 {sha256(home.bundle.read_bytes()).hexdigest()}",
        f"Then: python -m server up {folder}",
    ]


def test_init_replaces_nothing(home: Home, run: Run) -> None:
    before = {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()}
    assert refused(run("init", home.folder, "--name", "other")).endswith("is a coordinator's folder already")
    assert {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()} == before


def test_after_a_name_that_no_certificate_can_have_init_can_be_called_again(tmp_path: Path, run: Run) -> None:
    told = refused(run("init", tmp_path / "home", "--name", "https://fed.example.org"))
    assert "is no host name or IP address" in told
    assert run("status", tmp_path / "home").code == 2
    assert run("init", tmp_path / "home", "--name", "fed.example.org").code == 0
    home = Home.open(tmp_path / "home")
    verify((home.pki / "server.crt").read_bytes(), (home.pki / "ca.crt").read_bytes(), purpose="server")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--listen", "localhost:8443"), "listen: expected an IP address and a port, such as 0.0.0.0:8443"),
        (("--superlink-port", "0"), "superlink_port: Input should be greater than or equal to 1"),
        (("--superlink-port", "8443"), "listen and superlink_port have the same port, 8443"),
    ],
)
def test_init_with_wrong_settings_makes_nothing(tmp_path: Path, run: Run, options: tuple[str, str], told: str) -> None:
    assert refused(run("init", tmp_path / "home", "--name", "a", *options)) == told
    assert not (tmp_path / "home").exists()


VERBS = ("up", "site add", "site rotate", "site retire", "site remove", "site list", "start", "resume", "stop")
MORE = {"site add": ("a", "a.csr", "--out", "a.crt"), "site rotate": ("a", "a.csr", "--out", "a.crt"), "up": ()}


@pytest.mark.parametrize("verb", [*VERBS, "status", "rebalance", "report"])
def test_every_verb_wants_a_coordinators_folder(tmp_path: Path, run: Run, verb: str) -> None:
    more = MORE.get(verb, () if verb in ("status", "site list") else ("a",))
    told = refused(run(*verb.split(), tmp_path, *more))
    assert told == f"'{tmp_path}' is no coordinator's folder: 'python -m server init' makes one"


def test_a_site_comes_changes_its_key_and_goes(home: Home, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "hosp-a.crt"
    ran = run("site", "add", home.folder, "hosp-a", request_file(tmp_path, "hosp-a"), "--out", out, "--days", 60)
    assert ran == (0, f"{out}: send it back to hosp-a; it is not secret\n", "")
    verify(out.read_bytes(), (home.pki / "ca.crt").read_bytes(), purpose="site")
    (row,) = json.loads(run("site", "list", home.folder, "--json").out)
    assert (row["site"], row["state"], row["keys"]) == ("hosp-a", "not registered yet", 1)
    request = request_file(tmp_path, "hosp-a")
    assert run("site", "rotate", home.folder, "hosp-a", request, "--out", out, "--days", 20).code == 0
    (line,) = run("site", "list", home.folder).out.splitlines()
    assert line.startswith("hosp-a")
    assert "days: renew, 2 keys" in line
    assert run("site", "retire", home.folder, "hosp-a").out == "site hosp-a: 1 old keys are out of use\n"
    assert "removed" in run("site", "remove", home.folder, "hosp-a").out
    assert run("site", "list", home.folder) == (0, "", "")


def test_what_cannot_be_done_for_a_site_is_one_line_and_changes_nothing(home: Home, run: Run, tmp_path: Path) -> None:
    good, out, missing = request_file(tmp_path, "hosp-a"), tmp_path / "a.crt", tmp_path / "none" / "a.crt"
    add = ("site", "add", home.folder, "hosp-a")
    assert refused(run(*add, tmp_path / "b.csr", "--out", out)).endswith("cannot be read: No such file or directory")
    assert refused(run(*add, good, "--out", missing)) == f"--out '{missing}': no file can be written there"
    assert refused(run(*add, good, "--out", tmp_path)) == f"--out '{tmp_path}': no file can be written there"
    assert "is for 'hosp-a' and not for 'hosp-b'" in refused(
        run("site", "add", home.folder, "hosp-b", good, "--out", out)
    )
    for verb in ("retire", "remove"):
        assert refused(run("site", verb, home.folder, "hosp-z")).startswith("there is no site 'hosp-z'")
    assert home.sites() == {}
    assert not out.exists()
    assert run(*add, good, "--out", out).code == 0
    assert "there is a site hosp-a already" in refused(run(*add, good, "--out", out))


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ("dp=false", "dp", False),
        ("marginals=false", "marginals", False),
        ("num-server-rounds=7", "num-server-rounds", 7),
        ("learning-rate=1e-3", "learning-rate", 0.001),
        ("learning-rate=1", "learning-rate", 1.0),
        ("strategy=fedavg", "strategy", "fedavg"),
        ('strategy="fedavg"', "strategy", "fedavg"),
        ("run-name=a = b # c", "run-name", "a = b # c"),
        ("run-name=2030-01-02", "run-name", "2030-01-02"),
        ("run-name=[1", "run-name", "[1"),
        ("run-name=", "run-name", ""),
    ],
)
def test_a_setting_is_a_boolean_a_number_or_a_text(home: Home, run: Run, change: str, key: str, value: Scalar) -> None:
    ran = run("start", home.folder, "trial", "--dry-run", "--set", change)
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)[key]
    assert (told, type(told)) == (value, type(value))
    assert home.runs() == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("nm-server-rounds=3", "nm-server-rounds: there is no such setting; did you mean num-server-rounds?"),
        ("num_server_rounds=3", "num_server_rounds: there is no such setting; did you mean num-server-rounds?"),
        ("dp=True", "dp: input should be a valid boolean; it is 'True'"),
        ("dp=yes", "dp: input should be a valid boolean; it is 'yes'"),
        ("dp=1", "dp: input should be a valid boolean; it is 1"),
        ("dp", "dp: input should be a valid boolean; it is ''"),
        ("dp=true", "dp-epsilon: dp=true needs the ε that the run may cost, or dp-noise-multiplier; both are 0"),
        ("learning-rate=nan", "learning-rate: input should be a finite number; it is nan"),
        ("num-server-rounds=3.5", "num-server-rounds: input should be a valid integer; it is 3.5"),
        ("out-dir=/etc", "out-dir: the coordinator sets it itself"),
    ],
)
def test_a_setting_that_is_wrong_is_one_line_and_starts_nothing(home: Home, run: Run, change: str, told: str) -> None:
    for more in ((), ("--dry-run",)):
        assert refused(run("start", home.folder, "trial", "--set", change, *more)) == told
    assert home.runs() == []


def test_settings_come_from_a_file_and_a_change_wins(home: Home, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('dp = true\ndp-epsilon = 3.0\nseed = 5\nstrategy = "fedavg"\n')
    ran = run("start", home.folder, "trial", "--settings", file, "--set", "seed=6", "--set", "min-sites=3")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == f"run trial: wanted; 'python -m server status {home.folder}' shows how it goes\n"
    expected = {"dp": True, "dp-epsilon": 3.0, "seed": 6, "strategy": "fedavg", "min-sites": 3, "run-name": "trial"}
    assert settings_of(home, "trial").items() >= expected.items()
    assert "there is a run trial already" in refused(run("start", home.folder, "trial"))
    assert "run name '../x'" in refused(run("start", home.folder, "../x"))


def test_a_file_of_settings_that_cannot_be_read_is_one_line(home: Home, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    assert str(file) in refused(run("start", home.folder, "trial", "--settings", file))
    file.write_text("dp = yes\nno toml")
    assert "line 1" in refused(run("start", home.folder, "trial", "--settings", file))
    file.write_text("[federation]\nseed = 1\n")
    assert "federation: there is no such setting" in refused(run("start", home.folder, "trial", "--settings", file))
    assert home.runs() == []


def test_stop_and_resume_write_down_what_is_wanted(home: Home, run: Run) -> None:
    for verb in ("stop", "resume"):
        assert refused(run(verb, home.folder, "trial")) == "there is no run 'trial'; 'status' shows all"
        assert "run name 'CON'" in refused(run(verb, home.folder, "CON"))
    run("start", home.folder, "trial")
    assert run("stop", home.folder, "trial") == (0, "", "run trial: will be stopped\n")
    assert read_json(home.run("trial") / "wish.json")["wish"] == "stop"
    assert run("resume", home.folder, "trial") == (0, "", "run trial: wanted\n")
    assert read_json(home.run("trial") / "wish.json")["wish"] == "run"
    write_json(home.run("trial") / "job.json", {"state": "done"})
    assert "run trial is done" in refused(run("resume", home.folder, "trial"))


class Flower:
    """A SuperLink whose runs end at once, each in its own way."""

    def __init__(self, home: Home, *ends: str) -> None:
        self.home, self.ends, self.known = home, list(ends), dict[int, str]()

    def start(self, _: bytes, config: Mapping[str, Scalar]) -> int:
        status, end = LiveStatus(self.home.run("trial") / "status.json", RunConfig.parse(config)), self.ends.pop(0)
        for number in (1, 2):
            status.reached(number, [0.5])
        status.change(state="failed" if end == "failed" else "done", error="it diverged" if end == "failed" else "")
        self.known[len(self.known) + 1] = f"finished:{end}"
        return len(self.known)

    def status(self, run_id: int) -> str:
        return self.known[run_id]


@pytest.fixture
def coordinator(home: Home) -> Iterator[Callable[..., None]]:
    """Carries out what is wanted, in a thread."""
    is_over, threads = threading.Event(), list[threading.Thread]()

    def carry_out(*ends: str) -> None:
        made = Jobs(home, Flower(home, *ends), b"")  # type: ignore[arg-type]

        def look() -> None:
            while not is_over.wait(0.3):
                made.tick()

        threads.append(threading.Thread(target=look))
        threads[-1].start()

    yield carry_out
    is_over.set()
    for thread in threads:
        thread.join()


def test_a_run_that_is_waited_for_says_how_far_it_is_and_whether_it_failed(
    home: Home, run: Run, coordinator: Callable[..., None]
) -> None:
    coordinator("failed", "completed")
    ran = run("start", home.folder, "trial", "--set", "num-server-rounds=2", "--wait")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[1:] == ["run trial: round 2 of 2, 0.5 s a round", "run trial: failed: it diverged"]
    ran = run("resume", home.folder, "trial", "--wait")
    assert ran.err.splitlines()[-1] == "run trial: done", "not the end of the attempt before"
    assert ran.code == 0


def test_status_is_told_without_a_coordinator(home: Home, run: Run) -> None:
    run("start", home.folder, "trial")
    ran = run("status", home.folder)
    assert (ran.code, ran.err) == (0, "")
    assert "not running; 'python -m server up' starts it" in ran.out
    assert "run trial: wanted" in ran.out
    told = json.loads(run("status", home.folder, "--json").out)
    assert (told["coordinator"]["running"], told["runs"][0]["run"]) == (False, "trial")


@pytest.mark.parametrize("verb", ["rebalance", "report"])
def test_a_run_that_there_is_not_has_no_rows_and_no_report(home: Home, run: Run, verb: str) -> None:
    assert "trial" in refused(run(verb, home.folder, "trial"))


def test_a_server_that_cannot_be_reached_is_not_production(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ran = run("doctor", address)
    assert ran.code == 2
    assert ran.out.startswith(f"FAIL  reach {address}: Connection refused")
    assert ran.err == f"{address}: NOT production\n"
    assert json.loads(run("doctor", address, "--json").out)[0]["is_ok"] is False
    assert "is not an address like" in refused(run("doctor", "nonsense"))


def test_wrong_usage_has_code_2(home: Home, run: Run) -> None:
    for arguments in (("no-such-verb",), ("init", "x"), ("site", "add", home.folder), ("start", home.folder)):
        assert run(*arguments).code == 2
    assert run("--help").code == 0


def test_what_nobody_thought_of_is_one_line(home: Home, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("of a patient")

    monkeypatch.setattr(jobs, "want", fail)
    ran = run("stop", home.folder, "trial")
    assert (ran.code, ran.err) == (1, "unexpected KeyError; set MCRAGE_DEBUG=1 to see where\n")
    monkeypatch.setenv("MCRAGE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["server", "stop", str(home.folder), "trial"])
    with pytest.raises(KeyError):
        command.main()


def test_what_cannot_be_written_is_one_line(home: Home, run: Run) -> None:
    (home.folder / "runs").rmdir()
    (home.folder / "runs").write_text("in the way")
    assert refused(run("start", home.folder, "trial")) == f"'{home.run('trial')}': Not a directory"


def test_it_can_be_called_from_the_shell(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "up", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"'{tmp_path}' is no coordinator's folder: 'python -m server init' makes one\n"

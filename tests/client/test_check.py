"""What the doctor says of a healthy hospital, and of one with a single fault at a time."""

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import flwr
import pytest

from client.bundles import Approvals, Bundle, installed_files
from client.check import examine
from client.enrolment import enrol
from client.findings import Finding
from client.journal import Journal
from client.places import LEDGER, POLICY, SECRET, WITNESS
from client.policy import DataRules, PrivacyRules, SitePolicy
from client.protection import UNPROTECTED
from client.settings import SiteSettings
from mcrage.pki import Authority
from mcrage.privacy import store
from mcrage.privacy.accounting import epsilon
from mcrage.privacy.events import PrivacyEvent
from mcrage.privacy.ledger import Limits, PrivacyLedger

ROOT = Path(__file__).parents[2]
NAME, TRAINING_PATIENTS = "st-mary", 84  # 70 % of the tiny table's
CELL = "Mrs Example"
NOISE = PrivacyEvent(mechanism="discrete-gaussian", noise_multiplier=4.0)
LIMITS = Limits(delta=1e-5, epsilon_total=None, epsilon_run=None, allow_unprotected=True)


@dataclass(frozen=True)
class Hospital:
    """An enrolled site and the authority of its federation."""

    folder: Path
    authority: Authority

    @property
    def settings(self) -> SiteSettings:
        return SiteSettings.load(self.folder / "site.toml")

    @property
    def private(self) -> Path:
        return self.folder / "private"

    def findings(self, *, offline: bool = True) -> list[Finding]:
        return examine(self.settings, offline=offline)

    def charge(self, event: PrivacyEvent = NOISE, *, key: str = "a") -> str:
        """Hash of one more charge."""
        with PrivacyLedger.open(self.private / LEDGER, witness=self.private / WITNESS) as ledger:
            return ledger.charge([event], key=key, run="r", task="train", dataset="d", limits=LIMITS).hash

    def allow(self, policy: SitePolicy) -> None:
        (self.private / POLICY).write_text(policy.to_toml(), encoding="utf-8")


@contextmanager
def server(authority: Authority) -> Iterator[str]:
    """The address of a TLS server that asks for a site's certificate, and answers as the coordinator's proxy does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.folder / "server.crt", authority.folder / "server.key")
    context.load_verify_locations(authority.folder / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    plain, _ = listening.accept()
                except OSError:
                    return
                with suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                    connection.recv(2**16)
                    date = format_datetime(datetime.now(UTC), usegmt=True)
                    connection.sendall(f"HTTP/1.1 404 X\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("federation") / "ca", name="Federation")
    made.issue_server(["federation.example.org"])
    return made


@pytest.fixture(scope="module")
def address(authority: Authority) -> Iterator[str]:
    with server(authority) as running:
        yield running


@pytest.fixture
def hospital(
    tmp_path: Path, site_dir: Path, authority: Authority, address: str, monkeypatch: pytest.MonkeyPatch
) -> Hospital:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(site_dir / "site-01.csv", folder / "table.csv")
    shutil.copy(site_dir / "schema.json", folder / "schema.json")
    text = (
        f'[site]\nname = "{NAME}"\ndata = "table.csv"\nschema_file = "schema.json"\n[server]\naddress = "{address}"\n'
    )
    (folder / "site.toml").write_text(text, encoding="utf-8")
    made = Hospital(folder, authority)
    enrol(made.settings, declared_patients=TRAINING_PATIENTS)
    keys = folder / "keys"
    (keys / "site.crt").write_bytes(authority.issue_site((keys / f"{NAME}.csr").read_bytes(), site=NAME))
    shutil.copy(authority.folder / "ca.crt", keys / "ca.crt")
    Approvals(made.settings.daemon.approved).add(Bundle("a" * 64, installed_files()), by="it")
    return made


def problems(findings: list[Finding]) -> list[Finding]:
    """Problems, each of them one line that says what to do and nothing of what it must not say."""
    for each in findings:
        assert str(each).isprintable()
        assert CELL not in str(each)
        assert "Traceback" not in str(each)
        assert each.remedy or not each.is_problem
    return [each for each in findings if each.is_problem]


def said(hospital: Hospital, area: str) -> str:
    return "\n".join(str(each) for each in hospital.findings() if each.area == area)


def leaving(hospital: Hospital) -> list[str]:
    return [each.text for each in hospital.findings() if each.area == "leaves"]


def test_a_healthy_site_has_no_problem_and_every_area_is_looked_at(hospital: Hospital) -> None:
    findings = hospital.findings(offline=False)
    assert problems(findings) == []
    levels = [(each.area, each.level) for each in findings if each.area != "leaves"]
    assert levels == [
        *[(area, "ok") for area in ("versions", "files", "keys", "approvals", "policy", "ledger")],
        *[("ledger", "note"), ("ledger", "ok"), ("secret", "ok"), ("table", "ok"), ("table", "ok"), ("disk", "ok")],
        *[("log", "ok"), ("server", "ok"), ("server", "ok")],
    ]
    assert json.loads(json.dumps([vars(each) for each in findings]))[0].keys() == {"area", "level", "text", "remedy"}
    assert "server" not in {each.area for each in hospital.findings(offline=True)}


def write(hospital: Hospital, name: str, content: str) -> None:
    (hospital.folder / name).write_text(content, encoding="utf-8")


def older_ledger(hospital: Hospital, *, with_witness: bool = False) -> None:
    kept = [(path, path.read_bytes()) for path in (hospital.private / LEDGER, hospital.private / WITNESS)]
    head = hospital.charge()
    for path, content in kept if with_witness else kept[:1]:
        path.write_bytes(content)
    for path in hospital.private.glob(f"{LEDGER}-*"):
        path.unlink()
    if with_witness:
        log = Journal(hospital.private / "audit.jsonl")
        log.append("reply", ledger_rows=1, ledger_head=head)
        log.append("reply", ledger_rows=-1, ledger_head="")


def exchanged_ledger(hospital: Hospital) -> None:
    hospital.charge()
    Journal(hospital.private / "audit.jsonl").append("instruction", ledger_rows=1, ledger_head="b" * 64)


def altered_log(hospital: Hospital) -> None:
    log = Journal(hospital.private / "audit.jsonl")
    log.append("started", versions="1")
    log.append("stopped")
    log.path.write_bytes(log.path.read_bytes().replace(b'"versions":"1"', b'"versions":"2"'))


def bad_cell(hospital: Hospital) -> None:
    lines = (hospital.folder / "table.csv").read_text(encoding="utf-8").splitlines()
    patient, sex, _, *others = lines[1].split(",")
    write(hospital, "table.csv", "\n".join([lines[0], ",".join([patient, sex, CELL, *others]), *lines[2:]]) + "\n")


def other_code(hospital: Hospital) -> None:
    files = installed_files() | {"client/app.py": "0" * 64}
    Approvals(hospital.settings.daemon.approved).add(Bundle("b" * 64, files), by="it")


Break = Callable[[Hospital], object]
FAULTS: dict[str, tuple[Break, list[tuple[str, str]]]] = {
    "other code": (other_code, [("approvals", "differ in 1 files, the first one client/app.py: changed")]),
    "approvals writable": (lambda h: (h.folder / "approved.json").chmod(0o666), [("approvals", "chmod go-w")]),
    "approvals damaged": (lambda h: write(h, "approved.json", CELL), [("approvals", "approve the bundle anew")]),
    "policy missing": (lambda h: (h.private / POLICY).unlink(), [("policy", "No such file")]),
    "policy writable": (lambda h: (h.private / POLICY).chmod(0o622), [("policy", "chmod go-w")]),
    "policy no TOML": (lambda h: write(h, f"private/{POLICY}", "required = yes"), [("policy", "is not TOML")]),
    "policy unknown rule": (
        lambda h: write(h, f"private/{POLICY}", "[privacy]\ndeclared_patients = 9\nallow_all = true\n"),
        [("policy", "privacy.allow_all: Extra inputs")],
    ),
    "ledger missing": (lambda h: (h.private / LEDGER).unlink(), [("ledger", "is missing, though its witness")]),
    "ledger readable": (lambda h: (h.private / LEDGER).chmod(0o644), [("ledger", "run chmod 600")]),
    "ledger damaged": (lambda h: (h.private / LEDGER).write_bytes(b"x" * 9999), [("ledger", "damaged")]),
    "ledger older than its witness": (older_ledger, [("ledger", "older than its witness")]),
    "ledger older than the log": (lambda h: older_ledger(h, with_witness=True), [("log", "it is an old backup")]),
    "ledger of another site": (exchanged_ledger, [("log", "it is another ledger")]),
    "ledger and witness missing": (
        lambda h: ((h.private / LEDGER).unlink(), (h.private / WITNESS).unlink()),
        [("ledger", "witness/ledger.json' are missing. Bring both back from backups")],
    ),
    "witness missing": (lambda h: (h.private / WITNESS).unlink(), [("ledger", "the witness is missing")]),
    "secret missing": (lambda h: (h.private / SECRET).unlink(), [("secret", "from a backup")]),
    "secret readable": (lambda h: (h.private / SECRET).chmod(0o644), [("secret", "run chmod 600")]),
    "secret short": (lambda h: (h.private / SECRET).write_bytes(b"x" * 31), [("secret", "31 bytes, 32 are needed")]),
    "table missing": (
        lambda h: (h.folder / "table.csv").unlink(),
        [("table", "there is no such file. Check the path")],
    ),
    "bad cell": (bad_cell, [("table", "E301 column 'age': 1 of 120 rows not a number. Correct them")]),
    "schema missing": (lambda h: (h.folder / "schema.json").unlink(), [("table", "cannot be read: No such file")]),
    "schema damaged": (lambda h: write(h, "schema.json", '{"columns": []}'), [("table", "from the coordinator")]),
    "log altered": (altered_log, [("log", "client audit verify")]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_is_one_line_that_says_what_to_do(hospital: Hospital, name: str) -> None:
    break_it, expected = FAULTS[name]
    break_it(hospital)
    found = problems(hospital.findings())
    assert [each.area for each in found] == [area for area, _ in expected], found
    assert all(text in str(each) for each, (_, text) in zip(found, expected, strict=True)), found


def test_of_a_site_that_has_nothing_yet_every_area_is_looked_at(hospital: Hospital, tmp_path: Path) -> None:
    shutil.copy(hospital.folder / "site.toml", tmp_path)
    findings = Hospital(tmp_path, hospital.authority).findings(offline=False)
    areas = list(dict.fromkeys(each.area for each in problems(findings)))
    assert areas == ["files", "policy", "ledger", "secret", "table"]
    assert "unexpectedly" not in str([*map(str, findings)])
    assert (findings[-1].level, "it can be reached" in findings[-1].text) == ("note", True)


def test_a_ledger_on_a_network_drive_is_a_problem(
    hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text("1 0 0:1 / / rw - nfs4 server:/ rw\n", encoding="utf-8")
    monkeypatch.setattr(store, "_MOUNTS", tmp_path / "mounts")
    assert [each.area for each in problems(hospital.findings())] == ["ledger"]
    assert "network drive (nfs4)" in said(hospital, "ledger")


@pytest.mark.parametrize(("free", "level"), [(1e8, "problem"), (5e8, "note"), (2e9, "ok")])
def test_little_disk_is_told(hospital: Hospital, monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    usage = shutil.disk_usage(hospital.private)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(free)))
    assert [each.level for each in hospital.findings() if each.area == "disk"] == [level]


def test_an_unforeseen_error_gives_its_type_alone_and_the_other_checks_run(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError(CELL)

    monkeypatch.setattr(shutil, "disk_usage", fail)
    [found] = problems(hospital.findings())
    assert (found.area, found.text) == ("disk", "this check failed unexpectedly (RuntimeError)")
    assert "log" in {each.area for each in hospital.findings()}


def test_another_flower_and_another_system_are_problems(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flwr, "__version__", "1.40.0")
    [found] = problems(hospital.findings())
    assert (found.area, "pip install flwr==1.41.0" in found.text) == ("versions", True)
    settings = hospital.settings
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(os, "name", "nt")
        findings = examine(settings, offline=True)
    assert [(each.area, each.is_problem) for each in findings] == [("system", True)]


@pytest.mark.slow
def test_a_missing_torch_is_told_by_a_doctor_that_runs_without_it(hospital: Hospital) -> None:
    # None in sys.modules is what Python has for "cannot be imported".
    program = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path; from client.settings import SiteSettings; "
        "from client.check import examine\n"
        "for each in examine(SiteSettings.load(Path(sys.argv[1])), offline=True): print(each)"
    )
    command = [sys.executable, "-c", program, str(hospital.folder / "site.toml")]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split()[1] for line in lines if line.startswith("problem")]
    assert found == ["policy:", "ledger:", "table:", "leaves:"]
    assert sum("Install the versions that constraints.txt names" in line for line in lines) == 4


def test_what_was_spent_is_told_as_the_ledger_has_it(hospital: Hospital) -> None:
    hospital.charge()
    events, delta = [NOISE], SitePolicy.load(hospital.private / POLICY).delta
    spent = epsilon(events, delta=delta)
    assert spent > 0.1
    assert f"epsilon {spent:.2f} of 10 is spent at delta 1e-05, {10 - spent:.2f} is left" in said(hospital, "ledger")
    assert "runs without noise" not in said(hospital, "ledger")
    hospital.charge(UNPROTECTED, key="b")
    assert f"epsilon {spent:.2f} of 10" in said(hospital, "ledger")
    assert "runs without noise: nothing can be stated" in said(hospital, "ledger")


@pytest.mark.parametrize(("declared", "differs"), [(84, False), (98, False), (70, False), (110, True), (60, True)])
def test_declared_patients_far_from_the_tables_are_noted_without_its_number(
    hospital: Hospital, declared: int, differs: bool
) -> None:
    hospital.allow(SitePolicy(privacy=PrivacyRules(declared_patients=declared)))
    text = said(hospital, "table")
    assert ("differs by more than a fifth" in text) == differs
    assert not any(number in text for number in ("84", "120"))


def test_without_an_approved_bundle_it_says_that_nothing_can_run(hospital: Hospital) -> None:
    (hospital.folder / "approved.json").unlink()
    assert said(hospital, "approvals").startswith("note    approvals: none: nothing can run here until 'python -m clie")
    assert problems(hospital.findings()) == []


ALWAYS = "in every run: the data dictionary, versions of programs, what the ledger says, codes of errors"
COLUMNS = "4 columns are modelled: sex, age, lab, ill"


def test_what_may_leave_is_told_in_words(hospital: Hospital) -> None:
    assert leaving(hospital) == [
        ALWAYS,
        "numbers of patients by group, none from 1 to 10: with noise (epsilon at most 1)",
        "histograms of single columns: with noise (at least 5 on each bar)",
        "parameters of the model: with noise (at least 0.5 times what one patient can change in a step)",
        "sums over patients that open only together with those of other sites: never",
        "tables of counts of a few columns: with noise (at least 5 on each cell)",
        "mean losses: never",
        "scores of test patients, counted: with noise (epsilon at most 1)",
        "with noise, all together: epsilon at most 3 a run and 10 for ever, delta 1e-05, 10,000 releases",
        COLUMNS,
    ]


def test_what_may_leave_without_privacy_is_told_in_words(hospital: Hospital) -> None:
    rules = DataRules(release_loss=True, release_exact_counts=True, minimum_cell=30)
    hospital.allow(SitePolicy(privacy=PrivacyRules(required=False), data=rules))
    assert leaving(hospital)[1:8] == [
        "numbers of patients by group, none from 1 to 29: with noise (epsilon at most 1) or as they are",
        "histograms of single columns: with noise (at least 5 on each bar) or as they are",
        "parameters of the model: as they are",
        "sums over patients that open only together with those of other sites: never",
        "tables of counts of a few columns: with noise (at least 5 on each cell) or as they are",
        "mean losses: as they are",
        "scores of test patients, counted: with noise (epsilon at most 1)",
    ]
    assert "asks for no privacy" in said(hospital, "policy")
    assert problems(hospital.findings()) == []


def test_what_the_policy_forbids_never_leaves(hospital: Hospital) -> None:
    rules = PrivacyRules(declared_patients=84, allow_histograms=False)
    hospital.allow(SitePolicy(privacy=rules, data=DataRules(tasks=("describe",))))
    assert [line.partition(": ")[2] for line in leaving(hospital)[2:7]] == ["never"] * 5
    hospital.allow(SitePolicy(privacy=rules, data=DataRules(allowed_columns=("age", "lab", "ill"))))
    assert leaving(hospital) == [ALWAYS, "nothing else: the policy does not allow the column sex"]
    (hospital.private / POLICY).unlink()
    assert leaving(hospital) == ["nothing: it takes a valid policy and a valid data dictionary"]


@pytest.mark.slow
def test_the_command_ends_with_0_for_a_healthy_site_and_with_2_for_another(hospital: Hospital) -> None:
    command = [sys.executable, "-m", "client", "check", str(hospital.folder / "site.toml")]
    healthy = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    assert {each["area"] for each in json.loads(healthy.stdout)} >= {"files", "table", "leaves", "server"}
    bad_cell(hospital)
    broken = subprocess.run([*command, "--offline"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert broken.returncode == 2, broken.stdout + broken.stderr
    assert [line for line in broken.stdout.splitlines() if line.startswith("problem table: ")]
    assert (healthy.stderr, broken.stderr) == ("", "")
    assert CELL not in broken.stdout

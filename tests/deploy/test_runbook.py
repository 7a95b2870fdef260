"""Every command of ``deploy/runbook.md`` is run, in its order: one coordinator and two hospitals in a folder.

Blocks that begin with ``# on the host`` install packages, make users or ask systemd: those are read by bash, not run.
In place of systemd a small program starts what the units start, with the folders of the test.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "deploy/runbook.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## (\d+)\. .*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ("client", "server", "mcrage", "deploy", "pyproject.toml", "constraints.txt", "README.md", "LICENSE")
SITES = ("site-01",)
BACKUPS, NEW_VERSION = 8, 10
BLOCK_SECONDS = 180

SYSTEMCTL = '''#!{python}
"""Starts and ends the programs of units: as much of systemctl as the runbook uses."""
import os, shlex, signal, subprocess, sys, time
from pathlib import Path

folder = Path(os.environ["UNITS"])
places = {{
    "/opt/mcrage/.venv/bin/python": os.environ["PYTHON"],
    "/var/lib/mcrage-site": os.environ["SITE_DIR"],
    "/var/lib/mcrage-coordinator": os.environ["HOME_DIR"],
    "/opt/mcrage": os.environ["MCRAGE"],
}}


def of(name):
    site = "" if name == "mcrage-coordinator" else "-" + os.environ["SITE"]
    return folder / (name + site + ".pid")


def start(name):
    lines = Path(os.environ["MCRAGE"], "deploy/systemd", name + ".service").read_text().splitlines()
    [command] = [line.partition("=")[2] for line in lines if line.startswith("ExecStart=")]
    for there, here in places.items():
        command = command.replace(there, here)
    with open(of(name).with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(
            shlex.split(command), cwd=os.environ["MCRAGE"], stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    of(name).write_text(str(process.pid))


def stop(name):
    process = int(of(name).read_text())
    os.kill(process, signal.SIGTERM)
    until = time.monotonic() + 60
    while time.monotonic() < until and not is_gone(process):
        time.sleep(0.1)
    if not is_gone(process):
        sys.exit(name + " does not end")
    of(name).unlink()


def is_gone(process):
    try:
        return Path(f"/proc/{{process}}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


verb, *names = [word for word in sys.argv[1:] if word != "--now"]
for name in names:
    if verb in ("stop", "restart"):
        stop(name)
    if verb in ("enable", "start", "restart"):
        start(name)
'''


def blocks() -> list[tuple[int, str]]:
    """Section and text of every block."""
    return [(int(part[1]), text) for part in SECTION.finditer(RUNBOOK) for text in BLOCK.findall(part[0])]


def is_for_the_host(text: str) -> bool:
    """Whether a block is only read here."""
    return text.startswith("# on the host")


@dataclass
class Machines:
    """A coordinator and two hospitals in one folder, to which the runbook is done.

    Attributes:
        folder: Of everything.
        outputs: What each block said, by section.
    """

    folder: Path
    outputs: dict[int, str] = field(default_factory=dict)

    def environment(self) -> dict[str, str]:
        """Variables of the runbook that are the same everywhere."""
        ports = dict(zip(("PORT", "SUPERLINK_PORT"), free_ports(2), strict=True))
        return {
            **{name: value for name, value in os.environ.items() if "PROXY" not in name.upper()},
            **{name: str(port) for name, port in ports.items()},
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "MCRAGE": str(self.folder / "opt/mcrage"),
            "EXCHANGE": str(self.folder / "exchange"),
            "ARCHIVE": str(self.folder / "exchange/mcrage.tar.gz"),
            "UNITS": str(self.folder / "units"),
            "NAME": "localhost",
            "LISTEN": f"127.0.0.1:{ports['PORT']}",
            "HOME_DIR": str(self.folder / "coordinator"),
            "BACKUP": str(self.folder / "backup"),
            "PATIENTS": "84",
            "ROUNDS": "2",
            "MIN_SITES": "1",
            "STEPS": "1",
            "AS_COORDINATOR": "",
            "AS_NETWORK": "",
            "AS_DATA": "",
            "OMP_NUM_THREADS": "1",
            "MCRAGE_DEBUG": "1",
        }

    def sites(self, tables: Path) -> list[dict[str, str]]:
        """Variables of each hospital."""
        return [
            {
                "SITE": site,
                "SITE_DIR": str(self.folder / site),
                "TABLE": str(tables / f"{site}.csv"),
                "SITE_PORT": str(port),
            }
            for site, port in zip(SITES, free_ports(len(SITES)), strict=True)
        ]

    def archive(self, *, changed: bool = False) -> None:
        """Makes the archive of the programs; with one line more in one of them for a new version."""
        path = self.folder / "exchange/mcrage.tar.gz"
        source = self.folder / "source"
        shutil.rmtree(source, ignore_errors=True)
        for name in PROGRAMS:
            there, here = ROOT / name, source / "mcrage" / name
            here.parent.mkdir(parents=True, exist_ok=True)
            if there.is_dir():
                shutil.copytree(there, here, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
            else:
                shutil.copy(there, here)
        if changed:
            with (source / "mcrage/client/pretend.py").open("a", encoding="utf-8") as file:
                file.write("\n# a newer version\n")
        with tarfile.open(path, "w:gz") as archive:
            archive.add(source / "mcrage", arcname="mcrage-0.1.0")

    def run(self, section: int, text: str, environment: dict[str, str], *, expect: int = 0) -> None:
        """Runs a block after the names of section 1."""
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", blocks()[0][1] + text],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=BLOCK_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0] + f"\nnot done after {BLOCK_SECONDS} s"
        self.outputs[section] = self.outputs.get(section, "") + said
        assert process.returncode == expect, f"section {section}\n{text}\n{said[-4000:]}\n{self.logs()}"

    def logs(self) -> str:
        """The last lines of every program."""
        logs = sorted((self.folder / "units").glob("*.log"))
        return "\n".join(f"{log.name}: " + log.read_text(encoding="utf-8", errors="replace")[-2000:] for log in logs)


def free_ports(count: int) -> list[int]:
    """Ports on loopback that nobody has now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def machines(tmp_path: Path, site_dir: Path) -> Iterator[Machines]:
    """Bare machines with an archive, a data dictionary and tables; what runs in the end is ended."""
    made = Machines(tmp_path)
    for name in ("bin", "units", "exchange"):
        (tmp_path / name).mkdir()
    shutil.copy(site_dir / "schema.json", tmp_path / "exchange")
    made.archive()
    (tmp_path / "bin/systemctl").write_text(SYSTEMCTL.format(python=sys.executable), encoding="utf-8")
    (tmp_path / "bin/systemctl").chmod(0o755)
    yield made
    left = [int(path.read_text()) for path in (tmp_path / "units").glob("*.pid")]
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)
    until = time.monotonic() + 60
    while any(Path(f"/proc/{process}").exists() for process in left) and time.monotonic() < until:
        time.sleep(0.2)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_bash_can_read_every_block(number: int) -> None:
    _, text = blocks()[number]

    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"# (on the host|at both|at the coordinator|at the hospital)\b", text)


def test_only_what_needs_root_or_systemd_is_not_run() -> None:
    only_read = [text for _, text in blocks() if is_for_the_host(text)]

    assert len(only_read) == 9
    for text in only_read:
        assert re.search(r"apt-get|pip install|systemd-|systemctl daemon-reload|ufw|chown|journalctl", text)
    assert set(re.findall(r"^```(\w+)", RUNBOOK, re.MULTILINE)) == {"sh"}


@pytest.mark.slow
def test_the_runbook_leads_from_bare_folders_to_a_run_and_through_the_life_of_a_federation(
    machines: Machines, site_dir: Path
) -> None:
    common, sites = machines.environment(), machines.sites(site_dir)
    start, first_run = time.monotonic(), 0.0
    backup, check = [text for section, text in blocks() if section == BACKUPS][:2]
    for section, text in blocks()[1:]:
        if is_for_the_host(text):
            continue
        if section == NEW_VERSION and text.startswith("# at the coordinator\n"):
            machines.archive(changed=True)
        each_site = text.startswith("# at the hospital") or "for each hospital" in text.splitlines()[0]
        if "budget plan" in text:
            machines.run(BACKUPS, backup, common | sites[0])
        for site in sites if each_site else [sites[0]]:
            machines.run(section, text, common | site)
        if "--wait" in text:
            first_run = time.monotonic() - start
            machines.run(BACKUPS, check, common | sites[0], expect=3)
    told = machines.outputs

    print(f"from bare folders to the end of the first run: {first_run:.0f} s")
    assert "localhost:" in told[3]
    assert ": production" in told[3]
    assert not re.search("^problem", told[4], re.MULTILINE)
    assert len(re.findall("^ok +versions: ", told[4], re.MULTILINE)) == 3 * len(SITES), "as root, and of each half"
    assert len(re.findall("^ok +server: .*over TLS", told[4], re.MULTILINE)) == 2 * len(SITES)
    assert re.search(r"leaves: parameters of the model: with noise", told[4])
    assert told[4].count("approved: ") == len(SITES)
    assert "run first: round 2 of 2" in told[5]
    assert "run first: done" in told[5]
    assert re.search(r"epsilon [0-9.]+ of this run", told[6])
    assert "2 of 2 rounds" in told[6]
    assert "100 rows" in told[7]
    assert (machines.folder / "coordinator/runs/first/report.html").stat().st_size > 10_000
    assert "older than its witness, which saw 4 charges where it has 0" in told[BACKUPS]
    assert told[BACKUPS].count("all as they were made") == len(SITES)
    assert "1 old keys are out of use" in told[9]
    assert told[NEW_VERSION].count("client/pretend.py: changed") == len(SITES)
    assert told[11].count(": removed") == len(SITES)


@pytest.mark.parametrize(
    "symptom", re.findall(r"^\| (`[^|]+) \|", RUNBOOK.partition("## 12.")[2], re.M), ids=lambda text: text[:40]
)
def test_what_the_table_says_is_what_the_programs_say(symptom: str) -> None:
    import flwr

    sources = [path for name in ("client", "server", "mcrage") for path in (ROOT / name).rglob("*.py")]
    if "in the journal" in symptom:
        sources = [Path(flwr.__file__).parent / "supercore/error/catalog.py"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)

    for fragment in re.findall("`([^`]+)`", symptom):
        assert fragment in text

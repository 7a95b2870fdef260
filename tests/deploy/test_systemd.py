"""The units, users and rights of ``deploy/systemd``, as systemd and as the programs see them."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.bundles import Approvals, Bundle
from client.check import examine
from client.enrolment import enrol
from client.journal import Journal
from client.runner import JOURNAL, read_runtime_secret
from client.settings import SiteSettings
from mcrage.errors import ConfigError, McrageError
from mcrage.pki import Authority

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SITE_UNITS = ("mcrage-site-network", "mcrage-site-data")
STATE = Path("/var/lib/mcrage-site")
HARDENING = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
    "KillMode": "mixed",
    "Restart": "always",
    "RestartSec": "20",
    "StartLimitIntervalSec": "0",
    "WorkingDirectory": "/opt/mcrage",
}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed: apt install systemd"
)


def unit(name: str) -> dict[str, list[str]]:
    """Values by key of a unit, in their order."""
    values: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / f"{name}.service").read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            values.setdefault(key, []).append(value)
    return values


def verified(text: str, name: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """What systemd says of a unit in a tree where its program is."""
    program = folder / "opt/mcrage/.venv/bin/python"
    units = folder / "etc/systemd/system"
    for each in (program.parent, units):
        each.mkdir(parents=True, exist_ok=True)
    shutil.copy("/bin/true", program)
    (units / name).write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", f"--root={folder}", "--recursive-errors=no", "--man=no", name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@needs_systemd
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_finds_nothing_wrong_with_a_unit(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    done = verified(text, path.name, tmp_path)
    broken = verified(text.replace("ProtectSystem=", "ProtectSytem="), path.name, tmp_path)

    assert (done.returncode, done.stderr + done.stdout) == (0, "")
    assert "ProtectSytem" in broken.stderr


@needs_systemd
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_rates_the_exposure_of_a_unit_below_2_of_10(path: Path, tmp_path: Path) -> None:
    weak = tmp_path / path.name
    weak.write_text(re.sub("^(Protect|SystemCall).*\n", "", path.read_text(encoding="utf-8"), flags=re.M))

    rated = ["systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold=20"]
    done, broken = (
        subprocess.run([*rated, str(each)], capture_output=True, text=True, check=False) for each in (path, weak)
    )

    assert done.returncode == 0, done.stdout.splitlines()[-1]
    assert broken.returncode != 0


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_has_every_guard_a_limit_of_memory_and_of_processes(path: Path) -> None:
    found = unit(path.stem)

    assert {key: found.get(key) for key in HARDENING} == {key: [value] for key, value in HARDENING.items()}
    assert found["SystemCallFilter"][:2] == ["@system-service", "~@privileged"]
    assert {"MemoryMax", "TasksMax", "RestrictAddressFamilies"} <= set(found)
    assert found["User"] not in (["root"], ["0"])


def test_the_process_with_the_network_cannot_see_the_data_nor_the_other_one_the_network() -> None:
    network, data = (unit(name) for name in SITE_UNITS)

    assert network["User"] != data["User"]
    assert network["InaccessiblePaths"] == [f"{STATE / 'data'} {STATE / 'private'}"]
    assert network["ReadWritePaths"] == [f"{STATE / 'keys'}"]
    assert (data["IPAddressDeny"], data["IPAddressAllow"]) == (["any"], ["localhost"])
    assert data["RestrictAddressFamilies"] == ["AF_INET AF_UNIX"]
    assert data["ReadWritePaths"] == [f"{STATE / 'private'}"]
    assert network["IPAddressDeny"] == ["any"]
    assert network["IPAddressAllow"][0] == "localhost"
    assert all(name in data["InaccessiblePaths"][0] for name in ("site.key", "node.key"))


def tmpfiles(name: str) -> dict[Path, tuple[str, int, str, str]]:
    """Kind, mode, user and group by path."""
    rows = {}
    for line in (DEPLOY / "systemd" / f"{name}.tmpfiles.conf").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            kind, path, mode, user, group = line.split()
            rows[Path(path)] = (kind, int(mode, 8), user, group)
    return rows


def test_the_two_users_share_one_secret_and_neither_can_change_what_may_run() -> None:
    rows, (network, data) = tmpfiles("mcrage-site"), (unit(name) for name in SITE_UNITS)
    kind, mode, user, group = rows[STATE / "keys/runtime.secret"]

    assert (kind, mode, [user]) == ("z", 0o640, network["User"])
    assert [group] == network["SupplementaryGroups"] == data["SupplementaryGroups"]
    # Approvals and settings of another user than root or one's own are refused; only root's serve both.
    for path in (STATE, STATE / "approved.json", STATE / "site.toml"):
        assert rows[path][2] == "root"
        assert not rows[path][1] & 0o022
    assert {rows[path][2] for path in rows if path.is_relative_to(STATE / "private")} == set(data["User"])
    assert not any(rows[path][1] & 0o077 for path in rows if path.is_relative_to(STATE / "private"))
    for key in ("site.key", "node.key"):
        assert [rows[STATE / "keys" / key][2]] == network["User"]
        assert rows[STATE / "keys" / key][1] == 0o600


@pytest.fixture
def site(tmp_path: Path) -> SiteSettings:
    """An enrolled hospital with all of its files, under the rights that the programs give them."""
    folder = tmp_path / "site"
    folder.mkdir(mode=0o755)
    shutil.copy(DEPLOY / "site.example.toml", folder / "site.toml")
    (folder / "site.toml").chmod(0o644)
    settings = SiteSettings.load(folder / "site.toml")
    enrol(settings, declared_patients=100)
    authority = Authority.create(tmp_path / "pki", name="example")
    request = folder / "keys/site-01.csr"
    settings.server.certificate.write_bytes(authority.issue_site(request.read_bytes(), site="site-01"))
    settings.server.ca.write_bytes(authority.certificate_pem)
    Approvals(settings.daemon.approved).add(Bundle("0" * 64, {}), by="nobody")
    Journal(settings.site.private / JOURNAL).append("started")
    (settings.site.private / "debug.log").touch()
    settings.site.data.parent.mkdir()
    return settings


def guarded(settings: SiteSettings) -> Iterator[tuple[Path, int]]:
    """Every path of the rights that a program looks at, and its mode."""
    for path, (_, mode, _, _) in tmpfiles("mcrage-site").items():
        here = settings.file.parent / path.relative_to(STATE)
        here.chmod(mode)
        if path not in (STATE, STATE / "data", STATE / "private/witness", STATE / "private/debug.log"):
            yield here, mode


def problems(settings: SiteSettings) -> list[str]:
    """What the doctor finds wrong, and what stops a daemon before a doctor is asked."""
    try:
        read_runtime_secret(settings.daemon.secret)
        Journal(settings.site.private / JOURNAL).append("looked at")
        settings = SiteSettings.load(settings.file)
    except McrageError as error:
        return [str(error)]
    areas = ("files", "keys", "policy", "ledger", "secret", "log")
    found = [each for each in examine(settings, offline=True) if each.area in areas]
    return [each.text for each in found if each.is_problem] + _of_approvals(settings)


def _of_approvals(settings: SiteSettings) -> list[str]:
    try:
        Approvals(settings.daemon.approved).listed()
    except ConfigError as error:
        return [str(error)]
    return []


def test_the_rights_in_tmpfiles_are_those_that_the_programs_demand(site: SiteSettings) -> None:
    paths = dict(guarded(site))

    assert len(paths) == 14
    assert problems(site) == []
    for path, mode in paths.items():
        # what all may read may not be written by others; what is private may not even be read
        path.chmod(mode | (0o022 if mode & 0o004 else 0o007))
        assert any(path.name in text for text in problems(site)), f"{path.name} with mode {path.stat().st_mode:o}"
        path.chmod(mode)


def test_the_rights_of_the_coordinator_are_those_that_its_authority_demands(tmp_path: Path) -> None:
    Authority.create(tmp_path / "pki", name="example").issue_server(["localhost"])

    rows = {path.name: row[1] for path, row in tmpfiles("mcrage-coordinator").items()}

    for name, mode in rows.items():
        here = tmp_path / "pki" / ("" if name in ("pki", "mcrage-coordinator") else name)
        assert stat.S_IMODE(here.stat().st_mode) == mode
    (tmp_path / "pki/ca.key").chmod(rows["ca.key"] | 0o040)
    with pytest.raises(ConfigError, match=r"ca\.key"):
        Authority.open(tmp_path / "pki")


@pytest.mark.skipif(os.geteuid() != 0, reason="giving folders to users takes root")
@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_systemd_makes_the_users_and_the_folders(tmp_path: Path) -> None:
    for folder in ("etc", "var/lib", "usr/lib/sysusers.d", "usr/lib/tmpfiles.d"):
        (tmp_path / folder).mkdir(parents=True)
    for kind in ("sysusers", "tmpfiles"):
        for path in (DEPLOY / "systemd").glob(f"*.{kind}.conf"):
            shutil.copy(path, tmp_path / f"usr/lib/{kind}.d" / path.name)

    for command in (["systemd-sysusers"], ["systemd-tmpfiles", "--create"]):
        done = subprocess.run([*command, f"--root={tmp_path}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    users = dict(line.split(":")[0::2][:2] for line in (tmp_path / "etc/passwd").read_text().splitlines())
    made = {"mcrage-coordinator", "mcrage-net", "mcrage-data"}
    assert made <= set(users)
    for name in ("mcrage-site", "mcrage-coordinator"):
        for path, (kind, mode, user, _) in tmpfiles(name).items():
            if kind == "d":
                found = (tmp_path / path.relative_to("/")).stat()
                assert (stat.S_IMODE(found.st_mode), found.st_uid) == (mode, int(users.get(user, 0)))


def test_the_users_of_the_units_are_those_that_are_made() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (DEPLOY / "systemd").glob("*.sysusers.conf"))

    assert {unit(path.stem)["User"][0] for path in UNITS} == set(re.findall(r"^u (\S+)", text, re.M))
    assert {unit(name)["SupplementaryGroups"][0] for name in SITE_UNITS} == set(re.findall(r"^g (\S+)", text, re.M))

"""What the doctor says where it may not look at everything.

Root may, so that under root the doctor looks as another user: the process takes the number of one for that time.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from client.bundles import Approvals, Bundle, installed_files
from client.check import examine
from client.enrolment import enrol
from client.findings import Finding
from client.journal import Journal
from client.places import JOURNAL
from client.settings import SiteSettings
from mcrage.pki import Authority

NAME = "st-mary"
IS_ROOT = os.geteuid() == 0
ALONE = 20_003 if IS_ROOT else os.geteuid()


@contextmanager
def as_user(number: int, *groups: int) -> Iterator[None]:
    """Everything that is done meanwhile is done by a user, in the group of the same number and in some more."""
    if not IS_ROOT:
        assert number == os.geteuid()
        yield
        return
    before = os.getgroups()
    os.setgroups(groups)
    os.setresgid(number, number, 0)
    os.setresuid(number, number, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setresgid(0, 0, 0)
        os.setgroups(before)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("federation") / "ca", name="Federation")


@pytest.fixture
def hospital(site_dir: Path, authority: Authority) -> Iterator[SiteSettings]:
    """An enrolled site with all of its files, in a folder that other users can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data").mkdir()
        shutil.copy(site_dir / "site-01.csv", folder / "data/patients.csv")
        shutil.copy(site_dir / "schema.json", folder / "data/schema.json")
        text = f'[site]\nname = "{NAME}"\ndata = "data/patients.csv"\nschema_file = "data/schema.json"\n'
        (folder / "site.toml").write_text(f'{text}[server]\naddress = "127.0.0.1:9"\n', encoding="utf-8")
        (folder / "site.toml").chmod(0o644)
        settings = SiteSettings.load(folder / "site.toml")
        enrol(settings, declared_patients=84)
        keys = folder / "keys"
        (keys / "site.crt").write_bytes(authority.issue_site((keys / f"{NAME}.csr").read_bytes(), site=NAME))
        (keys / "ca.crt").write_bytes(authority.certificate_pem)
        Approvals(settings.daemon.approved).add(Bundle("a" * 64, installed_files()), by="it")
        Journal(settings.site.private / JOURNAL).append("started")
        examine(settings, offline=True)  # another user may not be able to read the libraries that this imports
        yield settings


@pytest.fixture
def alone(hospital: SiteSettings) -> SiteSettings:
    """The site, all of it one user's."""
    for path in (hospital.file.parent, *hospital.file.parent.rglob("*")):
        os.chown(path, ALONE, ALONE if IS_ROOT else -1)
    require_code(ALONE)
    return hospital


def require_code(user: int) -> None:
    with as_user(user):
        is_readable = bool(installed_files())
    if not is_readable:
        pytest.skip("the code under test lies in a folder that is closed to other users")


def problems(findings: list[Finding]) -> list[tuple[str, str]]:
    """Area and text of each problem."""
    assert all(each.remedy for each in findings if each.is_problem)
    return [(each.area, each.text) for each in findings if each.is_problem]


CLOSED = {
    "keys/site.key": ["files"],
    "keys/node.key": ["files"],
    "keys/site.crt": ["files"],
    "keys/ca.crt": ["files"],
    "keys/runtime.secret": ["files"],
    "approved.json": ["approvals"],
    "private/policy.toml": ["policy"],
    "private/ledger.sqlite": ["ledger"],
    "private/witness/ledger.json": ["ledger"],
    "private/secret.key": ["secret"],
    "private/audit.jsonl": ["log"],
    "data/patients.csv": ["table"],
    "data/schema.json": ["table"],
    "keys": ["files"] * 6,
    "private/witness": ["ledger"],
    "private": ["files", "policy", "ledger", "ledger", "secret", "log"],
    "data": ["table"] * 2,
}


@pytest.mark.parametrize("name", CLOSED)
def test_what_is_closed_to_this_user_is_not_called_missing(alone: SiteSettings, name: str) -> None:
    path = alone.file.parent / name
    path.chmod(0o000)
    with as_user(ALONE):
        found = examine(alone, offline=True)
    path.chmod(0o700)
    assert [area for area, _ in problems(found)] == CLOSED[name], found
    for _, text in problems(found):
        assert text.startswith(f"'{path}")
        assert text.endswith("' is not readable by this user")


def test_what_may_leave_is_not_told_by_somebody_who_may_not_read_it(alone: SiteSettings) -> None:
    alone.site.schema_file.chmod(0o000)
    with as_user(ALONE):
        found = [each for each in examine(alone, offline=True) if each.area == "leaves"]
    assert [(each.level, each.text) for each in found] == [
        ("note", f"not told: '{alone.site.schema_file}' is not readable by this user")
    ]


@pytest.mark.parametrize(("name", "area"), [("ledger.sqlite", "ledger"), ("audit.jsonl", "log")])
def test_what_the_daemon_could_not_write_is_told_beside_what_it_says(alone: SiteSettings, name: str, area: str) -> None:
    path = alone.site.private / name
    path.chmod(0o400)
    with as_user(ALONE):
        found = examine(alone, offline=True)
    assert problems(found) == [(area, f"'{path}' is not writable by this user")]
    assert [each.area for each in found if each.level == "ok" and str(path) in each.text] == [area]


def test_a_user_who_may_read_everything_is_told_of_nothing(alone: SiteSettings) -> None:
    with as_user(ALONE):
        assert problems(examine(alone, offline=True)) == []

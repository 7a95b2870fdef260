"""What the doctor says where it may not look at everything: one user with closed files, and two with a half each.

Root may look at all, so that under root the doctor looks as another user: the process takes the number of one for that
time. The two users have the files as ``deploy/systemd`` gives them out.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from client.bundles import Approvals, Bundle, installed_files
from client.check import examine
from client.enrolment import enrol
from client.findings import Finding
from client.journal import Journal
from client.node import require_closed_keys, tls_context
from client.places import DAEMON_LOCK, DEBUG_LOG, JOURNAL, LEDGER, SECRET, TRAINER_LOCK, WITNESS
from client.runner import Runner
from client.settings import SiteSettings
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.pki import Authority

NAME = "st-mary"
IS_ROOT = os.geteuid() == 0
ALONE = 20_003 if IS_ROOT else os.geteuid()
NETWORK, DATA, SHARED = 20_001, 20_002, 20_000
NUMBERS = {"root": 0, "mcrage-net": NETWORK, "mcrage-data": DATA, "mcrage": SHARED}
HALVES = {"network": NETWORK, "data": DATA}
STATE = Path("/var/lib/mcrage-site")
TMPFILES = Path(__file__).parents[2] / "deploy/systemd/mcrage-site.tmpfiles.conf"

takes_root = pytest.mark.skipif(not IS_ROOT, reason="taking the number of another user takes root")


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
def hospital(
    site_dir: Path, authority: Authority, listen: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> Iterator[SiteSettings]:
    """An enrolled site with all of its files and a server, in a folder that others can reach, unlike pytest's own."""
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    answer = f"HTTP/1.1 404 X\r\nDate: {format_datetime(datetime.now(UTC), usegmt=True)}\r\nContent-Length: 0\r\n\r\n"
    with tempfile.TemporaryDirectory() as name, listen(answer.encode(), authority=authority) as server:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data").mkdir()
        shutil.copy(site_dir / "site-01.csv", folder / "data/patients.csv")
        shutil.copy(site_dir / "schema.json", folder / "data/schema.json")
        text = f'[site]\nname = "{NAME}"\ndata = "data/patients.csv"\nschema_file = "data/schema.json"\n'
        (folder / "site.toml").write_text(f'{text}[server]\naddress = "{server.address}"\n', encoding="utf-8")
        (folder / "site.toml").chmod(0o644)
        settings = SiteSettings.load(folder / "site.toml")
        enrol(settings, declared_patients=84)
        keys = folder / "keys"
        (keys / "site.crt").write_bytes(authority.issue_site((keys / f"{NAME}.csr").read_bytes(), site=NAME))
        (keys / "ca.crt").write_bytes(authority.certificate_pem)
        Approvals(settings.daemon.approved).add(Bundle("a" * 64, installed_files()), by="it")
        Journal(settings.site.private / JOURNAL).append("started")
        examine(settings, offline=False)  # another user may not be able to read the libraries that this imports
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


@pytest.fixture
def parted(hospital: SiteSettings) -> SiteSettings:
    """The site as ``deploy/systemd`` gives it to two users."""
    folder = hospital.file.parent
    for path in folder.rglob("*"):
        os.chown(path, 0, 0)
        path.chmod(0o700 if path.is_dir() else 0o600)
    for line in TMPFILES.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            _, name, mode, user, group = line.split()
            path = folder / Path(name).relative_to(STATE)
            if path.exists():
                os.chown(path, NUMBERS[user], NUMBERS[group])
                path.chmod(int(mode, 8))
    for path in (hospital.site.data, hospital.site.schema_file):  # the runbook's own commands
        give(path, 0, 0o640, group=DATA)
    require_code(NETWORK)
    return hospital


def give(path: Path, user: int, mode: int = 0o600, *, group: int = 0) -> None:
    os.chown(path, user, group)
    path.chmod(mode)


def seen_by(settings: SiteSettings, half: str, *, only: str = "", offline: bool = True) -> list[Finding]:
    """What the user of a half finds about it."""
    with as_user(HALVES[half], SHARED):
        return examine(settings, offline=offline, only=only or half)


@takes_root
def test_two_users_each_find_their_half_in_order(parted: SiteSettings) -> None:
    network, data = (seen_by(parted, half, offline=False) for half in HALVES)
    assert [(each.area, each.level) for each in network] == [
        *[("versions", "ok"), ("files", "ok"), ("files", "ok"), ("keys", "ok"), ("approvals", "ok"), ("disk", "ok")],
        *[("server", "ok"), ("server", "ok")],
    ]
    assert [(each.area, each.level) for each in data if each.area != "leaves"] == [
        *[("versions", "ok"), ("files", "ok"), ("files", "ok"), ("approvals", "ok"), ("policy", "ok")],
        *[("ledger", "ok"), ("ledger", "note"), ("ledger", "ok"), ("secret", "ok"), ("table", "ok"), ("table", "ok")],
        *[("disk", "ok"), ("log", "ok")],
    ]
    assert "leaves" in {each.area for each in data}


@takes_root
def test_a_secret_that_root_gives_to_both_halves_through_a_link_is_in_order(parted: SiteSettings) -> None:
    secret = parted.daemon.secret
    given = secret.rename(parted.file.parent / "given")  # as Kubernetes mounts a secret
    give(given, 0, 0o440, group=SHARED)
    secret.symlink_to(given)
    assert [problems(seen_by(parted, half)) for half in HALVES] == [[], []]
    given.chmod(0o444)
    assert [problems(seen_by(parted, half)) for half in HALVES] == [
        [("files", f"'{secret}' is open to others (mode 0444)")]
    ] * 2


@takes_root
def test_where_the_doctor_finds_no_fault_the_programs_of_both_users_can_begin(parted: SiteSettings) -> None:
    with as_user(NETWORK, SHARED):
        require_closed_keys(parted)
        tls_context(parted)
        locks = [lock_file(parted.server.key.with_name(DAEMON_LOCK.format(part="network")))]
    with as_user(DATA, SHARED):
        Runner(parted)
        locks += [lock_file(parted.site.private / each) for each in (DAEMON_LOCK.format(part="data"), TRAINER_LOCK)]
    for half in HALVES:
        assert problems(seen_by(parted, half)) == []
    for lock in locks:
        assert lock is not None
        os.close(lock)


@takes_root
def test_without_only_each_user_is_told_what_it_may_not_read(parted: SiteSettings) -> None:
    closed = "is not readable by this user"
    network = problems(seen_by(parted, "network", only="both"))
    assert [area for area, text in network if text.endswith(closed)] == [
        *("files", "policy", "ledger", "ledger", "secret", "table", "table", "log")
    ]
    assert len(network) == 8
    data = problems(seen_by(parted, "data", only="both", offline=False))
    assert [text for _, text in data if text.endswith(closed)] == [
        f"'{path}' {closed}" for path in (parted.server.key, parted.server.node_key)
    ]
    others = [text.partition("' ")[2] for _, text in data if not text.endswith(closed)]
    assert others == [f"belongs to user {NETWORK}, and this is run by user {DATA}"] * 4, (
        "the other things in its folder"
    )


Break = Callable[[SiteSettings], object]
CLOSED_TO, FOREIGN = "is not readable by this user", "is readable by this user, and is the other half's"
WRONG: dict[str, tuple[str, Break, str, str]] = {
    "key of the other user": ("network", lambda s: give(s.server.key, DATA), "files", CLOSED_TO),
    "keys of root": ("network", lambda s: give(s.server.node_key, 0), "files", CLOSED_TO),
    "folder of keys is root's": (
        "network",
        lambda s: give(s.server.key.parent, 0, 0o750, group=SHARED),
        "files",
        f"belongs to user 0, and this is run by user {NETWORK}",
    ),
    "folder of keys cannot be written": (
        "network",
        lambda s: give(s.server.key.parent, NETWORK, 0o550, group=SHARED),
        "files",
        "is not writable by this user",
    ),
    "lock left by root": (
        "network",
        lambda s: touch(s.server.key.with_name(DAEMON_LOCK.format(part="network"))),
        "files",
        CLOSED_TO,
    ),
    "certificate of root alone": ("network", lambda s: give(s.server.certificate, 0), "files", CLOSED_TO),
    "approvals of root alone": ("network", lambda s: give(s.daemon.approved, 0), "approvals", CLOSED_TO),
    "approvals of the other user": (
        "network",
        lambda s: give(s.daemon.approved, DATA, 0o644),
        "approvals",
        "must be a file of root or this user",
    ),
    "table open to all": (
        "network",
        lambda s: (s.site.data.parent.chmod(0o755), s.site.data.chmod(0o644)),
        "files",
        FOREIGN,
    ),
    "private folder of root": ("data", lambda s: give(s.site.private, 0, 0o700), "files", CLOSED_TO),
    "policy of root alone": ("data", lambda s: give(s.site.private / "policy.toml", 0), "policy", CLOSED_TO),
    "ledger of root": ("data", lambda s: give(s.site.private / LEDGER, 0), "ledger", CLOSED_TO),
    "folder of the witness cannot be written": (
        "data",
        lambda s: give((s.site.private / WITNESS).parent, 0, 0o755),
        "files",
        "is not writable by this user",
    ),
    "secret of the other user": ("data", lambda s: give(s.site.private / SECRET, NETWORK), "secret", CLOSED_TO),
    "debug log left by root": ("data", lambda s: touch(s.site.private / DEBUG_LOG), "files", CLOSED_TO),
    "lock is a link": (
        "data",
        lambda s: (s.site.private / TRAINER_LOCK).symlink_to("elsewhere"),
        "files",
        "is a link, where the file itself is needed",
    ),
    "audit log of root": ("data", lambda s: give(s.site.private / JOURNAL, 0), "log", CLOSED_TO),
    "table of another group": ("data", lambda s: give(s.site.data, 0, 0o640, group=NETWORK), "table", CLOSED_TO),
    "table missing": ("data", lambda s: s.site.data.unlink(), "table", "there is no such file"),
    "shared secret closed": ("data", lambda s: give(s.daemon.secret, NETWORK), "files", CLOSED_TO),
    "shared secret of a third user": (
        "data",
        lambda s: give(s.daemon.secret, ALONE, 0o640, group=SHARED),
        "files",
        f"belongs to user {ALONE}, and this is run by user {DATA}",
    ),
    "key open to the group": (
        "data",
        lambda s: give(s.server.key, NETWORK, 0o640, group=SHARED),
        "files",
        FOREIGN,
    ),
    "approvals of the user with the network": (
        "data",
        lambda s: give(s.daemon.approved, NETWORK, 0o644),
        "approvals",
        "must be a file of root or this user",
    ),
}


def touch(path: Path) -> None:
    path.touch(0o600)


@takes_root
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_for_a_half_is_found_by_its_user(parted: SiteSettings, name: str) -> None:
    half, break_it, area, text = WRONG[name]
    break_it(parted)
    found = problems(seen_by(parted, half, offline=False))
    assert [each for each, _ in found][:1] == [area], found
    assert text in found[0][1]
    if name != "private folder of root":
        assert len(found) == 1, found


@pytest.mark.parametrize(("only", "other"), [("network", "data/patients.csv"), ("data", "keys/site.key")])
def test_one_user_who_has_both_halves_is_told_that_they_are_not_apart(
    alone: SiteSettings, only: str, other: str
) -> None:
    with as_user(ALONE):
        found = examine(alone, offline=False, only=only)
    assert problems(found) == []
    [note] = [each for each in found if each.level == "note" and each.area == "files"]
    assert note.text.startswith(f"'{alone.file.parent / other}' is the other half's and readable by this user")


def test_a_half_that_there_is_not_is_refused(hospital: SiteSettings) -> None:
    with pytest.raises(ConfigError, match="--only: expected network or data, it is 'keys'"):
        examine(hospital, offline=True, only="keys")

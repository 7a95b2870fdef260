"""``python -m client``: what it says, and with which exit code it ends."""

import getpass
import hashlib
import io
import json
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import __main__ as command
from client.bundles import INSTALLED, Approvals, Bundle
from client.journal import Journal
from client.places import JOURNAL, LEDGER, WITNESS
from client.settings import SiteSettings
from mcrage.files import lock_file

Call = Callable[..., tuple[int, str, str]]
CELL = "Mrs Example"
COMMANDS = [("enroll",), ("check",), ("approve",), ("run",), ("audit", "verify"), ("audit", "show")]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command; gives the exit code, and what it says on both streams."""
    monkeypatch.delenv("MCRAGE_DEBUG", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["client", *map(str, arguments)])
        code: object = 0
        try:
            command.main()
        except SystemExit as end:
            code = end.code or 0
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        assert "PRIVATE" not in said.out + said.err
        assert all(line.isprintable() for line in (said.out + said.err).splitlines())
        return int(str(code)), said.out, said.err

    return run


@pytest.fixture
def settings(new_site: Callable[..., SiteSettings]) -> SiteSettings:
    made: SiteSettings = new_site()
    return made


@pytest.fixture
def app(bundle: bytes, tmp_path: Path) -> Path:
    """The file that a coordinator sends."""
    (tmp_path / "app.fab").write_bytes(bundle)
    return tmp_path / "app.fab"


def changed(bundle: bytes, path: Path, **files: str) -> Path:
    """Another bundle, with files more."""
    content = io.BytesIO(bundle)
    with zipfile.ZipFile(content, "a") as archive:
        for name, text in files.items():
            archive.writestr(name.replace("__", "/"), text)
    path.write_bytes(content.getvalue())
    return path


def arguments_of(each: tuple[str, ...], site: Path) -> list[object]:
    return [*each, site, *([site.parent / "app.fab"] if each == ("approve",) else [])]


@pytest.mark.parametrize("each", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read: No such file"), ("site = [", "is not TOML"), ("", "site: field required")],
)
def test_settings_that_are_missing_or_damaged_are_told_in_lines(
    each: tuple[str, ...], text: str | None, words: str, call: Call, tmp_path: Path
) -> None:
    site = tmp_path / "site.toml"
    if text is not None:
        site.write_text(text)
        site.chmod(0o600)
    code, out, err = call(*arguments_of(each, site))
    assert (code, out) == (2, "")
    assert words in err.splitlines()[0]
    assert all(str(site) in line for line in err.splitlines())


@pytest.mark.parametrize(
    "arguments", [["rows"], ["run"], ["run", "site.toml", "--fast"], ["audit", "show", "x", "--last", "0"]]
)
def test_wrong_usage_has_exit_code_2(arguments: list[str], call: Call) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert "Usage: python -m client" in err


def test_help_names_every_command(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in ("enroll", "check", "approve", "run", "audit"))


def test_a_site_enrols_once_changes_its_key_and_is_told_what_to_do(call: Call, settings: SiteSettings) -> None:
    fresh = settings.file.parent / "fresh"
    fresh.mkdir()
    site = fresh / "site.toml"
    site.write_bytes(settings.file.read_bytes())
    site.chmod(0o600)
    code, out, err = call("enroll", site)
    assert (code, out) == (2, "")
    assert err == "--patients: give the number of training patients that the hospital makes public\n"
    assert call("enroll", site, "--rotate")[0] == 2, "there is no key yet"
    code, out, err = call("enroll", site, "--patients", 84)
    assert (code, err) == (0, "")
    assert [line[:2] for line in out.splitlines()] == ["1.", "2.", "3.", "Th"]
    code, out, err = call("enroll", site, "--patients", 84)
    assert (code, out) == (2, "")
    assert "there is a key already" in err
    assert call("enroll", site, "--rotate")[0] == 0
    code, _, err = call("enroll", site, "--change-over")
    assert (code, err) == (2, f"{fresh / 'keys' / 'site.crt.new'}: not there yet\n")


def test_what_the_privacy_of_patients_rests_on_has_exit_code_3(call: Call, settings: SiteSettings) -> None:
    for name in (LEDGER, WITNESS):
        (settings.site.private / name).unlink()
    settings.server.key.unlink()
    settings.server.node_key.unlink()
    code, out, err = call("enroll", settings.file, "--patients", 84)
    assert (code, out) == (3, "")
    assert "a secret and no ledger" in err


def test_a_file_that_cannot_be_used_is_named(call: Call, settings: SiteSettings) -> None:
    text = settings.file.read_text().replace("[server]", 'private = "table.csv/private"\n[server]')
    settings.file.write_text(text)
    settings.server.key.unlink()
    settings.server.node_key.unlink()
    code, out, err = call("enroll", settings.file, "--patients", 84)
    assert (code, out) == (2, "")
    assert "table.csv" in err
    assert "cannot be used: Not a directory" in err


def test_the_text_of_an_error_that_nobody_foresaw_is_not_shown(
    call: Call, settings: SiteSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> dict[str, Any]:
        raise KeyError(CELL)

    monkeypatch.setattr(tomllib, "loads", fail)
    code, out, err = call("check", settings.file)
    assert (code, out, err) == (1, "", "unexpected KeyError; set MCRAGE_DEBUG=1 to see where\n")
    monkeypatch.setenv("MCRAGE_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["client", "check", str(settings.file)])
    with pytest.raises(KeyError, match=CELL):
        command.main()


def test_check_tells_what_is_wrong_and_ends_with_code_2(call: Call, settings: SiteSettings) -> None:
    settings.site.schema_file.unlink()
    code, out, _ = call("check", settings.file, "--offline")
    assert code == 2
    assert any(line.startswith("problem table: ") for line in out.splitlines())
    code, out, _ = call("check", settings.file, "--offline", "--json")
    assert code == 2
    assert {"area", "level", "text", "remedy"} == set(json.loads(out)[0])


def test_check_looks_at_one_half_where_it_is_asked_to(call: Call, settings: SiteSettings) -> None:
    settings.site.schema_file.unlink()
    _, out, _ = call("check", settings.file, "--only", "network", "--json", "--offline")
    assert {each["area"] for each in json.loads(out)} == {"versions", "files", "approvals", "disk"}
    code, out, _ = call("check", settings.file, "--only", "data")
    assert code == 2
    assert [line.split()[1] for line in out.splitlines() if line.startswith("problem")] == ["table:"]
    expected = "--only: expected network or data, it is 'keys'\n"
    assert call("check", settings.file, "--only", "keys") == (2, "", expected)


def test_approve_shows_what_is_in_a_bundle_before_it_asks(
    call: Call, settings: SiteSettings, app: Path, bundle: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    approvals, digest = Approvals(settings.daemon.approved), hashlib.sha256(bundle).hexdigest()
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    code, out, _ = call("approve", settings.file, app)
    assert (code, approvals.listed()) == (2, [])
    assert out.splitlines()[0] == f"SHA-256 {digest}"
    assert "  client/app.py" in out.splitlines()
    assert "no bundle has been approved before" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    code, out, err = call("approve", settings.file, app)
    assert (code, err) == (0, "")
    assert out.endswith(f"approved: {digest}\n")
    assert [(each[0], each[2]) for each in approvals.listed()] == [(digest, getpass.getuser())]
    assert approvals.require(bundle) == digest


def test_approve_shows_the_difference_to_the_last_one(
    call: Call, settings: SiteSettings, app: Path, bundle: bytes, tmp_path: Path
) -> None:
    assert call("approve", settings.file, app, "--yes")[0] == 0
    code, out, _ = call("approve", settings.file, app, "--yes")
    assert code == 0
    assert "since the last approved one:\n  nothing has changed\n" in out
    other = changed(bundle, tmp_path / "other.fab", server__app="x", pyproject="y")
    code, out, _ = call("approve", settings.file, other, "--yes")
    assert code == 0
    assert "since the last approved one:\n  pyproject: only in this bundle\n  server/app: only in this bundle\n" in out
    assert len(Approvals(settings.daemon.approved).listed()) == 2


def test_approve_refuses_other_code_than_is_installed(
    call: Call, settings: SiteSettings, bundle: bytes, tmp_path: Path
) -> None:
    other = changed(bundle, tmp_path / "other.fab", **{"client__spy.py": "import os"})
    code, out, err = call("approve", settings.file, other, "--yes")
    assert code == 2
    assert "client/spy.py" in out
    assert err.splitlines() == [
        "the bundle is of another version than the code installed here; install that one first",
        "  client/spy.py: only in the bundle",
    ]
    assert not settings.daemon.approved.exists()


def test_an_approval_can_be_taken_back_once(call: Call, settings: SiteSettings, app: Path, bundle: bytes) -> None:
    digest = hashlib.sha256(bundle).hexdigest()
    Approvals(settings.daemon.approved).add(Bundle.read(bundle), by="test")
    assert call("approve", settings.file, app, "--withdraw") == (0, f"withdrawn: {digest}\n", "")
    assert Approvals(settings.daemon.approved).listed() == []
    code, out, err = call("approve", settings.file, app, "--withdraw")
    assert (code, out, err) == (2, "", f"no bundle with SHA-256 {digest} is approved\n")


def test_what_is_no_bundle_or_cannot_be_noted_is_refused(
    call: Call, settings: SiteSettings, app: Path, tmp_path: Path
) -> None:
    with (tmp_path / "large.fab").open("wb") as large:
        large.truncate(2**33)  # takes no room on the disk, and would in memory
    (tmp_path / "garbage.fab").write_bytes(b"garbage")
    words = {
        "large.fab": "at most",
        "garbage.fab": "not a zip file",
        "nothing.fab": "No such file",
        ".": "Is a directory",
    }
    for name, text in words.items():
        code, out, err = call("approve", settings.file, tmp_path / name, "--yes")
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert text in err
    settings.daemon.approved.mkdir()
    code, _, err = call("approve", settings.file, app, "--yes")
    assert (code, len(err.splitlines())) == (2, 1)


def test_a_user_without_a_name_is_noted_by_number(
    call: Call, settings: SiteSettings, app: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_294_000_000)
    assert call("approve", settings.file, app, "--yes")[0] == 0
    entries = json.loads(settings.daemon.approved.read_text())
    assert [each["by"] for each in entries] == ["4294000000"]


@pytest.mark.parametrize("only", ["", "all", "network,data"])
def test_run_knows_two_halves(only: str, call: Call, settings: SiteSettings) -> None:
    expected = f"--only: expected network or data, it is {only!r}\n"
    assert call("run", settings.file, "--only", only) == (2, "", expected)


def test_run_ends_where_another_daemon_is_running(call: Call, settings: SiteSettings) -> None:
    lock = lock_file(settings.site.private / "daemon-data.lock")
    assert lock is not None
    assert call("run", settings.file) == (2, "", "another daemon of site st-mary is running\n")
    os.close(lock)


def test_the_audit_log_is_shown_and_checked(call: Call, settings: SiteSettings) -> None:
    path = settings.site.private / JOURNAL
    for arguments in (("verify",), ("show",)):
        code, out, err = call("audit", *arguments, settings.file)
        assert (code, out, err) == (2, "", f"'{path}' is not there; the daemon begins it\n")
    heads = [Journal(path).append("train", round=number) for number in range(30)]
    assert call("audit", "verify", settings.file) == (0, f"{path}: 30 lines, head {heads[-1]}\n", "")
    assert call("audit", "verify", settings.file, "--expect-head", heads[4], "--expect-lines", 5)[0] == 0
    code, out, err = call("audit", "verify", settings.file, "--expect-head", "0" * 63 + "1")
    assert (code, err) == (2, "no entry has the hash that was kept elsewhere: the log was made anew\n")
    code, out, _ = call("audit", "show", settings.file, "--last", 3)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["28", "29", "30"]
    assert out.splitlines()[-1].endswith(" train round=29")
    code, out, _ = call("audit", "show", settings.file, "--last", 2, "--json")
    assert [json.loads(line)["hash"] for line in out.splitlines()] == heads[-2:]


def test_an_altered_audit_log_is_told_by_both(call: Call, settings: SiteSettings) -> None:
    path = settings.site.private / JOURNAL
    for number in range(3):
        Journal(path).append("train", round=number)
    path.write_bytes(path.read_bytes().replace(b'"round":1', b'"round":9'))
    code, out, err = call("audit", "verify", settings.file)
    assert code == 2
    assert "line 2: it is not as it was written" in err.splitlines()
    assert out.startswith(f"{path}: 3 lines, head ")
    code, out, _ = call("audit", "show", settings.file)
    assert code == 0
    assert out.splitlines()[1] == "line 2 is damaged"
    code, out, _ = call("audit", "show", settings.file, "--json")
    assert json.loads(out.splitlines()[1]) == {"damaged": 2}


def test_it_is_a_program_that_starts_without_what_trains_models(tmp_path: Path) -> None:
    script = "import sys, client.__main__; print(sorted({'torch', 'flwr', 'pandas'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=INSTALLED, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "[]\n")
    site = tmp_path / "nothing.toml"
    ended = subprocess.run(
        [sys.executable, "-m", "client", "check", str(site)], capture_output=True, text=True, cwd=INSTALLED, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"'{site}' cannot be read: No such file or directory\n"

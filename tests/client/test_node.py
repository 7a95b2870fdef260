"""What the SuperNode of a hospital does and Flower's own does not, shown with Flower's code and without a coordinator.

That this code is the one that was read is shown in tests/architecture/test_flower.py.
"""

import ast
import hashlib
import inspect
import io
import ssl
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr
import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import Status
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from client import node
from client.bundles import INSTALLED, Approvals, Bundle
from client.settings import SiteSettings
from mcrage.errors import ConfigError
from mcrage.pki import Authority
from mcrage.refusals import RUNTIME_FAILURES

NewSite = Callable[..., SiteSettings]
Listen = Callable[..., Any]
Pull = Callable[..., NodeState]

REPLACED = [
    (fleet_http_connection, "FleetHttpClient"),
    *((start_client_internal, name) for name in ("_pull_and_store_message", "_verify_fab", "time")),
]
CANARY = b"what only the coordinator may see"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture
def unhardened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts Flower's parts back after the test."""
    for module, name in REPLACED:
        monkeypatch.setattr(module, name, getattr(module, name))


@pytest.fixture
def pull(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pull:
    """Has Flower's SuperNode take an instruction of a run with a bundle; gives its state."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 5, 1, 1
    message = Message(RecordDict({"config": ConfigRecord({"x": 1})}), 7, "query.describe")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}

    def take(content: bytes, claims: dict[str, str] | None = None, *, ends: str = "") -> NodeState:
        def the_run_ends() -> None:
            if ends == "answered":  # which the runner may be sooner than the coordinator hears that it came
                start_client_internal._insert_message(Message(Error(9), reply_to=message), state, stores.store())
            raise RunNotRunningException

        stores = ObjectStoreFactory()
        state = NodeStateFactory(stores).state()
        state.set_node_id(7)
        run = Run.create_empty(5)
        run.fab_hash = hashlib.sha256(content).hexdigest()
        run_id = start_client_internal._pull_and_store_message(
            state=state,
            object_store=stores.store(),
            node_config={},
            receive=lambda: (message, get_object_tree(message)),
            get_run=lambda _: run,
            get_fab=lambda fab_hash, _: Fab(fab_hash, content, claims or {}),
            pull_object=lambda _, name: the_run_ends() if ends == "object" else objects[name],
            confirm_message_received=lambda *_: the_run_ends() if ends in ("confirm", "answered") else None,
            trusted_entities=None,
        )
        assert run_id == (None if ends else 5)
        return state

    return take


def is_accepted(state: NodeState) -> bool:
    """Whether there is work on it now; otherwise an error and nothing else."""
    replies = state.get_messages_legacy(is_reply=True)
    has_run = state.get_run(5) is not None
    assert has_run == bool(state.get_tasks()) == bool(state.get_messages_legacy(is_reply=False)) == (not replies)
    assert has_run == bool(state.fab_store)  # type: ignore[attr-defined]  # of the state that is kept in memory
    assert all("not approved" in RUNTIME_FAILURES[reply.error.code] for reply in replies)
    return has_run


def files_of(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("unhardened")
def test_a_bundle_that_is_not_approved_is_refused_before_anything_of_it_is_kept(
    site: NewSite, pull: Pull, bundle: bytes, tmp_path: Path
) -> None:
    settings = site()
    approvals = Approvals(settings.daemon.approved)
    node.harden(settings)
    before = files_of(settings.file.parent, tmp_path)
    assert not is_accepted(pull(bundle))
    claims = {"valid_license": "yes", "hospital": '{"signature": "", "signed_at": 0}'}
    assert not is_accepted(pull(bundle, claims))
    assert not is_accepted(pull(b"no zip file"))
    assert files_of(settings.file.parent, tmp_path) == before
    approvals.add(Bundle.read(bundle), by="test")
    state = pull(bundle)
    assert is_accepted(state)
    assert state.get_tasks()[0].type == "flwr-clientapp"
    assert not is_accepted(pull(bundle + b"\0"))
    approvals.withdraw(Bundle.read(bundle).digest)
    assert not is_accepted(pull(bundle))
    assert files_of(settings.file.parent, tmp_path) - before == {settings.daemon.approved}


def test_flower_by_itself_takes_any_bundle(pull: Pull, bundle: bytes) -> None:
    assert is_accepted(pull(bundle))


@pytest.mark.usefixtures("unhardened")
def test_a_bundle_is_refused_and_the_node_lives_on(
    site: NewSite, pull: Pull, bundle: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    settings, other = site(), io.BytesIO(bundle)
    with zipfile.ZipFile(other, "a") as archive:
        archive.writestr("client/more.py", "raise SystemExit")
    approved = settings.daemon.approved
    node.harden(settings)
    for each in (bundle, other.getvalue()):
        Approvals(approved).add(Bundle.read(each), by="test")
    assert not is_accepted(pull(other.getvalue()))
    assert "code 2010" in caplog.text
    assert "client/more.py: only in the bundle" in caplog.text
    assert is_accepted(pull(bundle))
    approved.chmod(0o666)
    assert not is_accepted(pull(bundle))
    approved.chmod(0o644)
    approved.write_text("[[[")
    assert not is_accepted(pull(bundle))
    assert f"'{approved}' is not a list of approvals" in caplog.text


@pytest.mark.usefixtures("unhardened")
@pytest.mark.parametrize("ends", ["object", "confirm", "answered"])
@pytest.mark.parametrize("is_hardened", [True, False])
def test_half_an_instruction_of_a_run_that_has_ended_leaves_neither_work_nor_a_reply(
    site: NewSite, pull: Pull, bundle: bytes, ends: str, is_hardened: bool
) -> None:
    """Flower by itself has the runner wait for hours for the other half, and sends each reply one instruction late."""
    settings = site()
    Approvals(settings.daemon.approved).add(Bundle.read(bundle), by="test")
    if is_hardened:
        node.harden(settings)
    state = pull(bundle, ends=ends)
    assert bool(state.get_tasks(statuses=[Status.PENDING])) == (not is_hardened)
    assert bool(state.get_messages_legacy(is_reply=True)) == (not is_hardened and ends == "answered")


@pytest.mark.usefixtures("unhardened")
def test_a_part_that_flower_has_no_more_is_told(site: NewSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(start_client_internal, "_verify_fab")
    with pytest.raises(ConfigError, match=r"start_client_internal .* has no _verify_fab: install flwr==1\.41\.0"):
        node.harden(site())


def test_another_version_of_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    node.require_flower()
    monkeypatch.setattr(flwr, "__version__", "1.42.0")
    with pytest.raises(ConfigError, match=r"flwr 1\.41\.0 is needed here, 1\.42\.0 is installed"):
        node.require_flower()


def push(kind: Any, settings: SiteSettings, address: str) -> None:
    """Sends something to the coordinator as Flower's connection does."""
    with kind.from_server_address(address, False, settings.server.ca.read_bytes(), []) as client:
        client.PushObject(PushObjectRequest(object_content=CANARY))


def test_the_coordinator_sees_the_certificate_of_the_site_which_compares_the_clocks(
    site: NewSite, authority: Authority, listen: Listen, caplog: pytest.LogCaptureFixture
) -> None:
    date = format_datetime(datetime.now(UTC) - timedelta(minutes=10), usegmt=True)
    answer = f"HTTP/1.1 200 OK\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode()
    with listen(answer, authority=authority) as server:
        settings = site(server.address)
        kind = node.pinned_client(settings)
        for each in (kind, FleetHttpClient, kind):
            push(each, settings, server.address)
    assert server.names == ["st-mary", "", "st-mary"]
    assert server.received.count(CANARY) == 3
    assert caplog.text.count("this machine's clock differs from the server's by +60") == 1


@pytest.mark.parametrize("fault", ["other authority", "other host", "expired", "not yet valid", "no TLS"])
def test_nothing_is_sent_to_a_server_that_is_not_the_federations(
    fault: str, site: NewSite, authority: Authority, listen: Listen, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    others: dict[str, dict[str, Any]] = {
        "other authority": {"authority": Authority.create(tmp_path / "other", name="Federation")},
        "other host": {"authority": authority, "host": "127.0.0.2"},
        "expired": {"authority": authority, "at": now - timedelta(days=8), "days": 7},
        "not yet valid": {"authority": authority, "at": now + timedelta(days=2)},
        "no TLS": {},
    }
    with listen(EMPTY, **others[fault]) as server:
        settings = site(server.address)
        with pytest.raises(httpx.ConnectError):
            push(node.pinned_client(settings), settings, server.address)
    assert server.connections == 1
    assert server.received == b"" if fault != "no TLS" else b"HTTP" not in server.received
    assert CANARY not in server.received


def test_the_client_is_of_one_server_and_never_without_tls(site: NewSite) -> None:
    settings = site("localhost:8443")
    for own in ("[::1]:8443", "10.0.0.5:443", "Federation.Example.org:443", "localhost:8443"):
        its = settings.model_copy(update={"server": settings.server.model_copy(update={"address": own})})
        kind = node.pinned_client(its)
        kind.from_server_address(own, False, None, []).close()
    for address, insecure in (("localhost:8444", False), ("127.0.0.1:8443", False), ("localhost:8443", True)):
        with pytest.raises(ConfigError, match="in the place of https://localhost:8443"):
            kind.from_server_address(address, insecure, None, [])


def test_a_redirect_is_not_followed_as_it_would_be_by_flower(
    site: NewSite, authority: Authority, listen: Listen
) -> None:
    with listen(EMPTY) as elsewhere:
        answer = f"HTTP/1.1 307 X\r\nLocation: http://{elsewhere.address}/x\r\nContent-Length: 0\r\n\r\n".encode()
        with listen(answer, authority=authority) as server:
            settings = site(server.address)
            with pytest.raises(httpx.HTTPStatusError, match="307"):
                push(node.pinned_client(settings), settings, server.address)
            assert elsewhere.connections == 0
            push(FleetHttpClient, settings, server.address)
    assert elsewhere.connections == 1
    assert b"POST /x" in elsewhere.received, "in plain text, to wherever the server says"


def endless(head: bytes) -> Iterator[bytes]:
    yield head
    for _ in range(2_000):
        yield b"10000\r\n" + bytes(2**16) + b"\r\n"


@pytest.mark.parametrize("status", [200, 307, 500])
@pytest.mark.parametrize(
    "header",
    [
        *("Transfer-Encoding: chunked", "X: y", f"Content-Length: {2**26 + 1}", f"Content-Length: {'9' * 18}"),
        "Content-Encoding: gzip\r\nContent-Length: 60000000",
    ],
)
def test_an_answer_without_an_end_or_that_may_unpack_to_any_size_is_not_read(
    status: int, header: str, site: NewSite, authority: Authority, listen: Listen
) -> None:
    answer = endless(f"HTTP/1.1 {status} X\r\n{header}\r\n\r\n".encode())
    with listen(answer, authority=authority) as server:
        settings = site(server.address)
        with pytest.raises(httpx.UnsupportedProtocol, match="no length of at most 67,108,864 bytes"):
            push(node.pinned_client(settings), settings, server.address)
    assert server.sent < 16 * 2**20, "what the system keeps for a connection, of 125 MB"
    assert b"accept-encoding: identity" in server.received.lower()


@pytest.mark.parametrize("is_wanted", [False, True])
def test_a_proxy_of_the_environment_is_used_only_where_the_hospital_says_so(
    is_wanted: bool, site: NewSite, authority: Authority, listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    refusal = b"HTTP/1.1 403 X\r\nContent-Length: 0\r\n\r\n"
    with listen(refusal) as proxy, listen(EMPTY, authority=authority) as server:
        for name in ("HTTPS_PROXY", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.address}")
        settings = site(server.address, f"proxy_from_environment = {str(is_wanted).lower()}\n")
        with pytest.raises(httpx.ProxyError) if is_wanted else nullcontext():
            push(node.pinned_client(settings), settings, server.address)
    assert (proxy.connections, server.connections) == ((1, 0) if is_wanted else (0, 1))
    assert proxy.received.startswith(f"CONNECT {server.address} ".encode() if is_wanted else b"")
    assert CANARY not in proxy.received


def test_clocks_that_differ_are_told_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, now = node.ClockWatch(), [1_000.0]
    monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for minutes, told in ((0, 0), (10, 1), (-10, 1), (10, 1)):
        date = datetime.now(UTC) - timedelta(minutes=minutes)
        watch.look(httpx.Response(200, headers={"date": format_datetime(date, usegmt=True)}))
        assert caplog.text.count("clock differs") == told
    assert "by +60" in caplog.text
    now[0] += 61
    watch.look(httpx.Response(200, headers={"date": format_datetime(date, usegmt=True)}))
    assert caplog.text.count("clock differs") == 2


def test_a_date_of_any_kind_gives_seconds_or_nothing() -> None:
    here = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert node.clock_difference({"date": "Sun, 01 Mar 2026 11:50:00 GMT"}, here) == 600
    year = "9" * 30
    for date in ("", "x", "Sun, 01 Mar 2026 11:50:00 -0000", f"Sun, 01 Mar {year} 11:50:00 GMT", "Sun, 40 Mar 2026"):
        assert node.clock_difference({"date": date}, here) is None
    assert node.clock_difference({}, here) is None


def test_tls_is_of_version_1_2_or_later_and_needs_files_that_fit(site: NewSite) -> None:
    settings = site()
    context = node.tls_context(settings)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    for path in (settings.server.key, settings.server.certificate, settings.server.ca):
        content = path.read_bytes()
        path.write_bytes(b"-----BEGIN nothing")
        with pytest.raises(ConfigError, match=r"^keys: one of ca\.crt, site\.crt, site\.key"):
            node.tls_context(settings)
        path.unlink()
        with pytest.raises(ConfigError, match=r"^keys: one of"):
            node.tls_context(settings)
        path.write_bytes(content)
    node.tls_context(settings)


def test_the_node_does_not_start_with_a_key_that_others_can_read(site: NewSite) -> None:
    settings = site()
    settings.server.node_key.chmod(0o640)
    command = [sys.executable, "-m", "client.node", str(settings.file)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=INSTALLED, timeout=60)
    words = f"others may use the key '{settings.server.node_key}' (mode 0640); run chmod 600\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", words)
    settings.server.node_key.chmod(0o600)
    node.require_closed_keys(settings)
    settings.server.key.chmod(0o604)
    with pytest.raises(ConfigError, match=r"site\.key' \(mode 0604\)"):
        node.require_closed_keys(settings)
    settings.server.key.unlink()
    with pytest.raises(ConfigError, match=r"site\.key' cannot be used: No such file"):
        node.require_closed_keys(settings)


def test_flower_understands_its_command_line_and_has_no_way_around_tls_in_it(site: NewSite) -> None:
    settings = site("[::1]:8443", "[daemon]\nport = 9123\n")
    asked = vars(_parse_args_run_supernode().parse_args(node.flags(settings)))
    expected = {
        "superlink": "[::1]:8443",
        "insecure": False,
        "root_certificates": str(settings.server.ca),
        "auth_supernode_private_key": str(settings.server.node_key),
        "isolation": "process",
        "superexec_auth_secret_file": str(settings.daemon.secret),
        "host": "127.0.0.1",
        "port": 9123,
        "node_config": None,
        "runtime_dependency_install": False,
    }
    assert {name: asked[name] for name in expected} == expected


def test_the_pause_is_short_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    pace = node.Pace()
    for was_there in (False, False, True):
        pace.saw_work(was_there)
        for seconds in (3, 0.5, 7):
            pace.sleep(seconds)
    assert slept == [3, 0.05, 7, 3, 0.05, 7, 0.25, 0.05, 7]


def test_flowers_loop_sleeps_as_its_pace_expects_and_asks_no_more_of_it() -> None:
    calls = list(ast.walk(ast.parse(inspect.getsource(start_client_internal))))
    used = [each for each in calls if isinstance(each, ast.Attribute) and getattr(each.value, "id", "") == "time"]
    assert {each.attr for each in used} == {"sleep"}
    asked = {ast.unparse(each.args[0]) for each in calls if isinstance(each, ast.Call) and each.func in used}
    assert asked == {"3", "0.5"}

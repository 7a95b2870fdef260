"""The runner of a hospital against Flower's own Runtime API, with the real worker behind it."""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.constant import Status
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run as FlowerRun
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from client import runner
from client.boundary import incoming
from client.bundles import INSTALLED, Approvals, Bundle
from client.journal import read, verify
from client.places import DEBUG_LOG, JOURNAL, LEDGER, POLICY, TRAINER_LOCK, WITNESS
from client.runner import Runner, read_runtime_secret
from client.settings import SiteSettings
from mcrage.errors import ConfigError
from mcrage.files import lock_file
from mcrage.messages import DescribeInstruction
from mcrage.privacy.ledger import PrivacyLedger
from mcrage.refusals import BUSY, ENDED, STOPPED, TOO_LONG, UNLOGGED

NewSite = Callable[..., SiteSettings]
OpenNode = Callable[..., "SuperNode"]
Run = Callable[[SiteSettings, Callable[[], None]], None]
RUN, OTHER_RUN = 5, 6


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def until(is_so: Callable[[], object], *, seconds: float = 60) -> None:
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, "not in time"
        time.sleep(0.005)


def instruction(run: str = "a", *, arrays: int = 0, **changes: Any) -> Message:
    wire = DescribeInstruction(**({"run": run * 64, "test_fraction": 0.3, "marginals": False} | changes)).to_wire()
    content = RecordDict({"config": ConfigRecord(wire.values)})  # type: ignore[arg-type]
    if arrays:
        content["arrays"] = ArrayRecord({"x": Array(np.zeros(arrays, np.float32))})
    return Message(content, 7, "query.describe")


class SuperNode:
    """Flower's SuperNode but for the coordinator: its Runtime API on a port, with instructions as if they had come."""

    def __init__(self, settings: SiteSettings, *, secret: bytes | None = None) -> None:
        self._stores = ObjectStoreFactory()
        factory = NodeStateFactory(self._stores)
        self.state = factory.state()
        self.state.set_node_id(7)
        secret = secret or settings.daemon.secret.read_bytes()
        self._server = uvicorn.Server(
            uvicorn.Config(
                create_app(factory, secret),
                host="127.0.0.1",
                port=settings.daemon.port,
                log_level="error",
                ws="none",
                lifespan="off",
            )
        )
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started, seconds=10)

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    def take(
        self,
        bundle: bytes,
        message: InflatableObject,
        *,
        run_id: int = RUN,
        breaks_off: Callable[[], object] | None = None,
    ) -> None:
        """Has an instruction come in; half of it, where something else is called in the place of the other half."""
        told = message if isinstance(message, Message) else instruction()
        told.metadata.__dict__["_run_id"] = run_id
        told.metadata.__dict__["_message_id"] = message.object_id
        run = FlowerRun.create_empty(run_id)
        run.fab_hash, run.series_id = hashlib.sha256(bundle).hexdigest(), run_id
        objects = {name: each.deflate() for name, each in get_all_nested_objects(message).items()}
        taken = start_client_internal._pull_and_store_message(
            state=self.state,
            object_store=self._stores.store(),
            node_config={},
            receive=lambda: (told, get_object_tree(message)),
            get_run=lambda _: run,
            get_fab=lambda fab_hash, _: Fab(fab_hash, bundle, {}),
            pull_object=lambda _, name: breaks_off() if breaks_off and name == told.object_id else objects[name],
            confirm_message_received=lambda *_: None,
            trusted_entities=None,
        )
        assert taken == (None if breaks_off else run_id)

    def reply(self, *, seconds: float = 60) -> Message:
        """The next reply."""
        found: list[Message] = []
        until(lambda: found.extend(self.state.get_messages_legacy(is_reply=True)) or found, seconds=seconds)
        store = self._stores.store()
        tree = store.get_object_tree(found[0].metadata.message_id)
        until(lambda: b"" not in [store.get(name) for name in (tree.object_id, *(c.object_id for c in tree.children))])
        return pull_and_inflate_object_from_tree(
            tree, lambda name: store.get(name) or b"", lambda _: None, return_type=Message
        )

    def holds(self, text: bytes) -> bool:
        """Whether anything that came from the runner has a text in it."""
        return any(text in entry.content for entry in self._stores.store().store.values())  # type: ignore[attr-defined]

    def ask(self, bundle: bytes, message: Message | None = None, *, run_id: int = RUN) -> Message:
        self.take(bundle, message or instruction(), run_id=run_id)
        return self.reply()


@pytest.fixture(scope="module", autouse=True)
def identity() -> None:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN, 1, 1


@pytest.fixture
def site(new_site: NewSite, bundle: bytes) -> NewSite:
    def make(more: str = "", *, port: int = 0) -> SiteSettings:
        settings: SiteSettings = new_site(more=f"[daemon]\nport = {port or free_port()}\n{more}")
        Approvals(settings.daemon.approved).add(Bundle.read(bundle), by="test")
        return settings

    return make


@pytest.fixture
def open_node() -> Iterator[OpenNode]:
    made: list[SuperNode] = []

    def start(settings: SiteSettings, **others: Any) -> SuperNode:
        made.append(SuperNode(settings, **others))
        return made[-1]

    yield start
    for node in made:
        node.close()


def workers_of(settings: SiteSettings) -> set[int]:
    found = set()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if b"client.worker" in command and os.fsencode(settings.file) in command:
                found.add(int(entry.name))
    return found


def worker_of(settings: SiteSettings, *, other_than: int = 0) -> int:
    until(lambda: workers_of(settings) - {other_than})
    return (workers_of(settings) - {other_than}).pop()


def events(settings: SiteSettings) -> list[tuple[str, int]]:
    """Of the audit log, with the code of replies."""
    return [(entry["event"], entry.get("code", -1)) for entry in read(settings.site.private / JOURNAL)]


def charges(settings: SiteSettings) -> int:
    private = settings.site.private
    with PrivacyLedger.open(private / LEDGER, witness=private / WITNESS) as ledger:
        return len(ledger.rows)


def test_an_instruction_of_which_half_never_comes_holds_up_no_other(
    site: NewSite, run: Run, open_node: OpenNode, bundle: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """As when its run ends while the SuperNode fetches it; the runner has begun with it by then."""
    settings = site()

    def script() -> None:
        node = open_node(settings)

        def end_it() -> None:
            until(lambda: node.state.get_tasks(statuses=[Status.RUNNING]) and "Runtime.PullObject" in caplog.text)
            raise ConnectionAbortedError

        node.take(bundle, instruction(), breaks_off=end_it)
        assert incoming(node.ask(bundle, instruction("b"), run_id=OTHER_RUN)).values["site"] == "st-mary"
        assert "an instruction could not be answered" in caplog.text

    run(settings, script)


def test_instructions_are_answered_logged_and_refused_and_the_runner_outlives_what_it_talks_to(
    site: NewSite, run: Run, open_node: OpenNode, bundle: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    settings = site()
    journal = settings.site.private / JOURNAL

    def script() -> None:
        node = open_node(settings)
        # The worker takes seconds to be ready: meanwhile the log is opened to others.
        node.take(bundle, instruction())
        until(lambda: len(events(settings)) == 2)
        journal.chmod(0o644)
        assert node.reply().error.code == UNLOGGED
        assert charges(settings) == 1, "it was answered, and the answer held back"
        assert not node.holds(b"st-mary")
        assert node.ask(bundle, instruction("b")).error.code == UNLOGGED
        assert charges(settings) == 1, "what cannot be logged is not even tried"
        journal.chmod(0o600)

        assert incoming(node.ask(bundle)).values["site"] == "st-mary"
        assert node.holds(b"st-mary")
        assert events(settings) == [("started", -1), ("instruction", -1), ("instruction", -1), ("reply", 0)]
        worker = worker_of(settings)

        other = bundle + b"\0"
        assert node.ask(other, instruction("b"), run_id=OTHER_RUN).error.code == 2009
        assert (charges(settings), worker_of(settings)) == (1, worker), "no work was begun"

        node.take(bundle, ConfigRecord({"no": "message"}), run_id=8)
        until(lambda: "an instruction could not be answered: TypeError" in caplog.text)

        os.kill(worker, signal.SIGSTOP)
        number = len(events(settings))
        node.take(bundle, instruction("c"))
        until(lambda: len(events(settings)) == number + 1)
        node.close()
        os.kill(worker, signal.SIGCONT)
        until(lambda: "an instruction could not be answered: ConnectError" in caplog.text)
        node = open_node(settings)
        assert not node.ask(bundle).has_error()
        assert worker_of(settings) == worker, "it is warm for the whole of a run"

        node.take(bundle, instruction("d"), run_id=9)
        another = worker_of(settings, other_than=worker)
        os.kill(another, signal.SIGKILL)
        assert node.reply().error.code == ENDED

    run(settings, script)
    assert not workers_of(settings)
    assert events(settings)[-3:] == [("instruction", -1), ("reply", ENDED), ("stopped", -1)]
    assert not verify(journal).problems
    entries = [entry for entry in read(journal) if entry["event"] in ("instruction", "reply")]
    told = {(entry["run"], entry["kind"], entry["bundle"]) for entry in entries}
    assert told == {
        *((run_id, "query.describe", hashlib.sha256(bundle).hexdigest()) for run_id in ("5", "9")),
        ("6", "query.describe", hashlib.sha256(bundle + b"\0").hexdigest()),
    }
    assert {entry["policy"] for entry in entries} == {
        hashlib.sha256((settings.site.private / POLICY).read_bytes()).hexdigest()
    }
    assert [entry["ledger_rows"] for entry in entries][-1] == charges(settings) == 2


def test_a_worker_that_is_locked_out_stuck_or_stopped_is_told_from_one_that_ended(
    site: NewSite, run: Run, open_node: OpenNode, bundle: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = site("max_task_seconds = 6\n")
    monkeypatch.setattr(runner, "_STOP_SECONDS", 0.5)
    lock = lock_file(settings.site.private / TRAINER_LOCK)
    assert lock is not None
    node = open_node(settings)

    def script() -> None:
        assert node.ask(bundle).error.code == BUSY
        os.close(lock)
        # More than a pipe holds: a worker that does not read must not hold up the runner.
        node.take(bundle, instruction(arrays=10**6))
        stuck = worker_of(settings)
        os.kill(stuck, signal.SIGSTOP)
        assert node.reply(seconds=20).error.code == TOO_LONG
        assert stuck not in workers_of(settings)
        number = len(events(settings))
        os.kill(worker_of(settings), signal.SIGSTOP)
        node.take(bundle, instruction())
        until(lambda: len(events(settings)) == number + 1)

    run(settings, script)
    assert node.reply(seconds=1).error.code == STOPPED
    assert not workers_of(settings)
    codes = [code for event, code in events(settings) if event == "reply"]
    assert codes == [BUSY, TOO_LONG, STOPPED]
    assert charges(settings) == 0


@pytest.mark.usefixtures("run")
def test_a_runner_with_another_secret_than_the_supernode_ends_with_one_line(site: NewSite, open_node: OpenNode) -> None:
    settings = site()
    open_node(settings, secret=bytes(32))
    with pytest.raises(ConfigError, match="has another secret: is another site's daemon there") as caught:
        Runner(settings).run()
    assert str(caught.value).isprintable()
    assert not workers_of(settings), "the worker ends with it"


def test_another_program_on_the_port_is_waited_out(site: NewSite, run: Run, listen: Callable[..., Any]) -> None:
    for answer in (
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + b"\xff" * 9,
        b"HTTP/1.1 404 X\r\n\r\n",
        b"220 smtp\r\n",
    ):
        with listen(answer) as other:
            settings = site(port=int(other.address.rpartition(":")[2]))
            run(settings, lambda other=other: until(lambda: other.connections > 1))  # type: ignore[misc]
        assert events(settings) == [("started", -1), ("stopped", -1)]


def test_the_secret_is_long_and_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "runtime.secret"
    with pytest.raises(ConfigError, match=r"No such file.*'python -m client enroll' makes it"):
        read_runtime_secret(path)
    path.write_bytes(bytes(32))
    for mode, is_closed in ((0o600, True), (0o640, True), (0o644, False), (0o642, False), (0o641, False)):
        path.chmod(mode)
        if is_closed:
            assert read_runtime_secret(path) == bytes(32)
        else:
            with pytest.raises(ConfigError, match="closed to others"):
                read_runtime_secret(path)
    path.chmod(0o600)
    path.write_bytes(bytes(31))
    with pytest.raises(ConfigError, match="at least 32 bytes"):
        read_runtime_secret(path)


def test_a_debug_log_that_leads_elsewhere_is_refused(site: NewSite, tmp_path: Path) -> None:
    settings = site()
    (settings.site.private / DEBUG_LOG).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"debug\.log' cannot be used: it is a link"):
        Runner(settings)
    assert not (tmp_path / "elsewhere").exists()


def an_open_secret(settings: SiteSettings) -> str:
    settings.daemon.secret.chmod(0o644)
    return f"'{settings.daemon.secret}' must have at least 32 bytes and be closed to others: chmod 640"


def a_linked_lock(settings: SiteSettings) -> str:
    path = settings.site.private / TRAINER_LOCK
    path.symlink_to("elsewhere")
    return f"'{path}' cannot be used: it is a link, where the file itself is needed"


def a_folder_for_a_lock(settings: SiteSettings) -> str:
    path = settings.site.private / TRAINER_LOCK
    path.mkdir()
    return f"'{path}' cannot be used: Is a directory"


@pytest.mark.parametrize("break_it", [an_open_secret, a_linked_lock, a_folder_for_a_lock])
def test_the_program_ends_with_code_2_and_a_line_where_it_cannot_work(
    site: NewSite, break_it: Callable[[SiteSettings], str]
) -> None:
    settings = site()
    line = break_it(settings)
    command = [sys.executable, "-m", "client.runner", str(settings.file)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=INSTALLED, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{line}\n")

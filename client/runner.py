"""Takes instructions from the SuperNode and has the worker answer them: at once, one at a time, within a limit.

Flower starts a process per instruction, which imports everything anew. Here a worker stays warm for the whole of a run
(:mod:`client.workers`); this process stands between it and the network, checks the bundle, watches the time, and writes
the audit log before a reply is handed on.
"""

import hashlib
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import flwr
import httpx
from flwr.app import Context, Error, Message
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

import mcrage
from client.bundles import Approvals
from client.journal import Journal
from client.node import QUIET, require_flower, show_log
from client.places import JOURNAL, POLICY, WITNESS
from client.settings import SiteSettings
from client.worker import from_message, to_message
from client.workers import Workers
from mcrage.errors import ConfigError, McrageError, PrivacyError, RefusedError
from mcrage.privacy.witness import Witness
from mcrage.refusals import ENDED, STOPPED, TOO_LONG, UNLOGGED

_LOG = logging.getLogger("mcrage.daemon")
_HEARTBEAT_SECONDS = 10.0
_BUSY_PAUSE, _IDLE_PAUSE, _BUSY_FOR = 0.1, 0.5, 120.0
_STOP_SECONDS = 15.0
_CLIENT_APP = "flwr-clientapp"
_SIGNED = frozenset({"/flwr.proto.Runtime/AcquireTask"})


class Runner:
    """Serves one SuperNode until it is stopped.

    Args:
        settings: Of the site.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self._settings = settings
        self._approvals = Approvals(settings.daemon.approved)
        self._journal = Journal(settings.site.private / JOURNAL)
        self._workers = Workers(settings)
        self._stop_at: float | None = None
        self._last_work = -_BUSY_FOR
        self._secret = read_runtime_secret(settings.daemon.secret)

    def run(self) -> None:
        """Works until SIGTERM; what is being worked on then may take some seconds more."""
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, self._signalled)
        self._journal.append("started", versions=_versions())
        self._workers.warm()
        signed = SuperExecAuthHttpInterceptor(master_secret=self._secret, protected_methods=_SIGNED)
        try:
            with self._client(signed) as client:
                while self._stop_at is None:
                    self._look(client)
        finally:
            self._workers.stop()
        self._journal.append("stopped")

    def _look(self, client: RuntimeHttpClient) -> None:
        token = self._acquired(client)
        if token:
            self._last_work = time.monotonic()
            self._serve(token)
        else:
            self._workers.warm()
            is_busy = time.monotonic() - self._last_work < _BUSY_FOR
            time.sleep(_BUSY_PAUSE if is_busy else _IDLE_PAUSE)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        self._stop_at = self._stop_at or time.monotonic() + _STOP_SECONDS

    def _client(self, *interceptors: Any) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{self._settings.daemon.port}",
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="SuperExec"), *interceptors],
        )

    def _acquired(self, client: RuntimeHttpClient) -> str:
        """Token of the next task; empty if there is none."""
        try:
            return str(client.AcquireTask(AcquireTaskRequest(supported_task_types=[_CLIENT_APP])).token)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise ConfigError(
                    "the SuperNode on this port has another secret: is another site's daemon there?"
                ) from None
            return ""
        except (httpx.HTTPError, ValueError):
            return ""  # the SuperNode is being started again, or it is none

    def _serve(self, token: str) -> None:
        client = self._client(RuntimeTokenHttpInterceptor(token))
        try:
            with Heartbeat(client) as heartbeat:
                message, context, _, fab = pull_task_input(client)
                reply = self._reply(message, context, fab.content, heartbeat)
                push_message(client, reply, context)
                push_task_output(client, None, "completed", "")
        except Exception as error:  # noqa: BLE001  # what a server sent can fail in any way in Flower's hands
            # Or the SuperNode is gone, or the run was stopped: what was spent stays spent.
            _LOG.warning("an instruction could not be answered: %s", type(error).__name__)
        finally:
            client.close()

    def _reply(self, message: Message, context: Context, bundle: bytes, heartbeat: "Heartbeat") -> Message:
        payload = from_message(message)
        facts = {"run": f"{context.run_id}", "kind": message.metadata.message_type[:40], "bundle": _sha256(bundle)}
        try:
            self._journal.append("instruction", **facts, digest=_sha256(payload), **self._state())
            self._approvals.require(bundle)
            header = {"run_id": context.run_id, "task_id": TaskIdentity.task_id, "node_id": context.node_id}
            answer = self._workers.ask(context.run_id, header, payload, self._over(heartbeat))
            reply = to_message(answer) if isinstance(answer, bytes) else failed(answer.code, message)
        except RefusedError as error:
            _LOG.error("an instruction was refused: %s", error)
            reply = failed(error.code, message)
        except McrageError as error:
            _LOG.error("an instruction was not answered: %s", error)
            reply = failed(UNLOGGED if isinstance(error, PrivacyError) else ENDED, message)
        return self._logged(reply, message, facts)

    def _logged(self, reply: Message, message: Message, facts: dict[str, str]) -> Message:
        """The reply once it is in the audit log; a failure in its place if it cannot be written there."""
        code = reply.error.code if reply.has_error() else 0
        try:
            self._journal.append("reply", **facts, digest=_sha256(from_message(reply)), code=code, **self._state())
        except PrivacyError as error:
            _LOG.error("a reply was held back: %s", error)
            return failed(UNLOGGED, message)
        return reply

    def _over(self, heartbeat: "Heartbeat") -> Callable[[], int]:
        deadline = time.monotonic() + self._settings.daemon.max_task_seconds

        def code() -> int:
            now = time.monotonic()
            if heartbeat.is_cancelled or (self._stop_at is not None and now > self._stop_at):
                return STOPPED
            return TOO_LONG if now > deadline else 0

        return code

    def _state(self) -> dict[str, str | int]:
        """What the audit log says of the policy and the ledger at this time."""
        private = self._settings.site.private
        try:
            policy = _sha256((private / POLICY).read_bytes())
            witness = Witness.read(private / WITNESS)
        except (OSError, PrivacyError):
            return {"policy": "", "ledger_rows": -1, "ledger_head": ""}
        return {"policy": policy, "ledger_rows": witness.charges, "ledger_head": witness.head}


class Heartbeat:
    """Tells the SuperNode every ten seconds that a task is being worked on.

    Args:
        client: Of the task.
    """

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client, self._done = client, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.is_cancelled = False

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        while True:
            with suppress(httpx.HTTPError):
                if not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    self.is_cancelled = True
            if self._done.wait(_HEARTBEAT_SECONDS):
                return


def failed(code: int, message: Message) -> Message:
    """A reply that says which failure it was and nothing else."""
    return Message(Error(code, secrets.token_hex(4)), reply_to=message)


def read_runtime_secret(path: Path) -> bytes:
    """The secret that the SuperNode and the runner share.

    Raises:
        ConfigError: If it is missing, short, or readable by everyone.
    """
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read: {error.strerror}; 'python -m client enroll' makes it") from None
    if len(content) < 32 or mode & 0o007:
        raise ConfigError(f"'{path}' must have at least 32 bytes and be closed to others: chmod 640")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _versions() -> str:
    return f"mcrage {mcrage.__version__}, flwr {flwr.__version__}"


def main() -> None:
    """Runs until it is told to end; takes the path of ``site.toml``."""
    show_log()
    os.environ.update(QUIET)
    try:
        require_flower()
        Runner(SiteSettings.load(Path(sys.argv[1]))).run()
    except McrageError as error:
        _LOG.error("%s", error)
        sys.exit(2)


if __name__ == "__main__":
    main()

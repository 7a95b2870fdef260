"""The SuperLink's Control API on this machine: registering nodes, starting, watching and stopping runs.

Flower's open-source build lets anyone who reaches this API start code at every hospital. It is reached on loopback
only; the proxy never passes it on (:mod:`server.proxy`).
"""

import hashlib
import json
import ssl
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from mcrage.config import Scalar
from mcrage.errors import ConfigError, FederationError

_TIMEOUT_SECONDS = 10.0
_NEWEST_RUNS = 100
_NO_SUCH_RUN, _RUN_HAS_ENDED = 16, 18  # codes of Flower
_LASTING = range(400, 500)


@dataclass(frozen=True)
class Node:
    """A node as Flower knows it.

    Attributes:
        node_id: Flower's number.
        public_key: As in the header of its requests.
        is_online: Whether its heartbeat came in time.
    """

    node_id: int
    public_key: str
    is_online: bool


class Control:
    """The Control API of a SuperLink.

    Args:
        port: On loopback.
        ca: Certificate of the federation's authority.

    Raises:
        OSError: If the certificate cannot be read.
    """

    def __init__(self, port: int, ca: Path) -> None:
        context, version = ssl.create_default_context(cafile=str(ca)), RuntimeVersionHttpInterceptor("flwr")
        self._client = ControlHttpClient(f"https://127.0.0.1:{port}", interceptors=[version], verify=context)
        self._client.close()
        # Flower's own one would go through the proxy that the environment names, even to this machine.
        self._client._client = httpx.Client(verify=context, timeout=_TIMEOUT_SECONDS, trust_env=False)

    def close(self) -> None:
        """Closes the connection."""
        self._client.close()

    def nodes(self) -> list[Node]:
        """Every node that is registered.

        Raises:
            FederationError: If the SuperLink does not answer, as in every method here.
        """
        with _in_words("list the nodes"):
            answer = self._client.ListNodes(ListNodesRequest())
        return [
            Node(info.node_id, b64encode(info.public_key).decode(), info.status == "online")
            for info in answer.nodes_info
            if info.status != "unregistered"
        ]

    def register(self, public_key: str, name: str) -> int:
        """Lets a node in; returns its id.

        Raises:
            ConfigError: If Flower does not take the key: it is no key, or was one of a node before.
        """
        request = RegisterNodeRequest(public_key=b64decode(public_key), name=name)
        with _for_good(), _in_words(f"register site {name}"):
            return int(self._client.RegisterNode(request).node_id)

    def unregister(self, node_id: int) -> None:
        """Lets a node in no more."""
        with _in_words("unregister a node"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def start(self, bundle: bytes, settings: Mapping[str, Scalar]) -> int:
        """Starts a run; returns its id.

        Raises:
            ConfigError: If Flower does not take the app or the settings.
        """
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(settings)))
        with _for_good(), _in_words("start a run"):
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FederationError("the SuperLink did not accept the run; its log says more")
        return int(answer.run_id)

    def stop(self, run_id: int) -> None:
        """Stops a run; one that has ended stays as it is."""
        try:
            with _in_words("stop a run"):
                self._client.StopRun(StopRunRequest(run_id=run_id))
        except _RefusedError as refusal:
            if refusal.code != _RUN_HAS_ENDED:
                raise

    def status(self, run_id: int) -> str:
        """Status of a run, such as ``running`` or ``finished:completed``; empty if Flower does not know it."""
        try:
            return self._runs(ListRunsRequest(run_id=run_id)).get(run_id, "")
        except _RefusedError as refusal:
            if refusal.code == _NO_SUCH_RUN:
                return ""
            raise

    def runs(self) -> dict[int, str]:
        """Status of the newest hundred runs."""
        return self._runs(ListRunsRequest(limit=_NEWEST_RUNS))

    def _runs(self, request: ListRunsRequest) -> dict[int, str]:
        with _in_words("look at the runs"):
            runs: Mapping[int, Any] = self._client.ListRuns(request).run_dict
        told = {run_id: run.status for run_id, run in runs.items()}
        return {
            run_id: f"{status.status}:{status.sub_status}" if status.sub_status else str(status.status)
            for run_id, status in told.items()
        }


class _RefusedError(FederationError):
    """The SuperLink answered, and did not do it."""

    def __init__(self, what: str, response: httpx.Response) -> None:
        self.status, self.code = response.status_code, _code(response)
        shown = "" if self.code is None else f", Flower's code {self.code}"
        super().__init__(f"the SuperLink refused to {what} (HTTP {self.status}{shown})")


def _code(response: httpx.Response) -> int | None:
    """Flower's number of an error; the rest of its answer may quote anything."""
    try:
        code = json.loads(response.content)["code"]
    except (ValueError, TypeError, KeyError):
        return None
    return code if type(code) is int else None


@contextmanager
def _for_good() -> Iterator[None]:
    """Makes a refusal that would only come again one of what was given."""
    try:
        yield
    except _RefusedError as refusal:
        if refusal.status in _LASTING:
            raise ConfigError(str(refusal)) from None
        raise


@contextmanager
def _in_words(what: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise _RefusedError(what, error.response) from None
    except (httpx.HTTPError, ValueError) as error:
        raise FederationError(f"the SuperLink does not answer: cannot {what} ({type(error).__name__})") from None

"""The Control API of a real SuperLink, and of servers that answer as none should."""

import json
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from mcrage.errors import ConfigError, FederationError
from mcrage.pki import Authority
from server.control import Control, Node
from server.coordinator import write_bundle
from server.home import Home
from simulations.deployed import free_port

NewHome = Callable[[Path], Home]
SuperLinkOf = Callable[[Home], AbstractContextManager[Control]]
ANSWER = "the name of a patient"


def new_key() -> str:
    return b64encode(public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())).decode()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, new_home: NewHome) -> Home:
    return new_home(tmp_path_factory.mktemp("control") / "home")


@pytest.fixture(scope="module")
def control(home: Home, superlink_of: SuperLinkOf) -> Iterator[Control]:
    with superlink_of(home) as control:
        yield control


@pytest.fixture(scope="module")
def bundle(home: Home) -> bytes:
    return write_bundle(home)


def one_line(call: Callable[[], object], error: type[Exception] = FederationError) -> str:
    with pytest.raises(error) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_node_is_registered_listed_and_unregistered_once(control: Control) -> None:
    key = new_key()
    node_id = control.register(key, "hosp-a")
    assert node_id > 0
    assert Node(node_id, key, is_online=False) in control.nodes()
    control.unregister(node_id)
    assert node_id not in [node.node_id for node in control.nodes()]
    again = one_line(lambda: control.unregister(node_id))
    assert again == "the SuperLink refused to unregister a node (HTTP 404, Flower's code 24)"


def test_a_key_serves_one_node_only_and_never_another_one_after_it(control: Control) -> None:
    key = new_key()
    node_id = control.register(key, "hosp-b")
    told = "the SuperLink refused to register site hosp-c (HTTP 412, Flower's code 23)"
    assert one_line(lambda: control.register(key, "hosp-c"), ConfigError) == told
    control.unregister(node_id)
    assert one_line(lambda: control.register(key, "hosp-c"), ConfigError) == told


def test_two_nodes_may_have_one_name_as_keys_are_rotated(control: Control) -> None:
    assert control.register(new_key(), "hosp-d") != control.register(new_key(), "hosp-d")


def test_what_is_no_key_is_refused(control: Control) -> None:
    told = one_line(lambda: control.register(b64encode(b"no key").decode(), "hosp-e"), ConfigError)
    assert told == "the SuperLink refused to register site hosp-e (HTTP 412, Flower's code 22)"


def test_a_run_is_started_looked_at_and_stopped(control: Control, bundle: bytes) -> None:
    run_id = control.start(bundle, {"num-server-rounds": 3, "dp": False, "learning-rate": 0.5, "run-name": "a"})
    assert control.status(run_id) == "pending"
    assert control.runs()[run_id] == "pending"
    control.stop(run_id)
    assert control.status(run_id) == "finished:stopped"
    control.stop(run_id)  # what has ended stays as it is
    assert control.runs()[run_id] == "finished:stopped"


def test_a_run_that_flower_does_not_know_has_no_status_and_cannot_be_stopped(control: Control) -> None:
    assert control.status(7) == ""
    told = "the SuperLink refused to stop a run (HTTP 404, Flower's code 16)"
    assert one_line(lambda: control.stop(7)) == told


def test_settings_and_bundles_that_flower_refuses_are_not_worth_another_try(control: Control, bundle: bytes) -> None:
    told = one_line(lambda: control.start(bundle, {"no-such-setting": 1}), ConfigError)
    assert told == "the SuperLink refused to start a run (HTTP 412, Flower's code 15)"
    assert "HTTP 500" in one_line(lambda: control.start(b"no zip", {}))


def test_the_way_to_loopback_leads_through_no_proxy(
    control: Control, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    direct = Control(home.settings.superlink_port, home.pki / "ca.crt")
    assert direct.nodes() == control.nodes()
    direct.close()
    address, ca = f"127.0.0.1:{home.settings.superlink_port}", (home.pki / "ca.crt").read_bytes()
    with ControlHttpClient.from_server_address(address, False, ca, []) as by_flower, pytest.raises(httpx.ConnectError):
        by_flower.ListNodes(ListNodesRequest())


def test_only_a_server_of_the_own_authority_is_believed(control: Control, home: Home, tmp_path: Path) -> None:
    Authority.create(tmp_path / "pki", name="another one")
    other = Control(home.settings.superlink_port, tmp_path / "pki" / "ca.crt")
    told = one_line(other.nodes)
    other.close()
    assert told == "the SuperLink does not answer: cannot list the nodes (ConnectError)"


def test_a_superlink_that_is_not_there_is_told_in_words(home: Home) -> None:
    nobody = Control(free_port(), home.pki / "ca.crt")
    calls = {
        "list the nodes": nobody.nodes,
        "register site hosp-a": lambda: nobody.register(new_key(), "hosp-a"),
        "unregister a node": lambda: nobody.unregister(1),
        "start a run": lambda: nobody.start(b"", {}),
        "stop a run": lambda: nobody.stop(1),
        "look at the runs": lambda: nobody.status(1),
    }
    for what, call in calls.items():
        assert one_line(call) == f"the SuperLink does not answer: cannot {what} (ConnectError)"
    nobody.close()


def test_without_the_certificate_of_the_authority_nobody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Control(1, tmp_path / "ca.crt")
    (tmp_path / "ca.crt").write_text("no certificate")
    with pytest.raises(OSError, match="NO_CERTIFICATE_OR_CRL_FOUND"):
        Control(1, tmp_path / "ca.crt")


@contextmanager
def answering(home: Home, status: int, body: bytes) -> Iterator[Control]:
    """Asks a server that always says the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(home.pki / "server.crt", home.pki / "server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        control = Control(server.server_address[1], home.pki / "ca.crt")
        yield control
        control.close()
        server.shutdown()


def error(code: object) -> bytes:
    return json.dumps({"code": code, "detail": ANSWER, "extra": ANSWER}).encode()


@pytest.mark.parametrize(
    ("status", "body", "shown"),
    [
        (412, error(23), "HTTP 412, Flower's code 23"),
        (500, error(1003), "HTTP 500, Flower's code 1003"),
        (400, error("23"), "HTTP 400"),
        (400, error(True), "HTTP 400"),
        (400, error(None), "HTTP 400"),
        (400, f'{{"detail": "{ANSWER} \\"code\\": 7"}}'.encode(), "HTTP 400"),
        (502, f"<html>{ANSWER}</html>".encode(), "HTTP 502"),
        (403, b"[]", "HTTP 403"),
        (401, b"", "HTTP 401"),
    ],
)
def test_of_a_refusal_only_the_code_is_told(home: Home, status: int, body: bytes, shown: str) -> None:
    with answering(home, status, body) as control:
        assert one_line(control.nodes) == f"the SuperLink refused to list the nodes ({shown})"
        told = one_line(lambda: control.start(b"", {}), ConfigError if status < 500 else FederationError)
    assert ANSWER not in told


def test_an_answer_that_is_none_of_flower_is_told_in_words(home: Home) -> None:
    with answering(home, 200, ANSWER.encode()) as control:
        assert "does not answer: cannot list the nodes" in one_line(control.nodes)
    with answering(home, 200, b"") as control:
        assert one_line(lambda: control.start(b"", {})) == "the SuperLink did not accept the run; its log says more"

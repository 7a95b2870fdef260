"""What is used of Flower beyond its public names is what somebody has read, for exactly one version of it.

Whoever changes the version reads what changed behind each name below before putting its new hash there.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flwr
import pytest

from client.node import FLOWER

ROOT = Path(__file__).parents[2]
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy")

REVIEWED = {
    "flwr.cli.build.build_fab_from_disk": "d4912729f7fa5092",
    "flwr.common.constant.ErrorCode": "4889fc3e5b669ac5",
    "flwr.common.constant.SUPERLINK_NODE_ID": "6b86b273ff34fce1",
    "flwr.common.serde.fab_to_proto": "c5b60150389ce73f",
    "flwr.common.serde.message_from_proto": "adfc00f7b403461f",
    "flwr.common.serde.message_to_proto": "257d477d31454ca3",
    "flwr.common.serde.user_config_to_proto": "b69bb9067e1699e9",
    "flwr.proto.control_pb2.ListNodesRequest": "4f53cda18c2baa0c",
    "flwr.proto.control_pb2.ListRunsRequest": "acd3a2e6627fc624",
    "flwr.proto.control_pb2.RegisterNodeRequest": "a44e79bcdda226f9",
    "flwr.proto.control_pb2.StartRunRequest": "580c181e53f688e6",
    "flwr.proto.control_pb2.StopRunRequest": "0865058e95ee913c",
    "flwr.proto.control_pb2.UnregisterNodeRequest": "5ab3d49a1d59206e",
    "flwr.proto.message_pb2.Message": "c7f4fa777b188a9f",
    "flwr.proto.runtime_pb2.AcquireTaskRequest": "a9d0c236da3d9cf5",
    "flwr.proto.runtime_pb2.SendTaskHeartbeatRequest": "4f53cda18c2baa0c",
    "flwr.supercore.control.ControlHttpClient": "ee524b3741ae8cf8",
    "flwr.supercore.fab.Fab": "140aff940cdb015e",
    "flwr.supercore.interceptors.RuntimeTokenHttpInterceptor": "06cbf14d2ea81c27",
    "flwr.supercore.interceptors.RuntimeVersionHttpInterceptor": "32dc4f3d763a9ca0",
    "flwr.supercore.interceptors.SuperExecAuthHttpInterceptor": "c11135b67c204986",
    "flwr.supercore.primitives.asymmetric.public_key_to_bytes": "552b787ae3438eaf",
    "flwr.supercore.run.Run": "2f1566491e6beccf",
    "flwr.supercore.run.RunNotRunningException": "c6cd25f48f7dab64",
    "flwr.supercore.runtime.RuntimeHttpClient": "9d66e89a62052127",
    "flwr.supercore.task_identity.TaskIdentity": "49ac1df12b140345",
    "flwr.supernode.cli.flower_supernode.flower_supernode": "e263e10452076b00",
    "flwr.supernode.fleet_http_client.FleetHttpClient": "9f33ca6d39a8f428",
    "flwr.supernode.fleet_http_connection": "8b90826f407ab5d3",
    "flwr.supernode.runtime.run_clientapp.pull_task_input": "5607a23e1673ee87",
    "flwr.supernode.runtime.run_clientapp.push_message": "07cb512c93e065a9",
    "flwr.supernode.runtime.run_clientapp.push_task_output": "9206407456e79e17",
    "flwr.supernode.start_client_internal": "d6342f743fdf768f",
}
BELOW = {
    # What the client of the coordinator is derived from, which errors it tries again, and who reads a bundle there.
    "flwr.supercore.protobuf.client": "0bb91b4a9336b8cc",
    "flwr.supercore.retry.http_retry": "44a6170661312251",
    "flwr.common.config.get_fab_config": "99a9a8004cd36279",
    # When a task is taken from the runner.
    "flwr.supernode.servicer.runtime.runtime_handlers": "841b531c097871ea",
}


def private_imports() -> Iterator[str]:
    """Names that the two applications take from modules of Flower that are not public."""
    for path in [*ROOT.glob("client/*.py"), *ROOT.glob("server/*.py")]:
        for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(each, ast.Import):
                yield from (alias.name for alias in each.names if alias.name.startswith("flwr."))
            elif (
                isinstance(each, ast.ImportFrom) and f"{each.module}".startswith("flwr.") and each.module not in PUBLIC
            ):
                yield from (f"{each.module}.{alias.name}" for alias in each.names)


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(module), attribute)


def digest(thing: Any) -> str:
    """The beginning of SHA-256 of what a name stands for: source, the fields of a message, or a constant."""
    descriptor = getattr(thing, "DESCRIPTOR", None)
    if descriptor is not None and not inspect.ismodule(thing):
        text = repr([(field.name, field.number, field.type) for field in descriptor.fields])
    else:
        text = repr(thing) if isinstance(thing, int) else inspect.getsource(thing)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_every_private_import_of_flower_is_on_the_list_and_nothing_else() -> None:
    assert set(private_imports()) == set(REVIEWED)


@pytest.mark.parametrize("name", [*REVIEWED, *BELOW])
def test_a_private_part_of_flower_is_the_one_that_was_read(name: str) -> None:
    text = f"{name} of flwr {flwr.__version__} is not the one that was read: read what changed, then correct its hash"
    assert digest(found(name)) == (REVIEWED | BELOW)[name], text


def test_flower_has_the_version_that_was_read() -> None:
    assert flwr.__version__ == FLOWER


def test_a_changed_line_of_flower_would_be_seen(tmp_path: Path) -> None:
    name = "flwr.supernode.start_client_internal"
    source = inspect.getsource(found(name))
    for stem, text in {"same": source, "changed": source.replace("if trusted_entities:", "if False:")}.items():
        (tmp_path / f"{stem}.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(stem, tmp_path / f"{stem}.py")
        assert spec is not None
        assert (digest(importlib.util.module_from_spec(spec)) == REVIEWED[name]) is (stem == "same")

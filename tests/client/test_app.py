import importlib
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

import client
from client.app import app
from mcrage.config import RunConfig
from mcrage.messages import DescribeInstruction


def ask(message_type: str, values: dict[str, bool | float], site_dir: Path) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    run_config = RunConfig.parse({"site-dir": str(site_dir)}).to_flat()
    context = Context(1, 7, {"partition-id": 0, "num-partitions": 3}, RecordDict(), run_config)
    return app(Message(RecordDict({"config": ConfigRecord(values)}), 7, message_type), context)


def test_flower_finds_the_app_and_the_package_exports_nothing_else() -> None:
    assert isinstance(importlib.import_module("client.app").app, ClientApp)
    modules = {path.stem for path in Path(str(client.__file__)).parent.glob("*.py")}
    assert not [name for name in vars(client) if not name.startswith("_") and name not in modules]


def test_a_site_describes_itself(site_dir: Path) -> None:
    values = DescribeInstruction(run="a" * 64, test_fraction=0.3, marginals=True).to_wire().values
    reply = ask("query.describe", values, site_dir)  # type: ignore[arg-type]
    assert reply.content.config_records["config"]["site"] == "site-01"


@pytest.mark.parametrize("message_type", ["query.describe", "train", "evaluate"])
def test_an_instruction_that_was_not_agreed_is_answered_with_a_code(message_type: str, site_dir: Path) -> None:
    reply = ask(message_type, {"rows": True}, site_dir)
    assert reply.error.code == 1004


def test_there_is_no_other_way_to_ask(site_dir: Path) -> None:
    with pytest.raises(ValueError, match="No query function"):
        ask("query.rows", {}, site_dir)

from importlib import import_module
from importlib.metadata import version

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from mcrage.config import RunConfig
from simulations.grid import InProcessGrid, make_context, over_the_wire


def echo(message: Message, context: Context) -> Message:
    seen = int(context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"]) + 1  # type: ignore[arg-type]
    context.state["seen"] = ConfigRecord({"n": seen})
    site = str(context.node_config["site"])
    if site == "broken":
        raise ValueError("no")
    arrays = message.content.array_records.get("arrays", ArrayRecord())
    return Message(RecordDict({"arrays": arrays, "config": ConfigRecord({"site": site, "n": seen})}), reply_to=message)


def grid(*sites: str) -> InProcessGrid:
    return InProcessGrid(echo, [{"site": site} for site in sites], RunConfig())


def messages(to: InProcessGrid, content: RecordDict | None = None) -> list[Message]:
    return [Message(content or RecordDict(), node_id, "train") for node_id in to.get_node_ids()]


def test_every_node_answers_in_order_and_keeps_its_own_state() -> None:
    federation = grid("a", "b")
    federation.send_and_receive(messages(federation)[:1])
    replies = list(federation.send_and_receive(messages(federation)))
    assert [dict(reply.content.config_records["config"]) for reply in replies] == [
        {"site": "a", "n": 2},
        {"site": "b", "n": 1},
    ]
    assert [reply.metadata.src_node_id for reply in replies] == list(federation.get_node_ids())


def test_an_exception_becomes_an_error_reply_as_in_flower() -> None:
    federation = grid("a", "broken")
    good, bad = federation.send_and_receive(messages(federation))
    assert not good.has_error()
    assert (bad.error.code, bad.error.reason) == (2, "<class 'ValueError'>:<'no'>")


def test_nothing_is_shared_between_the_two_sides() -> None:
    def spoil(message: Message, context: Context) -> Message:
        message.content["config"]["x"] = 99
        return Message(message.content, reply_to=message)

    federation = InProcessGrid(spoil, [{}, {}], RunConfig())
    content = RecordDict({"config": ConfigRecord({"x": 1})})
    replies = list(federation.send_and_receive(messages(federation, content)))
    assert content.config_records["config"]["x"] == 1
    assert replies[0].content["config"] is not replies[1].content["config"]


def test_arrays_arrive_bit_by_bit() -> None:
    arrays = {
        "w": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
        "zero": np.zeros((0, 2), np.float32),
    }
    record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    federation = grid("a")
    (reply,) = federation.send_and_receive(messages(federation, RecordDict({"arrays": record})))
    got = {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}
    assert list(got) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(got[name], array, strict=True)


def test_an_error_and_the_ids_survive_the_wire() -> None:
    federation = grid("a")
    (reply,) = federation.send_and_receive(messages(federation))
    again = over_the_wire(reply)
    assert again.metadata.message_id == reply.metadata.message_id != ""
    assert again.metadata.reply_to_message_id == reply.metadata.reply_to_message_id != ""
    error = over_the_wire(Message(Error(7, "x"), reply_to=reply))
    assert (error.error.code, error.error.reason) == (7, "x")


def test_a_reply_can_be_pulled_once() -> None:
    federation = grid("a")
    message_ids = list(federation.push_messages(messages(federation)))
    assert len(list(federation.pull_messages(message_ids))) == 1
    assert list(federation.pull_messages(message_ids)) == []


def test_nodes_and_server_see_the_run_configuration() -> None:
    config = RunConfig.parse({"seed": 5})

    def tell(message: Message, context: Context) -> Message:
        seen = ConfigRecord({"seed": int(context.run_config["seed"]), "part": int(context.node_config["partition-id"])})
        return Message(RecordDict({"config": seen}), reply_to=message)

    federation = InProcessGrid.of_folder(tell, 2, config)
    replies = list(federation.send_and_receive(messages(federation)))
    assert [dict(r.content.config_records["config"]) for r in replies] == [
        {"seed": 5, "part": 0},
        {"seed": 5, "part": 1},
    ]
    assert make_context(config).run_config["seed"] == 5


def test_a_stock_strategy_runs_on_it() -> None:
    def add_one(message: Message, context: Context) -> Message:
        arrays = {n: Array(a.numpy() + 1) for n, a in message.content.array_records["arrays"].items()}
        metrics = {"num-examples": 1}
        content = {"arrays": ArrayRecord(arrays), "metrics": import_module("flwr.app").MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    federation = InProcessGrid(add_one, [{}, {}], RunConfig())
    start = ArrayRecord({"w": Array(np.zeros(2, np.float32))})
    result = FedAvg(fraction_evaluate=0.0).start(federation, start, num_rounds=3)
    np.testing.assert_array_equal(result.arrays["w"].numpy(), [3, 3])


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("flwr.supercore.task_identity", "TaskIdentity"),
        ("flwr.supercore.run", "Run"),
        ("flwr.supercore.inflatable.inflatable_object", "get_all_nested_objects"),
        ("flwr.supercore.inflatable.inflatable_object", "no_object_id_recompute"),
        ("flwr.supercore.inflatable.inflatable_utils", "inflate_object_from_contents"),
        ("flwr.common.constant", "ErrorCode"),
    ],
)
def test_flowers_private_names_are_where_they_were(module: str, name: str) -> None:
    assert version("flwr").startswith("1.41.")
    assert hasattr(import_module(module), name)


def test_a_message_keeps_its_id_where_the_grid_sets_it() -> None:
    federation = grid("a")
    (message,) = messages(federation)
    assert message.metadata.message_id == message.metadata.__dict__["_message_id"] == ""

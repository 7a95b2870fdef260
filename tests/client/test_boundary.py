import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.boundary import answer, incoming, refuse
from mcrage.errors import DataError, MessageError, Problem
from mcrage.messages import Outgoing, SiteLoss, SiteUpdate
from mcrage.wire import Wire, unpacked

CANARY = "Mrs Jane Doe 1951-02-03"


@pytest.fixture
def instruction() -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    return Message(RecordDict({"config": ConfigRecord({"x": 1})}), 7, "train")


def raising(error: BaseException) -> Callable[[], Outgoing]:
    def work() -> Outgoing:
        raise error

    return work


def test_a_permitted_reply_leaves_whole(instruction: Message) -> None:
    parameters = {"w": np.arange(3, dtype=np.float32)}
    reply = answer(instruction, lambda: SiteUpdate(server_round=1, loss=0.5, parameters=parameters))
    assert set(reply.content) == {"config", "arrays"}
    arrays = {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}
    wire = unpacked(Wire(dict(reply.content.config_records["config"]), arrays))
    assert wire.values == {"server-round": 1, "loss": 0.5}
    np.testing.assert_array_equal(wire.arrays["w"], parameters["w"])


def test_the_text_of_an_error_stays_in_a_file_of_the_site(
    instruction: Message, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    log = tmp_path / "debug.log"
    with caplog.at_level(logging.DEBUG):
        reply = answer(instruction, raising(ValueError(CANARY)), log=log)
    assert reply.has_error()
    assert CANARY not in repr(reply)
    assert CANARY.encode() not in reply.deflate()
    assert reply.error.code == 1000
    assert CANARY not in caplog.text
    assert str(reply.error.reason) in caplog.text
    kept = log.read_text(encoding="utf-8")
    assert CANARY in kept
    assert str(reply.error.reason) in kept
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_text_that_cannot_be_kept_is_lost_and_the_reply_is_the_same(
    instruction: Message, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    for log in (None, tmp_path / "nowhere" / "debug.log"):
        assert answer(instruction, raising(ValueError(CANARY)), log=log).error.code == 1000
    assert CANARY not in caplog.text
    assert "could not be kept (ENOENT)" in caplog.text


@pytest.mark.parametrize(
    "error", [SystemExit(CANARY), GeneratorExit(CANARY), BaseExceptionGroup(CANARY, [KeyError(1)])]
)
def test_an_error_of_any_kind_leaves_as_a_code(instruction: Message, error: BaseException) -> None:
    reply = answer(instruction, raising(error))
    assert (reply.error.code, CANARY in repr(reply)) == (1000, False)


def test_the_kind_of_an_error_leaves(instruction: Message) -> None:
    problem = Problem(code="E301", rule=CANARY, remedy="none")
    reply = answer(instruction, raising(DataError([problem])))
    assert (reply.error.code, CANARY in repr(reply)) == (1003, False)


def test_what_is_not_on_the_list_does_not_leave(instruction: Message) -> None:
    reply = answer(instruction, lambda: cast(Outgoing, {"rows": CANARY}))
    assert reply.has_error()
    assert CANARY not in repr(reply)


def test_an_error_while_the_reply_is_made_is_an_error_too(instruction: Message) -> None:
    broken: dict[str, Any] = {"w": CANARY}
    reply = answer(instruction, lambda: SiteUpdate(server_round=1, loss=0.5, parameters=broken))
    assert reply.has_error()
    assert CANARY not in repr(reply)


def test_an_interrupt_is_not_swallowed(instruction: Message) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        answer(instruction, raising(KeyboardInterrupt(CANARY)))
    assert CANARY not in repr(caught.value)
    assert caught.value.__suppress_context__


def test_an_instruction_comes_in_as_plain_data(instruction: Message) -> None:
    instruction.content["arrays"] = ArrayRecord({"w": Array(np.ones(2, np.float32))})
    wire = incoming(instruction)
    assert wire.values == {"x": 1}
    np.testing.assert_array_equal(wire.arrays["w"], np.ones(2))


def test_an_instruction_with_other_records_is_refused(instruction: Message) -> None:
    instruction.content["metrics"] = MetricRecord({"x": 1})
    with pytest.raises(MessageError, match="expected a record"):
        incoming(instruction)
    assert answer(instruction, lambda: SiteLoss(server_round=incoming(instruction).values["x"], loss=1)).has_error()


def test_an_instruction_that_there_is_not_is_told_by_its_code_alone(instruction: Message, tmp_path: Path) -> None:
    log = tmp_path / "debug.log"
    reply = answer(instruction, lambda: refuse(CANARY + "x" * 1000), log=log)
    assert (reply.error.code, CANARY in repr(reply)) == (1004, False)
    assert CANARY in log.read_text(encoding="utf-8")
    assert "x" * 40 not in log.read_text(encoding="utf-8"), "nor does a server fill the hospital's disk"


WANTS_MEMORY: list[Callable[[], object]] = [
    lambda: torch.empty(2**50),
    lambda: np.zeros(2**60, np.uint8),
    raising(MemoryError(CANARY)),
    raising(torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 20.00 GiB {CANARY}")),
]


@pytest.mark.parametrize("work", WANTS_MEMORY, ids=range(len(WANTS_MEMORY)))
def test_want_of_memory_has_a_code_of_its_own(instruction: Message, work: Callable[[], Outgoing]) -> None:
    reply = answer(instruction, work)
    assert (reply.error.code, CANARY in repr(reply)) == (1008, False)
    assert answer(instruction, raising(RuntimeError("memory"))).error.code == 1000

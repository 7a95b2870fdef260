"""The worker of a hospital: in this process between two streams, and as the program that the daemon starts."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.bundles import INSTALLED
from client.frames import read_frame, write_frame
from client.places import SECRET
from client.settings import SiteSettings
from client.worker import from_message, serve, to_message
from mcrage.cddpm import CDDPM
from mcrage.data.schema import TableSchema
from mcrage.diffusion.network import ModelConfig
from mcrage.errors import MessageError
from mcrage.messages import DescribeInstruction, SiteDescription, SiteUpdate, TrainInstruction
from mcrage.privacy.keyed import read_secret
from mcrage.signing import Signer, public_key, unsigned
from mcrage.wire import Wire, unpacked

RUN = {"run": "a" * 64, "test_fraction": 0.3}
HEADER = {"run_id": 3, "task_id": 2, "node_id": 7}

# The program itself, with an app that says more than it should, on every way out that a process has.
NOISY = """
import os, sys, client.site
describe = client.site.Site.describe
def noisy(*arguments):
    print("printed" * 5000)
    os.write(1, b"written" * 5000)
    os.system("echo by a child")
    return describe(*arguments)
client.site.Site.describe = noisy
from client.worker import main
main()
"""


@pytest.fixture(scope="module")
def model(tiny_schema: TableSchema) -> CDDPM:
    return CDDPM.initialised(tiny_schema, None, config=ModelConfig(width=8, depth=1), random_state=0)


@pytest.fixture(scope="module")
def settings(new_site: Callable[..., SiteSettings]) -> SiteSettings:
    made: SiteSettings = new_site(more="[daemon]\nmax_memory_gb = 0.8\n")
    return made


def message(kind: str, wire: Wire) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = HEADER.values()
    content = {
        "config": ConfigRecord(wire.values),  # type: ignore[arg-type]
        "arrays": ArrayRecord({name: Array(array) for name, array in wire.arrays.items()}),
    }
    made = Message(RecordDict(content), 7, kind)  # type: ignore[arg-type]
    made.metadata.__dict__["_message_id"] = made.object_id
    return made


def describing(**changes: Any) -> Message:
    return message("query.describe", DescribeInstruction(**(RUN | {"marginals": True} | changes)).to_wire())


def training(model: CDDPM, **size: int) -> Message:
    description = json.loads(model.describe())
    description["config"] |= size
    instruction = TrainInstruction(
        **RUN,
        server_round=1,
        description=json.dumps(description) if size else model.describe(),
        seed=4,
        parameters=model.parameters(),
        first_step=0,
        local_steps=2,
        total_steps=2,
        batch_size=16,
        learning_rate=0.01,
        warmup_steps=0,
        proximal_mu=0.0,
    )
    return message("train", instruction.to_wire())


def frames(*messages: Message | bytes, header: dict[str, int] = HEADER) -> IO[bytes]:
    stream = io.BytesIO()
    for each in messages:
        write_frame(stream, header, each if isinstance(each, bytes) else from_message(each))
    stream.seek(0)
    return stream


def served(settings: SiteSettings, *messages: Message) -> list[Message]:
    """The replies of the app to messages."""
    replies = io.BytesIO()
    serve(frames(*messages), replies, settings)
    replies.seek(0)
    assert read_frame(replies) == ({"ready": True}, b"")
    found = [to_message(frame[1]) for frame in iter(lambda: read_frame(replies), None)]
    assert [each.metadata.reply_to_message_id for each in found] == [each.metadata.message_id for each in messages]
    return found


def told(reply: Message, settings: SiteSettings) -> Wire:
    """What a reply says, once its signature was found to be the site's."""
    arrays = {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}
    wire = Wire(dict(reply.content.config_records["config"]), arrays)  # type: ignore[arg-type]
    signer = Signer("st-mary", public_key(read_secret(settings.site.private / SECRET)))
    return unpacked(unsigned(wire, signer=signer, instruction=reply.metadata.reply_to_message_id))


def test_instructions_are_answered_in_order_by_the_installed_app_and_signed(
    settings: SiteSettings, model: CDDPM, tiny_schema: TableSchema
) -> None:
    first, second, third = served(settings, describing(), training(model), describing())
    description = SiteDescription.from_wire(told(first, settings))
    assert (description.site, description.schema_fingerprint) == ("st-mary", tiny_schema.fingerprint)
    before = model.parameters()
    update = SiteUpdate.from_wire(told(second, settings), shapes={name: each.shape for name, each in before.items()})
    assert any((update.parameters[name] != each).any() for name, each in before.items())
    assert told(third, settings).values == told(first, settings).values
    assert {each.metadata.run_id for each in (first, second, third)} == {3}


@pytest.mark.parametrize("kind", ["query.rows", "query", "train.twice", "evaluate.sample"])
def test_an_instruction_that_the_app_does_not_have_gets_a_code_and_the_next_one_its_answer(
    kind: str, settings: SiteSettings
) -> None:
    unknown, known = served(settings, message(kind, describing_wire()), describing())
    assert unknown.error.code == 1004
    assert "rows" not in repr(unknown.error)
    assert not known.has_error()


def describing_wire() -> Wire:
    return DescribeInstruction(**RUN, marginals=False).to_wire()


def test_a_hostile_instruction_gets_its_code(settings: SiteSettings) -> None:
    wire = describing_wire()
    extra = message("query.describe", Wire(wire.values | {"data-path": "/etc/passwd"}, wire.arrays))
    open_noise = describing(dp=True, delta=1e-5)  # noise is asked for and none of it described
    assert [reply.error.code for reply in served(settings, extra, open_noise)] == [1004, 2007]


def test_bytes_of_a_message_are_the_same_for_the_same_message(model: CDDPM) -> None:
    asked = training(model)
    again = to_message(from_message(asked))
    assert from_message(again) == from_message(asked)
    sent = again.content.array_records["arrays"]
    for name, array in model.parameters().items():
        np.testing.assert_array_equal(sent[name].numpy(), array)


@pytest.mark.parametrize("payload", [b"no message", b"\xff" * 40, bytes(9), b""])
def test_what_is_no_message_ends_the_worker_and_nothing_is_said(payload: bytes, settings: SiteSettings) -> None:
    replies = io.BytesIO()
    with pytest.raises(MessageError, match="not a message"):
        serve(frames(payload), replies, settings)
    assert read_frame(io.BytesIO(replies.getvalue())) == ({"ready": True}, b"")
    assert replies.getvalue().endswith(b"}")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def program(settings: SiteSettings, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-c", NOISY, str(settings.file)]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, cwd=INSTALLED) as process,
    ):
        yield process
        process.kill()


def asked(program: "subprocess.Popen[bytes]", instruction: Message) -> Message:
    assert program.stdin is not None
    assert program.stdout is not None
    write_frame(program.stdin, HEADER, from_message(instruction))
    frame = read_frame(program.stdout)
    assert frame is not None, "the worker has ended"
    return to_message(frame[1])


def test_the_program_says_nothing_but_replies_whatever_the_app_prints(
    program: "subprocess.Popen[bytes]", settings: SiteSettings, log: Path
) -> None:
    assert program.stdout is not None
    assert read_frame(program.stdout) == ({"ready": True}, b"")
    for _ in range(2):
        assert SiteDescription.from_wire(told(asked(program, describing()), settings)).site == "st-mary"
    said = log.read_text()
    assert [said.count(each) for each in ("printed" * 5000, "written" * 5000, "by a child\n")] == [2, 2, 2]


def test_what_takes_more_memory_than_is_allowed_gets_a_code_and_the_worker_lives_on(
    program: "subprocess.Popen[bytes]", model: CDDPM
) -> None:
    assert asked(program, training(model, width=16)).error.code == 2304, "parameters of another shape"
    assert asked(program, training(model, width=4096, depth=32)).error.code == 1008
    assert not asked(program, training(model)).has_error()


def test_the_program_ends_with_its_input(program: "subprocess.Popen[bytes]") -> None:
    assert program.stdin is not None
    program.stdin.close()
    assert program.wait(30) == 0

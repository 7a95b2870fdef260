"""The process with the data: keeps the installed app in memory and answers one instruction after the other.

It has no key of the network and opens no connection; it reads frames and writes frames (:mod:`client.frames`). Whoever
starts it passes the lock on the hospital's private folder on to it (:mod:`client.workers`).
"""

import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import IO

from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.supercore.task_identity import TaskIdentity
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from client.frames import read_frame, write_frame
from client.settings import SiteSettings
from mcrage.errors import MessageError


def main() -> None:
    """Answers frames from stdin on stdout until stdin ends; takes the path of ``site.toml``."""
    settings = SiteSettings.load(Path(sys.argv[1]))
    _limit_memory(settings.daemon.max_memory_gb)
    # What the app or a library prints must not get between the frames.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies, settings)


def serve(instructions: IO[bytes], replies: IO[bytes], settings: SiteSettings) -> None:
    """Answers one instruction after the other with the app that is installed here."""
    from client.app import app
    from client.boundary import answer, refuse

    write_frame(replies, {"ready": True})
    while (frame := read_frame(instructions)) is not None:
        header, payload = frame
        TaskIdentity.run_id, TaskIdentity.task_id = header["run_id"], header["task_id"]
        TaskIdentity.node_id = header["node_id"]
        context = Context(
            run_id=header["run_id"],
            node_id=header["node_id"],
            node_config=settings.node_config,
            state=RecordDict(),
            run_config={},
        )
        message = to_message(payload)
        try:
            reply = app(message, context)
        except ValueError:  # of Flower, for a kind of instruction that the app does not have
            reply = answer(message, partial(refuse, message.metadata.message_type))
        write_frame(replies, {}, from_message(reply))


def to_message(payload: bytes) -> Message:
    """A message from its bytes.

    Raises:
        MessageError: If they are none.
    """
    try:
        return message_from_proto(ProtoMessage.FromString(payload))
    except (DecodeError, ValueError) as error:
        raise MessageError(f"not a message: {type(error).__name__}") from None


def from_message(message: Message) -> bytes:
    """The bytes of a message, the same for the same message."""
    return message_to_proto(message).SerializeToString(deterministic=True)


def _limit_memory(gigabytes: float) -> None:
    if gigabytes:
        limit, (_, hard) = int(gigabytes * 2**30), resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()

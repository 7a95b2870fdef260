"""A federation in which nodes are slow, gone or new, as a test wants it; a coordinator with its real SuperLink."""

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from mcrage.errors import FederationError
from mcrage.pki import Authority
from mcrage.supervision import end, start
from server.control import Control
from server.coordinator import programs
from server.home import CoordinatorSettings, Home
from simulations.deployed import free_port
from simulations.grid import InProcessGrid


class StagedGrid(InProcessGrid):
    """Keeps replies back, and answers for nodes that are gone as Flower's SuperLink does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sent: list[Message] = []
        self.offline: set[int] = set()
        self.is_held: Callable[[Message], bool] = lambda reply: False
        self.tamper: Callable[[Sequence[Message]], Sequence[Message]] = lambda replies: replies
        self.on_push: Callable[[Message], None] = lambda message: None

    @property
    def training_round(self) -> int:
        """The newest round in which a site was asked to train."""
        rounds = [number_of(message) for message in self.sent if message.metadata.message_type == "train"]
        return max(rounds, default=0)

    def asked(self, node_id: int, kind: str = "train") -> list[int]:
        """Rounds in which a node was asked for this."""
        metadata = [(message.metadata.dst_node_id, message.metadata.message_type) for message in self.sent]
        return [
            number_of(message) for message, told in zip(self.sent, metadata, strict=True) if told == (node_id, kind)
        ]

    def get_node_ids(self) -> Iterable[int]:
        return [node_id for node_id in super().get_node_ids() if node_id not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        for message in messages:
            self.on_push(message)
        self.sent += messages
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            reply = self._replies.get(message_id)
            if reply is not None and reply.metadata.src_node_id in self.offline:
                self._replies[message_id] = node_unavailable(reply)
        ready = [each for each in message_ids if each in self._replies and not self.is_held(self._replies[each])]
        return self.tamper(list(super().pull_messages(ready)))


def number_of(message: Message) -> int:
    """The round of an instruction; 0 where there is none."""
    return int(message.content.config_records["config"].get("server-round", 0))  # type: ignore[arg-type]


def node_unavailable(reply: Message) -> Message:
    """What the SuperLink says in place of a node that it does not hear any more."""
    error = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=reply)
    metadata = error.metadata.__dict__
    metadata["_src_node_id"] = SUPERLINK_NODE_ID
    metadata["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return error


@pytest.fixture
def staged_grid() -> type[StagedGrid]:
    """The class of such a federation."""
    return StagedGrid


@pytest.fixture(scope="session")
def new_home() -> Callable[[Path], Home]:
    """Makes a coordinator's folder with keys, whose ports are free."""

    def new(folder: Path) -> Home:
        listen = f"127.0.0.1:{free_port()}"
        home = Home.create(folder, CoordinatorSettings(names=("localhost",), listen=listen, superlink_port=free_port()))
        Authority.create(home.pki, name="test").issue_server(["localhost"])
        return home

    return new


@pytest.fixture(scope="session")
def superlink_of() -> Callable[[Home], AbstractContextManager[Control]]:
    """Runs the SuperLink of a coordinator's folder, alone."""

    @contextmanager
    def run(home: Home) -> Iterator[Control]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = start(programs(home, home.settings, ["nginx"])[0], **quiet)
        control, deadline = Control(home.settings.superlink_port, home.pki / "ca.crt"), time.monotonic() + 60
        while True:
            try:
                control.nodes()
                break
            except FederationError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield control
        control.close()
        end(process, seconds=20)

    return run

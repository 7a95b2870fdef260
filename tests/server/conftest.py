"""A federation in which nodes are slow, gone or new, as a test wants it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

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

"""A federation inside this process: the same ServerApp and ClientApp, without SuperLink, SuperNodes or Ray.

Sites answer one after the other, in a fixed order, so that the same seed gives the same bytes. Every message takes
Flower's wire format on its way there and back: what could not be sent to a hospital fails here too, and no object is
shared between the two sides.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from mcrage.config import RunConfig, Scalar

RUN_ID = 1
SERVER_NODE_ID = 1
FIRST_SITE_NODE_ID = 1001

App = Callable[[Message, Context], Message]


class InProcessGrid(Grid):
    """Answers the server's messages by calling a ClientApp.

    There is no deadline: a site is waited for until it has answered.

    Args:
        client_app: The hospital's side.
        node_configs: What each node is told about itself, as Flower's ``--node-config`` does.
        config: The run configuration that every node sees.
    """

    def __init__(self, client_app: App, node_configs: Sequence[Mapping[str, Scalar]], config: RunConfig) -> None:
        # Flower's strategies log two lines a round, which the caller's own progress says better.
        logging.getLogger("flwr").setLevel(logging.WARNING)
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, RUN_ID, SERVER_NODE_ID
        self._client_app = client_app
        self._contexts = {
            node_id: Context(RUN_ID, node_id, dict(node_config), RecordDict(), config.to_flat())
            for node_id, node_config in enumerate(node_configs, start=FIRST_SITE_NODE_ID)
        }
        self._replies: dict[str, Message] = {}
        self._num_sent = 0

    @classmethod
    def of_folder(cls, client_app: App, num_sites: int, config: RunConfig) -> "InProcessGrid":
        """A federation of the site files in ``config.places.site_dir``, numbered as Flower's simulation does."""
        nodes: list[dict[str, Scalar]] = [{"partition-id": i, "num-partitions": num_sites} for i in range(num_sites)]
        return cls(client_app, nodes, config)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids, always in the same order."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Has every message answered at once; the replies wait to be pulled."""
        return [self._answer(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:  # noqa: ARG002
        """One reply per message, in the order of the messages."""
        return self.pull_messages(self.push_messages(messages))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, as its constructor makes it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def set_run(self, run: Run) -> None:
        """Keeps the run's description for whoever asks."""
        self._run = run

    @property
    def run(self) -> Run:
        """What :meth:`set_run` was given."""
        return self._run

    def _answer(self, message: Message) -> str:
        self._num_sent += 1
        message_id = f"message-{self._num_sent}"
        _set_message_id(message, message_id)
        there = over_the_wire(message)
        try:
            reply = self._client_app(there, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # noqa: BLE001  # Flower's place: a ClientApp's exception becomes a reply
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error)}:<'{error}'>"), reply_to=there)
        _set_message_id(reply, f"reply-{self._num_sent}")
        self._replies[message_id] = over_the_wire(reply)
        return message_id


def make_context(config: RunConfig) -> Context:
    """The context with which a ServerApp's main is called directly."""
    return Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), config.to_flat())


def over_the_wire(message: Message) -> Message:
    """The message as the other side gets it: taken apart into bytes and put together again."""
    with no_object_id_recompute():
        objects = get_all_nested_objects(message)
        contents = {object_id: nested.deflate() for object_id, nested in objects.items()}
        received = inflate_object_from_contents(message.object_id, contents)
    assert isinstance(received, Message)
    _set_message_id(received, message.metadata.message_id)
    return received


def _set_message_id(message: Message, message_id: str) -> None:
    # The SuperLink gives messages their ids; Metadata has no public way to do so.
    message.metadata.__dict__["_message_id"] = message_id

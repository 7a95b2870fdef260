"""Questions to the sites and their answers: who was asked what, who answered, and who still owes an answer.

Flower's own waiting looks every three seconds and at its deadline forgets what it asked. Here a question stays open
until it is answered or Flower reports that it will not be, so that a slow site is not asked for more meanwhile, and
what it sends late is known for what it is.

Flower delivers an instruction once: if the connection breaks while a node fetches it, it is gone, and nobody tells. A
node works on one instruction after the other, so a site that has been silent for some time is sent something that every
site turns down at once. When that comes back and the instruction has not been answered, it was lost and is sent again;
a site that gets the same one twice answers with the same bytes and is charged once.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid

from mcrage.messages import SiteError
from mcrage.signing import Signer

_LOG = logging.getLogger("mcrage.server")

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, _GROWTH = 0.1, 1.0, 1.5
SILENCE_SECONDS = 20.0
_PROBE = "query.present"  # no site knows it
_MOST_TIMES = 3  # a site that turns probes down and answers nothing is not sent the same for ever
_TTL_TIMEOUTS = 4
# The clock of a site may be five minutes ahead, which counts against the time that its reply has left.
_LEAST_TTL_SECONDS = 3600.0
_EXPIRED = {
    ErrorCode.MESSAGE_UNAVAILABLE: "the instruction expired before it was answered",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "the reply expired before it was fetched",
}


@dataclass(frozen=True)
class Subject:
    """What a question is about.

    Attributes:
        kind: What is asked for.
        server_round: Round, from 1; 0 before the first.
        attempt: Which request of the round, where answers to one mean nothing to another.
    """

    kind: Literal["description", "training", "counts", "measurement", "account"]
    server_round: int
    attempt: int = 0

    def __str__(self) -> str:
        return f"the {self.kind} of round {self.server_round}"


@dataclass(frozen=True)
class Answer:
    """A message that replies to a question, not checked yet.

    Attributes:
        site: Who was asked.
        node_id: The node that was asked.
        message: What came.
        signer: Whose signature it has to have; None if none is known.
    """

    site: str
    node_id: int
    message: Message
    signer: Signer | None = None

    @property
    def is_from_there(self) -> bool:
        """Whether it comes from the node that was asked, or is an error that Flower's SuperLink made in its place."""
        source = self.message.metadata.src_node_id
        return source == self.node_id or (source == SUPERLINK_NODE_ID and self.message.has_error())


@dataclass
class _Question:
    site: str
    node_id: int
    subject: Subject
    message: Message
    times: int = 1
    asked: float = field(default_factory=time.monotonic)
    probes: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether it is time to look if the instruction ever arrived; later each time."""
        return time.monotonic() - self.asked > SILENCE_SECONDS * 2**self.probes


def _nobody(_: Iterable[str]) -> None:
    """Listens to nothing."""


class Exchange:
    """All questions of one run.

    Args:
        grid: Reaches the nodes.
        timeout: Seconds that :meth:`ask` waits at most.
        heard: Called about once a second while answers are waited for, with the sites that answered since.

    Attributes:
        signers: Who has to sign, by node id; whoever knows the sites keeps it up to date.
    """

    def __init__(self, grid: Grid, *, timeout: float, heard: Callable[[Iterable[str]], None] = _nobody) -> None:
        self.grid = grid
        self.signers: Mapping[int, Signer] = {}
        self._timeout, self._heard = timeout, heard
        self._ttl = max(_TTL_TIMEOUTS * timeout, _LEAST_TTL_SECONDS)
        self._open: dict[str, _Question] = {}
        self._probes: dict[str, str] = {}
        self._descriptions: list[Answer] = []

    def online(self) -> list[int]:
        """Ids of the nodes that are connected, sorted."""
        return sorted(self.grid.get_node_ids())

    def busy(self, node_id: int) -> Subject | None:
        """What the node still owes an answer about; None if nothing."""
        return next((question.subject for question in self._open.values() if question.node_id == node_id), None)

    def ask(self, messages: Mapping[str, Message], subject: Subject) -> list[Answer]:
        """What came back before the deadline, or sooner when all have answered.

        Questions about the same subject that are still open are waited for as well.

        Args:
            messages: By site.
            subject: What they are about.
        """
        self.send(messages, subject)
        deadline = time.monotonic() + self._timeout
        pause, answers = FIRST_PAUSE_SECONDS, []
        while True:
            answers += self._pull(subject)
            left = deadline - time.monotonic()
            if left <= 0 or all(question.subject != subject for question in self._open.values()):
                return answers
            self._probe()
            time.sleep(min(pause, left))
            pause = min(_GROWTH * pause, LONGEST_PAUSE_SECONDS)

    def send(self, messages: Mapping[str, Message], subject: Subject, *, times: int = 1) -> None:
        """Asks and does not wait. What Flower does not take is logged and counts as not asked.

        Args:
            messages: By site.
            subject: What they are about.
            times: How often this has been asked, this time included.
        """
        if not messages:
            return
        for message in messages.values():
            message.metadata.ttl = (
                self._ttl
            )  # else what a dead site never fetches lies at the SuperLink for twelve hours
        taken = set(filter(None, self.grid.push_messages(list(messages.values()))))
        for site, message in messages.items():
            if message.metadata.message_id in taken:
                question = _Question(site, message.metadata.dst_node_id, subject, message, times)
                self._open[message.metadata.message_id] = question
            else:
                _LOG.warning("%s could not be asked about %s: Flower did not take the message", site, subject)

    def descriptions(self) -> list[Answer]:
        """Descriptions that came while nobody waited for them, each once."""
        self._pull(None)
        came, self._descriptions = self._descriptions, []
        return came

    def pause(self, seconds: float) -> None:
        """Waits, and shows that it is alive."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, LONGEST_PAUSE_SECONDS))
            self._heard(())

    def _pull(self, subject: Subject | None) -> list[Answer]:
        """The new answers about the subject; the others are kept if they are descriptions, else dropped."""
        asked, answers, heard, turned_down = dict(self._open), [], [], []
        for message in self.grid.pull_messages([*asked, *self._probes]) if asked or self._probes else ():
            question = asked.get(message.metadata.reply_to_message_id)
            if message.metadata.reply_to_message_id in self._probes:
                turned_down.append((self._probes.pop(message.metadata.reply_to_message_id), message))
                continue
            if question is None:
                _LOG.warning("a reply to no open question is ignored")
                continue
            self._open.pop(message.metadata.reply_to_message_id, None)
            answer = Answer(question.site, question.node_id, message, self.signers.get(question.node_id))
            heard.append(question.site)
            if question.subject == subject:
                answers.append(answer)
            elif question.subject.kind == "description":
                self._descriptions.append(answer)
            else:
                _log_late(answer, question.subject)
        for message_id, message in turned_down:
            self._lost(message_id, message, subject)
        self._heard(heard)
        return answers

    def _probe(self) -> None:
        """Sends something that is turned down at once to whoever has been silent for long."""
        for message_id, question in self._open.items():
            if question.is_silent:
                question.probes += 1
                probe = Message(RecordDict({"config": ConfigRecord({})}), question.node_id, _PROBE, ttl=self._ttl)
                for probe_id in filter(None, self.grid.push_messages([probe])):
                    self._probes[probe_id] = message_id

    def _lost(self, message_id: str, answer: Message, subject: Subject | None) -> None:
        """What was never answered is asked again, if it is still wanted."""
        question = self._open.get(message_id)
        if question is None or answer.metadata.src_node_id != question.node_id:
            return  # it was answered meanwhile, or the node is gone, which Flower tells of the instruction as well
        del self._open[message_id]
        _LOG.warning("what site %s was asked about %s did not arrive there", question.site, question.subject)
        if question.subject == subject and question.times < _MOST_TIMES:
            again = Message(question.message.content, question.node_id, question.message.metadata.message_type)
            self.send({question.site: again}, question.subject, times=question.times + 1)


def failure(message: Message) -> str:
    """Why a message is an error, in the server's own words."""
    if message.metadata.src_node_id == SUPERLINK_NODE_ID and message.error.code in _EXPIRED:
        return _EXPIRED[message.error.code]
    return SiteError.readable(message.error.code, message.error.reason)


def _log_late(answer: Answer, subject: Subject) -> None:
    if answer.message.has_error():
        _LOG.warning("site %s does not answer about %s any more: %s", answer.site, subject, failure(answer.message))
    else:
        _LOG.warning(
            "site %s answered about %s too late: its answer is dropped, what it cost there stays spent",
            answer.site,
            subject,
        )

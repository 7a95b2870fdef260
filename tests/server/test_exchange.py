import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from mcrage.config import RunConfig
from server.exchange import LONGEST_PAUSE_SECONDS, Answer, Exchange, Subject, failure

FIRST, SECOND = Subject("training", 1), Subject("training", 2)
DESCRIBED = Subject("description", 1)
CANARY = "Mrs Jane Doe 1951-02-03"


def reply(message: Message, context: Context) -> Message:
    content = {"config": ConfigRecord({"site": str(context.node_config["site"])})}
    return Message(RecordDict(content), reply_to=message)


@pytest.fixture
def grid(staged_grid: Any) -> Any:
    return staged_grid(reply, [{"site": "a"}, {"site": "b"}], RunConfig())


def questions(grid: Any, *sites: str) -> dict[str, Message]:
    nodes = dict(zip("ab", [1001, 1002], strict=True))
    content = RecordDict({"config": ConfigRecord({})})
    return {site: Message(content, nodes[site], "train") for site in sites}


def exchange(grid: Any, timeout: float = 0.2, **kwargs: Any) -> Exchange:
    return Exchange(grid, timeout=timeout, **kwargs)


def sites(answers: Iterable[Answer]) -> list[str]:
    return sorted(answer.site for answer in answers)


def test_everybody_who_answers_is_heard_at_once(grid: Any) -> None:
    started = time.monotonic()
    answers = exchange(grid, timeout=60.0).ask(questions(grid, "a", "b"), FIRST)
    assert sites(answers) == ["a", "b"]
    assert [answer.node_id for answer in answers] == [1001, 1002]
    assert time.monotonic() - started < 20.0


def test_who_asks_nobody_does_not_wait(grid: Any) -> None:
    started = time.monotonic()
    assert exchange(grid, timeout=60.0).ask({}, FIRST) == []
    assert time.monotonic() - started < 20.0


def test_the_deadline_is_kept_and_whoever_is_late_stays_busy(grid: Any) -> None:
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1002
    asking = exchange(grid)
    started = time.monotonic()
    assert sites(asking.ask(questions(grid, "a", "b"), FIRST)) == ["a"]
    assert 0.2 <= time.monotonic() - started < 5.0
    assert asking.busy(1001) is None
    assert asking.busy(1002) == FIRST


def test_pauses_grow_from_a_tenth_of_a_second_to_a_second(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("server.exchange.time.sleep", sleep)
    monkeypatch.setattr("server.exchange.time.monotonic", lambda: clock[0])
    grid.is_held = lambda reply: True
    exchange(grid, timeout=20.0).ask(questions(grid, "a"), FIRST)
    assert slept[0] == pytest.approx(0.1)
    assert slept[1:-1] == sorted(slept[1:-1])
    assert max(slept) == LONGEST_PAUSE_SECONDS
    assert sum(slept) == pytest.approx(20.0)


def test_a_late_answer_is_dropped_and_logged_with_its_round(grid: Any, caplog: pytest.LogCaptureFixture) -> None:
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1002
    asking = exchange(grid)
    asking.ask(questions(grid, "a", "b"), FIRST)
    grid.is_held = lambda reply: False
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        assert sites(asking.ask(questions(grid, "a"), SECOND)) == ["a"]
    assert "site b answered about the training of round 1 too late" in caplog.text
    assert asking.busy(1002) is None


def test_an_answer_to_the_same_question_counts_when_it_is_asked_again(grid: Any) -> None:
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1002
    asking = exchange(grid)
    assert sites(asking.ask(questions(grid, "a", "b"), FIRST)) == ["a"]
    grid.is_held = lambda reply: False
    assert sites(asking.ask({}, FIRST)) == ["b"]


def test_a_node_that_is_gone_owes_nothing_more(grid: Any, caplog: pytest.LogCaptureFixture) -> None:
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1002
    asking = exchange(grid)
    asking.ask(questions(grid, "b"), FIRST)
    grid.offline = {1002}
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        asking.descriptions()
    assert asking.busy(1002) is None
    assert (
        "site b does not answer about the training of round 1 any more: the site's node is not connected" in caplog.text
    )


def test_an_error_that_the_superlink_makes_belongs_to_the_site_that_was_asked(grid: Any) -> None:
    grid.offline = {1002}
    (answer,) = exchange(grid).ask(questions(grid, "b"), FIRST)
    assert (answer.site, answer.node_id, answer.is_from_there) == ("b", 1002, True)
    assert answer.message.metadata.src_node_id == SUPERLINK_NODE_ID


def test_descriptions_are_kept_until_somebody_wants_them(grid: Any) -> None:
    grid.is_held = lambda reply: True
    asking = exchange(grid)
    asking.send(questions(grid, "b"), DESCRIBED)
    assert asking.descriptions() == []
    grid.is_held = lambda reply: False
    assert sites(asking.ask(questions(grid, "a"), FIRST)) == ["a"]
    assert sites(asking.descriptions()) == ["b"]
    assert asking.descriptions() == []


def swapped(replies: Sequence[Message]) -> Sequence[Message]:
    one, other = (reply.metadata.__dict__ for reply in replies)
    key = "_reply_to_message_id"
    one[key], other[key] = other[key], one[key]
    return replies


def test_replies_that_were_swapped_are_of_neither_site(grid: Any) -> None:
    grid.tamper = swapped
    answers = exchange(grid).ask(questions(grid, "a", "b"), FIRST)
    assert sites(answers) == ["a", "b"]
    assert not any(answer.is_from_there for answer in answers)


def test_content_in_the_superlinks_own_name_is_nobodys(grid: Any) -> None:
    def forge(replies: Sequence[Message]) -> Sequence[Message]:
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return replies

    grid.tamper = forge
    (answer,) = exchange(grid).ask(questions(grid, "a"), FIRST)
    assert not answer.is_from_there


def test_a_replayed_reply_answers_nothing(grid: Any, caplog: pytest.LogCaptureFixture) -> None:
    asking, kept = exchange(grid), []

    def keep(replies: Sequence[Message]) -> Sequence[Message]:
        kept.extend(replies)
        return replies

    grid.tamper = keep
    asking.ask(questions(grid, "a"), FIRST)
    grid.tamper = lambda replies: kept
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        assert asking.ask(questions(grid, "a"), SECOND) == []
    assert "a reply to no open question is ignored" in caplog.text


def test_what_flower_does_not_take_is_not_waited_for(grid: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(type(grid)):  # type: ignore[misc]
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            return ["", *list(super().push_messages(list(messages)[1:]))]

    refusing = Refusing(reply, [{"site": "a"}, {"site": "b"}], RunConfig())
    asking = exchange(refusing, timeout=60.0)
    with caplog.at_level(logging.WARNING, logger="mcrage.server"):
        assert sites(asking.ask(questions(refusing, "a", "b"), FIRST)) == ["b"]
    assert "a could not be asked about the training of round 1" in caplog.text
    assert asking.busy(1001) is None


@pytest.mark.parametrize(("timeout", "ttl"), [(1.0, 3600.0), (3600.0, 14400.0)])
def test_instructions_expire_some_time_after_the_deadline(grid: Any, timeout: float, ttl: float) -> None:
    exchange(grid, timeout=timeout).ask(questions(grid, "a"), FIRST)
    assert grid.sent[0].metadata.ttl == ttl


def test_somebody_listens_while_answers_are_waited_for(grid: Any) -> None:
    heard: list[list[str]] = []
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1002
    asking = exchange(grid, heard=lambda sites: heard.append(list(sites)))
    asking.ask(questions(grid, "a", "b"), FIRST)
    assert heard[0] == ["a"]
    assert heard[1:]
    assert not any(heard[1:])
    heard.clear()
    asking.pause(0.01)
    assert heard == [[]]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (ErrorCode.MESSAGE_UNAVAILABLE, "the instruction expired"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "the reply expired"),
        (ErrorCode.NODE_UNAVAILABLE, "not connected"),
    ],
)
def test_what_the_superlink_reports_is_said_in_our_words(grid: Any, code: int, words: str) -> None:
    (question,) = questions(grid, "a").values()
    error = Message(Error(code, CANARY), reply_to=question)
    error.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
    assert words in failure(error)
    assert CANARY not in failure(error)


def losing(grid: Any, node_id: int, times: int) -> None:
    """The node fetches instructions that never reach it."""
    left = [times]

    def is_lost(reply: Message) -> bool:
        is_hit = reply.metadata.src_node_id == node_id and reply.metadata.message_type == "train" and left[0] > 0
        if is_hit:
            left[0] -= 1
            grid._replies.pop(reply.metadata.reply_to_message_id)
        return is_hit

    grid.is_held = is_lost


def test_an_instruction_that_never_arrived_is_sent_again_within_the_round(
    grid: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.exchange.SILENCE_SECONDS", 0.3)
    losing(grid, 1002, times=2)
    asking = exchange(grid, timeout=30.0)
    assert sites(asking.ask(questions(grid, "a", "b"), FIRST)) == ["a", "b"]
    assert [message.metadata.message_type for message in grid.sent].count("train") == 4
    assert caplog.text.count("did not arrive there") == 2
    assert asking.busy(1002) is None


def test_a_site_that_never_answers_is_sent_the_same_three_times_and_no_more(
    grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchange.SILENCE_SECONDS", 0.1)
    losing(grid, 1002, times=99)
    started = time.monotonic()
    assert sites(exchange(grid, timeout=60.0).ask(questions(grid, "a", "b"), FIRST)) == ["a"]
    assert time.monotonic() - started < 30.0, "nobody waits for what is not there"
    nodes = [each.metadata.dst_node_id for each in grid.sent if each.metadata.message_type == "train"]
    assert nodes.count(1002) == 3


def test_a_site_that_is_only_slow_is_not_asked_twice(grid: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.exchange.SILENCE_SECONDS", 0.2)
    # A node works on one after the other: what it was sent later comes back later.
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1002 and time.monotonic() < slow_until
    slow_until = time.monotonic() + 1.5
    asking = exchange(grid, timeout=30.0)
    assert sites(asking.ask(questions(grid, "a", "b"), FIRST)) == ["a", "b"]
    sent = [message.metadata.message_type for message in grid.sent]
    assert sent.count("train") == 2
    assert sent.count("query.present") >= 2


def test_an_old_instruction_that_never_arrived_frees_its_site_for_the_next_round(
    grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(grid, 1002, times=1)
    asking = exchange(grid, timeout=0.3)
    assert sites(asking.ask(questions(grid, "a", "b"), FIRST)) == ["a"]
    assert asking.busy(1002) == FIRST
    monkeypatch.setattr("server.exchange.SILENCE_SECONDS", 0.0)
    grid.is_held = lambda reply: reply.metadata.src_node_id == 1001 and reply.metadata.message_type == "train"
    asking.ask(questions(grid, "a"), SECOND)
    assert asking.busy(1002) is None


def test_a_node_that_is_gone_is_not_taken_for_one_that_lost_an_instruction(
    grid: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.exchange.SILENCE_SECONDS", 0.1)
    grid.offline = {1002}
    grid.is_held = lambda reply: reply.metadata.message_type == "train"
    asking = exchange(grid, timeout=1.0)
    asking.ask(questions(grid, "b"), FIRST)
    assert "query.present" in [message.metadata.message_type for message in grid.sent]
    assert [message.metadata.message_type for message in grid.sent].count("train") == 1

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from mcrage.errors import MessageError
from mcrage.messages import SiteUpdate, Wire
from mcrage.signing import Signer, public_key, signed
from server.exchange import Answer
from server.validation import Replies, check_replies, read_array, read_update, received

CANARY = "Mrs Jane Doe 1951-02-03"
ASKED = {11: "b", 12: "a", 13: "c", 99: "stranger"}
SITES = ["b", "a", "c"]
GOOD = np.ones((2, 3), np.float32)


def content(array: np.ndarray = GOOD, name: str = "w", **values: float | str) -> RecordDict:
    config = ConfigRecord({"server-round": 2, "loss": 0.5, **values})
    return RecordDict({"config": config, "arrays": ArrayRecord({name: Array(array)})})


def reply(node_id: int, body: RecordDict | Error) -> Message:
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    return Message(body, reply_to=Message(RecordDict(), node_id, "train"))


def check(*messages: Message) -> Replies[SiteUpdate]:
    read = partial(SiteUpdate.from_wire, shapes={"w": (2, 3)})
    nodes = [message.metadata.src_node_id for message in messages]
    answers = [Answer(ASKED[node_id], node_id, message) for node_id, message in zip(nodes, messages, strict=True)]
    return check_replies(answers, asked=SITES, read=read, server_round=2)


def test_good_replies_come_in_the_order_of_the_names() -> None:
    replies = check(*(reply(node_id, content()) for node_id in (11, 12, 13)))
    assert list(replies.accepted) == ["a", "b", "c"]
    assert replies.dropped == {}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (content(np.full((2, 3), np.nan, np.float32)), "finite"),
        (content(np.array([[0, 0, 0], [0, 0, np.inf]], np.float32)), "finite"),
        (content(np.ones((1,), np.float32)), "expected float32"),
        (content(np.ones((1, 3), np.float32)), "expected float32"),
        (content(np.ones((7,), np.float32)), "expected float32"),
        (content(np.ones((3, 2), np.float32)), "expected float32"),
        (content(np.ones((), np.float32)), "expected float32"),
        (content(GOOD.astype(np.float64)), "expected float32"),
        (content(GOOD.astype(np.float16)), "float32, float64 or uint32"),
        (content(GOOD.astype(np.int8)), "float32, float64 or uint32"),
        (content(GOOD.astype(np.int64)), "float32, float64 or uint32"),
        (content(GOOD.astype(np.complex64)), "float32, float64 or uint32"),
        (content(GOOD.astype(bool)), "float32, float64 or uint32"),
        (content(np.asfortranarray(GOOD)), "C order"),
        (content(np.full((2, 3), 1e20, np.float32)), "beyond"),
        (content(name="v"), "do not match"),
        (content(**{"num-examples": 10**9}), "num-examples"),
        *((content(weight=weight), "weight") for weight in (-99.0, 0.0, 1e18, float("nan"))),
        (content(**{f"x{place}": 1.0 for place in range(300)}), "at most 64 values"),
        (content(server_round=2), "server_round"),
        (content(**{"server-round": 3}), "expected a reply of round 2"),
        (content(**{"server-round": 2.0}), "server-round"),
        (content(**{"server-round": 1}), "expected a reply of round 2"),
        (content(loss=float("inf")), "loss"),
        (content(loss=float("nan")), "loss"),
        (RecordDict(), "expected the records"),
        (RecordDict({**content(), "metrics": MetricRecord({"weight": 1e9})}), "expected the records"),
        (RecordDict({**content(), "more": ArrayRecord()}), "expected the records"),
        (Error(1003, "0123abcd"), "does not follow the schema"),
        (Error(2, f"ValueError: {CANARY}"), "runtime failed"),
    ],
)
def test_a_bad_reply_costs_its_site_the_round_and_no_other(bad: RecordDict | Error, reason: str) -> None:
    replies = check(reply(11, bad), reply(12, content()), reply(13, content()))
    assert list(replies.accepted) == ["a", "c"]
    assert list(replies.dropped) == ["b"]
    assert reason in replies.dropped["b"]
    assert CANARY not in replies.dropped["b"]


def test_a_site_that_does_not_answer_is_missing() -> None:
    replies = check(reply(12, content()))
    assert replies.dropped == {"b": "did not answer in time", "c": "did not answer in time"}


def test_a_site_that_answers_twice_is_believed_neither_time() -> None:
    replies = check(reply(11, content()), reply(12, content()), reply(11, content()), reply(11, content()))
    assert list(replies.accepted) == ["a"]
    assert replies.dropped["b"] == "answered twice"


def test_a_reply_from_another_node_than_the_one_that_was_asked_is_not_taken() -> None:
    honest, moved = reply(12, content()), reply(13, content())
    answers = [Answer("a", 12, honest), Answer("b", 11, moved), Answer("c", 13, reply(11, Error(1003, "0123abcd")))]
    read = partial(SiteUpdate.from_wire, shapes={"w": (2, 3)})
    replies = check_replies(answers, asked=SITES, read=read, server_round=2)
    assert list(replies.accepted) == ["a"]
    assert set(replies.dropped.values()) == {"its reply came from another node"}


def update_of(array: np.ndarray, max_norm: float, sent: np.ndarray = GOOD) -> SiteUpdate:
    wire = Wire({"server-round": 2}, {"w": array, "v": sent})
    return read_update(wire, sent={"w": sent, "v": sent}, max_norm=max_norm)


@given(st.floats(0.01, 100), st.floats(0.1, 10))
def test_an_update_is_taken_up_to_the_bound_on_its_norm_and_not_beyond(norm: float, max_norm: float) -> None:
    direction = np.arange(6, dtype=np.float64).reshape(2, 3)
    moved = (GOOD + direction * norm / np.linalg.norm(direction)).astype(np.float32)
    exact = float(np.linalg.norm(moved.astype(np.float64) - GOOD))
    if exact <= max_norm:
        np.testing.assert_array_equal(update_of(moved, max_norm).parameters["w"], moved)
    else:
        with pytest.raises(MessageError, match=r"beyond max-update-norm"):
            update_of(moved, max_norm)


def test_without_a_bound_any_update_is_taken_and_with_one_the_site_is_told_both_numbers() -> None:
    far = np.full((2, 3), 901, np.float32)
    np.testing.assert_array_equal(update_of(far, 0.0).parameters["w"], far)
    with pytest.raises(MessageError, match=r"norm 2\.2e\+03, beyond max-update-norm=1000"):
        update_of(far, 1000.0)


def test_a_node_that_was_not_asked_changes_nothing() -> None:
    replies = check(*(reply(node_id, content()) for node_id in (11, 12, 13, 99)))
    assert list(replies.accepted) == ["a", "b", "c"]


def test_a_reply_counts_for_the_site_and_the_instruction_that_it_was_signed_for_and_no_other() -> None:
    secrets = {"a": b"a" * 32, "b": b"b" * 32, "c": b"c" * 32}
    signers = {site: Signer(site, public_key(secret)) for site, secret in secrets.items()}
    read = partial(SiteUpdate.from_wire, shapes={"w": (2, 3)})

    def signed_reply(node_id: int, *, by: str, instruction: str = "", values: dict[str, float] = {}) -> Answer:  # noqa: B006
        message = reply(node_id, content())
        asked = instruction or message.metadata.reply_to_message_id
        wire = signed(received(message.content), site=by, instruction=asked, secret=secrets[by])
        message.content["config"] = ConfigRecord({**wire.values, **values})
        return Answer(ASKED[node_id], node_id, message, signers[ASKED[node_id]])

    def dropped(*answers: Answer) -> dict[str, str]:
        replies = check_replies(answers, asked=SITES, read=read, server_round=2)
        assert set(replies.accepted) == set(SITES) - set(replies.dropped)
        return replies.dropped

    honest = [signed_reply(node_id, by=ASKED[node_id]) for node_id in (11, 12, 13)]
    assert dropped(*honest) == {}
    wrong = {"c": "its reply is not signed by this site as an answer to what it was asked"}
    assert dropped(*honest[:2], signed_reply(13, by="b")) == wrong
    assert dropped(*honest[:2], signed_reply(13, by="c", instruction="another one")) == wrong
    assert dropped(*honest[:2], signed_reply(13, by="c", values={"loss": 0.25})) == wrong
    assert dropped(*honest[:2], Answer("c", 13, reply(13, content()), signers["c"])) == {"c": "its reply is not signed"}
    swapped = [
        replace(honest[0], message=honest[1].message, node_id=12),
        replace(honest[1], message=honest[0].message, node_id=11),
    ]
    assert set(dropped(*swapped, honest[2])) == {"a", "b"}, "even where Flower says that they are right"


@pytest.mark.parametrize("value", [b"bytes", [1, 2], "x" * (2**24 + 1)])
def test_values_are_scalars_of_bounded_size(value: object) -> None:
    with pytest.raises(MessageError, match="expected a number or a text"):
        received(RecordDict({"config": ConfigRecord({"x": value}), "arrays": ArrayRecord()}))  # type: ignore[dict-item]


def test_there_are_not_endless_values() -> None:
    many = ConfigRecord({f"x{place}": place for place in range(65)})
    with pytest.raises(MessageError, match="at most 64"):
        received(RecordDict({"config": many, "arrays": ArrayRecord()}))


def claiming(dtype: str, shape: tuple[int, ...], data: bytes, stype: str = "numpy.ndarray") -> Array:
    return Array(dtype, shape, stype, data)


def saved(array: np.ndarray) -> bytes:
    return bytes(Array(array).data)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (claiming("float32", (10**12,), saved(GOOD)), "at most"),
        (claiming("float32", (10**9, 10**9, 10**9), saved(GOOD)), "at most"),
        (claiming("float32", (3, 2), saved(GOOD)), "its bytes"),
        (claiming("float32", (-2, -3), saved(GOOD)), "expected float32"),
        (claiming("float64", (2, 3), saved(GOOD)), "its bytes"),
        (claiming("object", (2, 3), saved(GOOD)), "expected float32"),
        (claiming("float32", (2, 3), saved(GOOD.astype(">f4"))), "its bytes"),
        (claiming("float32", (2, 3), saved(GOOD)[:-1]), "its bytes"),
        (claiming("float32", (2, 3), saved(GOOD) + b"x"), "its bytes"),
        (claiming("float32", (2, 3), saved(GOOD), stype="pickle"), "its bytes"),
        (claiming("float32", (2, 3), b""), "its bytes"),
    ],
)
def test_an_array_that_is_not_what_it_says_is_refused_before_memory_is_taken(array: Array, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        read_array(array, "w")


@given(st.binary(max_size=300), st.integers(0, 160))
def test_any_bytes_either_are_the_array_or_are_refused(noise: bytes, keep: int) -> None:
    data = saved(GOOD)[:keep] + noise
    try:
        array = read_array(claiming("float32", (2, 3), data), "w")
    except MessageError:
        return
    assert (array.shape, array.dtype) == (GOOD.shape, GOOD.dtype)


@given(st.lists(st.integers(0, 4), max_size=3).map(tuple), st.sampled_from([np.float32, np.float64]))
def test_honest_arrays_arrive(shape: tuple[int, ...], dtype: type) -> None:
    array = np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)
    got = read_array(Array(array), "w")
    np.testing.assert_array_equal(got, array, strict=True)

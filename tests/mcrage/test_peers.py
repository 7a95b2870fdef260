import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcrage.errors import MessageError
from mcrage.peers import Peer, peers_from_json, peers_to_json

RUN = "a" * 64
KEYS = {f"site-{number}": bytes([number]) * 32 for number in range(3)}
PEERS = {site: Peer.signed(key, site=site, run=RUN, secret=key) for site, key in KEYS.items()}


def changed(**fields: object) -> str:
    content = json.loads(peers_to_json(PEERS))
    return json.dumps(content | {"site-1": content["site-1"] | fields})


def test_the_same_peers_come_back_in_one_order() -> None:
    assert peers_from_json(peers_to_json(PEERS), run=RUN) == PEERS
    assert peers_to_json(dict(reversed(PEERS.items()))) == peers_to_json(PEERS)
    one = PEERS["site-1"]
    assert Peer.parse(one.to_json(), site="site-1", run=RUN) == one


def test_a_key_counts_for_its_site_and_its_run_alone() -> None:
    text = PEERS["site-1"].to_json()
    for site, run in (("site-2", RUN), ("site-1", "b" * 64)):
        with pytest.raises(MessageError, match="is not signed by it for this run"):
            Peer.parse(text, site=site, run=run)
    swapped = json.loads(peers_to_json(PEERS))
    swapped["site-1"], swapped["site-2"] = swapped["site-2"], swapped["site-1"]
    with pytest.raises(MessageError, match="is not signed by it for this run"):
        peers_from_json(json.dumps(swapped), run=RUN)


@pytest.mark.parametrize("name", ["key", "signing_key", "signature"])
def test_no_part_can_be_another(name: str) -> None:
    other = Peer.signed(b"k" * 32, site="site-1", run=RUN, secret=b"s" * 32)
    with pytest.raises(MessageError, match="is not signed by it for this run"):
        peers_from_json(changed(**{name: getattr(other, name).hex()}), run=RUN)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected those of 2 to"),
        (json.dumps({"site-1": {}}), "expected those of 2 to"),
        (json.dumps({f"s{number}": {} for number in range(1001)}), "expected those of 2 to"),
        (json.dumps({"site-1": {}, "../x": {}}), "not one of a site"),
        (json.dumps({"site-1": {}, "site-2": {}}), "expected a key, a signing key and a signature"),
        (changed(key="00"), "hexadecimal digits"),
        (changed(key=7), "hexadecimal digits"),
        (changed(signature="zz" * 64), "hexadecimal digits"),
        (changed(more="00"), "expected a key, a signing key and a signature"),
    ],
    ids=["json", "list", "one", "many", "name", "empty", "short", "number", "digits", "more"],
)
def test_anything_else_is_refused_in_words(text: str, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        peers_from_json(text, run=RUN)


@given(st.text(max_size=50))
def test_no_text_breaks_it(text: str) -> None:
    with pytest.raises(MessageError):
        peers_from_json(text, run=RUN)

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from mcrage.errors import ConfigError, MessageError
from mcrage.pki import site_request
from mcrage.signing import SIGNATURE, Signer, as_extension, public_key, requested_key, signed, unsigned
from mcrage.wire import Wire

SECRET = bytes(range(32))
WIRE = Wire(
    {"server-round": 2, "loss": 0.5, "is-last": False, "text": "x"},
    {"float32": np.arange(6, dtype=np.float32).reshape(2, 3), "float64": np.ones(2)},
)
SIGNER = Signer("st-mary", public_key(SECRET))


def sign(wire: Wire = WIRE, *, site: str = "st-mary", instruction: str = "one", secret: bytes = SECRET) -> Wire:
    return signed(wire, site=site, instruction=instruction, secret=secret)


def check(wire: Wire, instruction: str = "one") -> Wire:
    return unsigned(wire, signer=SIGNER, instruction=instruction)


def test_what_was_signed_comes_back_without_the_signature() -> None:
    back = check(sign())
    assert back.values == WIRE.values
    assert back.arrays is WIRE.arrays
    assert sign().values == sign().values, "the same reply has the same signature"
    assert unsigned(sign(), signer=None, instruction="") == back, "where no key is known, any is taken off"


@pytest.mark.parametrize(
    "values",
    [
        {"server-round": 3},
        {"server-round": 2.0},
        {"is-last": 0},
        {"loss": 0.5000000000000001},
        {"text": "y"},
        {"more": 1},
    ],
    ids=["round", "type", "bool", "last digit", "text", "one more"],
)
def test_no_value_can_be_changed(values: dict[str, float]) -> None:
    with pytest.raises(MessageError, match="not signed by this site"):
        check(Wire({**sign().values, **values}, WIRE.arrays))


@pytest.mark.parametrize(
    "arrays",
    [
        {"float32": WIRE.arrays["float32"].reshape(3, 2)},
        {"float32": WIRE.arrays["float32"].T},
        {"float32": WIRE.arrays["float32"] + np.float32(1e-6)},
        {"float32": WIRE.arrays["float32"].astype(np.float64)},
        {"float32": WIRE.arrays["float64"], "float64": WIRE.arrays["float32"]},
        {"more": np.ones(1)},
    ],
    ids=["shape", "order", "last digit", "type", "names", "one more"],
)
def test_no_array_can_be_changed(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(MessageError, match="not signed by this site"):
        check(Wire(sign().values, {**WIRE.arrays, **arrays}))


def test_a_reply_of_another_site_or_to_another_instruction_is_not_taken() -> None:
    for other in (sign(site="st-john"), sign(instruction="two"), sign(secret=bytes(32))):
        with pytest.raises(MessageError, match="not signed by this site"):
            check(other)
    with pytest.raises(MessageError, match="not signed by this site"):
        check(sign(), instruction="two")


@given(
    st.one_of(
        st.none(), st.integers(-5, 5), st.text(max_size=140), st.text("0123456789abcdef", min_size=128, max_size=128)
    )
)
def test_whatever_stands_in_the_place_of_the_signature_is_refused_in_words(signature: object) -> None:
    values = {**WIRE.values} if signature is None else {**WIRE.values, SIGNATURE: signature}
    with pytest.raises(MessageError, match="its reply is not signed"):
        check(Wire(values, WIRE.arrays))


def test_a_request_tells_the_key_and_not_the_secret() -> None:
    pem = site_request("st-mary", as_extension(public_key(SECRET))).request_pem
    assert requested_key(pem) == public_key(SECRET)
    assert SECRET not in x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["https://example.org"],
        ["urn:mcrage:signing-key:" + "0" * 63],
        ["urn:mcrage:signing-key:" + "0" * 64 + "0"],
        ["urn:mcrage:signing-key:" + "0" * 64, "urn:mcrage:signing-key:" + "1" * 64],
    ],
    ids=["none", "another", "short", "long", "two"],
)
def test_a_request_that_does_not_tell_one_key_is_refused(names: list[str]) -> None:
    also = [x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name) for name in names])] if names else []
    with pytest.raises(ConfigError, match="the request tells no signing key of the site"):
        requested_key(site_request("st-mary", *also).request_pem)
    with pytest.raises(ConfigError, match="the request tells no signing key of the site"):
        requested_key(b"no request")

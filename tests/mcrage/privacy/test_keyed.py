"""The same key gives the same bits, another key or context unrelated ones, and a secret is its owner's file alone."""

import hashlib
import hmac
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from mcrage.errors import PrivacyError
from mcrage.privacy.keyed import KeyedBits, create_secret, derive, read_secret

KEY = bytes(range(32))
contexts = st.lists(st.one_of(st.text(max_size=4), st.integers(), st.binary(max_size=4)), max_size=3)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    create_secret(tmp_path / "secret")
    return tmp_path / "secret"


@given(first=contexts, second=contexts)
def test_two_contexts_give_one_key_only_if_they_are_equal(first: list, second: list) -> None:
    are_equal = [(type(part), part) for part in first] == [(type(part), part) for part in second]
    assert (derive(KEY, *first) == derive(KEY, *second)) == are_equal


def test_parts_are_told_apart_by_type_and_length() -> None:
    alike = [(), ("",), ("1",), (1,), (b"1",), ("ab",), ("a", "b"), ("b", "a"), ("a", "", "b"), ("a", b"b"), (-1,)]
    assert len({derive(KEY, *context) for context in alike}) == len(alike)


def test_a_derived_key_is_that_of_rfc_5869() -> None:
    info = b"s" + (5).to_bytes(8, "little") + b"round" + b"i" + (1).to_bytes(8, "little") + b"3"
    extracted = hmac.digest(bytes(32), KEY, hashlib.sha256)
    assert derive(KEY, "round", 3) == hmac.digest(extracted, info + b"\x01", hashlib.sha256)


@pytest.mark.parametrize("part", [True, 1.0, None, np.int64(1), ("a",)])
def test_a_part_of_another_type_is_refused(part: object) -> None:
    with pytest.raises(PrivacyError, match=type(part).__name__):
        derive(KEY, part)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(PrivacyError, match=f"this one has {length}"):
        derive(bytes(length), "a")
    with pytest.raises(PrivacyError, match=f"this one has {length}"):
        KeyedBits(bytes(length))


def test_the_bits_are_the_keystream_of_aes_256_in_counter_mode() -> None:
    blocks = b"".join(counter.to_bytes(16, "big") for counter in range(1000))
    expected = Cipher(algorithms.AES256(KEY), modes.ECB()).encryptor().update(blocks)
    assert KeyedBits(KEY).bytes(16_000) == expected


@given(sizes=st.lists(st.integers(0, 40), max_size=6))
def test_every_draw_goes_on_where_the_last_one_ended(sizes: list[int]) -> None:
    bits = KeyedBits(KEY)
    drawn = b"".join(bits.uint64(n).tobytes() if n % 2 else bits.bytes(n) for n in sizes)
    assert drawn == KeyedBits(KEY).bytes(len(drawn))


def test_words_can_be_written_to_and_are_of_64_bits() -> None:
    words = KeyedBits(KEY).uint64(3)
    assert words.dtype == np.uint64
    assert words.flags.writeable
    np.testing.assert_array_equal(words, np.frombuffer(KeyedBits(KEY).bytes(24), "<u8"))


def test_the_bits_of_another_key_are_unrelated() -> None:
    """Bits that differ are half of them; the bound is 6 standard deviations, a false alarm in 5·10⁸."""
    num_bits = 64 * 10_000
    others = [derive(KEY, 0), derive(KEY, 1), KEY[:-1] + b"\x00"]
    for other in others:
        differing = np.bitwise_count(KeyedBits(KEY).uint64(10_000) ^ KeyedBits(other).uint64(10_000)).sum()
        assert abs(differing - num_bits / 2) < 6 * np.sqrt(num_bits / 4)


def test_a_million_words_take_milliseconds() -> None:
    bits, seconds = KeyedBits(KEY), []
    for _ in range(5):
        start = time.perf_counter()
        bits.uint64(1_000_000)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_a_new_secret_is_32_bytes_that_its_owner_alone_reads(tmp_path: Path) -> None:
    old = os.umask(0o277)
    try:
        created = create_secret(tmp_path / "secret")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert len(created) == 32
    assert read_secret(tmp_path / "secret") == created != create_secret(tmp_path / "other")


def test_a_secret_is_never_replaced(secret: Path) -> None:
    before = secret.read_bytes()
    with pytest.raises(PrivacyError, match="never replaced"):
        create_secret(secret)
    assert secret.read_bytes() == before


def test_a_secret_is_not_created_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PrivacyError):
        create_secret(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_where_no_secret_can_be_created_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="choose another folder"):
        create_secret(tmp_path / "nowhere" / "secret")


def test_a_secret_that_cannot_be_changed_is_read(secret: Path) -> None:
    secret.chmod(0o400)
    assert len(read_secret(secret)) == 32


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o700, 0o4600])
def test_a_secret_that_others_may_read_is_refused(secret: Path, mode: int) -> None:
    secret.chmod(mode)
    with pytest.raises(PrivacyError, match="chmod 600"):
        read_secret(secret)


def test_a_link_to_a_secret_is_refused(secret: Path) -> None:
    link = secret.with_name("link")
    link.symlink_to(secret)
    with pytest.raises(PrivacyError, match="symbolic link"):
        read_secret(link)


@pytest.mark.parametrize("length", [0, 31, 33, 64])
def test_a_secret_of_another_length_is_refused(secret: Path, length: int) -> None:
    secret.write_bytes(bytes(length))
    with pytest.raises(PrivacyError, match=f"has {length} bytes"):
        read_secret(secret)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(PrivacyError, match="not a regular file"):
        read_secret(tmp_path / "pipe")
    with pytest.raises(PrivacyError, match="cannot be read"):
        read_secret(tmp_path / "pipe" / "secret")


def test_a_missing_secret_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="does not exist; create it"):
        read_secret(tmp_path / "secret")


def test_no_message_shows_the_secret(secret: Path) -> None:
    content = b"PRIVATE" * 5
    secret.write_bytes(content)
    with pytest.raises(PrivacyError) as caught:
        read_secret(secret)
    assert "PRIVATE" not in str(caught.value)

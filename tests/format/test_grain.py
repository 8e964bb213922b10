"""Grains: round trips, each validity condition of docs/format.md broken alone, hostile bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import AuthenticationFailed, ChecksumMismatch, CorruptionError, TruncatedStratum, UnsupportedVersion
from basin.format.crypto import Cipher, nonce_of_offset
from basin.format.grain import GrainHeader, associated_data, decode_header, encode_body, encode_grain, verify_grain
from basin.format.layout import GRAIN_HEADER_SIZE, GRAIN_LENGTH_MAX, GRAIN_LENGTH_MIN, Kind
from tests.format.material import (
    KEY,
    KEYS,
    OTHER_KEY,
    OTHER_STRATUM_ID,
    STRATUM_ID,
    answered,
    checksum_first,
    patched,
    refused,
)

GRAIN = encode_grain(encode_body(Kind.BLOB, 0, 0, KEY, 7), b"content")


def length_of(number: int) -> bytes:
    return number.to_bytes(4, "little")


@given(st.sampled_from(Kind), st.sampled_from([0, 1]), st.sampled_from([0, 1]), KEYS, st.binary(max_size=100))
def test_a_grain_comes_back(kind: Kind, codec: int, flags: int, key: bytes, data: bytes) -> None:
    grain = encode_grain(encode_body(kind, codec, flags, key, len(data)), data)
    header = verify_grain(grain)
    assert header == GrainHeader(GRAIN_LENGTH_MIN + len(data), kind, codec, flags, key)
    assert header.stored_size == len(grain)
    assert grain[GRAIN_HEADER_SIZE:] == data


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    answered(lambda: verify_grain(data))
    answered(lambda: verify_grain(checksum_first(data.ljust(4, b"\0"))))


@pytest.mark.parametrize("at", range(len(GRAIN)))
def test_every_changed_byte_is_refused(at: int) -> None:
    with pytest.raises(CorruptionError):
        verify_grain(patched(GRAIN, at, bytes((GRAIN[at] ^ 0x40,))))


def test_a_short_header_is_truncated() -> None:
    refused(TruncatedStratum, lambda: decode_header(GRAIN[: GRAIN_HEADER_SIZE - 1]))
    refused(TruncatedStratum, lambda: decode_header(GRAIN, len(GRAIN) - GRAIN_HEADER_SIZE + 1))
    assert decode_header(b"before" + GRAIN, 6).key == KEY


@pytest.mark.parametrize("length", [0, GRAIN_LENGTH_MIN - 1, GRAIN_LENGTH_MAX + 1, (1 << 32) - 1])
def test_condition_1_an_impossible_length(length: int) -> None:
    refused(CorruptionError, lambda: decode_header(patched(GRAIN, 4, length_of(length))))


def test_condition_1_another_length_than_the_grain_has() -> None:
    refused(TruncatedStratum, lambda: verify_grain(GRAIN + b"\0"))
    refused(TruncatedStratum, lambda: verify_grain(GRAIN[:-1]))
    refused(TruncatedStratum, lambda: verify_grain(checksum_first(patched(GRAIN, 4, length_of(GRAIN_LENGTH_MAX)))))


def test_condition_2_the_checksum() -> None:
    refused(ChecksumMismatch, lambda: verify_grain(patched(GRAIN, 0, b"\0\0\0\0")))


@pytest.mark.parametrize("kind", [0x80, 0xFF])
def test_condition_3_a_kind_that_must_be_understood(kind: int) -> None:
    refused(UnsupportedVersion, lambda: verify_grain(checksum_first(patched(GRAIN, 8, bytes((kind,))))))


def test_an_unknown_kind_that_need_not_be_understood_is_a_grain() -> None:
    assert verify_grain(checksum_first(patched(GRAIN, 8, b"\x7f"))).kind == 0x7F


@pytest.mark.parametrize("flags", [2, 0x8000])
def test_condition_3_an_unknown_flag(flags: int) -> None:
    unknown = checksum_first(patched(GRAIN, 10, flags.to_bytes(2, "little")))
    refused(UnsupportedVersion, lambda: verify_grain(unknown))


def test_condition_4_the_seal_binds_place_and_header() -> None:
    cipher = Cipher(OTHER_KEY)
    body = encode_body(Kind.BLOB, 0, 0, KEY, 7 + 16)
    sealed = cipher.seal(nonce_of_offset(128), b"content", associated_data(STRATUM_ID, 128, body))
    assert cipher.open(nonce_of_offset(128), sealed, associated_data(STRATUM_ID, 128, body)) == b"content"
    retyped = encode_body(Kind.PART, 0, 0, KEY, 7 + 16)
    for stratum, offset, header in [
        (OTHER_STRATUM_ID, 128, body),
        (STRATUM_ID, 129, body),
        (STRATUM_ID, 128, retyped),
    ]:
        with pytest.raises(AuthenticationFailed):
            cipher.open(nonce_of_offset(offset), sealed, associated_data(stratum, offset, header))
    with pytest.raises(AuthenticationFailed):
        cipher.open(nonce_of_offset(128), sealed, associated_data(OTHER_STRATUM_ID, 128, body))

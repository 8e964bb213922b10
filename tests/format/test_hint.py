"""Hints of a bucket, which nobody believes, and stubs of folded records, which are sealed as records are."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import (
    AuthenticationFailed,
    BasinError,
    ChecksumMismatch,
    CorruptionError,
    TruncatedStratum,
    UnsupportedVersion,
)
from basin.format.hint import Hint, Stub, decode_hint, decode_stub, encode_hint, encode_stub
from basin.format.layout import FRAME_HEADER_SIZE, HINT_MAGIC, HINT_SIZE_MAX, RECORD_MAGIC, STUB_MAGIC
from basin.format.record import FrameCipher, decode_frame_header
from tests.format.material import (
    KEY,
    KEYS,
    OPEN_CIPHER,
    OTHER_KEY,
    SEALED_CIPHER,
    U32,
    U64,
    answered,
    checksum_first,
    patched,
    refused,
)

HINT = encode_hint(Hint(1000, 900, {"keys/0123456789abcdef/slot.json": b"{}", "keys/0123456789abcdef/1": bytes(100)}))
POSITION = 7
CIPHERS = pytest.mark.parametrize("cipher", [OPEN_CIPHER, SEALED_CIPHER], ids=["open", "encrypted"])


def stub_of(cipher: FrameCipher) -> bytes:
    return encode_stub(cipher, POSITION, Stub(1000, KEY), generation=1, randomness=OTHER_KEY)


def hint_with(payload: bytes) -> bytes:
    return HINT_MAGIC + xxhash.xxh3_128_digest(payload) + payload


def stub_with(fields: Any, *, magic: bytes = STUB_MAGIC, position: int = POSITION) -> bytes:
    return SEALED_CIPHER.seal(magic, position, msgpack.packb(fields), generation=0, randomness=KEY)


class TestHint:
    @given(st.builds(Hint, U64, U64, st.dictionaries(st.text(max_size=40), st.binary(max_size=100), max_size=5)))
    def test_it_comes_back(self, hint: Hint) -> None:
        assert decode_hint(encode_hint(hint)) == hint

    def test_an_empty_one_says_nothing(self) -> None:
        assert decode_hint(encode_hint(Hint())) == Hint(0, 0, {})

    def test_equal_hints_are_equal_bytes(self) -> None:
        assert encode_hint(decode_hint(HINT)) == HINT

    @pytest.mark.parametrize("bit", [1, 128])
    @pytest.mark.parametrize("at", range(len(HINT)))
    def test_every_changed_byte_is_found(self, at: int, bit: int) -> None:
        refused(CorruptionError, lambda: decode_hint(patched(HINT, at, bytes((HINT[at] ^ bit,)))))

    @pytest.mark.parametrize("size", range(len(HINT)))
    def test_every_truncation_is_found(self, size: int) -> None:
        refused(CorruptionError, lambda: decode_hint(HINT[:size]))

    def test_what_follows_is_found(self) -> None:
        refused(CorruptionError, lambda: decode_hint(HINT + b"\0"))
        refused(CorruptionError, lambda: decode_hint(HINT + HINT))

    def test_its_size_has_a_cap(self) -> None:
        overhead = len(encode_hint(Hint(1, 1, {"keys": bytes(HINT_SIZE_MAX - 100)}))) - (HINT_SIZE_MAX - 100)
        largest = Hint(1, 1, {"keys": bytes(HINT_SIZE_MAX - overhead)})
        assert len(encode_hint(largest)) == HINT_SIZE_MAX
        assert decode_hint(encode_hint(largest)) == largest
        larger = encode_hint(Hint(1, 1, {"keys": bytes(HINT_SIZE_MAX - overhead + 1)}))
        refused(CorruptionError, lambda: decode_hint(larger))

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"checkpoint": 1, "older": 0},
            {"checkpoint": 1, "keys": {}},
            {"older": 0, "keys": {}},
            {"checkpoint": -1, "older": 0, "keys": {}},
            {"checkpoint": True, "older": 0, "keys": {}},
            {"checkpoint": 1.0, "older": 0, "keys": {}},
            {"checkpoint": 1, "older": "0", "keys": {}},
            {"checkpoint": 1, "older": 0, "keys": []},
            {"checkpoint": 1, "older": 0, "keys": None},
            {"checkpoint": 1, "older": 0, "keys": {"keys/a": "text"}},
            {"checkpoint": 1, "older": 0, "keys": {"keys/a": None}},
            {"checkpoint": 1, "older": 0, "keys": {b"keys/a": b""}},
            {"checkpoint": 1, "older": 0, "keys": {1: b""}},
            [1, 0, {}],
            7,
            None,
        ],
    )
    def test_fields_that_are_not_valid(self, fields: object) -> None:
        refused(CorruptionError, lambda: decode_hint(hint_with(msgpack.packb(fields))))

    @pytest.mark.parametrize(
        "payload",
        [
            b"",
            b"\xc1",
            b"\xdf\xff\xff\xff\xff",  # a map of four billion entries
            b"\x81\xa4keys\xc6\xff\xff\xff\xff",  # four billion bytes
            b"\x91" * 100_000,  # lists in lists
            b"\x81\x90\x01",  # a list as a name
            b"\x81\xa2\xff\xfe\x01",  # text that is not UTF-8
        ],
    )
    def test_a_payload_that_is_no_map(self, payload: bytes) -> None:
        refused(CorruptionError, lambda: decode_hint(hint_with(payload)))

    def test_later_fields_are_passed_over(self) -> None:
        fields = {"checkpoint": 3, "older": 2, "keys": {}, "later": [1, 2]}
        assert decode_hint(hint_with(msgpack.packb(fields))) == Hint(3, 2, {})

    @given(st.binary(max_size=200))
    def test_arbitrary_bytes_are_answered(self, data: bytes) -> None:
        answered(lambda: decode_hint(data))
        answered(lambda: decode_hint(hint_with(data)))


class TestStub:
    @CIPHERS
    @given(st.integers(POSITION, (1 << 64) - 1), KEYS, st.integers(0, 1), KEYS)
    def test_it_comes_back(
        self, cipher: FrameCipher, checkpoint: int, digest: bytes, generation: int, randomness: bytes
    ) -> None:
        stub = Stub(checkpoint, digest)
        frame = encode_stub(cipher, POSITION, stub, generation=generation, randomness=randomness)
        assert decode_stub(cipher, frame, POSITION) == stub
        header = decode_frame_header(frame)
        assert (header.magic, header.position, header.generation) == (STUB_MAGIC, POSITION, generation)

    @given(U64, U32)
    def test_it_holds_its_record(self, position: int, later: int) -> None:
        checkpoint = min(position + later, (1 << 64) - 1)
        frame = encode_stub(OPEN_CIPHER, position, Stub(checkpoint, KEY), generation=0, randomness=KEY)
        assert decode_stub(OPEN_CIPHER, frame, position) == Stub(checkpoint, KEY)
        if position:
            too_old = encode_stub(OPEN_CIPHER, position, Stub(position - 1, KEY), generation=0, randomness=KEY)
            refused(CorruptionError, lambda: decode_stub(OPEN_CIPHER, too_old, position))

    @CIPHERS
    def test_every_changed_byte_is_found(self, cipher: FrameCipher) -> None:
        frame = stub_of(cipher)
        for at in range(len(frame)):
            for bit in (1, 128):
                changed = patched(frame, at, bytes((frame[at] ^ bit,)))
                with pytest.raises(CorruptionError):
                    decode_stub(cipher, changed, POSITION)

    @CIPHERS
    def test_every_changed_byte_behind_the_header_fails_the_checksum(self, cipher: FrameCipher) -> None:
        frame = stub_of(cipher)
        for at in (*range(4), *range(12 + 4, 28), *range(32, len(frame))):
            refused(
                ChecksumMismatch, partial(decode_stub, cipher, patched(frame, at, bytes((frame[at] ^ 1,))), POSITION)
            )

    def test_a_change_with_the_right_checksum_does_not_authenticate(self) -> None:
        frame = stub_of(SEALED_CIPHER)
        flags = range(12, 16)
        for at in range(4, len(frame)):
            changed = checksum_first(patched(frame, at, bytes((frame[at] ^ 1,))))
            expected: type[BasinError] = AuthenticationFailed
            if at < 8:  # the size
                expected = TruncatedStratum if at < 5 else CorruptionError
            elif at < 12 or 28 <= at < 32:  # the magic; what must be zero
                expected = CorruptionError
            elif at in flags:
                expected = AuthenticationFailed if at == 12 else UnsupportedVersion
            with pytest.raises(expected):
                decode_stub(SEALED_CIPHER, changed, POSITION)

    @CIPHERS
    def test_every_truncation_is_found(self, cipher: FrameCipher) -> None:
        frame = stub_of(cipher)
        for size in range(len(frame)):
            refused(TruncatedStratum, partial(decode_stub, cipher, frame[:size], POSITION))
        refused(TruncatedStratum, lambda: decode_stub(cipher, frame + b"\0", POSITION))

    @CIPHERS
    def test_it_is_of_one_position(self, cipher: FrameCipher) -> None:
        for position in (0, POSITION - 1, POSITION + 1):
            refused(CorruptionError, partial(decode_stub, cipher, stub_of(cipher), position))

    def test_a_moved_one_does_not_authenticate(self) -> None:
        moved = checksum_first(patched(stub_of(SEALED_CIPHER), 16, (POSITION + 1).to_bytes(8, "little")))
        refused(AuthenticationFailed, lambda: decode_stub(SEALED_CIPHER, moved, POSITION + 1))

    def test_a_record_does_not_become_a_stub(self) -> None:
        record = stub_with({"checkpoint": 1000, "hash": KEY}, magic=RECORD_MAGIC)
        refused(CorruptionError, lambda: decode_stub(SEALED_CIPHER, record, POSITION))
        renamed = checksum_first(patched(record, 8, STUB_MAGIC))
        refused(AuthenticationFailed, lambda: decode_stub(SEALED_CIPHER, renamed, POSITION))

    def test_another_basin_or_key_does_not_authenticate(self) -> None:
        frame = stub_of(SEALED_CIPHER)
        for cipher in (
            FrameCipher(bytes(16), {0: KEY, 1: OTHER_KEY}),
            FrameCipher(bytes(range(16)), {1: KEY}),
            FrameCipher(bytes(range(16)), {0: KEY}),
        ):
            refused(AuthenticationFailed, partial(decode_stub, cipher, frame, POSITION))

    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"checkpoint": 1000},
            {"hash": KEY},
            {"checkpoint": -1, "hash": KEY},
            {"checkpoint": True, "hash": KEY},
            {"checkpoint": "1000", "hash": KEY},
            {"checkpoint": POSITION - 1, "hash": KEY},
            {"checkpoint": 1000, "hash": KEY[:-1]},
            {"checkpoint": 1000, "hash": KEY + b"\0"},
            {"checkpoint": 1000, "hash": b""},
            {"checkpoint": 1000, "hash": "x" * 32},
            {"checkpoint": 1000, "hash": None},
            [1000, KEY],
            None,
        ],
    )
    def test_fields_that_are_not_valid(self, fields: object) -> None:
        refused(CorruptionError, lambda: decode_stub(SEALED_CIPHER, stub_with(fields), POSITION))

    def test_later_fields_are_passed_over(self) -> None:
        frame = stub_with({"checkpoint": POSITION, "hash": KEY, "later": 1})
        assert decode_stub(SEALED_CIPHER, frame, POSITION) == Stub(POSITION, KEY)

    def test_it_is_small(self) -> None:
        assert len(stub_of(SEALED_CIPHER)) < FRAME_HEADER_SIZE + 80

    def test_it_says_nothing_without_the_key(self) -> None:
        assert KEY not in stub_of(SEALED_CIPHER)
        assert KEY in stub_of(OPEN_CIPHER)

    @CIPHERS
    @given(st.binary(max_size=200))
    def test_arbitrary_bytes_are_answered(self, cipher: FrameCipher, data: bytes) -> None:
        answered(lambda: decode_stub(cipher, data, POSITION))
        answered(lambda: decode_stub(cipher, checksum_first(bytes(4) + data), POSITION))
        sealed = cipher.seal(STUB_MAGIC, POSITION, data, generation=0, randomness=KEY)
        answered(lambda: decode_stub(cipher, sealed, POSITION))

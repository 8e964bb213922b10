"""Stubs of a given size: they fill the place of a record, by themselves or with the gap that they state."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from basin.errors import CorruptionError
from basin.format.hint import Stub, decode_stub, encode_stub
from basin.format.record import FrameCipher

OPEN = FrameCipher(bytes(16), None)
SEALED = FrameCipher(bytes(16), {0: bytes(range(32))})
HASH = bytes(range(32))


def encoded(cipher: FrameCipher, checkpoint: int, size: int = 0) -> bytes:
    return encode_stub(cipher, 5, Stub(checkpoint, HASH), generation=0, randomness=bytes(32), size=size)


@pytest.mark.parametrize("checkpoint", [5, 200, 60_000, 1 << 20, 1 << 40])
@pytest.mark.parametrize("cipher", [OPEN, SEALED], ids=["open", "sealed"])
def test_a_stub_takes_as_many_bytes_as_it_is_told(cipher: FrameCipher, checkpoint: int) -> None:
    smallest = len(encoded(cipher, checkpoint))
    for size in (*range(smallest, smallest + 300), 100_000, 5_000_000):
        frame = encoded(cipher, checkpoint, size)
        stub = decode_stub(cipher, frame, 5)
        assert (stub.checkpoint, stub.hash) == (checkpoint, HASH)
        assert len(frame) + stub.gap == size


@pytest.mark.parametrize("cipher", [OPEN, SEALED], ids=["open", "sealed"])
def test_a_stub_that_does_not_fit_is_refused(cipher: FrameCipher) -> None:
    smallest = len(encoded(cipher, 5))
    with pytest.raises(CorruptionError):
        encoded(cipher, 5, smallest - 1)


def test_a_stub_fits_into_the_smallest_record() -> None:
    """A record of a session's first change, with nothing in it, at a position below 2^32."""
    from basin.format.record import Record, encode_record

    keys: Mapping[int, bytes] | None
    for keys in (None, {0: bytes(32)}):
        cipher = FrameCipher(bytes(16), keys)
        for position in (1, 200, 60_000, 1 << 20, (1 << 32) - 2):
            record = Record(session=1, sequence=1, previous=HASH, time_ms=1_700_000_000_000)
            frame = cipher.seal(b"BREC", position, encode_record(record), generation=0, randomness=bytes(32))
            assert len(encoded(cipher, position + 1)) <= len(frame)

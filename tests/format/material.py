"""Fixed values and helpers that the tests of the codecs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from hypothesis import strategies as st

from basin.errors import BasinError
from basin.format.record import FrameCipher
from basin.terms import StratumId

BASIN_ID = bytes(range(16))
STRATUM_ID = StratumId(bytes(range(16, 32)))
OTHER_STRATUM_ID = StratumId(bytes(range(32, 48)))
KEY = bytes(range(64, 96))
OTHER_KEY = bytes(range(96, 128))
OPEN_CIPHER = FrameCipher(BASIN_ID, None)
SEALED_CIPHER = FrameCipher(BASIN_ID, {0: KEY, 1: OTHER_KEY})

KEYS = st.binary(min_size=32, max_size=32)
IDS = st.binary(min_size=16, max_size=16).map(StratumId)
U16 = st.integers(0, (1 << 16) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)


def answered(decode: Callable[[], Any]) -> Any:
    """What decoding gives, or None for an error of ours; anything else is a failure of the test."""
    try:
        return decode()
    except BasinError:
        return None


def refused(kind: type[BasinError], decode: Callable[[], Any]) -> None:
    """Decoding raises exactly this kind of error, and not one of its subclasses."""
    with pytest.raises(kind) as caught:
        decode()
    assert type(caught.value) is kind


def patched(data: bytes, offset: int, new: bytes) -> bytes:
    return data[:offset] + new + data[offset + len(new) :]


def checksum_first(data: bytes) -> bytes:
    """`data` with the right XXH32 of everything behind its first four bytes, as grains and frames have it."""
    return xxhash.xxh32_intdigest(data[4:]).to_bytes(4, "little") + data[4:]


def checksum_at(data: bytes, offset: int) -> bytes:
    """`data` with the right XXH32 of everything before `offset` there, as headers and footers have it."""
    return patched(data, offset, xxhash.xxh32_intdigest(data[:offset]).to_bytes(4, "little"))

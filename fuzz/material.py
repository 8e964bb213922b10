"""Fixed values that several fuzz targets share, and how to get past a checksum, which hides a decoder from a fuzzer."""

from __future__ import annotations

import xxhash

from basin.format.record import FrameCipher
from basin.terms import StratumId

BASIN_ID = bytes(range(16))
STRATUM_ID = StratumId(bytes(range(16, 32)))
OTHER_STRATUM_ID = StratumId(bytes(range(32, 48)))
KEY = bytes(range(64, 96))
OTHER_KEY = bytes(range(96, 128))
OPEN_CIPHER = FrameCipher(BASIN_ID, None)


def with_checksum_before(rest: bytes) -> bytes:
    """`rest` behind its XXH32, as grains and frames have it."""
    return xxhash.xxh32_intdigest(rest).to_bytes(4, "little") + rest


def with_checksum_behind(rest: bytes) -> bytes:
    """`rest` in front of its XXH32, as headers have it."""
    return rest + xxhash.xxh32_intdigest(rest).to_bytes(4, "little")

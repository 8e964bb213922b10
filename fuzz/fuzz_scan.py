"""Scans without an index: they end, and what they report covers the bytes without a gap or an overlap."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.grain import encode_body, encode_grain
from basin.format.layout import RECORD_MAGIC, Kind
from basin.format.record import Record, encode_record
from basin.format.scan import Damage, find_frames, scan_grains
from fuzz.material import KEY, OPEN_CIPHER


def one_input(data: bytes) -> None:
    at = 0
    for found in scan_grains(memoryview(data), 0, len(data)):
        if found.offset != at:
            raise AssertionError("a scan leaves a gap")
        at = found.end if isinstance(found, Damage) else at + found.header.stored_size
    if at != len(data):
        raise AssertionError("a scan ends early")
    for offset, size in find_frames(data, 0):
        if offset < 0 or size <= 0 or offset + size > len(data):
            raise AssertionError("a frame lies outside of the bytes")


def seeds() -> Iterator[bytes]:
    grain = encode_grain(encode_body(Kind.BLOB, 0, 0, KEY, 5), b"hello")
    frame = OPEN_CIPHER.seal(
        RECORD_MAGIC, 1, encode_record(Record(0, 1, bytes(32), 0)), generation=0, randomness=bytes(32)
    )
    yield grain * 3
    yield grain + b"damage" + grain
    yield frame + b"damage" + frame

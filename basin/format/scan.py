"""Finding grains and records in raw bytes, without an index and without keys.

Serves recovery, `check` and `repair`. A damaged stretch is reported once, and the scan goes on at the next byte where a
whole, intact grain begins. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import xxhash

from basin.errors import BasinError, CorruptionError, TruncatedStratum
from basin.format.grain import CHECKSUM, GrainHeader, decode_header, verify_grain
from basin.format.layout import FRAME_HEADER_SIZE, GRAIN_HEADER_SIZE, RECORD_MAGIC
from basin.format.record import decode_frame_header

_MAGIC_AT = 8
"""Offset of the magic in a frame header."""


class GrainFound(NamedTuple):
    """An intact grain at `offset` of the scanned bytes."""

    offset: int
    header: GrainHeader


class Damage(NamedTuple):
    """Bytes from `offset` to `end` are no grains; `reason` is what was wrong first."""

    offset: int
    end: int
    reason: str


def scan_grains(data: memoryview, start: int, stop: int) -> Iterator[GrainFound | Damage]:
    """Walk the grains in `data[start:stop]`. Cost: one XXH32 over everything; over damage, a header check a byte."""
    at = start
    while at < stop:
        try:
            header = decode_header(data[:stop], at)
            end = at + header.stored_size
            if end > stop:
                raise TruncatedStratum("a grain runs past the end")
            verify_grain(data[at:end])
        except BasinError as error:
            resumed = _next_grain(data, at + 1, stop)
            yield Damage(at, resumed, str(error))
            at = resumed
            continue
        yield GrainFound(at, header)
        at = end


def _next_grain(data: memoryview, start: int, stop: int) -> int:
    """Offset of the next intact grain, or `stop`."""
    for at in range(start, stop - GRAIN_HEADER_SIZE + 1):
        try:
            header = decode_header(data, at)
        except CorruptionError:
            continue
        end = at + header.stored_size
        if end <= stop and header.kind and header.codec <= 1 and header.flags <= 1:
            (checksum,) = CHECKSUM.unpack_from(data, at)
            if xxhash.xxh32_intdigest(data[at + 4 : end]) == checksum:
                return at
    return stop


def find_frames(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of whatever looks like the frame of a record behind `start`: its checksum is right."""
    at = data.find(RECORD_MAGIC, start + _MAGIC_AT)
    while at >= 0:
        offset = at - _MAGIC_AT
        try:
            header = decode_frame_header(data, offset)
        except BasinError:
            header = None
        if header is not None and offset + header.size <= len(data) and header.size >= FRAME_HEADER_SIZE:
            (checksum,) = CHECKSUM.unpack_from(data, offset)
            if xxhash.xxh32_intdigest(memoryview(data)[offset + 4 : offset + header.size]) == checksum:
                yield offset, header.size
        at = data.find(RECORD_MAGIC, at + 1)

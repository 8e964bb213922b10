"""Finding grains and records in raw bytes, without an index and without keys.

Serves recovery, `check` and `repair`. A damaged stretch is reported once, and the scan goes on at the next byte where a
whole, intact grain begins. Pure; uses NumPy to pass over damage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import xxhash

from basin.errors import BasinError, CorruptionError, TruncatedStratum
from basin.format.grain import CHECKSUM, GrainHeader, decode_header, verify_grain
from basin.format.layout import CODEC_ZSTD, GRAIN_FLAGS_KNOWN, GRAIN_HEADER_SIZE, RECORD_MAGIC
from basin.format.record import decode_frame_header

HASHED_MAX: Final = 64
"""A scan hashes at most this many times the bytes it scans: 64 MiB take half a second then."""
_MAGIC_AT: Final = 8
"""Offset of the magic in a frame header."""
_KIND_AT: Final = 8
_SLICE: Final = 1 << 20


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
    """Walk the grains in `data[start:stop]`.

    Cost: one XXH32 over everything; over damage, 5 ns a byte to find what may be a header, and one more XXH32 of each
    such grain. What was crafted to look like grains everywhere is given up after `HASHED_MAX` times its own size: all
    that follows is reported as one damage.
    """
    at, budget = start, HASHED_MAX * (stop - start)
    while at < stop:
        end = stop
        try:
            header = decode_header(data[:stop], at)
            if at + header.stored_size > stop:
                raise TruncatedStratum("a grain runs past the end")
            end = at + header.stored_size
            verify_grain(data[at:end])
        except BasinError as error:
            budget -= end - at
            resumed = stop
            for candidate, size in _candidates(data, at + 1, stop):
                budget -= size
                if budget < 0:
                    break
                (checksum,) = CHECKSUM.unpack_from(data, candidate)
                if xxhash.xxh32_intdigest(data[candidate + 4 : candidate + size]) == checksum:
                    resumed = candidate
                    break
            yield Damage(at, resumed, str(error))
            at = resumed
            continue
        yield GrainFound(at, header)
        at = end


def _candidates(data: memoryview, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of whatever may be a grain by its header alone. Random bytes hold one in 10^11."""
    for begin in range(start, stop - GRAIN_HEADER_SIZE + 1, _SLICE):
        count = min(_SLICE, stop - GRAIN_HEADER_SIZE + 1 - begin)
        fields = np.frombuffer(data[begin + _KIND_AT : begin + _KIND_AT + count + 3], dtype=np.uint8)
        kind, codec, flags, flags_high = (fields[shift : shift + count] for shift in range(4))
        plausible = (kind != 0) & (codec <= CODEC_ZSTD) & (flags <= GRAIN_FLAGS_KNOWN) & (flags_high == 0)
        for row in np.flatnonzero(plausible).tolist():
            at = begin + row
            try:
                size = decode_header(data, at).stored_size
            except CorruptionError:
                continue
            if at + size <= stop:
                yield at, size


def find_frames(data: bytes, start: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, size) of whatever looks like the frame of a record behind `start`: its checksum is right.

    Raises `CorruptionError` if the bytes were crafted to look like frames everywhere: see `scan_grains`.
    """
    view, budget = memoryview(data), HASHED_MAX * len(data)
    at = data.find(RECORD_MAGIC, start + _MAGIC_AT)
    while at >= 0:
        offset = at - _MAGIC_AT
        try:
            size = decode_frame_header(data, offset).size
        except CorruptionError:
            size = 0
        if 0 < size <= len(data) - offset:
            budget -= size
            if budget < 0:
                raise CorruptionError("too much of the log looks like records and is none")
            (checksum,) = CHECKSUM.unpack_from(data, offset)
            if xxhash.xxh32_intdigest(view[offset + 4 : offset + size]) == checksum:
                yield offset, size
        at = data.find(RECORD_MAGIC, at + 1)

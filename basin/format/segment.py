"""Local log segments: the header of `log/<segment>.log`, and the watermark that `log/lock` holds.

A segment is its header and then frames of records, one after another. The header says where the chain goes on: first
position, hash of the record before it, and up to which byte the segment before it counts.

The watermark is overwritten in place and not synced. While its boot id is the machine's, nothing behind it counts; of
an older boot it is still a lower bound of what was durable. Pure.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import xxhash

from basin.errors import ChecksumMismatch, CorruptionError, TruncatedStratum, UnsupportedVersion
from basin.format.layout import (
    FORMAT_VERSION,
    SEGMENT_HEADER,
    SEGMENT_HEADER_SIZE,
    SEGMENT_MAGIC,
    WATERMARK,
    WATERMARK_FLAG_CUT,
    WATERMARK_FLAG_UNSYNCED,
    WATERMARK_MAGIC,
    WATERMARK_SIZE,
)

_CHECKSUM_SIZE: Final = 4
_DIGEST_SIZE: Final = 16


class SegmentHeader(NamedTuple):
    """`previous_end` is the byte at which segment `segment - 1` ends (0 for the first segment)."""

    basin_id: bytes
    segment: int
    first_position: int
    previous_hash: bytes
    previous_end: int


class Watermark(NamedTuple):
    """The log counts up to byte `offset` of `segment`, the record at `position`, and is durable up to there.

    With `unsynced` it counts while the machine runs, and may end earlier after a power cut. With `cut` a write or sync
    behind `offset` failed: what is visible there never counts.
    """

    boot_id: bytes
    segment: int
    offset: int
    position: int
    unsynced: bool = False
    cut: bool = False


def encode_segment_header(header: SegmentHeader) -> bytes:
    """128 bytes, with their checksum at the end."""
    packed = SEGMENT_HEADER.pack(
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        0,
        0,
        header.basin_id,
        header.segment,
        header.first_position,
        header.previous_hash,
        header.previous_end,
        bytes(36),
        0,
    )[:-_CHECKSUM_SIZE]
    return packed + xxhash.xxh32_intdigest(packed).to_bytes(_CHECKSUM_SIZE, "little")


def decode_segment_header(data: bytes) -> SegmentHeader:
    """Read and verify the first 128 bytes of a segment."""
    if len(data) < SEGMENT_HEADER_SIZE:
        raise TruncatedStratum("a log segment is shorter than its header")
    magic, version, zero, zero_2, basin_id, segment, position, digest, previous_end, zero_3, checksum = (
        SEGMENT_HEADER.unpack_from(data)
    )
    if magic != SEGMENT_MAGIC:
        raise CorruptionError("a log segment does not start with its magic bytes")
    if xxhash.xxh32_intdigest(data[: SEGMENT_HEADER_SIZE - _CHECKSUM_SIZE]) != checksum:
        raise ChecksumMismatch("a log segment's header does not match its checksum")
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(f"log format {version} needs a newer Basin", version=version)
    if zero or zero_2 or any(zero_3):
        raise CorruptionError("a log segment's header holds impossible values")
    return SegmentHeader(basin_id, segment, position, digest, previous_end)


def encode_watermark(mark: Watermark) -> bytes:
    """64 bytes that end with an XXH3-128 of the rest: a half-written watermark is no watermark."""
    flags = (WATERMARK_FLAG_UNSYNCED if mark.unsynced else 0) | (WATERMARK_FLAG_CUT if mark.cut else 0)
    packed = WATERMARK.pack(
        WATERMARK_MAGIC, FORMAT_VERSION, flags, mark.boot_id, mark.segment, mark.offset, mark.position, b""
    )
    packed = packed[:-_DIGEST_SIZE]
    return packed + xxhash.xxh3_128_digest(packed)


def decode_watermark(data: bytes) -> Watermark | None:
    """The watermark, or None if there is none that can be trusted."""
    if len(data) < WATERMARK_SIZE:
        return None
    body, digest = data[: WATERMARK_SIZE - _DIGEST_SIZE], data[WATERMARK_SIZE - _DIGEST_SIZE : WATERMARK_SIZE]
    if xxhash.xxh3_128_digest(body) != digest:
        return None
    magic, version, flags, boot_id, segment, offset, position, _ = WATERMARK.unpack_from(data)
    if magic != WATERMARK_MAGIC or version != FORMAT_VERSION:
        return None
    return Watermark(
        boot_id, segment, offset, position, bool(flags & WATERMARK_FLAG_UNSYNCED), bool(flags & WATERMARK_FLAG_CUT)
    )

"""Headers of log segments, and watermarks: what decodes can be encoded, and then decodes to the same."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from basin.format.segment import (
    SegmentHeader,
    Watermark,
    decode_segment_header,
    decode_watermark,
    encode_segment_header,
    encode_watermark,
)
from fuzz.material import BASIN_ID, KEY, with_checksum_behind


def one_input(data: bytes) -> None:
    if data[:1] == b"s":
        header = decode_segment_header(with_checksum_behind(data[1:]))
        if decode_segment_header(encode_segment_header(header)) != header:
            raise AssertionError("a segment header encodes differently")
    else:
        stored = data[1:] + xxhash.xxh3_128_digest(data[1:])
        mark = decode_watermark(stored)
        if mark is not None and decode_watermark(encode_watermark(mark)) != mark:
            raise AssertionError("a watermark encodes differently")


def seeds() -> Iterator[bytes]:
    yield b"s" + encode_segment_header(SegmentHeader(BASIN_ID, 2, 8, KEY, 4096))[:-4]
    yield b"w" + encode_watermark(Watermark(BASIN_ID, 2, 4096, 7))[:-16]

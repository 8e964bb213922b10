"""Headers of log segments, and watermarks."""

from __future__ import annotations

from functools import partial

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import ChecksumMismatch, CorruptionError, TruncatedStratum, UnsupportedVersion
from basin.format.layout import SEGMENT_HEADER_SIZE, WATERMARK_SIZE
from basin.format.segment import (
    SegmentHeader,
    Watermark,
    decode_segment_header,
    decode_watermark,
    encode_segment_header,
    encode_watermark,
)
from tests.format.material import BASIN_ID, IDS, KEY, KEYS, U64, answered, checksum_at, patched, refused

HEADER = encode_segment_header(SegmentHeader(BASIN_ID, 2, 8, KEY, 4096))
MARK = encode_watermark(Watermark(BASIN_ID, 2, 4096, 7))


def header_with(offset: int, new: bytes) -> bytes:
    return checksum_at(patched(HEADER, offset, new), SEGMENT_HEADER_SIZE - 4)


def mark_with(offset: int, new: bytes) -> bytes:
    body = patched(MARK, offset, new)[: WATERMARK_SIZE - 16]
    return body + xxhash.xxh3_128_digest(body)


@given(st.builds(SegmentHeader, IDS, U64, U64, KEYS, U64))
def test_a_segment_header_comes_back(header: SegmentHeader) -> None:
    encoded = encode_segment_header(header)
    assert len(encoded) == SEGMENT_HEADER_SIZE
    assert decode_segment_header(encoded + b"frames") == header


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    answered(lambda: decode_segment_header(data))
    header = patched(data.ljust(SEGMENT_HEADER_SIZE, b"\0"), 0, HEADER[:8])
    answered(lambda: decode_segment_header(checksum_at(header, SEGMENT_HEADER_SIZE - 4)))
    assert decode_watermark(data) is None or data[:WATERMARK_SIZE] == MARK


@pytest.mark.parametrize("at", range(SEGMENT_HEADER_SIZE))
def test_every_changed_byte_of_a_segment_header_is_refused(at: int) -> None:
    with pytest.raises(CorruptionError):
        decode_segment_header(patched(HEADER, at, bytes((HEADER[at] ^ 1,))))


def test_segment_headers_that_are_not_valid() -> None:
    refused(TruncatedStratum, lambda: decode_segment_header(HEADER[:-1]))
    refused(CorruptionError, lambda: decode_segment_header(header_with(0, b"\x89BSN-STR")))
    refused(ChecksumMismatch, lambda: decode_segment_header(patched(HEADER, 124, bytes(4))))
    refused(UnsupportedVersion, lambda: decode_segment_header(header_with(8, b"\2\0")))
    for offset in (10, 12, 88, 123):
        refused(CorruptionError, partial(decode_segment_header, header_with(offset, b"\1")))


@given(st.builds(Watermark, IDS, U64, U64, U64, st.booleans()))
def test_a_watermark_comes_back(mark: Watermark) -> None:
    encoded = encode_watermark(mark)
    assert len(encoded) == WATERMARK_SIZE
    assert decode_watermark(encoded) == mark


@pytest.mark.parametrize("at", range(WATERMARK_SIZE))
def test_a_changed_watermark_is_none(at: int) -> None:
    assert decode_watermark(patched(MARK, at, bytes((MARK[at] ^ 1,)))) is None


def test_a_watermark_that_is_short_strange_or_newer_is_none() -> None:
    assert decode_watermark(MARK[:-1]) is None
    assert decode_watermark(b"") is None
    assert decode_watermark(mark_with(0, b"XXXX")) is None
    assert decode_watermark(mark_with(4, b"\2")) is None
    assert decode_watermark(mark_with(24, b"\3")) == Watermark(BASIN_ID, 3, 4096, 7)

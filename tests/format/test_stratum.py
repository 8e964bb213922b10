"""Headers and footers of strata, log segments and watermarks: fixed structures with a checksum of their own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import ChecksumMismatch, CorruptionError, TruncatedStratum, UnsupportedVersion
from basin.format.layout import FOOTER_MAGIC, STRATUM_FOOTER_SIZE, STRATUM_HEADER_SIZE, StratumKind
from basin.format.stratum import (
    StratumFooter,
    StratumHeader,
    decode_footer,
    decode_header,
    encode_footer,
    encode_header,
)
from tests.format.material import (
    BASIN_ID,
    IDS,
    KEY,
    KEYS,
    OTHER_KEY,
    STRATUM_ID,
    U32,
    U64,
    answered,
    checksum_at,
    patched,
    refused,
)

HEADER = encode_header(StratumHeader(StratumKind.META, 1, 3, BASIN_ID, STRATUM_ID, 7, KEY, OTHER_KEY))
FOOTER = encode_footer(StratumFooter(200, 100, 2, 300, KEY))
FILE_SIZE = 300 + STRATUM_FOOTER_SIZE
CHECKSUM_OF_HEADER, CHECKSUM_OF_FOOTER = 124, 68


def header_with(offset: int, new: bytes) -> bytes:
    return checksum_at(patched(HEADER, offset, new), CHECKSUM_OF_HEADER)


def footer_with(offset: int, new: bytes) -> bytes:
    return checksum_at(patched(FOOTER, offset, new), CHECKSUM_OF_FOOTER)


@given(st.builds(StratumHeader, st.sampled_from(StratumKind), st.integers(0, 1), U32, IDS, IDS, U64, KEYS, KEYS))
def test_a_header_comes_back(header: StratumHeader) -> None:
    encoded = encode_header(header)
    assert len(encoded) == STRATUM_HEADER_SIZE
    assert decode_header(encoded + b"grains") == header


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    answered(lambda: decode_header(data))
    answered(lambda: decode_header(checksum_at(patched(data.ljust(128, b"\0"), 0, HEADER[:8]), CHECKSUM_OF_HEADER)))
    answered(lambda: decode_footer(data, 300))
    footer = patched(data.ljust(STRATUM_FOOTER_SIZE, b"\0")[:STRATUM_FOOTER_SIZE], 72, FOOTER_MAGIC)
    answered(lambda: decode_footer(checksum_at(footer, CHECKSUM_OF_FOOTER), len(data)))


@pytest.mark.parametrize("at", range(len(HEADER)))
def test_every_changed_byte_of_a_header_is_refused(at: int) -> None:
    with pytest.raises(CorruptionError):
        decode_header(patched(HEADER, at, bytes((HEADER[at] ^ 1,))))


def test_headers_that_are_not_valid() -> None:
    refused(TruncatedStratum, lambda: decode_header(HEADER[:-1]))
    refused(CorruptionError, lambda: decode_header(header_with(0, b"\x89BSN-LOG")))
    refused(ChecksumMismatch, lambda: decode_header(patched(HEADER, 124, b"\0\0\0\0")))
    refused(UnsupportedVersion, lambda: decode_header(header_with(8, b"\2\0")))
    refused(UnsupportedVersion, lambda: decode_header(header_with(10, b"\4")))
    refused(UnsupportedVersion, lambda: decode_header(header_with(10, b"\0")))
    refused(CorruptionError, lambda: decode_header(header_with(11, b"\2")))
    refused(CorruptionError, lambda: decode_header(header_with(120, b"\1")))


def test_damage_is_told_from_a_newer_version() -> None:
    """A changed version number without the right checksum is damage."""
    refused(ChecksumMismatch, lambda: decode_header(patched(HEADER, 8, b"\2\0")))


@given(st.integers(0, 1 << 40), U32, U64, KEYS)
def test_a_footer_comes_back(before: int, index_length: int, count: int, digest: bytes) -> None:
    offset = STRATUM_HEADER_SIZE + before
    footer = StratumFooter(offset, index_length, count, offset + index_length, digest)
    encoded = encode_footer(footer)
    assert len(encoded) == STRATUM_FOOTER_SIZE
    assert decode_footer(encoded, footer.length + STRATUM_FOOTER_SIZE) == footer


@pytest.mark.parametrize("at", range(len(FOOTER)))
def test_every_changed_byte_of_a_footer_is_refused(at: int) -> None:
    with pytest.raises(CorruptionError):
        decode_footer(patched(FOOTER, at, bytes((FOOTER[at] ^ 1,))), FILE_SIZE)


def test_footers_that_are_not_valid() -> None:
    assert decode_footer(FOOTER, FILE_SIZE).length == 300
    refused(TruncatedStratum, lambda: decode_footer(FOOTER[1:], FILE_SIZE))
    refused(TruncatedStratum, lambda: decode_footer(FOOTER + b"\0", FILE_SIZE))
    refused(TruncatedStratum, lambda: decode_footer(patched(FOOTER, 72, bytes(8)), FILE_SIZE))
    refused(ChecksumMismatch, lambda: decode_footer(patched(FOOTER, 68, bytes(4)), FILE_SIZE))
    refused(CorruptionError, lambda: decode_footer(FOOTER, FILE_SIZE + 1))
    refused(CorruptionError, lambda: decode_footer(footer_with(12, b"\1"), FILE_SIZE))
    refused(CorruptionError, lambda: decode_footer(footer_with(64, b"\1"), FILE_SIZE))
    refused(CorruptionError, lambda: decode_footer(footer_with(0, b"\x7f\0"), FILE_SIZE))
    refused(CorruptionError, lambda: decode_footer(footer_with(8, b"\x65"), FILE_SIZE))
    refused(CorruptionError, lambda: decode_footer(footer_with(0, b"\xff" * 8), FILE_SIZE))

"""Grain headers and whole grains: what verifies is exactly as long as it says, and encodes to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.grain import encode_body, encode_grain, verify_grain
from basin.format.layout import GRAIN_HEADER_SIZE, Kind
from fuzz.material import KEY, with_checksum_before


def one_input(data: bytes) -> None:
    grain = with_checksum_before(data)
    header = verify_grain(grain)
    content = grain[GRAIN_HEADER_SIZE:]
    body = encode_body(header.kind, header.codec, header.flags, header.key, len(content))
    if encode_grain(body, content) != grain:
        raise AssertionError("a grain encodes differently")


def seeds() -> Iterator[bytes]:
    for kind, content in ((Kind.BLOB, b"hello"), (Kind.CLAST, bytes(64)), (Kind.PART, b"")):
        yield encode_grain(encode_body(kind, 0, 0, KEY, len(content)), content)[4:]

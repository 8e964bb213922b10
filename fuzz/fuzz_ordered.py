"""Names that are tuples or numbers: what decodes has exactly one spelling, and sorts as its bytes do."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.ordered import decode_tuple, decode_u64, encode_tuple, encode_u64


def one_input(data: bytes) -> None:
    if len(data) == 8 and encode_u64(decode_u64(data)) != data:
        raise AssertionError("a number has two spellings")
    if encode_tuple(decode_tuple(data)) != data:
        raise AssertionError("a tuple has two spellings")


def seeds() -> Iterator[bytes]:
    yield encode_tuple((None, False, True, 0, 255, -256, 1 << 63))
    yield encode_tuple((1.5, -0.0, b"with \0 zero", "text", (1, ("deep",))))
    yield encode_tuple(())

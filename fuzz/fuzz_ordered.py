"""Names of keyspaces with tuples: what decodes encodes to a name of the same tuple, and order is kept."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.ordered import decode_tuple, encode_tuple


def one_input(data: bytes) -> None:
    elements = decode_tuple(data)
    encoded = encode_tuple(elements)
    if encode_tuple(decode_tuple(encoded)) != encoded:
        raise AssertionError("a tuple encodes differently")


def seeds() -> Iterator[bytes]:
    yield encode_tuple((None, True, 0, 255, -256, 2**64 - 1, 1.5, -0.0))
    yield encode_tuple((b"a\0b", "text", (1, (b"", "nested"))))

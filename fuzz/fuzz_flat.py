"""Flat files: header (after an `h`), end pointer (`e`) and table (`t`): what decodes encodes to the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from basin.format.flat import (
    FLAT_END_MAGIC,
    FLAT_HEADER_SIZE,
    FlatEnd,
    decode_flat_end,
    decode_flat_header,
    decode_flat_table,
    encode_flat_end,
    encode_flat_header,
    encode_flat_table,
)
from fuzz.material import KEY, OTHER_KEY, with_checksum_behind


def one_input(data: bytes) -> None:
    number, rest = int.from_bytes(data[1:9], "little"), data[9:]
    if data[:1] == b"h":
        decode_flat_header(with_checksum_behind(data[1:]))
    elif data[:1] == b"e":
        pointer = with_checksum_behind(rest) + FLAT_END_MAGIC
        if encode_flat_end(decode_flat_end(pointer, number)) != pointer:
            raise AssertionError("an end pointer encodes differently")
    else:
        files = decode_flat_table(rest, FlatEnd(number, len(rest), blake3(rest).digest()))
        if encode_flat_table([(file.name, file.size, file.hash) for file in files]) != rest:
            raise AssertionError("a table encodes differently")


def seeds() -> Iterator[bytes]:
    yield b"h" + encode_flat_header()[:-4]
    end = encode_flat_end(FlatEnd(500, 60, KEY))
    yield b"e" + (500 + 60 + len(end)).to_bytes(8, "little") + end[: -4 - len(FLAT_END_MAGIC)]
    files = [("basin.json", 300, KEY), ("keys/0123456789abcdef/slot.json", 0, OTHER_KEY), ("data/00", 1 << 40, KEY)]
    total = FLAT_HEADER_SIZE + sum(size for _, size, _ in files)
    yield b"t" + total.to_bytes(8, "little") + encode_flat_table(files)

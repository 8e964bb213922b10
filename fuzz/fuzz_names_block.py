"""Blocks of names: what decodes has its names in order, and every entry can be taken."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.layout import ENTRY_DELETE, ENTRY_INLINE, ENTRY_REFERENCE
from basin.format.names import NameEntry, PackedBlock, check_versions, decode_block, encode_block
from fuzz.material import KEY


def one_input(data: bytes) -> None:
    block = decode_block(data)
    entries = [block.entry(index) for index in range(len(block.names))]
    if [entry.name for entry in entries] != sorted(block.names):
        raise AssertionError("names out of order were accepted")
    packed = PackedBlock(data)
    for entry in entries[:50]:
        found = packed.find(entry.name, entry.version)
        if found is None or found.name != entry.name or found.version > entry.version:
            raise AssertionError("an entry of a block is not found where it lies")
    check_versions(block)
    if decode_block(encode_block(entries)).names != block.names:
        raise AssertionError("a block encodes differently")


def seeds() -> Iterator[bytes]:
    yield encode_block([NameEntry(b"\0\0\0\0a", 65536, ENTRY_INLINE, b"value", 0)])
    yield encode_block(
        [
            NameEntry(b"\0\0\0\0a", 9, ENTRY_DELETE, b"", 0),
            NameEntry(b"\0\0\0\0a", 8, ENTRY_REFERENCE, KEY, 0),
            NameEntry(b"\0\0\0\1", 7, ENTRY_INLINE, b"", 1_700_000_000_000),
        ]
    )

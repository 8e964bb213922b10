"""Metadata lists (first byte even) and chunks (odd): a chunk's pieces are all of it."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.payload import join_links, split_links
from basin.format.tree import CHUNK_ROWS, decode_chunk, decode_metadata_list, encode_chunk, encode_metadata_list
from fuzz.material import KEY, OTHER_KEY


def one_input(data: bytes) -> None:
    if data[:1] and data[0] & 1:
        metas = decode_chunk(data[1:])
        if encode_chunk(metas) != data[1:]:
            raise AssertionError("a chunk that changes when it is written again")
        return
    links, content = split_links(data[1:])
    rows, chunks = decode_metadata_list(content, links)
    if len(chunks) != -(-rows // CHUNK_ROWS):
        raise AssertionError("a metadata list with too many chunks, or too few")


def seeds() -> Iterator[bytes]:
    yield b"\1" + encode_chunk([b"", b"one", b"two"])
    content, links = encode_metadata_list(600, [KEY, None, OTHER_KEY])
    yield b"\0" + join_links(links, content)

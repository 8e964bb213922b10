"""The clast: a large content as an ordered list of parts.

A clast grain's key is that of the whole content. Its links are the caller's links and then the parts' content keys, in
order and with repetitions, so that marking needs to understand no clast; its own payload says how many links are the
caller's, and how long each part is. Pure.
"""

from __future__ import annotations

import struct
from itertools import accumulate
from typing import Final, NamedTuple

from basin.errors import CorruptionError
from basin.format.payload import Payload

CLAST_HEADER: Final = struct.Struct("<QII")
CLAST_HEADER_SIZE: Final = 16


class Clast(NamedTuple):
    """A decoded clast. `starts` has one more element than `parts`: the last is `size`, the whole's length in bytes."""

    size: int
    links: list[bytes]
    parts: list[bytes]
    starts: list[int]


def encode_clast(lengths: list[int], link_count: int) -> bytes:
    """The clast's own payload; the grain's links are the caller's `link_count` and then the parts."""
    return CLAST_HEADER.pack(sum(lengths), link_count, len(lengths)) + struct.pack(f"<{len(lengths)}I", *lengths)


def decode_clast(payload: Payload) -> Clast:
    """Undo `encode_clast`; raise `CorruptionError` unless lengths, count and size agree."""
    links, content = payload
    if len(content) < CLAST_HEADER_SIZE:
        raise CorruptionError("a clast is cut short")
    size, link_count, count = CLAST_HEADER.unpack_from(content)
    if len(content) != CLAST_HEADER_SIZE + 4 * count or len(links) != link_count + count:
        raise CorruptionError("a clast does not list the parts that it counts")
    lengths = struct.unpack_from(f"<{count}I", content, CLAST_HEADER_SIZE)
    starts = list(accumulate(lengths, initial=0))
    if starts[-1] != size or 0 in lengths:
        raise CorruptionError("a clast's parts do not add up to its size")
    return Clast(size, links[:link_count], links[link_count:], starts)

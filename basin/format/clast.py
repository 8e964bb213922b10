"""The clast: a large content as an ordered list of parts, or as a list of such lists.

A clast grain's key is that of the whole content. Its links are the caller's links and then the content keys of the
parts, or of the lists of parts, in order and with repetitions, so that marking needs to understand no clast; its own
payload says how many links are the caller's, and how long each part or list is.

A list of parts is a content of its own, a grain of kind 1, whose links are its parts. It has a tag of them, so that its
content key covers what it lists. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

from blake3 import blake3

from basin.errors import CorruptionError, UnsupportedVersion
from basin.format.payload import Payload

CLAST_HEADER: Final = struct.Struct("<QII")
CLAST_HEADER_SIZE: Final = 16
PART_LIST_MAGIC: Final = b"BPTL"
PART_LIST: Final = struct.Struct("<4sHHQI16s")
PART_LIST_SIZE: Final = 36
PARTS_LISTED_MAX: Final = 1 << 14
"""Parts of one grain: 576 KiB of keys and lengths, which a ranged read of the largest content reads of it."""

_VERSION: Final = 1
_FORM_PARTS: Final = 0
_FORM_LISTS: Final = 1
_COUNT_BITS: Final = 24
_COUNT_MASK: Final = (1 << _COUNT_BITS) - 1
_TAG_SIZE: Final = 16


class Clast(NamedTuple):
    """A decoded clast. `starts` has one more element than `parts`: the last is `size`, the whole's length in bytes.

    Where `counts` is not empty, `parts` are lists of parts, of so many each.
    """

    size: int
    links: list[bytes]
    parts: list[bytes]
    starts: list[int]
    counts: tuple[int, ...] = ()


def encode_clast(lengths: Sequence[int], link_count: int) -> bytes:
    """The payload of a clast of parts; the grain's links are the caller's `link_count` and then the parts."""
    header = CLAST_HEADER.pack(sum(lengths), link_count, len(lengths))
    return header + struct.pack(f"<{len(lengths)}I", *lengths)


def encode_clast_of_lists(sizes: Sequence[int], counts: Sequence[int], link_count: int) -> bytes:
    """The payload of a clast of lists, of `sizes` bytes and `counts` parts each; their keys end the grain's links."""
    header = CLAST_HEADER.pack(sum(sizes), link_count, _FORM_LISTS << _COUNT_BITS | len(sizes))
    return header + struct.pack(f"<{len(sizes)}Q{len(counts)}I", *sizes, *counts)


def decode_clast(payload: Payload) -> Clast:
    """Undo `encode_clast` or `encode_clast_of_lists`.

    Raises `CorruptionError` unless lengths, counts and size agree, `UnsupportedVersion` for another form.
    """
    links, content = payload
    if len(content) < CLAST_HEADER_SIZE:
        raise CorruptionError("a clast is cut short")
    size, link_count, form_and_count = CLAST_HEADER.unpack_from(content)
    form, count = form_and_count >> _COUNT_BITS, form_and_count & _COUNT_MASK
    if form not in (_FORM_PARTS, _FORM_LISTS):
        raise UnsupportedVersion(f"a clast of form {form} needs a newer Basin", version=form)
    if len(links) != link_count + count:
        raise CorruptionError("a clast does not list the parts that it counts")
    own, parts = links[:link_count], links[link_count:]
    if form == _FORM_PARTS:
        return Clast(size, own, parts, _decode_starts("I", size, count, content, CLAST_HEADER_SIZE))
    end = len(content) - 4 * count
    starts = _decode_starts("Q", size, count, content[:end], CLAST_HEADER_SIZE)
    counts = struct.unpack_from(f"<{count}I", content, end)
    if any(not 1 <= listed <= min(PARTS_LISTED_MAX, stop - start) for listed, start, stop in _rows(counts, starts)):
        raise CorruptionError("a clast has a list of an impossible number of parts")
    return Clast(size, own, parts, starts, counts)


def _rows(counts: Sequence[int], starts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    return zip(counts, starts, starts[1:], strict=False)


def _decode_starts(code: str, size: int, count: int, content: bytes, begin: int) -> list[int]:
    """Offsets of parts, and their end, from the lengths that fill `content` from byte `begin` on."""
    lengths_format = struct.Struct(f"<{count}{code}")
    if len(content) != begin + lengths_format.size:
        raise CorruptionError("a clast does not list the parts that it counts")
    lengths = lengths_format.unpack_from(content, begin)
    starts = list(accumulate(lengths, initial=0))
    if starts[-1] != size or 0 in lengths:
        raise CorruptionError("a clast's parts do not add up to its size")
    return starts


def encode_part_list(parts: Sequence[bytes], lengths: Sequence[int]) -> bytes:
    """The content of a list of at most `PARTS_LISTED_MAX` parts, which are its grain's links."""
    header = PART_LIST.pack(PART_LIST_MAGIC, _VERSION, 0, sum(lengths), len(lengths), _tag(parts))
    return header + struct.pack(f"<{len(lengths)}I", *lengths)


def decode_part_list(payload: Payload) -> Clast:
    """Undo `encode_part_list`, as a clast without links of its own.

    Raises `CorruptionError` unless all that it says of its parts agrees, `UnsupportedVersion` for another version.
    """
    parts, content = payload
    if len(content) < PART_LIST_SIZE:
        raise CorruptionError("a list of parts is cut short")
    magic, version, flags, size, count, tag = PART_LIST.unpack_from(content)
    if magic != PART_LIST_MAGIC:
        raise CorruptionError("not a list of parts")
    if version != _VERSION or flags:
        raise UnsupportedVersion(f"a list of parts of version {version} needs a newer Basin", version=version)
    if not 1 <= count <= PARTS_LISTED_MAX or len(parts) != count or tag != _tag(parts):
        raise CorruptionError("a list of parts links to others than it lists")
    return Clast(size, [], parts, _decode_starts("I", size, count, content, PART_LIST_SIZE))


def _tag(parts: Sequence[bytes]) -> bytes:
    return blake3(b"".join(parts)).digest(_TAG_SIZE)

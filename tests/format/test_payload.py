"""Payloads and clasts: links, compression, bounds."""

from __future__ import annotations

import random
import struct
import tracemalloc
from functools import partial

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import CorruptionError, UnsupportedVersion
from basin.format.clast import (
    CLAST_HEADER_SIZE,
    PART_LIST,
    PART_LIST_SIZE,
    PARTS_LISTED_MAX,
    Clast,
    decode_clast,
    decode_part_list,
    encode_clast,
    encode_clast_of_lists,
    encode_part_list,
)
from basin.format.layout import CODEC_STORED, CODEC_ZSTD, CONTENT_SIZE_MAX, FLAG_LINKS
from basin.format.payload import (
    COMPRESS_SIZE_MIN,
    Payload,
    compress,
    decode_payload,
    decompress,
    join_links,
    split_links,
)
from tests.format.material import KEY, KEYS, OTHER_KEY, answered, refused

COMPRESSOR = zstandard.ZstdCompressor(level=1)
DECOMPRESSOR = zstandard.ZstdDecompressor()
COMPRESSIBLE = b"the same again and " * 50


@given(st.lists(KEYS, max_size=5), st.binary(max_size=300))
def test_links_and_content_come_back(links: list[bytes], content: bytes) -> None:
    codec, data = compress(join_links(links, content), COMPRESSOR)
    assert decode_payload(codec, FLAG_LINKS, data, DECOMPRESSOR) == Payload(links, content)
    codec, data = compress(content, COMPRESSOR)
    assert decode_payload(codec, 0, data, DECOMPRESSOR) == Payload([], content)


def test_what_does_not_shrink_is_stored() -> None:
    assert compress(COMPRESSIBLE, COMPRESSOR)[0] == CODEC_ZSTD
    assert compress(COMPRESSIBLE, None) == (CODEC_STORED, COMPRESSIBLE)
    assert compress(COMPRESSIBLE[: COMPRESS_SIZE_MIN - 1], COMPRESSOR)[0] == CODEC_STORED
    noise = random.Random(1).randbytes(1000)
    assert compress(noise, COMPRESSOR) == (CODEC_STORED, noise)


@given(st.integers(0, 3), st.integers(0, 1), st.binary(max_size=300))
def test_arbitrary_bytes_are_answered(codec: int, flags: int, data: bytes) -> None:
    answered(lambda: decode_payload(codec, flags, data, DECOMPRESSOR))


@pytest.mark.parametrize("count", [1, 2, 1 << 20, (1 << 32) - 1])
def test_more_links_than_bytes_are_refused(count: int) -> None:
    refused(CorruptionError, lambda: split_links(count.to_bytes(4, "little") + bytes(31)))


def test_a_link_list_without_its_count_is_refused() -> None:
    refused(CorruptionError, lambda: split_links(b"\0\0\0"))
    assert split_links(bytes(4)) == Payload([], b"")


def test_an_unknown_codec_needs_a_newer_version() -> None:
    refused(UnsupportedVersion, lambda: decode_payload(2, 0, b"", DECOMPRESSOR))


@pytest.mark.parametrize(
    "damaged",
    [
        COMPRESSOR.compress(COMPRESSIBLE)[:-1],
        COMPRESSOR.compress(COMPRESSIBLE) + b"\0",
        zstandard.ZstdCompressor(write_content_size=False).compress(COMPRESSIBLE),
        b"",
        b"not zstd at all",
    ],
    ids=["cut", "extended", "without a size", "empty", "no frame"],
)
def test_a_frame_that_is_not_whole_is_refused(damaged: bytes) -> None:
    refused(CorruptionError, lambda: decompress(CODEC_ZSTD, damaged, DECOMPRESSOR))


def test_a_frame_that_lies_about_its_size_is_refused() -> None:
    frame = bytearray(COMPRESSOR.compress(COMPRESSIBLE))
    assert frame[4] & 0xC0 == 0x40  # The content size is two bytes, behind magic and descriptor.
    for claimed in (len(COMPRESSIBLE) - 256 - 1, len(COMPRESSIBLE) - 256 + 1):
        frame[5:7] = struct.pack("<H", claimed)
        refused(CorruptionError, partial(decompress, CODEC_ZSTD, bytes(frame), DECOMPRESSOR))


def test_a_bomb_allocates_nothing() -> None:
    """A frame of 25 bytes that claims a terabyte, and one of 16 KiB that really holds more than the cap."""
    claims = struct.pack("<IBQ", 0xFD2FB528, 0xE0, 1 << 40) + bytes(12)
    stream = zstandard.ZstdCompressor(level=1).compressobj(size=CONTENT_SIZE_MAX + 1)
    zeros = bytes(1 << 20)
    holds = b"".join([stream.compress(zeros) for _ in range(CONTENT_SIZE_MAX >> 20)]) + stream.compress(b"\0")
    holds += stream.flush()
    tracemalloc.start()
    try:
        for bomb in (claims, holds):
            refused(CorruptionError, partial(decompress, CODEC_ZSTD, bomb, DECOMPRESSOR))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


# --- clasts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(KEYS, st.integers(1, (1 << 32) - 1)), max_size=6), st.lists(KEYS, max_size=3))
def test_a_clast_comes_back(parts: list[tuple[bytes, int]], links: list[bytes]) -> None:
    lengths = [length for _, length in parts]
    keys = [key for key, _ in parts]
    clast = decode_clast(Payload([*links, *keys], encode_clast(lengths, len(links))))
    assert clast == Clast(sum(lengths), links, keys, [sum(lengths[:count]) for count in range(len(lengths) + 1)])


@given(st.lists(KEYS, max_size=3), st.binary(max_size=60))
def test_arbitrary_clasts_are_answered(links: list[bytes], content: bytes) -> None:
    answered(lambda: decode_clast(Payload(links, content)))
    answered(lambda: decode_part_list(Payload(links, content)))


@pytest.mark.parametrize(
    ("links", "content"),
    [
        ([KEY], encode_clast([5], 0)[: CLAST_HEADER_SIZE - 1]),
        ([KEY], encode_clast([5], 0)[:-1]),
        ([KEY], encode_clast([5], 0) + b"\0\0\0\0"),
        ([KEY], encode_clast([5], 1)),
        ([], encode_clast([5], 0)),
        ([KEY, OTHER_KEY], encode_clast([5, 0], 0)),
        ([KEY], struct.pack("<QIII", 6, 0, 1, 5)),
        ([KEY], struct.pack("<QII", 0, 0, (1 << 24) - 1)),
        ([KEY], encode_clast_of_lists([5], [3], 0)[:-1]),
        ([KEY], encode_clast_of_lists([5], [3], 0) + b"\0\0\0\0"),
        ([KEY], encode_clast_of_lists([5], [3], 1)),
        ([], encode_clast_of_lists([5], [3], 0)),
        ([KEY], encode_clast_of_lists([5], [0], 0)),
        ([KEY], encode_clast_of_lists([5], [6], 0)),
        ([KEY], encode_clast_of_lists([1 << 40], [PARTS_LISTED_MAX + 1], 0)),
        ([KEY, OTHER_KEY], encode_clast_of_lists([5, 0], [1, 1], 0)),
        ([KEY], struct.pack("<QIIQI", 6, 0, 1 << 24 | 1, 5, 1)),
        ([KEY], struct.pack("<QII", 0, 0, 1 << 24 | (1 << 24) - 1)),
    ],
    ids=[
        "header",
        "cut",
        "extended",
        "links",
        "parts",
        "empty part",
        "size",
        "count",
        "lists: cut",
        "lists: extended",
        "lists: links",
        "lists: none",
        "lists: no parts",
        "lists: more parts than bytes",
        "lists: too many parts",
        "lists: an empty one",
        "lists: size",
        "lists: count",
    ],
)
def test_a_clast_that_contradicts_itself_is_refused(links: list[bytes], content: bytes) -> None:
    refused(CorruptionError, lambda: decode_clast(Payload(links, content)))


@pytest.mark.parametrize("form", [2, 255])
def test_a_clast_of_another_form_must_be_understood(form: int) -> None:
    content = struct.pack("<QIII", 5, 0, form << 24 | 1, 5)
    refused(UnsupportedVersion, lambda: decode_clast(Payload([KEY], content)))


@given(
    st.lists(st.tuples(KEYS, st.integers(1, PARTS_LISTED_MAX), st.integers(0, 1 << 50)), max_size=6),
    st.lists(KEYS, max_size=3),
)
def test_a_clast_of_lists_comes_back(lists: list[tuple[bytes, int, int]], links: list[bytes]) -> None:
    keys = [key for key, _, _ in lists]
    counts = [count for _, count, _ in lists]
    sizes = [count + more for _, count, more in lists]
    clast = decode_clast(Payload([*links, *keys], encode_clast_of_lists(sizes, counts, len(links))))
    starts = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
    assert clast == Clast(sum(sizes), links, keys, starts, tuple(counts))


@given(st.lists(st.tuples(KEYS, st.integers(1, (1 << 32) - 1)), min_size=1, max_size=6))
def test_a_list_of_parts_comes_back(parts: list[tuple[bytes, int]]) -> None:
    lengths = [length for _, length in parts]
    keys = [key for key, _ in parts]
    listed = decode_part_list(Payload(keys, encode_part_list(keys, lengths)))
    assert listed == decode_clast(Payload(keys, encode_clast(lengths, 0)))


LIST = encode_part_list([KEY, OTHER_KEY], [5, 7])


def listed(**changed: object) -> bytes:
    """`LIST` with other fields in its header."""
    names = ("magic", "version", "flags", "size", "count", "tag")
    fields = {**dict(zip(names, PART_LIST.unpack_from(LIST), strict=True)), **changed}
    return PART_LIST.pack(*fields.values()) + LIST[PART_LIST_SIZE:]


@pytest.mark.parametrize(
    ("links", "content"),
    [
        ([KEY, OTHER_KEY], LIST[: PART_LIST_SIZE - 1]),
        ([KEY, OTHER_KEY], LIST[:-1]),
        ([KEY, OTHER_KEY], LIST + b"\0\0\0\0"),
        ([KEY, OTHER_KEY], listed(magic=b"BPTl")),
        ([KEY, OTHER_KEY], listed(size=13)),
        ([KEY, OTHER_KEY], listed(count=1)),
        ([KEY, OTHER_KEY], listed(count=(1 << 32) - 1)),
        ([KEY, OTHER_KEY], encode_part_list([KEY, OTHER_KEY], [12, 0])),
        ([OTHER_KEY, KEY], LIST),
        ([KEY], LIST),
        ([], LIST),
        ([], encode_part_list([], [])),
        (
            [KEY] * (PARTS_LISTED_MAX + 1),
            encode_part_list([KEY] * (PARTS_LISTED_MAX + 1), [1] * (PARTS_LISTED_MAX + 1)),
        ),
    ],
    ids=[
        "header",
        "cut",
        "extended",
        "magic",
        "size",
        "fewer",
        "count",
        "empty part",
        "other order",
        "a link less",
        "no links",
        "empty",
        "too many",
    ],
)
def test_a_list_of_parts_that_contradicts_itself_is_refused(links: list[bytes], content: bytes) -> None:
    refused(CorruptionError, lambda: decode_part_list(Payload(links, content)))


@pytest.mark.parametrize("content", [listed(version=2), listed(flags=1)], ids=["version", "flags"])
def test_a_newer_list_of_parts_must_be_understood(content: bytes) -> None:
    refused(UnsupportedVersion, lambda: decode_part_list(Payload([KEY, OTHER_KEY], content)))

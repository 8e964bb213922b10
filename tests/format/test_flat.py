"""Flat files: the layout is what the page says, and everything else is a typed error before anything is allocated."""

from __future__ import annotations

import re
import struct

import pytest
from blake3 import blake3

from basin.errors import (
    ChecksumMismatch,
    CorruptionError,
    InvalidArgument,
    NotABasin,
    TruncatedStratum,
    UnsupportedVersion,
)
from basin.format import flat
from basin.format.flat import (
    FLAT_END_MAGIC,
    FLAT_END_SIZE,
    FLAT_HEADER_SIZE,
    FLAT_MAGIC,
    FLAT_TABLE_SIZE_MAX,
    FlatEnd,
    FlatFile,
    decode_flat_end,
    decode_flat_header,
    decode_flat_table,
    encode_flat_end,
    encode_flat_header,
    encode_flat_table,
)
from fuzz.material import KEY, OTHER_KEY, with_checksum_behind
from tests.source_tree import ROOT
from tests.test_docs import rows_of

FILES = [("basin.json", 300, KEY), ("keys/0123456789abcdef/slot.json", 0, OTHER_KEY), ("data/00", 1 << 40, KEY)]
END = FlatEnd(FLAT_HEADER_SIZE + 300 + (1 << 40), 0, b"")


def decode(table: bytes, offset: int = END.table_offset) -> list[FlatFile]:
    """The table, found by an end pointer that knows its hash."""
    return decode_flat_table(table, FlatEnd(offset, len(table), blake3(table).digest()))


def documented(name: str) -> list[tuple[int, int, str]]:
    """(offset, size, type) of the fixed fields that the page lists."""
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- (?:flat )?struct: {name} -->\n+((?:\|.*\n)+)", text)
    assert found
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in found[1].splitlines()[2:]]
    return [(int(offset), int(size), kind) for offset, size, kind in cells if size != "…"]


@pytest.mark.parametrize("name", ["FLAT_HEADER", "FLAT_ENTRY", "FLAT_END"])
def test_the_page_lists_the_fields_of_the_struct(name: str) -> None:
    shape: struct.Struct = getattr(flat, name)
    assert documented(name) == rows_of(shape)
    assert getattr(flat, f"{name}_SIZE") == shape.size


class TestTheHeader:
    def test_it_decodes(self) -> None:
        decode_flat_header(encode_flat_header())

    @pytest.mark.parametrize("size", range(FLAT_HEADER_SIZE))
    def test_what_is_shorter_was_cut_short(self, size: int) -> None:
        with pytest.raises(TruncatedStratum):
            decode_flat_header(encode_flat_header()[:size])

    @pytest.mark.parametrize("data", [b"x", b"SQLite format 3\0", FLAT_MAGIC[:-1] + b"x" + bytes(8)])
    def test_other_magic_bytes_were_never_a_flat_file(self, data: bytes) -> None:
        with pytest.raises(NotABasin):
            decode_flat_header(data)

    @pytest.mark.parametrize("bit", range(8 * 8, 8 * FLAT_HEADER_SIZE))
    def test_a_flipped_bit_is_found(self, bit: int) -> None:
        data = bytearray(encode_flat_header())
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChecksumMismatch):
            decode_flat_header(bytes(data))

    def test_a_newer_version_says_so(self) -> None:
        with pytest.raises(UnsupportedVersion):
            decode_flat_header(with_checksum_behind(FLAT_MAGIC + b"\2\0\0\0"))

    def test_what_is_zero_stays_zero(self) -> None:
        with pytest.raises(CorruptionError):
            decode_flat_header(with_checksum_behind(FLAT_MAGIC + b"\1\0\1\0"))


class TestTheEndPointer:
    END = FlatEnd(500, 60, KEY)
    SIZE = 500 + 60 + FLAT_END_SIZE

    def pointer(self, *, offset: int = 500, size: int = 60, version: int = 1, zero: int = 0) -> bytes:
        return with_checksum_behind(struct.pack("<QQ32sHH", offset, size, KEY, version, zero)) + FLAT_END_MAGIC

    def test_it_decodes(self) -> None:
        assert decode_flat_end(encode_flat_end(self.END), self.SIZE) == self.END
        assert self.pointer() == encode_flat_end(self.END)

    @pytest.mark.parametrize("bit", range(8 * FLAT_END_SIZE))
    def test_a_flipped_bit_is_found(self, bit: int) -> None:
        data = bytearray(encode_flat_end(self.END))
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptionError):
            decode_flat_end(bytes(data), self.SIZE)

    @pytest.mark.parametrize("size", range(FLAT_END_SIZE))
    def test_what_is_shorter_was_cut_short(self, size: int) -> None:
        with pytest.raises(TruncatedStratum):
            decode_flat_end(encode_flat_end(self.END)[-size:] if size else b"", size)

    @pytest.mark.parametrize("size", [0, SIZE - 1, SIZE + 1, 1 << 60])
    def test_the_file_has_the_length_that_it_says(self, size: int) -> None:
        with pytest.raises(CorruptionError):
            decode_flat_end(encode_flat_end(self.END), size)

    @pytest.mark.parametrize(
        ("offset", "size", "file_size"),
        [
            (FLAT_HEADER_SIZE - 1, 545, SIZE),
            (0, 560, SIZE),
            ((1 << 64) - 1, 561, SIZE),
            (100, FLAT_TABLE_SIZE_MAX + 1, 100 + FLAT_TABLE_SIZE_MAX + 1 + FLAT_END_SIZE),
            (16, (1 << 64) - 1, 16 + (1 << 64) - 1 + FLAT_END_SIZE),
        ],
    )
    def test_a_place_that_cannot_be_is_refused(self, offset: int, size: int, file_size: int) -> None:
        with pytest.raises(CorruptionError):
            decode_flat_end(self.pointer(offset=offset, size=size), file_size)

    def test_the_cap_itself_is_allowed(self) -> None:
        size = 100 + FLAT_TABLE_SIZE_MAX + FLAT_END_SIZE
        assert decode_flat_end(self.pointer(offset=100, size=FLAT_TABLE_SIZE_MAX), size).table_offset == 100

    def test_a_newer_version_says_so(self) -> None:
        with pytest.raises(UnsupportedVersion):
            decode_flat_end(self.pointer(version=2), self.SIZE)

    def test_what_is_zero_stays_zero(self) -> None:
        with pytest.raises(CorruptionError):
            decode_flat_end(self.pointer(zero=1), self.SIZE)


class TestTheTable:
    def test_it_says_where_each_file_lies(self) -> None:
        assert decode(encode_flat_table(FILES)) == [
            FlatFile("basin.json", 16, 300, KEY),
            FlatFile("keys/0123456789abcdef/slot.json", 316, 0, OTHER_KEY),
            FlatFile("data/00", 316, 1 << 40, KEY),
        ]

    def test_no_file_at_all_is_a_table(self) -> None:
        assert decode(b"", FLAT_HEADER_SIZE) == []

    def test_it_has_the_hash_that_the_end_pointer_says(self) -> None:
        table = encode_flat_table(FILES)
        with pytest.raises(ChecksumMismatch):
            decode_flat_table(table, FlatEnd(END.table_offset, len(table), KEY))

    def test_it_is_as_long_as_the_end_pointer_says(self) -> None:
        table = encode_flat_table(FILES)
        with pytest.raises(CorruptionError):
            decode_flat_table(table, FlatEnd(END.table_offset, len(table) + 1, blake3(table).digest()))

    @pytest.mark.parametrize("cut", range(1, len(encode_flat_table(FILES))))
    def test_it_is_whole_entries(self, cut: int) -> None:
        with pytest.raises(CorruptionError):
            decode(encode_flat_table(FILES)[:-cut])

    @pytest.mark.parametrize("offset", [0, FLAT_HEADER_SIZE, END.table_offset - 1, END.table_offset + 1])
    def test_the_files_fill_all_that_lies_before_it(self, offset: int) -> None:
        with pytest.raises(CorruptionError):
            decode(encode_flat_table(FILES), offset)

    def test_sizes_do_not_wrap_around(self) -> None:
        table = encode_flat_table([("a", (1 << 64) - 1, KEY), ("b", 1, KEY)])
        with pytest.raises(CorruptionError):
            decode(table, FLAT_HEADER_SIZE)

    def test_no_name_stands_in_it_twice(self) -> None:
        with pytest.raises(CorruptionError):
            decode(encode_flat_table([("a", 0, KEY), ("a", 0, OTHER_KEY)]), FLAT_HEADER_SIZE)

    @pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a//b", "a/", "A", "a\n", "a\0", ".hidden", "a/.b"])
    def test_a_name_is_one_of_a_storage(self, name: str) -> None:
        with pytest.raises(CorruptionError):
            decode(encode_flat_table([(name, 0, KEY)]), FLAT_HEADER_SIZE)

    def test_too_many_files_are_refused_before_they_are_written(self) -> None:
        count = FLAT_TABLE_SIZE_MAX // (41 + 10)
        encode_flat_table([("basin.json", 0, KEY)] * count)
        with pytest.raises(InvalidArgument):
            encode_flat_table([("basin.json", 0, KEY)] * (count + 1))

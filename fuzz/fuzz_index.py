"""Directories of grain indexes, and pages: every page that is asked for lies where the directory says."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.index import IndexBuilder, IndexDirectory, IndexEntry, decode_page, entries_of, find_in_page
from basin.format.layout import INDEX_ENTRY_SIZE, PAGE_SIZE
from fuzz.material import KEY, OTHER_KEY, OTHER_STRATUM_ID, STRATUM_ID


def one_input(data: bytes) -> None:
    directory = IndexDirectory(data, KEY, STRATUM_ID)
    for key in (KEY, OTHER_KEY, bytes(32), b"\xff" * 32):
        directory.may_contain(key)
        for number in directory.pages_for(key):
            _, size = directory.page_extent(number)
            if not 0 <= number < directory.page_count or not 0 < size <= PAGE_SIZE or size % INDEX_ENTRY_SIZE:
                raise AssertionError("a page lies outside of its index")
    page = data[: len(data) // INDEX_ENTRY_SIZE * INDEX_ENTRY_SIZE]
    if len(list(decode_page(page))) * INDEX_ENTRY_SIZE != len(page) or any(find_in_page(page, b"\xff" * 32)) < 0:
        raise AssertionError("a page holds another number of entries than its size says")


def seeds() -> Iterator[bytes]:
    for count in (0, 1, 200):
        rows = [
            IndexEntry((number * 7919 % 65536).to_bytes(2, "big") * 16, 128, 64, 0, 1, 0) for number in range(count)
        ]
        builder = IndexBuilder([STRATUM_ID, OTHER_STRATUM_ID], count, KEY, STRATUM_ID)
        list(builder.feed(entries_of(rows)))
        list(builder.finish(128))
        yield builder.directory()

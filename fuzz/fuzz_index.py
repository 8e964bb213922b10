"""Directories of grain indexes, and pages: every page that is asked for lies where the directory says.

After a `p` comes a page, for which a directory with the right tag is made: its entries are possible, and found.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from basin.format.index import ENTRY, IndexBuilder, IndexDirectory, IndexEntry, decode_page, entries_of, find_in_page
from basin.format.layout import GRAIN_HEADER_SIZE, INDEX_ENTRY_SIZE, PAGE_SIZE
from fuzz.material import KEY, OTHER_KEY, OTHER_STRATUM_ID, STRATUM_ID


def one_input(data: bytes) -> None:
    if data[:1] == b"p":
        _one_page(data[1 : 1 + PAGE_SIZE])
        return
    directory = IndexDirectory(data, KEY, STRATUM_ID)
    for key in (KEY, OTHER_KEY, bytes(32), b"\xff" * 32):
        directory.may_contain(key)
        for number in directory.pages_for(key):
            _, size = directory.page_extent(number)
            if not 0 <= number < directory.page_count or not 0 < size <= PAGE_SIZE or size % INDEX_ENTRY_SIZE:
                raise AssertionError("a page lies outside of its index")


def _one_page(data: bytes) -> None:
    page = data[: len(data) // INDEX_ENTRY_SIZE * INDEX_ENTRY_SIZE]
    entries = np.frombuffer(page, dtype=ENTRY)
    builder = IndexBuilder([STRATUM_ID, OTHER_STRATUM_ID], len(entries), KEY, STRATUM_ID)
    list(builder.feed(entries))
    list(builder.finish(128))
    directory = IndexDirectory(builder.directory(), KEY, STRATUM_ID)
    if not len(entries):
        return
    directory.verify_page(0, page)
    for entry in decode_page(page):
        if not directory.may_contain(entry.key) or tuple(entry)[1:] not in list(find_in_page(page, entry.key)):
            raise AssertionError("an entry is not found in its page")
        if entry.length < GRAIN_HEADER_SIZE or entry.stratum > 1:
            raise AssertionError("an impossible entry was accepted")


def seeds() -> Iterator[bytes]:
    for count in (0, 1, 200):
        rows = [
            IndexEntry((number * 7919 % 65536).to_bytes(2, "big") * 16, 128, 64, 0, 1, 0) for number in range(count)
        ]
        builder = IndexBuilder([STRATUM_ID, OTHER_STRATUM_ID], count, KEY, STRATUM_ID)
        list(builder.feed(entries_of(rows)))
        list(builder.finish(128))
        yield builder.directory()
    yield b"p" + entries_of([IndexEntry(key, 128, 64, 0, 1, 0) for key in (KEY, OTHER_KEY, KEY)]).tobytes()

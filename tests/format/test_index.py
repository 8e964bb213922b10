"""Grain indexes: every key is found, the filter misses none, pages are told from changed and from swapped ones."""

from __future__ import annotations

import random
import struct
import tracemalloc
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import AuthenticationFailed, CorruptionError
from basin.format.index import (
    ENTRY,
    Entries,
    IndexBuilder,
    IndexDirectory,
    IndexEntry,
    decode_page,
    entries_of,
    filter_words,
    find_in_page,
    join_entries,
    sort_entries,
)
from basin.format.layout import (
    GRAIN_HEADER_SIZE,
    GRAIN_SIZE_MAX,
    INDEX_DIRECTORY_SIZE,
    INDEX_ENTRIES_MAX,
    INDEX_ENTRY_SIZE,
    PAGE_ENTRIES,
    PAGE_SIZE,
    PAGE_TAG_SIZE,
    PAGES_PER_GRAIN,
)
from tests.format.material import KEY, OTHER_KEY, OTHER_STRATUM_ID, STRATUM_ID, answered, patched, refused

STRATA = [STRATUM_ID, OTHER_STRATUM_ID]
FIRST_OFFSET = 1000
ROWS = st.builds(
    IndexEntry,
    st.binary(min_size=32, max_size=32) | st.sampled_from([bytes(32), b"\xff" * 32, KEY]),
    st.integers(0, (1 << 32) - 1),
    st.integers(GRAIN_HEADER_SIZE, GRAIN_SIZE_MAX),
    st.integers(0, 1),
    st.integers(0, 255),
    st.integers(0, 1),
)


class Place(NamedTuple):
    """What a look-up gives: an entry without its key."""

    offset: int
    length: int
    stratum: int
    kind: int
    flags: int


class Built:
    """An index as a file would hold it: `data` starts with the grains of pages, at `FIRST_OFFSET`."""

    def __init__(self, entries: Entries, *, step: int = 1 << 20, tag_key: bytes = KEY) -> None:
        builder = IndexBuilder(STRATA, len(entries), tag_key, STRATUM_ID)
        pieces = [piece for at in range(0, len(entries), step) for piece in builder.feed(entries[at : at + step])]
        pieces += builder.finish(FIRST_OFFSET)
        self.pieces = pieces
        self.data = b"".join(bytes(GRAIN_HEADER_SIZE) + piece for piece in pieces)
        self.payload = builder.directory()
        self.directory = IndexDirectory(self.payload, KEY, STRATUM_ID)

    def page(self, number: int) -> bytes:
        offset, size = self.directory.page_extent(number)
        return self.data[offset - FIRST_OFFSET : offset - FIRST_OFFSET + size]

    def find(self, key: bytes) -> list[Place]:
        found: list[Place] = []
        for number in self.directory.pages_for(key):
            self.directory.verify_page(number, self.page(number))
            found += [Place(*place) for place in find_in_page(self.page(number), key)]
        return found


def random_rows(count: int, seed: int = 1) -> list[IndexEntry]:
    source = random.Random(seed)
    return [
        IndexEntry(source.randbytes(32), source.randrange(1 << 32), 100 + at % 50, at & 1, 1, 0) for at in range(count)
    ]


@given(st.lists(ROWS, max_size=300), st.integers(1, 200))
def test_every_entry_is_found_and_nothing_else(rows: list[IndexEntry], step: int) -> None:
    built = Built(entries_of(rows), step=step)
    by_key: dict[bytes, list[Place]] = {}
    for key, *place in rows:
        by_key.setdefault(key, []).append(Place(*place))
    for key, places in by_key.items():
        assert built.directory.may_contain(key)
        assert sorted(built.find(key)) == sorted(places)
        only = built.directory.only_page_for(key)
        assert only < 0 or list(built.directory.pages_for(key)) == [only]
    for key in (KEY, OTHER_KEY, bytes(32), bytes(31) + b"\1", b"\xff" * 32):
        assert bool(built.find(key)) == (key in by_key)


@pytest.mark.parametrize("count", [0, 1, PAGE_ENTRIES - 1, PAGE_ENTRIES, PAGE_ENTRIES + 1, 10 * PAGE_ENTRIES + 7])
def test_pages_are_full_but_the_last(count: int) -> None:
    built = Built(entries_of(random_rows(count)))
    sizes = [built.directory.page_extent(number)[1] for number in range(built.directory.page_count)]
    assert sum(sizes) == count * INDEX_ENTRY_SIZE
    assert set(sizes[:-1]) <= {PAGE_SIZE}
    assert built.directory.count == count
    assert built.directory.strata == STRATA
    rows = [row for number in range(len(sizes)) for row in decode_page(built.page(number))]
    assert sorted(rows) == sorted(random_rows(count))


def test_an_index_of_several_grains_leads_past_their_headers() -> None:
    count = PAGE_ENTRIES * PAGES_PER_GRAIN + 5
    entries = np.zeros(count, dtype=ENTRY)
    entries["prefix"] = np.arange(count, dtype=np.uint64) << np.uint64(40)
    entries["length"] = GRAIN_HEADER_SIZE
    built = Built(entries, step=50_000)
    assert [len(piece) for piece in built.pieces] == [PAGE_SIZE * PAGES_PER_GRAIN, 5 * INDEX_ENTRY_SIZE]
    assert built.directory.page_extent(0)[0] == FIRST_OFFSET + GRAIN_HEADER_SIZE
    for row in (0, 1, count // 2, count - 6, count - 5, count - 1):
        assert built.find(entries[row : row + 1].tobytes()[:32]) == [(0, GRAIN_HEADER_SIZE, 0, 0, 0)]


def test_the_filter_misses_nothing_and_errs_on_few() -> None:
    rows = random_rows(20_000)
    directory = Built(entries_of(rows)).directory
    assert all(directory.may_contain(row.key) for row in rows)
    present = np.frombuffer(b"".join(row.key for row in rows), dtype=np.uint8).reshape(-1, 32)
    assert directory.may_contain_many(present).all()
    others = [row.key for row in random_rows(20_000, seed=2)]
    table = np.frombuffer(b"".join(others), dtype=np.uint8).reshape(-1, 32)
    singly = [directory.may_contain(key) for key in others]
    assert directory.may_contain_many(table).tolist() == singly
    assert 0.02 < sum(singly) / len(singly) < 0.06


def test_joined_and_sorted_entries_keep_their_bytes() -> None:
    rows = random_rows(300)
    first, second = entries_of(rows[:150]), entries_of(rows[150:])
    joined = join_entries([first, second])
    assert joined.dtype == ENTRY
    assert joined.tobytes() == first.tobytes() + second.tobytes()
    ordered = sort_entries(joined)
    assert ordered.dtype == ENTRY
    keys = [row.key for row in decode_page(ordered.tobytes())]
    assert keys == sorted(row.key for row in rows)


def test_a_changed_page_does_not_match_its_tag() -> None:
    built = Built(entries_of(random_rows(2 * PAGE_ENTRIES)))
    page = built.page(1)
    built.directory.verify_page(1, page)
    for at in range(0, len(page), 7):
        changed = patched(page, at, bytes((page[at] ^ 4,)))
        refused(AuthenticationFailed, partial(built.directory.verify_page, 1, changed))
    refused(AuthenticationFailed, lambda: built.directory.verify_page(1, page[:-1]))
    refused(AuthenticationFailed, lambda: built.directory.verify_page(1, page + b"\0"))


def test_a_page_does_not_stand_in_for_another() -> None:
    built = Built(entries_of(random_rows(2 * PAGE_ENTRIES)))
    refused(AuthenticationFailed, lambda: built.directory.verify_page(0, built.page(1)))
    for tag_key, stratum in [(OTHER_KEY, STRATUM_ID), (KEY, OTHER_STRATUM_ID)]:
        elsewhere = IndexDirectory(built.payload, tag_key, stratum)
        refused(AuthenticationFailed, partial(elsewhere.verify_page, 0, built.page(0)))


@pytest.mark.parametrize(
    "entry",
    [
        IndexEntry(KEY, 0, GRAIN_HEADER_SIZE - 1, 0, 1, 0),
        IndexEntry(KEY, 0, GRAIN_SIZE_MAX + 1, 0, 1, 0),
        IndexEntry(KEY, 0, 100, 2, 1, 0),
    ],
)
def test_an_entry_that_cannot_be_true_is_refused_with_its_page(entry: IndexEntry) -> None:
    built = Built(entries_of([entry, *random_rows(5)]))
    refused(CorruptionError, lambda: built.directory.verify_page(0, built.page(0)))


def test_directories_that_contradict_themselves() -> None:
    payload = Built(entries_of(random_rows(200))).payload

    def with_counts(count: int, pages: int, strata: int, words: int) -> bytes:
        return struct.pack("<QQIII", count, FIRST_OFFSET, pages, strata, words) + payload[INDEX_DIRECTORY_SIZE:]

    words = filter_words(200)
    assert with_counts(200, 3, 2, words) == payload
    for damaged in (
        payload[: INDEX_DIRECTORY_SIZE - 1],
        payload[:-1],
        payload + b"\0",
        with_counts(201, 3, 2, words + 1),
        with_counts(200, 4, 2, words),
        with_counts(200, 3, 3, words),
        with_counts(200, 3, 2, words - 1),
        with_counts(INDEX_ENTRIES_MAX + 1, 3, 2, words),
        with_counts((1 << 64) - 1, (1 << 32) - 1, (1 << 32) - 1, (1 << 32) - 1),
    ):
        refused(CorruptionError, partial(IndexDirectory, damaged, KEY, STRATUM_ID))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    directory = answered(lambda: IndexDirectory(data, KEY, STRATUM_ID))
    if directory is not None:
        directory.may_contain(KEY)
        list(directory.pages_for(KEY))


def test_a_builder_refuses_another_number_of_entries_than_announced() -> None:
    builder = IndexBuilder(STRATA, 3, KEY, STRATUM_ID)
    list(builder.feed(entries_of(random_rows(2))))
    refused(CorruptionError, lambda: list(builder.finish(FIRST_OFFSET)))
    refused(CorruptionError, lambda: IndexBuilder(STRATA, INDEX_ENTRIES_MAX + 1, KEY, STRATUM_ID))


def test_a_filter_that_was_forgotten_says_the_same_again() -> None:
    rows = random_rows(500)
    built, again = Built(entries_of(rows)), Built(entries_of(rows))
    loads: list[IndexDirectory] = []

    def load() -> IndexDirectory:
        loads.append(again.directory)
        return again.directory

    before = built.directory.firsts.tolist()
    built.directory.forget_filter(load)
    assert not loads
    assert built.directory.firsts.tolist() == before
    for key, *place in rows:
        assert Place(*place) in built.find(key)
    assert not loads  # Pages are found, and verified, without it.
    keys = [*(row.key for row in rows), *(row.key for row in random_rows(500, seed=2))]
    table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32)
    expected = again.directory.may_contain_many(table).tolist()
    assert built.directory.may_contain_many(table).tolist() == expected
    assert [built.directory.may_contain(key) for key in keys] == expected
    assert len(loads) == 1


def test_a_filter_that_became_another_is_refused() -> None:
    built = Built(entries_of(random_rows(500)))
    built.directory.forget_filter(lambda: Built(entries_of(random_rows(100))).directory)
    refused(CorruptionError, lambda: built.directory.may_contain(KEY))


def test_an_index_is_built_in_memory_for_its_directory_and_two_pieces() -> None:
    step, count = 5000, 400_000
    source = np.random.default_rng(1)
    entries = np.frombuffer(source.bytes(step * INDEX_ENTRY_SIZE), dtype=ENTRY)
    entries = sort_entries(entries)
    tracemalloc.start()
    try:
        builder = IndexBuilder(STRATA, count, KEY, STRATUM_ID)
        for _ in range(count // step):
            for piece in builder.feed(entries):
                assert len(piece) == PAGE_SIZE * PAGES_PER_GRAIN
        for piece in builder.finish(FIRST_OFFSET):
            assert len(piece) < PAGE_SIZE * PAGES_PER_GRAIN
        del piece
        directory = builder.directory()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(directory) + 2.2 * PAGE_SIZE * PAGES_PER_GRAIN


def test_a_page_tag_costs_sixteen_bytes() -> None:
    built = Built(entries_of(random_rows(PAGE_ENTRIES)))
    assert len(built.payload) == INDEX_DIRECTORY_SIZE + 2 * 16 + 4 + PAGE_TAG_SIZE + 8 * filter_words(PAGE_ENTRIES)

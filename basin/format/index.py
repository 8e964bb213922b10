"""The grain index: from a grain key to where the grain lies, in pages that are read and verified one by one.

An index is a run of INDEX_PAGES grains, each of up to 1,024 pages of up to 93 entries, and one INDEX_DIRECTORY grain
with the strata it covers, the leading key bits of every page, a tag of every page, and a filter. Pages are not sealed:
they hold grain keys, offsets and lengths only, and their keyed tags, kept in the sealed directory, are checked at a
page's first touch.

Invariants:

- Entries are sorted by the first 8 bytes of the key (big-endian); the order among equals means nothing.
- Every page but the last is full. A key, or several entries of one key, may stand on neighbouring pages.
- The filter never says "absent" of a key that is there; it says "maybe" of about 4 % of the others.

Keys are uniform (BLAKE3, or AES of it), so their own bits serve as the hash. Pure; uses NumPy for whole batches.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from hmac import compare_digest
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from basin.errors import AuthenticationFailed, CorruptionError
from basin.format.crypto import page_tag
from basin.format.layout import (
    FILTER_GRAINS_PER_WORD,
    GRAIN_HEADER_SIZE,
    GRAIN_SIZE_MAX,
    INDEX_DIRECTORY,
    INDEX_DIRECTORY_SIZE,
    INDEX_ENTRIES_MAX,
    INDEX_ENTRY,
    INDEX_ENTRY_SIZE,
    INDEX_STRATA_MAX,
    PAGE_ENTRIES,
    PAGE_SIZE,
    PAGE_TAG_SIZE,
    PAGES_PER_GRAIN,
)
from basin.terms import STRATUM_ID_SIZE, StratumId

if TYPE_CHECKING:
    import numpy.typing as npt

Entries: TypeAlias = "npt.NDArray[np.void]"
"""A one-dimensional array of `ENTRY`."""

ENTRY: Final = np.dtype(
    [
        ("prefix", ">u8"),
        ("rest", "V24"),
        ("offset", "<u4"),
        ("length", "<u4"),
        ("stratum", "<u2"),
        ("kind", "u1"),
        ("flags", "u1"),
    ]
)

_MASK_BITS: Final = 12
_MASKS: Final = [1 << (i & 63) | 1 << (i >> 6) for i in range(1 << _MASK_BITS)]
"""Two of the 64 bits of a filter word for each 12 key bits: two look-ups set or test four bits."""
_MASK_ARRAY: Final = np.array(_MASKS, dtype=np.uint64)
_GRAIN_ENTRIES: Final = PAGE_ENTRIES * PAGES_PER_GRAIN
_FILTERED_TOGETHER: Final = 1 << 13
"""Entries that are put into the filter at a time: ten columns of 64 KiB, whatever is fed."""


class IndexEntry(NamedTuple):
    """One decoded entry; `stratum` counts into the index's list of strata."""

    key: bytes
    offset: int
    length: int
    stratum: int
    kind: int
    flags: int


def entries_of(rows: list[IndexEntry]) -> Entries:
    """Rows to a sorted entry array."""
    joined = b"".join([INDEX_ENTRY.pack(*row) for row in rows])
    return sort_entries(np.frombuffer(joined, dtype=ENTRY))


def sort_entries(entries: Entries) -> Entries:
    """Sort by the first 8 bytes of the key."""
    return entries[np.argsort(entries["prefix"], kind="stable")]


def join_entries(parts: Sequence[Entries]) -> Entries:
    """Arrays one after another. NumPy's `concatenate` would turn the big-endian prefix into native byte order."""
    if len(parts) == 1:
        return parts[0]
    return np.frombuffer(b"".join([part.tobytes() for part in parts]), dtype=ENTRY)


def decode_page(page: bytes) -> Iterator[IndexEntry]:
    """The entries of one verified page."""
    for row in INDEX_ENTRY.iter_unpack(page):
        yield IndexEntry(*row)


def filter_words(count: int) -> int:
    """Number of 64-bit filter words for `count` entries: about 8 bits an entry."""
    return max(1, -(-count // FILTER_GRAINS_PER_WORD))


def directory_size(count: int, strata: int = 1) -> int:
    """Bytes of the directory of `count` entries, as the payload of its grain."""
    pages = -(-count // PAGE_ENTRIES)
    return INDEX_DIRECTORY_SIZE + strata * STRATUM_ID_SIZE + pages * (4 + PAGE_TAG_SIZE) + 8 * filter_words(count)


def pages_size(count: int) -> int:
    """Bytes of the grains that hold the pages of `count` entries."""
    pages = -(-count // PAGE_ENTRIES)
    return count * INDEX_ENTRY_SIZE + -(-pages // PAGES_PER_GRAIN) * GRAIN_HEADER_SIZE


def _filter_slots(entries: Entries, words: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """Word number and four-bit mask of every entry, from key bytes 8 to 16."""
    bits = np.ascontiguousarray(entries["rest"]).view(np.uint8).reshape(-1, 24)[:, :8]
    numbers = np.ascontiguousarray(bits).view("<u8").reshape(-1)
    slot = ((numbers & np.uint64(0xFFFFFFFF)) * np.uint64(words)) >> np.uint64(32)
    low = _MASK_ARRAY[(numbers >> np.uint64(32)) & np.uint64(4095)]
    high = _MASK_ARRAY[(numbers >> np.uint64(44)) & np.uint64(4095)]
    return slot, low | high


class IndexBuilder:
    """Turns sorted entries into the data of INDEX_PAGES grains, and collects the directory.

    Feed all `count` entries in order, in arrays of any length; write each piece that comes back as one grain, right
    after another, from `first_offset` on. Memory: 1.3 bytes an entry, as much again while `directory` joins them, and
    two pieces.
    """

    def __init__(self, strata: list[StratumId], count: int, tag_key: bytes, stratum_id: bytes) -> None:
        if count > INDEX_ENTRIES_MAX or len(strata) > INDEX_STRATA_MAX:
            raise CorruptionError(f"an index of {count} entries over {len(strata)} strata is too large")
        self._strata = strata
        self._count = count
        self._tag_key = tag_key
        self._stratum_id = stratum_id
        self._filter = np.zeros(filter_words(count), dtype="<u8")
        self._firsts = bytearray()
        self._tags = bytearray()
        self._pending = np.empty(min(count, _GRAIN_ENTRIES), dtype=ENTRY)
        self._pending_count = 0
        self._fed = 0

    def feed(self, entries: Entries) -> Iterator[bytes | memoryview]:
        """Take the next sorted entries; yield the data of each grain that became full.

        Take all that is yielded before the next call. `entries` are not kept, but by what is yielded.
        """
        self._fed += len(entries)
        if self._fed > self._count:
            raise CorruptionError(f"an index of {self._count} entries was fed {self._fed}")
        for start in range(0, len(entries), _FILTERED_TOGETHER):
            slot, mask = _filter_slots(entries[start : start + _FILTERED_TOGETHER], len(self._filter))
            np.bitwise_or.at(self._filter, slot, mask)
        start = 0
        while start < len(entries):
            stop = min(len(entries), start + _GRAIN_ENTRIES - self._pending_count)
            if stop - start == _GRAIN_ENTRIES:
                yield self._pages(np.ascontiguousarray(entries[start:stop]).view(np.uint8).data)
            else:
                yield from self._wait(entries[start:stop])
            start = stop

    def _wait(self, entries: Entries) -> Iterator[bytes | memoryview]:
        """Put entries behind those that wait for their grain to be full."""
        stop = self._pending_count + len(entries)
        self._pending[self._pending_count : stop] = entries
        self._pending_count = stop
        if stop == _GRAIN_ENTRIES:
            self._pending_count = 0
            yield self._pages(self._pending.view(np.uint8).data)
            self._pending = np.empty(_GRAIN_ENTRIES, dtype=ENTRY)  # What was yielded may still be looked at.

    def finish(self, first_offset: int) -> Iterator[bytes | memoryview]:
        """Yield the last pages, if any; then call `directory`."""
        if self._fed != self._count:
            raise CorruptionError(f"an index of {self._count} entries was fed {self._fed}")
        self._first_offset = first_offset
        last, self._pending = self._pending[: self._pending_count], np.empty(0, dtype=ENTRY)
        if len(last):
            yield self._pages(last.view(np.uint8).data)

    def directory(self) -> bytes:
        """The payload of the INDEX_DIRECTORY grain. Call it once: what was collected is let go of."""
        words = self._filter.data
        del self._filter
        pages = len(self._tags) // PAGE_TAG_SIZE
        head = INDEX_DIRECTORY.pack(self._count, self._first_offset, pages, len(self._strata), len(words))
        return b"".join((head, *self._strata, self._firsts, self._tags, words))

    def _pages(self, data: bytes | memoryview) -> bytes | memoryview:
        """Note the first key and the tag of each page of a grain."""
        prefixes = np.frombuffer(data, dtype=ENTRY)["prefix"][::PAGE_ENTRIES]
        self._firsts += (prefixes >> np.uint64(32)).astype("<u4").tobytes()
        number = len(self._tags) // PAGE_TAG_SIZE
        for start in range(0, len(data), PAGE_SIZE):
            self._tags += page_tag(self._tag_key, self._stratum_id, number, bytes(data[start : start + PAGE_SIZE]))
            number += 1
        return data


class IndexDirectory:
    """A decoded directory: leads from a key to the pages that may hold it. Says always the same; safe for threads.

    `tag_key` and `stratum_id` are those of the stratum that holds the index.
    """

    def __init__(self, payload: bytes, tag_key: bytes, stratum_id: bytes) -> None:
        """Decode; raise `CorruptionError` unless every part has the length that the counts say."""
        if len(payload) < INDEX_DIRECTORY_SIZE:
            raise CorruptionError("an index directory is cut short")
        count, first_offset, pages, strata, words = INDEX_DIRECTORY.unpack_from(payload)
        strata_at = INDEX_DIRECTORY_SIZE
        firsts_at = strata_at + strata * STRATUM_ID_SIZE
        tags_at = firsts_at + pages * 4
        filter_at = tags_at + pages * PAGE_TAG_SIZE
        if (
            count > INDEX_ENTRIES_MAX
            or pages != -(-count // PAGE_ENTRIES)
            or words != filter_words(count)
            or len(payload) != filter_at + 8 * words
        ):
            raise CorruptionError("an index directory does not have the size that its counts say")
        self.count: int = count
        self.page_count: int = pages
        self.strata = [
            StratumId(payload[at : at + STRATUM_ID_SIZE]) for at in range(strata_at, firsts_at, STRATUM_ID_SIZE)
        ]
        self._first_offset: int = first_offset
        view = memoryview(payload)  # Not copied: of ten million entries it has 13 MiB.
        self._firsts = view[firsts_at:tags_at].cast("I") if pages else memoryview(b"").cast("I")
        self._tags = view[tags_at:filter_at]
        self._words: memoryview | None = view[filter_at:].cast("Q")
        self._load: Callable[[], IndexDirectory] | None = None
        self._word_count = words
        self._tag_key = tag_key
        self._stratum_id = stratum_id

    def forget_filter(self, load: Callable[[], IndexDirectory]) -> None:
        """Keep a sixth of it, which leads to pages and verifies them. Whoever asks the filter next waits for `load`.

        `load` reads the directory again. What it raises, `may_contain` does.
        """
        self._firsts = memoryview(bytes(self._firsts)).cast("I") if self.page_count else self._firsts
        self._tags = memoryview(bytes(self._tags))
        self._load = load
        self._words = None

    def _filter(self) -> memoryview:
        """The words of the filter."""
        words = self._words
        if words is None and self._load is not None:
            loaded = self._load()._words
            words = self._words = loaded
        if words is None or len(words) != self._word_count:
            raise CorruptionError("an index directory is not what it was when it was read first")
        return words

    @property
    def firsts(self) -> npt.NDArray[np.uint32]:
        """The first 4 bytes of the first key of every page, as numbers."""
        return np.frombuffer(self._firsts, dtype=np.uint32)

    def may_contain(self, key: bytes) -> bool:
        """False means absent for certain. About 0.5 µs."""
        bits = int.from_bytes(key[8:16], "little")
        mask = _MASKS[bits >> 32 & 4095] | _MASKS[bits >> 44 & 4095]
        words = self._words
        if words is None:
            words = self._filter()
        word: int = words[(bits & 0xFFFFFFFF) * self._word_count >> 32]
        return word & mask == mask

    def may_contain_many(self, keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """`may_contain` for an array of shape (n, 32); under 0.1 µs a key."""
        numbers = np.ascontiguousarray(keys[:, 8:16]).view("<u8").reshape(-1)
        slot = ((numbers & np.uint64(0xFFFFFFFF)) * np.uint64(self._word_count)) >> np.uint64(32)
        mask = (
            _MASK_ARRAY[(numbers >> np.uint64(32)) & np.uint64(4095)]
            | _MASK_ARRAY[(numbers >> np.uint64(44)) & np.uint64(4095)]
        )
        words: npt.NDArray[Any] = np.frombuffer(self._filter(), dtype="<u8")
        found: npt.NDArray[np.bool_] = (words[slot] & mask) == mask
        return found

    def pages_for(self, key: bytes) -> range:
        """The pages that may hold `key`: nearly always one."""
        prefix = int.from_bytes(key[:4], "big")
        firsts = self._firsts
        start = bisect_left(firsts, prefix)
        stop = start
        while stop < len(firsts) and firsts[stop] == prefix:
            stop += 1
        return range(max(0, start - 1), stop)

    def only_page_for(self, key: bytes) -> int:
        """The one page that may hold `key`, or -1 where there may be none, or several (ask `pages_for`)."""
        prefix = int.from_bytes(key[:4], "big")
        firsts = self._firsts
        start = bisect_left(firsts, prefix)
        if start < self.page_count and firsts[start] == prefix:
            return -1
        return start - 1

    def page_extent(self, number: int) -> tuple[int, int]:
        """(offset in the stratum, size in bytes) of a page."""
        offset = self._first_offset + number * PAGE_SIZE + (number // PAGES_PER_GRAIN + 1) * GRAIN_HEADER_SIZE
        entries = min(PAGE_ENTRIES, self.count - number * PAGE_ENTRIES)
        return offset, entries * INDEX_ENTRY_SIZE

    def verify_page(self, number: int, page: bytes) -> None:
        """Raise `AuthenticationFailed` unless `page` is what was written as that page of that stratum.

        Raises `CorruptionError` if an entry cannot be true: in an open basin a tag is only a checksum.
        """
        expected = self._tags[number * PAGE_TAG_SIZE : (number + 1) * PAGE_TAG_SIZE]
        if not compare_digest(page_tag(self._tag_key, self._stratum_id, number, page), expected):
            raise AuthenticationFailed(f"page {number} of a grain index does not match its tag")
        entries = np.frombuffer(page, dtype=ENTRY)
        lengths = entries["length"]
        if lengths.min() < GRAIN_HEADER_SIZE or lengths.max() > GRAIN_SIZE_MAX:
            raise CorruptionError(f"page {number} of a grain index holds an impossible length")
        if entries["stratum"].max() >= len(self.strata):
            raise CorruptionError(f"page {number} of a grain index names a stratum that is not in its list")


def find_in_page(page: bytes, key: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (offset, length, stratum, kind, flags) of every entry of `key` in a verified page."""
    at = page.find(key)
    while at >= 0:
        if at % INDEX_ENTRY_SIZE == 0:
            yield INDEX_ENTRY.unpack_from(page, at)[1:]
        at = page.find(key, at + 1)

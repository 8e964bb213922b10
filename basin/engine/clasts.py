"""Large contents as lists of parts: the list while parts come, and looking up parts without reading every list.

Invariants:

- No grain lists more than `PARTS_LISTED_MAX` parts: above that a clast lists lists of parts.
- A list is read only when one of its parts is asked for; the last few are kept.

Imported by `contents` and by layers. Knows nothing of strata.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple, TypeAlias

from basin.errors import CorruptionError
from basin.format.clast import (
    PARTS_LISTED_MAX,
    Clast,
    encode_clast,
    encode_clast_of_lists,
    encode_part_list,
)

_LISTS_KEPT: Final = 4
"""Lists in memory of one content, of 1 MiB each: who reads in order needs two."""
PutList: TypeAlias = Callable[[bytes, Sequence[bytes]], bytes]
"""Stores a content with links; returns its key."""
ReadList: TypeAlias = Callable[[bytes], Clast]


class Part(NamedTuple):
    """One part of a content: its content key, and which bytes of the whole it is."""

    key: bytes
    start: int
    stop: int


class Parts:
    """The parts of one large content. Not safe for threads."""

    def __init__(self, clast: Clast, read_list: ReadList) -> None:
        """`read_list` gives the list of a content key."""
        self.size = clast.size
        self.links = clast.links
        """Those of the caller."""
        self._clast = clast
        self._read_list = read_list
        self._firsts = list(accumulate(clast.counts, initial=0)) if clast.counts else [0, len(clast.parts)]
        """The number of the first part of each list; and of all parts."""
        self._lists: dict[int, Clast] = {} if clast.counts else {0: clast}

    def __len__(self) -> int:
        """How many parts there are."""
        return self._firsts[-1]

    def __getitem__(self, number: int) -> Part:
        """Part `number`, which is one of them. One read at most."""
        which = bisect_right(self._firsts, number) - 1
        listed, begin = self._list(which)
        at = number - self._firsts[which]
        return Part(listed.parts[at], begin + listed.starts[at], begin + listed.starts[at + 1])

    def __iter__(self) -> Iterator[Part]:
        """All parts in order."""
        for which in range(len(self._firsts) - 1):
            listed, begin = self._list(which)
            for key, (start, stop) in zip(listed.parts, pairwise(listed.starts), strict=True):
                yield Part(key, begin + start, begin + stop)

    def number_at(self, offset: int) -> int:
        """The number of the part that byte `offset` lies in. One read at most."""
        if not self._clast.counts:
            return bisect_right(self._clast.starts, offset) - 1
        which = bisect_right(self._clast.starts, offset) - 1
        listed, begin = self._list(which)
        return self._firsts[which] + bisect_right(listed.starts, offset - begin) - 1

    def _list(self, which: int) -> tuple[Clast, int]:
        """A list, and the offset of its first part in the whole."""
        begin = self._clast.starts[which] if self._clast.counts else 0
        known = self._lists.get(which)
        if known is not None:
            return known, begin
        key = self._clast.parts[which]
        listed = self._read_list(key)
        if listed.size != self._clast.starts[which + 1] - begin or len(listed.parts) != self._clast.counts[which]:
            raise CorruptionError(f"{key.hex()} is another list of parts than the one that its clast names")
        while len(self._lists) >= _LISTS_KEPT:
            del self._lists[next(iter(self._lists))]
        self._lists[which] = listed
        return listed, begin


class ListedParts:
    """Takes the parts of a content one after the other, and stores lists of them as they fill up."""

    def __init__(self, put_list: PutList) -> None:
        self._put_list = put_list
        self._parts: list[bytes] = []
        self._lengths: list[int] = []
        self._lists: list[bytes] = []
        self._sizes: list[int] = []
        self._counts: list[int] = []

    def add(self, key: bytes, length: int) -> None:
        """The next part, which is stored."""
        if len(self._parts) == PARTS_LISTED_MAX:
            self._end_list()
        self._parts.append(key)
        self._lengths.append(length)

    def _end_list(self) -> None:
        self._lists.append(self._put_list(encode_part_list(self._parts, self._lengths), self._parts))
        self._sizes.append(sum(self._lengths))
        self._counts.append(len(self._parts))
        self._parts, self._lengths = [], []

    def finish(self, links: Sequence[bytes]) -> tuple[bytes, list[bytes]]:
        """The content and the links of the clast's grain; `links` are the caller's."""
        if not self._lists:
            return encode_clast(self._lengths, len(links)), [*links, *self._parts]
        self._end_list()
        return encode_clast_of_lists(self._sizes, self._counts, len(links)), [*links, *self._lists]

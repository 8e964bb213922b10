"""The journal of a backup that is under way: the rows that are done, in the basin itself.

Each entry is a grain with up to a page of rows and their metadata, which links to their contents: these stay while the
entry has its name. Its rows follow those of the entry before in tree order. Beside each stands what was written of the
tree meanwhile, so that nobody takes it for dead before the snapshot refers to it; and of a large file that takes long
the parts that are stored.

Invariant: an entry is committed in one batch with the contents that it names: whoever reads a row can have them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Final, NamedTuple

import msgpack

from basin.engine.basin import Basin, Batch, Names
from basin.engine.keyspace import SNAPSHOTS_KEYSPACE, NameMap
from basin.errors import CorruptionError
from basin.format.tree import (
    CHUNK_ROWS,
    PAGE_ROWS_MAX,
    Entry,
    Page,
    decode_chunk,
    decode_page,
    encode_chunk,
    encode_page,
)
from basin.layers.blobs import Blobs
from basin.layers.snapshots.documents import journal_name, journal_prefixes, kept_name, parts_name
from basin.terms import ContentKey, Ref

_SIZE: Final = struct.Struct("<I")
_READ_TOGETHER: Final = 4
_ENTRIES_MAX: Final = 8
"""Entries that wait for a commit: each takes about a megabyte."""


class Journal:
    """Writes the entries of one backup. All that is put through `blobs` is committed with the next of them."""

    def __init__(self, basin: Basin, identity: str) -> None:
        self._basin = basin
        self._id = identity
        self._number = 0
        self._rows: list[Entry] = []
        self._entries: list[tuple[bytes, list[bytes]]] = []
        """Waiting to be put: a backup that ends before the next commit needs none of them."""
        self._pages: list[bytes] = []
        self._large_numbers: list[int] = []
        self._batch: Batch = basin.batch()

    @property
    def blobs(self) -> Blobs:
        """Where contents are put until the next commit."""
        return Blobs(self._batch)

    def add(self, row: Entry) -> None:
        """A row that is done; its content has been put."""
        self._rows.append(row)
        if len(self._rows) == PAGE_ROWS_MAX:
            self._end_entry()
            if len(self._entries) == _ENTRIES_MAX:
                self._put_entries()
        if self._large_numbers:
            for number in self._large_numbers:
                names(self._batch).delete(parts_name(self._id, number))
            self._large_numbers = []

    def add_parts(self, beginning: Beginning) -> None:
        """Further parts of a large file that is being put, behind those that were added before."""
        self._large_numbers.append(self._number)
        self._put(*encode_beginning(beginning), parts_name)

    def keep(self, page: bytes) -> None:
        """A grain of the tree has been put."""
        self._pages.append(page)

    def commit(self) -> None:
        """Make all that was added durable, with its contents."""
        if self._rows:
            self._end_entry()
        self._put_entries()
        pages, self._pages = self._pages, []
        if pages:
            self._put(self._number.to_bytes(8, "big") + self._id.encode(), pages, kept_name)
        self._end(None)
        self._batch = self._basin.batch()

    def _end_entry(self) -> None:
        self._entries.append(encode_entry(self._rows))
        self._rows = []

    def _put_entries(self) -> None:
        for entry in self._entries:
            self._put(*entry, journal_name)
        self._entries = []

    def _put(self, content: bytes, links: Sequence[bytes], name_of: Callable[[str, int], bytes]) -> None:
        key = self.blobs.put(content, [ContentKey(link) for link in links], root=False, hot=True)
        names(self._batch).put(name_of(self._id, self._number), Ref(key))
        self._number += 1

    def finish(self, finish: Callable[[Batch], None]) -> None:
        """Commit what `finish` writes together with what was put since the last entry, which becomes none."""
        finish(self._batch)
        self._end(None)

    def abandon(self, error: BaseException) -> None:
        """Discard what was put since the last commit."""
        self._end(error)

    def _end(self, error: BaseException | None) -> None:
        self._batch.__exit__(None if error is None else type(error), error, None)


def names(basin: Names) -> NameMap[bytes, Any]:
    """The names of snapshots and journals."""
    return basin.reserved_keyspace(SNAPSHOTS_KEYSPACE)


def delete_journal(basin: Names, identity: str) -> None:
    """Let go of all entries of a backup."""
    for prefix in journal_prefixes(identity):
        for name in list(names(basin).scan(prefix=prefix, keys_only=True)):
            names(basin).delete(name)


def journal_rows(basin: Names, identity: str) -> Iterator[Entry]:
    """What the journal of a backup holds, in tree order; directories without totals."""
    waiting = names(basin).scan(prefix=journal_prefixes(identity)[0], keys_only=True)
    while together := list(islice(waiting, _READ_TOGETHER)):
        keys = [key for key in map(names(basin).ref, together) if key is not None]
        for content, links in Blobs(basin).get_linked_many(keys):
            yield from decode_entry(content, [link.digest for link in links])


class Beginning(NamedTuple):
    """Parts that a file begins with, or goes on with from byte `start`, and how it was recognised."""

    path: bytes
    identity: bytes
    size: int
    """Of the whole file."""
    start: int
    parts: list[tuple[ContentKey, int]]


def journal_beginning(basin: Names, identity: str) -> Beginning | None:
    """The beginning of the large file at which a backup was interrupted."""
    found: Beginning | None = None
    for name in names(basin).scan(prefix=journal_prefixes(identity)[2], keys_only=True):
        key = names(basin).ref(name)
        if key is None:
            continue
        content, links = Blobs(basin).get_linked(key)
        one = decode_beginning(content, links)
        if found is not None and one[:3] == found[:3] and one.start == sum(size for _, size in found.parts):
            found.parts.extend(one.parts)
        elif one.start == 0:
            found = one
    return found


def encode_beginning(beginning: Beginning) -> tuple[bytes, list[bytes]]:
    """The grain of some parts: its content, and its links."""
    sizes = [size for _, size in beginning.parts]
    content: bytes = msgpack.packb([beginning.path, beginning.identity, beginning.size, beginning.start, sizes])
    return content, [key.digest for key, _ in beginning.parts]


def decode_beginning(content: bytes, links: Sequence[ContentKey]) -> Beginning:
    """Undo `encode_beginning`."""
    what = "a journal entry of a large file"
    try:
        path, identity, size, start, sizes = msgpack.unpackb(content)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise CorruptionError(f"{what} is no MessagePack") from error
    if (
        not isinstance(path, bytes)
        or not isinstance(identity, bytes)
        or not all(type(one) is int and one >= 0 for one in (size, start))
        or not isinstance(sizes, list)
        or not all(type(one) is int and one > 0 for one in sizes)
        or len(sizes) != len(links)
    ):
        raise CorruptionError(f"{what} holds impossible values")
    return Beginning(path, identity, size, start, list(zip(links, sizes, strict=True)))


def encode_entry(rows: Sequence[Entry]) -> tuple[bytes, list[bytes]]:
    """An entry's grain: its content, and its links."""
    parents: list[bytes] = []
    firsts: list[int] = []
    for number, row in enumerate(rows):
        if not parents or parents[-1] != row.parent:
            parents.append(row.parent)
            firsts.append(number)
    page = Page(
        parents,
        [*firsts, len(rows)],
        [row.name for row in rows],
        bytes(row.kind for row in rows),
        [row.size for row in rows],
        [row.files for row in rows],
        [row.key for row in rows],
    )
    content, links = encode_page(page)
    pieces = [_SIZE.pack(len(content)), content]
    for at in range(0, len(rows), CHUNK_ROWS):
        chunk = encode_chunk([row.meta for row in rows[at : at + CHUNK_ROWS]])
        pieces += [_SIZE.pack(len(chunk)), chunk]
    return b"".join(pieces), links


def decode_entry(content: bytes, links: Sequence[bytes]) -> Iterator[Entry]:
    """Undo `encode_entry`."""
    pieces = _pieces(content)
    page = decode_page(next(pieces, b""), links)
    metas = [meta for piece in pieces for meta in decode_chunk(piece)]
    if len(metas) != len(page):
        raise CorruptionError("a journal entry has not the metadata of its rows")
    return page.entries(metas=metas)


def _pieces(content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        if at + _SIZE.size > len(content):
            raise CorruptionError("a journal entry is cut short")
        (size,) = _SIZE.unpack_from(content, at)
        at += _SIZE.size
        piece = content[at : at + size]
        if len(piece) != size:
            raise CorruptionError("a journal entry is cut short")
        yield piece
        at += size

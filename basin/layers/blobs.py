"""Blobs: content-addressed values. `db.blobs`, and the same over a batch, a transaction or a view.

A blob that was put is kept by its *root*, an ordinary name (roots keyspace, content key) that `put` writes also when
the content was there already, and `delete` removes. Content that has no root lives as long as something refers or links
to it, and can be read until a compaction removes it.

Invariants: what `get` returns hashes to what was asked for; a ranged read verifies each part it touches.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias, cast

from basin.engine.basin import Names
from basin.engine.contents import Contents, Relied
from basin.engine.keyspace import ROOTS_KEYSPACE, end_of, prefix_of
from basin.engine.sources import IterableSource, Source
from basin.errors import ContentNotFound, InvalidArgument
from basin.format.clast import Clast
from basin.format.layout import ENTRY_DELETE, KEYSPACE_PREFIX_SIZE
from basin.terms import CONTENT_KEY_SIZE, ContentKey, PartAddress, parse_address

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Data: TypeAlias = "bytes | bytearray | memoryview | os.PathLike[str] | BinaryIO | Source | Iterator[bytes]"
Address: TypeAlias = ContentKey | PartAddress | str

_PREFIX: Final = prefix_of(ROOTS_KEYSPACE)
_BATCH_SIZE: Final = 8 << 20
_BATCH_COUNT: Final = 4096
_BUFFER_SIZE: Final = 256 << 10


class Blobs:
    """Contents by key. Safe for threads as far as its scope is."""

    def __init__(self, names: Names) -> None:
        """`names` is a handle, a batch, a transaction or a view: roots are read and written there."""
        self._scope = names.scope
        self._core = names.scope.core
        self._contents: Contents = names.scope.core.contents

    # --- putting ----------------------------------------------------------------------------------------------------

    def put(self, data: Data, links: Iterable[Address] = (), *, root: bool = True) -> ContentKey:
        """Store bytes, a file (`Path`), or what an open binary file or an iterator gives; returns its content key.

        Anything larger than `part_max` is streamed in bounded memory. `links` are contents to be kept alive by this
        one; they must be there (`ContentNotFound`). With `root=False` only links and references keep the content.
        """
        self._scope.require_writable()
        relied: Relied = {}
        linked = [self._key(address) for address in links]
        for key in linked:
            self._contents.rely_on(key, relied)
        self._core.ensure_session()
        key = self._store(data, relied, linked)
        self._keep([key], relied, root=root)
        return ContentKey(key)

    def _store(self, data: Data, relied: Relied, links: Sequence[bytes]) -> bytes:
        if isinstance(data, bytes):
            return self._contents.put(data, relied, links)
        if isinstance(data, (bytearray, memoryview)):
            return self._contents.put(bytes(data), relied, links)
        if isinstance(data, os.PathLike):
            with Path(data).open("rb", buffering=0) as file:
                return self._contents.put_stream(file, relied, links)
        if isinstance(data, Iterator) and not hasattr(data, "read"):  # A file is an iterator too, of its lines.
            return self._contents.put_stream(IterableSource(data), relied, links)
        if hasattr(data, "read"):
            return self._contents.put_stream(cast(Source, data), relied, links)
        raise TypeError(f"a blob is bytes, a Path, an open binary file or an iterator, not {type(data).__name__}")

    def _keep(self, keys: Sequence[bytes], relied: Relied, *, root: bool) -> None:
        if root:
            self._scope.put_same([_PREFIX + key for key in keys], b"", relied)
        else:
            self._scope.rely(relied)

    def put_many(self, items: Iterable[Data], *, root: bool = True) -> list[ContentKey]:
        """`put` for many, in their order; small ones are hashed, compressed and sealed together, on all cores."""
        self._scope.require_writable()
        self._core.ensure_session()
        relied: Relied = {}
        keys: list[bytes] = []
        waiting: list[bytes] = []
        size = 0
        for item in items:
            if not isinstance(item, bytes):
                keys += self._contents.put_many(waiting, relied)
                waiting, size = [], 0
                keys.append(self._store(item, relied, ()))
                continue
            waiting.append(item)
            size += len(item)
            if size >= _BATCH_SIZE or len(waiting) >= _BATCH_COUNT:
                keys += self._contents.put_many(waiting, relied)
                waiting, size = [], 0
        if waiting:
            keys += self._contents.put_many(waiting, relied)
        self._keep(keys, relied, root=root)
        return ContentKey.of_many(keys)

    def delete(self, address: Address) -> None:
        """Remove the root: the content may go once nothing else needs it. No error if there was none."""
        self._scope.require_writable()
        self._scope.put(_PREFIX + self._key(address), ENTRY_DELETE, b"", 0, None)

    # --- getting ----------------------------------------------------------------------------------------------------

    def _key(self, address: Address) -> bytes:
        """The content key of an address; a part's own key where it names a part."""
        if isinstance(address, ContentKey):
            return address.digest
        if isinstance(address, str):
            address = parse_address(address)
        if isinstance(address, ContentKey):
            return address.digest
        if not isinstance(address, PartAddress):
            raise InvalidArgument(f"a content key is a ContentKey or text, not {type(address).__name__}")
        whole = address.whole.digest
        clast = self._contents.clast(whole)
        parts = [whole] if clast is None else clast.parts
        if not 0 <= address.number < len(parts):
            raise ContentNotFound(f"{address.whole} has {len(parts)} parts, no part {address.number}", address=address)
        return parts[address.number]

    def _refreshed(self, address: Address) -> bytes:
        self._core.maybe_refresh()
        return address.digest if type(address) is ContentKey else self._key(address)

    def __getitem__(self, address: Address) -> bytes:
        """The whole content in memory; raise `ContentNotFound`."""
        return self._contents.get(self._refreshed(address))

    def get(self, address: Address, default: Any = None) -> Any:
        """The whole content, or `default`."""
        try:
            return self._contents.get(self._refreshed(address))
        except ContentNotFound:
            return default

    def get_many(self, addresses: Iterable[Address]) -> list[bytes]:
        """The contents in the order asked for, read and decrypted on all cores. Raises `ContentNotFound`."""
        self._core.maybe_refresh()
        keys = [one.digest if type(one) is ContentKey else self._key(one) for one in addresses]
        return self._contents.get_many(keys) if keys else []

    def __contains__(self, address: object) -> bool:
        """Whether the content can be read (also after `delete`, until a compaction removes it)."""
        try:
            return self._contents.contains(self._refreshed(address))  # type: ignore[arg-type]  # checked there
        except ContentNotFound:
            return False

    def open(self, address: Address) -> io.BufferedReader:
        """A seekable file of the content. Reads only the parts it is asked for.

        One part is in memory at a time; while it is read in order, as many as make up 8 MiB: fetched together.
        """
        return io.BufferedReader(_BlobFile(self._contents, self._refreshed(address)), _BUFFER_SIZE)

    def read(self, address: Address, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` (exclusive); less at the end. Raises `InvalidArgument` on a negative offset."""
        if start < 0 or stop < start:
            raise InvalidArgument(f"a range goes from 0 or more upwards, not from {start} to {stop}")
        with _BlobFile(self._contents, self._refreshed(address)) as file:
            return file.read_range(start, min(stop, file.size))

    def size(self, address: Address) -> int:
        """Length in bytes. Reads one grain."""
        with _BlobFile(self._contents, self._refreshed(address)) as file:
            return file.size

    def parts(self, address: Address) -> list[tuple[ContentKey, int]]:
        """The parts of a content in order: (content key, length). One part, itself, if it is one grain."""
        key = self._refreshed(address)
        clast = self._contents.clast(key)
        if clast is None:
            return [(ContentKey(key), self.size(ContentKey(key)))]
        return [
            (ContentKey(part), stop - start)
            for part, start, stop in zip(clast.parts, clast.starts, clast.starts[1:], strict=False)
        ]

    def links(self, address: Address) -> list[ContentKey]:
        """What the content keeps alive, by `links=` of its puts; a large one's parts too."""
        return [ContentKey(key) for key in self._contents.links(self._refreshed(address))]

    def __iter__(self) -> Iterator[ContentKey]:
        """The roots: what was put and not deleted, sorted."""
        for found in self._scope.chunks(_PREFIX, end_of(_PREFIX), reverse=False):
            for name in found.names:
                if len(name) == KEYSPACE_PREFIX_SIZE + CONTENT_KEY_SIZE:
                    yield ContentKey(name[KEYSPACE_PREFIX_SIZE:])


_AHEAD_SIZE: Final = 8 << 20
"""Bytes fetched together for who reads in order: what a bucket delivers while the next request is on its way."""


def _numbers(clast: Clast, first: int, stop: int) -> range:
    """Part `first`, and those that follow it up to byte `stop`, but about `_AHEAD_SIZE` at most."""
    stop = min(stop, clast.size, clast.starts[first] + _AHEAD_SIZE)
    return range(first, max(first + 1, bisect_left(clast.starts, stop)))


class _BlobFile(io.RawIOBase):
    """A content as a raw, seekable file; keeps the parts that it fetched last."""

    def __init__(self, contents: Contents, key: bytes) -> None:
        super().__init__()
        self._contents = contents
        self._clast: Clast | None = contents.clast(key)
        self._last = -1
        self._parts: dict[int, bytes] = {}
        self._ahead: tuple[range, Future[list[bytes]]] | None = None
        self._offset = 0
        if self._clast is None:
            self._parts = {0: contents.get(key)}
        self.size = len(self._parts[0]) if self._clast is None else self._clast.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Let go of what was fetched, and of what is not on its way yet."""
        ahead, self._ahead = getattr(self, "_ahead", None), None  # Absent if there was no such content.
        if ahead is not None:
            ahead[1].cancel()
        super().close()

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self.size}.get(whence)
        if base is None or base + offset < 0:
            raise InvalidArgument(f"cannot seek to {offset} from {whence}")
        self._offset = base + offset
        return self._offset

    def _piece(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset`, all of one part."""
        if offset >= self.size:
            return b""
        if self._clast is None:
            return self._parts[0][offset : offset + size]
        starts = self._clast.starts
        number = bisect_right(starts, offset) - 1
        if number not in self._parts:
            in_order = number == self._last + 1
            self._fetch(self._clast, number, offset + (_AHEAD_SIZE if in_order else size), in_order=in_order)
        self._last = number
        inside = offset - starts[number]
        return self._parts[number][inside : inside + size]

    def _fetch(self, clast: Clast, first: int, stop: int, *, in_order: bool) -> None:
        """Read part `first`, and those that follow it up to byte `stop`, but about `_AHEAD_SIZE` at most, together.

        From a bucket, who reads in order finds the next ones on their way.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].start == first:
            numbers, contents = ahead[0], ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            numbers = _numbers(clast, first, stop)
            contents = self._contents.get_many([clast.parts[at] for at in numbers])
        self._parts = dict(zip(numbers, contents, strict=True))
        if in_order and self._contents.are_remote and numbers.stop < len(clast.parts):
            following = _numbers(clast, numbers.stop, clast.size)
            self._ahead = following, self._contents.get_ahead([clast.parts[at] for at in following])

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        piece = self._piece(self._offset, len(view))
        view[: len(piece)] = piece
        self._offset += len(piece)
        return len(piece)

    def read_range(self, start: int, stop: int) -> bytes:
        """All bytes of a range within the content."""
        pieces = []
        while start < stop:
            piece = self._piece(start, stop - start)
            pieces.append(piece)
            start += len(piece)
        return b"".join(pieces)

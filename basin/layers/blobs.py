"""Blobs: content-addressed values. `db.blobs`, and the same over a batch, a transaction or a view.

A blob that was put is kept by its *root*, an ordinary name (roots keyspace, content key) that `put` writes also when
the content was there already, and `delete` removes. Content that has no root lives as long as something refers or links
to it, and can be read until a compaction removes it.

Invariants: what `get` returns hashes to what was asked for; a ranged read verifies each part it touches.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias, cast

from basin.engine.basin import Names
from basin.engine.clasts import Parts
from basin.engine.contents import Contents, Relied
from basin.engine.keyspace import ROOTS_KEYSPACE, end_of, prefix_of
from basin.engine.sources import IterableSource, Source
from basin.errors import ContentNotFound, InvalidArgument
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
_HOLE_SIZE_MIN: Final = 256 << 10
"""Smaller holes are read: two calls to find one cost as much as reading some hundred KiB of zeros."""
_BLOCK_SIZE: Final = 512
"""Of `st_blocks`, whatever the file system's own is."""
_KNOWS_HOLES: Final = hasattr(os, "SEEK_HOLE")


class Blobs:
    """Contents by key. Safe for threads as far as its scope is."""

    def __init__(self, names: Names) -> None:
        """`names` is a handle, a batch, a transaction or a view: roots are read and written there."""
        self._scope = names.scope
        self._core = names.scope.core
        self._contents: Contents = names.scope.core.contents

    # --- putting ----------------------------------------------------------------------------------------------------

    def put(self, data: Data, links: Iterable[Address] = (), *, root: bool = True, hot: bool = False) -> ContentKey:
        """Store bytes, a file (`Path`), or what an open binary file or an iterator gives; returns its content key.

        Anything larger than `part_max` is streamed in bounded memory. `links` are contents to be kept alive by this
        one; they must be there (`ContentNotFound`). With `root=False` only links and references keep the content. With
        `hot=True` it is stored where metadata is, and can be read at once also where `data/` is archived; meant for
        what describes other contents. Contents with links are.
        """
        self._scope.require_writable()
        relied: Relied = {}
        linked = [one.digest if type(one) is ContentKey else self._key(one) for one in links]
        if linked:
            held = self._scope.relied
            relied.update({key: held[key] for key in linked if key in held})
            unknown = [key for key in linked if key not in relied]
            if unknown:
                self._contents.rely_on_many(unknown, relied)
        self._core.ensure_session()
        key = self._store(data, relied, linked, hot=hot)
        self._keep([key], relied, root=root)
        return ContentKey(key)

    def _store(self, data: Data, relied: Relied, links: Sequence[bytes], *, hot: bool) -> bytes:
        if isinstance(data, bytes):
            return self._contents.put(data, relied, links, hot=hot)
        if isinstance(data, (bytearray, memoryview)):
            return self._contents.put(bytes(data), relied, links, hot=hot)
        if isinstance(data, os.PathLike):
            with Path(data).open("rb", buffering=0) as file:
                return self._contents.put_stream(FileSource(file), relied, links, hot=hot)
        if isinstance(data, Iterator) and not hasattr(data, "read"):  # A file is an iterator too, of its lines.
            return self._contents.put_stream(IterableSource(data), relied, links, hot=hot)
        if hasattr(data, "read"):
            return self._contents.put_stream(cast(Source, data), relied, links, hot=hot)
        raise TypeError(f"a blob is bytes, a Path, an open binary file or an iterator, not {type(data).__name__}")

    def _keep(self, keys: Sequence[bytes], relied: Relied, *, root: bool) -> None:
        if root:
            self._scope.put_same([_PREFIX + key for key in keys], b"", relied)
        else:
            self._scope.rely(relied)

    def put_many(self, items: Iterable[Data], *, root: bool = True, hot: bool = False) -> list[ContentKey]:
        """`put` for many, in their order; small ones are hashed, compressed and sealed together, on all cores."""
        self._scope.require_writable()
        self._core.ensure_session()
        relied: Relied = {}
        keys: list[bytes] = []
        waiting: list[bytes] = []
        size = 0
        for item in items:
            if not isinstance(item, bytes):
                keys += self._contents.put_many(waiting, relied, hot=hot)
                waiting, size = [], 0
                keys.append(self._store(item, relied, (), hot=hot))
                continue
            waiting.append(item)
            size += len(item)
            if size >= _BATCH_SIZE or len(waiting) >= _BATCH_COUNT:
                keys += self._contents.put_many(waiting, relied, hot=hot)
                waiting, size = [], 0
        if waiting:
            keys += self._contents.put_many(waiting, relied, hot=hot)
        self._keep(keys, relied, root=root)
        return ContentKey.of_many(keys)

    def delete(self, address: Address) -> None:
        """Remove the root: the content may go once nothing else needs it. No error if there was none."""
        self._scope.require_writable()
        self._scope.put(_PREFIX + self._key(address), ENTRY_DELETE, b"", 0, None)

    @property
    def are_remote(self) -> bool:
        """Whether contents come from a bucket, where it pays to ask for many at once."""
        return self._contents.are_remote

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
        parts = self._contents.parts(whole)
        count = len(parts) if isinstance(parts, Parts) else 1
        if not 0 <= address.number < count:
            raise ContentNotFound(f"{address.whole} has {count} parts, no part {address.number}", address=address)
        return parts[address.number].key if isinstance(parts, Parts) else whole

    def _refreshed(self, address: Address) -> bytes:
        self._core.maybe_refresh()
        return address.digest if type(address) is ContentKey else self._key(address)

    def __getitem__(self, address: Address) -> bytes:
        """The whole content in memory; raise `ContentNotFound`, or `PositionGone` on a view that is too old."""
        try:
            return self._contents.get(self._refreshed(address))
        except ContentNotFound:
            self._scope.require_kept()
            raise

    def get(self, address: Address, default: Any = None) -> Any:
        """The whole content, or `default`."""
        try:
            return self._contents.get(self._refreshed(address))
        except ContentNotFound:
            self._scope.require_kept()
            return default

    def get_many(self, addresses: Iterable[Address]) -> list[bytes]:
        """The contents in the order asked for, read and decrypted on all cores. Raises `ContentNotFound`."""
        self._core.maybe_refresh()
        keys = [one.digest if type(one) is ContentKey else self._key(one) for one in addresses]
        try:
            return self._contents.get_many(keys) if keys else []
        except ContentNotFound:
            self._scope.require_kept()
            raise

    def get_linked(self, address: Address) -> tuple[bytes, list[ContentKey]]:
        """A content, and its links as one put gave them, in that order, with repetitions. Raises `ContentNotFound`.

        Where puts of the same content gave different links, it is any one of them: `links` has them all. One read.
        """
        return self.get_linked_many([address])[0]

    def get_linked_many(self, addresses: Iterable[Address]) -> list[tuple[bytes, list[ContentKey]]]:
        """`get_linked` for many, in the order asked for."""
        self._core.maybe_refresh()
        keys = [one.digest if type(one) is ContentKey else self._key(one) for one in addresses]
        if not keys:
            return []
        found = self._contents.get_linked_many(keys)
        return [(content, ContentKey.of_many(links)) for content, links in found]

    def missing(self, addresses: Iterable[Address]) -> list[ContentKey]:
        """Those of the contents that are not there, or known to be damaged: which a put would store again.

        Looks them up together, and reads none. A batch or transaction holds on to the others until it ends: they may be
        linked to.
        """
        self._core.maybe_refresh()
        keys = [one.digest if type(one) is ContentKey else self._key(one) for one in addresses]
        if not keys:
            return []
        relied: Relied = {}
        missing = self._contents.missing(keys, relied)
        self._scope.hold(relied)
        return ContentKey.of_many(missing)

    def __contains__(self, address: object) -> bool:
        """Whether the content can be read (also after `delete`, until a compaction removes it)."""
        try:
            return self._contents.contains(self._refreshed(address))  # type: ignore[arg-type]  # checked there
        except ContentNotFound:
            return False

    def open(self, address: Address) -> io.BufferedReader:
        """A seekable file of the content. Reads only the parts it is asked for.

        One part is in memory at a time; while it is read in order, as many as make up 4 MiB, of a bucket 8: fetched
        together.
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
        parts = self._contents.parts(key)
        if not isinstance(parts, Parts):
            return [(ContentKey(key), len(parts))]
        return [(ContentKey(part.key), part.stop - part.start) for part in parts]

    def links(self, address: Address) -> list[ContentKey]:
        """What the content keeps alive, by `links=` of its puts; a large one's parts too."""
        return [ContentKey(key) for key in self._contents.links(self._refreshed(address))]

    def __iter__(self) -> Iterator[ContentKey]:
        """The roots: what was put and not deleted, sorted."""
        for found in self._scope.chunks(_PREFIX, end_of(_PREFIX), reverse=False):
            for name in found.names:
                if len(name) == KEYSPACE_PREFIX_SIZE + CONTENT_KEY_SIZE:
                    yield ContentKey(name[KEYSPACE_PREFIX_SIZE:])


class FileSource:
    """An open file as a source: its large holes are not read."""

    def __init__(self, file: io.FileIO) -> None:
        """`file` is unbuffered, stands where reading is to begin, and is read by nobody else meanwhile."""
        self._file = file
        self._descriptor = file.fileno()
        found = os.fstat(self._descriptor)
        self._at = 0
        self._hole = range(sys.maxsize, sys.maxsize)
        """The next large hole, as offsets in the file; far away where there is none."""
        blocks_size = found.st_blocks * _BLOCK_SIZE if stat.S_ISREG(found.st_mode) and _KNOWS_HOLES else found.st_size
        self.is_sparse = blocks_size < found.st_size // 2
        if found.st_size - blocks_size >= _HOLE_SIZE_MIN:
            self._at = file.tell()
            self._hole = self._next_hole()

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes, none of them of the next large hole; empty at the end."""
        found = self._file.read(min(size, self._hole.start - self._at))
        if found is None:
            raise _waits_not()
        self._at += len(found)
        return found

    def read_into(self, buffer: memoryview, /) -> int:
        """`read` into `buffer`; returns how many bytes came."""
        count = self._file.readinto(buffer[: self._hole.start - self._at])
        if count is None:
            raise _waits_not()
        self._at += count
        return count

    def skip_hole(self) -> int:
        """Move to the end of a large hole; returns its size, or 0 where none begins here."""
        if self._at < self._hole.start:
            return 0
        size = self._hole.stop - self._at
        self._at = self._hole.stop
        self._hole = self._next_hole()
        return size

    def _next_hole(self) -> range:
        """The first large hole behind `_at`. Leaves the file at `_at`. Costs two calls for each hole, large or not."""
        at = self._at
        try:
            while True:
                start = os.lseek(self._descriptor, at, os.SEEK_HOLE)
                at = self._data_behind(start)
                if at - start >= _HOLE_SIZE_MIN:
                    return range(start, at)
                if at == start:  # The end of the file.
                    break
        except OSError as error:
            if error.errno != errno.ENXIO:  # `at` is behind the end: somebody made the file shorter.
                raise
        finally:
            os.lseek(self._descriptor, self._at, os.SEEK_SET)
        return range(sys.maxsize, sys.maxsize)

    def _data_behind(self, start: int) -> int:
        """Where the hole at `start` ends."""
        try:
            return os.lseek(self._descriptor, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        return os.lseek(self._descriptor, 0, os.SEEK_END)  # Nothing follows but the hole.


def _waits_not() -> InvalidArgument:
    return InvalidArgument("a file that does not wait for its bytes cannot be stored")


_AHEAD_SIZE: Final = 8 << 20
"""Bytes fetched together for who reads in order: what a bucket delivers while the next request is on its way."""
_LOCAL_AHEAD_SIZE: Final = 4 << 20
"""The same on a disk: two parts for each of two cores to open."""


def _numbers(parts: Parts, first: int, stop: int, size_max: int) -> range:
    """Part `first`, and those that follow it up to byte `stop`, but about `size_max` bytes at most."""
    stop = min(stop, parts.size, parts[first].start + size_max)
    return range(first, max(first + 1, parts.number_at(stop - 1) + 1))


class _BlobFile(io.RawIOBase):
    """A content as a raw, seekable file; keeps the parts that it fetched last."""

    def __init__(self, contents: Contents, key: bytes) -> None:
        super().__init__()
        self._contents = contents
        found = contents.parts(key)
        self._parts: Parts | None = found if isinstance(found, Parts) else None
        self._fetched: dict[int, bytes] = {} if isinstance(found, Parts) else {0: found}
        self._last = -1
        self._ahead_size = _AHEAD_SIZE if contents.are_remote else _LOCAL_AHEAD_SIZE
        self._ahead: tuple[range, Future[list[bytes]]] | None = None
        self._offset = 0
        self.size = found.size if isinstance(found, Parts) else len(found)

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
        parts = self._parts
        if parts is None:
            return self._fetched[0][offset : offset + size]
        number = parts.number_at(offset)
        if number not in self._fetched:
            in_order = number == self._last + 1
            self._fetch(parts, number, offset + (self._ahead_size if in_order else size), in_order=in_order)
        self._last = number
        inside = offset - parts[number].start
        return self._fetched[number][inside : inside + size]

    def _fetch(self, parts: Parts, first: int, stop: int, *, in_order: bool) -> None:
        """Read part `first`, and those that follow it up to byte `stop`, but some MiB at most, together.

        From a bucket, who reads in order finds the next ones on their way.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].start == first:
            numbers, contents = ahead[0], ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            numbers = _numbers(parts, first, stop, self._ahead_size)
            self._fetched = {}  # Before as much again comes.
            contents = self._contents.get_many([parts[at].key for at in numbers])
        self._fetched = dict(zip(numbers, contents, strict=True))
        if in_order and self._contents.are_remote and numbers.stop < len(parts):
            following = _numbers(parts, numbers.stop, parts.size, self._ahead_size)
            self._ahead = following, self._contents.get_ahead([parts[at].key for at in following])

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

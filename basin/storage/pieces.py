"""`Pieces`: reads of metadata in a bucket, through a cache in memory and one on disk, with few requests.

Objects are read in aligned pieces. What a miss fetches:

- all metadata of the object, where that is at most `WHOLE_SIZE_MAX`: one request, and the next reads are free;
- the end of a larger one, where its directory lies, when the end is asked for;
- pieces ahead, in several requests at once, when it is read in order;
- else the pieces that were asked for.

Invariants: objects never change, so what is cached never is stale; what comes from disk is checked there, and the
reader verifies what it gets anyway. Safe for threads; two that miss together fetch twice.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from basin.errors import BasinError
from basin.storage.disk_cache import DiskCache
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import Extent

PIECE_SIZE: Final = 64 << 10
"""A page is 4 KiB and a block of names 16: one request of 64 KiB costs a bucket what one of 4 does."""
WHOLE_SIZE_MAX: Final = 8 << 20
"""0.1 s at 100 MB/s, about what three requests wait."""
_AHEAD_MAX: Final = 8 << 20
_AHEAD_REQUEST: Final = 2 << 20
_MEMORY_MAX: Final = 16 << 20
_PREFETCH_MAX: Final = 64
"""Objects whose ends are fetched together."""


class Pieces:
    """Cached reading of the objects of one store."""

    def __init__(self, objects: ObjectStore, disk: DiskCache | None) -> None:
        self._objects = objects
        self._disk = disk
        self._memory: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._memory_size = 0
        self._mutex = threading.Lock()
        self._reached: dict[str, tuple[int, int]] = {}
        """Of objects read in order: where the last read ended, and how far was fetched ahead of it then."""

    def read(self, extent: Extent, offset: int, size: int) -> bytes:
        """Bytes of an object's metadata; fewer where the object ends before."""
        stop = min(offset + size, extent.size)
        found = self._cached(extent, offset, stop)
        if found is None:
            fetched = self._fetch(extent, self._spans(extent, offset, stop))
            found = self._cut(fetched, extent, offset, stop)
        with self._mutex:
            if extent.name in self._reached or stop < extent.size:
                self._reached[extent.name] = (stop, self._reached.get(extent.name, (0, 0))[1])
        return found

    def prefetch(self, extents: Sequence[Extent]) -> None:
        """Fetch the ends of objects whose indexes are about to be read, at once. What fails is met again by `read`."""
        wanted = [
            (extent, span)
            for extent in extents
            if self._cached(extent, max(0, extent.size - 1), extent.size) is None
            for span in self._spans(extent, max(0, extent.size - 1), extent.size)
        ]
        for start in range(0, len(wanted), _PREFETCH_MAX):
            some = wanted[start : start + _PREFETCH_MAX]
            bodies = self._objects.get_many([span for _, span in some])
            for (extent, span), body in zip(some, bodies, strict=True):
                if isinstance(body, bytes):
                    self._keep(extent, span.start, body)

    def read_again(self, extent: Extent, offset: int, size: int) -> bytes:
        """`read` from the store alone; what comes replaces what is cached."""
        stop = min(offset + size, extent.size)
        start = offset // PIECE_SIZE * PIECE_SIZE
        end = min(extent.size, -(-stop // PIECE_SIZE) * PIECE_SIZE)
        return self._cut(self._fetch(extent, [ByteRange(extent.name, start, end)]), extent, offset, stop)

    def keep(self, extent: Extent, body: bytes) -> None:
        """Remember the metadata of an object that is in hand: `body` is the end of the object, from a piece's start."""
        self._keep(extent, extent.size - len(body), body)

    def metadata_start(self, extent: Extent) -> int:
        """The start of the piece in which the metadata begins."""
        return max(0, extent.size - extent.index_size) // PIECE_SIZE * PIECE_SIZE

    def _spans(self, extent: Extent, offset: int, stop: int) -> list[ByteRange]:
        """What to fetch, from piece to piece, when [offset, stop) is not there."""
        name, size = extent.name, extent.size
        start = offset // PIECE_SIZE * PIECE_SIZE
        end = min(size, -(-stop // PIECE_SIZE) * PIECE_SIZE)
        first = self.metadata_start(extent)
        if size - first <= WHOLE_SIZE_MAX and start >= first:
            return [ByteRange(name, first, size)]
        if end == size:
            directory = max(first, size - extent.directory_size)
            return [ByteRange(name, min(start, directory // PIECE_SIZE * PIECE_SIZE), size)]
        with self._mutex:
            reached, ahead = self._reached.get(name, (0, 0))
            ahead = min(_AHEAD_MAX, max(PIECE_SIZE, 2 * ahead)) if reached and start <= reached <= stop else 0
            self._reached[name] = (stop, ahead)
        end = min(size, end + ahead)
        return [ByteRange(name, at, min(end, at + _AHEAD_REQUEST)) for at in range(start, end, _AHEAD_REQUEST)]

    def _fetch(self, extent: Extent, spans: list[ByteRange]) -> dict[int, bytes]:
        """The pieces of spans that lie one behind the other, by their starts; all are kept."""
        bodies = [self._objects.get(spans[0])] if len(spans) == 1 else self._objects.get_many(spans)
        pieces: dict[int, bytes] = {}
        for span, body in zip(spans, bodies, strict=True):
            if isinstance(body, BasinError):
                raise body
            pieces |= self._keep(extent, span.start, body)
        return pieces

    def _cut(self, pieces: dict[int, bytes], extent: Extent, offset: int, stop: int) -> bytes:
        start = offset // PIECE_SIZE * PIECE_SIZE
        joined = b"".join(pieces.get(at, b"") for at in range(start, stop, PIECE_SIZE))
        return joined[offset - start : stop - start]

    def _cached(self, extent: Extent, offset: int, stop: int) -> bytes | None:
        """[offset, stop), if all pieces of it are in memory or on disk."""
        pieces: dict[int, bytes] = {}
        for start in range(offset // PIECE_SIZE * PIECE_SIZE, stop, PIECE_SIZE):
            piece = self._piece(extent, start)
            if piece is None:
                return None
            pieces[start] = piece
        return self._cut(pieces, extent, offset, stop)

    def _piece(self, extent: Extent, start: int) -> bytes | None:
        place = (extent.name, start)
        with self._mutex:
            known = self._memory.get(place)
            if known is not None:
                self._memory.move_to_end(place)
                return known
        if self._disk is None:
            return None
        stored = self._disk.get(extent.name, start, min(extent.size, start + PIECE_SIZE))
        if stored is not None:
            self._remember(place, stored)
        return stored

    def _keep(self, extent: Extent, start: int, body: bytes) -> dict[int, bytes]:
        """Cut into pieces; those that are whole are kept."""
        pieces = {}
        for at in range(0, len(body), PIECE_SIZE):
            piece = body[at : at + PIECE_SIZE]
            pieces[start + at] = piece
            if len(piece) == PIECE_SIZE or start + at + len(piece) == extent.size:
                self._remember((extent.name, start + at), piece)
                if self._disk is not None:
                    self._disk.put(extent.name, start + at, piece)
        return pieces

    def _remember(self, place: tuple[str, int], piece: bytes) -> None:
        with self._mutex:
            old = self._memory.pop(place, b"")
            self._memory[place] = piece
            self._memory_size += len(piece) - len(old)
            while self._memory_size > _MEMORY_MAX:
                _, dropped = self._memory.popitem(last=False)
                self._memory_size -= len(dropped)

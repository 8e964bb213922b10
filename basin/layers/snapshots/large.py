"""A large file that is backed up: its parts are told to the journal, and those that are stored already are not read.

A backup that was interrupted in the middle of a file has the parts of its beginning in its journal. The content key is
that of the whole file, so they are read from the basin and hashed again; the file itself is read from behind them.

Invariant: what is given as the beginning of the file was its beginning when it had the same size, times and inode.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence

from basin.errors import ContentNotFound, CorruptionError
from basin.layers.blobs import Blobs, FileSource
from basin.terms import ContentKey

_TOGETHER_SIZE = 8 << 20
"""Parts that are fetched together."""


class LargeFile:
    """The source of one large file's content; see `basin.engine.sources.Source`."""

    def __init__(
        self,
        file: io.FileIO,
        blobs: Blobs,
        known: Sequence[tuple[ContentKey, int]],
        read: Callable[[int], None],
    ) -> None:
        """`known`: content keys and sizes of parts it begins with. `read` is told how much is read of the file."""
        self._file = file
        self._blobs = blobs
        self._known = self._contents(known) if known else iter(())
        self._piece = memoryview(b"")
        self._source: FileSource | None = None
        self._read = read
        self.size = 0
        """Of all that was given so far."""
        self.stored: list[tuple[ContentKey, int]] = []
        """The parts so far that are stored; grows while the file is put, by another thread."""

    @property
    def is_sparse(self) -> bool:
        """Whether most of it are holes."""
        return self._source is not None and self._source.is_sparse

    def _contents(self, known: Sequence[tuple[ContentKey, int]]) -> Iterator[bytes]:
        """The parts that are known; ends before one that cannot be read: then the file is read from there."""
        together: list[ContentKey] = []
        size = 0
        for number, (key, length) in enumerate(known, 1):
            together.append(key)
            size += length
            if size < _TOGETHER_SIZE and number < len(known):
                continue
            try:
                yield from self._blobs.get_many(together)
            except (ContentNotFound, CorruptionError):
                return
            together, size = [], 0

    def _behind_known(self) -> FileSource:
        if self._source is None:
            self._file.seek(self.size)
            self._source = FileSource(self._file)
        return self._source

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes."""
        place = bytearray(size)
        count = self.read_into(memoryview(place))
        return bytes(place[:count])

    def read_into(self, buffer: memoryview, /) -> int:
        """`read` into `buffer`; returns how many bytes came."""
        if self._source is None:
            self._piece = self._piece or memoryview(next(self._known, b""))
            count = min(len(self._piece), len(buffer))
            if count:
                buffer[:count] = self._piece[:count]
                self._piece = self._piece[count:]
                self.size += count
                return count
        count = self._behind_known().read_into(buffer)
        self.size += count
        self._read(count)
        return count

    def skip_hole(self) -> int:
        """Move to the end of a large hole; returns its size, or 0 where none begins here."""
        if self._source is None:
            self._piece = self._piece or memoryview(next(self._known, b""))
            if self._piece:
                return 0
        size = self._behind_known().skip_hole()
        self.size += size
        return size

    def part_stored(self, key: bytes, size: int) -> None:
        """The next part is stored."""
        self.stored.append((ContentKey(key), size))

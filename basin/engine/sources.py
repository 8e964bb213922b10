"""Where large contents come from: whatever gives bytes piece by piece, cut into parts without holding it all.

Imported by `contents` and by layers. Knows nothing of grains.

Invariants:

- The parts of a source are those of its content, however it delivers that, and whatever of it are holes.
- Memory: a window of half as much again as the largest part, 2 MiB at least; holes are neither read nor filled, but at
  their edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from basin.engine.cutting import Cutter
from basin.errors import InvalidArgument
from basin.format.layout import MIB

_READ_SIZE: Final = MIB
_WINDOW_MIN: Final = 2 * MIB
"""So much is read, even where parts are small, before they are cut."""


class Source(Protocol):
    """Anything with `read(size) -> bytes`: an open binary file, a socket's file, a decompressor.

    One with a method `skip_hole() -> int` is asked before it is read: it moves over zeros that need not be read, and
    returns how many they are. One with `read_into(buffer) -> int` is read by that, without a copy; `readinto` is not
    used, because whoever derives a class of a file's and overrides `read` means that. One with
    `part_stored(content_key, size)` is told of every part of a clast once it is stored, in order, by another thread.
    """

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""
        ...


class Zeros(NamedTuple):
    """A part that is all zeros, and was not read."""

    size: int


class Reading:
    """What is read of a source: whole if it is small, else in parts. Once."""

    def __init__(self, source: Source, head_size: int) -> None:
        """`head_size`: the most bytes that `whole` gives."""
        self._source = source
        self._read_into: Callable[[memoryview], int] | None = getattr(source, "read_into", None)
        self._skip_hole: Callable[[], int] = getattr(source, "skip_hole", _no_hole)
        self._head_size = head_size
        self._view = memoryview(b"")
        self._filled = 0
        """Bytes in the window, from its begin on."""
        self._filled_zeros = 0
        """How many of the last of these are of a hole."""
        self._hole = 0
        """Zeros that follow these."""
        self._ended = False

    def whole(self) -> bytes | None:
        """All that the source has, if that is at most `head_size` bytes; None: it has more, see `parts`."""
        pieces: list[bytes] = []
        size = 0
        while size <= self._head_size and not self._ended:
            self._hole = self._skip_hole()
            if size + self._hole > self._head_size:
                break
            piece = self._source.read(min(self._head_size + 1 - size - self._hole, _READ_SIZE))
            if piece is None:
                raise _waits_not()
            self._ended = not piece
            pieces += [bytes(self._hole), piece]
            size += self._hole + len(piece)
            self._hole = 0
        head = b"".join(pieces)
        if size + self._hole <= self._head_size:
            return head
        self._view = memoryview(head)
        self._filled = size
        return None

    @property
    def part_stored(self) -> Callable[[bytes, int], None]:
        """What is to be called for each part that is stored."""
        told: Callable[[bytes, int], None] = getattr(self._source, "part_stored", _nobody_asks)
        return told

    @property
    def is_sparse(self) -> bool:
        """Whether the source says of itself that most of it are holes."""
        return bool(getattr(self._source, "is_sparse", False))

    def parts(self, cutter: Cutter) -> Iterator[bytes | Zeros]:
        """The parts in order, after `whole` gave None. Where `size_max` zeros of a hole begin a part, they are one."""
        self._make_window(max(cutter.size_max + cutter.size_max // 2, self._filled, _WINDOW_MIN))
        is_last = False
        while not is_last:
            if self._filled == self._filled_zeros:
                self._hole += self._filled
                self._filled = self._filled_zeros = 0
                while self._hole >= cutter.size_max:
                    self._hole -= cutter.size_max
                    yield Zeros(cutter.size_max)
            self._fill(cutter.size_max)
            is_last = self._ended and not self._hole
            at = 0
            with self._view[: self._filled] as window:
                for length in cutter.cut(window, is_last=is_last):
                    yield bytes(window[at : at + length])
                    at += length
            self._drop(at)

    def _make_window(self, size: int) -> None:
        window = bytearray(size)
        window[: self._filled] = self._view[: self._filled]
        self._view = memoryview(window)

    def _fill(self, hole_size_max: int) -> None:
        """Read until the window is full, or the source has ended.

        Of a hole come in at most `hole_size_max` bytes: then it is certain where the parts before it end.
        """
        while self._filled < len(self._view) and not self._ended:
            if not self._hole:
                self._hole = self._skip_hole()
            if self._hole:
                size = min(self._hole, hole_size_max, len(self._view) - self._filled)
                self._view[self._filled : self._filled + size] = bytes(size)
                self._filled += size
                self._filled_zeros += size
                self._hole -= size
                if self._hole:
                    return
                continue
            count = self._read(self._view[self._filled : self._filled + _READ_SIZE])
            self._ended = count == 0
            if count:
                self._filled += count
                self._filled_zeros = 0

    def _read(self, place: memoryview) -> int:
        """Read up to as many bytes as `place` has; returns how many came."""
        if self._read_into is not None:
            return self._read_into(place)
        piece = self._source.read(len(place))
        if piece is None:
            raise _waits_not()
        place[: len(piece)] = piece
        return len(piece)

    def _drop(self, size: int) -> None:
        """Forget the first `size` bytes of the window."""
        rest = self._filled - size
        self._view[:rest] = self._view[size : self._filled]
        self._filled = rest
        self._filled_zeros = min(self._filled_zeros, rest)


def _nobody_asks(_key: bytes, _size: int) -> None:
    """Of a source that keeps no account of parts."""


def _no_hole() -> int:
    """Of a source that knows of none."""
    return 0


def _waits_not() -> InvalidArgument:
    return InvalidArgument("a source must wait for its bytes: this one gave None instead of some")


class BytesSource:
    """Bytes as a source, without copying them all."""

    def __init__(self, content: bytes) -> None:
        self._view = memoryview(content)

    def read(self, size: int, /) -> bytes:
        piece, self._view = self._view[:size], self._view[size:]
        return bytes(piece)


class IterableSource:
    """An iterable of `bytes` as a source."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._left = memoryview(b"")

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes of the current piece."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._left = memoryview(piece)
        taken, self._left = self._left[:size], self._left[size:]
        return bytes(taken)

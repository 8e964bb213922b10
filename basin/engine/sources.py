"""Where large contents come from: whatever gives bytes piece by piece, cut into parts without holding it all.

Imported by `contents` and by layers. Knows nothing of grains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from basin.format.layout import MIB

_READ_SIZE: Final = MIB


class Source(Protocol):
    """Anything with `read(size) -> bytes`: an open binary file, a socket's file, a decompressor."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; empty at the end."""
        ...


def read_fully(source: Source, size: int) -> bytes:
    """Read until `size` bytes or the end: pipes and sockets give less than they are asked for."""
    pieces, missing = [], size
    while missing:
        piece = source.read(min(missing, _READ_SIZE))
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def parts_of(head: bytes, source: Source, size: int) -> Iterator[bytes]:
    """Fixed parts of `size` bytes of `head` and what follows it; the last may be smaller."""
    at = 0
    while len(head) - at >= size:
        yield head[at : at + size]
        at += size
    rest = head[at:]
    while True:
        part = rest + read_fully(source, size - len(rest))
        if not part:
            return
        yield part
        rest = b""


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
        self._left = b""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes of the current piece."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return b""
            self._left = piece
        taken, self._left = self._left[:size], self._left[size:]
        return taken

"""Many contents of a bucket at once: few requests, all on their way together, and the next while these are opened.

Imported by `contents`. Invariants: a content is returned only if it passed what a single read asks for; whatever does
not is left to the single read, which looks closer. Safe for threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, TypeAlias, TypeVar

from blake3 import blake3

from basin.engine.index import GrainLocator
from basin.engine.reader import StratumReader, StratumReaders
from basin.errors import BasinError, CorruptionError, ObjectMissing
from basin.terms import Location

T = TypeVar("T")
Wanted: TypeAlias = tuple[bytes, bytes, Location | None]
"""Content key, grain key, and where the grain lies."""
POOL_NAME: Final = "basin-worker"
"""What the threads of a handle's pool are called."""

_STRETCH: Final = 16 << 20
"""Bytes that are fetched together; twice as many are in memory."""
_Grains: TypeAlias = dict[Location, bytes | BasinError]


def stretches(items: Sequence[T], sizes: Sequence[int], size_min: int) -> list[Sequence[T]]:
    """Slices of `items` of at least `size_min` bytes each, but the last."""
    slices: list[Sequence[T]] = []
    start, size = 0, 0
    for row, length in enumerate(sizes):
        size += length
        if size >= size_min:
            slices.append(items[start : row + 1])
            start, size = row + 1, 0
    if start < len(items):
        slices.append(items[start:])
    return slices


class Together:
    """Fetches contents of one handle. `reader_of` opens the stratum of a place; `get_one` reads a single content."""

    def __init__(
        self,
        readers: StratumReaders,
        locator: GrainLocator,
        pool: Callable[[], ThreadPoolExecutor],
        reader_of: Callable[[Location], StratumReader],
        get_one: Callable[[bytes], bytes],
        *,
        sealed: bool,
    ) -> None:
        self._readers = readers
        self._locator = locator
        self._pool = pool
        self._reader_of = reader_of
        self._get_one = get_one
        self._sealed = sealed

    def fetch(self, wanted: Sequence[Wanted]) -> list[bytes]:
        """The contents, in order: all requests of a stretch at once, neighbours in one."""
        contents: list[bytes] = []
        if not wanted:
            return contents
        parts = stretches(wanted, [0 if place is None else place.length for _, _, place in wanted], _STRETCH)
        ahead: Callable[[], _Grains] = partial(self._grains_of, parts[0])
        for number, part in enumerate(parts):
            grains = ahead()
            if number + 1 < len(parts):
                ahead = self._grains_ahead(parts[number + 1])
            for key, grain_key, place in part:
                grain = None if place is None else grains.get(place)
                content = None
                if place is not None and isinstance(grain, bytes):
                    content = self._open_plain(grain, place, grain_key, key)
                contents.append(self._get_one(key) if content is None else content)
        return contents

    def _grains_of(self, part: Sequence[Wanted]) -> _Grains:
        """The grains of a stretch as they are stored, but for those that this handle is just writing."""
        writer_of = self._locator.writer_of
        places = [place for _, _, place in part if place is not None and writer_of(place.stratum) is None]
        return dict(zip(places, self._readers.read_grains(places, self._locator.kind_of), strict=True))

    def _grains_ahead(self, part: Sequence[Wanted]) -> Callable[[], _Grains]:
        """Begin to fetch the grains of a stretch; what is returned waits for them. On the pool's own threads it does
        not begin before: they could all wait for each other.
        """
        if threading.current_thread().name.startswith(POOL_NAME):
            return partial(self._grains_of, part)
        return self._pool().submit(self._grains_of, part).result

    def _open_plain(self, grain: bytes, place: Location, grain_key: bytes, key: bytes) -> bytes | None:
        """The content of a plain grain in hand; None: a single read must look closer."""
        try:
            reader = self._reader_of(place)
        except (ObjectMissing, CorruptionError):
            return None
        found = reader.open_content(grain, place.offset, grain_key) if len(grain) == place.length else None
        if found is None or not (self._sealed or blake3(found.content).digest() == key):
            return None
        self._readers.keep_grain(key, found.sealed, place.stratum)
        return found.content

"""Sets of grain keys too large for memory: gathered in any order, given back sorted, each once, some at a time.

A key stands for itself by its first 8 bytes. Keys are uniform, so two that share those are next to impossible by
accident; who makes such contents on purpose only keeps garbage alive, because what is wanted is kept.

Invariant: memory stays below about 4 MiB, whatever is gathered; above that, keys lie in temporary files by their first
byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from basin.storage.row_spool import RowSpool

Prefixes: TypeAlias = npt.NDArray[np.uint64]
"""The first 8 bytes of grain keys, as numbers."""

IN_MEMORY_MAX: Final = 1 << 16
"""Keys that wait in memory: 0.5 MiB, and six times as much while they are sorted and spilled. Four times as many were
no faster, and took 12 MiB more."""
CHUNK: Final = 1 << 16
"""Keys that are given back together at most."""
_PARTS: Final = 256


def prefixes_of(joined: bytes) -> Prefixes:
    """The prefixes of grain keys that are joined without gaps."""
    numbers: npt.NDArray[Any] = np.frombuffer(joined, dtype=">u8")[::4]
    return numbers.astype(np.uint64)


class Wanted:
    """Keys to look for."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._waiting: list[Prefixes] = []
        self._count = 0
        self._spool: RowSpool | None = None

    def add(self, prefixes: Prefixes) -> None:
        """Gather keys; those that are there already cost nothing for long."""
        if not len(prefixes):
            return
        self._waiting.append(prefixes)
        self._count += len(prefixes)
        if self._count > IN_MEMORY_MAX:
            joined = _unique(np.concatenate(self._waiting))
            self._waiting, self._count = [joined], len(joined)
            if self._count > IN_MEMORY_MAX // 2:
                self._spill()

    def _spill(self) -> None:
        if self._spool is None:
            self._spool = RowSpool(np.uint64, self._folder)
        for rows in self._waiting:
            self._spool.add(rows >> np.uint64(56), rows)
        self._waiting, self._count = [], 0

    def __bool__(self) -> bool:
        return bool(self._count or self._spool is not None)

    def take(self) -> Iterator[Prefixes]:
        """All keys, sorted and each once, in chunks; afterwards none is left. Those added meanwhile wait."""
        spool, waiting = self._spool, self._waiting
        if spool is not None:
            self._spill()
        self._spool, self._waiting, self._count = None, [], 0
        if spool is None:
            yield from _chunks(_unique(np.concatenate(waiting))) if waiting else ()
            return
        try:
            for number in spool.parts():
                yield from _chunks(_unique(spool.read(number)))
        finally:
            spool.close()

    def close(self) -> None:
        """Forget all."""
        if self._spool is not None:
            self._spool.close()
        self._spool, self._waiting, self._count = None, [], 0


def _unique(rows: Prefixes) -> Prefixes:
    """Sorted, each once. NumPy's `unique` gathers numbers in a hash table, which takes 40 bytes for each."""
    ordered = np.sort(rows)
    fresh = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=fresh[1:])
    return ordered[fresh]


def _chunks(rows: Prefixes) -> Iterator[Prefixes]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]

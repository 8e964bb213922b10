"""LMDB. Every commit of a write transaction is synced by default; only the size of the map is set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, cast

import lmdb

from benchmarks.workload import Pair

MAP_SIZE: Final = 64 << 30
"""Address space, not disk space: the file grows with its pages."""


class LmdbStore:
    """One environment, and one read transaction for all reads between two batches: LMDB's fastest way to read."""

    def __init__(self, folder: Path) -> None:
        self._environment = lmdb.open(str(folder), map_size=MAP_SIZE)
        self._reading: lmdb.Transaction | None = None

    def put_each(self, pairs: Iterable[Pair]) -> None:
        with self._environment.begin(write=True) as transaction:
            put = transaction.put
            for key, value in pairs:
                put(key, value)
        self._end_reading()

    def put_batch(self, pairs: Iterable[Pair]) -> None:
        with self._environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(pairs)
        self._end_reading()

    def commit_one(self, key: bytes, value: bytes) -> None:
        with self._environment.begin(write=True) as transaction:
            transaction.put(key, value)

    def getter(self) -> Callable[[bytes], bytes]:
        return cast("Callable[[bytes], bytes]", self._reader().get)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        with self._reader().cursor() as cursor:
            found = cast("list[Pair]", cursor.getmulti(keys))
        return [value for _, value in found]

    def scan(self) -> Iterator[Pair]:
        with self._reader().cursor() as cursor:
            yield from cast("Iterator[Pair]", cursor)

    def close(self) -> None:
        self._end_reading()
        self._environment.close()

    def _reader(self) -> lmdb.Transaction:
        if self._reading is None:
            self._reading = self._environment.begin()
        return self._reading

    def _end_reading(self) -> None:
        """Let later reads see what was committed; an old reader also keeps free pages from being used again."""
        if self._reading is not None:
            self._reading.abort()
            self._reading = None


def open_store(folder: Path, *, value_size: int) -> LmdbStore:
    """See `benchmarks.peers.protocol.StoreFactory`."""
    del value_size
    return LmdbStore(folder)

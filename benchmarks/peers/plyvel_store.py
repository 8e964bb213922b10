"""LevelDB through `plyvel`. Only `sync` differs from the defaults.

A synced put makes the log durable up to itself. LevelDB does not sync a log file that it has filled before, so
single puts of more than 4 MiB between two commits are a little less durable here than with the other engines: to
the peer's advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import plyvel

from benchmarks.workload import Pair


class PlyvelStore:
    """One database. Its methods may be called from several threads."""

    def __init__(self, folder: Path) -> None:
        self._database = plyvel.DB(str(folder), create_if_missing=True)

    def put_each(self, pairs: Iterable[Pair]) -> None:
        put = self._database.put
        for key, value in pairs:
            put(key, value)
        with self._database.write_batch(sync=True) as batch:
            batch.delete(b"")  # LevelDB has no bare sync: the smallest synced write takes all puts before it along

    def put_batch(self, pairs: Iterable[Pair]) -> None:
        with self._database.write_batch(sync=True) as batch:
            put = batch.put
            for key, value in pairs:
                put(key, value)

    def commit_one(self, key: bytes, value: bytes) -> None:
        self._database.put(key, value, sync=True)

    def getter(self) -> Callable[[bytes], bytes]:
        get: Callable[[bytes], bytes] = self._database.get
        return get

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        get = self._database.get
        return [get(key) for key in keys]

    def scan(self) -> Iterator[Pair]:
        pairs: Iterator[Pair] = self._database.iterator()
        return pairs

    def close(self) -> None:
        self._database.close()


def open_store(folder: Path, *, value_size: int) -> PlyvelStore:
    """See `benchmarks.peers.protocol.StoreFactory`."""
    del value_size
    return PlyvelStore(folder)

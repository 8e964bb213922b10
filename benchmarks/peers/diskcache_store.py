"""`diskcache`, used as a store: nothing is evicted, and a commit is durable.

Two defaults are changed for durability: `synchronous=FULL`, and no value goes to a file of its own, because
`diskcache` does not sync those. It has no batch get, and no scan of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from diskcache import Cache

from benchmarks.workload import Pair

_NO_LIMIT: Final = 1 << 40
_SYNCHRONOUS_FULL: Final = 2


class DiskcacheStore:
    """One cache. It keeps a connection for each thread."""

    def __init__(self, folder: Path) -> None:
        self._cache = Cache(
            str(folder),
            sqlite_synchronous=_SYNCHRONOUS_FULL,
            disk_min_file_size=_NO_LIMIT,
            eviction_policy="none",
            size_limit=_NO_LIMIT,
            cull_limit=0,
        )

    def put_each(self, pairs: Iterable[Pair]) -> None:
        put = self._cache.set
        with self._cache.transact(retry=True):
            for key, value in pairs:
                put(key, value)

    def put_batch(self, pairs: Iterable[Pair]) -> None:
        self.put_each(pairs)

    def commit_one(self, key: bytes, value: bytes) -> None:
        self._cache.set(key, value, retry=True)

    def getter(self) -> Callable[[bytes], bytes]:
        get: Callable[[bytes], bytes] = self._cache.get
        return get

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        get = self._cache.get
        return [get(key) for key in keys]

    def scan(self) -> Iterator[Pair]:
        get = self._cache.get
        return ((key, get(key)) for key in self._cache.iterkeys())

    def close(self) -> None:
        self._cache.close()


def open_store(folder: Path, *, value_size: int) -> DiskcacheStore:
    """See `benchmarks.peers.protocol.StoreFactory`."""
    del value_size
    return DiskcacheStore(folder)

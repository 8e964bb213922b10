"""RocksDB through `rocksdict`. Raw mode: keys and values are bytes as they are. Only `sync` differs from the
defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

from rocksdict import Options, Rdict, WriteBatch, WriteOptions

from benchmarks.workload import Pair


class RocksdictStore:
    """One `Rdict`. Its methods may be called from several threads."""

    def __init__(self, folder: Path) -> None:
        self._rdict = Rdict(str(folder), Options(raw_mode=True))
        self._synced = WriteOptions()
        self._synced.sync = True

    def put_each(self, pairs: Iterable[Pair]) -> None:
        """Plain puts, which go to the write-ahead log; then one sync of that log makes all of them durable."""
        rdict = self._rdict
        for key, value in pairs:
            rdict[key] = value
        rdict.flush_wal(True)

    def put_batch(self, pairs: Iterable[Pair]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, value in pairs:
            batch[key] = value
        self._rdict.write(batch, self._synced)

    def commit_one(self, key: bytes, value: bytes) -> None:
        self._rdict.put(key, value, self._synced)

    def getter(self) -> Callable[[bytes], bytes]:
        return cast("Callable[[bytes], bytes]", self._rdict.get)

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        return cast("list[bytes]", self._rdict[list(keys)])

    def scan(self) -> Iterator[Pair]:
        return cast("Iterator[Pair]", self._rdict.items())

    def close(self) -> None:
        self._rdict.close()


def open_store(folder: Path, *, value_size: int) -> RocksdictStore:
    """See `benchmarks.peers.protocol.StoreFactory`."""
    del value_size
    return RocksdictStore(folder)

"""SQLite in WAL mode with `synchronous=FULL`: every commit syncs the write-ahead log.

Rows of small values live in the key's own tree (`WITHOUT ROWID`), which SQLite's manual advises below a twentieth
of a page (about 200 bytes); larger ones in a rowid table with a unique index on the key.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from benchmarks.workload import Pair

SMALL_VALUE_MAX: Final = 200
_KEYS_IN_A_QUERY: Final = 1_000
_PUT: Final = "INSERT OR REPLACE INTO pairs VALUES (?, ?)"
_GET: Final = "SELECT value FROM pairs WHERE key = ?"


class SqliteStore:
    """One connection. Threads share it under a lock: with one each, they would wait for one another by sleeping."""

    def __init__(self, folder: Path, *, value_size: int) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(folder / "store.sqlite", isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")
        layout = "WITHOUT ROWID" if value_size <= SMALL_VALUE_MAX else ""
        self._connection.execute(f"CREATE TABLE IF NOT EXISTS pairs (key BLOB PRIMARY KEY, value BLOB) {layout}")

    def put_each(self, pairs: Iterable[Pair]) -> None:
        execute = self._connection.execute
        execute("BEGIN")
        for pair in pairs:
            execute(_PUT, pair)
        execute("COMMIT")

    def put_batch(self, pairs: Iterable[Pair]) -> None:
        self._connection.execute("BEGIN")
        self._connection.executemany(_PUT, pairs)
        self._connection.execute("COMMIT")

    def commit_one(self, key: bytes, value: bytes) -> None:
        with self._lock:
            self._connection.execute(_PUT, (key, value))

    def getter(self) -> Callable[[bytes], bytes]:
        execute = self._connection.execute

        def get(key: bytes) -> bytes:
            value: bytes = execute(_GET, (key,)).fetchone()[0]
            return value

        return get

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        found: dict[bytes, bytes] = {}
        for start in range(0, len(keys), _KEYS_IN_A_QUERY):
            wanted = keys[start : start + _KEYS_IN_A_QUERY]
            marks = ",".join("?" * len(wanted))
            found.update(self._connection.execute(f"SELECT key, value FROM pairs WHERE key IN ({marks})", wanted))
        return [found[key] for key in keys]

    def scan(self) -> Iterator[Pair]:
        return self._connection.execute("SELECT key, value FROM pairs ORDER BY key")

    def close(self) -> None:
        self._connection.close()


def open_store(folder: Path, *, value_size: int) -> SqliteStore:
    """See `benchmarks.peers.protocol.StoreFactory`."""
    return SqliteStore(folder, value_size=value_size)

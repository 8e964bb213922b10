"""SlateDB with default settings: an LSM tree in a bucket, in Rust, called through asyncio.

It has one writer at a time (a second one fences the first), so `commit_each` is that many tasks on one handle. A write
becomes durable with the next flush of its log; by default one every 100 ms, which a lone writer would wait for every
time (101 ms a commit). Here every commit asks for the flush, which was the fastest of all ways that were tried with 1,
8 and 64 tasks. It neither encrypts nor compresses by default; its cache is in memory.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Final, TypeVar

from benchmarks.bucket.contestant import Names
from benchmarks.bucket.place import Place
from benchmarks.bucket.workload import Pairs

_SCAN_ROWS: Final = 1_000
_SCAN_READ_AHEAD: Final = 4 << 20  # With its default of one block the scan of a cold store took twenty times as long.
_SCAN_REQUESTS: Final = 4
_Result = TypeVar("_Result")


def open_side(place: Place, *, reading: bool) -> SlateSide:
    return SlateSide(place, reading=reading)


class SlateSide(Names):
    """One handle, and the event loop that it is called from. Reading follows the latest state and writes nothing."""

    def __init__(self, place: Place, *, reading: bool) -> None:
        self._library: Any = importlib.import_module("slatedb.uniffi")
        self._loop = asyncio.new_event_loop()
        store = self._library.ObjectStoreBuilder.from_url(f"s3://{place.bucket}")
        for name, value in place.object_store_options().items():
            store.with_config(name, value)
        if reading:
            builder: Any = self._library.DbReaderBuilder(place.prefix, store.build())
            builder.with_reader_mode(self._library.ReaderMode.FOLLOW_LATEST())
        else:
            builder = self._library.DbBuilder(place.prefix, store.build())
        self._handle: Any = self._run(builder.build())
        self._to_log = self._library.FlushOptions(flush_type=self._library.FlushType.WAL)

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return self._loop.run_until_complete(work)

    def put_batch(self, pairs: Pairs) -> None:
        self._run(self._write([pairs]))

    def load(self, batches: Iterable[Pairs]) -> None:
        self._run(self._write(batches))

    async def _write(self, batches: Iterable[Pairs]) -> None:
        for pairs in batches:
            batch = self._library.WriteBatch()
            for name, value in pairs:
                batch.put(name, value)
            await self._handle.write(batch)
        await self._handle.flush_with_options(self._to_log)

    def commit_each(self, shares: Sequence[Pairs]) -> None:
        async def commit_share(share: Pairs) -> None:
            for name, value in share:
                await self._handle.put(name, value)
                await self._handle.flush_with_options(self._to_log)

        async def all_shares() -> None:
            await asyncio.gather(*map(commit_share, shares))

        self._run(all_shares())

    def get_each(self, names: Sequence[bytes]) -> list[bytes]:
        async def get_all() -> list[bytes]:
            return [await self._handle.get(name) for name in names]

        return self._run(get_all())

    def scan(self) -> int:
        return self._run(self._scan())

    async def _scan(self) -> int:
        everything = self._library.KeyRange(start=None, start_inclusive=True, end=None, end_inclusive=False)
        options = self._library.ScanOptions(
            durability_filter=self._library.DurabilityLevel.MEMORY,
            dirty=False,
            read_ahead_bytes=_SCAN_READ_AHEAD,
            cache_blocks=True,
            max_fetch_tasks=_SCAN_REQUESTS,
        )
        iterator = await self._handle.scan_with_options(everything, options)
        count = 0
        rows = await iterator.next_batch(_SCAN_ROWS)
        while rows:
            count += len(rows)
            rows = await iterator.next_batch(_SCAN_ROWS)
        return count

    def close(self) -> None:
        self._run(self._handle.shutdown())
        self._loop.close()

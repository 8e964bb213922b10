"""The way of a large content into strata: what is read is hashed and compressed on the pool, and appended in order.

The caller's thread reads, cuts and hashes the whole; the pool hashes and compresses parts; one thread more seals and
appends them. So two cores are busy both where compressing takes longest and where it takes nothing.

Invariants:

- Parts are appended in their order, so that whoever reads them in order reads on.
- Bytes on their way are bounded; the source is read by the thread that put it, and by no other.
- When `run` returns or raises, nothing of it runs on.

Imported by `contents`. Knows no grain: packing and appending are arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, NamedTuple, TypeAlias

from blake3 import blake3

from basin.engine.sources import Zeros
from basin.format.layout import MIB

_FLYING_SIZE_MIN: Final = 2 * MIB
"""Bytes a worker may have before it, at least: a part in work and the next one, of 1 MiB each in the mean."""
APPEND_NAME: Final = "basin-append"

Packed: TypeAlias = tuple[bytes, int, bytes]
"""Content key, codec and compressed payload of a part."""
Pack: TypeAlias = Callable[[bytes], Packed]
Append: TypeAlias = Callable[[int, Packed], None]
"""Stores a part of so many bytes, as the next one."""


class _Flying(NamedTuple):
    """A part on its way: its size, what packs it, and what returns when it is appended."""

    size: int
    packed: Future[Packed]
    settle: Callable[[], None]


class Stream:
    """One large content on its way."""

    def __init__(self, pool: ThreadPoolExecutor, worker_count: int, part_size: int, pack: Pack, append: Append) -> None:
        """`pack` is called by several threads at once, `append` by one, which is the caller's if there is one worker:
        then all effects are of one thread, and come in an order that tests can repeat.
        """
        self._pool = pool
        self._workers = worker_count
        self._flying_size_max = worker_count * max(part_size, _FLYING_SIZE_MIN)
        self._pack = pack
        self._append = append
        self._appending = ThreadPoolExecutor(1, thread_name_prefix=APPEND_NAME) if worker_count > 1 else None
        self._flying: deque[_Flying] = deque()
        self._flying_size = 0
        self._zeros: dict[int, tuple[bytes, Future[Packed]]] = {}

    def run(self, parts: Iterable[bytes | Zeros], *, is_sparse: bool) -> bytes:
        """Store all parts; returns the hash of the whole.

        `is_sparse`: most of it are holes, so that hashing zeros is all that takes long, and gets all cores.
        """
        # One thread hashes 5.7 GB a second; with more of them, parts of 1 MiB wait for cores that compress.
        whole = blake3(max_threads=self._workers if is_sparse else 1)
        try:
            for part in parts:
                content, packed = self._packed(part)
                whole.update(content)
                self._begin(len(content), packed)
                while self._flying_size > self._flying_size_max:
                    self._settle_first()
            while self._flying:
                self._settle_first()
        finally:
            self._stop()
        return whole.digest()

    def _packed(self, part: bytes | Zeros) -> tuple[bytes, Future[Packed]]:
        """The bytes of a part, and what packs them; zeros that were not read are packed once."""
        if not isinstance(part, Zeros):
            return part, self._pool.submit(self._pack, part)
        known = self._zeros.get(part.size)
        if known is None:
            content = bytes(part.size)
            known = self._zeros[part.size] = content, self._pool.submit(self._pack, content)
        return known

    def _begin(self, size: int, packed: Future[Packed]) -> None:
        settle: Callable[[], None]
        if self._appending is None:
            settle = partial(self._append_packed, size, packed)
        else:
            settle = self._appending.submit(self._append_packed, size, packed).result
        self._flying.append(_Flying(size, packed, settle))
        self._flying_size += size

    def _append_packed(self, size: int, packed: Future[Packed]) -> None:
        self._append(size, packed.result())

    def _settle_first(self) -> None:
        first = self._flying.popleft()
        first.settle()
        self._flying_size -= first.size

    def _stop(self) -> None:
        """Nothing is on its way when all went well. Else what was not begun is not, and what was is waited for."""
        for one in self._flying:
            one.packed.cancel()
        if self._appending is not None:
            self._appending.shutdown(cancel_futures=True)

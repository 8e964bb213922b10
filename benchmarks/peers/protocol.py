"""What every peer's adapter offers: raw bytes under raw keys. The work Basin adds is `benchmarks.sealing`, not here.

An adapter uses the fastest documented way its library has for each call; whatever it does per pair is inside the
clock, so loops are flat and lookups hoisted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from benchmarks.workload import Pair


class Store(Protocol):
    """One open store."""

    def put_each(self, pairs: Iterable[Pair]) -> None:
        """Put one pair per call of the library; all are durable on return, by one commit."""

    def put_batch(self, pairs: Iterable[Pair]) -> None:
        """Put all pairs by the library's batch call; durable on return."""

    def commit_one(self, key: bytes, value: bytes) -> None:
        """Put one pair; durable on return. Called from several threads at once."""

    def getter(self) -> Callable[[bytes], bytes]:
        """The function that gets the value of a key that is there: the library's own, unwrapped where that can be."""

    def get_many(self, keys: Sequence[bytes]) -> list[bytes]:
        """The values of `keys`, all present, in order, by the library's batch call if it has one."""

    def scan(self) -> Iterator[Pair]:
        """All pairs by ascending key."""

    def close(self) -> None:
        """Release everything."""


class StoreFactory(Protocol):
    """The function `open_store` of every adapter."""

    def __call__(self, folder: Path, *, value_size: int) -> Store:
        """Open the store in an existing folder, creating it if absent."""

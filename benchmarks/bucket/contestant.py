"""What a job asks of a side. Each side implements the contests that it can take part in.

Everything that ends a write is durable in the bucket on return. What is read is returned, and compared by the job
outside the clock. All calls are made by one thread; `commit_each` is what runs concurrently inside.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bucket.workload import Pairs


class Side(abc.ABC):
    """One side, open at one place."""

    @abc.abstractmethod
    def close(self) -> None:
        """Make everything durable, and release it."""


class Names(Side):
    """The contest on an ordered map of names to small values."""

    @abc.abstractmethod
    def put_batch(self, pairs: Pairs) -> None:
        """Store the pairs as one atomic commit."""

    @abc.abstractmethod
    def load(self, batches: Iterable[Pairs]) -> None:
        """Store all batches; they need to be durable only in the end."""

    @abc.abstractmethod
    def commit_each(self, shares: Sequence[Pairs]) -> None:
        """As many concurrent writers as there are shares: each commits its pairs one after the other."""

    @abc.abstractmethod
    def get_each(self, names: Sequence[bytes]) -> list[bytes]:
        """The values of names, by one call a name, one after the other."""

    @abc.abstractmethod
    def scan(self) -> int:
        """Visit every name and value in order; returns how many there are."""


class Blobs(Side):
    """The contest on many small values that are written and read together."""

    @abc.abstractmethod
    def put_values(self, values: Sequence[bytes]) -> Sequence[Any]:
        """Store the values, each to be found by itself; returns what finds them, in their order."""

    @abc.abstractmethod
    def get_values(self, addresses: Sequence[Any], size: int) -> Sequence[bytes]:
        """All these values, in order; `size` is the length of each, which a caller knows."""


class Streams(Side):
    """The contest on one large body."""

    @abc.abstractmethod
    def put_file(self, path: Path) -> Any:
        """Store the file; returns what finds it."""

    @abc.abstractmethod
    def get_whole(self, address: Any, size: int) -> bytes:
        """The body in memory; `size` is its length, which a caller knows."""

    @abc.abstractmethod
    def get_file(self, address: Any, path: Path) -> None:
        """Copy the body into a local file."""

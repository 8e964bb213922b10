"""The log: the one sequence of records that is a basin's history, and the one way to add to it.

`append(cursor, record)` succeeds only if the log still ends at `cursor`; whoever loses follows what others appended and
tries again. Two logs keep that promise: `file_log` by a lock and a watermark, `object_log` by names that must be free.

It knows frames and positions; what a record means is `state`'s business.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

from basin.format.record import Record
from basin.terms import Position

LOG_FOLDER: Final = "log"
CHECKPOINT_FOLDER: Final = "checkpoint"
RESERVE_NAME: Final = "log/reserve"


class Cursor(NamedTuple):
    """A place between two records, behind the one at `position`: byte `offset` of `segment`, where there are any."""

    segment: int
    offset: int
    position: Position


class Entry(NamedTuple):
    """One stored record: its hash, where it ends, and its size as stored."""

    position: Position
    record: Record
    hash: bytes
    end: Cursor
    size: int


START: Final = Cursor(0, 0, 0)
"""Before the first record."""
SKIPPED: Final = Record(0, 0, bytes(32), 0)
"""Stands for a record that nobody asked for."""


class Log(abc.ABC):
    """Reads and appends the records of one basin. One thread at a time."""

    looks_first: bool
    """Whether whoever appends follows the log before the first attempt: where looking is cheap and nobody can come in
    between. Else the attempt itself finds out."""

    @abc.abstractmethod
    def prepare(self, *, writable: bool) -> None:
        """Before the log is read from its beginning or a checkpoint."""

    @abc.abstractmethod
    def follow(self, cursor: Cursor, *, names_from: Position = 0, at_least: Position = 0) -> Iterator[Entry]:
        """The records behind `cursor`, oldest first; one small read if there are none.

        Raises `CorruptionError` for rot, naming object and offset. Records up to `names_from` are of no interest to the
        caller; they may be passed over without decrypting them. Records up to `at_least` are known to be durable.
        """

    @abc.abstractmethod
    def cursor_before(self, position: Position) -> Cursor:
        """A cursor from which following reaches every record behind `position`, and perhaps some before it."""

    @abc.abstractmethod
    def keeps(self, cursor: Cursor) -> bool:
        """Whether the records behind `cursor` are still stored: else a checkpoint has to be read."""

    @abc.abstractmethod
    def oldest(self) -> tuple[Cursor, bytes] | None:
        """Where the records that are still stored begin, and the hash that the first of them follows."""

    @abc.abstractmethod
    def hash_at(self, position: Position) -> bytes | None:
        """The hash of the record at `position`; None if it is not stored (any more)."""

    @abc.abstractmethod
    def name_of(self, cursor: Cursor) -> str:
        """The file or object that holds the record before `cursor`."""

    @abc.abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Keep others from appending meanwhile, where that is possible: `append` finds out all the same.

        Raises `StorageUnavailable` after the time limit.
        """

    @abc.abstractmethod
    def append(self, cursor: Cursor, frame: bytes, previous_hash: bytes, *, sync: bool = True) -> Cursor | None:
        """Append one frame behind `cursor`, durably; None if the log does not end there (follow it, then try again).

        Only inside `exclusive`. After any error nothing is acknowledged; `CommitUnknown`: it may be in the log.
        """

    @abc.abstractmethod
    def settle(self) -> None:
        """Make records durable that were appended without a sync. Only inside `exclusive`."""

    @abc.abstractmethod
    def remove_through(self, position: Position, cursor: Cursor, *, checkpoint: Position, generation: int) -> int:
        """Let go of records up to `position`, where that frees space; never of those behind `cursor`.

        The checkpoint at `checkpoint`, and a newer one, hold them. Returns how many objects or files went.
        """

    @abc.abstractmethod
    def position_within(self, size_max: int) -> Position:
        """The lowest position whose record and all later ones fit into `size_max` bytes; 0: all, or not known."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Numbers for `stats`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release files and locks."""

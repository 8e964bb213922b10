"""The storage port: every effect that Basin has on a disk goes through these two small classes and `Storage`.

Invariants that every implementation keeps (`basin.testing.conformance` checks them):

- Names are relative, with `/` between folder and file; made of lower-case letters, digits, `.`, `-`, one `/` at a
  time.
- `append` writes all bytes or raises; a short read is an error; foreign exceptions become `basin.errors.StorageError`s.
- Nothing is durable before `sync` (file contents) and `sync_folder` (the directory entry) have returned.
- Nothing is overwritten, but the few bytes of a lock file.

It moves named bytes and knows no grain. Only `basin.errors` may be imported here.
"""

from __future__ import annotations

import abc
import itertools
import os
from types import TracebackType
from typing import Final, Self, TypeAlias

from basin.errors import ObjectMissing

TEMPORARY_FOLDER: Final = "tmp"
_temporary_numbers = itertools.count()
_Names: TypeAlias = list[str]  # In the class below, `list` is a method.


class ReadFile(abc.ABC):
    """An open file for reading at any offset. Safe for several threads."""

    name: str

    @abc.abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`; raise `TruncatedStratum` if the file ends before."""

    @abc.abstractmethod
    def size(self) -> int:
        """The file's length in bytes now (another process may be appending)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the handle. Closing twice is harmless."""


class AppendFile(abc.ABC):
    """A file being written at its end by one writer. `offset` is where the next byte goes."""

    name: str
    offset: int

    @abc.abstractmethod
    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`, or raise `StorageError`; after a failure use the file no more."""

    @abc.abstractmethod
    def sync(self) -> None:
        """Make what was appended durable (fdatasync). After a failure use the file no more (ATC'20, fsync failures)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the handle without syncing. Closing twice is harmless."""


class LockFile(abc.ABC):
    """A file that is locked, and that holds a few bytes which only the holder writes."""

    name: str

    @abc.abstractmethod
    def acquire(self, timeout_s: float) -> None:
        """Take the lock, exclusive among processes and threads; raise `StorageUnavailable` after `timeout_s`.

        With `timeout_s` 0 one attempt is made.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """Give the lock back."""

    @abc.abstractmethod
    def read(self) -> bytes:
        """The file's bytes (at most 4,096). Needs no lock; a reader checks its own checksum."""

    @abc.abstractmethod
    def write(self, data: bytes) -> None:
        """Overwrite the first `len(data)` bytes, not synced. Only the holder may call it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the lock, if held, and the handle."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Storage(abc.ABC):
    """A tree of named files. Folders come into being with their first file."""

    url: str

    @abc.abstractmethod
    def create(self, name: str) -> AppendFile:
        """Create a file that must be new, for appending; raise `AlreadyExists`. Its entry is not durable yet."""

    @abc.abstractmethod
    def append_to(self, name: str, offset: int) -> AppendFile:
        """Open a file for appending; raise `ObjectMissing`, and `StorageError` unless its size is `offset`."""

    @abc.abstractmethod
    def open(self, name: str) -> ReadFile:
        """Open a file for reading; raise `ObjectMissing`."""

    @abc.abstractmethod
    def link(self, source: str, target: str) -> None:
        """Give `source` the second name `target`, in one atomic step; raise `AlreadyExists` if taken."""

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Remove a name; a missing one is not an error. Open handles go on reading."""

    @abc.abstractmethod
    def sync_folder(self, folder: str) -> None:
        """Make the folder's entries durable, and the folder's own entry in its parent. `""` is the root."""

    @abc.abstractmethod
    def list(self, folder: str) -> _Names:
        """The names of the files directly in `folder`, without it, sorted; empty if there is no such folder."""

    @abc.abstractmethod
    def list_folders(self, folder: str) -> _Names:
        """The names of the folders directly in `folder`, sorted; empty if there is no such folder."""

    @abc.abstractmethod
    def reserve(self, name: str, size: int) -> None:
        """Create a file of `size` allocated bytes, to be deleted when the disk is full, unless it exists."""

    @abc.abstractmethod
    def lock(self, name: str) -> LockFile:
        """Open (creating it if absent) a lock file. Does not take the lock."""

    @abc.abstractmethod
    def boot_id(self) -> bytes:
        """16 bytes that change whenever unsynced writes may have been lost (the machine's boot id)."""

    @abc.abstractmethod
    def writable(self) -> bool:
        """Whether files can be created here."""

    def read_file(self, name: str, size_max: int) -> bytes:
        """All bytes of a small file, at most `size_max`: the caller checks lengths. Raise `ObjectMissing`."""
        file = self.open(name)
        try:
            return file.read(0, min(file.size(), size_max))
        finally:
            file.close()

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        try:
            self.open(name).close()
        except ObjectMissing:
            return False
        return True

    def put_if_absent(self, name: str, data: bytes) -> None:
        """Store a whole file, durably, under a name that must be free; raise `AlreadyExists`.

        Written under a temporary name, synced, linked (which fails if the name is taken), folder synced: at no
        moment is a part of the file visible under `name`. A crash may leave the temporary name behind.
        """
        temporary = f"{TEMPORARY_FOLDER}/{os.getpid():x}-{next(_temporary_numbers):x}-{os.urandom(8).hex()}"
        file = self.create(temporary)
        try:
            file.append(data)
            file.sync()
            file.close()
            self.link(temporary, name)
        finally:
            file.close()
            self.delete(temporary)
        self.sync_folder(name.rpartition("/")[0])

    @abc.abstractmethod
    def close(self) -> None:
        """Release every handle this storage opened."""

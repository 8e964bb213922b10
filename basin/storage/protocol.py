"""The storage port: every effect that Basin has on a disk goes through these two small classes and `Storage`.

Invariants that every implementation keeps (`basin.testing.conformance` checks them):

- Names are relative, with `/` between folder and file; made of lower-case letters, digits, `.`, `-`, one `/` at a
  time.
- `append` writes all bytes or raises; a short read is an error; foreign exceptions become `basin.errors.StorageError`s.
- Nothing is durable before `sync` (file contents) and `sync_folder` (the directory entry) have returned.
- Nothing is overwritten, but the few bytes of a lock file.

Two kinds of storage differ where a bucket differs from a disk: `objects` is None, and files grow, are locked and
linked; or it is the object store below, and a file is an object: nobody sees it before it is finished and synced, and
then it is whole. A method that only one of them has says so.

It moves named bytes and knows no grain. Imports `basin.errors` and the object port.
"""

from __future__ import annotations

import abc
import itertools
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeAlias

from basin.errors import BasinError, InvalidArgument, ObjectMissing
from basin.storage.objects import READABLE, ByteRange, ObjectStore, Readiness

TEMPORARY_FOLDER: Final = "tmp"
_temporary_numbers = itertools.count()
_Names: TypeAlias = list[str]  # In the class below, `list` is a method.
_Bodies: TypeAlias = list[bytes | BasinError]


class Extent(NamedTuple):
    """What is known of a finished file: its length, and how many bytes at its end are an index, at most; and how many
    at the end of those are the directory that leads into it, about.
    """

    name: str
    size: int
    index_size: int = 0
    directory_size: int = 0


class ReadFile(abc.ABC):
    """An open file for reading at any offset. Safe for several threads."""

    name: str

    @abc.abstractmethod
    def read(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes from `offset`; raise `TruncatedStratum` if the file ends before."""

    def read_again(self, offset: int, size: int) -> bytes | None:
        """What `read` would give, from no cache: after bytes that were not what was written.

        None where that makes no difference: a disk gives the same bytes again, and a network may not.
        """
        return None

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

    def finish(self) -> None:
        """Say that no more is appended: a storage that sends files elsewhere begins to. `sync` waits for it."""
        return

    def is_sent(self) -> bool:
        """After `finish`: whether `sync` would return, or fail, at once."""
        return True

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
    objects: ObjectStore | None = None
    """The object store below, where files are objects; reads are repeated as its policy says, `put_new` is not."""

    @abc.abstractmethod
    def create(self, name: str) -> AppendFile:
        """Create a file that must be new, for appending; raise `AlreadyExists`. Its entry is not durable yet."""

    @abc.abstractmethod
    def append_to(self, name: str, offset: int) -> AppendFile:
        """Open a file for appending; raise `ObjectMissing`, and `StorageError` unless its size is `offset`.

        Not where files are objects.
        """

    @abc.abstractmethod
    def open(self, name: str) -> ReadFile:
        """Open a file for reading; raise `ObjectMissing`."""

    def open_known(self, extent: Extent) -> ReadFile:
        """`open` of a finished file of which a record says how long it is: a bucket need not be asked."""
        return self.open(extent.name)

    def read_ranges(self, wanted: Sequence[ByteRange]) -> _Bodies:
        """Bytes of many files, in the order of `wanted`; an error stands in the place of its range.

        Where a file ends before, there are fewer: the caller compares. A bucket is asked for all of them at once, and
        for neighbours together.
        """
        found: _Bodies = []
        for name, start, stop in wanted:
            try:
                file = self.open(name)
                try:
                    end = file.size()
                    found.append(file.read(start, max(0, (end if stop is None else min(stop, end)) - start)))
                finally:
                    file.close()
            except BasinError as error:
                found.append(error)
        return found

    def prefetch(self, extents: Sequence[Extent]) -> None:
        """Hint that the indexes at the ends of these files are read next: where each costs a wait, get all at once."""
        return

    @abc.abstractmethod
    def link(self, source: str, target: str) -> None:
        """Give `source` the second name `target`, in one atomic step; raise `AlreadyExists` if taken.

        Not where files are objects.
        """

    @abc.abstractmethod
    def delete(self, name: str) -> None:
        """Remove a name; a missing one is not an error. Open handles go on reading."""

    def delete_many(self, names: Sequence[str]) -> None:
        """`delete` for many; a bucket is asked once for a thousand."""
        for name in names:
            self.delete(name)

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
        """Open (creating it if absent) a lock file. Does not take the lock. Not where files are objects."""

    @abc.abstractmethod
    def boot_id(self) -> bytes:
        """16 bytes that change whenever unsynced writes may have been lost (the machine's boot id)."""

    def require_create_only(self) -> None:
        """Raise `StorageError` if `put_if_absent` could let several writers through. A bucket is tried, once."""
        return

    def requests(self) -> dict[str, int]:
        """How often a bucket was asked for what since this object was made, and bytes; empty for a disk."""
        return {}

    def readiness(self, name: str) -> Readiness:
        """Whether a file can be read now, or lies in an archive of a bucket. One request there; nothing else is."""
        return READABLE

    def restore(self, name: str, *, days: int, tier: str) -> None:
        """Ask a bucket to make an archived file readable for `days`; see `ObjectStore.restore`."""
        raise InvalidArgument(f"restore {name!r}: nothing has to be restored here", object=name)

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

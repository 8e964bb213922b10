"""The open files of `LocalStorage`: for reading, for appending, and lock files.

- Whoever failed once to append or sync a file gets an error from every later use of that handle: the kernel may have
  marked the lost pages clean, and a second sync would then report a success that did not happen.
- A handle that is closed, or was abandoned in a forked child, raises `BasinClosed`; abandoning unlocks nothing.
- `read`, `append`, `acquire`, `release` are on the hot path: one system call and one comparison each.

Imports the port and the table of errors; made by `basin.storage.local` alone.
"""

# The methods' contracts are the port's.

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import sys
import threading
import time
from typing import Final, TypeAlias

from basin.errors import BasinClosed, BasinError, StorageError, StorageUnavailable, TruncatedStratum
from basin.storage.protocol import AppendFile, LockFile, ReadFile
from basin.storage.translation import translated

LOCK_FILE_SIZE_MAX: Final = 4096
_BEGUN_SIZE: Final = 4 << 20
"""After so many bytes the system is told to begin writing them: a sync then waits for the rest alone."""

# A holder keeps the log's lock for about one fdatasync (80 to 100 microseconds): look again after half of that, and
# ever more slowly, so that a long wait costs no processor time and still ends within 5 ms of the release.
_POLL_FIRST_S: Final = 0.000_05
_POLL_LAST_S: Final = 0.005


class Descriptor(int):
    """A file descriptor that closes itself when nobody uses it any more.

    It is counted by reference: a thread inside `os.pread(descriptor, …)` holds one, so that a `close` in another thread
    cannot hand the same number to a new file under its feet. An int itself, because that costs the read path nothing.
    """

    closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):  # What mattered was synced before: a failing close has no news.
                os.close(self)

    __del__ = close


# Stands for "none": valid for nobody, so that every use fails with EBADF. (For -1 some calls raise ValueError.)
NO_DESCRIPTOR: Final = Descriptor(2**31 - 1)
NO_DESCRIPTOR.closed = True


class LocalReadFile(ReadFile):
    """Holds one descriptor. `read` is on the path of every grain: one `pread` and one comparison."""

    def __init__(self, name: str, path: str, descriptor: Descriptor) -> None:
        self.name = name
        self._path = path
        self._descriptor = descriptor

    def read(self, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise _failed(error, "read", self.name, self._path, self._descriptor) from error
        return data if len(data) == size else self._read_rest(offset, size, data)

    def _read_rest(self, offset: int, size: int, data: bytes) -> bytes:
        """Go on after a short read: one call returns at most 2 GiB, and a network mount may return less."""
        parts = [data]
        have = len(data)
        while have < size and parts[-1]:
            try:
                parts.append(os.pread(self._descriptor, size - have, offset + have))
            except OSError as error:
                raise _failed(error, "read", self.name, self._path, self._descriptor) from error
            have += len(parts[-1])
        if have < size:
            raise TruncatedStratum(
                f"read {self._path!r}: the file ends at {offset + have}, {size} bytes were expected at {offset}",
                object=self.name,
                offset=offset,
            )
        return b"".join(parts)

    def size(self) -> int:
        try:
            return os.fstat(self._descriptor).st_size
        except OSError as error:
            raise _failed(error, "size", self.name, self._path, self._descriptor) from error

    def close(self) -> None:
        self._descriptor = NO_DESCRIPTOR

    def abandon(self) -> None:
        self._descriptor.close()
        self._descriptor = NO_DESCRIPTOR


class LocalAppendFile(AppendFile):
    """One descriptor opened O_APPEND. After a failure the descriptor is gone and every call says why."""

    def __init__(self, name: str, path: str, descriptor: Descriptor, offset: int) -> None:
        self.name = name
        self.offset = offset
        self._begun = offset
        self._path = path
        self._descriptor = descriptor
        self._failure: BasinError | None = None

    def append(self, data: bytes | bytearray | memoryview) -> None:
        try:
            written = os.write(self._descriptor, data)
            self.offset += written
            if written != len(data):
                self._append_rest(memoryview(data).cast("B")[written:])
        except OSError as error:
            raise self._fail(error, "append") from error
        if self.offset - self._begun >= _BEGUN_SIZE:
            start, self._begun = self._begun, self.offset
            begin_writing(self._descriptor, start, self.offset - start)

    def _append_rest(self, rest: memoryview) -> None:
        """Go on after a short write: the next attempt writes the rest or raises what stopped the first."""
        while rest:
            written = os.write(self._descriptor, rest)
            self.offset += written
            rest = rest[written:]

    def sync(self) -> None:
        try:
            sync_data(self._descriptor)
        except OSError as error:
            raise self._fail(error, "sync") from error

    def _fail(self, error: OSError, operation: str) -> BasinError:
        if self._failure is not None:
            return StorageError(
                f"{operation} {self._path!r}: an earlier write or sync of this file failed: {self._failure}",
                object=self.name,
                operation=operation,
                errno=self._failure.fields["errno"],
            )
        failure = _failed(error, operation, self.name, self._path, self._descriptor)
        if not isinstance(failure, BasinClosed):
            self._failure = failure
            self._descriptor = NO_DESCRIPTOR
        return failure

    def close(self) -> None:
        self._descriptor = NO_DESCRIPTOR

    def abandon(self) -> None:
        self._descriptor.close()
        self._descriptor = NO_DESCRIPTOR


class LocalLockFile(LockFile):
    """`flock` among open files (and so among processes), a mutex among the threads that share this object.

    Never `lockf`: its locks belong to the process, are not inherited as one expects, and vanish as soon as any other
    descriptor of the same file is closed.
    """

    def __init__(self, name: str, path: str, descriptor: Descriptor) -> None:
        self.name = name
        self._path = path
        self._descriptor = descriptor
        self._mutex = threading.Lock()
        self._held = False

    def acquire(self, timeout_s: float) -> None:
        deadline = 0.0
        if not self._mutex.acquire(blocking=False):
            deadline = time.monotonic() + timeout_s
            if timeout_s <= 0 or not self._mutex.acquire(timeout=timeout_s):
                raise self._busy(timeout_s)
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._poll(deadline or time.monotonic() + timeout_s, timeout_s)
            self._held = True
        except OSError as error:
            self._mutex.release()
            raise _failed(error, "lock", self.name, self._path, self._descriptor) from error
        except BaseException:
            self._mutex.release()
            raise

    def _poll(self, deadline: float, timeout_s: float) -> None:
        pause = _POLL_FIRST_S
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._busy(timeout_s)
            time.sleep(min(pause, remaining))
            pause = min(pause * 1.5, _POLL_LAST_S)
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue

    def _busy(self, timeout_s: float) -> StorageUnavailable:
        return StorageUnavailable(
            f"lock {self._path!r}: another writer held it for {timeout_s:g} s: try again later",
            object=self.name,
            operation="lock",
            errno=errno.EAGAIN,
        )

    def release(self) -> None:
        if not self._held:
            return
        self._held = False
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        except OSError as error:
            raise _failed(error, "unlock", self.name, self._path, self._descriptor) from error
        finally:
            self._mutex.release()

    def read(self) -> bytes:
        try:
            return os.pread(self._descriptor, LOCK_FILE_SIZE_MAX, 0)
        except OSError as error:
            raise _failed(error, "read", self.name, self._path, self._descriptor) from error

    def write(self, data: bytes) -> None:
        try:
            written = os.pwrite(self._descriptor, data, 0)
            while written < len(data):
                written += os.pwrite(self._descriptor, data[written:], written)
        except OSError as error:
            if error.errno == errno.EBADF and not self._descriptor.closed:
                error = OSError(errno.EROFS, os.strerror(errno.EROFS))  # It was opened for reading only.
            raise _failed(error, "write", self.name, self._path, self._descriptor) from error

    def close(self) -> None:
        # Unlocked on purpose, not by closing: a child forked this moment may hold the same open file for a while.
        self.release()
        self._descriptor = NO_DESCRIPTOR

    def abandon(self) -> None:
        self._descriptor.close()
        self._descriptor = NO_DESCRIPTOR
        self._held = False
        self._mutex = threading.Lock()  # The old one may be held for ever by a thread that does not exist here.


LocalFile: TypeAlias = LocalReadFile | LocalAppendFile | LocalLockFile


def _failed(error: OSError, operation: str, name: str, path: str, descriptor: Descriptor) -> BasinError:
    """Like `translated`, but tells the use of a closed handle from a fault of the disk."""
    if descriptor.closed:
        return BasinClosed(f"{operation} {path!r}: the file is closed, or was opened before a fork", object=name)
    return translated(error, operation, name, path)


if sys.platform == "darwin":

    def sync_data(descriptor: int) -> None:
        """Make a file's bytes durable. fsync would only reach the drive's cache there."""
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)

    sync_entries = sync_data  # the same, for a folder

    def allocate(descriptor: int, size: int) -> None:
        """Take `size` bytes of the disk for an empty file."""
        zeros = bytes(1 << 16)
        while size > 0:
            size -= os.write(descriptor, zeros[:size])

    def begin_writing(_descriptor: int, _offset: int, _size: int) -> None:
        """There is no call for it."""

else:
    sync_data = os.fdatasync
    sync_entries = os.fsync

    def allocate(descriptor: int, size: int) -> None:
        """Take `size` bytes of the disk for an empty file."""
        os.posix_fallocate(descriptor, 0, size)

    def begin_writing(descriptor: int, offset: int, size: int) -> None:
        """Have the system begin to write some bytes of a file to the disk. A hint: nothing is waited for, or promised.

        What fails then is told by the next sync.
        """
        if _sync_file_range is not None:
            _sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _SYNC_FILE_RANGE_WRITE)

    _sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)
    _SYNC_FILE_RANGE_WRITE: Final = 2

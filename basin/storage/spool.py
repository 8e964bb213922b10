"""`Spool`: where files of a bucket grow on a local disk until they are finished.

Invariants:

- What is spooled is what will be stored, byte for byte: in an encrypted basin it is encrypted here as well.
- A spool belongs to one storage of one process, which holds a lock in it. It goes with its owner; what a process that
  died left behind goes with the next spool that is made in the same folder. Nothing in it was ever acknowledged.
- A file is read through its descriptor, which outlives its name.
- A forked child neither writes to the files that it inherited nor deletes them: they are the parent's.

Imports `basin.errors` and its neighbours. Not for files that others read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from basin.errors import BasinClosed, OutOfSpace, StorageError
from basin.storage.local_files import NO_DESCRIPTOR, Descriptor
from basin.storage.translation import translated

_PREFIX: Final = "basin-spool-"
_LOCK: Final = "lock"


class SpoolFile:
    """One growing file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._owner = os.getpid()
        try:
            self._descriptor = Descriptor(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise _spool_error(error, path) from error

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at the end, or raise `StorageError`; `BasinClosed` if it was removed or inherited."""
        if self._descriptor.closed or os.getpid() != self._owner:
            raise BasinClosed(f"{self.path} was closed, or opened before a fork", object=str(self.path))
        view = memoryview(data).cast("B")
        try:
            while view:
                written = os.write(self._descriptor, view)
                self.size += written
                view = view[written:]
        except OSError as error:
            raise _spool_error(error, self.path) from error

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes from `offset`: fewer at the end. Safe for threads."""
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            raise _spool_error(error, self.path) from error

    def remove(self) -> None:
        """Delete the file. Removing twice is harmless. In a forked child only the child's descriptor goes."""
        if self._descriptor.closed:
            return
        # Only this reference goes: a thread that is reading has one of its own, and the number is not used again.
        self._descriptor = NO_DESCRIPTOR
        if os.getpid() == self._owner:
            with contextlib.suppress(OSError):
                self.path.unlink()


class Spool:
    """A folder of its own below `folder`, or below the system's folder for temporary files."""

    def __init__(self, folder: Path | None) -> None:
        parent = Path(folder if folder is not None else tempfile.gettempdir())
        try:
            parent.mkdir(parents=True, exist_ok=True)
            _sweep(parent)
            self._path, lock = _make_folder(parent)
        except OSError as error:
            raise _spool_error(error, parent) from error
        self._lock: int | None = lock
        self._count = 0
        self._owner = os.getpid()

    def create(self) -> SpoolFile:
        """A new empty file. Not safe for threads: its owner holds a lock."""
        self._count += 1
        return SpoolFile(self._path / f"{self._count:x}")

    def close(self) -> None:
        """Delete everything. In a forked child it does nothing: the files are the parent's."""
        if self._lock is not None and os.getpid() == self._owner:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _make_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock.

    Somebody who sweeps may come between the lock's file and the lock, and takes the folder for left behind.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = _locked(path / _LOCK)
        if lock is None:
            continue  # He has the lock, and is about to delete the folder.
        if (path / _LOCK).exists():
            return path, lock
        os.close(lock)  # He has deleted it, and ours is the lock of a file without a name.


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock file's lock, for as long as it is open; None if somebody else does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return None
    return descriptor


def _sweep(parent: Path) -> None:
    """Remove what processes that died left behind: spools whose lock nobody holds. One just being made has none yet."""
    for path in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if not (path / _LOCK).exists() or path.stat().st_uid != os.geteuid():
                continue
            lock = _locked(path / _LOCK)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _spool_error(error: OSError, path: Path) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutOfSpace(
            f"{path}: the disk with the spool is full: free some space, or set spool_folder",
            object=str(path),
            operation="spool",
        )
    found = translated(error, "spool", str(path), str(path))
    if isinstance(found, StorageError):
        return found
    return StorageError(f"the spool cannot be written: {found.message}", object=str(path), operation="spool")

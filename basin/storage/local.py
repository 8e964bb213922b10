"""`LocalStorage`: the storage port on a POSIX file system.

Invariants:

- Files are created O_EXCL with mode 0600, folders with 0700, whatever the umask; nothing is ever truncated or renamed.
- Files are appended through O_APPEND, so that not even a stale handle overwrites what another process wrote.
- Whoever failed once to append or sync a file gets an error from every later use of that handle: the kernel may have
  marked the lost pages clean, and a second sync would then report a success that did not happen.
- An `OSError` leaves this module only through `translated`, the one table of typed errors.
- A forked child closes every inherited descriptor and unlocks nothing; afterwards its handles raise `BasinClosed`.

Network file systems are neither detected nor supported: NFS repeats a `link` whose reply was lost, and reports
`AlreadyExists` about its own success.

Imports `basin.errors` and its neighbours in `basin.storage`.
"""

# The methods' contracts are the port's (D102); descriptors and exact modes are the subject here, not paths (PTH).
# ruff: noqa: D102, PTH100, PTH101, PTH102, PTH103, PTH108, PTH120, PTH123

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
import threading
import time
import uuid
import weakref
from pathlib import Path
from typing import Final, TypeAlias

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    BasinError,
    ObjectMissing,
    OutOfSpace,
    ReadOnly,
    StorageError,
    StorageUnavailable,
    TruncatedStratum,
)
from basin.storage.naming import checked_folder, checked_name, folders_above, is_name, parent_of
from basin.storage.protocol import AppendFile, LockFile, ReadFile, Storage

LOCK_FILE_SIZE_MAX: Final = 4096

_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700

# O_NOFOLLOW: a symlink planted in the folder leads nowhere. O_NONBLOCK: opening a planted FIFO does not hang.
_SAFE: Final = os.O_CLOEXEC | os.O_NOFOLLOW
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | _SAFE
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | _SAFE
_APPEND: Final = os.O_WRONLY | os.O_APPEND | _SAFE
_LOCK: Final = os.O_RDWR | os.O_CREAT | _SAFE
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

# A holder keeps the log's lock for about one fdatasync (80 to 100 microseconds): look again after half of that, and
# ever more slowly, so that a long wait costs no processor time and still ends within 5 ms of the release.
_POLL_FIRST_S: Final = 0.000_05
_POLL_LAST_S: Final = 0.005

_Names: TypeAlias = list[str]  # In the class below, `list` is a method.

_READING: Final = frozenset({"open", "read", "size", "list", "list_folders", "exists", "boot_id"})

_ERRORS: Final[dict[int, tuple[type[BasinError], str]]] = {
    errno.ENOENT: (ObjectMissing, "there is no such file"),
    errno.ENOTDIR: (ObjectMissing, "a part of the path is not a folder"),
    errno.EEXIST: (AlreadyExists, "the file exists already"),
    errno.ENOSPC: (OutOfSpace, "the disk is full: free some space, then reopen the basin"),
    errno.EDQUOT: (OutOfSpace, "the quota is used up: free some space, then reopen the basin"),
    errno.EROFS: (ReadOnly, "the file system is mounted read-only"),
    errno.EACCES: (ReadOnly, "permission denied: check the owner and mode of the folder"),
    errno.EPERM: (ReadOnly, "operation not permitted: check the owner and flags of the folder"),
    errno.ETIMEDOUT: (StorageUnavailable, "the storage did not answer in time: try again later"),
    errno.EAGAIN: (StorageUnavailable, "the storage is busy: try again later"),
    errno.EMFILE: (StorageError, "too many open files in this process: raise the limit (ulimit -n)"),
    errno.ENFILE: (StorageError, "too many open files in the whole system: raise its limit (fs.file-max)"),
    errno.ELOOP: (StorageError, "a symbolic link stands where a file should be"),
    errno.ENOLCK: (StorageError, "this file system cannot lock files"),
    errno.EIO: (StorageError, "input/output error: check the disk, then reopen the basin"),
}


def translated(error: OSError, operation: str, name: str, path: str = "") -> BasinError:
    """The typed error for `error`, to be raised `from` it.

    `operation` is the port's word for what was done (`"append"`), `name` the object it was done to, `path` where it is.
    """
    number = error.errno or 0
    kind, text = _ERRORS.get(number, (StorageError, error.strerror or str(error)))
    if kind is ReadOnly and operation in _READING:
        kind, text = StorageError, "permission denied: this user may not read it"
    if number in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK) and operation == "link":
        kind, text = StorageError, "this file system cannot give a file a second name (no hard links)"
    return kind(f"{operation} {path or name!r}: {text}", object=name, operation=operation, errno=number)


class _Descriptor(int):
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
_NONE: Final = _Descriptor(2**31 - 1)
_NONE.closed = True


class _LocalReadFile(ReadFile):
    """Holds one descriptor. `read` is on the path of every grain: one `pread` and one comparison."""

    def __init__(self, name: str, path: str, descriptor: _Descriptor) -> None:
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
        self._descriptor = _NONE

    def _abandon(self) -> None:
        self._descriptor.close()
        self._descriptor = _NONE


class _LocalAppendFile(AppendFile):
    """One descriptor opened O_APPEND. After a failure the descriptor is gone and every call says why."""

    def __init__(self, name: str, path: str, descriptor: _Descriptor, offset: int) -> None:
        self.name = name
        self.offset = offset
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

    def _append_rest(self, rest: memoryview) -> None:
        """Go on after a short write: the next attempt writes the rest or raises what stopped the first."""
        while rest:
            written = os.write(self._descriptor, rest)
            self.offset += written
            rest = rest[written:]

    def sync(self) -> None:
        try:
            _sync_data(self._descriptor)
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
            self._descriptor = _NONE
        return failure

    def close(self) -> None:
        self._descriptor = _NONE

    def _abandon(self) -> None:
        self._descriptor.close()
        self._descriptor = _NONE


class _LocalLockFile(LockFile):
    """`flock` among open files (and so among processes), a mutex among the threads that share this object.

    Never `lockf`: its locks belong to the process, are not inherited as one expects, and vanish as soon as any other
    descriptor of the same file is closed.
    """

    def __init__(self, name: str, path: str, descriptor: _Descriptor) -> None:
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
        self._descriptor = _NONE

    def _abandon(self) -> None:
        self._descriptor.close()
        self._descriptor = _NONE
        self._held = False
        self._mutex = threading.Lock()  # The old one may be held for ever by a thread that does not exist here.


_LocalFile: TypeAlias = _LocalReadFile | _LocalAppendFile | _LocalLockFile


def _failed(error: OSError, operation: str, name: str, path: str, descriptor: _Descriptor) -> BasinError:
    """Like `translated`, but tells the use of a closed handle from a fault of the disk."""
    if descriptor.closed:
        return BasinClosed(f"{operation} {path!r}: the file is closed, or was opened before a fork", object=name)
    return translated(error, operation, name, path)


if sys.platform == "darwin":

    def _sync_data(descriptor: int) -> None:
        # fsync there reaches the drive but not its medium.
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)

    _sync_entries = _sync_data

    def _allocate(descriptor: int, size: int) -> None:
        zeros = bytes(1 << 16)
        while size > 0:
            size -= os.write(descriptor, zeros[:size])

else:
    _sync_data = os.fdatasync
    _sync_entries = os.fsync

    def _allocate(descriptor: int, size: int) -> None:
        os.posix_fallocate(descriptor, 0, size)


_process_boot_id: Final = os.urandom(16)


def _read_boot_id() -> bytes:
    """The kernel's boot id; where there is none (not Linux), 16 random bytes for this process.

    The latter is safe and slow: each process treats the files as if the machine had been restarted in between.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return uuid.UUID(file.read().strip()).bytes
    except (OSError, ValueError):
        return _process_boot_id


class LocalStorage(Storage):
    """The files below one folder of a local POSIX file system. Safe for several threads.

    `path` is resolved once: a later change of the working folder does not matter. With `create` the folder (and what
    leads to it) is made; without, `ObjectMissing` is raised if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str], create: bool = False) -> None:  # noqa: FBT001, FBT002 (one flag)
        self._root = os.path.abspath(os.fspath(path))
        self.url = Path(self._root).as_uri()
        self._closed = False
        self._mutex = threading.Lock()
        self._files: weakref.WeakSet[_LocalFile] = weakref.WeakSet()
        self._durable_folders: set[str] = set()
        try:
            if create:
                os.makedirs(self._root, mode=_FOLDER_MODE, exist_ok=True)
            os.close(os.open(self._root, _FOLDER))
        except FileExistsError as error:
            raise translated(OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), "open", "", self._root) from error
        except OSError as error:
            raise translated(error, "create" if create else "open", "", self._root) from error
        _storages.add(self)

    def __repr__(self) -> str:
        return f"LocalStorage({self._root!r})"

    def _path(self, name: str) -> str:
        self._require_open(name)
        return f"{self._root}/{checked_name(name)}"

    def _folder_path(self, folder: str) -> str:
        self._require_open(folder)
        return f"{self._root}/{folder}" if checked_folder(folder) else self._root

    def _require_open(self, name: str) -> None:
        if self._closed:
            raise BasinClosed(f"the storage at {self._root!r} is closed, or was opened before a fork", object=name)

    def _keep(self, file: _LocalFile) -> None:
        with self._mutex:
            self._files.add(file)

    def _open_making_folders(self, name: str, path: str, flags: int) -> _Descriptor:
        """Open a file that may be new, with the folders it needs. Raises bare `OSError`."""
        try:
            descriptor = _Descriptor(os.open(path, flags, _FILE_MODE))
        except FileNotFoundError:
            self._make_folders(name)
            descriptor = _Descriptor(os.open(path, flags, _FILE_MODE))
        return descriptor

    def _make_folders(self, name: str) -> None:
        """Make the folders that lead to `name`. Raises bare `OSError`."""
        for folder in folders_above(name):
            path = f"{self._root}/{folder}"
            try:
                os.mkdir(path, _FOLDER_MODE)
            except FileExistsError:
                continue
            os.chmod(path, _FOLDER_MODE)  # The umask may have taken bits away.

    def create(self, name: str) -> AppendFile:
        path = self._path(name)
        try:
            descriptor = self._open_making_folders(name, path, _CREATE)
            os.fchmod(descriptor, _FILE_MODE)
        except OSError as error:
            raise translated(error, "create", name, path) from error
        file = _LocalAppendFile(name, path, descriptor, 0)
        self._keep(file)
        return file

    def append_to(self, name: str, offset: int) -> AppendFile:
        path = self._path(name)
        try:
            descriptor = _Descriptor(os.open(path, _APPEND))
            size = os.fstat(descriptor).st_size
        except OSError as error:
            raise translated(error, "append_to", name, path) from error
        if size != offset:
            raise StorageError(
                f"append_to {path!r}: the file has {size} bytes, not {offset}",
                object=name,
                operation="append_to",
                size=size,
            )
        file = _LocalAppendFile(name, path, descriptor, offset)
        self._keep(file)
        return file

    def open(self, name: str) -> ReadFile:
        path = self._path(name)
        try:
            file = _LocalReadFile(name, path, _Descriptor(os.open(path, _READ)))
        except OSError as error:
            raise translated(error, "open", name, path) from error
        self._keep(file)
        return file

    def exists(self, name: str) -> bool:
        path = self._path(name)
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise translated(error, "exists", name, path) from error
        return True

    def link(self, source: str, target: str) -> None:
        source_path, target_path = self._path(source), self._path(target)
        try:
            try:
                os.link(source_path, target_path, follow_symlinks=False)
            except FileNotFoundError:
                os.lstat(source_path)  # If it is the source that is missing, make no folders for its target.
                self._make_folders(target)
                os.link(source_path, target_path, follow_symlinks=False)
        except FileExistsError as error:
            raise translated(error, "link", target, target_path) from error
        except OSError as error:
            raise translated(error, "link", source, source_path) from error

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise translated(error, "delete", name, path) from error

    def sync_folder(self, folder: str) -> None:
        """As the port says. A folder's own entry is synced once for each storage object, whoever made the folder:
        the process that did may have been killed before it could.
        """
        path = self._folder_path(folder)
        try:
            _sync_path(path)
            while folder not in self._durable_folders:
                parent = os.path.dirname(path)
                if folder:
                    _sync_path(parent)
                else:
                    _sync_outside(parent)
                self._durable_folders.add(folder)
                folder, path = parent_of(folder), parent
        except OSError as error:
            raise translated(error, "sync_folder", folder, path) from error

    def list(self, folder: str) -> _Names:
        """As the port says; files whose names no storage could have written are left out."""
        return self._scan(folder, "list", files=True)

    def list_folders(self, folder: str) -> _Names:
        return self._scan(folder, "list_folders", files=False)

    def _scan(self, folder: str, operation: str, *, files: bool) -> _Names:
        path = self._folder_path(folder)
        try:
            with os.scandir(path) as entries:
                return sorted(
                    entry.name
                    for entry in entries
                    if is_name(entry.name) and (entry.is_file(follow_symlinks=False) if files else entry.is_dir())
                )
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise translated(error, operation, folder, path) from error

    def reserve(self, name: str, size: int) -> None:
        path = self._path(name)
        try:
            descriptor = self._open_making_folders(name, path, _CREATE & ~os.O_APPEND)
        except FileExistsError:
            return
        except OSError as error:
            raise translated(error, "reserve", name, path) from error
        try:
            os.fchmod(descriptor, _FILE_MODE)
            if size:
                _allocate(descriptor, size)
        except OSError as error:
            self.delete(name)
            raise translated(error, "reserve", name, path) from error
        finally:
            descriptor.close()

    def lock(self, name: str) -> LockFile:
        """As the port says. Where nothing can be written an existing lock file is opened for reading: its `write`
        raises `ReadOnly`.
        """
        path = self._path(name)
        try:
            try:
                descriptor = self._open_making_folders(name, path, _LOCK)
            except PermissionError:
                descriptor = _Descriptor(os.open(path, _READ))
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                descriptor = _Descriptor(os.open(path, _READ))
        except OSError as error:
            raise translated(error, "lock", name, path) from error
        file = _LocalLockFile(name, path, descriptor)
        self._keep(file)
        return file

    def boot_id(self) -> bytes:
        return _read_boot_id()

    def writable(self) -> bool:
        return os.access(self._root, os.W_OK | os.X_OK)

    def close(self) -> None:
        self._closed = True
        with self._mutex:
            files = list(self._files)
            self._files.clear()
        for file in files:
            file.close()

    def _abandon(self) -> None:
        """In a forked child: close what was inherited. Takes no mutex; its owner may not exist in this process."""
        self._closed = True
        for file in list(self._files):
            file._abandon()


def _sync_path(path: str) -> None:
    descriptor = _Descriptor(os.open(path, _FOLDER))
    try:
        _sync_entries(descriptor)
    finally:
        descriptor.close()


def _sync_outside(path: str) -> None:
    """Sync the folder that holds the root. It may belong to somebody else, who then made the root for us long ago."""
    try:
        _sync_path(path)
    except PermissionError:
        return


_storages: weakref.WeakSet[LocalStorage] = weakref.WeakSet()


def _abandon_all() -> None:
    for storage in list(_storages):
        storage._abandon()


os.register_at_fork(after_in_child=_abandon_all)

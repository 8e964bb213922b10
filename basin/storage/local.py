"""`LocalStorage`: the storage port on a POSIX file system.

Invariants:

- Files are created O_EXCL with mode 0600, folders with 0700, whatever the umask; nothing is ever truncated or renamed.
- Files are appended through O_APPEND, so that not even a stale handle overwrites what another process wrote.
- An `OSError` leaves only through `basin.storage.translation`.
- A forked child closes every inherited descriptor and unlocks nothing; afterwards its handles raise `BasinClosed`.

Network file systems are neither detected nor supported: NFS repeats a `link` whose reply was lost, and reports
`AlreadyExists` about its own success.

Imports `basin.errors` and its neighbours in `basin.storage`.
"""

# The methods' contracts are the port's (D102); descriptors and exact modes are the subject here, not paths (PTH).
# ruff: noqa: PTH100, PTH101, PTH102, PTH103, PTH108, PTH120, PTH123

from __future__ import annotations

import errno
import functools
import os
import threading
import uuid
import weakref
from pathlib import Path
from typing import Final, TypeAlias

from basin.errors import BasinClosed, StorageError
from basin.storage.local_files import (
    Descriptor,
    LocalAppendFile,
    LocalFile,
    LocalLockFile,
    LocalReadFile,
    allocate,
    sync_entries,
)
from basin.storage.naming import checked_folder, checked_name, folders_above, is_name, parent_of
from basin.storage.protocol import AppendFile, LockFile, ReadFile, Storage
from basin.storage.translation import translated

_FILE_MODE: Final = 0o600
_FOLDER_MODE: Final = 0o700

# O_NOFOLLOW: a symlink planted in the folder leads nowhere. O_NONBLOCK: opening a planted FIFO does not hang.
_SAFE: Final = os.O_CLOEXEC | os.O_NOFOLLOW
_READ: Final = os.O_RDONLY | os.O_NONBLOCK | _SAFE
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | _SAFE
_APPEND: Final = os.O_WRONLY | os.O_APPEND | _SAFE
_LOCK: Final = os.O_RDWR | os.O_CREAT | _SAFE
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_Names: TypeAlias = list[str]  # In the class below, `list` is a method.


@functools.cache
def _boot_id() -> bytes:
    """The kernel's boot id, read once; where there is none (not Linux), 16 random bytes for this process.

    The latter is safe and slow: each process treats the files as if the machine had been restarted in between.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return uuid.UUID(file.read().strip()).bytes
    except (OSError, ValueError):
        return os.urandom(16)


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
        self._files: weakref.WeakSet[LocalFile] = weakref.WeakSet()
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

    def _keep(self, file: LocalFile) -> None:
        with self._mutex:
            self._files.add(file)

    def _open_making_folders(self, name: str, path: str, flags: int) -> Descriptor:
        """Open a file that may be new, with the folders it needs. Raises bare `OSError`."""
        try:
            descriptor = Descriptor(os.open(path, flags, _FILE_MODE))
        except FileNotFoundError:
            self._make_folders(name)
            descriptor = Descriptor(os.open(path, flags, _FILE_MODE))
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
        file = LocalAppendFile(name, path, descriptor, 0)
        self._keep(file)
        return file

    def append_to(self, name: str, offset: int) -> AppendFile:
        path = self._path(name)
        try:
            descriptor = Descriptor(os.open(path, _APPEND))
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
        file = LocalAppendFile(name, path, descriptor, offset)
        self._keep(file)
        return file

    def open(self, name: str) -> ReadFile:
        path = self._path(name)
        try:
            file = LocalReadFile(name, path, Descriptor(os.open(path, _READ)))
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
                allocate(descriptor, size)
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
                descriptor = Descriptor(os.open(path, _READ))
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                descriptor = Descriptor(os.open(path, _READ))
        except OSError as error:
            raise translated(error, "lock", name, path) from error
        file = LocalLockFile(name, path, descriptor)
        self._keep(file)
        return file

    def boot_id(self) -> bytes:
        return _boot_id()

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
            file.abandon()


def _sync_path(path: str) -> None:
    descriptor = Descriptor(os.open(path, _FOLDER))
    try:
        sync_entries(descriptor)
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

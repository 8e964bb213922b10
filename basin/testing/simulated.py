"""`SimulatedStorage`: the storage port upon a `SimulatedDisk`, as one process has it.

Locks belong to the files of the disk, so that several storages on one disk exclude each other as processes do. A thread
that waits for what it holds itself fails at once instead of hanging. Imports `basin.testing.disk`, the storage port and
the local storage's table of errors.
"""

# The methods' contracts are the port's.

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Mapping
from typing import TypeAlias

from basin.errors import BasinClosed, BasinError, StorageError, StorageUnavailable, TruncatedStratum
from basin.storage.local_files import LOCK_FILE_SIZE_MAX
from basin.storage.naming import checked_folder, checked_name, parent_of
from basin.storage.protocol import AppendFile, LockFile, ReadFile, Storage
from basin.storage.translation import translated
from basin.testing.disk import Effect, Inode, SimulatedDisk

_Names: TypeAlias = list[str]  # In the class below, `list` is a method.


def _error(number: int, operation: str, name: str) -> BasinError:
    return translated(OSError(number, os.strerror(number)), operation, name)


class _Handle:
    """What the three kinds of open files share."""

    def __init__(self, disk: SimulatedDisk, inode: Inode, name: str) -> None:
        self.name = name
        self._disk = disk
        self._inode = inode
        self._open = True

    def _require_open(self, operation: str) -> None:
        if not self._open:
            raise BasinClosed(f"{operation} {self.name!r}: the file is closed", object=self.name)

    def _write(self, operation: str, offset: int, data: bytes) -> None:
        disk, inode = self._disk, self._inode
        with disk.changed:
            growth = max(0, offset + len(data) - inode.size)
            if disk.capacity is not None and growth and disk.used() + growth > disk.capacity:
                raise _error(errno.ENOSPC, operation, self.name)
            disk.apply(Effect("write", inode.name, number=inode.number, offset=offset, data=data))

    def close(self) -> None:
        self._open = False


class SimulatedReadFile(_Handle, ReadFile):
    """A file open for reading."""

    def read(self, offset: int, size: int) -> bytes:
        self._require_open("read")
        data = self._inode.read(offset, size)
        if len(data) != size:
            raise TruncatedStratum(
                f"read {self.name!r}: the file ends at {self._inode.size}, {size} bytes were expected at {offset}",
                object=self.name,
                offset=offset,
            )
        return data

    def size(self) -> int:
        self._require_open("size")
        return self._inode.size


class SimulatedAppendFile(_Handle, AppendFile):
    """A file open for appending."""

    def __init__(self, disk: SimulatedDisk, inode: Inode, name: str) -> None:
        super().__init__(disk, inode, name)
        self.offset = inode.size

    def append(self, data: bytes | bytearray | memoryview) -> None:
        self._require_open("append")
        copy = bytes(data)
        if copy:
            self._write("append", self._inode.size, copy)
            self.offset += len(copy)

    def sync(self) -> None:
        self._require_open("sync")
        self._disk.apply(Effect("sync", self._inode.name, number=self._inode.number))

    def lose_unsynced(self) -> None:
        """What the kernel does on a failed sync: the written sectors count as clean, and no later sync writes them."""
        self._disk.apply(Effect("lose", self._inode.name, number=self._inode.number))


class SimulatedLockFile(_Handle, LockFile):
    """A lock file. A thread that waits for a lock which it holds itself, through another handle, fails at once."""

    def acquire(self, timeout_s: float) -> None:
        self._require_open("lock")
        deadline = time.monotonic() + timeout_s
        inode, changed = self._inode, self._disk.changed
        with changed:
            while inode.holder is not None:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or inode.holder_thread == threading.get_ident():
                    raise StorageUnavailable(
                        f"lock {self.name!r}: another writer holds it: try again later",
                        object=self.name,
                        operation="lock",
                        errno=errno.EAGAIN,
                    )
                changed.wait(remaining)
            inode.holder = self
            inode.holder_thread = threading.get_ident()

    def release(self) -> None:
        with self._disk.changed:
            if self._inode.holder is self:
                self._inode.holder = None
                self._disk.changed.notify_all()

    def read(self) -> bytes:
        self._require_open("read")
        return self._inode.read(0, LOCK_FILE_SIZE_MAX)

    def write(self, data: bytes) -> None:
        self._require_open("write")
        if data:
            self._write("write", 0, data)

    def close(self) -> None:
        self.release()
        super().close()


class SimulatedStorage(Storage):
    """One process's access to a `SimulatedDisk`."""

    def __init__(self, disk: SimulatedDisk) -> None:
        self.disk = disk
        self.url = "simulated:"
        self._handles: list[_Handle] | None = []

    def _kept(self, handle: _Handle) -> None:
        if self._handles is not None:
            self._handles.append(handle)

    def _named(self, name: str) -> str:
        self._require_open(name)
        return checked_name(name)

    def _require_open(self, name: str) -> None:
        if self._handles is None:
            raise BasinClosed("the storage is closed", object=name)

    def _existing(self, operation: str, name: str) -> Inode:
        inode = self.disk.names.get(self._named(name))
        if inode is None:
            raise _error(errno.ENOENT, operation, name)
        return inode

    def _require_free(self, operation: str, name: str) -> None:
        if self._named(name) in self.disk.names or name in self.disk.folders:
            raise _error(errno.EEXIST, operation, name)

    def create(self, name: str) -> AppendFile:
        with self.disk.changed:
            self._require_free("create", name)
            file = SimulatedAppendFile(self.disk, self.disk.create(name), name)
        self._kept(file)
        return file

    def append_to(self, name: str, offset: int) -> AppendFile:
        inode = self._existing("append_to", name)
        if inode.size != offset:
            raise StorageError(
                f"append_to {name!r}: the file has {inode.size} bytes, not {offset}",
                object=name,
                operation="append_to",
                size=inode.size,
            )
        file = SimulatedAppendFile(self.disk, inode, name)
        self._kept(file)
        return file

    def open(self, name: str) -> ReadFile:
        file = SimulatedReadFile(self.disk, self._existing("open", name), name)
        self._kept(file)
        return file

    def link(self, source: str, target: str) -> None:
        with self.disk.changed:
            self._existing("link", source)
            self._require_free("link", target)
            self.disk.make_folders(target)
            self.disk.apply(Effect("link", source, target))

    def delete(self, name: str) -> None:
        with self.disk.changed:
            if self._named(name) in self.disk.names:
                self.disk.apply(Effect("delete", name))

    def sync_folder(self, folder: str) -> None:
        self._require_open(folder)
        if checked_folder(folder) and folder not in self.disk.folders:
            raise _error(errno.ENOENT, "sync_folder", folder)
        self.disk.apply(Effect("sync_folder", folder))

    def list(self, folder: str) -> _Names:
        return self._children(folder, self.disk.names)

    def list_folders(self, folder: str) -> _Names:
        return self._children(folder, self.disk.folders)

    def _children(self, folder: str, names: Mapping[str, Inode] | set[str]) -> _Names:
        self._require_open(folder)
        start = len(folder) + 1 if checked_folder(folder) else 0
        with self.disk.changed:
            return sorted(name[start:] for name in names if parent_of(name) == folder)

    def reserve(self, name: str, size: int) -> None:
        with self.disk.changed:
            if self._named(name) in self.disk.names:
                return
            if self.disk.capacity is not None and self.disk.used() + size > self.disk.capacity:
                raise _error(errno.ENOSPC, "reserve", name)
            inode = self.disk.create(name)
            if size:
                self.disk.apply(Effect("extend", name, number=inode.number, offset=size))

    def lock(self, name: str) -> LockFile:
        with self.disk.changed:
            inode = self.disk.names.get(self._named(name)) or self.disk.create(name)
        file = SimulatedLockFile(self.disk, inode, name)
        self._kept(file)
        return file

    def boot_id(self) -> bytes:
        return self.disk.boot_id

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        handles, self._handles = self._handles, None
        for handle in handles or ():
            handle.close()

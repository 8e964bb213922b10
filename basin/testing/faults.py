"""Storages that wrap another one: `FaultStorage` makes chosen calls fail, `CountingStorage` counts them.

Every call of the port that can touch the disk is one call, in the order they are made, from 1: those of `Storage`, and
`read`, `size`, `append`, `sync`, `acquire`, `release` and `write` of its files. `close`, `writable` and what the port
composes of other calls (`put_if_absent`, `read_file`, `exists`) are not calls of their own.

The errors are those of the local storage's table. A fault that cannot happen to a call (no append runs out of file
descriptors) does not: `fired` says how many did. Safe for several threads.

Imports the storage port, the local storage's table of errors and `basin.testing.disk`.
"""

# Each hook is given all that is known of a call, for whichever storage needs it.

from __future__ import annotations

import enum
import errno
import os
import threading
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

from basin.errors import BasinError, StorageError
from basin.storage.protocol import AppendFile, LockFile, ReadFile, Storage
from basin.storage.translation import translated
from basin.testing.simulated import SimulatedAppendFile

_Result = TypeVar("_Result")
_Names: TypeAlias = list[str]  # In the classes below, `list` is a method.

_OPENING: Final = frozenset({"create", "append_to", "open", "sync_folder", "list", "list_folders", "reserve", "lock"})
_CHANGING: Final = frozenset({"create", "link", "append", "write", "reserve", "lock"})


class Fault(enum.Enum):
    """What goes wrong with a call."""

    EIO = "input/output error"
    ENOSPC = "disk full"
    EMFILE = "too many open files"
    EACCES = "permission denied"
    SHORT_WRITE = "a part is written, then an input/output error"
    SYNC_LOST = "the sync fails, and what it was for is not written, nor by a later sync"
    SYNC_DONE = "the sync fails after the data became durable"
    KILL = "the process is killed before the call"
    KILL_IN_WRITE = "the process is killed with a part written"

    def applies_to(self, operation: str) -> bool:
        """Whether this can happen to a call of `operation`."""
        return _APPLIES[self](operation)


_APPLIES: Final[dict[Fault, Callable[[str], bool]]] = {
    Fault.EIO: lambda operation: operation not in ("boot_id", "release", "sync"),  # for sync there are two of its own
    Fault.ENOSPC: lambda operation: operation in _CHANGING,
    Fault.EMFILE: lambda operation: operation in _OPENING,
    Fault.EACCES: lambda operation: operation in _OPENING or operation in ("link", "delete"),
    Fault.SHORT_WRITE: lambda operation: operation in ("append", "write"),
    Fault.SYNC_LOST: lambda operation: operation in ("sync", "sync_folder"),
    Fault.SYNC_DONE: lambda operation: operation in ("sync", "sync_folder"),
    Fault.KILL: lambda _: True,
    Fault.KILL_IN_WRITE: lambda operation: operation in ("append", "write"),
}

_NUMBERS: Final = {Fault.ENOSPC: errno.ENOSPC, Fault.EMFILE: errno.EMFILE, Fault.EACCES: errno.EACCES}

Plan: TypeAlias = Callable[[int, str, str], Fault | None]
"""Decides for call `number` (from 1), `operation` and `name` of the file or folder what goes wrong, if anything."""


def nth_call(fault: Fault, number: int, *, forever: bool = False) -> Plan:
    """A plan: `fault` at call `number`; with `forever` also at every later one."""

    def plan(call: int, _operation: str, _name: str) -> Fault | None:
        return fault if call == number or (forever and call > number) else None

    return plan


def no_fault(_call: int, _operation: str, _name: str) -> Fault | None:
    """A plan: nothing goes wrong. `FaultStorage.calls` then says how many calls a script makes."""
    return None


class Killed(BaseException):
    """The process ended here. Nothing may catch it and go on: every later call raises it as well."""


class _ObservedStorage(Storage):
    """Hands every call to `_call`. The inner storage's files are wrapped alike."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.url = inner.url

    @abstractmethod
    def _call(self, operation: str, name: str, action: Callable[[], _Result], size: int = 0) -> _Result:
        """Perform `action`, which is `operation` on `name`, concerning `size` bytes."""

    @abstractmethod
    def _write(self, operation: str, name: str, action: Callable[[bytes], None], data: bytes) -> None:
        """Perform `action` on `data`, or on its beginning."""

    @abstractmethod
    def _sync(self, operation: str, name: str, action: Callable[[], None], lose: Callable[[], None]) -> None:
        """Perform `action`, or `lose` what it should make durable."""

    def create(self, name: str) -> AppendFile:
        return _ObservedAppendFile(self, self._call("create", name, lambda: self.inner.create(name)))

    def append_to(self, name: str, offset: int) -> AppendFile:
        return _ObservedAppendFile(self, self._call("append_to", name, lambda: self.inner.append_to(name, offset)))

    def open(self, name: str) -> ReadFile:
        return _ObservedReadFile(self, self._call("open", name, lambda: self.inner.open(name)))

    def link(self, source: str, target: str) -> None:
        self._call("link", source, lambda: self.inner.link(source, target))

    def delete(self, name: str) -> None:
        self._call("delete", name, lambda: self.inner.delete(name))

    def sync_folder(self, folder: str) -> None:
        self._sync("sync_folder", folder, lambda: self.inner.sync_folder(folder), _lose_nothing)

    def list(self, folder: str) -> _Names:
        return self._call("list", folder, lambda: self.inner.list(folder))

    def list_folders(self, folder: str) -> _Names:
        return self._call("list_folders", folder, lambda: self.inner.list_folders(folder))

    def reserve(self, name: str, size: int) -> None:
        self._call("reserve", name, lambda: self.inner.reserve(name, size), size)

    def lock(self, name: str) -> LockFile:
        return _ObservedLockFile(self, self._call("lock", name, lambda: self.inner.lock(name)))

    def boot_id(self) -> bytes:
        return self._call("boot_id", "", self.inner.boot_id)

    def writable(self) -> bool:
        return self.inner.writable()

    def close(self) -> None:
        self.inner.close()


def _lose_nothing() -> None:
    """A folder whose sync failed stays as it was: its entries are not durable."""


class _ObservedReadFile(ReadFile):
    def __init__(self, storage: _ObservedStorage, inner: ReadFile) -> None:
        self.name = inner.name
        self._storage = storage
        self._inner = inner

    def read(self, offset: int, size: int) -> bytes:
        return self._storage._call("read", self.name, lambda: self._inner.read(offset, size), size)

    def size(self) -> int:
        return self._storage._call("size", self.name, self._inner.size)

    def close(self) -> None:
        self._inner.close()


class _ObservedAppendFile(AppendFile):
    def __init__(self, storage: _ObservedStorage, inner: AppendFile) -> None:
        self.name = inner.name
        self.offset = inner.offset
        self._storage = storage
        self._inner = inner
        self._failed = False

    def append(self, data: bytes | bytearray | memoryview) -> None:
        self._require_unfailed("append")
        try:
            self._storage._write("append", self.name, self._inner.append, bytes(data))
        except StorageError:
            self._failed = True
            raise
        finally:
            self.offset = self._inner.offset

    def sync(self) -> None:
        self._require_unfailed("sync")
        try:
            self._storage._sync("sync", self.name, self._inner.sync, self._lose)
        except StorageError:
            self._failed = True
            raise

    def _lose(self) -> None:
        if isinstance(self._inner, SimulatedAppendFile):
            self._inner.lose_unsynced()

    def _require_unfailed(self, operation: str) -> None:
        if self._failed:
            raise StorageError(
                f"{operation} {self.name!r}: an earlier write or sync of this file failed",
                object=self.name,
                operation=operation,
                errno=errno.EIO,
            )

    def close(self) -> None:
        self._inner.close()


class _ObservedLockFile(LockFile):
    def __init__(self, storage: _ObservedStorage, inner: LockFile) -> None:
        self.name = inner.name
        self._storage = storage
        self._inner = inner

    def acquire(self, timeout_s: float) -> None:
        self._storage._call("acquire", self.name, lambda: self._inner.acquire(timeout_s))

    def release(self) -> None:
        self._storage._call("release", self.name, self._inner.release)

    def read(self) -> bytes:
        return self._storage._call("read", self.name, self._inner.read)

    def write(self, data: bytes) -> None:
        self._storage._write("write", self.name, self._inner.write, data)

    def close(self) -> None:
        self._inner.close()


class FaultStorage(_ObservedStorage):
    """Makes the calls that `plan` names fail. `calls` counts all, `fired` those that failed, `history` names them.

    After a kill every call raises `Killed`; the locks of the dead are given back by `close()`, which always works.
    """

    def __init__(self, inner: Storage, plan: Plan = no_fault) -> None:
        super().__init__(inner)
        self.plan = plan
        self.calls = 0
        self.fired = 0
        self.killed = False
        self.history: list[tuple[str, str]] = []
        self._mutex = threading.Lock()

    def _next(self, operation: str, name: str) -> Fault | None:
        with self._mutex:
            if self.killed:
                raise Killed(f"{operation} {name!r}")
            self.calls += 1
            self.history.append((operation, name))
            fault = self.plan(self.calls, operation, name)
            if fault is None or not fault.applies_to(operation):
                return None
            self.fired += 1
            self.killed = fault in (Fault.KILL, Fault.KILL_IN_WRITE)
        if fault is Fault.KILL:
            raise Killed(f"{operation} {name!r}, call {self.calls}")
        return fault

    def _call(self, operation: str, name: str, action: Callable[[], _Result], size: int = 0) -> _Result:
        fault = self._next(operation, name)
        if fault is not None:
            raise _error(fault, operation, name)
        return action()

    def _write(self, operation: str, name: str, action: Callable[[bytes], None], data: bytes) -> None:
        fault = self._next(operation, name)
        if fault is None:
            return action(data)
        if fault in (Fault.SHORT_WRITE, Fault.KILL_IN_WRITE):
            action(data[: len(data) // 2])
        if fault is Fault.KILL_IN_WRITE:
            raise Killed(f"{operation} {name!r}, call {self.calls}")
        raise _error(fault, operation, name)

    def _sync(self, operation: str, name: str, action: Callable[[], None], lose: Callable[[], None]) -> None:
        fault = self._next(operation, name)
        if fault is None:
            return action()
        if fault is Fault.SYNC_DONE:
            action()
        if fault is Fault.SYNC_LOST:
            lose()
        raise _error(fault, operation, name)


def _error(fault: Fault, operation: str, name: str) -> BasinError:
    number = _NUMBERS.get(fault, errno.EIO)
    cause = OSError(number, os.strerror(number))
    error = translated(cause, operation, name)
    error.__cause__ = cause
    return error


class CountingStorage(_ObservedStorage):
    """Counts calls (`calls`) and the bytes read and written (`bytes`) by operation."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._mutex = threading.Lock()

    def _count(self, operation: str, size: int) -> None:
        with self._mutex:
            self.calls[operation] += 1
            if size:
                self.bytes[operation] += size

    def _call(self, operation: str, name: str, action: Callable[[], _Result], size: int = 0) -> _Result:
        self._count(operation, size)
        return action()

    def _write(self, operation: str, name: str, action: Callable[[bytes], None], data: bytes) -> None:
        self._count(operation, len(data))
        action(data)

    def _sync(self, operation: str, name: str, action: Callable[[], None], lose: Callable[[], None]) -> None:
        self._count(operation, 0)
        action()

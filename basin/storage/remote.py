"""`RemoteStorage`: the storage port on an object store: files are objects, whole or not there.

Invariants:

- A file grows in a local spool (see `spool`) and becomes an object when it is finished: nobody sees it before, and
  `sync` returns after the store has said that it holds it. Names of strata are never used twice, so that sending one
  again is harmless.
- `put_if_absent` believes no reply (see `claims`).
- An object of which the caller knows the length is opened without a request; that it is gone shows when it is read.
- Metadata goes through `pieces`; grains are read by exact ranges, neighbours in one request.

There are no locks, links or growing files here: those methods raise `InvalidArgument`.
"""

# The methods' contracts are the port's (D102).

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, NoReturn, TypeAlias

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    BasinError,
    InvalidArgument,
    StorageError,
    StorageUnavailable,
    TruncatedStratum,
)
from basin.storage.claims import Outcome, claim
from basin.storage.counting import CountingObjects
from basin.storage.disk_cache import DiskCache
from basin.storage.naming import checked_folder, checked_name
from basin.storage.objects import READABLE, ByteRange, Listing, ObjectInfo, ObjectStore, Readiness
from basin.storage.pieces import Pieces
from basin.storage.probe import probe_create_only
from basin.storage.protocol import AppendFile, Extent, LockFile, ReadFile, Storage
from basin.storage.requests import RequestPolicy
from basin.storage.retrying import RetryingObjects
from basin.storage.spool import Spool, SpoolFile

_GAP_MAX: Final = 64 << 10
"""Bytes read in vain between two ranges rather than asking twice."""
_MERGED_SIZE_MAX: Final = 9 << 20
"""Eight parts of 1 MiB and their headers are one request."""
_READS_MAX: Final = 3
DATA_START: Final = "data/"
"""How the names of grains of contents begin: no metadata, and the only files that may lie in a colder class."""

_Names: TypeAlias = list[str]  # In the class below, `list` is a method.


class RemoteStorage(Storage):
    """Files below one prefix of a bucket. Safe for several threads."""

    objects: ObjectStore

    def __init__(
        self,
        store: ObjectStore,
        policy: RequestPolicy,
        *,
        cache: DiskCache | None = None,
        spool_folder: Path | None = None,
        uploads: int = 2,
    ) -> None:
        """`uploads`: files sent at a time, each held in memory while it is; 0: sent by whoever calls `sync`."""
        self.url = store.url
        self.policy = policy
        self.counting = CountingObjects(store)
        self.objects = RetryingObjects(self.counting, policy)
        self._pieces = Pieces(self.objects, cache)
        self._cache = cache
        self._spool_folder = spool_folder
        self._spool: Spool | None = None
        self._spooled: dict[str, SpoolFile] = {}
        self._uploads = uploads
        self._pool: ThreadPoolExecutor | None = None
        self._slots = threading.BoundedSemaphore(2 * uploads or 1)
        self._mutex = threading.Lock()
        self._closed = False
        self._is_probed = False
        self._supposed: Mapping[str, bytes] = {}
        self.data_class = ""
        """Storage class of the files below `data/`. Set before the first of them is created."""
        _storages.add(self)

    def __repr__(self) -> str:
        return f"RemoteStorage({self.url!r})"

    def _require_open(self, name: str) -> None:
        if self._closed:
            raise BasinClosed(f"the storage at {self.url!r} is closed, or was opened before a fork", object=name)

    # --- writing ----------------------------------------------------------------------------------------------------

    def create(self, name: str) -> AppendFile:
        """As the port says, but that a name taken by somebody else is not noticed: ids are never used twice."""
        self._require_open(checked_name(name))
        with self._mutex:
            if name in self._spooled:
                raise AlreadyExists(f"create {name!r}: the file exists already", object=name, operation="create")
            if self._spool is None:
                self._spool = Spool(self._spool_folder)
            spooled = self._spooled[name] = self._spool.create()
        return _GrowingFile(self, name, spooled)

    def upload(self, name: str, spooled: SpoolFile) -> Future[None]:
        """Begin to send a finished file. Waits while twice as many are on their way as are sent at a time."""
        self._require_open(name)
        if not self._uploads:
            done: Future[None] = Future()
            try:
                self._send(name, spooled)
                done.set_result(None)
            except BasinError as error:
                done.set_exception(error)
            return done
        with self._mutex:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._uploads, thread_name_prefix="basin-upload")
            pool = self._pool
        self._slots.acquire()
        try:
            future = pool.submit(self._send, name, spooled)
        except BaseException:
            self._slots.release()
            raise
        future.add_done_callback(lambda _: self._slots.release())
        return future

    def _send(self, name: str, spooled: SpoolFile) -> None:
        self.objects.put_file(name, spooled.path, self.data_class if name.startswith(DATA_START) else "")

    def sent(self, name: str, spooled: SpoolFile) -> None:
        """The object is there: the spooled file goes, after what is metadata of it went into the cache."""
        if not name.startswith(DATA_START):
            extent = Extent(name, spooled.size, spooled.size)
            start = self._pieces.metadata_start(extent)
            self._pieces.keep(extent, spooled.read(start, spooled.size - start))
        self.drop(name, spooled)

    def drop(self, name: str, spooled: SpoolFile) -> None:
        """Forget a spooled file."""
        with self._mutex:
            if self._spooled.get(name) is spooled:
                del self._spooled[name]
        spooled.remove()

    def append_to(self, name: str, offset: int) -> AppendFile:
        self._refuse("append_to", name)

    def link(self, source: str, target: str) -> None:
        self._refuse("link", source)

    def lock(self, name: str) -> LockFile:
        self._refuse("lock", name)

    def _refuse(self, operation: str, name: str) -> NoReturn:
        raise InvalidArgument(f"{operation} {name!r}: files of a bucket neither grow nor have locks", object=name)

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._require_open(checked_name(name))
        made = claim(self.objects, name, data, self.policy)
        if made.outcome is Outcome.TAKEN:
            raise AlreadyExists(f"put {name!r}: the object exists already", object=name, operation="put_if_absent")
        if made.outcome is Outcome.UNKNOWN:
            raise StorageUnavailable(
                f"put {name!r}: it cannot be known whether it was stored; try again later",
                object=name,
                operation="put_if_absent",
            ) from made.error

    def require_create_only(self) -> None:
        """As the port says; see `probe` for what it costs."""
        if not self._is_probed:
            probe_create_only(self.objects, concurrent=self._uploads > 0)
            self._is_probed = True

    def requests(self) -> dict[str, int]:
        counts = {str(kind): count for kind, count in self.counting.counts.items()}
        return {**counts, "bytes_in": self.counting.bytes_in, "bytes_out": self.counting.bytes_out}

    def delete(self, name: str) -> None:
        self._require_open(checked_name(name))
        self.objects.delete([name])

    def delete_many(self, names: Sequence[str]) -> None:
        self._require_open(checked_name(names[0]) if names else "")
        self.objects.delete([checked_name(name) for name in names])

    def sync_folder(self, folder: str) -> None:
        """There is nothing to do: an object has no entry apart from itself."""
        self._require_open(checked_folder(folder))

    def reserve(self, name: str, size: int) -> None:
        """There is nothing to do: a bucket is never full."""
        self._require_open(checked_name(name))

    # --- reading ----------------------------------------------------------------------------------------------------

    def open(self, name: str) -> ReadFile:
        """As the port says; asks for the object's size."""
        self._require_open(checked_name(name))
        spooled = self._spooled.get(name)
        size = spooled.size if spooled is not None else self.objects.size(name)
        return _RemoteFile(self, Extent(name, size), grows=spooled is not None)

    def open_known(self, extent: Extent) -> ReadFile:
        self._require_open(checked_name(extent.name))
        return _RemoteFile(self, extent, grows=extent.name in self._spooled)

    def suppose(self, files: Mapping[str, bytes]) -> None:
        """Answer for these files, and their folders, without a request, until told otherwise: what a hint says."""
        self._supposed = files

    def read_file(self, name: str, size_max: int) -> bytes:
        self._require_open(checked_name(name))
        if name in self._supposed:
            return self._supposed[name][:size_max]
        return self.objects.get(ByteRange(name, 0, size_max))

    def exists(self, name: str) -> bool:
        self._require_open(checked_name(name))
        try:
            self.objects.size(name)
        except StorageError as error:
            if isinstance(error, StorageUnavailable) or error.__class__ is StorageError:
                raise
            return False
        return True

    def prefetch(self, extents: Sequence[Extent]) -> None:
        self._pieces.prefetch([extent for extent in extents if extent.name not in self._spooled])

    def read_range(self, extent: Extent, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, from the spool, the caches or the store; raise `TruncatedStratum`."""
        self._require_open(extent.name)
        spooled = self._spooled.get(extent.name)
        if spooled is not None:
            with contextlib.suppress(StorageError):  # It has just been sent, and removed.
                return _whole(spooled.read(offset, size), extent.name, offset, size)
        data = b""
        for _ in range(_READS_MAX):  # A body that was cut short on its way looks like an object that ends there.
            if size and offset >= extent.size - extent.index_size:
                data = self._pieces.read(extent, offset, size)
            elif size:
                data = self.objects.get(ByteRange(extent.name, offset, offset + size))
            if len(data) >= size:
                break
        return _whole(data, extent.name, offset, size)

    def read_range_again(self, extent: Extent, offset: int, size: int) -> bytes:
        """`read_range` past all caches."""
        self._require_open(extent.name)
        if offset >= extent.size - extent.index_size:
            return _whole(self._pieces.read_again(extent, offset, size), extent.name, offset, size)
        return self.read_range(extent, offset, size)

    def read_ranges(self, wanted: Sequence[ByteRange]) -> _Bodies:
        """As the port says; neighbouring ranges are one request, and all requests run concurrently."""
        found: _Bodies = [b""] * len(wanted)
        remote: list[int] = []
        for row, (name, start, stop) in enumerate(wanted):
            spooled = self._spooled.get(name)
            if spooled is not None:
                end = spooled.size if stop is None else min(stop, spooled.size)
                try:
                    found[row] = self.read_range(Extent(name, end), start, max(0, end - start))
                except BasinError as error:
                    found[row] = error
            else:
                remote.append(row)
        merged = _merged([wanted[row] for row in remote])
        bodies = self.objects.get_many([span for span, _ in merged])
        for (span, members), body in zip(merged, bodies, strict=True):
            for member in members:
                row = remote[member]
                name, start, stop = wanted[row]
                found[row] = body
                if isinstance(body, bytes):
                    found[row] = body[start - span.start : None if stop is None else stop - span.start]
        return found

    def readiness(self, name: str) -> Readiness:
        self._require_open(checked_name(name))
        return READABLE if name in self._spooled else self.objects.readiness(name)

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._require_open(checked_name(name))
        self.objects.restore(name, days=days, tier=tier)

    # --- folders ----------------------------------------------------------------------------------------------------

    def list(self, folder: str) -> _Names:
        return [found.name for found in self._listing(folder).objects]

    def list_folders(self, folder: str) -> _Names:
        return self._listing(folder).folders

    def _listing(self, folder: str) -> Listing:
        """What lies in a folder; of one of which a file is supposed, what is supposed."""
        self._require_open(checked_folder(folder))
        start = f"{folder}/"
        inside = {name.removeprefix(start): body for name, body in self._supposed.items() if name.startswith(start)}
        if not inside:
            return self.objects.list(folder)
        return Listing(
            [ObjectInfo(name, len(inside[name])) for name in sorted(inside) if "/" not in name],
            sorted({name.partition("/")[0] for name in inside if "/" in name}),
        )

    def boot_id(self) -> bytes:
        """Nothing that was acknowledged is ever lost by a restart."""
        return bytes(16)

    def writable(self) -> bool:
        """Whether it is shows when something is written: permissions cannot be asked for."""
        return True

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for spooled in list(self._spooled.values()):
            spooled.remove()
        self._spooled.clear()
        if self._spool is not None:
            self._spool.close()
        if self._cache is not None:
            self._cache.close()
        self.objects.close()

    def _abandon(self) -> None:
        """In a forked child: use nothing of the parent's."""
        self._closed = True
        self._spool = None


_Bodies: TypeAlias = list[bytes | BasinError]


class _GrowingFile(AppendFile):
    """A file in the spool, until it has been sent."""

    def __init__(self, storage: RemoteStorage, name: str, spooled: SpoolFile) -> None:
        self.name = name
        self.offset = 0
        self._storage = storage
        self._spooled = spooled
        self._future: Future[None] | None = None
        self._is_finished = False
        self._is_sent = False

    def append(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_finished:
            raise StorageError(f"{self.name} is finished", object=self.name, operation="append")
        self._spooled.append(data)
        self.offset = self._spooled.size

    def finish(self) -> None:
        self._is_finished = True
        if self._future is None and not self._is_sent:
            self._future = self._storage.upload(self.name, self._spooled)

    def is_sent(self) -> bool:
        return self._is_sent or (self._future is not None and self._future.done())

    def sync(self) -> None:
        """As the port says; after `StorageUnavailable` it may be called again, and sends the file again.

        What was unavailable before anybody waited for it, and may be long over, is tried again at once.
        """
        if self._is_sent:
            return
        if self._future is not None and _is_unavailable(self._future):
            self._future = None
        self.finish()
        future, self._future = self._future, None
        if future is not None:
            try:
                future.result()
            except CancelledError as error:
                raise BasinClosed(f"{self.name} was not sent: the storage was closed", object=self.name) from error
            except BaseException:
                if not future.done():
                    self._future = future  # An interrupt while waiting: it is still on its way.
                raise
        self._is_sent = True
        self._storage.sent(self.name, self._spooled)

    def close(self) -> None:
        """As the port says; what was not sent is gone."""
        if not self._is_sent and self._future is None:
            self._storage.drop(self.name, self._spooled)


class _RemoteFile(ReadFile):
    """An object, or what is still in the spool. Holds nothing open."""

    def __init__(self, storage: RemoteStorage, extent: Extent, *, grows: bool) -> None:
        self.name = extent.name
        self._extent = extent
        self._storage = storage
        self._grows = grows

    def read(self, offset: int, size: int) -> bytes:
        return self._storage.read_range(self._extent, offset, size)

    def read_again(self, offset: int, size: int) -> bytes | None:
        return self._storage.read_range_again(self._extent, offset, size)

    def size(self) -> int:
        if self._grows:
            spooled = self._storage._spooled.get(self.name)
            if spooled is not None:
                return spooled.size
            self._grows = False
            if not self._extent.index_size:
                self._extent = Extent(self.name, self._storage.objects.size(self.name))
        return self._extent.size

    def close(self) -> None:
        return


def _is_unavailable(sent: Future[None]) -> bool:
    """Whether a file was not sent because the store did not answer; False while it is on its way."""
    return sent.done() and not sent.cancelled() and isinstance(sent.exception(), StorageUnavailable)


def _whole(data: bytes, name: str, offset: int, size: int) -> bytes:
    if len(data) < size:
        raise TruncatedStratum(
            f"{name} ends at byte {offset + len(data)}, but {offset + size} were expected",
            object=name,
            offset=offset + len(data),
        )
    return data[:size] if len(data) > size else data


def _merged(wanted: Sequence[ByteRange]) -> list[tuple[ByteRange, list[int]]]:
    """Requests that cover all of `wanted`, and which of them each covers. Neighbours share one."""
    order = sorted(range(len(wanted)), key=lambda row: (wanted[row].name, wanted[row].start))
    merged: list[tuple[ByteRange, list[int]]] = []
    for row in order:
        name, start, stop = wanted[row]
        if merged:
            (last_name, last_start, last_stop), members = merged[-1]
            if (
                name == last_name
                and stop is not None
                and last_stop is not None
                and start - last_stop <= _GAP_MAX
                and max(stop, last_stop) - last_start <= _MERGED_SIZE_MAX
            ):
                merged[-1] = (ByteRange(name, last_start, max(stop, last_stop)), [*members, row])
                continue
        merged.append((wanted[row], [row]))
    return merged


_storages: weakref.WeakSet[RemoteStorage] = weakref.WeakSet()


def _abandon_all() -> None:
    for storage in list(_storages):
        storage._abandon()


os.register_at_fork(after_in_child=_abandon_all)

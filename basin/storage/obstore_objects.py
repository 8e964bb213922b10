"""`ObstoreObjects`: the object port over obstore, for S3. Several times faster than s3fs, at a fraction of its work.

Invariants:

- One call is one attempt: obstore's repeating is switched off. `put_new` is one PUT with `If-None-Match: *`.
- Every request ends: after silence of `read_timeout_s`, or after the policy's deadline and the time that a slow line
  may take for its body.
- An error leaves only through `basin.storage.object_errors`, and without what lies behind it: obstore's texts quote the
  service's answer.
- Requests run on one event loop and its thread, for all stores; a caller waits, and when it is interrupted its request
  is cancelled. Neither that thread nor those of obstore exist in a forked child: there every inherited handle raises
  `BasinClosed`, and whoever used obstore before the fork cannot use it at all (`Untranslatable`).

The one module that imports obstore, with the first store. Imports `basin.errors` and its neighbours.
"""

from __future__ import annotations

import asyncio
import atexit
import importlib.util
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from basin.errors import BasinClosed, BasinError, InvalidArgument, MissingDependency, StorageError, StorageUnavailable
from basin.storage.fsspec_clients import each, read_exactly
from basin.storage.naming import checked_folder, checked_name, is_name
from basin.storage.object_errors import answered_code, object_error, refused_path
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectInfo, ObjectStore, Readiness
from basin.storage.requests import RequestPolicy
from basin.storage.s3_archive import S3Archive
from basin.storage.s3_options import Place, S3Settings, Untranslatable, s3_place, s3_settings
from basin.storage.translation import translated

if TYPE_CHECKING:
    from obstore.store import S3Store

_END_S: Final = 5.0
_LINGER_S: Final = 0.02
_PART_SIZE: Final = 16 << 20
_PARTS_MAX: Final = 10_000  # S3's limit for one upload.
_PARTS_IN_FLIGHT: Final = 4  # 64 MiB of memory: as much as the largest single PUT takes.
_DELETE_BATCH: Final = 1000  # S3's limit for one request.
_SLOWEST_RATE: Final = 64 << 10  # Bytes a second that a body may take beyond the deadline: a slow line is no dead one.

# obstore counts the time for sending a body as silence of the service: a body above this size, which takes the slowest
# line 4 seconds, goes through a client that waits for longer, by the size of the body rounded up to a step.
_QUICK_SIZE: Final = 256 << 10
_SLOW_STEP: Final = 16 << 20

# Services whose answer to a batch of deletions means that they know none: names then go one by one.
_NO_BATCHES: Final = frozenset(
    {"MissingContentMD5", "NotImplemented", "MethodNotAllowed", "InvalidRequest", "501", "405"}
)
_ABSENT: Final = frozenset({"NoSuchKey"})  # No error for a deletion; most services do not even say so.
_NOT_PARTIAL: Final = "source: NotPartial"  # In the text of the error where a server knows no ranges.

_Result = TypeVar("_Result")
_Names: TypeAlias = Sequence[str]
_Batch: TypeAlias = list[str]  # In the classes below, `list` is a method.
_Found: TypeAlias = list[bytes | BasinError]


def is_available() -> bool:
    """Whether obstore is installed. Does not load it."""
    try:
        return importlib.util.find_spec("obstore") is not None
    except ValueError:  # It stands in `sys.modules` as what must not be imported.
        return False


def open_obstore(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> ObstoreObjects:
    """The objects below `url` (`"s3://bucket/prefix"`). Sends no request to the bucket.

    `storage_options` are those of s3fs; they win over what `policy` says, but not over what correctness needs.

    Raises `InvalidArgument` for a URL or option that cannot be, `MissingDependency` without obstore, `StorageError`
    where no credentials are found, and `Untranslatable` where only s3fs does what is asked.
    """
    place = s3_place(url)
    if _runtime.is_inherited():
        raise Untranslatable("obstore was used before this process was forked")
    settings = s3_settings(place, dict(storage_options or {}), policy)
    try:
        return ObstoreObjects(
            _Clients(place, settings, policy), policy, place.url, S3Archive(place, storage_options or {}, policy)
        )
    except ImportError:
        text = "s3: URLs need another package: pip install 'basin-store[s3]'"
        raise MissingDependency(text, package="obstore") from None
    except Exception as error:  # noqa: BLE001  # whatever the library raises
        refused = object_error(error, "open", "", place.url)
    # Raised here, so that it keeps no hold on the library's error, whose text may quote an option.
    raise refused


class _Clients:
    """Clients of one bucket. Each has its own connections, patience, and word on batches of deletions."""

    def __init__(self, place: Place, settings: S3Settings, policy: RequestPolicy) -> None:
        self._place = place
        self._settings = settings
        self._policy = policy
        self._lock = threading.Lock()
        self._made: dict[tuple[int, bool], S3Store] = {}
        self.get()

    def get(self, size: int = 0, *, one_by_one: bool = False) -> S3Store:
        """The client for requests with bodies of up to `size` bytes; `one_by_one` deletes without batches."""
        steps = 0 if size <= _QUICK_SIZE else -(-size // _SLOW_STEP)
        with self._lock:
            found = self._made.get((steps, one_by_one))
            if found is None:
                found = self._made[steps, one_by_one] = self._make(steps * _SLOW_STEP, one_by_one=one_by_one)
            return found

    def forget(self) -> None:
        """Let the connections go, as soon as no request uses them."""
        with self._lock:
            self._made.clear()

    def name_of(self, path: str) -> str:
        """The name of the object whose path in the bucket is `path`; `""` if it does not lie below the prefix."""
        prefix = f"{self._place.prefix}/" if self._place.prefix else ""
        return path.removeprefix(prefix) if path.startswith(prefix) else ""

    def _make(self, size: int, *, one_by_one: bool) -> S3Store:
        from obstore.store import S3Store

        settings = self._settings
        slow_s = size / _SLOWEST_RATE
        whole_s = self._policy.deadline_s + max(PUT_SIZE_MAX, size) / _SLOWEST_RATE
        options: dict[str, Any] = {
            # What is said here is not looked for in the environment, whose words for it need not be meant for us.
            "conditional_put": "etag",
            "disable_bulk_delete": one_by_one,
            "request_payer": settings.requester_pays,
            "skip_signature": settings.anonymous,
            "unsigned_payload": settings.unsigned_payload,
            "virtual_hosted_style_request": settings.virtual_hosts,
        }
        if settings.endpoint is not None:
            options["endpoint"] = options["aws_endpoint_url_s3"] = self._endpoint(settings.endpoint)
        if settings.region is not None:
            options["region"] = settings.region
        if settings.credentials is not None:
            options["credential_provider"] = settings.credentials
        return S3Store(
            self._place.bucket,
            prefix=self._place.prefix or None,
            client_options={
                "allow_http": settings.endpoint is None or settings.endpoint.lower().startswith("http:"),
                "allow_invalid_certificates": settings.trusts_all,
                "connect_timeout": timedelta(seconds=settings.connect_timeout_s),
                "read_timeout": timedelta(seconds=settings.read_timeout_s + slow_s),
                "timeout": timedelta(seconds=whole_s),
                "pool_max_idle_per_host": str(settings.connections),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=whole_s)},
            **options,
        )

    def _endpoint(self, given: str) -> str:
        """An address as obstore wants it: with the bucket, where the bucket is part of the host's name."""
        if not self._settings.virtual_hosts:
            return given.rstrip("/")
        scheme, _, host = given.rstrip("/").partition("://")
        return f"{scheme}://{self._place.bucket}.{host}"


class _Runtime:
    """The event loop of all stores, in its thread, from the first request on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._inherited = False

    def is_inherited(self) -> bool:
        """Whether a parent used obstore before this process was forked."""
        return self._inherited

    def after_fork(self) -> None:
        """In a forked child: the threads are gone, and obstore does not begin anew."""
        self._lock = threading.Lock()
        self._inherited = self._inherited or self._loop is not None
        self._loop = None

    def wait_for(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of a coroutine; it is cancelled if the waiting is interrupted."""
        future = asyncio.run_coroutine_threadsafe(work, self._running())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            with self._lock:
                if self._loop is None:
                    loop = asyncio.new_event_loop()
                    self._thread = threading.Thread(target=loop.run_forever, name="basin obstore", daemon=True)
                    self._thread.start()
                    self._loop = loop
                    atexit.register(self._end)
        return self._loop

    def _end(self) -> None:
        """While the interpreter still stands: a thread of the library that wants its lock later ends the process."""
        loop, self._loop = self._loop, None
        if loop is not None and self._thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join(_END_S)
            time.sleep(_LINGER_S)  # The library lets go of what it held of Python's a moment after its answer is here.


class _Parts(Iterator[bytes]):
    """A file in parts, each read when obstore has room for it. After `end` no more is read, and the upload fails."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.part_size = max(_PART_SIZE, -(-size // _PARTS_MAX))
        self._descriptor = descriptor
        self._size = size
        self._offset = 0
        self._ended = False
        self._lock = threading.Lock()

    def __next__(self) -> bytes:
        with self._lock:
            if self._offset == self._size:
                raise StopIteration
            if self._ended:
                raise StorageError("the upload was interrupted", operation="put_file")
            part = read_exactly(self._descriptor, self._offset, min(self.part_size, self._size - self._offset))
            self._offset += len(part)
            return part

    def end(self) -> None:
        """Nothing reads the file from now on: it may be closed."""
        with self._lock:
            self._ended = True


class ObstoreObjects(ObjectStore):
    """The objects below one prefix of one bucket. Safe for several threads. `url` is the address for people."""

    knows_classes = True

    def __init__(self, clients: _Clients, policy: RequestPolicy, url: str, archive: S3Archive) -> None:
        """`archive` asks what obstore cannot ask."""
        import obstore

        self.url = url
        self._obstore: Any = obstore
        self._clients = clients
        self._policy = policy
        self._archive = archive
        self._batches_work = True
        self._ranges_work = True
        self._closed = False
        _stores.add(self)

    def __repr__(self) -> str:
        return f"ObstoreObjects({self.url!r})"

    def get(self, wanted: ByteRange) -> bytes:
        return bytes(self._run(self._get(wanted)))

    def get_many(self, wanted: Sequence[ByteRange]) -> _Found:
        found: _Found = [b""] * len(wanted)

        async def fetch(index: int) -> None:
            try:
                found[index] = bytes(await self._get(wanted[index]))
            except BasinError as error:
                found[index] = error

        self._run(each(range(len(wanted)), fetch, min(len(wanted), self._policy.concurrency)))
        return found

    def put(self, name: str, data: bytes) -> None:
        self._run(self._put("put", name, data))

    def put_new(self, name: str, data: bytes) -> None:
        self._run(self._put("put_new", name, data))

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        checked_name(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise translated(error, "open", name, str(path)) from error
        try:
            size = os.fstat(descriptor).st_size
            if size <= PUT_SIZE_MAX:
                self._run(self._put("put_file", name, read_exactly(descriptor, 0, size), storage_class))
            else:
                self._put_parts(name, _Parts(descriptor, size), storage_class)
        finally:
            os.close(descriptor)

    def readiness(self, name: str) -> Readiness:
        self._require_open()
        return self._archive.readiness(checked_name(name))

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._require_open()
        self._archive.restore(checked_name(name), days=days, tier=tier)

    def size(self, name: str) -> int:
        checked_name(name)

        async def ask() -> int:
            return int((await self._within(self._obstore.head_async(self._clients.get(), name)))["size"])

        return self._run(self._guarded("size", name, ask))

    def delete(self, names: _Names) -> None:
        ordered = [*dict.fromkeys(checked_name(name) for name in names)]
        if ordered:
            self._run(self._delete(ordered))

    def list(self, folder: str) -> Listing:
        prefix = checked_folder(folder) or None
        skipped = len(folder) + 1 if folder else 0

        async def ask() -> Any:
            # A page has the time that every request has; there may be thousands of them.
            return await self._obstore.list_with_delimiter_async(self._clients.get(), prefix)

        found = self._run(self._guarded("list", folder, ask))
        objects = (ObjectInfo(one["path"][skipped:], one["size"]) for one in found["objects"])
        folders = (path[skipped:].rstrip("/") for path in found["common_prefixes"])
        return Listing(
            sorted(info for info in objects if is_name(info.name)), sorted({name for name in folders if is_name(name)})
        )

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._clients.forget()
            self._archive.close()

    def _require_open(self) -> None:
        if self._closed:
            raise BasinClosed(f"the store at {self.url} is closed, or was opened before a fork", object="")

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        if self._closed:
            work.close()  # It has not begun, and would complain of never having been awaited.
        self._require_open()
        return _runtime.wait_for(work)

    async def _within(self, work: Awaitable[_Result], size: int = 0) -> _Result:
        """The result of one request with a body of `size` bytes; `TimeoutError` if it trickles beyond all patience."""
        async with asyncio.timeout(self._policy.deadline_s + size / _SLOWEST_RATE):
            return await work

    async def _guarded(
        self, operation: str, name: str, method: Callable[..., Awaitable[_Result]], *arguments: Any
    ) -> _Result:
        """The result of a method; what it raises becomes a typed error."""
        try:
            return await method(*arguments)
        except BasinError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever the library raises
            typed = object_error(error, operation, name, self.url)
        # Raised here, so that it keeps no hold on the library's error, whose text quotes request and answer.
        raise typed

    async def _get(self, wanted: ByteRange) -> Any:
        """What becomes the bytes of a range by one copy."""
        name, start, stop = wanted
        checked_name(name)
        if start < 0 or (stop is not None and stop < start):
            raise InvalidArgument(f"not a range of bytes: {start} to {stop}", object=name)
        return await self._guarded("get", name, self._get_range, name, start, stop)

    async def _get_range(self, name: str, start: int, stop: int | None) -> Any:
        if not self._ranges_work:
            return bytes(await self._within(self._get_body(name, 0, None), PUT_SIZE_MAX))[start:stop]
        # HTTP has no empty range: one byte is asked for then, so that a missing object is noticed.
        asked = stop if stop is None else max(stop, start + 1)
        try:
            data = await self._within(
                self._get_body(name, start, asked), PUT_SIZE_MAX if asked is None else asked - start
            )
        except Exception as error:
            if _NOT_PARTIAL in str(error):
                self._ranges_work = False
                return await self._get_range(name, start, stop)
            if (start or asked is not None) and answered_code(error) in ("InvalidRange", "416"):
                return b""  # The object ends before the range begins, or is empty.
            raise
        return b"" if stop == start else data

    async def _get_body(self, name: str, start: int, stop: int | None) -> Any:
        wanted: Any = None
        if stop is not None:
            wanted = {"range": (start, stop)}
        elif start:
            wanted = {"range": {"offset": start}}
        answer = await self._obstore.get_async(self._clients.get(), name, options=wanted)
        body = await answer.bytes_async()
        first, end = answer.range
        if len(body) != end - first:
            text = f"get {name!r} at {self.url}: the answer is shorter than it says"
            raise StorageUnavailable(text, object=name, operation="get", reason="connection")
        return body

    async def _put(self, operation: str, name: str, data: bytes, storage_class: str = "") -> None:
        checked_name(name)
        if len(data) > PUT_SIZE_MAX:
            raise InvalidArgument(f"{operation} {name!r}: {len(data)} bytes are too many for one request", object=name)
        mode = "create" if operation == "put_new" else "overwrite"

        async def send() -> None:
            client = self._clients.get(len(data))
            sending = self._obstore.put_async(
                client, name, data, mode=mode, use_multipart=False, attributes=_attributes(storage_class)
            )
            await self._within(sending, len(data))

        await self._guarded(operation, name, send)

    def _put_parts(self, name: str, parts: _Parts, storage_class: str) -> None:
        async def send() -> None:
            client = self._clients.get(parts.part_size)
            sending = asyncio.ensure_future(
                self._obstore.put_async(
                    client,
                    name,
                    parts,
                    attributes=_attributes(storage_class),
                    use_multipart=True,
                    chunk_size=parts.part_size,
                    max_concurrency=min(_PARTS_IN_FLIGHT, self._policy.concurrency),
                )
            )
            # An upload that is cancelled is not aborted, but one whose file cannot be read is: see `_Parts.end`.
            sending.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.shield(sending)

        try:
            self._run(self._guarded("put_file", name, send))
        finally:
            parts.end()

    async def _delete(self, names: _Batch) -> None:
        async def remove(batch: _Batch) -> None:
            await self._guarded("delete", batch[0], self._delete_batch, batch)

        batches = [names[start : start + _DELETE_BATCH] for start in range(0, len(names), _DELETE_BATCH)]
        await each(batches, remove, min(len(batches), self._policy.concurrency))

    async def _delete_batch(self, names: _Batch) -> None:
        if len(names) == 1 or not self._batches_work:
            await self._delete_one_by_one(names)
            return
        refused: BasinError | None = None
        try:
            await self._within(self._obstore.delete_async(self._clients.get(), names))
        except Exception as error:  # noqa: BLE001  # what is not harmless is raised
            code = answered_code(error)
            if code in _NO_BATCHES:
                self._batches_work = False
            elif code not in _ABSENT:
                refused_one = self._clients.name_of(refused_path(error)) or names[0]
                refused = object_error(error, "delete", refused_one, self.url)
        else:
            return
        if refused is not None:
            raise refused
        # Of an answer with several refusals the library tells one: after a harmless one, the others are looked for.
        await self._delete_one_by_one(names)

    async def _delete_one_by_one(self, names: _Batch) -> None:
        client = self._clients.get(one_by_one=True)

        async def remove(name: str) -> None:
            refused: BasinError | None = None
            try:
                await self._within(self._obstore.delete_async(client, name))
            except Exception as error:  # noqa: BLE001  # what is not harmless is raised
                if answered_code(error) not in _ABSENT:
                    refused = object_error(error, "delete", name, self.url)
            if refused is not None:
                raise refused

        await each(names, remove, min(len(names), self._policy.concurrency))


def _attributes(storage_class: str) -> dict[str, str] | None:
    return {"Storage-Class": storage_class} if storage_class else None


_runtime: Final = _Runtime()
_stores: weakref.WeakSet[ObstoreObjects] = weakref.WeakSet()


def _abandon_all() -> None:
    """In a forked child: nothing may use the clients. To let them go is harmless: it wakes threads that are gone."""
    _runtime.after_fork()
    for store in list(_stores):
        store._closed = True


os.register_at_fork(after_in_child=_abandon_all)

"""`FsspecObjects`: the object port over fsspec, for S3 through s3fs and for every other file system that fsspec knows.

Invariants:

- One call is one attempt: the repeating of s3fs, botocore and aiohttp is switched off, and no listing is cached,
  whatever the storage options say. Other file systems of fsspec repeat as they please.
- On S3, `put_new` is one PUT with `If-None-Match: *`; a library that would drop the condition is refused. Elsewhere
  it is as atomic as the file system's own `mode="create"`: not at all for `file:` and `memory:`, which are dummies.
- An error leaves only through `basin.storage.object_errors`, and no text holds what stands in the storage options.
- Requests run on fsspec's own event loop and its thread; a caller waits, and when it is interrupted its request is
  cancelled. A forked child has no such thread: there every inherited handle raises `BasinClosed`.

The one module that imports fsspec. s3fs is loaded with the first `s3:` URL. Imports `basin.errors` and its neighbours.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import fsspec
from fsspec.asyn import get_loop

from basin.errors import BasinClosed, BasinError, InvalidArgument, MissingDependency
from basin.storage.fsspec_clients import ObjectClient, PlainClient, S3Client, each, read_exactly
from basin.storage.naming import checked_folder, checked_name, is_name
from basin.storage.object_errors import object_error, refused
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectStore, Readiness
from basin.storage.requests import RequestPolicy
from basin.storage.translation import translated

_Result = TypeVar("_Result")
_Options: TypeAlias = dict[str, Any]
_NO_CACHE: Final[_Options] = {"use_listings_cache": False, "skip_instance_cache": True}
_Names: TypeAlias = Sequence[str]
_Found: TypeAlias = list[bytes | BasinError]  # In the class below, `list` is a method.


def open_fsspec(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> FsspecObjects:
    """The objects below `url` (`"s3://bucket/prefix"`, or any protocol of fsspec). Sends no request.

    `storage_options` are those of the file system of fsspec, for S3 those of s3fs (`key`, `secret`, `endpoint_url`,
    `client_kwargs`, `config_kwargs` …); they win over what `policy` says, but not over what correctness needs.

    Raises `InvalidArgument` for a URL or option that cannot be, `MissingDependency` where the protocol's package is not
    installed, `StorageError` where no credentials are found.
    """
    protocol, separator, rest = url.partition("://")
    if not separator or not protocol:
        raise InvalidArgument("not a URL with a protocol: write s3://bucket/prefix", argument="url")
    is_s3 = protocol in ("s3", "s3a")
    shown = _for_people(protocol, rest)
    kind = _filesystem_class(protocol)
    if is_s3:
        _check_place(rest, shown)
    given = dict(storage_options or {})
    options = _s3_options(given, policy) if is_s3 else {**given, **_NO_CACHE}
    try:
        filesystem = kind(**options)
        root = str(kind._strip_protocol(url)).rstrip("/")
        client: ObjectClient = S3Client(filesystem, root, policy) if is_s3 else PlainClient(filesystem, policy)
        _wait_for(client.connect(), get_loop())
    except (KeyError, TypeError, ValueError) as error:
        refused: BasinError = _unfit_options(error, given, shown)
    except Exception as error:  # noqa: BLE001  # whatever a file system raises
        refused = object_error(error, "open", "", shown)
    else:
        return FsspecObjects(client, root, shown)
    # Raised here, so that it keeps no hold on the library's error, which may quote the options: a secret among them.
    raise refused


def _for_people(protocol: str, rest: str) -> str:
    """A URL without user, password and query."""
    host, slash, path = rest.partition("?")[0].partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def _check_place(rest: str, shown: str) -> None:
    """Raise `InvalidArgument` unless the rest of an S3 URL is a bucket with or without a prefix."""
    parts = rest.rstrip("/").split("/")
    if "@" in parts[0]:
        raise InvalidArgument("credentials do not belong into the URL: give them as storage options", argument="url")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidArgument(f"not the place of a bucket: {shown} (write s3://bucket/prefix)", argument="url")


def _unfit_options(error: Exception, given: _Options, shown: str) -> InvalidArgument:
    """The error for options that the file system does not take; it names the option, but never its value."""
    groups = [given, given.get("config_kwargs"), given.get("client_kwargs")]
    names = [str(name) for group in groups if isinstance(group, Mapping) for name in group]
    named = next((f" {name!r}" for name in names if f"'{name}'" in str(error)), "s: check the form of the endpoint")
    text = f"{shown}: the file system does not accept the storage option{named}"
    return InvalidArgument(text, argument="storage_options")


def _filesystem_class(protocol: str) -> Any:
    """The class of a protocol's file system. Raises `InvalidArgument`, `MissingDependency`."""
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as error:
        raise InvalidArgument(f"no file system is known for {protocol!r} URLs", argument="url") from error
    except ImportError as error:
        package = "s3fs" if protocol in ("s3", "s3a") else f"fsspec[{protocol}]"
        hint = "pip install 'basin-store[s3]' s3fs" if package == "s3fs" else f"pip install {package!r}"
        raise MissingDependency(f"{protocol}: URLs need another package: {hint}", package=package) from error


def _s3_options(given: Mapping[str, Any], policy: RequestPolicy) -> _Options:
    """The options of s3fs: those given, above the policy's and below what one attempt and fresh lists need."""
    config: _Options = {
        "connect_timeout": policy.connect_timeout_s,
        "read_timeout": policy.read_timeout_s,
        "max_pool_connections": policy.concurrency,
        **(given.get("config_kwargs") or {}),
    }
    config["retries"] = {"total_max_attempts": 1}
    options: _Options = {**given, "config_kwargs": config, **_NO_CACHE}
    for unwanted in ("asynchronous", "loop", "version_aware"):
        options.pop(unwanted, None)
    return options


def _wait_for(work: Coroutine[Any, Any, _Result], loop: asyncio.AbstractEventLoop) -> _Result:
    """The result of a coroutine that runs on fsspec's loop; it is cancelled if the waiting is interrupted."""
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


class FsspecObjects(ObjectStore):
    """The objects below one prefix, through one file system of fsspec. Safe for several threads.

    `client` sends the requests, `root` is the prefix as it understands it, `url` the address for people.
    """

    def __init__(self, client: ObjectClient, root: str, url: str) -> None:
        self.url = url
        self.knows_classes = client.knows_classes
        self._client = client
        self._root = root
        self._loop = get_loop()
        self._closed = False
        _stores.add(self)

    def __repr__(self) -> str:
        return f"FsspecObjects({self.url!r})"

    def get(self, wanted: ByteRange) -> bytes:
        return self._run(self._get(wanted))

    def get_many(self, wanted: Sequence[ByteRange]) -> _Found:
        found: _Found = [b""] * len(wanted)

        async def fetch(index: int) -> None:
            try:
                found[index] = await self._get(wanted[index])
            except BasinError as error:
                found[index] = error

        self._run(each(range(len(wanted)), fetch, min(len(wanted), self._client.policy.concurrency)))
        return found

    def put(self, name: str, data: bytes) -> None:
        self._run(self._put("put", name, data))

    def put_new(self, name: str, data: bytes) -> None:
        self._run(self._put("put_new", name, data))

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        target = self._path(name)
        if storage_class and not self.knows_classes:
            raise InvalidArgument(f"put_file {name!r}: objects have no storage classes here", object=name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise translated(error, "open", name, str(path)) from error
        try:
            size = os.fstat(descriptor).st_size
            if size <= PUT_SIZE_MAX:
                self._run(self._put("put_file", name, read_exactly(descriptor, 0, size), storage_class))
            else:
                put_large = self._client.put_large
                self._run(self._guarded("put_file", name, put_large, target, descriptor, size, storage_class))
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int:
        return self._run(self._guarded("size", name, self._client.size, self._path(name)))

    def readiness(self, name: str) -> Readiness:
        return self._run(self._guarded("size", name, self._client.readiness, self._path(name)))

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._run(self._guarded("restore", name, self._client.restore, self._path(name), days, tier))

    def delete(self, names: _Names) -> None:
        paths = {self._path(name): name for name in names}
        if paths:
            self._run(self._delete(paths))

    def list(self, folder: str) -> Listing:
        path = f"{self._root}/{folder}" if checked_folder(folder) else self._root
        listing = self._run(self._guarded("list", folder, self._client.list, path))
        return Listing(
            sorted(info for info in listing.objects if is_name(info.name)),
            sorted({name for name in listing.folders if is_name(name)}),
        )

    def close(self) -> None:
        if self._closed:
            return
        try:
            self._run(self._client.close())
        finally:
            self._closed = True

    def _path(self, name: str) -> str:
        return f"{self._root}/{checked_name(name)}"

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        if self._closed:
            work.close()  # It has not begun, and would complain of never having been awaited.
            raise BasinClosed(f"the store at {self.url} is closed, or was opened before a fork", object="")
        return _wait_for(work, self._loop)

    async def _guarded(
        self, operation: str, name: str, method: Callable[..., Awaitable[_Result]], *arguments: Any
    ) -> _Result:
        """The result of a client's method; what it raises becomes a typed error."""
        try:
            return await method(*arguments)
        except Exception as error:
            typed = object_error(error, operation, name, self.url)
            if typed is error:
                raise
        # Raised here, so that it keeps no hold on the library's error: that holds the request with its headers, and an
        # error that is pickled on its way out of a worker may take along what it holds.
        raise typed

    async def _get(self, wanted: ByteRange) -> bytes:
        name, start, stop = wanted
        path = self._path(name)
        if start < 0 or (stop is not None and stop < start):
            raise InvalidArgument(f"not a range of bytes: {start} to {stop}", object=name)
        return await self._guarded("get", name, self._client.get, path, start, stop)

    async def _put(self, operation: str, name: str, data: bytes, storage_class: str = "") -> None:
        path = self._path(name)
        if len(data) > PUT_SIZE_MAX:
            raise InvalidArgument(f"{operation} {name!r}: {len(data)} bytes are too many for one request", object=name)
        if operation == "put_new":
            await self._guarded(operation, name, self._client.put_new, path, data)
        else:
            await self._guarded(operation, name, self._client.put, path, data, storage_class)

    async def _delete(self, paths: dict[str, str]) -> None:
        async def remove(batch: list[str]) -> None:
            code, path = await self._guarded("delete", paths[batch[0]], self._client.delete, batch)
            if code:
                raise refused(code, "delete", paths.get(path, path), self.url)

        ordered = [*paths]
        batch_size = self._client.delete_batch
        batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
        await each(batches, remove, min(len(batches), self._client.policy.concurrency))


_stores: weakref.WeakSet[FsspecObjects] = weakref.WeakSet()
_inherited: list[ObjectClient] = []


def _abandon_all() -> None:
    """In a forked child: nothing may use the connections, nor close them, as the parent's loop still listens there."""
    for store in list(_stores):
        store._closed = True
        _inherited.append(store._client)


os.register_at_fork(after_in_child=_abandon_all)

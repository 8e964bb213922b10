"""The requests that `fsspec_objects` sends, as coroutines: to S3 through s3fs's client, or to any other file system.

Invariants:

- A coroutine sends one request, once, and raises what the libraries raise; `fsspec_objects` translates it.
- Every request ends: after the policy's deadline, and the time that a slow line may take for its body.
- A file goes up in parts with at most `_PARTS_IN_FLIGHT` of them in memory; an upload that fails is aborted.

The file systems come from outside: neither fsspec nor s3fs is imported here. Imports `basin.errors` and its neighbours.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeAlias, TypeVar

from basin.errors import InvalidArgument, MissingDependency, StorageError
from basin.storage.archive import ALREADY_RESTORING, readiness_of, restore_request
from basin.storage.object_errors import answered_code
from basin.storage.objects import PUT_SIZE_MAX, READABLE, Listing, ObjectInfo, Readiness
from basin.storage.requests import RequestPolicy

_PART_SIZE: Final = 16 << 20
_PARTS_MAX: Final = 10_000  # S3's limit for one upload.
_PARTS_IN_FLIGHT: Final = 4  # 64 MiB of memory: as much as the largest single PUT takes.
_DELETE_BATCH: Final = 1000  # S3's limit for one request, as for a page of a list.
_SLOWEST_RATE: Final = 64 << 10  # Bytes a second that a body may take beyond the deadline: a slow line is no dead one.

# Services whose answer to a batch of deletions means that they know none: names then go one by one.
_NO_BATCHES: Final = frozenset(
    {"MissingContentMD5", "NotImplemented", "MethodNotAllowed", "InvalidRequest", "501", "405"}
)
_CHECKSUMS: Final = ("ChecksumCRC32", "ChecksumCRC32C", "ChecksumCRC64NVME", "ChecksumSHA1", "ChecksumSHA256")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_Options: TypeAlias = dict[str, Any]
_Paths: TypeAlias = list[str]  # In the classes below, `list` is a method.
_Parts: TypeAlias = list[_Options]
_Refused: TypeAlias = tuple[str, str]


async def each(items: Iterable[_Item], work: Callable[[_Item], Awaitable[None]], concurrency: int) -> None:
    """Do `work` for every item, at most `concurrency` at once. The first failure is raised when all others ended."""
    shared = iter(items)

    async def one_after_the_other() -> None:
        for item in shared:
            await work(item)

    tasks = [asyncio.ensure_future(one_after_the_other()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def read_exactly(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes of a file. Raises `StorageError` if it ends before: it was changed while it was being stored."""
    pieces: list[bytes] = []
    end = offset + size
    while offset < end:
        piece = os.pread(descriptor, end - offset, offset)
        if not piece:
            raise StorageError("the file became shorter while it was being stored", operation="put_file")
        pieces.append(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class ObjectClient(abc.ABC):
    """The requests themselves, as coroutines over full paths. They raise what the libraries raise."""

    delete_batch = 1
    knows_classes = False

    def __init__(self, policy: RequestPolicy) -> None:
        self.policy = policy

    async def within(self, work: Awaitable[_Result], size: int = 0) -> _Result:
        """The result of one request with a body of `size` bytes; `TimeoutError` if it trickles beyond all patience."""
        async with asyncio.timeout(self.policy.deadline_s + size / _SLOWEST_RATE):
            return await work

    @abc.abstractmethod
    async def connect(self) -> None:
        """Prepare what needs no request."""

    @abc.abstractmethod
    async def get(self, path: str, start: int, stop: int | None) -> bytes:
        """The bytes of a range, fewer at the object's end."""

    @abc.abstractmethod
    async def put(self, path: str, data: bytes, storage_class: str = "") -> None:
        """Store a body in one request. No `storage_class` where objects have none."""

    @abc.abstractmethod
    async def put_new(self, path: str, data: bytes) -> None:
        """Store a body in one request, if the path is free."""

    @abc.abstractmethod
    async def put_large(self, path: str, descriptor: int, size: int, storage_class: str = "") -> None:
        """Store a file in parts."""

    @abc.abstractmethod
    async def readiness(self, path: str) -> Readiness:
        """Whether an object can be read."""

    @abc.abstractmethod
    async def restore(self, path: str, days: int, tier: str) -> None:
        """Ask that an archived object be made readable."""

    @abc.abstractmethod
    async def size(self, path: str) -> int:
        """Length of an object."""

    @abc.abstractmethod
    async def delete(self, paths: _Paths) -> _Refused:
        """Remove at most `delete_batch` objects. The service's code for one that it refused, and its path, or `""`."""

    @abc.abstractmethod
    async def list(self, path: str) -> Listing:
        """What lies directly below, in any order."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Close the connections."""


class S3Client(ObjectClient):
    """S3 through the methods of s3fs's own client: s3fs's file operations send HEAD requests that nobody asked for."""

    delete_batch = _DELETE_BATCH
    knows_classes = True

    def __init__(self, filesystem: Any, root: str, policy: RequestPolicy) -> None:
        super().__init__(policy)
        self._filesystem = filesystem
        self._bucket, prefix, _ = filesystem.split_path(root)
        self._key_start = len(root) - len(prefix) if prefix else len(root) + 1
        self._batches_work = True

    async def connect(self) -> None:
        """Load the service's description and the credentials. Sends nothing to the bucket."""
        self._filesystem.retries = 1
        _send_once(await self._filesystem.set_session())

    async def _call(self, method: str, size: int = 0, **arguments: Any) -> Any:
        """One request; `size` is that of its body or its answer."""
        return await self.within(self._filesystem._call_s3(method, Bucket=self._bucket, **arguments), size)

    def _key(self, path: str) -> str:
        return path[self._key_start :]

    async def get(self, path: str, start: int, stop: int | None) -> bytes:
        size = PUT_SIZE_MAX if stop is None else stop - start
        return await self.within(self._get(path, start, stop), size)

    async def _get(self, path: str, start: int, stop: int | None) -> bytes:
        wanted = _range_header(start, stop)
        try:
            answer = await self._filesystem._call_s3("get_object", Bucket=self._bucket, Key=self._key(path), **wanted)
        except Exception as error:
            if wanted and answered_code(error) in ("InvalidRange", "416"):
                return b""  # The object ends before the range begins, or is empty.
            raise
        async with answer["Body"] as body:
            data: bytes = await body.read()
        return _cut(data, answer.get("ContentRange"), start, stop) if wanted else data

    async def put(self, path: str, data: bytes, storage_class: str = "") -> None:
        await self._call("put_object", len(data), Key=self._key(path), Body=data, **_class_argument(storage_class))

    async def put_new(self, path: str, data: bytes) -> None:
        self._require_conditions()
        await self._call("put_object", len(data), Key=self._key(path), Body=data, IfNoneMatch="*")

    def _require_conditions(self) -> None:
        """s3fs silently drops an argument that its botocore does not know: this PUT would then overwrite."""
        if not self._filesystem._filter_kwargs(self._filesystem._s3.put_object, {"IfNoneMatch": "*"}):
            raise MissingDependency(
                "the installed botocore knows no conditional PUT: pip install -U s3fs botocore", package="s3fs"
            )

    async def put_large(self, path: str, descriptor: int, size: int, storage_class: str = "") -> None:
        key = self._key(path)
        begun = await self._call("create_multipart_upload", Key=key, **_class_argument(storage_class))
        upload = begun["UploadId"]
        try:
            parts = await self._put_parts(key, upload, descriptor, size)
            await self._call("complete_multipart_upload", Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
        except BaseException:
            with contextlib.suppress(
                Exception
            ):  # As far as the store can be reached; the first error is the one to tell.
                await self._call("abort_multipart_upload", Key=key, UploadId=upload)
            raise

    async def _put_parts(self, key: str, upload: str, descriptor: int, size: int) -> _Parts:
        part_size = max(_PART_SIZE, -(-size // _PARTS_MAX))
        count = -(-size // part_size)
        parts: list[_Options] = [{} for _ in range(count)]

        async def send(index: int) -> None:
            offset = index * part_size
            length = min(part_size, size - offset)
            data = await asyncio.to_thread(read_exactly, descriptor, offset, length)
            answer = await self._call("upload_part", length, Key=key, UploadId=upload, PartNumber=index + 1, Body=data)
            checksums = {field: answer[field] for field in _CHECKSUMS if field in answer}
            parts[index] = {"PartNumber": index + 1, "ETag": answer["ETag"], **checksums}

        await each(range(count), send, min(count, _PARTS_IN_FLIGHT, self.policy.concurrency))
        return parts

    async def readiness(self, path: str) -> Readiness:
        return readiness_of(await self._call("head_object", Key=self._key(path)))

    async def restore(self, path: str, days: int, tier: str) -> None:
        try:
            await self._call("restore_object", Key=self._key(path), RestoreRequest=restore_request(days, tier))
        except Exception as error:
            if answered_code(error) != ALREADY_RESTORING:
                raise

    async def size(self, path: str) -> int:
        answer = await self._call("head_object", Key=self._key(path))
        return int(answer["ContentLength"])

    async def delete(self, paths: _Paths) -> _Refused:
        if len(paths) > 1 and self._batches_work:
            try:
                return await self._delete_batch(paths)
            except Exception as error:
                if answered_code(error) not in _NO_BATCHES:
                    raise
                self._batches_work = False

        async def remove(path: str) -> None:
            await self._call("delete_object", Key=self._key(path))

        await each(paths, remove, min(len(paths), self.policy.concurrency))
        return "", ""

    async def _delete_batch(self, paths: _Paths) -> _Refused:
        objects = [{"Key": self._key(path)} for path in paths]
        answer = await self._call("delete_objects", Delete={"Objects": objects, "Quiet": True})
        for error in answer.get("Errors", ()):
            if error.get("Code") != "NoSuchKey":
                return str(error.get("Code")), f"{self._bucket}/{error.get('Key')}"
        return "", ""

    async def list(self, path: str) -> Listing:
        key = self._key(path)
        prefix = f"{key}/" if key else ""
        objects: list[ObjectInfo] = []
        folders: list[str] = []
        more: _Options = {}
        while True:
            page = await self._call("list_objects_v2", Prefix=prefix, Delimiter="/", MaxKeys=1000, **more)
            objects += (ObjectInfo(one["Key"][len(prefix) :], one["Size"]) for one in page.get("Contents", ()))
            folders += (one["Prefix"][len(prefix) : -1] for one in page.get("CommonPrefixes", ()))
            if not page.get("IsTruncated"):
                return Listing(objects, folders)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def close(self) -> None:
        await self._filesystem._s3creator.__aexit__(None, None, None)


def _send_once(client: Any) -> None:
    """Stop aiohttp from sending a request twice by itself.

    It does so, for a PUT too, when a connection breaks that was in use before: of a PUT that must create, the lost
    first answer says "created" and the second "exists". aiohttp has no public switch; where aiobotocore is built
    otherwise than expected nothing is changed, and callers are prepared for the false "exists" anyway.
    """
    http = getattr(getattr(client, "_endpoint", None), "http_session", None)
    session_for = getattr(http, "_get_session", None)
    if http is None or session_for is None:
        return

    async def session_that_sends_once(proxy_url: Any) -> Any:
        session = await session_for(proxy_url)
        if hasattr(session, "_retry_connection"):
            session._retry_connection = False
        return session

    http._get_session = session_that_sends_once


def _class_argument(storage_class: str) -> _Options:
    return {"StorageClass": storage_class} if storage_class else {}


def _range_header(start: int, stop: int | None) -> _Options:
    """The argument that asks for a range; none for a whole object, whose size nobody needs to know.

    HTTP has no empty range: one byte is asked for then, and cut off later, so that a missing object is noticed.
    """
    if start == 0 and stop is None:
        return {}
    last = "" if stop is None else max(stop - 1, start)
    return {"Range": f"bytes={start}-{last}"}


def _cut(data: bytes, content_range: str | None, start: int, stop: int | None) -> bytes:
    """The range out of an answer: servers that know no ranges send the whole object, without a `Content-Range`."""
    if content_range is None:
        return data[start:stop]
    if not content_range.startswith(f"bytes {start}-"):
        raise StorageError(f"the service answered another range than was asked for, from {start}", operation="get")
    return data if stop is None else data[: stop - start]


class PlainClient(ObjectClient):
    """Any other file system of fsspec: its coroutines where it has them, else its methods in threads of the loop."""

    def __init__(self, filesystem: Any, policy: RequestPolicy) -> None:
        super().__init__(policy)
        self._filesystem = filesystem

    async def connect(self) -> None:
        """Nothing: the file system connects with its first request."""

    async def _call(self, method: str, *arguments: Any, size: int = 0, **options: Any) -> Any:
        if self._filesystem.async_impl:
            work = getattr(self._filesystem, f"_{method}")(*arguments, **options)
        else:
            work = asyncio.to_thread(getattr(self._filesystem, method), *arguments, **options)
        return await self.within(work, size)

    async def get(self, path: str, start: int, stop: int | None) -> bytes:
        if stop == start:
            await self.size(path)
            return b""  # Nobody agrees on what an empty range is.
        size = PUT_SIZE_MAX if stop is None else stop - start
        data: bytes = await self._call("cat_file", path, start=start or None, end=stop, size=size)
        return data

    async def put(self, path: str, data: bytes, storage_class: str = "") -> None:
        await self._call("pipe_file", path, data, size=len(data))

    async def put_new(self, path: str, data: bytes) -> None:
        await self._call("pipe_file", path, data, mode="create", size=len(data))

    async def put_large(self, path: str, descriptor: int, size: int, storage_class: str = "") -> None:
        # The file that is open, and not what may have taken its name since.
        await self._call("put_file", f"/dev/fd/{descriptor}", path, size=size)

    async def readiness(self, path: str) -> Readiness:
        return READABLE

    async def restore(self, path: str, days: int, tier: str) -> None:
        raise InvalidArgument("nothing has to be restored here")

    async def size(self, path: str) -> int:
        found = await self._call("info", path)
        if found["type"] != "file":
            raise FileNotFoundError
        return int(found["size"])

    async def delete(self, paths: _Paths) -> _Refused:
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                await self._call("rm_file", path)
        return "", ""

    async def list(self, path: str) -> Listing:
        self._filesystem.invalidate_cache()
        try:
            found = await self._call("ls", path, detail=True)
        except FileNotFoundError:
            return Listing([], [])
        named = [(one, str(one["name"]).rstrip("/")) for one in found]
        names = [(one, full.rpartition("/")[2]) for one, full in named if full != path]  # Of a file, itself is listed.
        return Listing(
            [ObjectInfo(name, int(one["size"])) for one, name in names if one["type"] == "file"],
            [name for one, name in names if one["type"] == "directory"],
        )

    async def close(self) -> None:
        """Nothing: fsspec closes these with the last reference."""

"""`open_single`: one file at a URL of fsspec as an object store with that one object, whatever it is called.

Invariants:

- The URL goes to the file system as it is, with its capitals and its query; the name asked for means nothing.
- What a web server answers is an error by its status, not a broken connection: it is not asked again in vain.

Only reading makes sense here. Imports its neighbours; fsspec itself is imported by `fsspec_objects` alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from basin.errors import StorageError
from basin.storage.fsspec_objects import FsspecObjects, open_fsspec
from basin.storage.requests import RequestPolicy

_Result = TypeVar("_Result")
_MISSING: Final = (404, 410)
_DENIED: Final = (401, 403)
_IN_PASSING: Final = (408, 425, 429)


class SingleObject(FsspecObjects):
    """The file at the URL that a store was opened with."""

    def __init__(self, store: FsspecObjects) -> None:
        super().__init__(store._client, store._root, store.url)

    def _path(self, name: str) -> str:
        return self._root

    async def _guarded(
        self, operation: str, name: str, method: Callable[..., Awaitable[_Result]], *arguments: Any
    ) -> _Result:
        async def answered(*given: Any) -> _Result:
            try:
                return await method(*given)
            except Exception as error:
                status = _status(error)
                if 400 <= status < 500 and status not in _IN_PASSING:
                    raise _refusal(status, operation, self.url) from None
                raise

        return await super()._guarded(operation, name, answered, *arguments)


def _status(error: BaseException | None) -> int:
    """The HTTP status in an exception of aiohttp, or in what it was raised from; 0 if there was no answer."""
    while error is not None:
        status = getattr(error, "status", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return 0


def _refusal(status: int, operation: str, url: str) -> Exception:
    if status in _MISSING:
        return FileNotFoundError(url)
    if status in _DENIED:
        return PermissionError(url)
    text = f"{operation} at {url}: the server refused it ({status})"
    return StorageError(text, object=url, operation=operation, status=status)


def open_single(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> SingleObject:
    """The file at `url`. Sends no request; raises what `open_fsspec` does."""
    return SingleObject(open_fsspec(url, storage_options, policy))

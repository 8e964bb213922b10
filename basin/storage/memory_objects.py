"""`MemoryObjects`: the object port without a bucket, for tests, trials and examples.

- Stores of one process that were opened with `memory_objects` and the same URL see the same objects, also after all of
  them were closed; nothing outlives the process.
- Every call is atomic: one mutex for one place. So `put_new` has one winner, and a list is of one moment.
- Closing a store closes it alone, not its place.

Durable is what the process is. Imports `basin.errors` and its own package.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from basin.errors import AlreadyExists, BasinClosed, InvalidArgument, ObjectMissing
from basin.storage.naming import checked_folder, checked_name
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectInfo, ObjectStore
from basin.storage.translation import translated

_PROTOCOL: Final = "memory://"


class _Place:
    """The objects that the stores of one URL share, and the mutex under which they are touched."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.bodies: dict[str, bytes] = {}


_places: Final[dict[str, _Place]] = {}
_places_mutex: Final = threading.Lock()


def memory_objects(url: str) -> MemoryObjects:
    """A store on the objects of `url` (`memory://` and a name), which begins empty. Safe for several threads.

    Raises `InvalidArgument` for another kind of URL. Slashes at the end of a URL mean nothing.
    """
    name = url.removeprefix(_PROTOCOL).strip("/")
    if not url.startswith(_PROTOCOL) or not name:
        raise InvalidArgument(f"not a place in memory: {url!r} (expected memory:// and a name)", argument="url")
    with _places_mutex:
        place = _places.setdefault(name, _Place())
    return MemoryObjects(_PROTOCOL + name, place)


class MemoryObjects(ObjectStore):
    """Objects in memory: those of `place`, or its own that nobody else sees."""

    def __init__(self, url: str = _PROTOCOL, place: _Place | None = None) -> None:
        self.url = url
        self._place = place or _Place()
        self._closed = False

    def __repr__(self) -> str:
        return f"MemoryObjects({self.url!r})"

    def get(self, wanted: ByteRange) -> bytes:
        name, start, stop = wanted
        if start < 0 or (stop is not None and stop < start):
            raise InvalidArgument(f"not a range of bytes: {start} to {stop}", object=name)
        return self._body("get", name)[start:stop]

    def put(self, name: str, data: bytes) -> None:
        self._store("put", name, data)

    def put_new(self, name: str, data: bytes) -> None:
        self._store("put_new", name, data)

    def put_file(self, name: str, path: Path) -> None:
        self._require_open(checked_name(name))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise translated(error, "open", name, str(path)) from error
        with self._place.mutex:
            self._place.bodies[name] = data

    def size(self, name: str) -> int:
        return len(self._body("size", name))

    def delete(self, names: Sequence[str]) -> None:
        wanted = [checked_name(name) for name in names]
        self._require_open("")
        with self._place.mutex:
            for name in wanted:
                self._place.bodies.pop(name, None)

    def list(self, folder: str) -> Listing:
        prefix = f"{folder}/" if checked_folder(folder) else ""
        self._require_open(folder)
        with self._place.mutex:
            below = [
                (name[len(prefix) :], len(body)) for name, body in self._place.bodies.items() if name.startswith(prefix)
            ]
        objects = sorted(ObjectInfo(name, size) for name, size in below if "/" not in name)
        return Listing(objects, sorted({name.partition("/")[0] for name, _ in below if "/" in name}))

    def close(self) -> None:
        self._closed = True

    def _require_open(self, name: str) -> None:
        if self._closed:
            raise BasinClosed(f"the store at {self.url} is closed", object=name)

    def _body(self, operation: str, name: str) -> bytes:
        self._require_open(checked_name(name))
        with self._place.mutex:
            body = self._place.bodies.get(name)
        if body is None:
            raise ObjectMissing(
                f"{operation} {name!r} at {self.url}: there is no such object", object=name, operation=operation
            )
        return body

    def _store(self, operation: str, name: str, data: bytes) -> None:
        self._require_open(checked_name(name))
        if len(data) > PUT_SIZE_MAX:
            raise InvalidArgument(f"{operation} {name!r}: {len(data)} bytes are too many for one request", object=name)
        with self._place.mutex:
            if operation == "put_new" and name in self._place.bodies:
                raise AlreadyExists(
                    f"{operation} {name!r} at {self.url}: an object of this name exists already",
                    object=name,
                    operation=operation,
                )
            self._place.bodies[name] = data

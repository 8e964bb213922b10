"""`MemoryObjects`: the object port without a bucket, for tests, trials and examples.

- Stores of one process that were opened with `memory_objects` and the same URL see the same objects, also after all of
  them were closed; nothing outlives the process.
- Every call is atomic: one mutex for one place. So `put_new` has one winner, and a list is of one moment.
- Closing a store closes it alone, not its place.
- Bodies have storage classes, as in S3: one of an archive class is not read before it was restored, which takes
  `restore_s`; for how many days is no matter here.

Durable is what the process is. Imports `basin.errors` and its own package.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from basin.errors import AlreadyExists, BasinClosed, InvalidArgument, ObjectMissing
from basin.storage.archive import ARCHIVE_CLASSES
from basin.storage.naming import checked_folder, checked_name
from basin.storage.object_errors import refused
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectInfo, ObjectStore, Readiness
from basin.storage.translation import translated

_PROTOCOL: Final = "memory://"


class _Place:
    """The objects that the stores of one URL share, and the mutex under which they are touched."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.bodies: dict[str, bytes] = {}
        self.classes: dict[str, str] = {}
        """Storage classes of the bodies that were given one."""
        self.restored_s: dict[str, float] = {}
        """When archived bodies can be read that were asked for."""


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

    knows_classes = True
    restore_s = 0.05
    """Seconds until a body that is restored can be read."""

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
        body = self._body("get", name)
        found = self._readiness(name)
        if found.state != "readable":
            raise refused("InvalidObjectState", "get", name, self.url, status=403, tier=found.storage_class)
        return body[start:stop]

    def put(self, name: str, data: bytes) -> None:
        self._store("put", name, data)

    def put_new(self, name: str, data: bytes) -> None:
        self._store("put_new", name, data)

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        self._require_open(checked_name(name))
        try:
            data = path.read_bytes()
        except OSError as error:
            raise translated(error, "open", name, str(path)) from error
        with self._place.mutex:
            self._replace(name, data, storage_class)

    def readiness(self, name: str) -> Readiness:
        self._body("size", name)
        return self._readiness(name)

    def restore(self, name: str, *, days: int, tier: str) -> None:
        self._body("restore", name)
        with self._place.mutex:
            if self._place.classes.get(name) not in ARCHIVE_CLASSES:
                raise refused("InvalidObjectState", "restore", name, self.url, status=403)
            self._place.restored_s.setdefault(name, time.monotonic() + self.restore_s)

    def size(self, name: str) -> int:
        return len(self._body("size", name))

    def delete(self, names: Sequence[str]) -> None:
        wanted = [checked_name(name) for name in names]
        self._require_open("")
        with self._place.mutex:
            for name in wanted:
                for known in (self._place.bodies, self._place.classes, self._place.restored_s):
                    known.pop(name, None)

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
            self._replace(name, data)

    def _replace(self, name: str, data: bytes, storage_class: str = "") -> None:
        """Store a body as a new one. Under the mutex."""
        self._place.bodies[name] = data
        self._place.restored_s.pop(name, None)
        self._place.classes[name] = storage_class

    def _readiness(self, name: str) -> Readiness:
        with self._place.mutex:
            storage_class = self._place.classes.get(name, "")
            ready_s = self._place.restored_s.get(name)
        if storage_class not in ARCHIVE_CLASSES:
            return Readiness(storage_class)
        if ready_s is None:
            return Readiness(storage_class, "archived")
        return Readiness(storage_class, "readable" if time.monotonic() >= ready_s else "restoring")

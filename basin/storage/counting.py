"""`CountingObjects`: an object store that counts its requests, by the kinds that a bucket prices apart.

Invariants:

- Every attempt counts once, whatever becomes of it; so it wraps the store itself, inside of whatever repeats. A call
  that is refused before anything is sent (`InvalidArgument`, `BasinClosed`) does not count.
- Where one call is several requests, their number follows from the port: a list is a page for every 1,000 lines, a
  deletion a request for every 1,000 names, a file in parts one "part" for each of them and for its start and its
  completion. What a client library sends beyond that by itself is not seen.
- Bytes are those of bodies. What a write that failed was to send counts as sent.

Imports `basin.errors` and its own package.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, TypeAlias, get_args

from basin.errors import BasinClosed, BasinError, InvalidArgument
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectStore, Readiness, RequestKind

PART_SIZE: Final = 16 << 20
"""Size of the parts of a large file, unless that makes more than `PARTS_MAX` of them: as `fsspec_clients` cuts it."""
PARTS_MAX: Final = 10_000
_LINES_OF_PAGE: Final = 1000

_Found: TypeAlias = list[bytes | BasinError]  # In the class below, `list` is a method.
_KINDS: Final[tuple[RequestKind, ...]] = get_args(RequestKind)
_UNSENT: Final = (InvalidArgument, BasinClosed)


class CountingObjects(ObjectStore):
    """`store` with counts of what was asked of it. Safe for several threads."""

    def __init__(self, store: ObjectStore) -> None:
        self.url = store.url
        self.knows_classes = store.knows_classes
        self._store = store
        self._mutex = threading.Lock()
        self._counts: dict[RequestKind, int] = dict.fromkeys(_KINDS, 0)
        self._bytes_in = 0
        self._bytes_out = 0

    def __repr__(self) -> str:
        return f"CountingObjects({self._store!r})"

    @property
    def counts(self) -> dict[RequestKind, int]:
        """Requests so far, of every kind; a copy."""
        with self._mutex:
            return dict(self._counts)

    @property
    def bytes_in(self) -> int:
        """Bytes of bodies received so far."""
        with self._mutex:
            return self._bytes_in

    @property
    def bytes_out(self) -> int:
        """Bytes of bodies sent so far."""
        with self._mutex:
            return self._bytes_out

    def get(self, wanted: ByteRange) -> bytes:
        with self._counted("get"):
            body = self._store.get(wanted)
        self._count("get", 0, received=len(body))
        return body

    def get_many(self, wanted: Sequence[ByteRange]) -> _Found:
        with self._counted("get", len(wanted), unless_returned=True):
            found = self._store.get_many(wanted)
        sent = sum(not isinstance(one, _UNSENT) for one in found)
        self._count("get", sent, received=sum(len(one) for one in found if isinstance(one, bytes)))
        return found

    def put(self, name: str, data: bytes) -> None:
        with self._counted("put", sent=len(data)):
            self._store.put(name, data)

    def put_new(self, name: str, data: bytes) -> None:
        with self._counted("put_new", sent=len(data)):
            self._store.put_new(name, data)

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        size = _size_of(path)
        if size is None:
            self._store.put_file(
                name, path, storage_class
            )  # It will say what is wrong with the file, and send nothing.
            return
        kind: RequestKind = "put" if size <= PUT_SIZE_MAX else "part"
        with self._counted(kind, _requests_of_file(size), sent=size):
            self._store.put_file(name, path, storage_class)

    def readiness(self, name: str) -> Readiness:
        if not self.knows_classes:
            return self._store.readiness(name)
        with self._counted("head"):
            return self._store.readiness(name)

    def restore(self, name: str, *, days: int, tier: str) -> None:
        with self._counted("restore"):
            self._store.restore(name, days=days, tier=tier)

    def size(self, name: str) -> int:
        with self._counted("head"):
            return self._store.size(name)

    def delete(self, names: Sequence[str]) -> None:
        with self._counted("delete", _pages(len(set(names)))):
            self._store.delete(names)

    def list(self, folder: str) -> Listing:
        with self._counted("list", unless_returned=True):
            listing = self._store.list(folder)
        self._count("list", max(1, _pages(len(listing.objects) + len(listing.folders))))
        return listing

    def close(self) -> None:
        self._store.close()

    @contextlib.contextmanager
    def _counted(
        self, kind: RequestKind, requests: int = 1, *, sent: int = 0, unless_returned: bool = False
    ) -> Iterator[None]:
        """Count what the block asks, unless it was refused unsent; or, `unless_returned`, only where it fails."""
        try:
            yield
        except _UNSENT:
            raise
        except BaseException:
            self._count(kind, requests, sent=sent)
            raise
        if not unless_returned:
            self._count(kind, requests, sent=sent)

    def _count(self, kind: RequestKind, requests: int, *, sent: int = 0, received: int = 0) -> None:
        with self._mutex:
            self._counts[kind] += requests
            self._bytes_out += sent
            self._bytes_in += received


def _pages(lines: int) -> int:
    return -(-lines // _LINES_OF_PAGE)


def _size_of(path: Path) -> int | None:
    """Size of a file; `None` if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _requests_of_file(size: int) -> int:
    if size <= PUT_SIZE_MAX:
        return 1
    part_size = max(PART_SIZE, -(-size // PARTS_MAX))
    return -(-size // part_size) + 2

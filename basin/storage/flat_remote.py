"""Which file a URL names, and one of a server read by ranges: what `FlatStorage` needs of a flat file.

Invariants:

- No range is asked for beyond the file's end, and an answer of another length is an error: a server that ignores ranges
  is refused instead of being read whole again and again.
- Small reads fetch pieces of 64 KiB, which are kept, so that neighbours come along; large ones fetch what they ask for.
- A request that fails in passing is repeated as the policy says.

Imports `basin.errors` and its neighbours; the clients are loaded with the first file.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from basin.errors import BasinError, NotABasin, ObjectMissing, StorageError, TruncatedStratum
from basin.storage.counting import CountingObjects
from basin.storage.flat import open_local_file
from basin.storage.naming import is_name
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import ReadFile
from basin.storage.requests import RequestPolicy
from basin.storage.retrying import RetryingObjects

FLAT_SUFFIX: Final = ".basin"
"""By this a file is told from a folder before anything is asked."""
PIECE_SIZE: Final = 64 << 10
"""As much as a request for 4 KiB costs."""
_WHOLE_FROM: Final = 256 << 10
"""Reads from this size on pass the kept pieces by."""
_KEPT_MAX: Final = 256
_S3: Final = ("s3", "s3a")


def find_flat_file(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> ReadFile | None:
    """The file at a path or URL that ends with `.basin`; None where there is none, and a folder may be meant.

    Over http there are no folders: raises `NotABasin` where there is no such file. Raises what opening it raises. A URL
    that ends otherwise is not looked at.
    """
    scheme = urlsplit(url).scheme if "://" in url else ""
    if scheme == "memory" or not (urlsplit(url).path if scheme else url).endswith(FLAT_SUFFIX):
        return None
    if scheme in ("", "file"):
        path = Path(unquote(url.removeprefix("file://")) if scheme else url)
        return open_local_file(path) if path.is_file() else None
    try:
        return open_remote_file(url, storage_options, policy)
    except ObjectMissing as error:
        if scheme in ("http", "https"):
            raise NotABasin(f"{url} is not a basin: there is no such file", url=url) from error
        return None


def open_remote_file(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> RemoteFile:
    """The file at `url`; one request, for its size. Raises `ObjectMissing` without one, and what `open_s3` does."""
    store, name = _store_of(url, storage_options, policy)
    try:
        return RemoteFile(store, name, policy)
    except BaseException:
        store.close()
        raise


def _store_of(url: str, storage_options: Mapping[str, Any] | None, policy: RequestPolicy) -> tuple[ObjectStore, str]:
    """A store that has the file, and its name there."""
    folder, _, name = url.rpartition("/")
    if urlsplit(url).scheme in _S3 and is_name(name):
        from basin.storage.s3_choice import open_s3

        return open_s3(folder, storage_options, policy), name
    # A user may spell the name as he likes, with a query behind it: no store would take that for a name.
    from basin.storage.fsspec_single import open_single

    return open_single(url, storage_options, policy), "file"


class RemoteFile(ReadFile):
    """An object of a store, as a file. Owns the store."""

    def __init__(self, store: ObjectStore, name: str, policy: RequestPolicy) -> None:
        self.name = name
        self.url = store.url
        self._counting = CountingObjects(store)
        self._objects = RetryingObjects(self._counting, policy)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._mutex = threading.Lock()
        self._size = self._objects.size(name)

    def size(self) -> int:
        """As it was when the file was opened: it never changes."""
        return self._size

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size > self._size - offset:
            raise TruncatedStratum(
                f"{self.url} ends at byte {self._size}, {size} bytes were expected at {offset}",
                object=self.name,
                offset=min(max(offset, 0), self._size),
            )
        if not size:
            return b""
        if size >= _WHOLE_FROM:
            return self._fetch(offset, offset + size)
        first, last = offset // PIECE_SIZE, -(-(offset + size) // PIECE_SIZE)
        joined = b"".join(self._pieces(first, last))
        return joined[offset - first * PIECE_SIZE :][:size]

    def _pieces(self, first: int, last: int) -> list[bytes]:
        """Pieces `first` to `last` (exclusive); those that are missing with one request."""
        with self._mutex:
            found = {number: self._kept.get(number) for number in range(first, last)}
            for number, piece in found.items():
                if piece is not None:
                    self._kept.move_to_end(number)
        missing = [number for number, piece in found.items() if piece is None]
        if missing:
            start = missing[0] * PIECE_SIZE
            data = self._fetch(start, min(self._size, (missing[-1] + 1) * PIECE_SIZE))
            for number in range(missing[0], missing[-1] + 1):
                found[number] = data[number * PIECE_SIZE - start :][:PIECE_SIZE]
            self._keep({number: found[number] or b"" for number in missing})
        return [piece or b"" for piece in found.values()]

    def _keep(self, pieces: Mapping[int, bytes]) -> None:
        with self._mutex:
            self._kept.update(pieces)
            while len(self._kept) > _KEPT_MAX:
                self._kept.popitem(last=False)

    def _fetch(self, start: int, stop: int) -> bytes:
        data = self._objects.get(ByteRange(self.name, start, stop))
        if len(data) != stop - start:
            raise StorageError(
                f"{self.url} answered {len(data)} bytes where {stop - start} were asked for: the server must know "
                "range requests, and the file must not change",
                object=self.name,
                operation="get",
            )
        return data

    def read_again(self, offset: int, size: int) -> bytes | None:
        """As the port says: from the server alone, and nothing that was kept is believed any more."""
        with self._mutex:
            self._kept.clear()
        try:
            return self._fetch(offset, offset + size) if size else b""
        except BasinError:
            return None

    def requests(self) -> dict[str, int]:
        """How often the server was asked for what, and bytes."""
        counts = {str(kind): count for kind, count in self._counting.counts.items()}
        return {**counts, "bytes_in": self._counting.bytes_in, "bytes_out": self._counting.bytes_out}

    def close(self) -> None:
        self._objects.close()

"""s3fs as it is: an object for every value. The calls are those of its own that send the fewest requests."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bucket.contestant import Blobs, Streams
from benchmarks.bucket.place import REQUESTS_AT_ONCE, Place


def open_side(place: Place, *, reading: bool) -> S3fsSide:
    del reading
    return S3fsSide(place)


class S3fsSide(Blobs, Streams):
    """One file system."""

    def __init__(self, place: Place) -> None:
        library: Any = importlib.import_module("s3fs")
        options = {"use_listings_cache": False, "skip_instance_cache": True}
        self._files: Any = library.S3FileSystem(**place.s3fs_options(), **options)
        self._root = f"{place.bucket}/{place.prefix}"

    def put_values(self, values: Sequence[bytes]) -> Sequence[str]:
        paths = [f"{self._root}/value-{number:08d}" for number in range(len(values))]
        self._files.pipe(dict(zip(paths, values, strict=True)), batch_size=REQUESTS_AT_ONCE)
        return paths

    def get_values(self, addresses: Sequence[str], size: int) -> Sequence[bytes]:
        """By ranges, a GET each: `cat` would ask for every object's size before."""
        found: list[bytes] = self._files.cat_ranges(list(addresses), 0, size, batch_size=REQUESTS_AT_ONCE)
        return found

    def put_file(self, path: Path) -> str:
        address = f"{self._root}/stream"
        self._files.put_file(str(path), address)
        return address

    def get_whole(self, address: str, size: int) -> bytes:
        body: bytes = self._files.cat_file(address, start=0, end=size)
        return body

    def get_file(self, address: str, path: Path) -> None:
        self._files.get_file(address, str(path))

    def close(self) -> None:
        """Close the connections where they were opened: left to the end of the last reference, they complain."""
        closing = self._files._s3creator.__aexit__(None, None, None)
        asyncio.run_coroutine_threadsafe(closing, self._files.loop).result()

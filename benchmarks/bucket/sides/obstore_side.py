"""obstore as it is: an object for every value, through the Rust client that SlateDB has below it, too."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmarks.bucket.contestant import Blobs, Streams
from benchmarks.bucket.place import REQUESTS_AT_ONCE, Place

_PIECE_SIZE: Final = 1 << 20
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def open_side(place: Place, *, reading: bool) -> ObstoreSide:
    del reading
    return ObstoreSide(place)


class ObstoreSide(Blobs, Streams):
    """One store, and the event loop from which many requests are sent at once."""

    def __init__(self, place: Place) -> None:
        self._library: Any = importlib.import_module("obstore")
        stores: Any = importlib.import_module("obstore.store")
        self._store: Any = stores.S3Store(place.bucket, config=place.object_store_options())
        self._root = place.prefix
        self._loop = asyncio.new_event_loop()

    def _each(self, items: Sequence[_Item], work: Callable[[_Item], Awaitable[_Result]]) -> list[_Result]:
        """The results of `work` for all items, so many at once as every side may send."""

        async def all_items() -> list[_Result]:
            gate = asyncio.Semaphore(REQUESTS_AT_ONCE)

            async def one(item: _Item) -> _Result:
                async with gate:
                    return await work(item)

            return await asyncio.gather(*map(one, items))

        return self._run(all_items())

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return self._loop.run_until_complete(work)

    def put_values(self, values: Sequence[bytes]) -> Sequence[str]:
        paths = [f"{self._root}/value-{number:08d}" for number in range(len(values))]

        async def put(pair: tuple[str, bytes]) -> None:
            await self._library.put_async(self._store, *pair)

        self._each(list(zip(paths, values, strict=True)), put)
        return paths

    def get_values(self, addresses: Sequence[str], size: int) -> Sequence[bytes]:
        async def get(address: str) -> bytes:
            answer = await self._library.get_async(self._store, address)
            return bytes(await answer.bytes_async())

        return self._each(addresses, get)

    def put_file(self, path: Path) -> str:
        address = f"{self._root}/stream"
        self._library.put(self._store, address, path)
        return address

    def get_whole(self, address: str, size: int) -> bytes:
        return bytes(self._library.get(self._store, address).bytes())

    def get_file(self, address: str, path: Path) -> None:
        with path.open("wb") as file:
            for piece in self._library.get(self._store, address).stream(min_chunk_size=_PIECE_SIZE):
                file.write(piece)

    def close(self) -> None:
        self._loop.close()

"""What a store's requests cost is counted, whatever becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, get_args

import pytest

from basin.errors import AlreadyExists, BasinClosed, BasinError, InvalidArgument, ObjectMissing, StorageUnavailable
from basin.storage.counting import CountingObjects
from basin.storage.memory_objects import MemoryObjects, memory_objects
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectStore, RequestKind
from basin.storage.requests import RequestPolicy
from basin.storage.retrying import RetryingObjects
from basin.testing import object_conformance
from basin.testing.object_conformance import CALLS, ObjectStoreConformance

MIB = 1 << 20


class Broken(MemoryObjects):
    """Fails every call after it was made."""

    def get(self, wanted: ByteRange) -> bytes:
        raise StorageUnavailable("cut", reason="connection")

    def put(self, name: str, data: bytes) -> None:
        super().put(name, data)
        raise StorageUnavailable("cut", reason="connection")

    def put_new(self, name: str, data: bytes) -> None:
        super().put_new(name, data)
        raise StorageUnavailable("cut", reason="connection")

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        super().put_file(name, path, storage_class)
        raise StorageUnavailable("cut", reason="connection")

    def size(self, name: str) -> int:
        raise StorageUnavailable("cut", reason="connection")

    def delete(self, names: Sequence[str]) -> None:
        super().delete(names)
        raise StorageUnavailable("cut", reason="connection")

    def list(self, folder: str) -> Listing:
        raise StorageUnavailable("cut", reason="connection")


class FilesOfAnySize(MemoryObjects):
    """Takes files without reading them."""

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        self.put(name, b"")


class TestCountingMemoryObjects(ObjectStoreConformance):
    list_size = 10

    def make_store(self, place: str) -> ObjectStore:
        return CountingObjects(memory_objects(f"memory://{place}"))


@pytest.fixture
def store() -> Iterator[CountingObjects]:
    made = CountingObjects(MemoryObjects())
    yield made
    made.close()


def spent(store: CountingObjects) -> dict[RequestKind, int]:
    """The kinds of which there was any request."""
    return {kind: count for kind, count in store.counts.items() if count}


Expected: TypeAlias = dict[RequestKind, int]
KIND: dict[str, RequestKind] = {
    "get": "get",
    "put": "put",
    "put_new": "put_new",
    "put_file": "put",
    "size": "head",
    "delete": "delete",
    "list": "list",
}


def test_every_kind_is_there_from_the_start(store: CountingObjects) -> None:
    assert store.counts == dict.fromkeys(get_args(RequestKind), 0)
    assert (store.bytes_in, store.bytes_out) == (0, 0)


@pytest.mark.parametrize("operation", CALLS)
def test_a_call_is_one_request(operation: str) -> None:
    inner = MemoryObjects()
    inner.put("b", b"body")
    store = CountingObjects(inner)
    CALLS[operation](store, "a" if operation == "put_new" else "b")
    assert spent(store) == {KIND[operation]: 1}
    file_size = Path(object_conformance.__file__).stat().st_size
    sent = {"put": 1, "put_new": 1, "put_file": file_size}
    assert (store.bytes_in, store.bytes_out) == (4 if operation == "get" else 0, sent.get(operation, 0))


@pytest.mark.parametrize("operation", CALLS)
def test_a_call_that_fails_is_a_request_too(operation: str) -> None:
    store = CountingObjects(Broken())
    with pytest.raises(StorageUnavailable):
        CALLS[operation](store, "a")
    assert spent(store) == {KIND[operation]: 1}
    assert store.bytes_in == 0
    assert (store.bytes_out > 0) == operation.startswith("put")


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda store: store.get(ByteRange("absent")), ObjectMissing, {"get": 1}),
        (lambda store: store.size("absent"), ObjectMissing, {"head": 1}),
        (lambda store: store.put_new("there", b"xyz"), AlreadyExists, {"put_new": 1}),
    ],
)
def test_a_refusal_of_the_store_is_a_request(
    call: Callable[[ObjectStore], object], error: type[BasinError], expected: Expected
) -> None:
    inner = MemoryObjects()
    inner.put("there", b"x")
    store = CountingObjects(inner)
    with pytest.raises(error):
        call(store)
    assert spent(store) == expected


@pytest.mark.parametrize("operation", CALLS)
def test_a_call_that_sends_nothing_is_no_request(store: CountingObjects, operation: str) -> None:
    with pytest.raises(InvalidArgument):
        CALLS[operation](store, "../a")
    store.close()
    with pytest.raises(BasinClosed):
        CALLS[operation](store, "a")
    assert spent(store) == {}
    assert (store.bytes_in, store.bytes_out) == (0, 0)


def test_nothing_is_asked_of_nothing(store: CountingObjects) -> None:
    assert store.get_many([]) == []
    store.delete([])
    assert spent(store) == {}


def test_many_gets_are_as_many_requests(store: CountingObjects) -> None:
    store.put("a", b"0123456789")
    found = store.get_many([ByteRange("a", 0, 4), ByteRange("absent"), ByteRange("a", 8), ByteRange("../a")])
    assert len(found) == 4
    assert spent(store) == {"put": 1, "get": 3}
    assert store.bytes_in == 6


def test_many_gets_that_fail_as_a_whole_are_requests() -> None:
    class BrokenAsAWhole(MemoryObjects):
        def get_many(self, wanted: Sequence[ByteRange]) -> list[bytes | BasinError]:
            raise StorageUnavailable("cut", reason="connection")

    store = CountingObjects(BrokenAsAWhole())
    with pytest.raises(StorageUnavailable):
        store.get_many([ByteRange("a"), ByteRange("b")])
    assert spent(store) == {"get": 2}


@pytest.mark.parametrize(("lines", "requests"), [(0, 1), (1, 1), (999, 1), (1000, 1), (1001, 2), (2000, 2), (2001, 3)])
def test_a_list_is_a_request_for_each_page(store: CountingObjects, lines: int, requests: int) -> None:
    for number in range(lines):
        store.put(f"data/{number}" if number % 2 else f"data/{number}/a", b"")
    listing = store.list("data")
    assert len(listing.objects) + len(listing.folders) == lines
    assert store.counts["list"] == requests


@pytest.mark.parametrize(("names", "requests"), [(1, 1), (1000, 1), (1001, 2), (2500, 3)])
def test_a_deletion_is_a_request_for_a_thousand_names(store: CountingObjects, names: int, requests: int) -> None:
    store.delete([f"data/{number}" for number in range(names)] * 2)
    assert spent(store) == {"delete": requests}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, {"put": 1}),
        (PUT_SIZE_MAX, {"put": 1}),
        (PUT_SIZE_MAX + 1, {"part": 5 + 2}),
        (80 * MIB, {"part": 5 + 2}),
        (80 * MIB + 1, {"part": 6 + 2}),
        (16 * MIB * 10_000, {"part": 10_000 + 2}),
        (16 * MIB * 10_000 + 1, {"part": 10_000 + 2}),
        (1 << 40, {"part": 10_000 + 2}),
    ],
)
def test_a_large_file_is_a_request_for_each_part_and_two_more(tmp_path: Path, size: int, expected: Expected) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(size)
    store = CountingObjects(FilesOfAnySize())
    store.put_file("a", path)
    assert spent(store) == expected
    assert store.bytes_out == size


def test_a_file_that_is_not_there_is_no_request(store: CountingObjects, tmp_path: Path) -> None:
    with pytest.raises(BasinError):
        store.put_file("a", tmp_path / "absent")
    assert spent(store) == {}


def test_every_attempt_counts() -> None:
    store = CountingObjects(Broken())
    policy = RequestPolicy(attempts=3, backoff_first_s=0.001, backoff_max_s=0.001)
    with pytest.raises(StorageUnavailable):
        RetryingObjects(store, policy).put("a", b"1234")
    assert spent(store) == {"put": 3}
    assert store.bytes_out == 12


def test_threads_lose_no_count(store: CountingObjects) -> None:
    store.put("a", b"x")

    def read(_number: int) -> None:
        for _ in range(200):
            store.get(ByteRange("a"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert store.counts["get"] == 1600
    assert store.bytes_in == 1600


def test_counts_are_a_copy(store: CountingObjects) -> None:
    store.counts["get"] += 1
    assert spent(store) == {}


def test_it_is_called_like_what_it_wraps(store: CountingObjects) -> None:
    assert store.url == "memory://"
    assert repr(store) == "CountingObjects(MemoryObjects('memory://'))"

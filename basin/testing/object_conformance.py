"""`ObjectStoreConformance`: what every implementation of the object port must do, as tests to inherit.

    class TestMyObjects(ObjectStoreConformance):
        def make_store(self, place): return MyObjects(f"my://{place}")

`place` is a fresh name for each test; two stores made for one place see the same objects. What is slow on a real
service can be made smaller by the class's attributes. Needs pytest; imports the object port.
"""

# A test's name says the behaviour (D102). Fixtures may be there for their effect (ARG002).

from __future__ import annotations

import random
import secrets
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pytest

from basin.errors import AlreadyExists, BasinClosed, BasinError, InvalidArgument, ObjectMissing, StorageUnavailable
from basin.storage.objects import PUT_SIZE_MAX, ByteRange, Listing, ObjectInfo, ObjectStore
from basin.testing.conformance import BAD_NAMES

_RACERS = 8
_THREADS = 16

_Call: TypeAlias = Callable[[ObjectStore, str], object]

CALLS: dict[str, _Call] = {
    "get": lambda store, name: store.get(ByteRange(name)),
    "put": lambda store, name: store.put(name, b"x"),
    "put_new": lambda store, name: store.put_new(name, b"x"),
    "put_file": lambda store, name: store.put_file(name, Path(__file__)),
    "size": lambda store, name: store.size(name),
    "delete": lambda store, name: store.delete([name]),
    "list": lambda store, name: store.list(name),
}
"""Every call of the port that takes a name."""


RANGES = (
    *((0, None), (0, 10), (0, 1), (3, 7), (9, 10), (9, None), (4, None)),
    *((0, 11), (7, 1_000_000), (10, 12), (10, None), (11, None), (5_000, 6_000)),
    *((0, 0), (4, 4), (10, 10)),
)
"""Of an object of ten bytes: inside it, beyond its end, and empty."""


class ObjectStoreConformance(ABC):
    """Inherit, and define `make_store`."""

    races = 10
    """Rounds of eight threads that want one name."""
    list_size = 1_100
    """Objects to list and delete at once: more than fit in one page, or one request."""
    large_file_size = PUT_SIZE_MAX + (5 << 20) + 1
    """A file that goes up in parts."""
    forgets_empty_folders = True
    """False where a folder is listed for a while longer than its last object: the port promises nothing of that."""

    @abstractmethod
    def make_store(self, place: str) -> ObjectStore:
        """A new store on the objects of `place`."""

    @pytest.fixture
    def place(self) -> str:
        return f"conformance-{secrets.token_hex(6)}"

    @pytest.fixture
    def store(self, place: str) -> Iterator[ObjectStore]:
        made = self.make_store(place)
        yield made
        made.close()

    @pytest.fixture
    def other(self, place: str, store: ObjectStore) -> Iterator[ObjectStore]:
        """A second store on the same objects, as another process has."""
        made = self.make_store(place)
        yield made
        made.close()

    def test_a_body_is_stored(self, store: ObjectStore, other: ObjectStore) -> None:
        body = bytes(range(256)) * 4_321
        store.put("data/one/a", body)
        for one in (store, other):
            assert one.get(ByteRange("data/one/a")) == body
            assert one.size("data/one/a") == len(body)

    def test_a_body_may_be_empty(self, store: ObjectStore, other: ObjectStore) -> None:
        store.put("put", b"")
        store.put_new("new", b"")
        for name in ("put", "new"):
            assert other.get(ByteRange(name)) == b""
            assert other.size(name) == 0
        assert other.list("").objects == [ObjectInfo("new", 0), ObjectInfo("put", 0)]

    @pytest.mark.parametrize(("start", "stop"), RANGES)
    def test_a_range(self, store: ObjectStore, start: int, stop: int | None) -> None:
        body = b"0123456789"
        store.put("a", body)
        assert store.get(ByteRange("a", start, stop)) == body[start:stop]
        assert store.get_many([ByteRange("a", start, stop)]) == [body[start:stop]]

    @pytest.mark.parametrize(("start", "stop"), [(-1, None), (-3, -1), (5, 4)])
    def test_what_is_no_range_is_refused(self, store: ObjectStore, start: int, stop: int | None) -> None:
        store.put("a", b"0123456789")
        with pytest.raises(InvalidArgument):
            store.get(ByteRange("a", start, stop))

    def test_a_range_of_an_empty_object_is_empty(self, store: ObjectStore) -> None:
        store.put("a", b"")
        assert store.get(ByteRange("a", 0, 10)) == b""
        assert store.get(ByteRange("a", 5)) == b""

    def test_what_is_missing_is_said_to_be(self, store: ObjectStore) -> None:
        store.put("folder/there", b"x")
        for name in ("absent", "folder/absent", "folder", "there"):
            for operation in ("get", "size"):
                with pytest.raises(ObjectMissing) as caught:
                    CALLS[operation](store, name)
                assert caught.value.fields["object"] == name
                assert caught.value.fields["operation"] == operation
            with pytest.raises(ObjectMissing):
                store.get(ByteRange(name, 3, 5))

    def test_many_gets_keep_their_order(self, store: ObjectStore) -> None:
        for number in range(10):
            store.put(f"data/{number}", b"%d" % number * 100)
        order = list(range(10)) * 10
        random.Random(1).shuffle(order)
        found = store.get_many([ByteRange(f"data/{number}", 1, 2 + number) for number in order])
        assert found == [b"%d" % number * (1 + number) for number in order]

    def test_errors_stand_in_the_places_of_their_ranges(self, store: ObjectStore) -> None:
        store.put("a", b"0123")
        wanted = [
            ByteRange("a", 0, 2),
            ByteRange("absent"),
            ByteRange("a", 2),
            ByteRange("a/b", 0, 1),
            ByteRange("a", 9),
        ]
        found = store.get_many(wanted)
        assert [one for one in found if isinstance(one, bytes)] == [b"01", b"23", b""]
        errors = [
            (place, type(one), one.fields["object"]) for place, one in enumerate(found) if isinstance(one, BasinError)
        ]
        assert errors == [(1, ObjectMissing, "absent"), (3, ObjectMissing, "a/b")]

    def test_no_gets_are_no_work(self, store: ObjectStore) -> None:
        assert store.get_many([]) == []

    def test_put_replaces(self, store: ObjectStore, other: ObjectStore) -> None:
        store.put("a", b"first and longer")
        other.put("a", b"second")
        assert store.get(ByteRange("a")) == b"second"
        assert store.size("a") == 6
        assert store.list("") == Listing([ObjectInfo("a", 6)], [])

    def test_a_body_is_visible_whole(self, store: ObjectStore, other: ObjectStore) -> None:
        bodies = [bytes([number]) * (200_000 + number) for number in range(10)]
        store.put("a", bodies[0])
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [store.put("a", body) for body in bodies])
            seen = [other.get(ByteRange("a"))]
            while not writing.done():
                seen.append(other.get(ByteRange("a")))
            writing.result()
        assert all(body in bodies for body in seen)
        assert other.get(ByteRange("a")) == bodies[-1]

    def test_put_new_needs_a_free_name(self, store: ObjectStore, other: ObjectStore) -> None:
        store.put_new("log/1", b"first")
        store.put("log/2", b"second")
        for one in (store, other):
            for name in ("log/1", "log/2"):
                with pytest.raises(AlreadyExists) as caught:
                    one.put_new(name, b"too late")
                assert caught.value.fields["object"] == name
                assert caught.value.fields["operation"] == "put_new"
        assert other.get(ByteRange("log/1")) == b"first"
        assert other.get(ByteRange("log/2")) == b"second"

    def test_a_deleted_name_is_free_again(self, store: ObjectStore, other: ObjectStore) -> None:
        store.put_new("a", b"first")
        other.delete(["a"])
        store.put_new("a", b"second")
        assert other.get(ByteRange("a")) == b"second"

    def test_put_new_has_one_winner_whose_body_is_stored(self, store: ObjectStore, other: ObjectStore) -> None:
        for number in range(self.races):
            name = f"race/{number}"
            won = self._race(name, [store, other])
            assert len(won) == 1
            assert store.get(ByteRange(name)) == won[0]

    def _race(self, name: str, stores: list[ObjectStore]) -> list[bytes]:
        """Bodies of the threads that were told that they had stored theirs."""
        barrier = threading.Barrier(_RACERS)

        def put_new(racer: int) -> bytes | None:
            body = bytes([racer]) * (1000 + racer)
            barrier.wait()
            try:
                stores[racer % len(stores)].put_new(name, body)
            except AlreadyExists:
                return None
            except StorageUnavailable as error:
                if error.fields["reason"] != "contended":
                    raise
                return None
            return body

        with ThreadPoolExecutor(_RACERS) as pool:
            return [body for body in pool.map(put_new, range(_RACERS)) if body is not None]

    def test_threads_do_not_meet(self, store: ObjectStore) -> None:
        def work(number: int) -> bool:
            body = bytes([number]) * 5_000
            store.put(f"data/{number}", body)
            halves = store.get_many([ByteRange(f"data/{number}", 0, 2_000), ByteRange(f"data/{number}", 2_000)])
            return halves == [body[:2_000], body[2_000:]] and store.size(f"data/{number}") == 5_000

        with ThreadPoolExecutor(_THREADS) as pool:
            assert all(pool.map(work, range(100)))

    def test_delete(self, store: ObjectStore, other: ObjectStore) -> None:
        for name in ("a", "data/b", "data/c"):
            store.put(name, b"x")
        other.delete(["a", "absent", "data/b", "data/absent"])
        for name in ("a", "data/b"):
            with pytest.raises(ObjectMissing):
                store.get(ByteRange(name))
        assert store.list("") == Listing([], ["data"])
        assert store.list("data") == Listing([ObjectInfo("c", 1)], [])
        other.delete(["a", "data/b"])
        other.delete(["data/c", "data/c"])
        other.delete([])
        assert store.list("data") == Listing([], [])
        self._check_root(store, [])

    def test_delete_leaves_what_only_begins_alike(self, store: ObjectStore) -> None:
        for name in ("a-b", "a.b", "ab", "a/1"):
            store.put(name, b"x")
        store.delete(["a"])
        assert store.list("") == Listing([ObjectInfo("a-b", 1), ObjectInfo("a.b", 1), ObjectInfo("ab", 1)], ["a"])
        assert store.list("a") == Listing([ObjectInfo("1", 1)], [])

    def test_list_gives_what_lies_directly_in_a_folder(self, store: ObjectStore, other: ObjectStore) -> None:
        sizes = {"b": 2, "a": 1, "data/z": 3, "data/y": 4, "data/deep/x": 5, "data/deep/deeper/w": 6, "meta/v": 7}
        for name, size in sizes.items():
            store.put(name, b"x" * size)
        assert other.list("") == Listing([ObjectInfo("a", 1), ObjectInfo("b", 2)], ["data", "meta"])
        assert other.list("data") == Listing([ObjectInfo("y", 4), ObjectInfo("z", 3)], ["deep"])
        assert other.list("data/deep") == Listing([ObjectInfo("x", 5)], ["deeper"])
        assert other.list("meta") == Listing([ObjectInfo("v", 7)], [])

    def test_list_does_not_take_a_beginning_for_a_folder(self, store: ObjectStore) -> None:
        for name in ("a-b", "a.b", "ab", "a/1", "a/10", "ab-/2", "a-/3"):
            store.put(name, b"x")
        assert store.list("a") == Listing([ObjectInfo("1", 1), ObjectInfo("10", 1)], [])
        assert store.list("a-") == Listing([ObjectInfo("3", 1)], [])
        top = [ObjectInfo("a-b", 1), ObjectInfo("a.b", 1), ObjectInfo("ab", 1)]
        assert store.list("") == Listing(top, ["a", "a-", "ab-"])

    def test_nothing_lies_in_an_object_or_an_absent_folder(self, store: ObjectStore) -> None:
        assert store.list("") == Listing([], [])
        store.put("data/a", b"x")
        for folder in ("data/a", "absent", "data/absent", "dat", "a"):
            assert store.list(folder) == Listing([], [])

    def test_list_is_never_old(self, store: ObjectStore, other: ObjectStore) -> None:
        for number in range(10):
            store.put(f"data/{number}", b"x" * number)
            for one in (store, other):
                assert one.list("data").objects == [ObjectInfo(str(known), known) for known in range(number + 1)]
        for number in range(10):
            other.delete([f"data/{number}"])
            for one in (store, other):
                assert [int(line.name) for line in one.list("data").objects] == list(range(number + 1, 10))

    def test_many_are_listed_and_deleted(self, store: ObjectStore) -> None:
        names = [f"{number:05}" for number in range(self.list_size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda name: store.put(f"data/{name}", b"xy"), names):
                pass
        store.put("kept", b"")
        assert store.list("data") == Listing([ObjectInfo(name, 2) for name in names], [])
        store.delete([f"data/{name}" for name in names])
        assert store.list("data") == Listing([], [])
        self._check_root(store, [ObjectInfo("kept", 0)])

    def _check_root(self, store: ObjectStore, objects: list[ObjectInfo]) -> None:
        """What is left when the objects of the folder `data` are gone."""
        listing = store.list("")
        assert listing.objects == objects
        assert listing.folders in ([], *([] if self.forgets_empty_folders else [["data"]]))

    def test_many_folders_are_listed(self, store: ObjectStore) -> None:
        names = [f"{number:05}" for number in range(self.list_size)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda name: store.put(f"data/{name}/a", b""), names):
                pass
        assert store.list("data") == Listing([], names)

    @pytest.mark.parametrize("size", [0, 1, 123_457])
    def test_a_file_is_stored(self, store: ObjectStore, other: ObjectStore, tmp_path: Path, size: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(random.Random(size).randbytes(size))
        store.put("data/a", b"what was there before, which may be longer")
        store.put_file("data/a", path)
        assert other.get(ByteRange("data/a")) == path.read_bytes()
        assert other.size("data/a") == size

    def test_a_large_file_is_stored(self, store: ObjectStore, other: ObjectStore, tmp_path: Path) -> None:
        path = tmp_path / "file"
        with path.open("wb") as file:
            for seed, start in enumerate(range(0, self.large_file_size, 1 << 20)):
                file.write(random.Random(seed).randbytes(min(1 << 20, self.large_file_size - start)))
        store.put_file("data/a", path)
        assert other.size("data/a") == self.large_file_size
        assert other.list("data").objects == [ObjectInfo("a", self.large_file_size)]
        assert other.get(ByteRange("data/a")) == path.read_bytes()

    @pytest.mark.parametrize("operation", CALLS)
    def test_bad_names_are_refused(self, store: ObjectStore, operation: str) -> None:
        for name in BAD_NAMES:
            if operation == "list" and not name:
                continue  # The root is a folder.
            with pytest.raises(InvalidArgument):
                CALLS[operation](store, name)
        assert store.list("") == Listing([], [])

    def test_one_bad_name_deletes_nothing(self, store: ObjectStore) -> None:
        store.put("a", b"x")
        with pytest.raises(InvalidArgument):
            store.delete(["a", "../a"])
        assert store.get(ByteRange("a")) == b"x"

    @pytest.mark.parametrize("size_over", [0, 1])
    def test_a_put_is_never_in_parts(self, store: ObjectStore, size_over: int) -> None:
        body = bytes(PUT_SIZE_MAX + size_over)
        for put in (store.put, store.put_new):
            if size_over:
                with pytest.raises(InvalidArgument):
                    put(put.__name__.replace("_", "-"), body)
            else:
                put(put.__name__.replace("_", "-"), body)
        objects = [] if size_over else [ObjectInfo("put", PUT_SIZE_MAX), ObjectInfo("put-new", PUT_SIZE_MAX)]
        assert store.list("").objects == objects

    @pytest.mark.parametrize("operation", CALLS)
    def test_a_closed_store_says_so(self, place: str, other: ObjectStore, operation: str) -> None:
        other.put("a", b"kept")
        made = self.make_store(place)
        made.close()
        made.close()
        with pytest.raises(BasinClosed):
            CALLS[operation](made, "a")
        assert other.get(ByteRange("a")) == b"kept"

"""Two roots as one storage: it keeps the port's promises, and only names below `data/` ask the second root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from basin.errors import InvalidArgument, ObjectMissing
from basin.storage.local import LocalStorage
from basin.storage.memory_objects import MemoryObjects, memory_objects
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import Extent, Storage
from basin.storage.remote import RemoteStorage
from basin.storage.tiered import TieredStorage
from basin.testing.bucket_conformance import PATIENCE, BucketConformance
from basin.testing.conformance import DiskConformance, write_file
from basin.testing.watched_objects import WatchedObjects


class TestOnTwoFolders(DiskConformance):
    def make_storage(self, place: Path) -> Storage:
        return TieredStorage(LocalStorage(place / "hot", create=True), LocalStorage(place / "cold", create=True))

    def stored(self, place: Path, name: str) -> bytes | None:
        path = place / ("cold" if name.startswith("data/") else "hot") / name
        return path.read_bytes() if path.exists() else None


class TestOnTwoBuckets(BucketConformance):
    """Both roots send their requests through one store, which the suite watches."""

    def make_objects(self, place: Path) -> ObjectStore:
        return memory_objects(f"memory://{place.parent.name}-{id(self)}")

    def make_storage_on(self, objects: ObjectStore) -> Storage:
        return TieredStorage(RemoteStorage(objects, PATIENCE), RemoteStorage(objects, PATIENCE))


@pytest.fixture
def roots() -> tuple[WatchedObjects, WatchedObjects]:
    return WatchedObjects(MemoryObjects()), WatchedObjects(MemoryObjects())


@pytest.fixture
def storage(roots: tuple[WatchedObjects, WatchedObjects]) -> Iterator[TieredStorage]:
    made = TieredStorage(*(RemoteStorage(root, PATIENCE) for root in roots))
    yield made
    made.close()


class TestTheSecondRoot:
    def test_it_holds_data_and_nothing_else(
        self, storage: TieredStorage, roots: tuple[WatchedObjects, WatchedObjects]
    ) -> None:
        for name in ("data/a", "meta/a", "index/a", "database"):
            write_file(storage, name, name.encode())
        storage.put_if_absent("log/1", b"one")
        hot, cold = roots
        assert cold.store.list("").folders == ["data"]
        assert cold.store.list("").objects == []
        assert hot.store.list("").folders == ["index", "log", "meta"]
        assert [info.name for info in hot.store.list("").objects] == ["database"]
        assert storage.list_folders("") == ["data", "index", "log", "meta"]

    def test_it_is_asked_for_nothing_else(
        self, storage: TieredStorage, roots: tuple[WatchedObjects, WatchedObjects]
    ) -> None:
        write_file(storage, "meta/a", b"0123")
        storage.put_if_absent("log/1", b"one")
        storage.require_create_only()
        storage.prefetch([Extent("meta/b", 10, 10)])
        assert storage.read_ranges([ByteRange("meta/a", 1, 3)]) == [b"12"]
        assert storage.read_file("log/1", 9) == b"one"
        assert storage.exists("meta/a")
        assert storage.list("meta") == ["a"]
        storage.delete_many(["meta/a"])
        assert not storage.exists("meta/a")
        assert roots[1].calls == []

    def test_ranges_of_both_keep_their_order(self, storage: TieredStorage) -> None:
        for name in ("data/a", "meta/a"):
            write_file(storage, name, name.encode())
        wanted = [ByteRange("data/a", 0, 4), ByteRange("meta/a", 0, 4), ByteRange("data/b", 0, 1), ByteRange("data/a")]
        data, meta, missing, whole = storage.read_ranges(wanted)
        assert (data, meta, whole) == (b"data", b"meta", b"data/a")
        assert isinstance(missing, ObjectMissing)

    def test_deletions_reach_the_root_of_each(
        self, storage: TieredStorage, roots: tuple[WatchedObjects, WatchedObjects]
    ) -> None:
        for name in ("data/a", "meta/a"):
            write_file(storage, name, b"body")
        storage.delete_many(["data/a", "meta/a"])
        assert [root.store.list("").folders for root in roots] == [[], []]

    def test_requests_of_both_are_counted(self, storage: TieredStorage) -> None:
        write_file(storage, "data/a", b"body")
        write_file(storage, "meta/a", b"body")
        assert storage.requests()["put"] == 2
        assert storage.requests()["bytes_out"] == 8
        assert storage.requests()["get"] == 0

    def test_it_is_of_the_same_kind(self, tmp_path: Path) -> None:
        folder, bucket = LocalStorage(tmp_path), RemoteStorage(MemoryObjects(), PATIENCE)
        for hot, cold in ((folder, bucket), (bucket, folder)):
            with pytest.raises(InvalidArgument, match="cannot hold one basin"):
                TieredStorage(hot, cold)
        folder.close()
        bucket.close()

    def test_a_file_has_its_second_name_below_the_same_root(self, tmp_path: Path) -> None:
        storage = TieredStorage(
            LocalStorage(tmp_path / "hot", create=True), LocalStorage(tmp_path / "cold", create=True)
        )
        write_file(storage, "meta/a", b"body")
        with pytest.raises(InvalidArgument, match="another root"):
            storage.link("meta/a", "data/a")
        storage.link("meta/a", "meta/b")
        assert storage.read_file("meta/b", 9) == b"body"
        storage.close()

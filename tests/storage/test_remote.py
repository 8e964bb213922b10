"""Files of a bucket: the storage port on objects in memory and on a server, and what only this storage does."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from basin.errors import BasinClosed, BasinError, ObjectMissing, StorageError, StorageUnavailable
from basin.storage.disk_cache import DiskCache
from basin.storage.fsspec_objects import open_fsspec
from basin.storage.memory_objects import MemoryObjects, memory_objects
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import Extent, Storage
from basin.storage.remote import RemoteStorage
from basin.testing.bucket_conformance import PATIENCE, BucketConformance
from basin.testing.conformance import write_file
from basin.testing.watched_objects import WatchedObjects
from tests.storage.object_calls import POLICY
from tests.storage.s3_servers import S3Server

SILENCE = StorageUnavailable("no reply in time", reason="timeout")


class TestOnMemory(BucketConformance):
    def make_objects(self, place: Path) -> ObjectStore:
        return memory_objects(f"memory://{place.parent.name}-{id(self)}")

    def make_storage_on(self, objects: ObjectStore) -> Storage:
        return RemoteStorage(objects, PATIENCE)


class TestWithoutThreads(TestOnMemory):
    """Files are sent by whoever calls `finish` or `sync`."""

    def make_storage_on(self, objects: ObjectStore) -> Storage:
        return RemoteStorage(objects, PATIENCE, uploads=0)


@pytest.fixture(scope="module")
def bucket(ministack: S3Server) -> str:
    return ministack.new_url()


class TestOnMiniStack(BucketConformance):
    races = 3

    @pytest.fixture(autouse=True)
    def _server(self, ministack: S3Server, bucket: str) -> None:
        self.server, self.url = ministack, f"{bucket}/{secrets.token_hex(6)}"

    def make_objects(self, place: Path) -> ObjectStore:
        return open_fsspec(self.url, self.server.storage_options(), POLICY)

    def make_storage_on(self, objects: ObjectStore) -> Storage:
        return RemoteStorage(objects, PATIENCE)


@pytest.fixture
def watched() -> WatchedObjects:
    return WatchedObjects(MemoryObjects())


@pytest.fixture
def storage(watched: WatchedObjects, tmp_path: Path) -> Iterator[RemoteStorage]:
    made = RemoteStorage(watched, PATIENCE, spool_folder=tmp_path / "spool")
    yield made
    made.close()


def spooled(tmp_path: Path) -> list[Path]:
    """The files that grow in the spool, or wait to be sent."""
    return [path for path in (tmp_path / "spool").rglob("*") if path.is_file() and path.name != "lock"]


class TestTheSpool:
    def test_it_holds_what_was_not_sent(self, storage: RemoteStorage, watched: WatchedObjects, tmp_path: Path) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        (path,) = spooled(tmp_path)
        assert path.read_bytes() == b"one"
        watched.down = SILENCE
        with pytest.raises(StorageUnavailable):
            file.sync()
        assert path.read_bytes() == b"one"
        watched.down = None
        file.sync()
        assert spooled(tmp_path) == []

    def test_reading_costs_nothing(self, storage: RemoteStorage, watched: WatchedObjects, tmp_path: Path) -> None:
        storage.open_known(Extent("data/a", 3))
        assert not (tmp_path / "spool").exists()
        assert watched.calls == []

    def test_it_goes_with_its_storage(self, storage: RemoteStorage, tmp_path: Path) -> None:
        storage.create("data/a").append(b"one")
        storage.close()
        assert list((tmp_path / "spool").iterdir()) == []

    def test_what_is_spooled_and_prefetched_costs_no_request(
        self, storage: RemoteStorage, watched: WatchedObjects
    ) -> None:
        storage.create("meta/a").append(b"0123456789")
        storage.prefetch([Extent("meta/a", 10, 5, 5)])
        assert storage.read_ranges([ByteRange("meta/a", 2, 4)]) == [b"23"]
        assert watched.calls == []

    def test_a_reader_goes_on_while_its_file_is_sent(self, storage: RemoteStorage) -> None:
        file = storage.create("data/a")
        file.append(b"0123456789" * 1000)
        reader = storage.open_known(Extent("data/a", 10_000))
        stop = threading.Event()
        wrong: list[object] = []

        def read() -> None:
            while not stop.is_set():
                try:
                    if reader.read(5_000, 10) != b"0123456789" or reader.size() != 10_000:
                        wrong.append("other bytes")
                except BasinError as error:
                    wrong.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        file.sync()
        stop.set()
        thread.join()
        assert wrong == []


class TestUploads:
    def test_who_finishes_waits_while_four_are_on_their_way(self, watched: WatchedObjects) -> None:
        storage = RemoteStorage(watched, PATIENCE, uploads=2)
        answer = threading.Event()
        watched.script("put", *[lambda: answer.wait(30)] * 10)
        files = [storage.create(f"data/{number}") for number in range(6)]
        finished: list[int] = []

        def finish() -> None:
            for number, file in enumerate(files):
                file.finish()
                finished.append(number)

        thread = threading.Thread(target=finish)
        thread.start()
        thread.join(0.2)
        assert finished == [0, 1, 2, 3]
        assert watched.count("put") == 2
        answer.set()
        thread.join(30)
        for file in files:
            file.sync()
        storage.close()
        assert watched.count("put") == 6

    def test_an_interrupt_while_waiting_loses_nothing(
        self, storage: RemoteStorage, watched: WatchedObjects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = threading.Event()
        watched.script("put", lambda: answer.wait(30))
        file = storage.create("data/a")
        file.append(b"one")
        file.finish()

        def interrupted(self: object, timeout: float | None = None) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("concurrent.futures.Future.result", interrupted)
            with pytest.raises(KeyboardInterrupt):
                file.sync()
        answer.set()
        file.sync()
        assert watched.count("put") == 1
        assert watched.store.get(ByteRange("data/a")) == b"one"

    def test_closing_waits_for_what_is_on_its_way(self, storage: RemoteStorage, watched: WatchedObjects) -> None:
        begun, answer = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            answer.wait(30)

        watched.script("put", hold)
        file = storage.create("data/a")
        file.append(b"one")
        file.finish()
        begun.wait(30)
        closing = threading.Thread(target=storage.close)
        closing.start()
        closing.join(0.05)
        assert closing.is_alive()
        answer.set()
        closing.join(30)
        assert not closing.is_alive()
        with pytest.raises(BasinClosed):
            storage.open("data/a")

    def test_what_closing_cancels_says_so(self, watched: WatchedObjects) -> None:
        storage = RemoteStorage(watched, PATIENCE, uploads=1)
        begun, answer = threading.Event(), threading.Event()

        def hold() -> None:
            begun.set()
            answer.wait(30)

        watched.script("put", hold)
        files = [storage.create(f"data/{number}") for number in range(2)]
        for file in files:
            file.append(b"one")
            file.finish()
        begun.wait(30)
        closing = threading.Thread(target=storage.close)
        closing.start()
        try:
            with pytest.raises(BasinClosed):
                files[1].sync()
        finally:
            answer.set()
            closing.join(30)
        assert [(call.kind, call.name) for call in watched.calls] == [("put", "data/0")]


class TestTheCache:
    def test_metadata_of_strata_is_on_disk_when_it_was_sent(self, watched: WatchedObjects, tmp_path: Path) -> None:
        data = bytes(range(256)) * 1000
        first = RemoteStorage(watched, PATIENCE, cache=DiskCache(tmp_path / "cache", 1 << 30))
        for name in ("meta/a", "index/b", "data/c"):
            write_file(first, name, data)
        first.close()
        second = RemoteStorage(WatchedObjects(Unavailable()), PATIENCE, cache=DiskCache(tmp_path / "cache", 1 << 30))
        for name in ("meta/a", "index/b"):
            assert second.open_known(Extent(name, len(data), 50_000)).read(len(data) - 50_000, 50_000) == data[-50_000:]
        with pytest.raises(StorageUnavailable):
            second.open_known(Extent("data/c", len(data), 50_000)).read(len(data) - 50_000, 50_000)
        second.close()

    def test_contents_do_not_fill_it(self, watched: WatchedObjects, tmp_path: Path) -> None:
        watched.store.put("data/a", bytes(1_000_000))
        cache = DiskCache(tmp_path / "cache", 1 << 30)
        storage = RemoteStorage(watched, PATIENCE, cache=cache)
        storage.open_known(Extent("data/a", 1_000_000, 1_000)).read(0, 900_000)
        assert cache.size == 0
        storage.close()


class Unavailable(MemoryObjects):
    """A bucket that never answers."""

    def get(self, wanted: ByteRange) -> bytes:
        raise StorageUnavailable("no reply in time", reason="timeout")


class TestTheHint:
    def test_what_is_supposed_is_answered_without_a_request(
        self, storage: RemoteStorage, watched: WatchedObjects
    ) -> None:
        watched.store.put("keys/c/slot.json", b"three")
        storage.suppose({"keys/a/slot.json": b"one", "keys/a/1": b"two", "keys/b/slot.json": b""})
        assert storage.list_folders("keys") == ["a", "b"]
        assert storage.list("keys/a") == ["1", "slot.json"]
        assert storage.read_file("keys/a/1", 2) == b"tw"
        assert watched.calls == []
        storage.suppose({})
        assert storage.list_folders("keys") == ["c"]
        with pytest.raises(ObjectMissing):
            storage.read_file("keys/a/1", 2)


class TestFork:
    def test_a_child_uses_nothing_that_it_inherited(self, storage: RemoteStorage, watched: WatchedObjects) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        reader = storage.open("data/a")

        def in_child() -> None:
            for attempt in (
                lambda: file.append(b"!"),
                file.sync,
                lambda: reader.read(0, 1),
                lambda: storage.open("data/a"),
                lambda: storage.create("data/b"),
                lambda: storage.put_if_absent("log/1", b""),
            ):
                with pytest.raises(BasinClosed):
                    attempt()
            file.close()
            reader.close()
            storage.close()

        assert _forked(in_child) == 0
        assert reader.read(0, 3) == b"one"
        file.append(b"two")
        file.sync()
        assert watched.store.get(ByteRange("data/a")) == b"onetwo"


def _forked(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:  # noqa: BLE001 (the child has nobody to raise to)
            os.write(2, repr(error).encode() + b"\n")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_spool_that_cannot_be_made_is_named(storage: RemoteStorage, tmp_path: Path) -> None:
    (tmp_path / "spool").write_bytes(b"no folder")
    with pytest.raises(StorageError, match="spool"):
        storage.create("data/a")
    with pytest.raises(StorageError, match="spool"):
        storage.create("data/a")

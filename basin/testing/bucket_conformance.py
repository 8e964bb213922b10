"""`BucketConformance`: what every storage must do whose files are objects, as tests to inherit.

    class TestMyStorage(BucketConformance):
        def make_objects(self, place): return MyObjects(f"my://{place.name}")
        def make_storage_on(self, objects): return MyStorage(objects, PATIENCE)

Between the storage and its objects the suite puts a `WatchedObjects`, so that it can count requests, lose replies and
break the connection. The storage should give up after a few attempts within milliseconds; `PATIENCE` says so. What is
slow on a real service can be made smaller by the class's attributes. Needs pytest; imports the storage port.
"""

# A test's name says the behaviour (D102). Fixtures may be there for their effect (ARG002).

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from basin.errors import AlreadyExists, InvalidArgument, ObjectMissing, StorageError, StorageUnavailable
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.protocol import Extent, Storage
from basin.storage.requests import RequestPolicy
from basin.testing.conformance import StorageConformance, write_file
from basin.testing.watched_objects import Unheard, WatchedObjects

PATIENCE: Final = RequestPolicy(attempts=3, backoff_first_s=0.001, backoff_max_s=0.002)
_WAIT_S: Final = 30.0
_SILENCE: Final = StorageUnavailable("no reply in time", reason="timeout")
_TAKEN: Final = AlreadyExists("the name is taken", reason="taken")


class BucketConformance(StorageConformance):
    """Of a storage whose `objects` is an object store. Inherit, and define `make_objects` and `make_storage_on`."""

    @abstractmethod
    def make_objects(self, place: Path) -> ObjectStore:
        """A new object store on the objects of `place`."""

    @abstractmethod
    def make_storage_on(self, objects: ObjectStore) -> Storage:
        """A new storage that sends its requests to `objects`, and closes it with itself."""

    @pytest.fixture(autouse=True)
    def _stores(self) -> Iterator[None]:
        self._watched: list[WatchedObjects] = []
        self._around: ObjectStore | None = None
        yield
        if self._around is not None:
            self._around.close()

    def make_storage(self, place: Path) -> Storage:
        self._watched.append(WatchedObjects(self.make_objects(place)))
        return self.make_storage_on(self._watched[-1])

    @pytest.fixture
    def watched(self, storage: Storage) -> WatchedObjects:
        """What `storage` sends its requests to."""
        return self._watched[0]

    def stored(self, place: Path, name: str) -> bytes | None:
        if self._around is None:
            self._around = self.make_objects(place)
        try:
            return self._around.get(ByteRange(name))
        except ObjectMissing:
            return None

    # --- writing ----------------------------------------------------------------------------------------------------

    def test_nobody_sees_a_file_before_it_is_finished(self, place: Path, storage: Storage, other: Storage) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        assert not file.is_sent()
        assert self.stored(place, "data/a") is None
        assert not other.exists("data/a")
        assert other.list("data") == other.list_folders("") == []
        for attempt in (lambda: other.open("data/a"), lambda: other.read_file("data/a", 10)):
            with pytest.raises(ObjectMissing):
                attempt()
        file.append(b"two")
        file.finish()
        file.sync()
        assert self.stored(place, "data/a") == other.read_file("data/a", 10) == b"onetwo"
        assert other.list("data") == ["a"]

    def test_a_file_is_one_put(self, storage: Storage, watched: WatchedObjects) -> None:
        file = storage.create("data/a")
        for _ in range(100):
            file.append(b"x" * 1000)
        assert watched.calls == []
        file.finish()
        file.finish()
        for _ in range(2):
            file.sync()
        file.close()
        storage.sync_folder("data")
        assert [(call.kind, call.name) for call in watched.calls] == [("put", "data/a")]

    def test_sync_finishes(self, place: Path, storage: Storage) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        file.sync()
        assert file.is_sent()
        assert self.stored(place, "data/a") == b"one"

    def test_a_finished_file_is_sent_while_nobody_waits(self, place: Path, storage: Storage) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        file.finish()
        _until(file.is_sent)
        assert self.stored(place, "data/a") == b"one"

    def test_nothing_is_appended_to_a_finished_file(self, place: Path, storage: Storage) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        file.finish()
        for go_on in (file.finish, file.sync, file.close):
            with pytest.raises(StorageError):
                file.append(b"two")
            go_on()
        assert self.stored(place, "data/a") == b"one"
        assert file.offset == 3

    @pytest.mark.parametrize("step", [_SILENCE, Unheard(_SILENCE)], ids=["unsent", "unheard"])
    def test_a_file_is_sent_again_after_silence(
        self, place: Path, storage: Storage, watched: WatchedObjects, step: StorageUnavailable | Unheard
    ) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        watched.script("put", step)
        file.finish()
        file.sync()
        assert self.stored(place, "data/a") == b"one"
        assert watched.count("put") == 2

    def test_sync_may_be_called_again_when_the_bucket_answers_again(
        self, place: Path, storage: Storage, watched: WatchedObjects
    ) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        watched.down = _SILENCE
        for finish in (file.finish, lambda: None):
            finish()
            with pytest.raises(StorageUnavailable):
                file.sync()
        assert storage.open("data/a").read(0, 3) == b"one"
        watched.down = None
        assert self.stored(place, "data/a") is None
        file.sync()
        assert file.is_sent()
        assert self.stored(place, "data/a") == b"one"

    def test_nothing_is_appended_to_a_file_that_may_have_been_sent(
        self, place: Path, storage: Storage, watched: WatchedObjects
    ) -> None:
        """Somebody may have seen it, and objects never change."""
        file = storage.create("data/a")
        file.append(b"one")
        watched.script("put", *[Unheard(_SILENCE)] * PATIENCE.attempts)
        with pytest.raises(StorageUnavailable):
            file.sync()
        with pytest.raises(StorageError):
            file.append(b"two")
        file.sync()
        assert self.stored(place, "data/a") == b"one"

    def test_a_refusal_comes_out_of_sync(self, place: Path, storage: Storage, watched: WatchedObjects) -> None:
        file = storage.create("data/a")
        file.append(b"one")
        watched.script("put", StorageError("no such bucket", reason="NoSuchBucket"))
        file.finish()
        with pytest.raises(StorageError, match="no such bucket"):
            file.sync()
        assert watched.count("put") == 1
        assert self.stored(place, "data/a") is None

    def test_several_files_are_on_their_way_at_once(self, place: Path, storage: Storage) -> None:
        files = [storage.create(f"data/{number}") for number in range(12)]
        for number, file in enumerate(files):
            file.append(bytes([number]) * 1000)
            file.finish()
        for number, file in reversed(list(enumerate(files))):
            file.sync()
            assert self.stored(place, f"data/{number}") == bytes([number]) * 1000

    def test_close_drops_what_was_not_finished(self, place: Path, storage: Storage, watched: WatchedObjects) -> None:
        first = storage.create("data/a")
        first.append(b"one")
        first.close()
        first.close()
        with pytest.raises(ObjectMissing):
            storage.open("data/a")
        second = storage.create("data/b")
        second.append(b"two")
        storage.close()
        second.close()
        assert watched.count("put") == 0
        assert self.stored(place, "data/a") is self.stored(place, "data/b") is None

    def test_a_name_whose_file_was_dropped_is_free(self, place: Path, storage: Storage) -> None:
        storage.create("data/a").close()
        write_file(storage, "data/a", b"two")
        assert self.stored(place, "data/a") == b"two"

    def test_there_are_no_links_locks_or_growing_files(self, storage: Storage, watched: WatchedObjects) -> None:
        write_file(storage, "data/a", b"one")
        watched.forget()
        for attempt in (
            lambda: storage.append_to("data/a", 3),
            lambda: storage.link("data/a", "data/b"),
            lambda: storage.lock("log/lock"),
        ):
            with pytest.raises(InvalidArgument):
                attempt()
        storage.reserve("reserve", 5000)
        storage.sync_folder("data")
        storage.boot_id()
        storage.writable()
        assert watched.calls == []

    # --- names that must be free ------------------------------------------------------------------------------------

    def test_put_if_absent_is_one_request(self, storage: Storage, watched: WatchedObjects) -> None:
        storage.put_if_absent("log/1", b"ours")
        assert [(call.kind, call.name) for call in watched.calls] == [("put_new", "log/1")]

    @pytest.mark.parametrize("error", [_SILENCE, _TAKEN], ids=["silence", "taken"])
    def test_put_if_absent_believes_no_reply(
        self, place: Path, storage: Storage, watched: WatchedObjects, error: StorageError
    ) -> None:
        """The reply is lost; or a library has sent the request twice, and the second one met the first."""
        watched.script("put_new", Unheard(error))
        storage.put_if_absent("log/1", b"ours")
        assert self.stored(place, "log/1") == b"ours"
        watched.script("put_new", Unheard(error))
        with pytest.raises(AlreadyExists):
            storage.put_if_absent("log/1", b"others")
        assert self.stored(place, "log/1") == b"ours"

    def test_put_if_absent_is_repeated_where_nothing_arrived(
        self, place: Path, storage: Storage, watched: WatchedObjects
    ) -> None:
        watched.script("put_new", _SILENCE)
        storage.put_if_absent("log/1", b"ours")
        assert self.stored(place, "log/1") == b"ours"
        assert watched.sent == [b"ours", b"ours"]

    def test_put_if_absent_says_that_it_does_not_know(self, storage: Storage, watched: WatchedObjects) -> None:
        watched.down = _SILENCE
        with pytest.raises(StorageUnavailable, match="cannot be known"):
            storage.put_if_absent("log/1", b"ours")

    def test_a_bucket_is_tried_once(self, storage: Storage, watched: WatchedObjects) -> None:
        storage.require_create_only()
        assert watched.count("put_new") > 1
        watched.forget()
        storage.require_create_only()
        assert watched.calls == []

    # --- reading ----------------------------------------------------------------------------------------------------

    def test_contents_are_read_by_exact_ranges(self, storage: Storage, other: Storage) -> None:
        write_file(storage, "data/a", bytes(range(256)) * 4000)
        reader, watched = other.open_known(Extent("data/a", 1_024_000)), self._watched[1]
        assert reader.size() == 1_024_000
        assert watched.calls == []
        assert reader.read(511, 3) == bytes((255, 0, 1))
        assert reader.read(511, 3) == bytes((255, 0, 1))
        assert [tuple(call) for call in watched.calls] == [("get", "data/a", 511, 514)] * 2

    def test_to_open_a_file_of_unknown_size_is_one_request(self, storage: Storage, other: Storage) -> None:
        write_file(storage, "data/a", b"one")
        reader = other.open("data/a")
        assert (reader.size(), reader.size()) == (3, 3)
        assert [(call.kind, call.name) for call in self._watched[1].calls] == [("head", "data/a")]

    def test_neighbours_are_one_request_and_all_are_one_round(self, storage: Storage, other: Storage) -> None:
        data = bytes(range(256)) * 8000
        write_file(storage, "data/a", data)
        write_file(storage, "data/b", data)
        wanted = [
            ByteRange("data/b", 100, 200),
            ByteRange("data/a", 1_500_000, 1_500_010),
            ByteRange("data/a", 300, 400),
            ByteRange("data/a", 0, 100),
            ByteRange("data/a", 50, 350),
            ByteRange("data/a", 400, 1000),
        ]
        assert other.read_ranges(wanted) == [data[one.start : one.stop] for one in wanted]
        watched = self._watched[1]
        asked = sorted(tuple(call) for call in watched.calls)
        assert asked == [
            ("get", "data/a", 0, 1000),
            ("get", "data/a", 1_500_000, 1_500_010),
            ("get", "data/b", 100, 200),
        ]
        assert watched.rounds == 1

    def test_a_silent_bucket_is_asked_again(self, storage: Storage, other: Storage) -> None:
        write_file(storage, "data/a", b"one")
        watched = self._watched[1]
        watched.script("get", _SILENCE, None, None, _SILENCE)
        wanted = [ByteRange("data/a", 0, 2), ByteRange("data/absent")]
        for _ in range(2):
            found = other.read_ranges(wanted)
            assert found[0] == b"on"
            assert isinstance(found[1], ObjectMissing)
        watched.script("get", _SILENCE)
        assert other.read_file("data/a", 10) == b"one"
        watched.down = _SILENCE
        assert [type(one) for one in other.read_ranges(wanted)] == [StorageUnavailable] * 2
        for attempt in (
            lambda: other.open("data/a"),
            lambda: other.open_known(Extent("data/a", 3)).read(0, 3),
            lambda: other.read_file("data/a", 3),
            lambda: other.exists("data/a"),
            lambda: other.list("data"),
            lambda: other.delete("data/a"),
        ):
            with pytest.raises(StorageUnavailable):
                attempt()

    def test_an_index_is_read_once(self, storage: Storage, other: Storage) -> None:
        data = bytes(range(256)) * 4000
        write_file(storage, "meta/a", data)
        reader = other.open_known(Extent("meta/a", len(data), 100_000, 4_000))
        for start in range(len(data) - 100_000, len(data) - 999, 999):
            assert reader.read(start, 999) == data[start : start + 999]
        assert self._watched[1].count("get") == 1

    def test_a_prefetched_index_is_read_without_a_request(self, storage: Storage, other: Storage) -> None:
        data = bytes(range(256)) * 400
        extents = [Extent(f"meta/{number}", len(data), 20_000, 4_000) for number in range(10)]
        for extent in extents:
            write_file(storage, extent.name, data)
        other.prefetch([*extents, Extent("meta/absent", 100, 10)])
        watched = self._watched[1]
        assert (watched.rounds, watched.count("get")) == (1, 11)
        watched.down = _SILENCE
        for extent in extents:
            assert other.open_known(extent).read(82_400, 20_000) == data[82_400:]

    def test_metadata_that_was_sent_is_not_fetched(self, storage: Storage, watched: WatchedObjects) -> None:
        data = bytes(range(256)) * 400
        write_file(storage, "meta/a", data)
        watched.forget()
        assert storage.open_known(Extent("meta/a", len(data), 20_000, 4_000)).read(82_400, 20_000) == data[82_400:]
        assert watched.calls == []

    # --- what it cost -----------------------------------------------------------------------------------------------

    def test_requests_are_counted_with_every_attempt(self, storage: Storage, watched: WatchedObjects) -> None:
        before = storage.requests()
        assert not any(before.values())
        watched.script("put", _SILENCE)
        watched.script("get", _SILENCE)
        write_file(storage, "data/a", b"0123456789")
        storage.put_if_absent("log/1", b"four")
        storage.open("data/a").read(2, 5)
        storage.list("data")
        storage.delete("data/a")
        expected = {"put": 2, "put_new": 1, "head": 1, "get": 2, "list": 1, "delete": 1, "part": 0, "restore": 0}
        assert storage.requests() == expected | {"bytes_in": 5, "bytes_out": 24}
        assert before != storage.requests()


def _until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.001)

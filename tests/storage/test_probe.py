"""Stores that create a name only once pass the probe; those that only say so are refused, on servers and on fakes."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from basin.errors import AlreadyExists, BasinError, ReadOnly, StorageError, StorageUnavailable
from basin.storage.fsspec_objects import open_fsspec
from basin.storage.memory_objects import MemoryObjects
from basin.storage.objects import Listing, ObjectStore
from basin.storage.probe import RACERS, ROUNDS, probe_create_only
from basin.testing.watched_objects import Unheard, WatchedObjects
from tests.storage.object_calls import POLICY
from tests.storage.s3_servers import S3Server

SILENCE = StorageUnavailable("no reply in time", reason="timeout")
DENIED = ReadOnly("403 Access Denied", reason="AccessDenied")
_EITHER_WAY = pytest.mark.parametrize("concurrent", [True, False])


def taken(name: str) -> AlreadyExists:
    return AlreadyExists(f"{name} is taken", object=name)


def refused(store: ObjectStore, *, concurrent: bool = True) -> StorageError:
    """The error with which the probe refuses a store that does not keep its word."""
    with pytest.raises(StorageError) as caught:
        probe_create_only(store, concurrent=concurrent)
    assert caught.value.fields["reason"] == "unconditional"
    assert store.url in str(caught.value)
    return caught.value


@_EITHER_WAY
def test_an_honest_store_passes(concurrent: bool) -> None:
    watched = WatchedObjects(MemoryObjects())
    probe_create_only(watched, concurrent=concurrent)
    assert watched.count("put_new") == ROUNDS * (RACERS + 1)
    assert watched.count("get") == 2 * ROUNDS
    assert len({call.name for call in watched.calls if call.kind == "put_new"}) == ROUNDS
    assert watched.list("") == watched.list("tmp") == Listing([], [])


def test_writers_race() -> None:
    """All writers of all races are under way at once: else the store that is meant would pass."""
    watched = WatchedObjects(MemoryObjects())
    together = threading.Barrier(ROUNDS * RACERS)
    watched.script("put_new", *[lambda: together.wait(30)] * ROUNDS * RACERS)
    probe_create_only(watched)
    assert not together.broken


class WithoutCondition(MemoryObjects):
    """Replaces what has the name."""

    def put_new(self, name: str, data: bytes) -> None:
        self.put(name, data)


class InTwoSteps(MemoryObjects):
    """Looks whether the name is free, and then stores: who comes between the two gets through as well."""

    def put_new(self, name: str, data: bytes) -> None:
        if any(name == f"tmp/{found.name}" for found in self.list("tmp").objects):
            raise taken(name)
        time.sleep(0.02)
        self.put(name, data)


class KeepsTheLast(MemoryObjects):
    """Tells one writer that it won, and stores the body of another."""

    def put_new(self, name: str, data: bytes) -> None:
        try:
            super().put_new(name, data)
        except AlreadyExists:
            self.put(name, data)
            raise


class KeepsNeither(MemoryObjects):
    """Tells everybody that the name is taken, and holds what nobody sent."""

    def put_new(self, name: str, data: bytes) -> None:
        self.put(name, b"what nobody sent")
        raise taken(name)


class KeepsNothing(MemoryObjects):
    """Tells everybody that the name is taken, and stores nothing."""

    def put_new(self, name: str, data: bytes) -> None:
        raise taken(name)


class TellsTwo(MemoryObjects):
    """Keeps the first body, and tells whoever comes next that he won, too."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: Counter[str] = Counter()
        self.mutex = threading.Lock()

    def put_new(self, name: str, data: bytes) -> None:
        with self.mutex:
            try:
                super().put_new(name, data)
            except AlreadyExists:
                self.losses[name] += 1
                if self.losses[name] > 1:
                    raise


class TellsTheWrongOne(MemoryObjects):
    """Keeps the first body and says that the name was taken; the second one hears that he won."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: Counter[str] = Counter()
        self.mutex = threading.Lock()

    def put_new(self, name: str, data: bytes) -> None:
        with self.mutex:
            self.puts[name] += 1
            if self.puts[name] == 1:
                self.put(name, data)
            if self.puts[name] != 2:
                raise taken(name)


class OverwritesLate(MemoryObjects):
    """One wins among those who race; who comes later replaces the body, and is told that the name was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: Counter[str] = Counter()
        self.mutex = threading.Lock()

    def put_new(self, name: str, data: bytes) -> None:
        with self.mutex:
            self.puts[name] += 1
        if self.puts[name] > RACERS:
            self.put(name, data)
            raise taken(name)
        super().put_new(name, data)


@_EITHER_WAY
@pytest.mark.parametrize(
    "kind", [WithoutCondition, TellsTwo, TellsTheWrongOne, KeepsTheLast, KeepsNeither, KeepsNothing, OverwritesLate]
)
def test_a_store_that_does_not_keep_its_word_is_refused(kind: type[MemoryObjects], concurrent: bool) -> None:
    store = kind()
    refused(store, concurrent=concurrent)
    assert store.list("") == store.list("tmp") == Listing([], [])


def test_a_store_that_looks_first_and_stores_later_is_refused() -> None:
    store = InTwoSteps()
    probe_create_only(store, concurrent=False)
    assert "at the same time" in str(refused(store))


class BreaksOneRace(MemoryObjects):
    """Keeps its word for the names that it sees first, and overwrites the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.mutex = threading.Lock()

    def put_new(self, name: str, data: bytes) -> None:
        with self.mutex:
            if name not in self.names:
                self.names.append(name)
        if self.names.index(name) < ROUNDS - 1:
            super().put_new(name, data)
        else:
            self.put(name, data)


@_EITHER_WAY
def test_one_race_that_goes_wrong_is_enough(concurrent: bool) -> None:
    store = BreaksOneRace()
    refused(store, concurrent=concurrent)
    assert len(store.names) == ROUNDS


@_EITHER_WAY
def test_a_store_that_is_down_says_so(concurrent: bool) -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.down = SILENCE
    with pytest.raises(StorageUnavailable) as caught:
        probe_create_only(watched, concurrent=concurrent)
    assert caught.value.fields["reason"] == "timeout"
    assert watched.count("put_new") <= ROUNDS * RACERS


@_EITHER_WAY
def test_a_store_that_takes_nothing_but_can_be_read_is_down(concurrent: bool) -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.script("put_new", *[SILENCE] * ROUNDS * RACERS)
    with pytest.raises(StorageUnavailable):
        probe_create_only(watched, concurrent=concurrent)


@pytest.mark.parametrize("at", [0, RACERS - 1])
def test_a_store_that_may_not_be_written_says_so(at: int) -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.script("put_new", *[None] * at, DENIED)
    with pytest.raises(ReadOnly) as caught:
        probe_create_only(watched, concurrent=False)
    assert caught.value.fields["reason"] == "AccessDenied"
    assert watched.list("tmp") == Listing([], [])


@_EITHER_WAY
def test_lost_replies_and_conflicts_are_no_lies(concurrent: bool) -> None:
    watched = WatchedObjects(MemoryObjects())
    contended = StorageUnavailable("409 Conflict", reason="contended")
    steps = [Unheard(SILENCE), contended, SILENCE, Unheard(AlreadyExists("taken")), None, SILENCE]
    watched.script("put_new", *(step for _ in range(ROUNDS * 2) for step in steps))
    probe_create_only(watched, concurrent=concurrent)
    assert watched.list("tmp") == Listing([], [])


def test_a_store_of_which_nothing_can_be_deleted_passes() -> None:
    watched = WatchedObjects(MemoryObjects())
    watched.script("delete", DENIED)
    probe_create_only(watched)
    assert len(watched.list("tmp").objects) == ROUNDS


def test_probes_do_not_meet() -> None:
    store = MemoryObjects()
    failures: list[BasinError] = []

    def probe() -> None:
        try:
            probe_create_only(store)
        except BasinError as error:
            failures.append(error)

    threads = [threading.Thread(target=probe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.fixture
def opened() -> Iterator[Callable[[S3Server], ObjectStore]]:
    stores: list[ObjectStore] = []

    def open_bucket(server: S3Server) -> ObjectStore:
        stores.append(open_fsspec(server.new_url(), server.storage_options(), POLICY))
        return stores[-1]

    yield open_bucket
    for store in stores:
        store.close()


@pytest.mark.parametrize("name", ["ministack", "seaweedfs"])
def test_servers_that_pass(
    request: pytest.FixtureRequest, opened: Callable[[S3Server], ObjectStore], name: str
) -> None:
    store = opened(request.getfixturevalue(name))
    probe_create_only(store)
    assert store.list("tmp").objects == []


@pytest.mark.parametrize("name", ["rclone_serve", "swift"])
def test_servers_that_are_refused(
    request: pytest.FixtureRequest, opened: Callable[[S3Server], ObjectStore], name: str
) -> None:
    refused(opened(request.getfixturevalue(name)))

"""`StorageConformance`: what every implementation of the storage port must do, as tests to inherit.

    class TestMyStorage(StorageConformance):
        def make_storage(self, place): return MyStorage(place)
        def stored(self, place, name): ...            # the file's bytes, read around the storage; None if absent

`place` is a fresh `pathlib.Path` in a temporary folder for each test; a storage that is not made of files may use it as
a key. Two storages made for one place see the same files. Needs pytest; imports the storage port.
"""

# A test's name says the behaviour (D102). Fixtures may be there for their effect (ARG002).
# pytest calls by name (FBT001).
# ruff: noqa: FBT001

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from basin.errors import (
    AlreadyExists,
    BasinClosed,
    InvalidArgument,
    ObjectMissing,
    StorageError,
    StorageUnavailable,
    TruncatedStratum,
)
from basin.storage.protocol import TEMPORARY_FOLDER, Storage

_RACES = 20
_RACERS = 8

BAD_NAMES = (
    "",
    "/a",
    "a/",
    "a//b",
    "..",
    "a/../b",
    "./a",
    ".hidden",
    "A",
    "a b",
    "a\\b",
    "a\0b",
    "a\n",
    "ä",
    "a" * 256,
)


class StorageConformance(ABC):
    """Inherit, and define `make_storage` and `stored`."""

    @abstractmethod
    def make_storage(self, place: Path) -> Storage:
        """A new storage object on the files of `place`."""

    @abstractmethod
    def stored(self, place: Path, name: str) -> bytes | None:
        """The bytes of a file, read around the storage; `None` if it is absent."""

    @pytest.fixture
    def place(self, tmp_path: Path) -> Path:
        return tmp_path / "place"

    @pytest.fixture
    def storage(self, place: Path) -> Iterator[Storage]:
        made = self.make_storage(place)
        yield made
        made.close()

    @pytest.fixture
    def other(self, place: Path, storage: Storage) -> Iterator[Storage]:
        """A second storage on the same files, as another process has."""
        made = self.make_storage(place)
        yield made
        made.close()

    def test_appended_bytes_are_stored(self, place: Path, storage: Storage, other: Storage) -> None:
        with_parts = storage.create("data/a")
        assert with_parts.name == "data/a"
        assert with_parts.offset == 0
        with_parts.append(b"one")
        with_parts.append(bytearray(b"two"))
        with_parts.append(memoryview(b"-three-")[1:-1])
        with_parts.append(b"")
        assert with_parts.offset == 11
        with_parts.sync()
        with_parts.close()
        with_parts.close()
        assert self.stored(place, "data/a") == b"onetwothree"
        assert other.read_file("data/a", 100) == b"onetwothree"
        assert other.read_file("data/a", 3) == b"one"

    def test_a_large_append_is_complete(self, place: Path, storage: Storage) -> None:
        data = bytes(range(256)) * 12_345
        storage.create("a").append(data)
        assert self.stored(place, "a") == data

    def test_create_refuses_a_taken_name(self, place: Path, storage: Storage, other: Storage) -> None:
        storage.create("data/a").append(b"x")
        for again in (storage, other):
            with pytest.raises(AlreadyExists) as caught:
                again.create("data/a")
            assert caught.value.fields["object"] == "data/a"
            assert caught.value.fields["operation"] == "create"
        assert self.stored(place, "data/a") == b"x"

    def test_create_has_one_winner_among_threads(self, place: Path, storage: Storage) -> None:
        for number in range(_RACES):

            def create(_racer: int, name: str = f"race/{number}") -> None:
                storage.create(name)

            assert self._winners(create) == 1

    def test_a_file_can_be_read_while_it_grows(self, storage: Storage, other: Storage) -> None:
        writer = storage.create("a")
        writer.append(b"one")
        reader = other.open("a")
        assert (reader.name, reader.size(), reader.read(0, 3)) == ("a", 3, b"one")
        writer.append(b"two")
        assert (reader.size(), reader.read(2, 3), reader.read(6, 0)) == (6, b"etw", b"")
        reader.close()
        reader.close()

    def test_a_short_read_is_an_error(self, storage: Storage) -> None:
        storage.create("a").append(b"abc")
        reader = storage.open("a")
        for offset, size in ((0, 4), (2, 2), (3, 1), (99, 1)):
            with pytest.raises(TruncatedStratum) as caught:
                reader.read(offset, size)
            assert caught.value.fields == {"object": "a", "offset": offset}

    def test_append_to_goes_on_at_the_end(self, place: Path, storage: Storage, other: Storage) -> None:
        storage.create("a").append(b"one")
        again = other.append_to("a", 3)
        assert again.offset == 3
        again.append(b"two")
        assert again.offset == 6
        assert self.stored(place, "a") == b"onetwo"

    @pytest.mark.parametrize("offset", [0, 2, 4])
    def test_append_to_refuses_another_size(self, storage: Storage, offset: int) -> None:
        storage.create("a").append(b"one")
        with pytest.raises(StorageError):
            storage.append_to("a", offset)

    def test_what_is_missing_is_reported(self, storage: Storage) -> None:
        for attempt in (
            lambda: storage.open("data/a"),
            lambda: storage.append_to("data/a", 0),
            lambda: storage.link("data/a", "data/b"),
            lambda: storage.read_file("data/a", 10),
        ):
            with pytest.raises(ObjectMissing) as caught:
                attempt()
            assert caught.value.fields["object"] == "data/a"
        assert not storage.exists("data/a")
        assert storage.list("data") == storage.list_folders("data") == []

    def test_link_gives_a_second_name(self, place: Path, storage: Storage) -> None:
        storage.create("tmp/a").append(b"one")
        storage.link("tmp/a", "keys/1/slot.json")
        storage.delete("tmp/a")
        assert self.stored(place, "tmp/a") is None
        assert self.stored(place, "keys/1/slot.json") == b"one"

    def test_link_never_replaces(self, place: Path, storage: Storage) -> None:
        storage.create("a").append(b"one")
        storage.create("b").append(b"two")
        with pytest.raises(AlreadyExists) as caught:
            storage.link("a", "b")
        assert caught.value.fields["object"] == "b"
        assert self.stored(place, "b") == b"two"

    def test_delete_is_idempotent_and_open_files_go_on(self, place: Path, storage: Storage) -> None:
        storage.create("data/a").append(b"one")
        reader = storage.open("data/a")
        for _ in range(2):
            storage.delete("data/a")
        storage.delete("nowhere/a")
        assert self.stored(place, "data/a") is None
        assert not storage.exists("data/a")
        assert reader.read(0, 3) == b"one"

    def test_lists_are_sorted_and_keep_files_and_folders_apart(self, storage: Storage) -> None:
        for name in ("b", "a", "data/2", "data/10", "keys/2/x", "keys/1/y", "keys/0"):
            storage.create(name).close()
        assert storage.list("") == ["a", "b"]
        assert storage.list_folders("") == ["data", "keys"]
        assert storage.list("data") == ["10", "2"]
        assert storage.list("keys") == ["0"]
        assert storage.list_folders("keys") == ["1", "2"]
        assert storage.list("keys/1") == ["y"]

    def test_folders_can_be_synced(self, storage: Storage) -> None:
        storage.create("keys/1/slot.json").close()
        for folder in ("keys/1", "keys", "", "keys/1"):
            storage.sync_folder(folder)
        with pytest.raises(ObjectMissing):
            storage.sync_folder("nowhere")

    def test_reserve_allocates_once(self, place: Path, storage: Storage) -> None:
        storage.reserve("reserve", 5000)
        stored = self.stored(place, "reserve")
        assert stored is not None
        assert len(stored) == 5000
        storage.reserve("reserve", 9)
        assert self.stored(place, "reserve") == stored
        storage.reserve("data/none", 0)
        assert self.stored(place, "data/none") == b""

    def test_put_if_absent_stores_all_or_refuses(self, place: Path, storage: Storage) -> None:
        storage.put_if_absent("log/1", b"one")
        with pytest.raises(AlreadyExists):
            storage.put_if_absent("log/1", b"two")
        assert self.stored(place, "log/1") == b"one"
        assert storage.list(TEMPORARY_FOLDER) == []

    def test_put_if_absent_has_one_winner_whose_bytes_are_stored(self, place: Path, storage: Storage) -> None:
        for number in range(_RACES):
            name = f"log/{number}"
            won: list[int] = []

            def put(racer: int, name: str = name, won: list[int] = won) -> None:
                storage.put_if_absent(name, bytes([racer]) * 1000)
                won.append(racer)

            assert self._winners(put) == 1
            assert self.stored(place, name) == bytes(won) * 1000

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_names_are_validated(self, storage: Storage, name: str) -> None:
        storage.create("good").append(b"x")
        for attempt in (
            lambda: storage.create(name),
            lambda: storage.append_to(name, 0),
            lambda: storage.open(name),
            lambda: storage.link("good", name),
            lambda: storage.link(name, "better"),
            lambda: storage.delete(name),
            lambda: storage.exists(name),
            lambda: storage.reserve(name, 1),
            lambda: storage.lock(name),
            lambda: storage.put_if_absent(name, b""),
        ):
            with pytest.raises(InvalidArgument):
                attempt()
        if name:
            for folder_attempt in (storage.sync_folder, storage.list, storage.list_folders):
                with pytest.raises(InvalidArgument):
                    folder_attempt(name)

    def test_a_lock_excludes_other_handles(self, storage: Storage, other: Storage) -> None:
        first, second = storage.lock("log/lock"), other.lock("log/lock")
        first.acquire(0)
        with pytest.raises(StorageUnavailable) as caught:
            second.acquire(0)
        assert caught.value.fields["object"] == "log/lock"
        first.release()
        second.acquire(0)
        second.close()
        first.acquire(0)
        with first:
            pass
        storage.lock("log/lock").acquire(0)

    def test_closing_a_storage_gives_its_locks_back(self, storage: Storage, other: Storage) -> None:
        held = other.lock("log/lock")
        held.acquire(0)
        with pytest.raises(StorageUnavailable):
            storage.lock("log/lock").acquire(0)
        other.close()
        storage.lock("log/lock").acquire(0)

    def test_a_lock_is_waited_for(self, storage: Storage, other: Storage) -> None:
        first, second = storage.lock("lock"), other.lock("lock")
        first.acquire(0)
        failures: list[BaseException] = []

        def wait() -> None:
            try:
                second.acquire(10)
                second.release()
            except BaseException as error:  # noqa: BLE001 (handed to the test's thread)
                failures.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.02)
        assert waiter.is_alive()
        first.release()
        waiter.join(10)
        assert not waiter.is_alive()
        assert not failures

    def test_waiting_for_a_lock_ends(self, storage: Storage, other: Storage) -> None:
        first, second = storage.lock("lock"), other.lock("lock")
        holder = threading.Thread(target=first.acquire, args=(0,))
        holder.start()
        holder.join()
        begin = time.monotonic()
        with pytest.raises(StorageUnavailable):
            second.acquire(0.05)
        assert 0.04 <= time.monotonic() - begin < 5

    @pytest.mark.parametrize("shared", [True, False])
    def test_a_lock_excludes_threads(self, storage: Storage, shared: bool) -> None:
        """Without exclusion, `inside` is seen above 1 and the sum comes out short."""
        common = storage.lock("lock")
        inside = highest = total = 0

        def work() -> None:
            nonlocal inside, highest, total
            lock = common if shared else storage.lock("lock")
            for _ in range(50):
                lock.acquire(30)
                inside += 1
                highest = max(highest, inside)
                before = total
                time.sleep(0)
                total = before + 1
                inside -= 1
                lock.release()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (highest, total) == (1, 200)

    def test_a_lock_file_holds_bytes(self, place: Path, storage: Storage, other: Storage) -> None:
        lock = storage.lock("lock")
        assert lock.read() == b""
        lock.acquire(0)
        lock.write(b"one-two")
        lock.write(b"six")
        lock.release()
        assert other.lock("lock").read() == b"six-two"
        assert self.stored(place, "lock") == b"six-two"

    def test_a_boot_id_is_stable(self, storage: Storage, other: Storage) -> None:
        assert len(storage.boot_id()) == 16
        assert storage.boot_id() == other.boot_id()

    def test_a_fresh_place_is_writable(self, storage: Storage) -> None:
        assert storage.writable()

    def test_nothing_can_be_used_after_closing(self, storage: Storage) -> None:
        writer = storage.create("a")
        writer.append(b"x")
        reader, lock = storage.open("a"), storage.lock("lock")
        storage.close()
        storage.close()
        for attempt in (
            lambda: writer.append(b"y"),
            writer.sync,
            lambda: reader.read(0, 1),
            reader.size,
            lambda: lock.acquire(0),
            lock.read,
            lambda: lock.write(b"x"),
            lambda: storage.open("a"),
            lambda: storage.create("b"),
            lambda: storage.list(""),
            lambda: storage.sync_folder(""),
        ):
            with pytest.raises(BasinClosed):
                attempt()

    def _winners(self, attempt: Callable[[int], object]) -> int:
        """Let many threads attempt the same at once; return how many got through."""
        barrier = threading.Barrier(_RACERS)
        outcomes: list[BaseException | None] = []

        def race(racer: int) -> None:
            barrier.wait()
            try:
                attempt(racer)
                outcomes.append(None)
            except BaseException as error:  # noqa: BLE001 (judged below)
                outcomes.append(error)

        threads = [threading.Thread(target=race, args=(racer,)) for racer in range(_RACERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        losers = [outcome for outcome in outcomes if outcome is not None]
        assert all(isinstance(outcome, AlreadyExists) for outcome in losers), losers
        return outcomes.count(None)

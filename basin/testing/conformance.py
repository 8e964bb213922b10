"""What every implementation of the storage port must do, as tests to inherit.

    class TestMyStorage(DiskConformance):
        def make_storage(self, place): return MyStorage(place)
        def stored(self, place, name): ...            # the file's bytes, read around the storage; None if absent

`StorageConformance` is what all storages have in common. `DiskConformance` adds files that others read while they grow,
links and locks; `bucket_conformance` adds what holds where files are objects. A storage passes one of these two.

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
    BasinError,
    InvalidArgument,
    ObjectMissing,
    StorageError,
    StorageUnavailable,
    TruncatedStratum,
)
from basin.storage.objects import ByteRange
from basin.storage.protocol import TEMPORARY_FOLDER, Extent, Storage

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
    """Inherit one of the two that add to it, and define `make_storage` and `stored`."""

    races = 20
    """Rounds of eight threads that want one name."""

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

    def test_a_finished_file_is_stored(self, place: Path, storage: Storage, other: Storage) -> None:
        with_parts = storage.create("data/a")
        assert with_parts.name == "data/a"
        assert with_parts.offset == 0
        with_parts.append(b"one")
        with_parts.append(bytearray(b"two"))
        with_parts.append(memoryview(b"-three-")[1:-1])
        with_parts.append(b"")
        assert with_parts.offset == 11
        with_parts.finish()
        with_parts.sync()
        assert with_parts.is_sent()
        with_parts.close()
        with_parts.close()
        storage.sync_folder("data")
        assert self.stored(place, "data/a") == b"onetwothree"
        assert other.read_file("data/a", 100) == b"onetwothree"
        assert other.read_file("data/a", 3) == b"one"
        assert other.exists("data/a")

    def test_a_large_file_is_complete(self, place: Path, storage: Storage, other: Storage) -> None:
        data = bytes(range(256)) * 12_345
        write_file(storage, "a", data)
        assert self.stored(place, "a") == data
        reader = other.open("a")
        assert reader.size() == len(data)
        assert reader.read(0, len(data)) == data
        assert reader.read(1_234_567, 7) == data[1_234_567:1_234_574]

    def test_an_empty_file_is_stored(self, place: Path, storage: Storage, other: Storage) -> None:
        write_file(storage, "a", b"")
        assert self.stored(place, "a") == b""
        assert other.open("a").size() == 0
        assert other.open("a").read(0, 0) == other.read_file("a", 10) == b""

    def test_what_this_storage_is_writing_is_not_created_again(self, storage: Storage) -> None:
        storage.create("data/a").append(b"x")
        with pytest.raises(AlreadyExists) as caught:
            storage.create("data/a")
        assert caught.value.fields["object"] == "data/a"
        assert caught.value.fields["operation"] == "create"

    def test_create_has_one_winner_among_threads(self, storage: Storage) -> None:
        for number in range(self.races):

            def create(_racer: int, name: str = f"race/{number}") -> None:
                storage.create(name)

            assert _winners(create) == 1

    def test_its_writer_reads_a_file_while_it_grows(self, storage: Storage) -> None:
        writer = storage.create("a")
        writer.append(b"one")
        reader = storage.open("a")
        assert (reader.name, reader.size(), reader.read(0, 3)) == ("a", 3, b"one")
        writer.append(b"two")
        assert (reader.size(), reader.read(2, 3), reader.read(6, 0)) == (6, b"etw", b"")
        assert storage.read_ranges([ByteRange("a", 4, 9), ByteRange("a", 1, 2), ByteRange("a", 5)]) == [
            b"wo",
            b"n",
            b"o",
        ]
        writer.finish()
        writer.sync()
        writer.close()
        assert (reader.size(), reader.read(2, 3)) == (6, b"etw")
        reader.close()
        reader.close()

    def test_a_short_read_is_an_error(self, storage: Storage) -> None:
        write_file(storage, "a", b"abc")
        for reader in (storage.open("a"), storage.open_known(Extent("a", 3)), storage.open_known(Extent("a", 3, 3, 3))):
            for offset, size in ((0, 4), (2, 2), (3, 1), (99, 1)):
                with pytest.raises(TruncatedStratum) as caught:
                    reader.read(offset, size)
                assert caught.value.fields["object"] == "a"

    def test_what_is_missing_is_reported(self, storage: Storage) -> None:
        for attempt in (lambda: storage.open("data/a"), lambda: storage.read_file("data/a", 10)):
            with pytest.raises(ObjectMissing) as caught:
                attempt()
            assert caught.value.fields["object"] == "data/a"
        with pytest.raises(ObjectMissing):
            storage.open_known(Extent("data/a", 10)).read(0, 10)
        assert not storage.exists("data/a")
        assert storage.list("data") == storage.list_folders("data") == []

    def test_a_known_file_is_read_as_any_other(self, storage: Storage, other: Storage) -> None:
        data = bytes(range(256)) * 100
        write_file(storage, "meta/a", data)
        for extent in (Extent("meta/a", 25_600), Extent("meta/a", 25_600, 5_000), Extent("meta/a", 25_600, 9_000, 300)):
            reader = other.open_known(extent)
            assert (reader.name, reader.size()) == ("meta/a", 25_600)
            for start, stop in ((0, 1), (100, 20_000), (20_600, 25_600), (25_599, 25_600), (7, 7)):
                assert reader.read(start, stop - start) == data[start:stop]
            reader.close()

    def test_ranges_keep_their_order_and_their_errors(self, storage: Storage, other: Storage) -> None:
        write_file(storage, "data/a", b"0123456789")
        write_file(storage, "b", b"")
        wanted = {
            ByteRange("data/a", 7, 9): b"78",
            ByteRange("absent", 0, 1): ObjectMissing,
            ByteRange("data/a", 0, 3): b"012",
            ByteRange("b"): b"",
            ByteRange("data/a", 2, 8): b"234567",
            ByteRange("data/absent"): ObjectMissing,
            ByteRange("data/a", 4): b"456789",
            ByteRange("data/a", 8, 12): b"89",
            ByteRange("data/a", 11, 12): b"",
            ByteRange("data/a", 5, 5): b"",
        }
        for rows in (list(wanted), list(wanted)[::-1], [*wanted, *wanted]):
            found = other.read_ranges(rows)
            assert [type(one) if isinstance(one, BasinError) else one for one in found] == [wanted[row] for row in rows]
        assert other.read_ranges([]) == []

    def test_a_hint_of_what_is_read_next_changes_nothing(self, storage: Storage, other: Storage) -> None:
        write_file(storage, "meta/a", b"0123456789")
        extents = [Extent("meta/a", 10, 5, 2), Extent("meta/absent", 10, 5, 2), Extent("meta/a", 10)]
        other.prefetch(extents)
        other.prefetch([])
        assert other.open_known(extents[0]).read(5, 5) == b"56789"
        with pytest.raises(ObjectMissing):
            other.open_known(extents[1]).read(5, 5)

    def test_delete_is_idempotent(self, place: Path, storage: Storage, other: Storage) -> None:
        write_file(storage, "data/a", b"one")
        for _ in range(2):
            storage.delete("data/a")
        storage.delete("nowhere/a")
        assert self.stored(place, "data/a") is None
        for one in (storage, other):
            assert not one.exists("data/a")
            assert one.list("data") == []

    def test_lists_are_sorted_and_keep_files_and_folders_apart(self, storage: Storage, other: Storage) -> None:
        for name in ("b", "a", "data/2", "data/10", "keys/2/x", "keys/1/y", "keys/0"):
            write_file(storage, name, b"x")
        assert other.list("") == ["a", "b"]
        assert other.list_folders("") == ["data", "keys"]
        assert other.list("data") == ["10", "2"]
        assert other.list("keys") == ["0"]
        assert other.list_folders("keys") == ["1", "2"]
        assert other.list("keys/1") == ["y"]
        assert other.list("nowhere") == other.list_folders("nowhere") == []

    def test_put_if_absent_stores_all_or_refuses(self, place: Path, storage: Storage, other: Storage) -> None:
        storage.put_if_absent("log/1", b"one")
        for one in (storage, other):
            with pytest.raises(AlreadyExists):
                one.put_if_absent("log/1", b"two")
        assert self.stored(place, "log/1") == b"one"
        assert storage.list(TEMPORARY_FOLDER) == []

    def test_put_if_absent_has_one_winner_whose_bytes_are_stored(
        self, place: Path, storage: Storage, other: Storage
    ) -> None:
        for number in range(self.races):
            name = f"log/{number}"
            won: list[int] = []

            def put(racer: int, name: str = name, won: list[int] = won) -> None:
                (storage, other)[racer % 2].put_if_absent(name, bytes([racer]) * 1000)
                won.append(racer)

            assert _winners(put) == 1
            assert self.stored(place, name) == bytes(won) * 1000

    def test_one_writer_alone_creates_a_name(self, storage: Storage) -> None:
        storage.require_create_only()
        storage.require_create_only()
        assert storage.list(TEMPORARY_FOLDER) == []

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_names_are_validated(self, storage: Storage, name: str) -> None:
        for attempt in (
            lambda: storage.create(name),
            lambda: storage.open(name),
            lambda: storage.open_known(Extent(name, 10)),
            lambda: storage.read_file(name, 10),
            lambda: storage.delete(name),
            lambda: storage.exists(name),
            lambda: storage.reserve(name, 1),
            lambda: storage.put_if_absent(name, b""),
        ):
            with pytest.raises(InvalidArgument):
                attempt()
        (found,) = storage.read_ranges([ByteRange(name, 0, 1)])
        assert isinstance(found, InvalidArgument)
        if name:
            for folder_attempt in (storage.sync_folder, storage.list, storage.list_folders):
                with pytest.raises(InvalidArgument):
                    folder_attempt(name)

    def test_a_boot_id_is_stable(self, storage: Storage, other: Storage) -> None:
        assert len(storage.boot_id()) == 16
        assert storage.boot_id() == other.boot_id()

    def test_a_fresh_place_is_writable(self, storage: Storage) -> None:
        assert storage.writable()

    def test_nothing_can_be_used_after_closing(self, storage: Storage) -> None:
        write_file(storage, "a", b"x")
        writer, reader = storage.create("b"), storage.open("a")
        writer.append(b"x")
        storage.close()
        storage.close()
        for attempt in (
            lambda: writer.append(b"y"),
            writer.sync,
            lambda: reader.read(0, 1),
            lambda: storage.open("a"),
            lambda: storage.open_known(Extent("a", 1)),
            lambda: storage.read_file("a", 1),
            lambda: storage.exists("a"),
            lambda: storage.create("c"),
            lambda: storage.delete("a"),
            lambda: storage.put_if_absent("c", b""),
            lambda: storage.list(""),
            lambda: storage.list_folders(""),
            lambda: storage.sync_folder(""),
        ):
            with pytest.raises(BasinClosed):
                attempt()
        writer.close()
        reader.close()


class DiskConformance(StorageConformance):
    """Of a storage whose `objects` is None: files are seen while they grow, have several names and locks."""

    def test_files_are_no_objects(self, storage: Storage) -> None:
        assert storage.objects is None
        assert storage.requests() == {}

    def test_what_is_appended_is_seen_at_once(self, place: Path, storage: Storage) -> None:
        file = storage.create("a")
        assert self.stored(place, "a") == b""
        file.append(b"one")
        assert self.stored(place, "a") == b"one"
        file.finish()
        assert file.is_sent()
        file.append(b"two")
        assert self.stored(place, "a") == b"onetwo"

    def test_create_refuses_a_taken_name(self, place: Path, storage: Storage, other: Storage) -> None:
        storage.create("data/a").append(b"x")
        for again in (storage, other):
            with pytest.raises(AlreadyExists) as caught:
                again.create("data/a")
            assert caught.value.fields["object"] == "data/a"
            assert caught.value.fields["operation"] == "create"
        assert self.stored(place, "data/a") == b"x"

    def test_others_read_a_file_while_it_grows(self, storage: Storage, other: Storage) -> None:
        writer = storage.create("a")
        writer.append(b"one")
        reader = other.open("a")
        assert (reader.name, reader.size(), reader.read(0, 3)) == ("a", 3, b"one")
        writer.append(b"two")
        assert (reader.size(), reader.read(2, 3), reader.read(6, 0)) == (6, b"etw", b"")
        reader.close()
        reader.close()

    def test_a_short_read_says_where(self, storage: Storage) -> None:
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

    def test_what_is_missing_neither_grows_nor_gets_a_name(self, storage: Storage) -> None:
        for attempt in (lambda: storage.append_to("data/a", 0), lambda: storage.link("data/a", "data/b")):
            with pytest.raises(ObjectMissing) as caught:
                attempt()
            assert caught.value.fields["object"] == "data/a"

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

    def test_open_files_go_on_when_their_name_is_gone(self, storage: Storage) -> None:
        storage.create("data/a").append(b"one")
        reader = storage.open("data/a")
        storage.delete("data/a")
        assert reader.read(0, 3) == b"one"

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

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_names_of_links_and_locks_are_validated(self, storage: Storage, name: str) -> None:
        storage.create("good").append(b"x")
        for attempt in (
            lambda: storage.append_to(name, 0),
            lambda: storage.link("good", name),
            lambda: storage.link(name, "better"),
            lambda: storage.lock(name),
        ):
            with pytest.raises(InvalidArgument):
                attempt()

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

    def test_no_open_file_or_lock_can_be_used_after_closing(self, storage: Storage) -> None:
        writer = storage.create("a")
        writer.append(b"x")
        reader, lock = storage.open("a"), storage.lock("lock")
        storage.close()
        for attempt in (
            reader.size,
            lambda: lock.acquire(0),
            lock.read,
            lambda: lock.write(b"x"),
            lambda: storage.append_to("a", 1),
            lambda: storage.link("a", "b"),
            lambda: storage.lock("lock"),
        ):
            with pytest.raises(BasinClosed):
                attempt()


def write_file(storage: Storage, name: str, data: bytes) -> None:
    """A whole file, durable."""
    file = storage.create(name)
    file.append(data)
    file.finish()
    file.sync()
    file.close()


def _winners(attempt: Callable[[int], object]) -> int:
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

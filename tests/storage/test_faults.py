"""`FaultStorage` fails the calls it is told to, with the errors of the real disk; the wrappers keep the promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from basin.errors import BasinError, OutOfSpace, ReadOnly, StorageError
from basin.storage.protocol import Storage
from basin.testing.conformance import DiskConformance
from basin.testing.crash import crash_states
from basin.testing.disk import SimulatedDisk
from basin.testing.faults import CountingStorage, Fault, FaultStorage, Killed, nth_call
from basin.testing.simulated import SimulatedStorage


def script(storage: Storage) -> None:
    """One call of each kind, in a known order."""
    file = storage.create("data/a")
    file.append(b"abcdef")
    file.sync()
    storage.sync_folder("data")
    lock = storage.lock("lock")
    lock.acquire(0)
    lock.write(b"12345678")
    lock.read()
    lock.release()
    storage.link("data/a", "data/b")
    storage.delete("data/a")
    reader = storage.open("data/b")
    reader.read(0, reader.size())
    storage.append_to("data/b", 6)
    storage.list("data")
    storage.list_folders("")
    storage.reserve("reserve", 10)
    storage.boot_id()


ORDER = [
    "create",
    "append",
    "sync",
    "sync_folder",
    "lock",
    "acquire",
    "write",
    "read",
    "release",
    "link",
    "delete",
    "open",
    "size",
    "read",
    "append_to",
    "list",
    "list_folders",
    "reserve",
    "boot_id",
]


class _Wrapped(DiskConformance):
    @pytest.fixture(autouse=True)
    def _fresh_disks(self) -> None:
        self.disks: dict[Path, SimulatedDisk] = {}

    def inner(self, place: Path) -> Storage:
        return SimulatedStorage(self.disks.setdefault(place, SimulatedDisk()))

    def stored(self, place: Path, name: str) -> bytes | None:
        return self.disks[place].kill_image().contents().get(name)


class TestFaultStorageWithoutFaults(_Wrapped):
    def make_storage(self, place: Path) -> Storage:
        return FaultStorage(self.inner(place))


class TestCountingStorage(_Wrapped):
    def make_storage(self, place: Path) -> Storage:
        return CountingStorage(self.inner(place))


def test_calls_and_bytes_are_counted() -> None:
    storage = CountingStorage(SimulatedStorage(SimulatedDisk()))
    script(storage)
    assert storage.calls == {operation: ORDER.count(operation) for operation in ORDER}
    assert storage.bytes == {"append": 6, "write": 8, "read": 6, "reserve": 10}


def test_every_call_has_a_number() -> None:
    storage = FaultStorage(SimulatedStorage(SimulatedDisk()))
    script(storage)
    assert [operation for operation, _ in storage.history] == ORDER
    assert (storage.calls, storage.fired) == (len(ORDER), 0)


@pytest.mark.parametrize("fault", list(Fault))
def test_the_nth_call_fails_for_every_n(fault: Fault) -> None:
    kinds: dict[Fault, tuple[type[BasinError], ...]] = {
        Fault.ENOSPC: (OutOfSpace,),
        Fault.EACCES: (ReadOnly, StorageError),
    }
    failed = []
    for number, operation in enumerate(ORDER, 1):
        storage = FaultStorage(SimulatedStorage(SimulatedDisk()), nth_call(fault, number))
        if not fault.applies_to(operation):
            script(storage)
            continue
        failed.append(operation)
        if fault in (Fault.KILL, Fault.KILL_IN_WRITE):
            with pytest.raises(Killed):
                script(storage)
        else:
            with pytest.raises(kinds.get(fault, (StorageError,))) as caught:
                script(storage)
            assert caught.value.fields["operation"] == operation
            assert isinstance(caught.value.__cause__, OSError)
        assert (storage.calls, storage.fired) == (number, 1)
    assert failed


def test_once_is_once_and_forever_is_forever() -> None:
    for forever in (False, True):
        storage = FaultStorage(SimulatedStorage(SimulatedDisk()), nth_call(Fault.EIO, 2, forever=forever))
        storage.list("")
        with pytest.raises(StorageError):
            storage.list("")
        if forever:
            with pytest.raises(StorageError):
                storage.list("")
        else:
            storage.list("")


def test_a_short_write_leaves_a_part_and_ends_the_file() -> None:
    disk = SimulatedDisk()
    storage = FaultStorage(SimulatedStorage(disk), nth_call(Fault.SHORT_WRITE, 2))
    file = storage.create("a")
    with pytest.raises(StorageError):
        file.append(b"abcdef")
    assert file.offset == 3
    assert disk.kill_image().contents() == {"a": b"abc"}
    for attempt in (file.sync, lambda: file.append(b"x")):
        with pytest.raises(StorageError, match="earlier"):
            attempt()


@pytest.mark.parametrize(("fault", "survives"), [(Fault.SYNC_LOST, False), (Fault.SYNC_DONE, True)])
def test_a_failed_sync_may_have_worked(fault: Fault, survives: bool) -> None:
    disk = SimulatedDisk()
    storage = FaultStorage(SimulatedStorage(disk), nth_call(fault, 4))
    file = storage.create("a")
    storage.sync_folder("")
    file.append(b"abc")
    with pytest.raises(StorageError):
        file.sync()
    storage.append_to("a", 3).sync()  # A second sync reports success, and writes nothing that the first one lost.
    left = {image.contents()["a"] for image in crash_states(disk)}
    assert (left == {b"abc"}) == survives


def test_a_killed_process_does_nothing_more_and_frees_its_locks() -> None:
    disk = SimulatedDisk()
    storage = FaultStorage(SimulatedStorage(disk), nth_call(Fault.KILL_IN_WRITE, 4))
    file = storage.create("a")
    lock = storage.lock("lock")
    lock.acquire(0)
    with pytest.raises(Killed):
        file.append(b"abcdef")
    for attempt in (lambda: file.append(b"x"), lock.release, lambda: storage.delete("a"), lambda: storage.exists("a")):
        with pytest.raises(Killed):
            attempt()
    assert disk.kill_image().contents() == {"a": b"abc", "lock": b""}
    storage.close()
    SimulatedStorage(disk).lock("lock").acquire(0)

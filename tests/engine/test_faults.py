"""An error at every storage call, once and for ever, and a kill at every storage call.

The same script runs again and again, each time with one more call that goes right before the fault. Whatever happens:
errors are Basin's own, nothing is called damage that is none, reads return what was acknowledged or on its way, the
next process goes on in the same boot, and what is acknowledged is there after a power cut.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest

import basin
from basin.api import Database
from basin.engine.checkpoints import checkpoint
from basin.engine.merging import flush
from basin.errors import BasinError, BasinPoisoned, CorruptionError, OutOfSpace, StorageError
from basin.testing.crash import Bounds, crash_states
from basin.testing.disk import DiskImage, SimulatedDisk
from basin.testing.faults import Fault, FaultStorage, Killed, nth_call
from basin.testing.simulated import SimulatedStorage
from tests.engine.crash_story import SECRET, Expected, Story, open_on, prepared, scattered

OPTIONS: Final[dict[str, Any]] = {"stratum_size": 4096}
AFTERWARDS: Final = Bounds(sectors=2, positions=2, versions=1, sizes=4, file_states=8, entries=2, states=12)
POWER_CUTS: Final = 4
Step = Callable[[Story, Database], None]


def _prepare(story: Story) -> None:
    for number in range(3):
        with story.open() as database:
            story.put(
                database, {f"first-{number}".encode(): scattered(f"f{number}", 40)}, scattered(f"old {number}", 300)
            )
            flush(database.core)


def _put(story: Story, database: Database) -> None:
    story.put(database, {b"a": b"1", b"long": scattered("long", 200)}, scattered("new", 900), scattered("two", 1900))


def _put_large(story: Story, database: Database) -> None:
    story.put(database, {b"b": b"2"}, scattered("many parts", 5000))


def _delete(story: Story, database: Database) -> None:
    story.delete(database, b"first-1", contents=(scattered("old 1", 300),))


def _count(story: Story, database: Database) -> None:
    with story.committing(story.model.plus({b"count": b"1"})), database.transaction() as work:
        work[b"count"] = str(int(work.get(b"count", b"0")) + 1).encode()


def _upkeep(story: Story, database: Database) -> None:
    story.compare(database, story.acknowledged)
    flush(database.core)
    checkpoint(database.core)


def _overwrite(story: Story, database: Database) -> None:
    story.put(database, {b"a": b"3"}, scattered("old 0", 300))


STEPS: Final[tuple[Step, ...]] = (_put, _put_large, _delete, _count, _upkeep, _overwrite)


class Attempt:
    """One run of the script on a fresh disk, against a storage or an interpreter that fails."""

    def __init__(self, image: DiskImage, start: Expected) -> None:
        self.story = Story(start, **OPTIONS)
        self.disk = SimulatedDisk.from_image(image, boot=1)
        self.story.begin(self.disk)
        self.raised: list[BaseException] = []

    def run(self, storage: Any) -> None:
        """The script; a step that fails does not keep the next ones from being tried."""
        database: Database | None = None
        with self._recorded():
            database = self.story.open(storage)
        if database is not None:
            for step in STEPS:
                with self._recorded():
                    step(self.story, database)
                if self.raised and isinstance(self.raised[-1], KeyboardInterrupt):
                    with self._recorded():  # The interrupt may have come after the commit was done.
                        self.story.settle(database)
            with self._recorded():
                self.story.compare(database, self.story.acknowledged)
            with self._recorded():
                database.close()
        storage.close()

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        try:
            yield
        except (BasinError, Killed, KeyboardInterrupt) as error:
            self.raised.append(error)

    def require_good_afterwards(self) -> None:
        """The next process goes on, and a power cut then loses nothing."""
        story = self.story
        with story.open() as survivor:
            story.settle(survivor)
            story.put(survivor, {b"afterwards": b"1"}, scattered("new", 900), scattered("two", 1900))
            damage = [finding for finding in survivor.check(read_data=True) if finding.severity == "damage"]
            assert not damage
        for image in crash_states(self.disk, bounds=AFTERWARDS, limit=POWER_CUTS):
            story.check(SimulatedStorage(SimulatedDisk.from_image(image, boot=2)), story.acknowledged)


@pytest.fixture(scope="module")
def beginning() -> tuple[DiskImage, Expected]:
    return prepared(_prepare, **OPTIONS)


def _calls_that_may(fault: Fault, beginning: tuple[DiskImage, Expected]) -> list[int]:
    """The numbers of the calls of an undisturbed run to which the fault can happen."""
    attempt = Attempt(*beginning)
    storage = FaultStorage(SimulatedStorage(attempt.disk))
    attempt.run(storage)
    assert not attempt.raised
    attempt.require_good_afterwards()
    return [number for number, (operation, _) in enumerate(storage.history, 1) if fault.applies_to(operation)]


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True], ids=["once", "for-ever"])
@pytest.mark.parametrize("fault", [fault for fault in Fault if fault not in (Fault.KILL, Fault.KILL_IN_WRITE)])
def test_an_error_at_any_storage_call_loses_nothing(
    fault: Fault, forever: bool, beginning: tuple[DiskImage, Expected]
) -> None:
    numbers = _calls_that_may(fault, beginning)
    fired = 0
    for number in numbers:
        attempt = Attempt(*beginning)
        storage = FaultStorage(SimulatedStorage(attempt.disk), nth_call(fault, number, forever=forever))
        try:
            attempt.run(storage)
            fired += storage.fired > 0
            for error in attempt.raised:
                assert isinstance(error, BasinError)
                assert not isinstance(error, CorruptionError), "an error of the disk is called damage"
            attempt.require_good_afterwards()
        except Exception as failure:
            operation, name = storage.history[number - 1] if number <= len(storage.history) else ("", "")
            raise AssertionError(f"{fault.name} at call {number}, {operation} {name}") from failure
    print(f"{fault.name} {'for ever' if forever else 'once'}: {len(numbers)} calls, {fired} fired")
    assert numbers
    assert fired >= 0.9 * len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.KILL, Fault.KILL_IN_WRITE])
def test_a_kill_at_any_storage_call_loses_nothing(fault: Fault, beginning: tuple[DiskImage, Expected]) -> None:
    numbers = _calls_that_may(fault, beginning)
    for number in numbers:
        attempt = Attempt(*beginning)
        storage = FaultStorage(SimulatedStorage(attempt.disk), nth_call(fault, number))
        try:
            attempt.run(storage)
            assert any(isinstance(error, Killed) for error in attempt.raised)
            attempt.require_good_afterwards()
        except Exception as failure:
            operation, name = storage.history[number - 1]
            raise AssertionError(f"{fault.name} at call {number}, {operation} {name}") from failure
    print(f"{fault.name}: killed at {len(numbers)} calls")
    assert len(numbers) >= 30


# --- an interrupt ---------------------------------------------------------------------------------------------------

ENGINE: Final = str(Path(basin.__file__).parent)
INTERRUPTS: Final = 200


class Interrupter:
    """Raises `KeyboardInterrupt` at the n-th line of Basin's own code that this thread runs.

    Or at the next one, if that is the line of a `with`: it is traced once more when the block is left, and an exception
    from there would keep the lock locked for ever. A signal cannot: CPython 3.11 looks for signals after calls, at the
    start of functions and at jumps backwards, all of them inside the block or behind the release.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.lines = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(ENGINE) or "testing" in path:
            return None
        if event == "line":
            self.lines += 1
            if 0 < self.number <= self.lines and not self.where:
                line = linecache.getline(path, frame.f_lineno)
                if not line.lstrip().startswith("with "):
                    self.where = f"{path}:{frame.f_lineno}"
                    raise KeyboardInterrupt
        return self


@contextlib.contextmanager
def interrupted(interrupter: Interrupter) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(interrupter)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.mark.slow
def test_an_interrupt_at_any_line_leaves_a_basin_that_reopens(
    beginning: tuple[DiskImage, Expected], effort: int
) -> None:
    counted = Attempt(*beginning)
    counter = Interrupter(0)
    with interrupted(counter):
        counted.run(SimulatedStorage(counted.disk))
    assert not counted.raised
    step = max(1, counter.lines // (INTERRUPTS * effort))
    places = set()
    for number in range(1, counter.lines, step):
        attempt = Attempt(*beginning)
        interrupter = Interrupter(number)
        try:
            with interrupted(interrupter):
                attempt.run(SimulatedStorage(attempt.disk))
            places.add(interrupter.where)
            attempt.require_good_afterwards()
        except Exception as failure:
            raise AssertionError(f"interrupted at line {number}, {interrupter.where}") from failure
    print(f"interrupted at {len(places)} places")
    assert len(places) >= INTERRUPTS // 4


# --- a full disk ----------------------------------------------------------------------------------------------------

RESERVE: Final = 64 << 10


def _fill(database: Database) -> int:
    """Put contents until the disk is full; returns how many commits were acknowledged."""
    number = 0
    with contextlib.suppress(OutOfSpace, BasinPoisoned):
        while True:
            with database.batch() as batch:
                batch[f"filled-{number:06}"] = scattered(str(number), 1500)
            number += 1
    return number


@pytest.mark.parametrize("boot", [1, 2], ids=["same boot", "after a boot"])
def test_a_full_disk_still_records_deletions(boot: int) -> None:
    disk = SimulatedDisk(boot=1, capacity=512 << 10)
    options: dict[str, Any] = {**OPTIONS, "reserve_size": RESERVE}
    database = Story(**options).open(SimulatedStorage(disk))
    acknowledged = _fill(database)
    assert acknowledged > 10
    with pytest.raises(BasinError):
        database[b"more"] = b"x"
        database.commit()
    database.close()
    disk.boot = boot

    database = open_on(SimulatedStorage(disk), **Story(**options).options)
    assert len(database) == acknowledged
    for start in range(0, acknowledged, 7):
        with database.batch() as batch:
            batch.delete(f"filled-{start:06}")
    database.close()
    capacity, disk.capacity = disk.capacity, None
    for image in (disk.kill_image(), *crash_states(disk, bounds=AFTERWARDS, limit=POWER_CUTS)):
        storage = SimulatedStorage(SimulatedDisk.from_image(image, boot=9, capacity=capacity))
        found = open_on(storage, **Story().options | OPTIONS)
        assert sorted(found) == [f"filled-{number:06}".encode() for number in range(acknowledged) if number % 7]
        found.core.release("read")


@pytest.mark.root
def test_a_real_full_disk_still_records_deletions(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.system(f"mount -t tmpfs -o size=16m basin-test {folder}")
    if mounted:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with basin.open(folder / "basin", secret=SECRET, reserve_size=2 << 20) as database:
            acknowledged = 0
            with pytest.raises(StorageError) as full:
                while acknowledged < 200:  # 20 MB, where 16 fit
                    with database.batch() as batch:
                        batch[f"filled-{acknowledged:06}"] = os.urandom(100_000)
                    acknowledged += 1
            assert isinstance(full.value, OutOfSpace)
        assert acknowledged > 20
        with basin.open(folder / "basin", secret=SECRET, reserve_size=2 << 20) as database:
            assert len(database) == acknowledged
            with database.batch() as batch:
                batch.delete_range(b"filled-000010", None)
        with basin.open(folder / "basin", "r", secret=SECRET) as database:
            assert [bytes(name) for name in database] == [f"filled-{number:06}".encode() for number in range(10)]
            assert all(len(value) == 100_000 for value in database.values())
    finally:
        os.system(f"umount {folder}")

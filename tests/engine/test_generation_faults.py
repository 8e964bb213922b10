"""Rotation, compaction and drop, broken off at every storage call and every request: every valid secret opens the rest.

Afterwards a rotation, a compaction and a drop come to their end, and nothing is sealed under any old generation.
"""

from __future__ import annotations

from typing import Any, Final

import pytest

from basin.api import Database, open_storage
from basin.engine.secret import Secret
from basin.errors import BasinError, CorruptionError
from basin.storage.requests import RequestPolicy
from basin.testing.bucket import BucketClient, run
from basin.testing.crash import Bounds, crash_states
from basin.testing.disk import DiskImage, SimulatedDisk
from basin.testing.faults import Fault, FaultStorage, Killed, nth_call
from basin.testing.object_faults import FaultKind, single_faults
from basin.testing.simulated import SimulatedStorage
from tests.engine.bucket_life import QuietStorage
from tests.engine.generation_basin import (
    OPTIONS,
    OTHER,
    SECRET,
    contents,
    expected,
    fill,
    open_disk,
    require_sound,
    sealed_under,
    write_anew,
)

AFTER_A_DROP: Final = Bounds(sectors=2, positions=2, versions=1, sizes=4, file_states=8, entries=2, states=6)
POWER_CUTS: Final = 2


def prepared() -> DiskImage:
    """A closed basin with two secrets, all of it durable."""
    disk = SimulatedDisk(boot=1)
    with open_disk(disk, "x") as database:
        fill(database)
        database.secrets.add(OTHER)
    return disk.kill_image()


def rotate_and_drop(database: Database) -> None:
    database.secrets.rotate()
    write_anew(database)
    database["after"] = b"compaction"
    database.commit()
    database.secrets.drop(forget_history=True)


def counted_under(database: Database, generation: int) -> list[str]:
    """What is sealed under a generation, but for files that no record names: a sweep deletes those one day.

    They are of a killed session, which counts as alive for long in a bucket, or could not be deleted.
    """
    strata = {identity.hex() for identity in database.core.state.strata}
    return [
        name
        for name in sealed_under(database, generation)
        if not name.startswith(("data/", "meta/", "index/")) or name.partition("/")[2] in strata
    ]


def attempt(disk: SimulatedDisk, storage: FaultStorage) -> BaseException | None:
    """What rotation and drop raise on a storage that fails."""
    try:
        with open_disk(disk, storage=storage) as database:
            rotate_and_drop(database)
    except (BasinError, Killed) as error:
        return error
    return None


def require_whole(image: DiskImage, *, boot: int) -> None:
    """Every valid secret opens it, with all that was committed, and a drop can be brought to its end."""
    for secret in (SECRET, OTHER):
        with open_disk(SimulatedDisk.from_image(image, boot=boot), "r", secret) as database:
            assert contents(database).items() >= expected().items()
            require_sound(database)
    disk = SimulatedDisk.from_image(image, boot=boot)
    with open_disk(disk) as database:
        database.secrets.rotate()
        write_anew(database)
        database.secrets.drop(forget_history=True)
        current = database.core.state.generation
        assert [counted_under(database, one) for one in range(current)] == [[]] * current
        assert contents(database).items() >= expected().items()


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.KILL, Fault.KILL_IN_WRITE, Fault.EIO, Fault.SYNC_LOST])
def test_a_fault_at_any_storage_call_of_rotation_and_drop_leaves_a_basin_that_every_secret_opens(fault: Fault) -> None:
    image = prepared()
    disk = SimulatedDisk.from_image(image, boot=1)
    watched = FaultStorage(SimulatedStorage(disk))
    with open_disk(disk, storage=watched) as database:
        first = watched.calls
        rotate_and_drop(database)
    calls = [at for at in range(first + 1, watched.calls + 1) if fault.applies_to(watched.history[at - 1][0])]
    fired = 0
    for number in calls:
        disk = SimulatedDisk.from_image(image, boot=1)
        storage = FaultStorage(SimulatedStorage(disk), nth_call(fault, number))
        raised = attempt(disk, storage)
        storage.close()
        assert not isinstance(raised, CorruptionError), "an error of the disk is called damage"
        fired += storage.fired
        try:
            require_whole(disk.kill_image(), boot=1)
            for left in crash_states(disk, bounds=AFTER_A_DROP, limit=2):
                require_whole(left, boot=2)
        except Exception as failure:
            operation, name = watched.history[number - 1]
            raise AssertionError(f"{fault.name} at call {number}, {operation} {name}") from failure
    print(f"{fault.name}: {fired} of {len(calls)} fired")
    assert fired >= 0.9 * len(calls) >= 10


BUCKET_OPTIONS: Final = {**OPTIONS, "session_timeout_s": 3600.0}


def open_bucket(client: BucketClient, mode: Any = "w", secret: Secret = SECRET) -> Database:
    policy = RequestPolicy(attempts=4, backoff_first_s=0.01, backoff_max_s=0.1)
    storage = QuietStorage(client.reconnect(), policy, uploads=0)
    return open_storage(storage, "simulated://bucket", mode=mode, secret=secret, options=BUCKET_OPTIONS)


def found_bucket(client: BucketClient) -> None:
    with open_bucket(client, "x") as database:
        fill(database)
        database.secrets.add(OTHER)


def drop_in_bucket(client: BucketClient) -> None:
    with open_bucket(client) as database:
        rotate_and_drop(database)


def require_whole_bucket(client: BucketClient) -> None:
    for secret in (SECRET, OTHER):
        with open_bucket(client, "r", secret) as database:
            assert contents(database).items() >= expected().items()
            require_sound(database)
    with open_bucket(client) as database:
        database.secrets.rotate()
        write_anew(database)
        database.secrets.drop(forget_history=True)
        current = database.core.state.generation
        assert [counted_under(database, one) for one in range(current)] == [[]] * current


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [FaultKind.KILLED, FaultKind.KILLED_AFTER, FaultKind.RESET, FaultKind.RESET_AFTER, FaultKind.LATE]
)
def test_a_fault_at_any_request_of_rotation_and_drop_leaves_a_bucket_that_every_secret_opens(kind: FaultKind) -> None:
    start = run(1, {"founder": found_bucket}).bucket.bodies
    undisturbed = run(1, {"owner": drop_in_bucket}, start=start)
    undisturbed.require_no_errors()
    plans = list(single_faults(undisturbed.bucket.requests, (kind,)))
    for plan in plans:
        left = run(1, {"owner": drop_in_bucket}, plan, start=start)
        for error in left.errors.values():
            assert isinstance(error, BasinError | Killed)
            assert not isinstance(error, CorruptionError)
        left.bucket.settle()
        after = run(1, {"next": require_whole_bucket}, start=left.bucket.bodies)
        try:
            after.require_no_errors()
        except Exception as failure:
            raise AssertionError(f"{kind} at {plan}: {undisturbed.bucket.requests[next(iter(plan)) - 1]}") from failure
    print(f"{kind}: {len(plans)} requests")
    assert len(plans) >= 20

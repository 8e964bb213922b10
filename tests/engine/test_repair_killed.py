"""A repair that is killed can be done again: behind every effect on a disk, and every request to a bucket."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from basin.engine.verify import FindingKind
from basin.storage.memory_objects import MemoryObjects, _Place
from basin.storage.protocol import Storage
from basin.storage.remote import RemoteStorage
from basin.testing.faults import Killed
from tests.engine.damaged_basin import (
    POLICY,
    PROFILES,
    BucketPlace,
    DiskPlace,
    Place,
    content,
    damage_records,
    findings,
    position_of,
    readable,
    repaired,
)


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def damaged_everywhere(place: Place) -> tuple[Place, dict[object, bytes]]:
    """A rotten log, a damaged run of names, a damaged stratum; and what can be read of it."""
    with place.open("x", memtable_size=65_536) as database:
        database.put_many((b"many/%05d" % number, b"%d" % number) for number in range(4000))
        database.commit()
        for number in range(6):
            with database.batch() as batch:
                batch[b"name/%d" % number] = b"%d" % number
                batch[b"large/%d" % number] = content(number)
    damage_records(place, position_of(place, b"name/3"))
    place.change(place.largest("meta"), 300)
    place.change(place.names("data")[0], 20)
    return place, readable(place)


def require_repaired(place: Place, before: dict[object, bytes], told: str) -> None:
    """Whatever was done before: a repair now leads to the same."""
    assert readable(place).items() >= before.items(), told
    repaired(place)
    assert readable(place).items() >= before.items(), told
    assert {found.kind for found in findings(place)} <= {FindingKind.VOID}, told
    assert not any(action.done for action in repaired(place)), told


def test_a_repair_that_is_killed_anywhere_on_a_disk_can_be_done_again(profile: str, effort: int) -> None:
    """Behind each effect; behind one in three unless more is asked for."""
    place, before = damaged_everywhere(DiskPlace(profile))
    assert isinstance(place, DiskPlace)
    image = place.disk.kill_image()
    place.disk.record()
    assert any(action.done for action in repaired(place))
    effects = list(place.disk.effects)
    assert len(effects) > 20
    for count in range(0 if effort > 1 else random.randrange(3), len(effects), 1 if effort > 1 else 3):
        place.restart(image, boot=1)
        for effect in effects[:count]:
            place.disk.apply(effect)
        require_repaired(place, before, f"killed behind {count} of {len(effects)} effects")


class MortalObjects(MemoryObjects):
    """Dies with the first change after `lives`."""

    def __init__(self, url: str, place: _Place, lives: int) -> None:
        super().__init__(url, place)
        self.lives = lives

    def _change(self) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed("no further")

    def put(self, name: str, data: bytes) -> None:
        self._change()
        super().put(name, data)

    def put_new(self, name: str, data: bytes) -> None:
        self._change()
        super().put_new(name, data)

    def put_file(self, name: str, path: Path, storage_class: str = "") -> None:
        self._change()
        super().put_file(name, path, storage_class)

    def delete(self, names: Sequence[str]) -> None:
        self._change()
        super().delete(names)


class MortalPlace(BucketPlace):
    """A bucket whose next handle dies."""

    lives = 1 << 30

    def storage(self) -> Storage:
        return RemoteStorage(MortalObjects("memory://place", self.place, self.lives), POLICY, uploads=0)


def test_a_repair_that_is_killed_anywhere_in_a_bucket_can_be_done_again(profile: str) -> None:
    place = MortalPlace(profile)
    _, before = damaged_everywhere(place)
    bodies = place.files()
    killed = 0
    while True:
        place.place = type(place.place)()
        place.place.bodies = dict(bodies)
        place.lives = killed
        try:
            database = place.open("w")
            try:
                database.repair(dry_run=False)
            finally:
                database.core.release("killed")
        except Killed:
            place.lives = 1 << 30
            require_repaired(place, before, f"killed behind {killed} requests")
            killed += 1
            continue
        break
    assert killed > 8

"""The simulated storage keeps the port's promises (its crashes are tested in tests/testing/test_disk.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from basin.errors import StorageUnavailable
from basin.storage.protocol import Storage
from basin.testing.conformance import DiskConformance
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage


class TestSimulatedStorage(DiskConformance):
    @pytest.fixture(autouse=True)
    def _fresh_disks(self) -> None:
        self.disks: dict[Path, SimulatedDisk] = {}

    def make_storage(self, place: Path) -> Storage:
        return SimulatedStorage(self.disks.setdefault(place, SimulatedDisk()))

    def stored(self, place: Path, name: str) -> bytes | None:
        return self.disks[place].kill_image().contents().get(name)

    def test_a_thread_that_waits_for_itself_does_not_hang(self, storage: Storage, other: Storage) -> None:
        storage.lock("lock").acquire(0)
        with pytest.raises(StorageUnavailable):
            other.lock("lock").acquire(3600)

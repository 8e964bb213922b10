"""Basins to be damaged, on a simulated disk and in a bucket in memory: what the tests of repair share.

A `Place` holds files that a test changes while nobody has them open. `build` fills one with something of everything,
and says what can be read of it; `readable` asks a new handle.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple
from unittest import mock

import basin
from basin.api import Database, open_storage
from basin.engine.core import Core
from basin.engine.file_log import segment_name
from basin.engine.object_log import record_name
from basin.engine.repair_log import load_anyhow
from basin.engine.repair_survey import Piece, Survey, survey_log
from basin.engine.verify import Finding
from basin.errors import BasinError
from basin.format.hint import Hint
from basin.storage.memory_objects import MemoryObjects, _Place
from basin.storage.protocol import Storage
from basin.storage.remote import RemoteStorage
from basin.storage.requests import RequestPolicy
from basin.testing.disk import DiskImage, Effect, SimulatedDisk
from basin.testing.simulated import SimulatedStorage

SECRET: Final = basin.Secret.generate()
POLICY: Final = RequestPolicy(attempts=2, backoff_first_s=0.001, backoff_max_s=0.002)
OPTIONS: Final[dict[str, Any]] = {
    "sync_interval_s": 3600.0,
    "refresh_interval_s": 3600.0,
    "threads": 1,
    "reserve_size": 0,
    "inline_max": 64,
    "part_max": 4096,
    "part_size": 2048,
}
CREATION: Final = frozenset({"inline_max", "part_max", "part_size"})


class Place(ABC):
    """The files of one basin."""

    is_bucket: bool

    def __init__(self, profile: str) -> None:
        self.profile = profile

    @abstractmethod
    def storage(self) -> Storage:
        """A storage of its own for one handle."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """All that is stored, by name."""

    @abstractmethod
    def put(self, name: str, data: bytes | None) -> None:
        """Store other bytes under a name, or remove it. Nobody has the basin open."""

    @abstractmethod
    def overwrite(self, name: str, at: int, data: bytes) -> None:
        """Change bytes while handles are open."""

    def change(self, name: str, at: int, bit: int = 2) -> None:
        """Flip one bit; `at` counts from the end if it is negative."""
        data = bytearray(self.files()[name])
        data[at] ^= 1 << bit
        self.put(name, bytes(data))

    def names(self, folder: str) -> list[str]:
        """The files of a folder, sorted."""
        return sorted(name for name in self.files() if name.startswith(f"{folder}/"))

    def largest(self, folder: str) -> str:
        """The largest file of a folder."""
        files = self.files()
        return max(self.names(folder), key=lambda name: len(files[name]))

    @property
    def secret(self) -> basin.Secret | None:
        return SECRET if self.profile == "encrypted" else None

    def open(self, mode: Any = "r", **options: Any) -> Database:
        """A new handle, also if the log cannot be followed."""
        given = {**OPTIONS, **options}
        if mode != "x":
            given = {name: value for name, value in given.items() if name not in CREATION}
        storage = self.storage()
        try:
            with _anyhow():
                return open_storage(
                    storage, "place:", mode=mode, secret=self.secret, profile=self.profile, options=given
                )
        except BaseException:
            storage.close()
            raise


@contextlib.contextmanager
def _anyhow() -> Iterator[None]:
    """Let handles that are opened meanwhile show what can be read, if they cannot be loaded."""
    load = Core.load

    def loaded(core: Core, hint: Hint | None = None) -> None:
        with mock.patch.object(Core, "load", load):
            load_anyhow(core, hint)

    with mock.patch.object(Core, "load", loaded):
        yield


class DiskPlace(Place):
    """A simulated disk. `boot` is the machine's: with another one the watermark is only a lower bound."""

    is_bucket = False

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self.disk = SimulatedDisk(boot=1)
        self.boot = 1

    def storage(self) -> Storage:
        return SimulatedStorage(self.disk)

    def files(self) -> dict[str, bytes]:
        return self.disk.kill_image().contents()

    def put(self, name: str, data: bytes | None) -> None:
        self.restart(self.disk.kill_image().with_content(name, data), self.boot)

    def overwrite(self, name: str, at: int, data: bytes) -> None:
        number = self.disk.names[name].number
        self.disk.apply(Effect("write", name, number=number, offset=at, data=data))

    def restart(self, image: DiskImage, boot: int) -> None:
        """Go on with these files, after a boot of the machine if the number differs."""
        self.boot = boot
        self.disk = SimulatedDisk.from_image(image, boot=boot)


class BucketPlace(Place):
    """A bucket in memory."""

    is_bucket = True

    def __init__(self, profile: str) -> None:
        super().__init__(profile)
        self.place = _Place()

    def storage(self) -> Storage:
        return RemoteStorage(MemoryObjects("memory://place", self.place), POLICY, uploads=0)

    def files(self) -> dict[str, bytes]:
        return dict(self.place.bodies)

    def put(self, name: str, data: bytes | None) -> None:
        if data is None:
            del self.place.bodies[name]
        else:
            self.place.bodies[name] = data

    def overwrite(self, name: str, at: int, data: bytes) -> None:
        body = self.place.bodies[name]
        self.place.bodies[name] = body[:at] + data + body[at + len(data) :]


PLACES: Final[Mapping[str, Callable[[str], Place]]] = {"disk": DiskPlace, "bucket": BucketPlace}
PROFILES: Final = ("open", "encrypted")


class Built(NamedTuple):
    """A place, what all names hold, and all blobs."""

    place: Place
    names: dict[bytes, bytes]
    blobs: dict[basin.ContentKey, bytes]


def content(number: int, size: int = 1500) -> bytes:
    """A content of its own, which shrinks little."""
    return b"".join(b"%d-%d;" % (number, place * (number + 7) % 7919) for place in range(size // 8))


def build(place: Place) -> Built:
    """Two sessions: runs of names with range deletions, contents in several strata, links, parts, names in the log."""
    names: dict[bytes, bytes] = {}
    blobs: dict[basin.ContentKey, bytes] = {}
    with place.open("x", memtable_size=65_536) as database:
        names |= {b"small/%04d" % number: b"inline %d" % number for number in range(1500)}
        names |= {b"large/%02d" % number: content(number) for number in range(12)}
        database.put_many((b"gone/%02d" % number, b"deleted later") for number in range(20))
        database.put_many(names.items())
        database.commit()
        database.delete_range(b"gone/", b"gone0")
        database.put_many((b"more/%04d" % number, b"padding " * 6) for number in range(1200))
        names |= {b"more/%04d" % number: b"padding " * 6 for number in range(1200)}
        database.commit()
    with place.open("w") as database:
        key = database.blobs.put(content(100))
        blobs[key] = content(100)
        parts = database.blobs.put(content(101, 9000))
        blobs[parts] = content(101, 9000)
        linked = database.blobs.put(content(102), links=[key, parts])
        blobs[linked] = content(102)
        names[b"late/0"] = b"in the log"
        database.put(b"late/0", b"in the log")
        database.commit()
        names[b"late/1"] = b"in the log, too"
        database.put(b"late/1", b"in the log, too")
    return Built(place, names, blobs)


def readable(place: Place) -> dict[object, bytes]:
    """Every name and blob that a new handle can read, by itself; nothing if it does not open."""
    found: dict[object, bytes] = {}
    try:
        database = place.open()
    except BasinError:
        return found
    with database:
        names: set[bytes] = set(EVERYTHING)
        with contextlib.suppress(BasinError):
            names |= set(database.scan(keys_only=True))
        for name in names:
            with contextlib.suppress(BasinError, KeyError):
                found[name] = database[name]
        keys: set[basin.ContentKey] = set()
        with contextlib.suppress(BasinError):
            keys |= set(database.blobs)
        for key in keys:
            with contextlib.suppress(BasinError, KeyError):
                found[key] = database.blobs[key]
    return found


EVERYTHING: Final = (
    *(b"small/%04d" % number for number in range(0, 1500, 50)),
    *(b"more/%04d" % number for number in range(0, 1200, 50)),
    *(b"large/%02d" % number for number in range(12)),
    b"late/0",
    b"late/1",
)
"""Names that are asked for even where no scan gets through."""


def findings(place: Place) -> list[Finding]:
    """What `check` says now."""
    with place.open() as database:
        return list(database.check())


def planned(place: Place) -> list[basin.RepairAction]:
    """What a dry run says."""
    with place.open() as database:
        return database.repair()


def repaired(place: Place) -> list[basin.RepairAction]:
    """What a repair does."""
    with place.open("w") as database:
        return database.repair(dry_run=False)


# --- the log ----------------------------------------------------------------------------------------------------------


def survey(place: Place) -> Survey:
    with place.open() as database:
        return survey_log(database.core, database.core.state.position)


def file_of(place: Place, piece: Piece) -> str:
    return record_name(piece.position) if place.is_bucket else segment_name(piece.segment)


def damage_records(place: Place, *positions: int) -> None:
    """Flip a bit in each of these records, behind their headers."""
    pieces = survey(place).pieces
    for position in positions:
        place.change(file_of(place, pieces[position]), pieces[position].offset + 90)


def position_of(place: Place, name: bytes) -> int:
    """The record that put a name."""
    with place.open() as database:
        return next(change.position for change in database.changes(0) if change.name == name)


def small(place: Place) -> Place:
    """Ten commits of one name and one content each, and nothing but the log that holds them."""
    with place.open("x") as database:
        for number in range(10):
            with database.batch() as batch:
                batch[b"name/%d" % number] = b"%d" % number
                batch[b"large/%d" % number] = content(number)
    return place

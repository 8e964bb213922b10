"""Two small basins on simulated disks, and everything that can be asked of them: what the tests of damage share.

`small` has one of each kind of file and is as small as can be, so that every single bit of it can be tried. `rich` has
two sessions, runs of names, contents in two data strata, links, parts, a keyspace, references and deletions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import basin
from basin.api import Database, open_storage
from basin.errors import BasinError
from basin.testing.disk import DiskImage, SimulatedDisk
from basin.testing.simulated import SimulatedStorage

Question: TypeAlias = Callable[[Database], Any]

PROFILES: Final = ("open", "encrypted")
SECRET: Final = basin.Secret.generate()
ABSENT: Final = basin.ContentKey(bytes(range(32)))
OPTIONS: Final[dict[str, Any]] = {
    "reserve_size": 0,
    "sync_interval_s": 3600.0,
    "refresh_interval_s": 3600.0,
    "threads": 1,
}
FLUSH: Final[dict[str, Any]] = {**OPTIONS, "memtable_size": 1024}
SAME_BOOT: Final = 1
LATER_BOOT: Final = 2


class SmallBasin(NamedTuple):
    """A closed basin: its profile, its files, what is asked of it, and the right answers."""

    profile: str
    image: DiskImage
    questions: Mapping[str, Question]
    answers: dict[str, Any]


def secret_of(profile: str) -> basin.Secret | None:
    return SECRET if profile == "encrypted" else None


def open_disk(disk: SimulatedDisk, profile: str, mode: Any = "r", options: Mapping[str, Any] = OPTIONS) -> Database:
    return open_storage(
        SimulatedStorage(disk),
        "simulated:",
        mode=mode,
        secret=secret_of(profile),
        profile=profile,
        options=dict(options),
    )


ESSENTIAL: Final[dict[str, Question]] = {
    "names": lambda db: dict(db.scan()),
    "one name": lambda db: db.get(b"name"),
    "absent name": lambda db: db.get(b"absent"),
    "roots": lambda db: list(db.blobs),
    "absent content": lambda db: ABSENT in db.blobs,
}
MORE: Final[dict[str, Question]] = {
    "backwards": lambda db: list(db.scan(keys_only=True, reverse=True)),
    "keyspaces": lambda db: {name: dict(db.keyspace(name).scan()) for name in db.keyspaces()},
    "head": lambda db: db.head,
}


def about(contents: Mapping[str, basin.ContentKey]) -> dict[str, Question]:
    """The questions about contents, by their labels."""
    asked: dict[str, Question] = {}
    for label, key in contents.items():
        asked[f"content {label}"] = functools.partial(lambda db, key: db.blobs[key], key=key)
        asked[f"links {label}"] = functools.partial(lambda db, key: db.blobs.links(key), key=key)
    return asked


def answers(image: DiskImage, profile: str, asked: Mapping[str, Question], *, boot: int = SAME_BOOT) -> dict[str, Any]:
    """What a new reader of these files is told; a refusal is the error itself. Any other exception goes through."""
    try:
        db = open_disk(SimulatedDisk.from_image(image, boot=boot), profile)
    except BasinError as error:
        return dict.fromkeys(asked, error)
    told: dict[str, Any] = {}
    with db:
        for question, ask in asked.items():
            try:
                told[question] = ask(db)
            except BasinError as error:
                told[question] = error
    return told


def _closed(disk: SimulatedDisk, profile: str, asked: Mapping[str, Question]) -> SmallBasin:
    image = disk.kill_image()
    told = answers(image, profile, asked)
    if failed := [answer for answer in told.values() if isinstance(answer, BasinError)]:
        raise failed[0]
    return SmallBasin(profile, image, asked, told)


@functools.cache
def small(profile: str) -> SmallBasin:
    """One stratum of contents, one run of names, one checkpoint, one segment."""
    disk = SimulatedDisk(boot=SAME_BOOT)
    with open_disk(disk, profile, "x", FLUSH) as db:
        key = db.blobs.put(b"content")
        db.put(b"name", b"value " * 100)
        db.put(b"other", b"value")
        db.commit()
        db.delete(b"other")
    return _closed(disk, profile, ESSENTIAL | about({"plain": key}))


@functools.cache
def rich(profile: str) -> SmallBasin:
    """Several of everything."""
    disk = SimulatedDisk(boot=SAME_BOOT)
    contents = {}
    with open_disk(disk, profile, "x", {**FLUSH, "part_max": 128, "part_size": 64, "inline_max": 32}) as db:
        contents["first"] = db.blobs.put(b"in the first session")
        contents["linked"] = db.blobs.put(b"with a link", links=[contents["first"]])
        contents["parts"] = db.blobs.put(bytes(200))
        db.put(b"name", b"inline")
        db.put(b"reference", b"a value above the limit for inline ones")
        db.put_many((b"numbered %d" % number, b"value %d" % number) for number in range(20))
        db.commit()
        db.delete_range(b"numbered 1", b"numbered 15")
    with open_disk(disk, profile, "w") as db:
        contents["second"] = db.blobs.put(b"in the second session")
        db.put(b"name", b"changed", ttl=1e6)
        db.keyspace("numbers", order="u64", values="json")[7] = [1, None]
        db.delete(b"numbered 3")
    return _closed(disk, profile, ESSENTIAL | MORE | about(contents))

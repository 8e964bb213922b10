"""A small encrypted basin for tests of key generations, on a disk or in a bucket: filled, written anew, looked into."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import basin
from basin.api import Database, open_storage
from basin.engine.generations import generation_uses
from basin.engine.merging import flush, merge_indexes
from basin.engine.secret import Secret
from basin.format.layout import StratumKind
from basin.format.record import decode_frame_header
from basin.format.scan import find_frames
from basin.format.stratum import decode_header
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage

SECRET: Final = Secret.generate()
OTHER: Final = Secret.generate()
OPTIONS: Final[dict[str, Any]] = {
    "inline_max": 64,
    "reserve_size": 0,
    "sync_interval_s": 3600.0,
    "refresh_interval_s": 3600.0,
    "threads": 1,
    "grace_s": 0.0,
}
CONTENT: Final = b"a content that is larger than what stands inline " * 4


_numbers = itertools.count()

Open = Callable[..., Database]


def place(kind: str, tmp_path: Path) -> str:
    """Where a new basin may be: a folder for "disk", else a bucket in memory."""
    return str(tmp_path / "basin") if kind == "disk" else f"memory://generations-{next(_numbers)}"


def handles(url: str) -> Iterator[Open]:
    """What opens handles on one basin; afterwards those that are still open are let go, as of a killed process."""
    made: list[Database] = []

    def open_again(mode: Any = "w", secret: Secret = SECRET, **options: Any) -> Database:
        made.append(basin.open(url, mode, secret=secret, **{**OPTIONS, **options}))
        return made[-1]

    yield open_again
    for handle in made:
        if not handle.closed:
            handle.core.release("the test has ended")


def fill(database: Database) -> None:
    """Names in a run and in the log, contents in strata of two kinds, a merged index."""
    for number in range(5):
        database[f"name {number}"] = CONTENT + bytes([number])
        database.blobs.put(b"linked %d" % number, links=[database.blobs.put(CONTENT * 2)])
        database.commit()
    flush(database.core)
    database["later"] = b"inline"
    database.commit()


def write_anew(database: Database) -> None:
    """Everything is sealed under the newest keys afterwards, as far as this handle may touch it."""
    database.compact(prune=False)
    core = database.core
    runs = core.state.index_runs
    if any(core.state.strata[run.id].added.generation < core.state.generation for run in runs):
        assert merge_indexes(core, [(int(StratumKind.INDEX), run.id, run.entries) for run in runs])
        database.compact(prune=False)  # In a bucket it is this that deletes what was merged away.


def open_disk(disk: SimulatedDisk, mode: Any = "w", secret: Secret = SECRET, storage: Any = None) -> Database:
    return open_storage(storage or SimulatedStorage(disk), "simulated:", mode=mode, secret=secret, options=OPTIONS)


def contents(database: Database) -> dict[str, bytes]:
    return {name.decode(): value for name, value in database.scan()}


def expected(**more: bytes) -> dict[str, bytes]:
    return {**{f"name {number}": CONTENT + bytes([number]) for number in range(5)}, "later": b"inline", **more}


def stored(database: Database) -> dict[str, bytes]:
    """Every file of the basin."""
    storage = database.core.storage
    folders = ["log", "checkpoint", "data", "meta", "index"]
    folders += [f"keys/{slot}" for slot in storage.list_folders("keys")]
    names = [f"{folder}/{name}" for folder in folders for name in storage.list(folder)]
    return {name: storage.read_file(name, 1 << 30) for name in names}


def sealed_under(database: Database, generation: int) -> list[str]:
    """The files that hold anything sealed under a generation, its own keys too, read from their bytes alone."""
    found = []
    for name, data in stored(database).items():
        folder, _, rest = name.partition("/")
        if folder == "keys":
            held = rest.endswith(f"/{generation:010}")
        elif name == "log/hint":
            held = f"/{generation:010}".encode() in data
        elif folder in ("data", "meta", "index"):
            held = decode_header(data).generation == generation
        else:
            frames = [at for at, _ in find_frames(data, 0)] if name.endswith(".log") else [0] if len(data) > 64 else []
            held = any(decode_frame_header(data, at).generation == generation for at in frames)
        if held:
            found.append(name)
    return found


def kinds(database: Database, generation: int = 0) -> dict[str, int]:
    database.core.refresh()
    return {use.kind: use.count for use in generation_uses(database.core, generation)}


def require_sound(database: Database) -> None:
    assert [finding for finding in database.check() if finding.severity == "damage"] == []

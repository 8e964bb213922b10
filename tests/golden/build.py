"""Writes the golden basins of the current format version: `python -m tests.golden.build`.

Run once for each format version, before its release; `test_golden.py` compares what is read with `expected_…` here. The
basins hold one of everything: inline values, references, parts, links, keyspaces, deletions, several sessions and runs.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal

import basin
from basin.api import Database
from basin.format.layout import FORMAT_VERSION

Profile = Literal["open", "encrypted"]

FOLDER = Path(__file__).parent
PASSPHRASE = "golden"
KEY_FILE = "golden.key"
LARGE = random.Random(1).randbytes(200_000)
SMALL = b"a value that compresses well " * 40
NUMBERED = {b"name/%04d" % number: b"value %d" % number for number in range(300)}


def expected_names() -> dict[bytes, bytes]:
    """Every name without a keyspace, and its value."""
    names = {name: value for name, value in NUMBERED.items() if not b"name/0100" <= name < b"name/0150"}
    names |= {b"": b"the empty name", b"small": SMALL, b"large": LARGE, b"longest " + b"n" * 65_527: b"65,535 bytes"}
    names[b"name/0007"] = b"changed"
    return names


def expected_numbers() -> dict[int, object]:
    """The keyspace `numbers`, with names in the order of integers and JSON values."""
    return {1: {"one": 1}, 2**40: [2, None], 2**64 - 1: "last"}


def fill(folder: Path, profile: Profile) -> None:
    """One golden basin, in three sessions."""
    secret = basin.Secret.from_passphrase(PASSPHRASE) if profile == "encrypted" else None
    with basin.open(
        folder, mode="x", secret=secret, profile=profile, part_max=65_536, part_size=16_384, reserve_size=0
    ) as db:
        db.put_many(NUMBERED.items())
        db.put(b"", b"the empty name")
        db.put(b"small", SMALL)
    with basin.open(folder, mode="w", secret=secret, memtable_size=65_536, reserve_size=0) as db:
        fill_again(db)
    with basin.open(folder, mode="w", secret=secret, reserve_size=0) as db:
        if profile == "encrypted":
            key_file = basin.Secret.generate()
            key_file.to_file(FOLDER / KEY_FILE)
            db.secrets.add(key_file)
            db.secrets.rotate()
        db[b"name/0007"] = b"changed"


def fill_again(db: Database) -> None:
    with db.batch() as batch:
        batch.delete_range(b"name/0100", b"name/0150")
        batch.put(b"longest " + b"n" * 65_527, b"65,535 bytes")
    linked = db.blobs.put(b"a content with links", links=[db.blobs.put(SMALL)])
    db.put(b"gone", basin.Ref(linked))
    db.delete(b"gone")
    db.put(b"large", basin.Ref(db.blobs.put(LARGE)))
    numbers = db.keyspace("numbers", order="u64", values="json")
    for number, value in expected_numbers().items():
        numbers.put(number, value)


def main() -> None:
    profiles: tuple[Profile, ...] = ("open", "encrypted")
    for profile in profiles:
        folder = FOLDER / f"version-{FORMAT_VERSION}" / profile
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(exist_ok=True)
        fill(folder, profile)


if __name__ == "__main__":
    main()

"""Writes the golden basins of the current format version: `python -m tests.golden.build`.

Run once for each format version, before its release; `test_golden.py` compares what is read with `expected_…` here. The
basins hold one of everything: inline values, references, parts, links, keyspaces, deletions, expiries, several sessions
and runs, one session that was killed, and so a merged index; two slots and two generations in the encrypted one.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Literal

from blake3 import blake3

import basin
from basin.api import Database
from basin.format.layout import FORMAT_VERSION

Profile = Literal["open", "encrypted"]

FOLDER = Path(__file__).parent
PASSPHRASE = "golden"
THOUSAND_YEARS_S = 1000 * 365 * 86_400.0
KILLED = b"put by a session that was killed " * 3
KEY_FILE = "golden.key"
LARGE = random.Random(1).randbytes(30_000)
SMALL = b"a value that compresses well " * 40
LINKED = b"a content with links"
NUMBERED = {b"name/%04d" % number: b"value %d" % number for number in range(300)}


def expected_names() -> dict[bytes, bytes]:
    """Every name without a keyspace, and its value."""
    names = {name: value for name, value in NUMBERED.items() if not b"name/0100" <= name < b"name/0150"}
    names |= {b"": b"the empty name", b"small": SMALL, b"large": LARGE, b"longest " + b"n" * 65_527: b"65,535 bytes"}
    names[b"name/0007"] = b"changed"
    names[b"of the dead"] = b"committed by a session that was killed"
    names[b"for long"] = b"until it expires in a thousand years"
    return names


def expected_blobs() -> dict[bytes, bytes]:
    """Every root, by its content key."""
    return {blake3(content).digest(): content for content in (SMALL, LINKED, LARGE, KILLED)}


def expected_numbers() -> dict[int, object]:
    """The keyspace `numbers`, with names in the order of integers and JSON values."""
    return {1: {"one": 1}, 2**40: [2, None], 2**64 - 1: "last"}


def fill(folder: Path, profile: Profile) -> None:
    """One golden basin, in four sessions; the third is killed."""
    work = folder.with_name(f"{folder.name}-work")
    secret = basin.Secret.from_passphrase(PASSPHRASE) if profile == "encrypted" else None
    with basin.open(
        work, mode="x", secret=secret, profile=profile, part_max=16_384, part_size=4096, reserve_size=0
    ) as db:
        db.put_many(NUMBERED.items())
        db.put(b"", b"the empty name")
        db.put(b"small", SMALL)
    with basin.open(work, mode="w", secret=secret, memtable_size=65_536, reserve_size=0) as db:
        fill_again(db)
    with basin.open(work, mode="w", secret=secret, reserve_size=0) as db:
        db.blobs.put(KILLED)
        db.put(b"of the dead", b"committed by a session that was killed")
        db.commit()
        shutil.copytree(work, folder)
    shutil.rmtree(work)
    with basin.open(folder, mode="w", secret=secret, reserve_size=0) as db:
        if profile == "encrypted":
            key_file = basin.Secret.generate()
            key_file.to_file(FOLDER / KEY_FILE)
            db.secrets.add(key_file)
            db.secrets.rotate()
        db[b"name/0007"] = b"changed"
        db.put(b"for long", b"until it expires in a thousand years", ttl=THOUSAND_YEARS_S)
        db.blobs.put(SMALL)


def fill_again(db: Database) -> None:
    with db.batch() as batch:
        batch.delete_range(b"name/0100", b"name/0150")
        batch.put(b"longest " + b"n" * 65_527, b"65,535 bytes")
    linked = db.blobs.put(LINKED, links=[db.blobs.put(SMALL)])
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
        (FOLDER / KEY_FILE).unlink(missing_ok=True)
        folder.parent.mkdir(exist_ok=True)
        fill(folder, profile)


if __name__ == "__main__":
    main()

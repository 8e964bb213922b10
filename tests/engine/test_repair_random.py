"""Random damage to random files, then a repair: what could be read before can be read after, whatever was damaged.

Seeds are printed; `trial(seed, where, profile)` repeats one.
"""

from __future__ import annotations

import copy
import functools
import random

import pytest

from basin.engine.verify import FindingKind
from basin.errors import BasinError
from basin.format.slots import DESCRIPTOR_NAME
from basin.terms import ContentKey
from tests.engine.damaged_basin import (
    PLACES,
    PROFILES,
    BucketPlace,
    Built,
    DiskPlace,
    build,
    findings,
    planned,
    readable,
    repaired,
)

TRIALS = 12
LOSSES = {FindingKind.MISSING, FindingKind.SLOT, FindingKind.GENERATION, FindingKind.VOID}
"""What check may still name."""


@functools.cache
def whole(where: str, profile: str) -> Built:
    return build(PLACES[where](profile))


def fresh(where: str, profile: str) -> Built:
    """The same basin in a place of its own."""
    built = whole(where, profile)
    place = copy.copy(built.place)
    if isinstance(place, BucketPlace):
        place.place = type(place.place)()
        place.place.bodies = built.place.files()
    elif isinstance(place, DiskPlace) and isinstance(built.place, DiskPlace):
        place.restart(built.place.disk.kill_image(), boot=1)
    return built._replace(place=place)


def damage(built: Built, chance: random.Random) -> list[str]:
    """Damage up to four files; returns what was done. Without descriptor and keys nothing opens: those stay."""
    place, done = built.place, []
    for _ in range(chance.randint(1, 4)):
        names = [name for name in place.files() if name != DESCRIPTOR_NAME and not name.startswith("keys/")]
        name = chance.choice(sorted(names))
        body = place.files()[name]
        how = chance.choice(("flip", "flip", "flip", "flips", "zero", "cut", "longer", "gone"))
        if how == "gone" or not body:
            place.put(name, None)
        elif how == "cut":
            place.put(name, body[: chance.randrange(len(body))])
        elif how == "longer":
            place.put(name, body + chance.randbytes(chance.randint(1, 100)))
        elif how == "zero":
            start = chance.randrange(len(body))
            stop = min(len(body), start + chance.randint(1, 600))
            place.put(name, body[:start] + bytes(stop - start) + body[stop:])
        else:
            for _ in range(1 if how == "flip" else 5):
                place.change(name, chance.randrange(len(body)), chance.randrange(8))
        done.append(f"{how} {name}")
    if isinstance(place, DiskPlace) and chance.random() < 0.3:
        place.restart(place.disk.kill_image(), boot=2)
        done.append("boot")
    return done


def was(built: Built, name: object) -> set[bytes | None]:
    """What a name or blob has ever held: where the log is cut, an earlier value is right."""
    if isinstance(name, ContentKey):
        return {built.blobs.get(name)}
    assert isinstance(name, bytes)
    return {built.names.get(name), b"deleted later" if name.startswith(b"gone/") else None}


def trial(seed: int, where: str, profile: str) -> str:
    """One basin, damaged and repaired; returns what came of it."""
    chance = random.Random(seed)
    built = fresh(where, profile)
    place = built.place
    done = damage(built, chance)
    told = f"seed {seed}, {where}, {profile}: {done}"
    before = readable(place)
    for name, value in before.items():
        assert value in was(built, name), f"{told}: {name!r} is wrong before the repair"
    try:
        plan = planned(place)
    except BasinError:
        assert not before, told
        return "not opened"
    actions = repaired(place)
    assert [(one.kind, one.object, one.detail) for one in actions] == [
        (one.kind, one.object, one.detail) for one in plan
    ], told
    after = readable(place)
    lost = {name for name in before if after.get(name) != before[name]}
    assert not lost, f"{told}: lost {sorted(map(repr, lost))[:5]}"
    left = [found for found in findings(place) if found.kind not in LOSSES]
    assert not left, f"{told}: {left[:3]}"
    assert not any(action.done or action.possible for action in repaired(place)), told
    with place.open("w") as database:
        database[b"after"] = b"written"
    assert readable(place)[b"after"] == b"written", told
    return "whole" if {*built.names} <= {*after} else "partly lost"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("where", sorted(PLACES))
def test_random_damage(where: str, profile: str, effort: int) -> None:
    start = random.randrange(1 << 32)
    print(f"{where}, {profile}: seeds from {start}")
    results = [trial(start + number, where, profile) for number in range(TRIALS * effort)]
    print({result: results.count(result) for result in results})

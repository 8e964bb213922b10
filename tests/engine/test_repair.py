"""`repair` has an answer to everything that `check` can name: on a disk and in a bucket, encrypted and open.

`CASES` holds for every kind of finding what is done to a whole basin, and what may be lost by that. Of each it is shown
that check names the damage by its kind; that a dry run says what the repair then does; that whatever could be read
before can be read after; that nothing but what is lost is still named; and that a second repair does nothing.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import xxhash
from blake3 import blake3

import basin
from basin.api import Database
from basin.engine import repair_keys, verify
from basin.engine.merging import merge_indexes
from basin.engine.verify import FindingKind
from basin.errors import ContentNotFound
from basin.format.grain import CHECKSUM
from basin.format.layout import (
    GRAIN_HEADER_SIZE,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.record import Record
from basin.format.scan import GrainFound, scan_grains
from tests.engine.damaged_basin import (
    PLACES,
    PROFILES,
    Built,
    Place,
    build,
    findings,
    planned,
    readable,
    repaired,
)

ANYWHERE = ("disk", "bucket")
Damage = Callable[[Built], Iterable[bytes]]


class Case(NamedTuple):
    """`damage` changes the files and returns the names that are lost by it."""

    kind: FindingKind
    damage: Damage
    places: tuple[str, ...] = ANYWHERE
    profiles: tuple[str, ...] = PROFILES


# --- where things lie -------------------------------------------------------------------------------------------------


def grains(place: Place, name: str) -> list[GrainFound]:
    data = memoryview(place.files()[name])
    found = scan_grains(data, STRATUM_HEADER_SIZE, len(data) - STRATUM_FOOTER_SIZE)
    return [one for one in found if isinstance(one, GrainFound)]


def of_kind(place: Place, name: str, kind: Kind) -> GrainFound:
    return next(one for one in grains(place, name) if one.header.kind == kind)


def digest(value: bytes) -> bytes:
    """The content key of a value."""
    return blake3(value).digest()


def runs(place: Place) -> list[str]:
    """The files of the runs of names, oldest first."""
    with place.open() as database:
        return [f"meta/{run.id}" for run in database.core.state.name_runs]


def strata_of(built: Built, names: Iterable[bytes]) -> set[str]:
    """The strata that hold what names refer to."""
    with built.place.open() as database:
        core = database.core
        keys = [core.keyring.grain_keys.grain_key(digest(built.names[name])) for name in names]
        return {f"data/{place.stratum}" for place in core.locator.find_many(keys) if place is not None}


def large(built: Built) -> list[bytes]:
    return [name for name in built.names if name.startswith(b"large/")]


def stratum(built: Built) -> str:
    """The one that holds all large values."""
    (name,) = strata_of(built, large(built))
    return name


# --- strata of contents -----------------------------------------------------------------------------------------------


def a_stratum_is_missing(built: Built) -> Iterable[bytes]:
    built.place.put(stratum(built), None)
    return large(built)


def a_header_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change(stratum(built), 20)
    return ()


def a_header_is_zero(built: Built) -> Iterable[bytes]:
    name = stratum(built)
    built.place.put(name, bytes(STRATUM_HEADER_SIZE) + built.place.files()[name][STRATUM_HEADER_SIZE:])
    return ()


def two_strata_are_swapped(built: Built) -> Iterable[bytes]:
    one, other = built.place.names("data")
    files = built.place.files()
    built.place.put(one, files[other])
    built.place.put(other, files[one])
    return ()


def a_stratum_is_cut(built: Built) -> Iterable[bytes]:
    """In the middle of the eighth grain: its index is lost as well, so only the names say what is gone."""
    name = stratum(built)
    place = built.place
    eighth = grains(place, name)[7]
    place.put(name, place.files()[name][: eighth.offset + 60])
    return lost_from(built, name, {one.header.key for one in grains_before(built, name, 7)})


def grains_before(built: Built, name: str, count: int) -> list[GrainFound]:
    data = memoryview(built.place.files()[name])
    found = [one for one in scan_grains(data, STRATUM_HEADER_SIZE, len(data)) if isinstance(one, GrainFound)]
    assert len(found) == count
    return found


def lost_from(built: Built, name: str, kept: set[bytes]) -> list[bytes]:
    """The names whose content lay in a stratum, and is not among the grains that are left."""
    with built.place.open() as database:
        grain_key = database.core.keyring.grain_keys.grain_key
        return [one for one in large(built) if grain_key(digest(built.names[one])) not in kept]


def a_stratum_is_longer(built: Built) -> Iterable[bytes]:
    name = stratum(built)
    built.place.put(name, built.place.files()[name] + b"\0")
    return ()


def a_footer_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change(stratum(built), -30)
    return ()


def a_footer_is_gone(built: Built) -> Iterable[bytes]:
    """As many zero bytes stand there: the file is as long as it was."""
    name = stratum(built)
    built.place.put(name, built.place.files()[name][:-STRATUM_FOOTER_SIZE] + bytes(STRATUM_FOOTER_SIZE))
    return ()


def a_page_of_an_index_is_damaged(built: Built) -> Iterable[bytes]:
    name = stratum(built)
    built.place.change(name, of_kind(built.place, name, Kind.INDEX_PAGES).offset + GRAIN_HEADER_SIZE + 50)
    return ()


def a_directory_of_an_index_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change(stratum(built), -STRATUM_FOOTER_SIZE - 20)
    return ()


def a_grain_is_damaged(built: Built) -> Iterable[bytes]:
    name = stratum(built)
    third = grains(built.place, name)[2]
    with built.place.open() as database:
        key = database.core.keyring.grain_keys.content_key(third.header.key)
    built.place.change(name, third.offset + GRAIN_HEADER_SIZE + 20)
    return [one for one in large(built) if digest(built.names[one]) == key]


def a_grain_and_the_footer_are_damaged(built: Built) -> Iterable[bytes]:
    lost = a_grain_is_damaged(built)
    a_footer_is_damaged(built)
    return lost


def a_checksum_of_a_grain_is_damaged(built: Built) -> Iterable[bytes]:
    name = stratum(built)
    built.place.change(name, grains(built.place, name)[2].offset)
    return ()


def a_header_of_a_grain_is_damaged(built: Built) -> Iterable[bytes]:
    """Kind, codec and key are known to the index, and the seal, or the hash of the content, proves them."""
    name = stratum(built)
    at = grains(built.place, name)[2].offset
    for byte in (8, 9, 15, 30):
        built.place.change(name, at + byte)
    return ()


def a_grain_that_lies_twice_is_damaged(built: Built) -> Iterable[bytes]:
    place, value = built.place, b"in two strata " * 50
    with place.open("w") as one, place.open("w") as other:
        one[b"twice/1"], other[b"twice/2"] = value, value
        one.commit()
        other.commit()
    built.names.update({b"twice/1": value, b"twice/2": value})
    key = digest(value)
    with place.open() as database:
        grain_key = database.core.keyring.grain_keys.grain_key(key)
        places = list(database.core.locator.find_all(grain_key))
    assert len(places) == 2
    place.change(f"data/{places[0].stratum}", places[0].offset + GRAIN_HEADER_SIZE + 3)
    return ()


def a_parent_is_damaged(built: Built) -> Iterable[bytes]:
    """The grain with links, which no name refers to but its root."""
    (name,) = set(built.place.names("meta")) - set(runs(built.place))
    built.place.change(name, of_kind(built.place, name, Kind.BLOB).offset + GRAIN_HEADER_SIZE + 90)
    return ()


def bytes_that_no_grain_needs_are_damaged(built: Built) -> Iterable[bytes]:
    """The key of a grain of pages says nothing; its checksum is right again. Only the hash of the file tells."""
    name, place = stratum(built), built.place
    pages = of_kind(place, name, Kind.INDEX_PAGES)
    data = bytearray(place.files()[name])
    data[pages.offset + 20] ^= 1
    rest = bytes(data[pages.offset + CHECKSUM.size : pages.offset + pages.header.stored_size])
    data[pages.offset : pages.offset + CHECKSUM.size] = CHECKSUM.pack(xxhash.xxh32_intdigest(rest))
    place.put(name, bytes(data))
    return ()


# --- merged indexes ---------------------------------------------------------------------------------------------------


def merged_index(built: Built) -> str:
    """Merge the indexes of all strata of contents; returns the file."""
    with built.place.open("w") as database:
        core = database.core
        names = {run.id for run in core.state.name_runs}
        sources = [
            (known.added.kind, identity, known.added.grain_count)
            for identity, known in core.state.strata.items()
            if identity not in names
        ]
        assert merge_indexes(core, sources)
        (run,) = core.state.index_runs
    return f"index/{run.id}"


def a_merged_index_is_damaged(built: Built) -> Iterable[bytes]:
    name = merged_index(built)
    built.place.change(name, of_kind(built.place, name, Kind.INDEX_PAGES).offset + GRAIN_HEADER_SIZE + 70)
    return ()


def a_merged_index_is_missing(built: Built) -> Iterable[bytes]:
    built.place.put(merged_index(built), None)
    return ()


def an_index_lacks_a_grain(built: Built) -> Iterable[bytes]:
    """It is intact in itself: every checksum and tag is right."""
    with built.place.open("w") as database:
        (key,) = database.blobs.put_many([b"in no index " * 40])
        database.blobs.put_many([b"in the index " * 40])
        (writer,) = database.core.own_strata._writers.values()
        del writer.locations[database.core.keyring.grain_keys.grain_key(key.digest)]
    built.blobs[key] = b"in no index " * 40
    return ()


# --- runs of names ----------------------------------------------------------------------------------------------------


def a_block_of_names_is_damaged(built: Built) -> Iterable[bytes]:
    """The log has it all."""
    (oldest, *_) = runs(built.place)
    built.place.change(oldest, of_kind(built.place, oldest, Kind.NAMES_BLOCK).offset + GRAIN_HEADER_SIZE + 100)
    return ()


def a_directory_of_names_is_damaged(built: Built) -> Iterable[bytes]:
    for name in runs(built.place):
        built.place.change(name, of_kind(built.place, name, Kind.NAMES_DIRECTORY).offset + GRAIN_HEADER_SIZE + 10)
    return ()


def a_run_of_names_is_missing(built: Built) -> Iterable[bytes]:
    built.place.put(runs(built.place)[0], None)
    return ()


def a_block_of_a_large_batch_is_damaged(built: Built) -> Iterable[bytes]:
    """Its names stand in the run alone: what lies in the block is lost, and what lies in others is not."""
    batch = {b"batch/%06d" % number: b"%d value of a large batch" % number for number in range(30_000)}
    with built.place.open("w") as database:
        known = {run.id for run in database.core.state.name_runs}
        with database.batch() as one:
            for name, value in batch.items():
                one[name] = value
        (run,) = [one for one in database.core.current.tables.runs if one.run.id not in known]
        number = run.directory.block_for(b"\0\0\0\0batch/000500")
        lost = [name[4:] for name in run.block(number).names]
        offset = run.directory.offsets[number]
    built.names.update(batch)
    built.place.change(f"meta/{run.run.id}", offset + GRAIN_HEADER_SIZE + 100)
    return lost


# --- references -------------------------------------------------------------------------------------------------------


def a_stratum_was_let_go_of(built: Built) -> Iterable[bytes]:
    """By mistake, and its file is still there."""
    identity = next(one for one in strata_of(built, large(built)))
    with built.place.open("w") as database:
        core = database.core
        core.ensure_session()
        (known,) = [known for one, known in core.state.strata.items() if f"data/{one}" == identity]
        core.append(lambda _: Record(strata_removed=[known.added.id], files_kept=core.is_remote))
    return ()


# --- the rest ---------------------------------------------------------------------------------------------------------


def a_checkpoint_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change(built.place.names("checkpoint")[-1], 100)
    return ()


def all_checkpoints_are_damaged(built: Built) -> Iterable[bytes]:
    for name in built.place.names("checkpoint"):
        built.place.change(name, 100)
    return ()


def a_hint_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change("log/hint", 30)
    return ()


def second_slot(built: Built) -> str:
    """Let one more secret in; returns its slot."""
    with built.place.open("w") as database:
        return database.secrets.add(basin.Secret.generate())


def a_slot_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change(f"keys/{second_slot(built)}/slot.json", 300)
    return ()


def a_slot_is_missing(built: Built) -> Iterable[bytes]:
    built.place.put(f"keys/{second_slot(built)}/slot.json", None)
    return ()


def a_slot_is_not_in_the_log(built: Built) -> Iterable[bytes]:
    slot = second_slot(built)
    kept = {name: data for name, data in built.place.files().items() if name.startswith(f"keys/{slot}/")}
    with built.place.open("w") as database:
        database.secrets.remove(slot)
    for name, data in kept.items():
        built.place.put(name, data)
    return ()


def a_generation_is_damaged(built: Built) -> Iterable[bytes]:
    built.place.change(f"keys/{second_slot(built)}/0000000000", 90)
    return ()


def a_generation_is_missing(built: Built) -> Iterable[bytes]:
    built.place.put(f"keys/{second_slot(built)}/0000000000", None)
    return ()


def a_file_is_in_no_record(built: Built) -> Iterable[bytes]:
    """Of a session that ended in another way."""
    with built.place.open("w") as database:
        core = database.core
        core.ensure_session()
        writer = core.own_strata.create(StratumKind.DATA)
        writer.finish()
    return ()


def a_file_has_no_header(built: Built) -> Iterable[bytes]:
    built.place.put("data/" + "ab" * 16, b"nobody knows what")
    return ()


def a_segment_or_object_is_damaged(built: Built) -> Iterable[bytes]:
    """Of what checkpoints hold."""
    name = built.place.names("log")[0]
    built.place.change(name, 90 if built.place.is_bucket else 300)
    return ()


CASES = [
    Case(FindingKind.STRATUM, a_stratum_is_missing),
    Case(FindingKind.STRATUM, a_header_is_damaged),
    Case(FindingKind.STRATUM, a_header_is_zero),
    Case(FindingKind.STRATUM, two_strata_are_swapped),
    Case(FindingKind.TRUNCATED, a_stratum_is_cut),
    Case(FindingKind.EXTENDED, a_stratum_is_longer),
    Case(FindingKind.INDEX, a_footer_is_damaged),
    Case(FindingKind.INDEX, a_footer_is_gone),
    Case(FindingKind.INDEX, a_page_of_an_index_is_damaged),
    Case(FindingKind.INDEX, a_directory_of_an_index_is_damaged),
    Case(FindingKind.INDEX, a_merged_index_is_damaged),
    Case(FindingKind.INDEX, a_merged_index_is_missing),
    Case(FindingKind.INDEX, an_index_lacks_a_grain),
    Case(FindingKind.GRAIN, a_grain_is_damaged),
    Case(FindingKind.GRAIN, a_grain_and_the_footer_are_damaged),
    Case(FindingKind.GRAIN, a_checksum_of_a_grain_is_damaged),
    Case(FindingKind.GRAIN, a_header_of_a_grain_is_damaged),
    Case(FindingKind.GRAIN, a_grain_that_lies_twice_is_damaged),
    Case(FindingKind.GRAIN, a_parent_is_damaged),
    Case(FindingKind.HASH, bytes_that_no_grain_needs_are_damaged),
    Case(FindingKind.NAMES, a_block_of_names_is_damaged),
    Case(FindingKind.NAMES, a_directory_of_names_is_damaged),
    Case(FindingKind.NAMES, a_run_of_names_is_missing),
    Case(FindingKind.NAMES, a_block_of_a_large_batch_is_damaged, profiles=("encrypted",)),
    Case(FindingKind.MISSING, a_stratum_was_let_go_of),
    Case(FindingKind.CHECKPOINT, a_checkpoint_is_damaged),
    Case(FindingKind.CHECKPOINT, all_checkpoints_are_damaged),
    Case(FindingKind.HINT, a_hint_is_damaged, ("bucket",)),
    Case(FindingKind.SLOT, a_slot_is_damaged, profiles=("encrypted",)),
    Case(FindingKind.SLOT, a_slot_is_missing, profiles=("encrypted",)),
    Case(FindingKind.SLOT, a_slot_is_not_in_the_log, profiles=("encrypted",)),
    Case(FindingKind.GENERATION, a_generation_is_damaged, profiles=("encrypted",)),
    Case(FindingKind.GENERATION, a_generation_is_missing, profiles=("encrypted",)),
    Case(FindingKind.LEFTOVER, a_file_is_in_no_record),
    Case(FindingKind.LEFTOVER, a_file_has_no_header),
    Case(FindingKind.LOG, a_segment_or_object_is_damaged),
]
ELSEWHERE = {
    FindingKind.VOID: "skipped by everybody: there is nothing to mend; tests/engine/test_repair_log.py makes some",
    FindingKind.COLD: "no damage: tests/engine/test_cold.py",
    FindingKind.DESCRIPTOR: "of a basin whose contents have a root of their own: below",
}
STAYS = {
    FindingKind.MISSING,  # What is lost for good.
    FindingKind.SLOT,  # A secret that is lost is not made up for.
}
"""Kinds that check may still name after the repair."""


def expanded() -> list[object]:
    return [
        pytest.param(case, where, profile, id=f"{case.damage.__name__}-{where}-{profile}")
        for case in CASES
        for where in case.places
        for profile in case.profiles
    ]


@pytest.mark.parametrize(("case", "where", "profile"), expanded())
def test_what_check_names_is_mended(case: Case, where: str, profile: str) -> None:
    built = build(PLACES[where](profile))
    place = built.place
    lost = set(case.damage(built))
    assert case.kind in {found.kind for found in findings(place)}
    before = readable(place)
    whole = {name: value for name, value in built.names.items() if name not in lost}

    plan = planned(place)
    assert plan
    done = repaired(place)
    assert [replaced(action) for action in done] == [replaced(action) for action in plan]
    assert all(action.done == action.possible for action in done)
    assert {name for action in done for name in action.names} <= lost

    after = readable(place)
    assert {name: after.get(name) for name in before} == before
    with place.open() as database:
        for name, value in whole.items():
            assert database[name] == value
        for name in lost:
            assert is_lost(database, name)
        for start in (b"gone/00", b"gone/19"):
            assert start not in database
    left = [found for found in findings(place) if found.kind != FindingKind.VOID]
    assert {found.kind for found in left} <= STAYS
    assert {name for found in left for name in found.names} <= lost
    again = repaired(place)
    assert not any(action.done or action.possible for action in again)


def replaced(action: basin.RepairAction) -> tuple[object, ...]:
    return action.kind, action.object, action.detail, action.possible, action.names, action.content_keys


def is_lost(database: Database, name: bytes) -> bool:
    try:
        return database.get(name) is None
    except ContentNotFound:
        return True


def test_every_kind_of_finding_has_a_case() -> None:
    assert {case.kind for case in CASES} | ELSEWHERE.keys() == set(FindingKind)
    assert not {case.kind for case in CASES} & ELSEWHERE.keys()


def test_check_yields_no_other_kinds() -> None:
    """Read from the source: the first argument of whatever makes a finding."""
    kinds = set()
    for module, makers in ((verify, {"finding", "Finding"}), (repair_keys, {"KeyProblem"})):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in makers:
                kinds |= {word.value for word in node.args[:1] if isinstance(word, ast.Constant)}
    # "truncated" and "extended" are chosen by a condition as well; the rest are words.
    assert kinds | {"truncated", "extended"} == {str(kind) for kind in FindingKind}

"""Rotation of the keys to its end: what needs an old generation, and how it is dropped, on a disk and in a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.engine import state as state_module
from basin.engine.checkpoints import checkpoint, raise_floor
from basin.engine.file_log import FileLog, segment_name
from basin.engine.generations import finish_drops, segments_of
from basin.engine.hints import read_hint
from basin.engine.keyring import add_slot
from basin.engine.log import START
from basin.engine.merging import flush
from basin.engine.object_log import ObjectLog, record_name
from basin.engine.state import EMPTY_HASH
from basin.engine.writer import stratum_name
from basin.errors import (
    CorruptionError,
    InvalidArgument,
    PositionGone,
    WrongSecret,
)
from basin.format.hint import Stub, encode_stub
from basin.format.layout import RECORD_MAGIC, STUB_MAGIC
from basin.format.record import Condemn, FrameCipher, Record, chain_hash, decode_frame_header, encode_record
from basin.format.slots import SlotKeys, create_slot, generation_name, slot_name
from basin.format.stratum import decode_header
from basin.storage.memory_objects import MemoryObjects
from basin.storage.objects import ByteRange, ObjectStore
from basin.storage.requests import RequestPolicy
from basin.testing.disk import SimulatedDisk
from tests.engine.generation_basin import (
    CONTENT,
    OPTIONS,
    OTHER,
    SECRET,
    Open,
    contents,
    expected,
    fill,
    handles,
    kinds,
    open_disk,
    place,
    require_sound,
    sealed_under,
    stored,
    write_anew,
)


@pytest.fixture(params=["disk", "bucket"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return place(request.param, tmp_path)


@pytest.fixture
def opened(url: str) -> Iterator[Open]:
    yield from handles(url)


# --- to its end -------------------------------------------------------------------------------------------------------


def test_after_rotation_compaction_and_drop_nothing_is_sealed_under_the_old_keys(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    with opened() as database:
        assert sealed_under(database, 0)
        database.secrets.add(OTHER)
        assert database.secrets.rotate() == 1
        write_anew(database)
        assert "strata" not in kinds(database)
        assert database.secrets.drop(0, forget_history=True) == [0]
        assert sealed_under(database, 0) == []
        assert kinds(database) == {}
        assert contents(database) == expected()
        database["new"] = b"value"
    for secret in (SECRET, OTHER):
        with opened("w", secret) as database:
            assert database.core.keyring.generations() == [1]
            assert contents(database) == expected(new=b"value")
            assert len(list(database.blobs)) == 6
            require_sound(database)
            database.commit()


def test_one_generation_after_another_is_dropped(opened: Open) -> None:
    """So the stubs of one drop are replaced by the next."""
    with opened("x") as database:
        fill(database)
    for generation in range(3):
        with opened() as database:
            assert database.secrets.rotate() == generation + 1
            database[f"after {generation}"] = CONTENT
            database.commit()
            write_anew(database)
            assert database.secrets.drop(forget_history=True) == [generation]
            assert sealed_under(database, generation) == []
            require_sound(database)
    with opened("r") as database:
        assert contents(database) == expected(**{f"after {number}": CONTENT for number in range(3)})
        assert [info.generation for info in database.secrets.generations()] == [3]


def test_several_generations_are_dropped_together(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        assert [database.secrets.rotate() for _ in range(3)] == [1, 2, 3]
    with opened() as database:
        write_anew(database)
        assert database.secrets.drop(forget_history=True) == [0, 1, 2]
        assert [sealed_under(database, generation) for generation in range(3)] == [[], [], []]
        assert database.secrets.drop() == []
    with opened("r") as database:
        assert contents(database) == expected()


def test_a_generation_in_the_middle_can_go_first(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        database.secrets.rotate()
        database.secrets.rotate()
        with pytest.raises(InvalidArgument, match="strata"):
            database.secrets.drop(0, forget_history=True)
        assert database.secrets.drop(1, forget_history=True) == [1]
        assert [info.generation for info in database.secrets.generations()] == [0, 2]
    with opened() as database:
        assert contents(database) == expected()
        write_anew(database)
        assert database.secrets.drop() == [0]
    with opened("r") as database:
        assert contents(database) == expected()


# --- what needs a generation ------------------------------------------------------------------------------------------


def test_strata_keep_a_generation_until_they_are_written_anew(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        assert database.secrets.generations()[0].uses == ()  # The newest is not asked about.
    with opened() as database:
        database.secrets.rotate()
        with pytest.raises(InvalidArgument, match="basin-compact") as caught:
            database.secrets.drop(0, forget_history=True)
        (use,) = caught.value.uses
        assert (use.kind, use.count) == ("strata", len(use.objects))
        counted = {stratum_name(known.added.kind, known.added.id) for known in database.core.state.strata.values()}
        assert set(use.objects) == counted.intersection(sealed_under(database, 0)) == counted
        assert caught.value.generations == [0]
        assert [(info.generation, info.current) for info in database.secrets.generations()] == [(0, False), (1, True)]
        assert contents(database) == expected()


def test_condemned_strata_keep_a_generation(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    with opened() as database:
        doomed = [identity for identity, known in database.core.state.strata.items() if known.added.kind == 1][:1]
        assert database.core.append(lambda now: Record(condemned=[Condemn(now.position, doomed)]))
        database.secrets.rotate()
        write_anew(database)
        assert kinds(database)["condemned strata"] == 1
        with pytest.raises(InvalidArgument, match="grace"):
            database.secrets.drop(0, forget_history=True)


def test_history_keeps_a_generation_until_it_is_given_up(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    with opened() as database:
        before = database.head.position
        database.secrets.rotate()
        write_anew(database)
        with pytest.raises(InvalidArgument, match="forget_history") as caught:
            database.secrets.drop(0)
        assert [use.kind for use in caught.value.uses] == ["records of history"]
        assert database.core.state.generations_dropped == frozenset()
        assert contents(database) == expected()
        with database.at(before) as view:
            assert contents(view) == expected()  # type: ignore[arg-type]  # a view scans as a database does
        database.secrets.drop(0, forget_history=True)
        with pytest.raises(PositionGone):
            database.at(before)


def test_history_that_has_passed_a_generation_lets_go_of_it(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "_MARK_EVERY_MS", 0)
    with opened("x", history_s=0.0) as database:
        fill(database)
    with opened(history_s=0.0) as database:
        database.secrets.rotate()
        write_anew(database)
        for number in range(3):
            database["after"] = b"%d" % number
            database.commit()
            raise_floor(database.core)
        assert "records of history" not in kinds(database)
        assert database.secrets.drop(0) == [0]
        assert sealed_under(database, 0) == []
    with opened("r") as database:
        assert contents(database) == expected(after=b"2")


def test_a_pinned_position_keeps_a_generation(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
    with opened() as database:
        pinned = database.pin("audit")
        database.secrets.rotate()
        write_anew(database)
        with pytest.raises(InvalidArgument, match="pins"):
            database.secrets.drop(0, forget_history=True)
        assert kinds(database)["pins"] == 1
        with database.at(pinned) as view:
            assert contents(view) == expected()  # type: ignore[arg-type]  # as above
        database.unpin("audit")
        assert database.secrets.drop(0, forget_history=True) == [0]


def test_on_a_disk_rotation_ends_the_segment_so_that_upkeep_removes_the_old_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "_MARK_EVERY_MS", 0)
    options: dict[str, Any] = {**OPTIONS, "history_s": 0.0}
    with basin.open(tmp_path / "basin", "x", secret=SECRET, **options) as database:
        fill(database)
        database.secrets.rotate()
        core, log = database.core, database.core.log
        assert isinstance(log, FileLog)
        assert segments_of(core, [0]) == log.segments()[:-1]
        for number in range(3):
            database["after"] = b"%d" % number
            database.commit()
            flush(database.core)
            raise_floor(database.core)
            checkpoint(database.core)
        assert segments_of(core, [0]) == []
        assert len(log.segments()) == 1


def test_a_stub_that_a_repair_left_in_a_segment_counts(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", "x", secret=SECRET, **OPTIONS) as database:
        fill(database)
        first = database.core.cursor.segment
        database.secrets.rotate()
        core = database.core
        assert first not in segments_of(core, [1])
        stub = encode_stub(core.cipher, 1, Stub(2, bytes(32)), generation=1, randomness=bytes(32))
        name = segment_name(first)
        size = len(core.storage.read_file(name, 1 << 30))
        file = core.storage.append_to(name, size)
        file.append(stub)
        file.close()
        assert first in segments_of(core, [1])


def test_the_newest_generation_and_unknown_ones_are_not_dropped(opened: Open) -> None:
    with opened("x") as database:
        database.secrets.rotate()
        for wrong in (1, 2, -1):
            with pytest.raises(InvalidArgument, match="before 1"):
                database.secrets.drop(wrong)
        with pytest.raises(InvalidArgument, match="number"):
            database.secrets.drop("0")  # type: ignore[arg-type]  # that is what is tried
        assert database.core.state.generations_dropped == frozenset()


def test_an_open_basin_has_no_generations(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", "x", profile="open", **OPTIONS) as database:
        assert database.secrets.generations() == []
        with pytest.raises(InvalidArgument, match="no secrets"):
            database.secrets.drop()


def test_what_a_rotation_that_broke_off_had_sealed_can_be_dropped(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        core = database.core
        (slot_id,) = core.state.slots
        sealed = core.keyring.seal_to(slot_id, core.state.slots[slot_id], 1, bytes(32))
        core.storage.put_if_absent(generation_name(slot_id, 1), sealed)
        assert database.secrets.rotate() == 2
        assert database.secrets.drop(1) == [1]
        assert sealed_under(database, 1) == []
        assert sealed_under(database, 0)


# --- slots ------------------------------------------------------------------------------------------------------------


def test_a_removed_slot_and_a_planted_one_get_no_generation(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        removed = database.secrets.add(OTHER)
        kept = {name: data for name, data in stored(database).items() if name.startswith(f"keys/{removed}")}
        assert len(kept) == 2
        database.secrets.remove(removed)
        storage = database.core.storage
        keys = SlotKeys(bytes(range(32)), bytes(32))
        planted, _ = create_slot(
            bytes(32),
            kind="key-file",
            basin_id=database.core.keyring.basin_id,
            slot_id="f" * 16,
            keys=keys,
            salt=bytes(16),
            created_ms=0,
        )
        storage.put_if_absent(slot_name("f" * 16), planted)
        for name, data in kept.items():  # Somebody puts the files of the removed slot back.
            storage.put_if_absent(name, data)
        database.secrets.rotate()
    with opened() as database:
        write_anew(database)
        database.secrets.drop(forget_history=True)
        storage = database.core.storage
        assert storage.list("keys/" + "f" * 16) == ["slot.json"]
        assert storage.list(f"keys/{removed}") == ["slot.json"]
    with pytest.raises((WrongSecret, CorruptionError)):
        opened("r", OTHER)


def test_who_held_the_keys_opens_an_old_copy_and_nothing_new(tmp_path: Path) -> None:
    """What rotation does not do: it takes nothing back."""
    disk = SimulatedDisk(boot=1)
    with open_disk(disk, mode="x") as database:
        fill(database)
        database.secrets.add(OTHER)
    copy = disk.kill_image()
    with open_disk(disk) as database:
        database.secrets.remove(next(slot.slot_id for slot in database.secrets.list() if not slot.current))
        database.secrets.rotate()
        write_anew(database)
        database.secrets.drop(forget_history=True)
        now = {name: data for name, data in stored(database).items() if not name.startswith("keys/")}
    old = SimulatedDisk.from_image(copy, boot=2)
    with open_disk(old, secret=OTHER) as database:
        assert contents(database) == expected()
        known = database.core.keyring
        for name, data in now.items():
            if name.startswith(("data/", "meta/")):
                header = decode_header(data)
                with pytest.raises(WrongSecret):
                    known.stratum_keys(header.generation, header.key_material, header.stratum_id, header.kind)


def test_a_secret_that_is_added_later_gets_no_dropped_generation(opened: Open) -> None:
    """Also from a handle that still holds it in memory."""
    with opened("x") as database:
        fill(database)
        database.secrets.rotate()
    with opened() as database:
        write_anew(database)
        database.secrets.drop(forget_history=True)
        assert database.core.keyring.generations() == [0, 1]
        slot_id = database.secrets.add(OTHER)
        assert database.core.storage.list(f"keys/{slot_id}") == [f"{1:010}", "slot.json"]
        assert sealed_under(database, 0) == []
    with opened("r", OTHER) as database:
        assert contents(database) == expected()


def test_a_slot_that_was_being_made_during_a_drop_is_cleared_later(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        database.secrets.rotate()
    with opened() as database:
        core = database.core
        unfinished, _ = add_slot(core.storage, core.keyring, OTHER)
        core.storage.delete(slot_name(unfinished))
        write_anew(database)
        database.secrets.drop(forget_history=True)
        assert core.storage.list(f"keys/{unfinished}") == [f"{1:010}"]


def test_the_keys_stay_while_a_valid_slot_lacks_the_newest_ones(opened: Open) -> None:
    with opened("x") as database:
        fill(database)
        other = database.secrets.add(OTHER)
        database.secrets.rotate()
    with opened() as database:
        write_anew(database)
        storage = database.core.storage
        storage.delete(generation_name(other, 1))
        with pytest.raises(CorruptionError) as caught:
            database.secrets.drop(forget_history=True)
        assert caught.value.object == generation_name(other, 1)
        assert f"{0:010}" in storage.list(f"keys/{other}")
        database.secrets.remove(other)
        assert database.secrets.drop(forget_history=True) == [0]


# --- broken off -------------------------------------------------------------------------------------------------------


def test_what_a_kill_left_of_a_drop_is_finished_by_the_next_look(opened: Open) -> None:
    """The record stands, and nothing else was done: keys, a checkpoint that came late, a hint."""
    with opened("x") as database:
        fill(database)
        checkpoint(database.core)
    with opened() as database:
        core = database.core
        late = {name: data for name, data in stored(database).items() if name.startswith(("keys/", "checkpoint/"))}
        late |= {"log/hint": stored(database).get("log/hint", b"")}
        database.secrets.rotate()
        write_anew(database)
        database.secrets.drop(forget_history=True)
        for name, data in late.items():
            if core.storage.objects is not None:
                core.storage.objects.put(name, data)
            elif name != "log/hint" and not core.storage.exists(name):
                core.storage.put_if_absent(name, data)
        assert sealed_under(database, 0)
    with opened() as database:
        assert contents(database) == expected()
        assert finish_drops(database.core) >= 2
        assert finish_drops(database.core) == 0
        assert sealed_under(database, 0) == []
        assert database.secrets.drop() == []
        require_sound(database)


def test_nothing_is_looked_for_while_nothing_was_dropped(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("x") as database:
        monkeypatch.setattr(type(database.core.storage), "list_folders", lambda *_: pytest.fail("looked"))
        assert finish_drops(database.core) == 0


# --- the log in a bucket ----------------------------------------------------------------------------------------------


def test_an_append_that_was_folded_before_its_writer_knew_of_it_was_appended() -> None:
    """Else it would be done a second time. The reply is lost, and a stub stands where the record was."""
    store = MemoryObjects()
    cipher = FrameCipher(bytes(16), {0: bytes(32), 1: bytes(range(32))})
    payload = encode_record(Record(1, 1, EMPTY_HASH, 0))
    frame = cipher.seal(RECORD_MAGIC, 1, payload, generation=0, randomness=bytes(range(32)))
    stub = encode_stub(cipher, 1, Stub(7, chain_hash(frame)), generation=1, randomness=bytes(32))
    store.put(record_name(1), stub)
    log = ObjectLog(store, cipher, RequestPolicy(), lambda: None)
    end = log.append(START, frame, EMPTY_HASH)
    assert end is not None
    assert end.position == 1
    other = cipher.seal(RECORD_MAGIC, 1, payload, generation=0, randomness=bytes(32))
    assert log.append(START, other, EMPTY_HASH) is None


def test_in_a_bucket_records_become_stubs_that_need_the_newest_keys_only(opened: Open, url: str) -> None:
    with opened("x") as database:
        fill(database)
    with opened() as database:
        last = database.secrets.rotate() and database.core.state.position
        write_anew(database)
        hashes = [database.core.log.hash_at(position) for position in range(1, last + 1)]
        database.secrets.drop(forget_history=True)
        store: ObjectStore | None = database.core.storage.objects
        if store is None:
            assert [database.core.log.hash_at(position) for position in range(1, last + 1)] == [None] * last
            return
        for position in range(1, last + 1):
            header = decode_frame_header(store.get(ByteRange(record_name(position), 0, 64)))
            assert (header.magic, header.generation) == (STUB_MAGIC, 1)
        assert [database.core.log.hash_at(position) for position in range(1, last + 1)] == hashes
        hint = read_hint(database.core.storage)
        assert hint is not None
        assert sorted(name.rpartition("/")[2] for name in hint.keys) == [f"{1:010}", "slot.json"]


def test_a_bucket_is_asked_for_few_headers_to_find_where_a_generation_ends() -> None:
    store = MemoryObjects()
    cipher = FrameCipher(bytes(16), {one: bytes([one]) * 32 for one in range(3)})
    log = ObjectLog(store, cipher, RequestPolicy(), lambda: None)
    for position in range(1, 101):
        generation = 0 if position <= 40 else 1 if position <= 70 else 2
        frame = cipher.seal(RECORD_MAGIC, position, b"", generation=generation, randomness=bytes(32))
        store.put(record_name(position), frame)
    assert [log.last_of([one], 0, 100) for one in range(3)] == [40, 70, 100]
    assert log.last_of([0, 1], 0, 100) == 70
    assert log.last_of([0], 40, 100) == 40
    assert log.last_of([0], 41, 100) == 0
    assert log.last_of([1], 0, 40) == 0
    assert log.last_of([0], 3, 2) == 0
    for position in (35, 40, 41, 69, 70):  # As a repair leaves them.
        stub = encode_stub(cipher, position, Stub(100, bytes(32)), generation=2, randomness=bytes(32))
        store.put(record_name(position), stub)
    assert [log.last_of([one], floor, 100) for floor in (0, 35) for one in range(3)] == [41, 70, 100] * 2
    assert log.last_of([0], 40, 100) == 0
    assert log.positions_of([1], 100) == list(range(42, 69))

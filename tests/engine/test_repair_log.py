"""A log that rots: what it still says counts, what it no longer says is named, and writers go on behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from blake3 import blake3

import basin
from basin.api import open_storage
from basin.engine import file_log
from basin.engine.checkpoints import checkpoint
from basin.engine.file_log import segment_name
from basin.engine.merging import flush, merge_names
from basin.engine.object_log import Folded, record_name
from basin.engine.repair_survey import survey_log
from basin.engine.verify import FindingKind
from basin.errors import BasinPoisoned, Conflict, CorruptionError
from basin.format.layout import SEGMENT_HEADER_SIZE
from tests.engine.damaged_basin import (
    PLACES,
    PROFILES,
    DiskPlace,
    Place,
    build,
    content,
    damage_records,
    file_of,
    findings,
    planned,
    position_of,
    readable,
    repaired,
    small,
    survey,
)

Make = Callable[[str], Place]


@pytest.fixture(params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(PLACES))
def place(request: pytest.FixtureRequest, profile: str) -> Place:
    return PLACES[request.param](profile)


def require_sound(place: Place, voids: int) -> None:
    """Check finds nothing but the records that were cut off, and a handle that expects no damage opens."""
    kinds = [found.kind for found in findings(place)]
    assert kinds == [FindingKind.VOID] * voids
    assert not repaired(place)


def test_what_lies_before_the_rot_counts(place: Place) -> None:
    small(place)
    damaged = position_of(place, b"name/4")
    damage_records(place, damaged)
    before = readable(place)
    assert {name for name in before if isinstance(name, bytes)} == {
        *(b"name/%d" % number for number in range(4)),
        *(b"large/%d" % number for number in range(4)),
    }
    (plan,) = planned(place)
    assert f"at {damaged};" in plan.detail
    assert {b"name/5", b"large/9"} <= set(plan.names)
    assert b"name/3" not in plan.names
    (done,) = repaired(place)
    assert done.done
    assert (done.detail, done.names) == (plan.detail, plan.names)
    assert readable(place) == before
    require_sound(place, voids=5)


@pytest.mark.parametrize("number", [4, 9])
def test_contents_that_cut_records_added_stay(place: Place, number: int) -> None:
    """Also those of the record that cannot be read: their stratum is whole."""
    small(place)
    damage_records(place, position_of(place, b"name/%d" % number))
    repaired(place)
    with place.open() as database:
        for one in range(10):
            assert database.core.contents.get(blake3(content(one)).digest()) == content(one)


def test_writers_go_on_behind_the_rot(place: Place) -> None:
    small(place)
    damage_records(place, position_of(place, b"name/4"))
    with place.open("w") as database:
        with pytest.raises(BasinPoisoned):
            database[b"no"] = b"not before the repair"
        database.repair(dry_run=False)
        database[b"after"] = b"written"
    with place.open("w") as database:
        assert database[b"after"] == b"written"
        assert database[b"name/3"] == b"3"
        database[b"name/7"] = b"again"
    with place.open() as database:
        assert database[b"name/7"] == b"again"
    require_sound(place, voids=5)


def test_a_handle_that_only_reads_repairs_nothing(place: Place) -> None:
    small(place)
    damage_records(place, position_of(place, b"name/4"))
    files = place.files()
    with place.open() as database:
        assert database.repair()
        with pytest.raises(basin.errors.ReadOnly):
            database.repair(dry_run=False)
    assert place.files() == files


def test_what_is_replaced_is_kept(place: Place) -> None:
    small(place)
    position = position_of(place, b"name/4")
    damage_records(place, position)
    piece_name = file_of(place, survey(place).pieces[position - 1]) if not place.is_bucket else record_name(position)
    damaged = place.files()[piece_name]
    repaired(place)
    assert place.files()[f"rot/{piece_name.rpartition('/')[2]}"] == damaged


def test_nothing_else_of_the_log_is_touched(place: Place) -> None:
    """Records that can be read stay where they are, byte by byte."""
    small(place)
    position = position_of(place, b"name/4")
    before = survey(place).pieces
    damage_records(place, position)
    repaired(place)
    after = survey(place).pieces
    assert {at: piece for at, piece in before.items() if at != position} == {
        at: piece for at, piece in after.items() if at in before and at != position
    }
    assert after[position].is_stub
    assert after[position].hash == before[position].hash


def test_several_records_are_damaged(place: Place) -> None:
    small(place)
    first = position_of(place, b"name/2")
    damage_records(place, first, first + 1, first + 4)
    repaired(place)
    assert {name for name in readable(place) if isinstance(name, bytes)} == {
        b"name/0", b"large/0", b"name/1", b"large/1",
    }  # fmt: skip
    require_sound(place, voids=5)


def test_the_first_record_is_damaged(place: Place) -> None:
    small(place)
    damage_records(place, 1)
    repaired(place)
    with place.open("w") as database:
        assert b"name/0" not in database
        database[b"after"] = b"written"
    assert readable(place)[b"after"] == b"written"


def test_the_last_record_is_damaged(place: Place) -> None:
    """On a disk the watermark says that it counted."""
    small(place)
    last = survey(place).end
    damage_records(place, last)
    before = readable(place)
    assert len(before) == 20
    repaired(place)
    assert readable(place) == before
    require_sound(place, voids=0)


def test_names_that_a_checkpoint_leaves_to_the_log(place: Place) -> None:
    """The state behind the rot is in a checkpoint; names between its runs and itself are not: one record's are lost."""
    with place.open("x") as database:
        for number in range(10):
            database[b"name/%d" % number] = b"%d" % number
            database.commit()
        checkpoint(database.core)
        database[b"later"] = b"behind the checkpoint"
    damage_records(place, position_of(place, b"name/4"))
    expected = {b"name/%d" % number: b"%d" % number for number in range(10) if number != 4}
    before = readable(place)
    assert before == expected | {b"later": b"behind the checkpoint"}
    repaired(place)
    assert readable(place) == before
    require_sound(place, voids=0)


def test_a_run_of_names_reaches_over_the_rot(place: Place) -> None:
    """Names were flushed and merged behind the damaged record, and the checkpoints are lost, too: the runs have all."""
    with place.open("x") as database:
        for number in range(10):
            database[b"name/%d" % number] = b"%d" % number
            database.commit()
            if number % 3 == 2:
                flush(database.core)
        merge_names(database.core, database.core.state.name_runs)
        database[b"later"] = b"behind the merge"
    damage_records(place, position_of(place, b"name/4"))
    for name in place.names("checkpoint"):
        place.change(name, 100)
    if place.is_bucket:
        place.put("log/hint", None)
    before = readable(place)
    assert before == {b"name/%d" % number: b"%d" % number for number in range(10)} | {b"later": b"behind the merge"}
    repaired(place)
    assert readable(place) == before
    require_sound(place, voids=0)


def test_a_run_of_names_counts_though_no_record_names_it(place: Place) -> None:
    """The flush cannot be read, nor any checkpoint; its run lies there, whole, and reaches over the rot before it."""
    with place.open("x") as database:
        for number in range(10):
            database[b"name/%d" % number] = b"%d" % number
            database.commit()
        flush(database.core)
        flushed = database.core.state.position
        database[b"later"] = b"behind the flush"
    damage_records(place, position_of(place, b"name/4"), flushed)
    for name in place.names("checkpoint"):
        place.put(name, None)
    before = readable(place)
    assert before == {b"name/%d" % number: b"%d" % number for number in range(10)}
    repaired(place)
    assert readable(place) == before
    require_sound(place, voids=1)


def test_an_object_that_is_gone_is_no_end_of_the_log(profile: str) -> None:
    """Whoever opens does not miss it; a repair looks behind it, and writes nothing into its place."""
    place = PLACES["bucket"](profile)
    with place.open("x") as database:
        for number in range(8):
            database[b"name/%d" % number] = b"%d" % number
            database.commit()
            if number == 3:
                flush(database.core)
                checkpoint(database.core)
    position = position_of(place, b"name/4")
    later = place.files()[record_name(position + 1)]
    place.put(record_name(position), None)
    with open_storage(place.storage(), "place:", mode="r", secret=place.secret) as database:
        assert b"name/5" not in database  # Nobody misses it: the last record is in the checkpoint.
    assert FindingKind.LOG in {found.kind for found in findings(place)}
    repaired(place)
    assert names_in(place) == {b"name/%d" % number for number in range(4)}
    assert place.files()[record_name(position + 1)] == later
    require_sound(place, voids=3)


def test_a_repair_of_what_another_one_has_repaired_is_refused(place: Place) -> None:
    small(place)
    damage_records(place, position_of(place, b"name/4"))
    with place.open("w") as slow:
        repaired(place)
        with place.open("w") as database:
            database[b"after"] = b"written"
        with pytest.raises(Conflict):
            slow.repair(dry_run=False)
    assert readable(place)[b"after"] == b"written"
    require_sound(place, voids=5)


def test_a_new_session_has_the_number_of_none_that_strata_tell_of(profile: str) -> None:
    """The end of the log is lost, and nothing says where it was: a stratum has the number of a session behind it."""
    place = small(DiskPlace(profile))
    with place.open("w") as database:
        second = database.core.state.position + 1
        database[b"second"] = content(20)
        database.commit()
        assert database.core.session == second
    name = place.names("log")[0]
    third = survey(place).pieces[3]
    place.put(name, place.files()[name][: third.offset + 10])
    place.put("log/lock", None)
    place.change(name, survey(place).pieces[2].offset + 90)
    repaired(place)
    with place.open("w") as database:
        database.core.ensure_session()
        assert database.core.session > second
    require_sound(place, voids=0)


def test_the_log_is_gone_and_a_checkpoint_is_there(place: Place) -> None:
    with place.open("x") as database:
        database.put_many((b"name/%d" % number, b"%d" % number) for number in range(10))
        database.commit()
        flush(database.core)
        checkpoint(database.core)
        database[b"later"] = b"behind the checkpoint"
    for name in place.names("log"):
        place.put(name, None)
    before = readable(place)
    assert before == {b"name/%d" % number: b"%d" % number for number in range(10)}
    repaired(place)
    assert readable(place) == before
    with place.open("w") as database:
        database[b"after"] = b"written"
    assert readable(place)[b"after"] == b"written"
    require_sound(place, voids=0)


def test_without_any_beginning_nothing_is_made_up(profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint, and of the log only what came later: all stays as it is, and the basin does not open."""
    monkeypatch.setattr(file_log, "SEGMENT_SIZE", 600)
    place = small(DiskPlace(profile))
    first, *others = [name for name in place.names("log") if name.endswith(".log")]
    assert others
    place.put(first, None)
    files = place.files()
    with pytest.raises(CorruptionError):
        place.open("w")
    assert place.files() == files


def test_a_damaged_record_that_a_checkpoint_holds_costs_its_history_alone(place: Place) -> None:
    built = build(place)
    damage_records(place, 2)
    before = readable(place)
    assert {name: before[name] for name in built.names if name in before} != {}
    (done,) = repaired(place)
    assert done.done
    assert readable(place) == before
    require_sound(place, voids=0)
    with place.open() as database:
        assert database.at(4)[b"small/0001"] == b"inline 1"
        with pytest.raises(Folded):
            database.at(2)


def test_a_handle_that_knows_more_than_is_stored_loses_nothing(place: Place) -> None:
    """It was open when the record rotted: it stores what it knows."""
    small(place)
    position = position_of(place, b"name/4")
    pieces = survey(place).pieces
    with place.open("w") as database:
        flip_under(place, file_of(place, pieces[position]), pieces[position].offset + 90)
        actions = database.repair(dry_run=False)
        assert [action.done for action in actions] == [True]
        database[b"after"] = b"written"
    found = readable(place)
    assert {name for name in found if isinstance(name, bytes)} == {
        *(b"name/%d" % number for number in range(10)),
        *(b"large/%d" % number for number in range(10)),
        b"after",
    }
    require_sound(place, voids=0)


def flip_under(place: Place, name: str, at: int) -> None:
    """Flip a bit while handles are open."""
    place.overwrite(name, at, bytes([place.files()[name][at] ^ 4]))


def test_another_writer_learns_of_a_repair(place: Place) -> None:
    """It had all records in memory, and goes on with what the repair has left, or not at all: never with both."""
    small(place)
    position = position_of(place, b"name/4")
    piece = survey(place).pieces[position]
    other = place.open("w")
    other[b"before"] = b"by another writer"
    other.commit()
    flip_under(place, file_of(place, piece), piece.offset + 90)
    repaired(place)
    try:
        other[b"after"] = b"by another writer"
        other.commit()
    except (Conflict, BasinPoisoned):
        pass
    finally:
        other.core.release("the test is over")
    found = {name for name in readable(place) if isinstance(name, bytes)}
    expected = {*(b"name/%d" % number for number in range(4)), *(b"large/%d" % number for number in range(4))}
    assert found - {b"after"} == expected
    with place.open("w") as database:
        database[b"at last"] = b"written"
    assert readable(place)[b"at last"] == b"written"


def test_another_reader_follows_a_repair(place: Place) -> None:
    small(place)
    position = position_of(place, b"name/4")
    damage_records(place, position)
    with place.open() as salvaged:
        assert b"name/3" in salvaged
        assert b"name/5" not in salvaged
    repaired(place)
    with place.open("w") as writer, place.open() as reader:
        writer[b"after"] = b"written"
        writer.commit()
        reader.refresh()
        assert reader[b"after"] == b"written"


# --- segments ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def segments(profile: str, monkeypatch: pytest.MonkeyPatch) -> DiskPlace:
    """The ten commits in segments of two or three records."""
    monkeypatch.setattr(file_log, "SEGMENT_SIZE", 900)
    place = DiskPlace(profile)
    small(place)
    assert len(place.names("log")) > 4
    return place


def names_in(place: Place) -> set[bytes]:
    return {name for name in readable(place) if isinstance(name, bytes) and name.startswith(b"name/")}


def test_a_damaged_header_of_a_segment_loses_nothing(segments: DiskPlace) -> None:
    for name in segments.names("log")[1:-1:2]:
        segments.change(name, 50)
    assert FindingKind.LOG in {found.kind for found in findings(segments)}
    repaired(segments)
    assert len(names_in(segments)) == 10
    require_sound(segments, voids=0)


def test_a_missing_segment_loses_what_came_behind_it(segments: DiskPlace) -> None:
    positions = [position_of(segments, b"name/%d" % number) for number in range(10)]
    second = segments.names("log")[1]
    with segments.open() as database:
        pieces = survey_log(database.core, database.core.state.position).pieces
    first = min(at for at, piece in pieces.items() if segment_name(piece.segment) == second)
    segments.put(second, None)
    repaired(segments)
    assert names_in(segments) == {b"name/%d" % number for number in range(10) if positions[number] < first}
    assert {found.kind for found in findings(segments)} == {FindingKind.VOID}
    assert not repaired(segments)


@pytest.mark.parametrize("boot", [1, 2])
def test_a_segment_that_was_cut_short_loses_its_end(segments: DiskPlace, boot: int) -> None:
    """The watermark says how far the log went, also after a boot."""
    last = segments.names("log")[-2] if segments.names("log")[-1] == "log/lock" else segments.names("log")[-1]
    image = segments.disk.kill_image()
    segments.restart(image.with_content(last, image.contents()[last][: SEGMENT_HEADER_SIZE + 20]), boot)
    repaired(segments)
    assert names_in(segments)
    require_sound(segments, voids=0)
    with segments.open("w") as database:
        database[b"after"] = b"written"
    assert readable(segments)[b"after"] == b"written"


def test_rot_before_a_torn_tail(profile: str) -> None:
    """After a power cut: what the cut left at the end is no rot, and what rots before it is."""
    place = DiskPlace(profile)
    small(place)
    position = position_of(place, b"name/4")
    piece = survey(place).pieces[position]
    name = file_of(place, piece)
    place.change(name, piece.offset + 90)
    image = place.disk.kill_image()
    place.restart(image.with_content(name, image.contents()[name] + b"torn" * 20).with_content("log/lock", None), 2)
    (action,) = planned(place)
    assert f"at {position};" in action.detail
    repaired(place)
    assert names_in(place) == {b"name/%d" % number for number in range(4)}
    require_sound(place, voids=5)


def test_an_interrupted_replacement_is_taken_up(segments: DiskPlace) -> None:
    """The segment lies in `rot/` alone: nothing is lost by that."""
    damaged = position_of(segments, b"name/8")
    piece = survey(segments).pieces[damaged]
    name = segment_name(piece.segment)
    segments.change(name, piece.offset + 90)
    body = segments.files()[name]
    segments.put("rot/" + name.removeprefix("log/"), body)
    segments.put(name, None)
    repaired(segments)
    assert names_in(segments) == {b"name/%d" % number for number in range(8)}

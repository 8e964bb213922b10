"""Several writers and readers on one bucket: nothing is lost or mixed, and each sees what it was promised."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest

import basin
from basin.engine.hints import HINT_NAME
from basin.engine.object_log import token_of
from basin.engine.plan import SMALL_STRATA_MAX
from basin.errors import (
    BasinError,
    BasinPoisoned,
    Conflict,
    PositionGone,
    ReadOnly,
    RollbackDetected,
    WrongSecret,
)
from basin.format.layout import STUB_MAGIC
from basin.format.record import decode_frame_header
from basin.terms import Head
from basin.testing.object_faults import FaultKind
from tests.conftest import Spawn
from tests.remote.conftest import Bucket, S3Place, finished, record_name

COUNTER = b"counter"
INCREMENTS = 12


def increment(transaction: Any) -> int:
    value = int(transaction.get(COUNTER, b"0")) + 1
    transaction[COUNTER] = b"%d" % value
    return value


# --- several writers ------------------------------------------------------------------------------------------------


def test_four_handles_in_threads_count_without_losing_one(bucket: Bucket) -> None:
    handles = [bucket.open(actor=f"writer {number}") for number in range(4)]
    returned: list[int] = []
    failures: list[BaseException] = []

    def work(handle: Any) -> None:
        try:
            returned.extend(handle.run(increment, retries=1000) for _ in range(INCREMENTS))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(handle,)) for handle in handles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(returned) == list(range(1, 4 * INCREMENTS + 1))
    for handle in handles:
        handle.refresh()
        assert handle[COUNTER] == b"%d" % (4 * INCREMENTS)
    assert bucket.open("r")[COUNTER] == b"%d" % (4 * INCREMENTS)


def test_three_processes_count_without_losing_one(s3_place: S3Place, spawn: Spawn) -> None:
    program = """
def increment(transaction):
    value = int(transaction.get(b"counter", b"0")) + 1
    transaction[b"counter"] = b"%d" % value
    return value

with opened() as db:
    for number in range(int(sys.argv[1])):
        print(db.run(increment, retries=1000))
        db.blobs.put(b"%d of %d" % (number, os.getpid()))
"""
    s3_place.open().close()
    processes = [s3_place.start(spawn, program, str(INCREMENTS)) for _ in range(3)]
    printed = [int(line) for process in processes for line in finished(process).split()]
    assert sorted(printed) == list(range(1, 3 * INCREMENTS + 1))
    reader = s3_place.open("r")
    assert reader[COUNTER] == b"%d" % (3 * INCREMENTS)
    assert len(reader.blobs.get_many(reader.blobs)) == 3 * INCREMENTS
    assert not list(reader.check())


def test_batches_of_two_writers_are_never_mixed(bucket: Bucket) -> None:
    left, right = bucket.open(), bucket.open()

    def work(handle: Any, mark: bytes) -> None:
        for number in range(10):
            with handle.batch() as batch:
                for name in (b"a", b"b", b"c"):
                    batch[name] = mark + b"%d" % number

    threads = [threading.Thread(target=work, args=one) for one in ((left, b"left "), (right, b"right "))]
    for thread in threads:
        thread.start()
    reader = bucket.open("r", refresh_interval_s=0)
    while any(thread.is_alive() for thread in threads):
        with reader.view() as view:
            assert len({view.get(name) for name in (b"a", b"b", b"c")}) == 1
    for thread in threads:
        thread.join()
    left.refresh()
    assert len({left[name] for name in (b"a", b"b", b"c")}) == 1


def test_a_transaction_that_read_what_another_handle_changed_conflicts(bucket: Bucket) -> None:
    first, second = bucket.open(), bucket.open()
    first[b"name"] = b"1"
    first.commit()
    second.refresh()
    with pytest.raises(Conflict) as caught, first.transaction() as transaction:
        assert transaction[b"name"] == b"1"
        transaction[b"other"] = b"made of 1"
        second[b"name"] = b"2"
        second.commit()
    assert caught.value.fields
    assert b"other" not in first
    assert first[b"name"] == b"2"
    with first.transaction() as transaction:
        assert transaction[b"name"] == b"2"
        transaction[b"other"] = b"made of 2"
    second.refresh()
    assert second[b"other"] == b"made of 2"


def test_transactions_on_other_names_do_not_conflict(bucket: Bucket) -> None:
    first, second = bucket.open(), bucket.open()
    with first.transaction() as transaction:
        transaction[b"left"] = transaction.get(b"left", b"") + b"1"
        with second.transaction() as other:
            other[b"right"] = other.get(b"right", b"") + b"1"
    second.refresh()
    assert dict(second.items()) == {b"left": b"1", b"right": b"1"}


def test_a_loser_without_a_session_does_no_upkeep_that_another_handle_has_just_done(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner = bucket.open(actor="winner")
    winner.core.upkeep_problems["_merge_small_strata"] = BasinError("held back by the test")
    for number in range(SMALL_STRATA_MAX):
        winner[b"name"] = b"%d" % number
        winner.blobs.put(b"content %d" % number * 100)
        winner.commit()
    loser = bucket.open("w", actor="loser")
    append = loser.core.log.append
    appends: list[int] = []

    def counted(cursor: Any, *arguments: Any, **named: Any) -> Any:
        appends.append(cursor.position)
        return append(cursor, *arguments, **named)

    monkeypatch.setattr(loser.core.log, "append", counted)
    with pytest.raises(Conflict), loser.transaction() as transaction:
        transaction[b"name"] = transaction[b"name"] + b" again"
        winner[b"name"] = b"changed"
        winner.commit()
    assert len(appends) == 1  # Not a second one, which would begin a session for the sake of upkeep.
    winner.core.upkeep_problems.clear()
    winner.core.settled = ()
    winner[b"later"] = b"value"
    winner.commit()
    assert winner.core.state.retired
    assert loser.run(increment) == 1
    winner.refresh()
    assert dict(winner.items()) == {b"name": b"changed", b"later": b"value", COUNTER: b"1"}
    assert not list(bucket.open("r").check())


def test_of_several_handles_one_creates_the_basin_and_the_others_open_it(bucket: Bucket) -> None:
    barrier = threading.Barrier(4)
    handles: list[Any] = []

    def work(number: int) -> None:
        barrier.wait()
        handle = bucket.open(actor=f"creator {number}")
        handle[b"name %d" % number] = b"value"
        handle.commit()
        handles.append(handle)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(handles) == 4
    assert len({handle.core.keyring.basin_id for handle in handles}) == 1
    assert len(bucket.open("r")) == 4
    assert len(bucket.open("r").secrets.list()) == 1


# --- readers --------------------------------------------------------------------------------------------------------


def test_a_reader_follows_with_refresh(bucket: Bucket) -> None:
    writer = bucket.open()
    reader = bucket.open("r")
    key = writer.blobs.put(b"content" * 1000)
    writer[b"large"] = b"value" * 1000
    writer.commit()
    assert b"large" not in reader
    reader.refresh()
    assert reader[b"large"] == b"value" * 1000
    assert reader.blobs[key] == b"content" * 1000
    with pytest.raises(ReadOnly):
        reader[b"name"] = b"value"


def test_views_and_past_positions_stay_what_they_were_while_others_write_merge_and_checkpoint(bucket: Bucket) -> None:
    writer = bucket.open(checkpoint_every=5)
    reader = bucket.open("r")
    contents = [b"content %d " % number * 100 for number in range(40)]
    keys, positions = [], []
    views = []
    for number, content in enumerate(contents):
        with writer.batch() as batch:
            keys.append(batch.blobs.put(content))
            batch[b"name"] = b"value %d" % number
        positions.append(batch.position)
        if number % 13 == 0:
            reader.refresh()
            views.append((number, reader.view()))
    assert len(writer.core.state.name_runs) >= 1
    reader.refresh()
    for number, view in views:
        assert view[b"name"] == b"value %d" % number
        assert len(list(view.blobs)) == number + 1
        assert view.blobs[keys[0]] == contents[0]
    fresh = bucket.open("r")
    for number in (0, 3, 17, 38):
        with fresh.at(positions[number]) as past:
            assert past[b"name"] == b"value %d" % number
            assert sorted(past.blobs) == sorted(keys[: number + 1])
    assert [change.position for change in fresh.changes(0) if change.name == b"name"] == positions


# --- secrets --------------------------------------------------------------------------------------------------------


def slot_of(db: Any) -> str:
    (current,) = [str(slot.slot_id) for slot in db.secrets.list() if slot.current]
    return current


def test_an_added_secret_opens_also_when_the_hint_is_old(bucket: Bucket) -> None:
    writer = bucket.open()
    old_hint = bucket.simulated.bodies["log/hint"]
    another = basin.Secret.generate()
    writer.secrets.add(another)
    assert bucket.simulated.bodies["log/hint"] != old_hint
    bucket.asked()
    bucket.open("r", secret=another)
    assert "list" not in bucket.asked().counts
    bucket.simulated.bodies["log/hint"] = old_hint
    bucket.open("r", secret=another)
    assert "list" in bucket.asked().counts


def test_a_removed_secret_opens_nothing_although_a_hint_has_a_copy_of_its_slot(bucket: Bucket) -> None:
    writer = bucket.open()
    another = basin.Secret.generate()
    slot = writer.secrets.add(another)
    old_hint = bucket.simulated.bodies["log/hint"]
    bucket.open("r", secret=another).close()
    writer.secrets.remove(slot)
    with pytest.raises(WrongSecret):
        bucket.open("r", secret=another)
    bucket.simulated.bodies["log/hint"] = old_hint
    with pytest.raises(WrongSecret):
        bucket.open("r", secret=another)
    assert len(bucket.open("r").secrets.list()) == 1


def test_a_removed_secret_opens_nothing_behind_a_rotation_although_a_hint_has_a_copy(bucket: Bucket) -> None:
    writer = bucket.open()
    another = basin.Secret.generate()
    slot = writer.secrets.add(another)
    old_hint = bucket.simulated.bodies["log/hint"]
    writer.secrets.remove(slot)
    writer.secrets.rotate()
    writer[b"name"] = b"value"
    writer.commit()
    bucket.simulated.bodies["log/hint"] = old_hint
    with pytest.raises(WrongSecret):
        bucket.open("r", secret=another)
    assert bucket.open("r")[b"name"] == b"value"


def test_a_hint_that_another_handle_writes_with_a_checkpoint_does_not_bring_a_removed_secret_back(
    bucket: Bucket,
) -> None:
    writer, other = bucket.open(), bucket.open("w", actor="other", checkpoint_every=1)
    another = basin.Secret.generate()
    slot = writer.secrets.add(another)
    before = bucket.simulated.bodies["log/hint"]
    late = iter([FaultKind.LATE])
    bucket.plan(
        lambda one: next(late, None) if (one.actor, one.kind, one.name) == ("other", "put", HINT_NAME) else None
    )
    other[b"name"] = b"value"
    other.commit()
    writer.secrets.remove(slot)
    assert bucket.simulated.bodies["log/hint"] != before
    bucket.simulated.settle()  # What `other` wrote with its checkpoint arrives now, with the slots of before.
    assert bucket.simulated.fired
    with pytest.raises(WrongSecret):
        bucket.open("r", secret=another)


def test_a_rotation_is_followed_by_those_who_are_open_and_by_those_who_open(bucket: Bucket) -> None:
    writer, other, reader = bucket.open(), bucket.open(), bucket.open("r")
    old_hint = bucket.simulated.bodies["log/hint"]
    writer[b"before"] = b"1"
    generation = writer.secrets.rotate()
    writer[b"after"] = b"2"
    key = writer.blobs.put(b"content" * 100)
    writer.commit()
    for handle in (other, reader, bucket.open("r")):
        handle.refresh()
        assert dict(handle.items()) == {b"before": b"1", b"after": b"2"}
        assert handle.blobs[key] == b"content" * 100
        assert handle.stats()["generation"] == generation
    other[b"third"] = b"3"
    other.commit()
    reader.refresh()
    assert reader[b"third"] == b"3"
    bucket.simulated.bodies["log/hint"] = old_hint
    assert bucket.open("r")[b"third"] == b"3"


def test_an_added_secret_opens_what_other_handles_rotate_afterwards(bucket: Bucket) -> None:
    first, second = bucket.open(), bucket.open()
    another = basin.Secret.generate()
    slot = first.secrets.add(another)
    second.secrets.rotate()
    second[b"name"] = b"value"
    second.commit()
    assert bucket.open("r", secret=another)[b"name"] == b"value"
    third = bucket.open("r", secret=another)
    assert slot_of(third) == slot


# --- rollback -------------------------------------------------------------------------------------------------------


def test_a_remembered_head_is_found_again_and_a_rollback_is_detected(bucket: Bucket) -> None:
    writer = bucket.open()
    writer[b"name"] = b"1"
    early = writer.head
    before = dict(bucket.simulated.bodies)
    writer[b"name"] = b"2"
    late = writer.head
    bucket.open("r", expect_head=early)
    bucket.open("r", expect_head=late)
    writer.core.release("gone")
    bucket.simulated.bodies.clear()
    bucket.simulated.bodies.update(before)
    bucket.open("r", expect_head=early)
    with pytest.raises(RollbackDetected) as caught:
        bucket.open("r", expect_head=late)
    assert caught.value.expected == late
    fork = bucket.open("w")
    fork[b"name"] = b"another second"
    fork.commit()
    with pytest.raises(RollbackDetected):
        bucket.open("r", expect_head=late)
    with pytest.raises(RollbackDetected):
        bucket.open("r", expect_head=Head(early.position, bytes(32)))


def test_a_remembered_head_is_found_again_behind_checkpoints(bucket: Bucket) -> None:
    writer = bucket.open(checkpoint_every=4)
    heads = []
    for number in range(20):
        writer[b"name"] = b"%d" % number
        heads.append(writer.head)
    for head in heads:
        bucket.open("r", expect_head=head).close()


# --- checkpoints ----------------------------------------------------------------------------------------------------

EVERY = 20


def test_a_fresh_handle_opens_with_few_gets_after_many_commits_and_sees_everything(bucket: Bucket) -> None:
    writer = bucket.open(checkpoint_every=EVERY)
    for number in range(3 * EVERY):
        writer[b"name %d" % number] = b"%d" % number
        writer.commit()
    assert 1 <= len(bucket.names("checkpoint")) <= 2
    bucket.asked()
    reader = bucket.open("r")
    asked = bucket.asked()
    behind = reader.core.state.position - reader.core.checkpoint_position
    assert behind <= EVERY + 5
    assert asked.counts["get"] <= 6 + behind + 2
    assert dict(reader.items()) == {b"name %d" % number: b"%d" % number for number in range(3 * EVERY)}


def test_old_checkpoints_go_and_a_broken_one_is_no_loss(bucket: Bucket) -> None:
    writer = bucket.open(checkpoint_every=5)
    for number in range(40):
        writer[b"name"] = b"%d" % number
        writer.commit()
        assert len(bucket.names("checkpoint")) <= 2
    newest = bucket.names("checkpoint")[-1]
    bucket.simulated.bodies[newest] = b"nothing of a checkpoint"
    assert bucket.open("r")[b"name"] == b"39"
    del bucket.simulated.bodies[newest]
    assert bucket.open("r")[b"name"] == b"39"
    del bucket.simulated.bodies["log/hint"]
    assert bucket.open("r")[b"name"] == b"39"


def is_stub(body: bytes) -> bool:
    return decode_frame_header(body).magic == STUB_MAGIC


def test_stubs_replace_large_folded_records_and_a_reader_far_behind_catches_up(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basin.engine.state._MARK_EVERY_MS", 0)  # Else history ends every ten seconds only.
    options: dict[str, Any] = {"checkpoint_every": 5, "history_s": 0.0}
    writer = bucket.open(**options)
    writer[b"first"] = b"value"
    writer.commit()
    reader = bucket.open("r")
    lagging_writer = bucket.open("w", **options)
    lagging_writer[b"of the other"] = b"value"
    lagging_writer.commit()
    expected = {b"first": b"value", b"of the other": b"value"}
    large = []
    for number in range(40):
        # Not to be compressed, and above the size from which a stub is worth its request.
        rows = [(b"name %d/%d" % (number, row), os.urandom(200)) for row in range(100)]
        with writer.batch() as batch:
            batch.put_many(rows)
        large.append(batch.position)
        expected.update(rows)
    bodies = bucket.simulated.bodies
    stubs = [position for position in large if is_stub(bodies[record_name(position)])]
    assert len(stubs) > 10
    assert max(len(bodies[record_name(position)]) for position in stubs) < 1000
    reader.refresh()
    assert dict(reader.items()) == expected
    lagging_writer[b"again"] = b"value"
    lagging_writer.commit()
    writer.refresh()
    expected[b"again"] = b"value"
    for handle in (writer, lagging_writer, bucket.open("r")):
        assert dict(handle.items()) == expected
    assert not list(bucket.open("r").check())
    with pytest.raises(PositionGone):
        reader.at(stubs[0])


def test_heads_tokens_and_openers_find_their_way_past_stubs(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basin.engine.state._MARK_EVERY_MS", 0)
    writer = bucket.open(checkpoint_every=5, history_s=0.0)
    first_hint = bucket.simulated.bodies["log/hint"]
    heads = []
    expected: dict[bytes, bytes] = {}
    for number in range(20):
        rows = [(b"name %d/%d" % (number, row), os.urandom(200)) for row in range(100)]
        with writer.batch() as batch:
            batch.put_many(rows)
        expected.update(rows)
        heads.append((batch.position, Head(batch.position, writer.core.log.hash_at(batch.position) or b"")))
    stubs = {at for at, _ in heads if is_stub(bucket.simulated.bodies[record_name(at)])}
    assert len(stubs) > 5
    for at, head in heads:
        bucket.open("r", expect_head=head).close()
        assert writer.resolve(token_of(at, head.hash)) == "committed"
        assert writer.resolve(token_of(at, bytes(32))) == "absent"
    floor = writer.core.state.floor
    for position in range(floor, writer.core.state.position + 1):
        with writer.at(position) as past:
            assert len(past) > 0
        assert all(change.position > position for change in writer.changes(position))
    bucket.simulated.bodies["log/hint"] = first_hint
    assert dict(bucket.open("r").items()) == expected
    del bucket.simulated.bodies["log/hint"]
    assert dict(bucket.open("w").items()) == expected


def test_a_reader_far_behind_reads_contents_that_were_merged_meanwhile(bucket: Bucket) -> None:
    writer = bucket.open(checkpoint_every=5, grace_s=0.0, history_s=0.0)
    contents = [b"content %d " % number * 50 for number in range(60)]
    keys = [writer.blobs.put(contents[0])]
    writer.commit()
    reader = bucket.open("r")
    for content in contents[1:]:
        keys.append(writer.blobs.put(content))
        writer.commit()
    assert reader.blobs[keys[0]] == contents[0]
    reader.refresh()
    assert reader.blobs.get_many(keys) == contents
    assert bucket.open("r").blobs.get_many(keys) == contents


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_revoked_session_without_anything_in_flight_goes_on_with_another(bucket: Bucket) -> None:
    first = bucket.open(job="backup")
    first[b"name"] = b"1"
    first.commit()
    session = first.core.session
    second = bucket.open("w", job="backup")
    second[b"other"] = b"1"
    second.commit()
    assert session not in second.core.state.sessions
    first[b"name"] = b"2"
    first.commit()
    assert first.core.session not in (0, session)
    second.refresh()
    assert dict(second.items()) == {b"name": b"2", b"other": b"1"}


def test_a_revoked_session_that_had_contents_in_flight_is_told_and_writes_no_more(bucket: Bucket) -> None:
    first = bucket.open(job="backup")
    first[b"name"] = b"1"
    first.commit()
    first.blobs.put(b"content" * 1000)
    second = bucket.open("w", job="backup")
    second[b"other"] = b"1"
    second.commit()
    with pytest.raises(Conflict) as caught:
        first.commit()
    assert caught.value.session
    with pytest.raises(BasinPoisoned):
        first[b"name"] = b"3"
    assert first[b"name"] == b"1"
    second.refresh()
    assert dict(second.items()) == {b"name": b"1", b"other": b"1"}
    assert not list(second.blobs)


def test_sessions_of_other_jobs_and_of_none_are_left_alone(bucket: Bucket) -> None:
    others = [bucket.open(job="nightly"), bucket.open(), bucket.open()]
    for number, other in enumerate(others):
        other.blobs.put(b"content %d" % number * 100)
    late = bucket.open(job="hourly")
    late[b"name"] = b"value"
    late.commit()
    for other in others:
        other.commit()
    late.refresh()
    assert len(late.core.state.sessions) == 4
    assert len(list(late.blobs)) == 3


def test_a_silent_session_counts_as_dead_after_its_time(bucket: Bucket) -> None:
    first = bucket.open()
    first.blobs.put(b"content" * 1000)
    patient = bucket.open("w")
    patient[b"name"] = b"1"
    patient.commit()
    assert first.core.session in patient.core.state.sessions
    time.sleep(1.1)
    second = bucket.open("w", session_timeout_s=1.0)
    second[b"name"] = b"2"
    second.commit()
    assert set(second.core.state.sessions) == {second.core.session}
    with pytest.raises(Conflict):
        first.commit()

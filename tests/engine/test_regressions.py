"""One test for each bug that was found by reading the engine as an adversary: the name says what must hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from pathlib import Path
from typing import Any

import pytest
import xxhash
from sortedcontainers import SortedList

import basin
from basin.api import Database, open_storage
from basin.engine import core as core_module
from basin.engine import writer as writer_module
from basin.engine.core import Pending
from basin.engine.file_log import FileLog
from basin.engine.log import Cursor
from basin.engine.memtable import Row
from basin.errors import Conflict, OutOfSpace, PositionGone, StorageError, StorageUnavailable
from basin.terms import Location
from basin.testing.crash import CrashStates
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage

OPTIONS: dict[str, Any] = {"reserve_size": 0, "sync_interval_s": 3600.0, "refresh_interval_s": 0.0, "threads": 1}


def open_on(disk: SimulatedDisk, mode: Any = "c", **options: Any) -> Database:
    return open_storage(SimulatedStorage(disk), "simulated:", mode=mode, profile="open", options={**OPTIONS, **options})


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@contextlib.contextmanager
def busy(other: Database) -> Iterator[None]:
    """While somebody else holds the log's lock."""
    with other.core.log.exclusive():
        yield


# --- what waits for a lock ------------------------------------------------------------------------------------------


def test_changes_that_waited_in_two_groups_keep_their_order(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that stayed busy must not put an earlier change behind a later one of the queue."""
    monkeypatch.setattr(core_module, "BATCHES_PER_RECORD_MAX", 1)
    with open_on(disk) as other, open_on(disk, lock_timeout_s=0.01) as db:
        db.put(b"name", b"earlier")
        db.core._enqueue(Pending())
        db.put(b"name", b"later")
        db.core._enqueue(Pending())
        db.put(b"last", b"value")
        with busy(other), pytest.raises(StorageUnavailable):
            db.commit()
        assert db[b"name"] == b"later"
        db.commit()
        assert other[b"name"] == b"later"


def test_changes_that_waited_in_one_group_keep_their_order(disk: SimulatedDisk) -> None:
    with open_on(disk) as other, open_on(disk, lock_timeout_s=0.01) as db:
        for value in (b"first", b"second"):
            db.put(b"name", value)
            db.core._enqueue(Pending())
        db.put(b"last", b"value")
        with busy(other), pytest.raises(StorageUnavailable):
            db.commit()
        db.commit()
        assert (db[b"name"], other[b"name"]) == (b"second", b"second")


def test_a_commit_covers_what_another_thread_queued_with_its_batch(disk: SimulatedDisk) -> None:
    """Between queueing and committing its batch that thread may be kept waiting: nothing is durable yet."""
    with open_on(disk) as other, open_on(disk) as db:
        db.put(b"name", b"value")
        db.core._enqueue(Pending())
        db.commit()
        assert other[b"name"] == b"value"


def test_upkeep_that_found_a_lock_busy_is_tried_again(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(disk, memtable_size=1024) as db:
        append, busy_once = db.core.append, [True]

        def appended(build: Any) -> bool:
            if busy_once and db.core.state.sessions:
                busy_once.clear()
                raise StorageUnavailable("busy", object="log/lock", operation="lock")
            return append(build)

        monkeypatch.setattr(db.core, "append", appended)
        for number in range(20):
            db.put(b"name %d" % number, b"value" * 20)
        db.commit()
        assert not busy_once
        db.put(b"another", b"value")
        db.commit()
        assert db.core.state.name_runs


# --- readers in other threads ---------------------------------------------------------------------------------------


def test_a_read_during_a_commit_sees_what_was_put_before_it(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit ends between the reader's two looks: at the log's names, and at those that are not logged yet."""
    with open_on(disk) as db:
        db.put(b"name", b"old")
        db.commit()
        db.put(b"name", b"new")
        overlays = db.core.overlays

        def committed_meanwhile() -> list[Any]:
            found = overlays()
            monkeypatch.setattr(db.core, "overlays", overlays)
            db.core.commit_pending()
            return found if order == "before" else overlays()

        for order in ("before", "after"):
            db.put(b"name", order.encode())
            monkeypatch.setattr(db.core, "overlays", committed_meanwhile)
            assert db.get(b"name") == order.encode()


def test_content_is_found_while_its_stratum_is_finished(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(disk) as db:
        key = db.blobs.put(b"content")
        locator = db.core.locator
        find = locator.find
        misses: list[bytes] = []

        def find_beside(grain_key: bytes) -> Location | None:
            if not misses:
                misses.append(grain_key)
                return None  # Between two sources: gone from the first, not in the second yet.
            return find(grain_key)

        monkeypatch.setattr(locator, "find", find_beside)
        assert db.blobs[key] == b"content"
        misses.clear()
        assert key in db.blobs


def test_a_batch_scans_its_own_changes_above_those_of_the_handle(disk: SimulatedDisk) -> None:
    with open_on(disk) as db, db.batch() as batch:
        batch.put(b"name", b"batch")
        db.put(b"name", b"handle")
        db.commit()
        db.put(b"name", b"handle again")
        assert (batch[b"name"], dict(batch.scan())) == (b"batch", {b"name": b"batch"})


def test_a_scan_after_an_interrupted_scan_misses_no_name(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(disk) as db:
        db.put_many((b"%d" % number, b"value") for number in range(9))
        db.commit()

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SortedList, "update", interrupted)
            list(db)
        assert list(db) == [b"%d" % number for number in range(9)]


# --- sessions -------------------------------------------------------------------------------------------------------


def test_a_session_that_could_not_begin_keeps_nobody_from_beginning(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed, db = open_on(disk), open_on(disk)

    def full(*_: Any, **__: Any) -> None:
        raise OutOfSpace("full", object="log", operation="append")

    monkeypatch.setattr(failed.core.log, "append", full)
    failed.put(b"name", b"value")
    with pytest.raises(OutOfSpace):
        failed.commit()
    with db:
        db.put(b"other", b"value")
        db.commit()
    assert dict(open_on(disk, "r").scan()) == {b"other": b"value"}


def test_a_handle_whose_first_commit_is_inline_looks_after_dead_sessions(disk: SimulatedDisk) -> None:
    dead = open_on(disk)
    key = dead.blobs.put(b"content")
    dead.commit()
    session = dead.core.session
    dead.core.release("killed")
    with open_on(disk) as db:
        db.put(b"name", b"value")
        db.commit()
        assert session not in db.core.state.sessions
        assert db.blobs[key] == b"content"


def test_a_report_that_is_adopted_twice_does_no_harm(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", profile="open") as db:
        report = basin.ingest(db.ticket(), [b"content" * 100])
        db.adopt([report])
        db.adopt([report])
        db[b"name"] = b"value"
        db.commit()
        assert len(list(db.blobs)) == 1


def test_a_report_whose_adoption_met_a_busy_lock_is_adopted_later(tmp_path: Path) -> None:
    url = tmp_path / "basin"
    with basin.open(url, profile="open", lock_timeout_s=0.01) as db, basin.open(url) as other:
        report = basin.ingest(db.ticket(), [b"content" * 100])
        with busy(other), pytest.raises(StorageUnavailable):
            db.adopt([report])
        db.adopt([report])
        assert db.blobs[next(iter(db.blobs))] == b"content" * 100


class LostWorkers(Executor):
    """Takes one task, and has lost its workers when it should give the result or take another."""

    tasks = 0

    def submit(self, work: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        self.tasks += 1
        if self.tasks > 1:
            raise BrokenExecutor
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor())
        return future


def test_what_lost_workers_should_have_ingested_is_ingested_here(tmp_path: Path) -> None:
    """Also with a secret that no other process finds."""
    items = [b"item %d" % number for number in range(300)]
    with basin.open(tmp_path / "basin", secret=basin.Secret.generate()) as db:
        keys = db.ingest(items, executor=LostWorkers())
        assert db.blobs.get_many(keys) == items


# --- strata ---------------------------------------------------------------------------------------------------------


class Interrupting:
    """`xxhash`, interrupted at the fifth checksum."""

    def __init__(self) -> None:
        self.left = 5

    def xxh32_intdigest(self, data: bytes) -> int:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return xxhash.xxh32_intdigest(data)


def test_nothing_is_appended_behind_an_interrupted_append(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offset and index would not know of the bytes in between: other contents, and a nonce used twice."""
    db = open_on(disk)
    before = db.blobs.put_many([b"before %d" % number for number in range(10)])
    db.commit()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer_module, "xxhash", Interrupting())
        db.blobs.put_many([b"interrupted %d" % number for number in range(10)])
    with pytest.raises(StorageError):
        db.blobs.put_many([b"after %d" % number for number in range(10)])
    with pytest.raises(StorageError):
        db.close()
    with open_on(disk) as again:
        assert again.blobs.get_many(before) == [b"before %d" % number for number in range(10)]
        assert list(again.check()) == []


def test_threads_that_put_the_same_contents_leave_a_whole_index(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [b"content %d" % number for number in range(10)]

    def not_yet(keys: Sequence[bytes]) -> list[None]:
        return [None] * len(keys)

    with open_on(disk) as db:
        monkeypatch.setattr(db.core.locator, "find_many", not_yet)
        assert db.blobs.put_many(contents) == db.blobs.put_many(contents)
    with open_on(disk, "r") as db:
        assert list(db.check()) == []


def test_links_are_found_in_strata_that_others_merged(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(disk) as db:
        target = db.blobs.put(b"target")
        key = db.blobs.put(b"content", links=[target])
    with open_on(disk, refresh_interval_s=3600.0) as reader:
        reader.core.readers._readers.clear()
        for number in range(8):
            with open_on(disk) as db:
                db.blobs.put(b"content %d" % number, links=[target])
        assert len(reader.core.storage.list("meta")) < 9
        assert reader.blobs.links(key) == [target]
        assert reader.blobs.put(b"content", links=[target]) == key


def test_an_upkeep_that_meets_damage_leaves_no_files(disk: SimulatedDisk) -> None:
    for number in range(8):
        with open_on(disk) as db:
            db.blobs.put(b"content %d" % number * 20)
    damaged = f"data/{SimulatedStorage(disk).list('data')[0]}"
    content = bytearray(disk.kill_image().contents()[damaged])
    content[200] ^= 1
    image = disk.kill_image().with_content(damaged, bytes(content))
    changed = SimulatedDisk.from_image(image)
    for _ in range(3):
        with open_on(changed) as db:
            db.put(b"name", b"value")
            db.commit()
            assert db.core.upkeep_problems
            assert {bytes.fromhex(name) for name in db.core.storage.list("data")} <= set(db.core.state.strata)


def test_a_stratum_finished_before_a_lost_conflict_is_logged_afterwards(disk: SimulatedDisk) -> None:
    with open_on(disk, stratum_size=4096) as db, open_on(disk) as other:
        db.put(b"name", b"value")
        keys = [db.blobs.put(b"first" * 20)]
        db.commit()
        with pytest.raises(Conflict), db.transaction() as transaction:
            transaction[b"name"] += b"!"
            keys += db.blobs.put_many([b"number %d " % number * 20 for number in range(60)])
            other.put(b"name", b"changed")
            other.commit()
        db.commit()
    with open_on(disk, "r") as db:
        assert [key in db.blobs for key in keys] == [True] * len(keys)


def test_a_failed_stratum_that_a_record_names_is_kept_when_closing_fails(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    db = open_on(disk)
    key = db.blobs.put(b"content")
    db.commit()
    next(iter(db.core.own_strata._writers.values())).failed = True

    def unavailable(*_: object) -> None:
        raise StorageUnavailable("busy", object="log/lock", operation="lock")

    monkeypatch.setattr(db.core, "_drain", unavailable)
    with pytest.raises(StorageUnavailable):
        db.close()
    with open_on(disk) as again:
        assert again.blobs[key] == b"content"


# --- log and checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_is_of_durable_records_only(disk: SimulatedDisk) -> None:
    db = open_on(disk, sync="never", checkpoint_every=10)
    for number in range(12):
        db.put(b"name %d" % number, b"value")
        db.commit()
    assert SimulatedStorage(disk).list("checkpoint")
    states = CrashStates(disk)
    for state, _ in zip(states.states(), range(40), strict=False):
        with open_on(SimulatedDisk.from_image(states.image(state)), "w") as again:
            assert len(again) >= 9


def test_an_interrupted_catch_up_applies_no_name_twice(disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_on(disk) as db, open_on(disk, refresh_interval_s=3600.0) as reader:
        for number in range(3):
            db.put(b"name", b"%d" % number)
            db.commit()
        core = reader.core
        follow = core._next
        calls = []

        def interrupted(*arguments: Any) -> Any:
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return follow(*arguments)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(core, "_next", interrupted)
            reader.refresh()
        reader.refresh()
        row: Row | None = core.current.tables.memtables[0].rows[b"\0\0\0\0name"]
        versions = []
        while row is not None:
            versions.append(row[0])
            row = row[4]
        assert len(versions) == len(set(versions)) == 3
        assert reader[b"name"] == b"2"


def test_a_reader_looks_again_when_a_run_was_merged_while_it_caught_up(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_on(disk, memtable_size=1024) as db, open_on(disk, "r", refresh_interval_s=3600.0) as reader:
        core = reader.core

        def flush() -> None:
            state = db.core.state
            while db.core.state.flushed == state.flushed:
                db.put(b"name", b"value" * 50)
                db.commit()

        flush()

        follow = core.log.follow

        def merged_meanwhile(*arguments: Any, **options: Any) -> Any:
            entries = list(follow(*arguments, **options))
            monkeypatch.setattr(core.log, "follow", follow)
            for _ in range(4):
                flush()
            return iter(entries)

        monkeypatch.setattr(core.log, "follow", merged_meanwhile)
        reader.refresh()
        assert reader[b"name"] == b"value" * 50


def test_history_that_is_removed_while_somebody_reads_it_is_gone_not_damaged(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basin.engine.file_log.SEGMENT_SIZE", 2000)
    with open_on(disk, history_size=2000, checkpoint_every=5) as db:

        def commits() -> None:
            for number in range(40):
                db.put(b"name %d" % number, b"value" * 20)
                db.commit()

        commits()
        with open_on(disk, "r", refresh_interval_s=3600.0) as reader:
            scope = reader._view_scope()
            monkeypatch.setattr(reader, "_view_scope", lambda: scope)  # Somebody removes log after the first look.
            floor = reader.core.state.floor
            commits()
            with pytest.raises(PositionGone):
                reader.at(floor)


def test_handles_that_remove_old_log_at_once_go_on_with_upkeep(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("basin.engine.file_log.SEGMENT_SIZE", 2000)
    with open_on(disk) as db:
        for number in range(40):
            db.put(b"name %d" % number, b"value" * 20)
            db.commit()
        log = db.core.log
        assert isinstance(log, FileLog)
        segments = log.segments()
        monkeypatch.setattr(log, "segments", lambda: segments)
        last = db.core.state.position
        end = Cursor(segments[-1], 0, last)
        assert log.remove_through(last, end, checkpoint=last, generation=0) == len(segments) - 1
        assert log.remove_through(last, end, checkpoint=last, generation=0) <= len(segments) - 1
        assert log.position_within(1 << 30) == 0

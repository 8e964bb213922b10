"""Batches, transactions and views: what they see, what they commit, and what makes them conflict."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import basin
from basin.api import Database, open_storage
from basin.errors import (
    BasinClosed,
    Conflict,
    InvalidArgument,
    NameNotFound,
    PositionGone,
    ReadOnly,
    StorageUnavailable,
)
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage

OPTIONS: dict[str, Any] = {"reserve_size": 0, "sync_interval_s": 3600.0, "refresh_interval_s": 0.0}


class Clock:
    """The time that the engine reads."""

    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def advance(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time_ns", lambda: clock.now_ms * 1_000_000)
    return clock


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


Open = Callable[..., Database]


@pytest.fixture
def open_basin(disk: SimulatedDisk) -> Iterator[Open]:
    opened: list[Database] = []

    def open_one(mode: Any = "c", **options: Any) -> Database:
        storage = SimulatedStorage(disk)
        database = open_storage(storage, "simulated:", mode=mode, profile="open", options={**OPTIONS, **options})
        opened.append(database)
        return database

    yield open_one
    for database in opened:
        database.close()


@pytest.fixture
def db(open_basin: Open) -> Database:
    return open_basin("x")


@pytest.fixture
def other(db: Database, open_basin: Open) -> Database:
    """A second writer of the same basin."""
    assert not db.closed
    return open_basin("w")


# --- transactions -----------------------------------------------------------------------------------------------------


def test_a_transaction_whose_name_was_changed_conflicts_and_changes_nothing(db: Database, other: Database) -> None:
    db.put_many([(b"a", b"1"), (b"b", b"1")])
    with pytest.raises(Conflict) as caught, db.transaction() as tx:
        tx[b"b"] = tx[b"a"] + b"!"
        other[b"a"] = b"2"
        other.commit()
    assert caught.value.names == [b"a"]
    assert dict(db) == {b"a": b"2", b"b": b"1"}


def test_no_update_is_lost(db: Database, other: Database) -> None:
    db[b"count"] = b"0"

    def increment(tx: Any) -> None:
        tx[b"count"] = b"%d" % (int(tx[b"count"]) + 1)

    with pytest.raises(Conflict), db.transaction() as tx:
        increment(tx)
        other.run(increment)
    db.run(increment)
    assert other[b"count"] == b"2"


def test_write_skew_is_refused(db: Database, other: Database) -> None:
    """Each of the two reads both names and clears one: one of them has to fail."""
    db.put_many([(b"on call/a", b"yes"), (b"on call/b", b"yes")])
    first, second = db.transaction(), other.transaction()
    for tx, name in ((first, b"on call/a"), (second, b"on call/b")):
        assert list(tx.get_many([b"on call/a", b"on call/b"])) == [b"yes", b"yes"]
        tx[name] = b"no"
    with first:
        pass
    with pytest.raises(Conflict), second:
        pass
    assert sorted(db.values()) == [b"no", b"yes"]


@pytest.mark.parametrize("read", ["scan", "reverse", "len", "bool", "in", "get", "items", "pop"])
def test_a_name_that_came_into_what_was_read_conflicts(db: Database, other: Database, read: str) -> None:
    reads: dict[str, Callable[[Any], Any]] = {
        "scan": lambda tx: list(tx.scan(prefix=b"p/")),
        "reverse": lambda tx: list(tx.scan(start=b"p/", stop=b"q", reverse=True)),
        "len": len,
        "bool": bool,
        "in": lambda tx: b"p/new" in tx,
        "get": lambda tx: tx.get(b"p/new"),
        "items": lambda tx: list(tx.items()),
        "pop": lambda tx: tx.pop(b"p/new", None),
    }
    with pytest.raises(Conflict), db.transaction() as tx:
        reads[read](tx)
        tx[b"result"] = b"none"
        other[b"p/new"] = b"phantom"
        other.commit()
    assert b"result" not in db


@pytest.mark.parametrize("how", ["delete", "delete_range", "clear", "drop", "large batch", "flushed"])
def test_every_kind_of_change_conflicts(db: Database, other: Database, how: str) -> None:
    space = db.keyspace("space")
    space[b"name"] = b"value"
    db.commit()
    theirs = other.keyspace("space")
    changes: dict[str, Callable[[], Any]] = {
        "delete": lambda: theirs.delete(b"name"),
        "delete_range": lambda: theirs.delete_range(b"n", b"o"),
        "clear": theirs.clear,
        "drop": lambda: other.drop_keyspace("space"),
        "large batch": lambda: theirs.put_many([(b"name%d" % number, bytes(500)) for number in range(3000)]),
        "flushed": lambda: theirs.put_many([(b"name", bytes(100))]),
    }
    with pytest.raises(Conflict), db.transaction() as tx:
        list(tx.keyspace("space").scan(prefix=b"name"))
        tx[b"result"] = b"x"
        changes[how]()
        other.commit()
        if how == "flushed":
            from basin.engine.merging import flush

            assert flush(other.core)


def test_what_a_transaction_did_not_read_does_not_matter(db: Database, other: Database) -> None:
    db.put_many([(b"a/%d" % number, b"v") for number in range(10)])
    with db.transaction() as tx:
        assert len(list(tx.scan(prefix=b"a/"))) == 10
        assert tx.get(b"absent") is None
        tx[b"b"] = b"written, not read"
        other.put_many([(b"b", b"x"), (b"c", b"x"), (b"a0", b"x"), (b"a.", b"x")])
        other.keyspace("elsewhere")[b"a/1"] = b"x"
        other.commit()
    assert db[b"b"] == b"written, not read"


def test_a_limited_scan_conflicts_only_with_what_it_saw(db: Database, other: Database) -> None:
    db.put_many([(b"%04d" % number, b"v") for number in range(5000)])
    db.commit()
    with db.transaction() as tx:
        assert [name for name, _ in tx.scan(limit=3)] == [b"0000", b"0001", b"0002"]
        assert [name for name, _ in tx.scan(limit=1, reverse=True)] == [b"4999"]
        tx[b"result"] = b"x"
        del other[b"2500"]
        other.commit()
    with pytest.raises(Conflict), db.transaction() as tx:
        list(tx.scan(limit=3))
        tx[b"result"] = b"y"
        del other[b"0001"]
        other.commit()


def test_a_transaction_sees_its_own_changes_and_nobody_elses(db: Database, other: Database) -> None:
    db[b"a"] = b"1"
    with pytest.raises(ZeroDivisionError), db.transaction() as tx:
        other[b"b"] = b"2"
        other.commit()
        tx[b"c"] = b"3"
        assert dict(tx) == {b"a": b"1", b"c": b"3"}
        del tx[b"a"]
        assert dict(tx) == {b"c": b"3"}
        raise ZeroDivisionError
    assert dict(db) == {b"a": b"1", b"b": b"2"}


def test_a_transaction_that_only_reads_never_conflicts(db: Database, other: Database) -> None:
    with db.transaction() as tx:
        assert list(tx) == []
        other[b"a"] = b"1"
        other.commit()
        assert list(tx) == []
    assert tx.position == 0


def test_run_tries_again_and_gives_up(db: Database, other: Database) -> None:
    calls = []

    def disturbed(tx: Any) -> int:
        calls.append(tx.get(b"a"))
        tx[b"b"] = b"x"
        if len(calls) < 3:
            other[b"a"] = b"%d" % len(calls)
            other.commit()
        return len(calls)

    assert db.run(disturbed) == 3
    assert calls == [None, b"1", b"2"]
    calls.clear()
    with pytest.raises(Conflict):
        db.run(disturbed, retries=1)
    assert len(calls) == 2


def test_a_large_batch_that_lost_leaves_no_stratum(db: Database, other: Database, disk: SimulatedDisk) -> None:
    db[b"a"] = b"1"
    db.commit()
    with pytest.raises(Conflict), db.transaction() as tx:
        tx.put_many([(b"%05d" % number, bytes(400)) for number in range(5000)])
        tx[b"b"] = tx[b"a"]
        other[b"a"] = b"2"
        other.commit()
    db[b"c"] = b"3"
    db.commit()
    assert set(db) == {b"a", b"c"}
    strata = db.core.state.strata
    assert not [name for name in disk.names if name.startswith("meta/")]
    assert not [known for known in strata.values() if known.added.kind != 0 and known.added.grain_count]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_one_record_or_nothing(db: Database, other: Database) -> None:
    before = db.head.position
    with db.batch() as batch:
        batch[b"a"] = b"1"
        batch.keyspace("space")  # Created at once: numbers of keyspaces are handed out in transactions.
        created = db.head.position
        batch[b"b"] = b"2"
        batch.delete_range(b"a", b"b")
        batch.blobs.put(b"content")
        assert dict(batch) == {b"b": b"2"}
        assert dict(db) == dict(other) == {}
    assert created == before + 1
    assert batch.position == db.head.position == other.refresh()
    assert dict(other) == {b"b": b"2"}
    with pytest.raises(ZeroDivisionError), db.batch() as batch:
        batch[b"c"] = b"3"
        raise ZeroDivisionError
    assert dict(db) == {b"b": b"2"}
    with pytest.raises(BasinClosed):
        batch[b"d"] = b"4"


def test_batches_of_two_writers_that_create_keyspaces_do_not_mix_them(db: Database, other: Database) -> None:
    with db.batch() as first, other.batch() as second:
        first.keyspace("one")[b"name"] = b"1"
        second.keyspace("two")[b"name"] = b"2"
    assert db.keyspace("one")[b"name"] == b"1"
    assert db.keyspace("two")[b"name"] == b"2"


def test_what_was_put_before_a_batch_is_committed_with_it(db: Database, other: Database) -> None:
    db[b"before"] = b"1"
    with db.batch() as batch:
        batch[b"in"] = b"2"
    assert dict(other) == {b"before": b"1", b"in": b"2"}


# --- views and the past -----------------------------------------------------------------------------------------------


def test_a_view_sees_one_position_through_flushes_merges_and_other_writers(open_basin: Open) -> None:
    db, other = open_basin("x", memtable_size=4096), open_basin("w", memtable_size=4096)
    wanted = {b"%03d" % number: bytes([number]) * 600 for number in range(200)}
    db.put_many(wanted.items())
    with db.view() as view:
        for turn in range(10):
            other.put_many([(name, b"changed %d" % turn) for name in wanted])
            other.delete_range(b"050", b"150")
            other.commit()
            db.refresh()
        assert other.core.state.flushed > view.position
        assert dict(view.scan()) == wanted
        assert list(view.scan(reverse=True, limit=1)) == [(b"199", wanted[b"199"])]
        assert len(db) == 100
        with pytest.raises(ReadOnly):
            view[b"a"] = b"1"
        with pytest.raises(NameNotFound):
            view.keyspace("new")
    with pytest.raises(BasinClosed):
        view.get(b"000")


def test_a_view_has_one_now(db: Database, clock: Clock) -> None:
    db.put(b"short", b"1", ttl=5)
    db.put(b"long", b"2", ttl=50)
    with db.view() as view:
        clock.advance(6)
        assert dict(view) == {b"short": b"1", b"long": b"2"}
        assert dict(db) == {b"long": b"2"}
        position = db.head.position
        clock.advance(60)
        assert dict(db) == {}
        assert dict(view) == {b"short": b"1", b"long": b"2"}
    assert dict(db.at(position)) == {b"short": b"1", b"long": b"2"}  # By the time of its record.


def test_expiry(db: Database, open_basin: Open, clock: Clock) -> None:
    db.put(b"a", b"1", ttl=10)
    db.put(b"b", b"1", ttl=10)
    db.put(b"b", b"2")  # A put without a time to live clears it.
    db.put(b"c", b"1", ttl=0.001)
    clock.advance(9.999)
    assert set(db) == {b"a", b"b"}
    clock.advance(0.001)
    assert db.get(b"a") is None
    assert b"a" not in db
    assert db.ref(b"a") is None
    assert db.put(b"a", b"3", if_absent=True)
    assert dict(open_basin("r")) == {b"a": b"3", b"b": b"2"}
    for ttl in (0, -1, float("nan"), float("inf"), "1", True):
        with pytest.raises(InvalidArgument):
            db.put(b"d", b"1", ttl=ttl)  # type: ignore[arg-type]  # wrong on purpose


def test_at_shows_every_position_since_the_floor(db: Database) -> None:
    positions = []
    for number in range(20):
        db[b"name"] = b"%d" % number
        db[b"name %d" % number] = b"x" * 1000
        positions.append(db.commit())
    for number, position in enumerate(positions):
        with db.at(position) as past:
            assert past[b"name"] == b"%d" % number
            assert len(past) == number + 2
            assert past.position == position
    assert list(db.at(0)) == []
    for wrong in (positions[-1] + 1, -1, 1.5, None):
        with pytest.raises(InvalidArgument):
            db.at(wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_the_past_is_gone_below_the_floor(open_basin: Open, clock: Clock) -> None:
    db = open_basin("x", memtable_size=1024, history_s=60.0)
    db[b"a"] = b"old"
    first = db.commit()
    for number in range(40):
        clock.advance(20)
        db.put_many([(b"a", b"%d" % number), (b"fill %d" % number, bytes(200))])
        db.commit()
    floor = db.core.state.floor
    assert floor > first
    for call in (lambda: db.at(first), lambda: list(db.changes(since=first))):
        with pytest.raises(PositionGone) as caught:
            call()
        assert caught.value.fields == {"position": first, "floor": floor}
    assert db.at(floor)[b"a"] != b"old"
    assert next(iter(db.log())).position == db.core.state.floor
    assert [entry.position for entry in db.log(floor, floor + 1)] == [floor]
    assert [entry.position for entry in db.log(1, floor + 1)] == [floor]
    assert len(list(db.changes(since=floor))) > 2


def test_a_transaction_older_than_the_history_conflicts(open_basin: Open, clock: Clock) -> None:
    """What it read may have been deleted without a trace."""
    db, other = open_basin("x", history_s=0.0, memtable_size=1024), open_basin("w", history_s=0.0, memtable_size=1024)
    db[b"a"] = b"1"
    with pytest.raises(Conflict), db.transaction() as tx:
        assert tx[b"a"] == b"1"
        tx[b"b"] = b"2"
        for number in range(40):
            clock.advance(20)
            other.delete(b"a")
            other.put_many([(b"fill %d" % number, bytes(200))])
            other.commit()
        assert other.core.state.floor > tx.scope._begun.state.position  # type: ignore[attr-defined]  # internal


def test_changes_are_the_log_in_order(db: Database, other: Database) -> None:
    start = db.head.position
    space = db.keyspace("space", order="u64")
    key = db.blobs.put(b"content")
    db.put_many([(b"a", b"1"), (b"b", bytes(1000))])
    space[7] = b"seven"
    db.commit()
    with other.batch() as batch:
        batch.delete_range(b"a", b"b")
        batch.delete(b"c")
        batch[b"d"] = basin.Ref(key)
    other.keyspace("space").clear()
    db.drop_keyspace("space")
    changes = [change._replace(position=0) for change in other.changes(since=start)]
    large = db.ref(b"b")
    assert set(changes[:3]) == {
        basin.Change(0, "put", "", b"a", b"1"),
        basin.Change(0, "ref", "", b"b", large),
        basin.Change(0, "put", "space", (7).to_bytes(8, "big"), b"seven"),
    }
    assert changes[3:6] == [
        basin.Change(0, "delete_range", "", b"a", None, b"b"),
        basin.Change(0, "ref", "", b"d", key),
        basin.Change(0, "delete", "", b"c"),
    ]
    assert changes[6:] == [basin.Change(0, "delete_range", "space", b"", None, None)] * 2
    assert list(db.changes(since=db.head.position)) == []


def test_changes_of_large_batches_come_once_each(db: Database, other: Database) -> None:
    """They are in runs of names, two of them in one record."""
    start = db.head.position
    pairs = [(b"%05d" % number, b"v" * 300) for number in range(4000)]
    queued = threading.Barrier(3)

    def commit(prefix: bytes) -> None:
        with db.batch() as batch:
            batch.put_many([(prefix + name, value) for name, value in pairs])
            queued.wait(10)

    threads = [threading.Thread(target=commit, args=(prefix,), daemon=True) for prefix in (b"a", b"b")]
    for thread in threads:
        thread.start()
    with db.core.commit_mutex:
        queued.wait(10)
        while len(db.core._queue) < 2:
            pass
    for thread in threads:
        thread.join(30)
    changes = list(other.changes(since=start))
    assert len({change.position for change in changes}) == 1
    assert sorted(change.name for change in changes) == sorted(
        prefix + name for prefix in (b"a", b"b") for name, _ in pairs
    )
    assert {change.value for change in changes} == {b"v" * 300}


def test_the_log_counts_what_records_did(db: Database) -> None:
    db[b"a"] = b"1"
    db.commit()
    entries = list(db.log())
    assert [entry.position for entry in entries] == list(range(1, db.head.position + 1))
    assert entries[-1].summary["names"] == 1
    assert [entry.position for entry in db.log(entries[-1].position)] == [entries[-1].position]
    assert list(db.log(1, 1)) == []


# --- a lock that stays busy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 5000])
def test_what_waits_is_committed_after_the_lock_was_busy(open_basin: Open, disk: SimulatedDisk, count: int) -> None:
    db = open_basin("x", lock_timeout_s=0.0)
    db[b"first"] = b"x"
    db.commit()
    lock = SimulatedStorage(disk).lock("log/lock")
    pairs = {b"%05d" % number: bytes(300) for number in range(count)}
    db.put_many(pairs.items())
    lock.acquire(0)
    with pytest.raises(StorageUnavailable):
        db.commit()
    db[b"00001"] = b"newer"
    db.delete(b"00002")
    with pytest.raises(StorageUnavailable), db.batch() as batch:
        batch[b"lost"] = b"x"
    lock.close()
    wanted = {**pairs, b"first": b"x", b"00001": b"newer"}
    del wanted[b"00002"]
    assert dict(db) == wanted
    db.commit()
    assert dict(db) == wanted
    assert dict(open_basin("r")) == wanted
    assert [finding for finding in db.check() if finding.severity != "info"] == []


def test_a_stratum_that_was_full_when_a_transaction_lost_is_logged_with_the_next_commit(
    open_basin: Open, disk: SimulatedDisk
) -> None:
    """Its first contents were logged while it was active; those of the loser may be referred to by others."""
    db, other = open_basin("x", stratum_size=4096), open_basin("w")
    db.blobs.put(bytes(1000) + b"logged")
    db[b"a"] = b"1"
    db.commit()
    contents = [b"%d" % number + random.Random(number).randbytes(1000) for number in range(8)]
    with pytest.raises(Conflict), db.transaction() as tx:
        tx[b"b"] = tx[b"a"]
        keys = tx.blobs.put_many(contents[:4]) + [tx.blobs.put(content) for content in contents[4:]]
        other[b"a"] = b"2"
        other.commit()
    with db.transaction() as tx:
        tx[b"b"] = tx[b"a"]
        assert tx.blobs.put_many(contents) == keys
    db.core.release("killed")
    with open_basin("w") as again:
        assert again.blobs.get_many(keys) == contents
        assert [finding for finding in again.check() if finding.severity != "info"] == []

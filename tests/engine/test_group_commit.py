"""Threads that commit at the same time: one record and one sync for all, and each is told what became of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from basin.api import Database, open_storage
from basin.errors import Conflict, StorageError
from basin.testing.disk import SimulatedDisk
from basin.testing.faults import CountingStorage
from basin.testing.simulated import SimulatedStorage

OPTIONS: dict[str, Any] = {"reserve_size": 0, "sync_interval_s": 3600.0, "refresh_interval_s": 0.0}


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


@pytest.fixture
def db(disk: SimulatedDisk) -> Iterator[Database]:
    with open_storage(SimulatedStorage(disk), "simulated:", mode="x", profile="open", options=OPTIONS) as database:
        yield database


def test_of_batches_that_share_a_record_the_loser_leaves_alone(db: Database) -> None:
    """All are queued while the log is locked, and are judged one after the other within one record."""
    db.put_many([(b"a", b"0")])
    before = db.head.position
    transactions = [db.transaction() for _ in range(4)]
    for number, tx in enumerate(transactions):
        if number in (1, 3):
            tx[b"a"] = tx[b"a"] + b"%d" % number  # These two exclude each other.
        else:
            tx[b"free %d" % number] = b"x"
    lost: list[Conflict] = []
    started = threading.Barrier(5)

    def commit(tx: Any) -> None:
        started.wait(10)
        try:
            with tx:
                pass
        except Conflict as conflict:
            lost.append(conflict)

    threads = [threading.Thread(target=commit, args=(tx,), daemon=True) for tx in transactions]
    for thread in threads:
        thread.start()
    with db.core.commit_mutex:
        started.wait(10)
        while len(db.core._queue) < 4:
            pass
    for thread in threads:
        thread.join(10)
    assert len(lost) == 1
    assert db.head.position == before + 1
    assert sorted(db) == [b"a", b"free 0", b"free 2"]
    assert db[b"a"] in (b"01", b"03")


def test_threads_that_commit_at_once_share_syncs(disk: SimulatedDisk) -> None:
    counting = CountingStorage(SimulatedStorage(disk))
    with open_storage(counting, "simulated:", profile="open", options=OPTIONS) as db:
        db[b"first"] = b"x"
        db.commit()
        before, threads_count = counting.calls["sync"], 16
        queued = threading.Barrier(threads_count + 1)

        def commit(number: int) -> None:
            with db.batch() as batch:
                batch[b"%d" % number] = b"x"
                queued.wait(10)

        threads = [threading.Thread(target=commit, args=(number,), daemon=True) for number in range(threads_count)]
        for thread in threads:
            thread.start()
        with db.core.commit_mutex:
            queued.wait(10)
            while len(db.core._queue) < threads_count:
                pass
        for thread in threads:
            thread.join(10)
        assert counting.calls["sync"] - before == 1
        assert len(db) == threads_count + 1


@pytest.mark.parametrize("threads_count", [4, 16])
def test_threads_that_commit_again_and_again_share_most_syncs(
    disk: SimulatedDisk, monkeypatch: pytest.MonkeyPatch, threads_count: int
) -> None:
    """Whoever has just committed must not commit alone again before the others have woken up."""
    with open_storage(SimulatedStorage(disk), "simulated:", profile="open", options=OPTIONS) as db:
        append = db.core.log.append

        def slow_append(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.002)  # What a sync takes, without the interpreter's lock.
            return append(*arguments, **options)

        monkeypatch.setattr(db.core.log, "append", slow_append)
        before, rounds = db.head.position, 20

        def commit(thread: int) -> None:
            for number in range(rounds):
                db.put(b"%d/%d" % (thread, number), b"x")
                db.commit()

        threads = [threading.Thread(target=commit, args=(number,), daemon=True) for number in range(threads_count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(db) == threads_count * rounds
        assert db.head.position - before < threads_count * rounds // 2.5


def test_what_keeps_waiting_changes_out_of_the_log_is_not_raised_by_a_batch(disk: SimulatedDisk) -> None:
    db = open_storage(SimulatedStorage(disk), "simulated:", profile="open", options=OPTIONS)

    def refuse(_: Any) -> None:
        raise Conflict("a content was removed")

    db[b"waiting"] = b"1"
    db.core._pending.check = refuse
    with db.batch() as batch:
        batch[b"batch"] = b"2"
    assert dict(db) == {b"batch": b"2"}
    db[b"later"] = b"3"
    db.core._pending.check = refuse
    with pytest.raises(Conflict):
        db.commit()
    with pytest.raises(Conflict, match="a content was removed"):
        db.close()  # Somebody has to be told of the first.
    with open_storage(SimulatedStorage(disk), "simulated:", mode="r", profile="open") as again:
        assert dict(again) == {b"batch": b"2"}


def test_a_leader_that_was_interrupted_holds_nobody_up(db: Database) -> None:
    for leader in (threading.get_ident(), 1):  # This thread, and one that is no more.
        db.core._leader = leader
        db[b"%d" % leader] = b"x"
        db.commit()
        assert not db.core.overlays()
    assert len(db) == 2


def test_what_an_interrupted_leader_took_is_not_called_committed(db: Database) -> None:
    db[b"taken"] = b"x"
    pending = db.core._enqueue()
    assert pending is not None
    db.core._queue.clear()
    with pytest.raises(StorageError, match="interrupted"):
        db.commit()


def test_what_was_told_that_it_failed_is_not_committed_later(db: Database) -> None:
    db[b"failed"] = b"x"
    failed = db.core._enqueue()
    assert failed is not None
    failed.error, failed.done = KeyboardInterrupt(), True
    db.core._leave([failed])  # As the interrupted one did; but it is in the queue still.
    with db.batch() as batch:
        batch[b"later"] = b"y"
    with db.view() as view:
        assert dict(view) == {b"later": b"y"}

"""The memtable: versions of names, range deletions, and scans while others write."""

from __future__ import annotations

import random
import threading

import pytest

from basin.engine.memtable import PENDING_VERSION_MIN, Memtable, versions_of
from basin.format.layout import ENTRY_DELETE, ENTRY_INLINE, ENTRY_REFERENCE
from basin.format.record import Batch

HIGHEST = (1 << 64) - 1


def batch(**changes: bytes) -> Batch:
    """Inline puts; an empty value is a deletion."""
    puts = {name.encode(): value for name, value in changes.items() if value}
    return Batch(
        names=list(puts), values=list(puts.values()), deletes=[name.encode() for name in changes if not changes[name]]
    )


def test_each_version_of_a_name_can_be_found() -> None:
    table = Memtable()
    for version in (5, 6, 9):
        table.apply(batch(a=b"%d" % version), version)
    assert table.find(b"a", 4) is None
    found = [table.find(b"a", version) for version in (5, 6, 8, 9, HIGHEST)]
    assert [row[2] for row in found if row is not None] == [b"5", b"6", b"6", b"9", b"9"]
    assert [row[0] for row in versions_of(table.rows[b"a"])] == [9, 6, 5]
    assert (table.version_min, table.version_max) == (5, 9)
    assert len(table) == 1


def test_what_is_put_first_is_replaced_and_what_was_deleted_stays_deleted() -> None:
    table = Memtable()
    table.put(b"a", ENTRY_INLINE, b"1")
    table.put(b"a", ENTRY_REFERENCE, bytes(32), 77)
    table.put(b"b", ENTRY_DELETE, b"")
    table.put_all([(b"c", ENTRY_INLINE, b"1"), (b"c", ENTRY_INLINE, b"2")])
    table.put_same([b"d", b"d", b"e"], b"v")
    assert table.sorted_names() == [b"a", b"b", b"c", b"d", b"e"]
    logged = table.to_batch()
    assert (logged.names, logged.values) == ([b"c", b"d", b"e"], [b"2", b"v", b"v"])
    assert (logged.reference_names, logged.reference_keys) == ([b"a"], [bytes(32)])
    assert (logged.deletes, logged.expiries) == ([b"b"], {b"a": 77})
    assert all(row[0] >= PENDING_VERSION_MIN for row in table.rows.values())


def test_a_range_deletion_forgets_what_is_pending_and_covers_what_is_older() -> None:
    table = Memtable()
    table.put_all([(b"%d" % number, ENTRY_INLINE, b"v") for number in range(10)])
    table.delete_range(b"3", b"6")
    table.put(b"4", ENTRY_INLINE, b"after")
    assert table.sorted_names() == [b"0", b"1", b"2", b"4", b"6", b"7", b"8", b"9"]
    assert table.ranges == [(b"3", b"6", table.pending_version)]
    assert table.to_batch().ranges == [(b"3", b"6")]


@pytest.mark.parametrize("reverse", [False, True])
def test_names_come_in_order_also_those_that_came_since(reverse: bool, rng: random.Random) -> None:
    table, names = Memtable(), set()
    for _ in range(20):
        fresh = [b"%03d" % rng.randrange(1000) for _ in range(rng.randrange(30))]
        names.update(fresh)
        table.put_all([(name, ENTRY_INLINE, b"v") for name in fresh])
        wanted = sorted((name for name in names if b"200" <= name < b"800"), reverse=reverse)
        assert table.names(b"200", b"800", 10_000, reverse=reverse) == wanted
        assert table.names(b"200", b"800", 3, reverse=reverse) == wanted[:3]


def test_what_a_run_covers_is_left_out() -> None:
    table = Memtable()
    table.apply(batch(a=b"1", b=b"1"), 10)
    table.apply(Batch(ranges=[(b"a", b"b")]), 20)
    table.apply(batch(a=b"2", c=b""), 30)
    kept = table.after(20)
    assert kept.sorted_names() == [b"a", b"c"]
    assert [row[0] for row in versions_of(kept.rows[b"a"])] == [30]
    assert kept.ranges == []
    assert table.after(15).ranges == [(b"a", b"b", 20)]
    assert table.after(5).size >= table.after(20).size > 0
    assert [row[0] for row in versions_of(table.rows[b"a"])] == [30, 10]


def test_size_grows_with_what_is_held() -> None:
    table = Memtable()
    sizes = []
    for number in range(5):
        table.apply(Batch(names=[b"%d" % number], values=[bytes(100)], ranges=[(b"x", b"y")]), number + 1)
        sizes.append(table.size)
    assert sizes == sorted(set(sizes))
    assert sizes[0] > 100


def test_readers_need_no_lock_while_one_thread_writes() -> None:
    table, count, errors = Memtable(), 20_000, []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                names = table.names(b"", b"\xff", 1000, reverse=False)
                assert names == sorted(set(names))
                assert all(table.find(name, HIGHEST) is not None or name not in table.rows for name in names)
        except AssertionError as error:
            errors.append(error)

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(0, count, 10):
            table.apply(
                Batch(names=[b"%d" % (number * 7919 % count + at) for at in range(10)], values=[b""] * 10), number + 1
            )
    finally:
        done.set()
    for reader in readers:
        reader.join(60)
    assert not errors

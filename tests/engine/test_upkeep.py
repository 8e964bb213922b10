"""Upkeep in the process: files, memory and the cost of reading stay bounded, whatever is written and however often."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from basin.api import Database, open_storage
from basin.engine.plan import MERGE_WIDTH, _size_class, plan_index_merge, plan_names_merge, plan_strata_merge
from basin.engine.state import State
from basin.format.record import NameRun
from basin.terms import ContentKey, StratumId
from basin.testing.disk import SimulatedDisk
from basin.testing.simulated import SimulatedStorage
from tests.source_tree import ROOT

OPTIONS: dict[str, Any] = {"reserve_size": 0, "sync_interval_s": 3600.0}


def open_disk(disk: SimulatedDisk, mode: Any = "c", **options: Any) -> Database:
    storage = SimulatedStorage(disk)
    return open_storage(storage, "simulated:", mode=mode, profile="open", options={**OPTIONS, **options})


def undamaged(db: Database) -> bool:
    return [finding for finding in db.check() if finding.severity != "info"] == []


def run(number: int, size: int) -> NameRun:
    return NameRun(StratumId(number.to_bytes(16, "big")), number, number + 1, 0, 1, 1, 1, size, 0, 1)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_nothing_is_due_in_an_empty_basin() -> None:
    assert plan_names_merge([]) == []
    assert plan_index_merge(State()) == []
    assert plan_strata_merge(State()) == []


def test_the_newest_runs_of_one_size_are_merged() -> None:
    small, large = 10_000, 10_000_000
    runs = [run(1, large), run(2, large), *[run(number, small) for number in range(3, 3 + MERGE_WIDTH)]]
    assert plan_names_merge(runs[:-1]) == []
    assert plan_names_merge(runs) == runs[2:]
    assert plan_names_merge([run(number, large) for number in range(MERGE_WIDTH)]) != []
    # A small run that lies between large ones goes with them, or order would be lost.
    mixed = [run(1, large), run(2, small), run(3, large), run(4, large), run(5, large)]
    assert plan_names_merge(mixed) == mixed
    # Newer runs that are smaller, and few, stay as they are.
    assert plan_names_merge([*mixed, run(6, small)]) == mixed


@pytest.mark.parametrize("sizes", [[1 << 16], [1 << 12, 1 << 18, 1 << 22], [1 << 20, 1 << 14], []])
def test_merging_ends_and_leaves_few_runs(sizes: list[int], rng: random.Random) -> None:
    """Each byte is written again once a size class, and there are at most three runs of a class, at any time."""
    runs: list[NameRun] = []
    written, flushed = 0, 0
    for number in range(1000):
        size = sizes[number % len(sizes)] if sizes else int(rng.lognormvariate(12, 1.5))
        runs.append(run(number, size))
        flushed += size
        while window := plan_names_merge(runs):
            start = runs.index(window[0])
            assert runs[start : start + len(window)] == window
            merged = run(window[-1].after, sum(one.size for one in window))
            written += merged.size
            runs[start : start + len(window)] = [merged]
        assert len(runs) <= (MERGE_WIDTH - 1) * (_size_class(flushed) + 1)
    assert written <= 6 * flushed


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("history_s", [0.0, 3600.0])
def test_names_are_the_same_through_flushes_and_merges(
    history_s: float, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Puts, deletions and ranges that lie in different runs; every read agrees with a dict after each commit.

    Without history, merges drop what is covered; the clock goes so fast that each commit is old when the next comes.
    """
    clock = itertools.count(1_800_000_000, 20)
    monkeypatch.setattr("time.time_ns", lambda: next(clock) * 1_000_000_000)
    disk = SimulatedDisk()
    wanted: dict[bytes, bytes] = {}
    with open_disk(disk, "x", memtable_size=4096, history_s=history_s) as db:
        for _ in range(80):
            for _ in range(rng.randrange(1, 60)):
                name = b"%03d" % rng.randrange(300)
                match rng.randrange(8):
                    case 0:
                        db.delete(name)
                        wanted.pop(name, None)
                    case 1 if rng.randrange(3) == 0:
                        stop = b"%03d" % rng.randrange(300)
                        db.delete_range(name, stop)
                        wanted = {key: value for key, value in wanted.items() if not name <= key < stop}
                    case _:
                        value = bytes([rng.randrange(256)]) * rng.randrange(100)
                        db[name] = value
                        wanted[name] = value
            db.commit()
            assert dict(db) == wanted
            assert len(db.core.state.name_runs) <= 3 * MERGE_WIDTH
        assert db.core.state.flushed > 0
        probes = [b"%03d" % number for number in range(300)]
        assert db.get_many(probes) == [wanted.get(name) for name in probes]
        assert undamaged(db)
    with open_disk(disk, "r") as reader:
        assert dict(reader) == wanted
        assert list(reader.scan(reverse=True)) == sorted(wanted.items(), reverse=True)


def test_what_nobody_can_see_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(1_800_000_000, 20)
    monkeypatch.setattr("time.time_ns", lambda: next(clock) * 1_000_000_000)
    disk = SimulatedDisk()
    with open_disk(disk, "x", memtable_size=20_000, history_s=0.0) as db:
        for turn in range(200):
            db.put_many([(b"%02d" % number, b"%d " % turn * 20) for number in range(20)])
            db.commit()
        db.clear()
        db.put_many([(b"fill %d" % number, bytes(100)) for number in range(200)])
        db.commit()
        assert sum(one.entries for one in db.core.state.name_runs) < 2000
        assert len(dict(db)) == 200


def test_expired_names_are_invisible_before_and_after_a_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ms = 1_800_000_000_000
    monkeypatch.setattr("time.time_ns", lambda: now_ms * 1_000_000)
    disk = SimulatedDisk()
    with open_disk(disk, "x", memtable_size=4096) as db:
        for number in range(100):
            db.put(b"%03d" % number, b"v" * 50, ttl=1000 if number % 2 else None)
            db.commit()
        now_ms += 1_000_001
        assert list(db) == [b"%03d" % number for number in range(0, 100, 2)]
        db.put_many([(b"x%03d" % number, bytes(50)) for number in range(100)])
        db.commit()
        assert list(db.scan(stop=b"x", keys_only=True)) == [b"%03d" % number for number in range(0, 100, 2)]


# --- files ------------------------------------------------------------------------------------------------------------


def kinds(disk: SimulatedDisk) -> Counter[str]:
    return Counter(name.partition("/")[0] for name in disk.names)


@pytest.mark.slow
def test_ten_thousand_times_open_write_close_leave_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn writes a name, some a content, which makes a stratum of its own; every 100th turn is a kill.

    Log segments and checkpoints are small, so that there are as many of them as in a year of such use.
    """
    monkeypatch.setattr("basin.engine.file_log.SEGMENT_SIZE", 20_000)
    clock = itertools.count(1_800_000_000_000, 20)
    monkeypatch.setattr("time.time_ns", lambda: next(clock) * 1_000_000)
    disk = SimulatedDisk()
    open_disk(disk, "x").close()
    turns, most = 10_000, Counter[str]()
    for turn in range(turns):
        db = open_disk(disk, "w", history_s=0.0, checkpoint_every=60)
        db[b"%05d" % turn] = b"x"
        if turn % 4 == 0:
            db.blobs.put(b"content %d " % turn * 20)
        if turn % 100 == 48:
            db.commit()
            db.core.release("killed")
        else:
            db.close()
        if turn % 10 == 0:
            most |= kinds(disk)
    assert most.total() < 64, most
    with open_disk(disk, "w") as db:
        assert len(db) == turns
        assert len(list(db.blobs)) == turns // 4
        assert len(db.blobs.get_many(list(db.blobs))) == turns // 4
        assert undamaged(db)


def test_contents_stay_readable_while_their_strata_are_merged() -> None:
    disk = SimulatedDisk()
    writer, reader = open_disk(disk, "x"), open_disk(disk, "r", refresh_interval_s=3600.0)
    keys: list[ContentKey] = []
    for turn in range(60):
        with open_disk(disk, "w") as db:
            keys.append(db.blobs.put(b"content %d " % turn * 50, links=keys[-1:]))
        if turn == 20:
            reader.refresh()
    merged = len(writer.core.state.strata)
    assert [reader.blobs[key] for key in keys[:21]] == [b"content %d " % turn * 50 for turn in range(21)]
    writer.refresh()
    assert merged < 60
    assert writer.blobs.get_many(keys) == [b"content %d " % turn * 50 for turn in range(60)]
    assert [writer.blobs.links(key) for key in keys[1:]] == [[key] for key in keys[:-1]]
    for db in (writer, reader):
        db.close()


def test_old_log_and_old_checkpoints_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basin.engine.file_log.SEGMENT_SIZE", 10_000)
    disk = SimulatedDisk()
    with open_disk(disk, "x", history_s=0.0, memtable_size=10_000, checkpoint_every=50) as db:
        for number in range(1000):
            db[b"%d" % (number % 50)] = b"%d" % number
            db.commit()
        assert kinds(disk)["log"] < 30
        assert kinds(disk)["checkpoint"] <= 3
        position = db.head.position
    with open_disk(disk, "r") as db:
        assert dict(db) == {b"%d" % (number % 50): b"%d" % number for number in range(950, 1000)}
        assert db.head.position > position
        assert undamaged(db)


def test_a_dead_sessions_files_are_swept() -> None:
    disk = SimulatedDisk()
    with open_disk(disk, "x") as db:
        db.blobs.put(b"first")
    dead = open_disk(disk, "w")
    key = dead.blobs.put(b"committed " * 100)
    dead.commit()
    dead.blobs.put(b"never committed " * 100)
    dead.core.release("killed")
    with open_disk(disk, "w") as db:
        db["inline"] = b"x"  # Begins a session without a file.
        db.commit()
        db.blobs.put(b"next " * 100)
        db.commit()
        assert set(db.core.state.sessions) == {db.core.session}
        assert db.blobs[key] == b"committed " * 100
        assert undamaged(db)
    assert kinds(disk)["session"] == 0


MILLION = """
import resource, sys, basin
with basin.open(sys.argv[1], profile="open", memtable_size=4 << 20) as db:
    for start in range(0, 1_000_000, 1000):
        db.put_many([(b"a name like many others/%08d" % (number * 7919 % 1_000_000), b"value %d" % number)
                     for number in range(start, start + 1000)])
    db.commit()
    count = 0
    previous = b""
    for name in db:
        assert previous < name
        previous = name
        count += 1
    assert db[b"a name like many others/%08d" % 7919] == b"value 1"
    runs = len(db.core.state.name_runs)
print(count, runs, next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_a_million_names_take_little_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MILLION, str(tmp_path / "basin")]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=True).stdout
    count, runs, peak_kib = map(int, output.split())
    assert count == 1_000_000
    assert runs < 20
    assert peak_kib < 200 * 1024

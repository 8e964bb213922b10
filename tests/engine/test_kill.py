"""SIGKILL at random moments of several processes that write one basin: nothing acknowledged is lost, nothing is torn.

What was acknowledged stands in a file outside of the basin. All writers also step one shared counter, in the same
transactions, so the counter tells how many batches there must be.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

import basin
from basin.api import Database
from tests.engine.kill_writer import BATCH_NAMES, COUNTER, value_of, write_until_killed

KILLS = 100
WRITERS = 4
LIFE_S = 0.25  # of a writer, at most, after the first commit of its round
BEGIN_TIMEOUT_S = 60.0


def acknowledged(notes: Path) -> dict[int, int]:
    """Of every writer, the number of its last acknowledged batch. A line that the kill cut short counts for nothing."""
    found: dict[int, int] = {}
    for line in notes.read_bytes().split(b"\n")[:-1] if notes.exists() else []:
        writer, number = map(int, line.split())
        found[writer] = number
    return found


def require_whole(db: Database, done: dict[int, int]) -> None:
    """Every batch is whole; each writer's have no gap, and end with the last acknowledged one or one later."""
    batches: Counter[tuple[int, int]] = Counter()
    for name, value in db.scan(start=b"0", stop=b":"):
        writer, number, item = map(int, name.split(b"/"))
        assert value == value_of(writer, number, item)
        batches[writer, number] += 1
    assert set(batches.values()) <= {BATCH_NAMES}
    assert int(db.get(COUNTER, b"0")) == len(batches)
    last: dict[int, int] = {}
    for writer, number in sorted(batches):
        assert number == last.get(writer, -1) + 1
        last[writer] = number
    for writer, number in last.items():
        assert done.get(writer, -1) <= number <= done.get(writer, -1) + 1
    assert set(done) <= set(last)


def run_round(folder: Path, notes: Path, first: int, rng: random.Random) -> None:
    """Start writers, wait for a first commit, kill them one after another."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["basin", "tests.engine.kill_writer"])
    writers: list[ForkServerProcess] = [
        context.Process(target=write_until_killed, args=(str(folder), str(notes), first + number), daemon=True)
        for number in range(WRITERS)
    ]
    size = notes.stat().st_size if notes.exists() else 0
    for writer in writers:
        writer.start()
    started = time.monotonic()
    while not notes.exists() or notes.stat().st_size == size:
        assert time.monotonic() - started < BEGIN_TIMEOUT_S, "no writer committed anything"
        assert any(writer.is_alive() for writer in writers)
        time.sleep(0.01)
    for writer in writers:
        time.sleep(rng.uniform(0, LIFE_S / WRITERS))
        assert writer.is_alive(), f"a writer ended by itself, with exit code {writer.exitcode}"
        writer.kill()
    for writer in writers:
        writer.join()
        writer.close()


@pytest.mark.slow
def test_killed_writers_lose_nothing(tmp_path: Path, rng: random.Random, effort: int) -> None:
    folder, notes = tmp_path / "basin", tmp_path / "acknowledged"
    basin.open(folder, mode="x", profile="open").close()
    kills = KILLS * effort
    for first in range(0, kills, WRITERS):
        run_round(folder, notes, first, rng)
        with basin.open(folder, mode="r") as db:
            require_whole(db, acknowledged(notes))
    with basin.open(folder, mode="w") as db:
        assert [finding for finding in db.check() if finding.severity == "damage"] == []
        commits = int(db[COUNTER])
    print(
        f"{kills} writers killed; {sum(n + 1 for n in acknowledged(notes).values())} of {commits} commits acknowledged"
    )


def test_a_lost_batch_would_be_seen(tmp_path: Path) -> None:
    """The check itself: each kind of loss raises."""
    with basin.open(tmp_path / "basin", mode="x", profile="open") as db:
        for number in range(3):
            for item in range(BATCH_NAMES):
                db[f"0000/{number:06}/{item:02}"] = value_of(0, number, item)
        db[COUNTER] = b"3"
        require_whole(db, {0: 2})
        require_whole(db, {0: 1})
        for done in ({0: 3}, {0: 0}, {0: 2, 1: 0}):
            with pytest.raises(AssertionError):
                require_whole(db, done)
        del db["0000/000002/03"]
        with pytest.raises(AssertionError):
            require_whole(db, {0: 2})

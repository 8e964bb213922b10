"""Several writers and readers at once, in threads and in processes: nothing is lost, mixed or seen by halves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import basin
from basin.api import Database
from tests.conftest import Spawn
from tests.source_tree import ROOT

PROCESSES = 4
ROUNDS = 30
BATCH_NAMES = 7
TIMEOUT_S = 120

WRITER = """
import sys, basin
folder, number, rounds, names = sys.argv[1], *map(int, sys.argv[2:])
with basin.open(folder, mode="w") as db:
    for turn in range(rounds):
        with db.batch() as batch:
            for item in range(names):
                batch.put(f"{number}/{turn:04}/{item}", b"%d" % turn * (1 if item else 300))
            batch.blobs.put(b"blob %d of writer %d " % (turn, number) * 20)
        print(turn, flush=True)
"""

COUNTER = """
import sys, basin
def increment(tx):
    tx["counter"] = b"%d" % (int(tx["counter"]) + 1)
with basin.open(sys.argv[1], mode="w") as db:
    for _ in range(int(sys.argv[2])):
        db.run(increment, retries=1000)
"""

READER = """
import collections, sys, basin
folder, names = sys.argv[1], int(sys.argv[2])
with basin.open(folder, mode="r", refresh_interval_s=0) as db:
    print("ready", flush=True)
    while (line := sys.stdin.readline()) and not line.startswith("stop"):
        with db.view() as view:
            batches = collections.Counter(name.rpartition(b"/")[0] for name in view)
            assert set(batches.values()) <= {names}, batches
            assert len(view) == sum(batches.values())
        print("read", flush=True)
"""


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(spawn: Spawn) -> Start:
    """Starts a script in another process."""

    def launch(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    return launch


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    return output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with basin.open(tmp_path / "basin", mode="x", profile="open") as db:
        db["counter"] = b"0"
    return tmp_path / "basin"


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0)` … `work(count - 1)` at once; raise the first error."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  (it is raised again below, in the test's own thread)
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_processes_that_write_at_once_lose_nothing(folder: Path, start: Start) -> None:
    for writer in [start(WRITER, folder, number, ROUNDS, BATCH_NAMES) for number in range(PROCESSES)]:
        finish(writer)
    with basin.open(folder, mode="r") as db:
        assert len(db) == 1 + PROCESSES * ROUNDS * BATCH_NAMES
        for number in range(PROCESSES):
            for turn in range(ROUNDS):
                for item in range(BATCH_NAMES):
                    assert db[f"{number}/{turn:04}/{item}"] == b"%d" % turn * (1 if item else 300)
        assert len(list(db.blobs)) == PROCESSES * ROUNDS
        assert all(db.blobs[key].startswith(b"blob ") for key in db.blobs)


def test_processes_that_count_together_count_every_step(folder: Path, start: Start) -> None:
    for counter in [start(COUNTER, folder, ROUNDS) for _ in range(PROCESSES)]:
        finish(counter)
    with basin.open(folder, mode="r") as db:
        assert db["counter"] == b"%d" % (PROCESSES * ROUNDS)


def test_a_reader_sees_whole_batches_while_others_write(folder: Path, start: Start) -> None:
    with basin.open(folder, mode="w") as db:
        del db["counter"]
    reader = start(READER, folder, BATCH_NAMES)
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    writers = [start(WRITER, folder, number, ROUNDS, BATCH_NAMES) for number in range(2)]
    views = 0
    while any(writer.poll() is None for writer in writers):
        reader.stdin.write("go\n")
        reader.stdin.flush()
        assert reader.stdout.readline() == "read\n"
        views += 1
    for writer in writers:
        finish(writer)
    reader.stdin.write("stop\n")
    finish(reader)
    assert views > 1


def test_an_old_handle_goes_on_after_another_process_wrote(folder: Path, start: Start) -> None:
    """The file it appends to has grown meanwhile."""
    with basin.open(folder, mode="w") as db:
        for turn in range(5):
            db[f"mine/{turn}"] = b"x"
            db.commit()
            finish(start(WRITER, folder, turn, 1, 2))
            assert db.refresh() == db.head.position
            assert b"%d/0000/0" % turn in db
    with basin.open(folder, mode="r") as db:
        assert len(db) == 1 + 5 + 5 * 2


def test_threads_that_put_the_same_contents_store_them_once_each(folder: Path) -> None:
    contents = [b"content %d " % number * 30 for number in range(2000)]
    with basin.open(folder, mode="w") as db:

        def work(_: int) -> None:
            for start_at in range(0, len(contents), 100):
                db.blobs.put_many(contents[start_at : start_at + 100])

        in_threads(4, work)
    with basin.open(folder, mode="r") as db:
        assert sorted(db.blobs.get_many(list(db.blobs))) == sorted(contents)
        assert [finding for finding in db.check() if finding.severity != "info"] == []


def test_threads_that_count_together_count_every_step(folder: Path) -> None:
    def increment(tx: Database) -> None:
        tx["counter"] = b"%d" % (int(tx["counter"]) + 1)

    def work(_: int) -> None:
        for _ in range(ROUNDS):
            db.run(increment, retries=1000)

    with basin.open(folder, mode="w") as db:
        in_threads(8, work)
        assert db["counter"] == b"%d" % (8 * ROUNDS)


def test_threads_that_commit_at_once_share_records(folder: Path) -> None:
    with basin.open(folder, mode="w") as db:
        before = db.head.position
        barrier = threading.Barrier(16)

        def work(number: int) -> None:
            barrier.wait(TIMEOUT_S)
            for turn in range(20):
                with db.batch() as batch:
                    batch[f"{number}/{turn}"] = b"x"

        in_threads(16, work)
        assert len(db) == 1 + 16 * 20
        assert db.head.position - before < 16 * 20


def test_a_forked_child_cannot_write_through_its_parents_handle(folder: Path) -> None:
    with basin.open(folder, mode="w") as db:
        db["before"] = b"1"
        child = os.fork()
        if child == 0:
            try:
                db["child"] = b"2"
            except basin.errors.BasinClosed:
                os._exit(0)
            except BaseException:  # noqa: BLE001  (whatever it is, this process must not run the rest of the tests)
                os._exit(2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        db["after"] = b"3"
    with basin.open(folder, mode="r") as db:
        assert set(db) == {b"counter", b"before", b"after"}

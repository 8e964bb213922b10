"""A forked child: what it inherited is closed, the parent goes on, and neither holds up anybody else."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import basin
from basin.api import Database
from basin.errors import BasinClosed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "basin"


def forked(action: Callable[[], Any]) -> int:
    """Run `action` in a child; returns its process id. Exit code 0 if it returned."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:  # noqa: BLE001  # whatever it is, this process must not run the rest of the tests
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_can_do_nothing_with_what_it_inherited(folder: Path) -> None:
    with basin.open(folder, profile="open", sync_interval_s=3600.0) as db:
        key = db.blobs.put(b"content")
        db["before"] = b"pending"
        view, batch, transaction, space = db.view(), db.batch(), db.transaction(), db.keyspace("space")
        batch["batch"] = b"1"
        scan = db.scan()
        calls: list[Callable[[], Any]] = [
            lambda: db.put("child", b"1"),
            lambda: db["before"],
            lambda: db.get_many([b"before"]),
            lambda: list(db),
            db.commit,
            db.refresh,
            db.view,
            db.batch,
            db.transaction,
            lambda: db.head,
            lambda: db.at(1),
            lambda: list(db.changes(0)),
            lambda: list(db.check()),
            db.stats,
            lambda: view["before"],
            lambda: batch.put("child", b"1"),
            lambda: batch.__exit__(None, None, None),
            lambda: transaction.get("before"),
            lambda: space.put(b"child", b"1"),
            lambda: db.blobs[key],
            lambda: db.blobs.put(b"child"),
            lambda: db.blobs.put_many([b"child"]),
            lambda: key in db.blobs,
        ]

        def in_child() -> None:
            assert db.closed
            for number, call in enumerate(calls):
                try:
                    call()
                except BasinClosed:
                    continue
                raise AssertionError(f"call {number} went through")
            db.close()

        assert finish(forked(in_child)) == 0
        assert next(scan) == (b"before", b"pending")
        with batch:
            pass
        db["after"] = b"2"
        db.commit()
        assert finish(forked(db.close)) == 0
        assert db["after"] == b"2"
    with basin.open(folder, "r") as db:
        assert dict(db) == {b"before": b"pending", b"batch": b"1", b"after": b"2"}
        assert len(list(db.blobs)) == 1


def test_a_child_opens_its_own_handle(folder: Path) -> None:
    with basin.open(folder, profile="open") as db:
        db["parent"] = b"1"
        db.commit()

        def in_child() -> None:
            with basin.open(folder) as own:
                own["child"] = own["parent"] + b"2"
                own.blobs.put(b"of the child")

        assert finish(forked(in_child)) == 0
        db.refresh()
        assert db["child"] == b"12"
        db["more"] = b"3"
    with basin.open(folder, "r") as db:
        assert len(db) == 3
        assert [finding for finding in db.check() if finding.severity != "info"] == []


def test_a_child_does_not_keep_a_dead_parent_alive(folder: Path) -> None:
    """Its session is over with the parent: the next writer may look after what it left."""
    basin.open(folder, profile="open").close()
    reading, writing = os.pipe()

    def parent() -> None:
        db: Database = basin.open(folder)
        db["a"] = b"1"
        db.blobs.put(b"content")
        db.commit()
        grandchild = forked(signal.pause)
        os.write(writing, b"%d\n" % grandchild)
        signal.pause()

    child = forked(parent)
    grandchild = int(os.read(reading, 100))
    os.kill(child, signal.SIGKILL)
    assert finish(child) == -signal.SIGKILL
    try:
        with basin.open(folder, lock_timeout_s=5.0) as db:
            assert db["a"] == b"1"
            db.blobs.put(b"another")
            db.commit()
            assert set(db.core.state.sessions) == {db.core.session}
    finally:
        os.kill(grandchild, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_fork_while_threads_write_loses_nothing(folder: Path) -> None:
    with basin.open(folder, profile="open", sync_interval_s=0.001) as db:
        children = []
        for number in range(20):
            db.put_many([(b"%d/%d" % (number, at), b"x" * 600) for at in range(20)])
            children.append(forked(lambda: None))
        assert [finish(child) for child in children] == [0] * 20
    with basin.open(folder, "r") as db:
        assert len(db) == 400
        assert set(db.values()) == {b"x" * 600}

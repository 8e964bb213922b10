"""The spool: where files of a bucket grow, and what becomes of it when its owner closes, forks or dies."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from basin.errors import BasinClosed, OutOfSpace, StorageError
from basin.storage import spool as module
from basin.storage.spool import Spool
from tests.conftest import Spawn


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "spools"


@pytest.fixture
def spool(parent: Path) -> Iterator[Spool]:
    made = Spool(parent)
    yield made
    made.close()


def spools(parent: Path) -> list[Path]:
    return sorted(parent.glob("basin-spool-*"))


def test_a_file_grows_and_is_read(spool: Spool) -> None:
    file = spool.create()
    file.append(b"one")
    file.append(bytearray(b"two"))
    file.append(memoryview(b"-three-")[1:-1])
    file.append(b"")
    assert file.size == 11
    assert (file.read(0, 11), file.read(2, 3), file.read(9, 5), file.read(99, 1)) == (
        b"onetwothree",
        b"etw",
        b"ee",
        b"",
    )
    assert file.path.read_bytes() == b"onetwothree"


def test_items_of_several_bytes_are_written_as_bytes(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: write(descriptor, bytes(view)[:4]))
    file = spool.create()
    file.append(memoryview(bytes(range(32))).cast("I"))
    assert (file.size, file.read(0, 99)) == (32, bytes(range(32)))


def test_only_its_owner_may_look_inside(spool: Spool, parent: Path) -> None:
    path = spool.create().path
    (folder,) = spools(parent)
    assert path.parent == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(found.stat().st_mode) for found in folder.iterdir()} == {0o600}


def test_files_do_not_meet(spool: Spool) -> None:
    files = [spool.create() for _ in range(20)]
    for number, file in enumerate(files):
        file.append(bytes([number]) * 10)
    assert [file.read(0, 10) for file in files] == [bytes([number]) * 10 for number in range(20)]


def test_a_short_write_goes_on(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, view: write(descriptor, bytes(view[:3])))
    file = spool.create()
    file.append(b"0123456789")
    assert (file.size, file.read(0, 99)) == (10, b"0123456789")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EIO, StorageError)]
)
def test_a_write_that_fails(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    file = spool.create()

    def fail(descriptor: int, data: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(StorageError) as caught:
            file.append(b"x")
    assert type(caught.value) is kind
    assert caught.value.fields["object"] == str(file.path)
    assert caught.value.fields["operation"] == "spool"
    assert file.size == 0


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError):
            Spool(folder)


def test_a_removed_file_is_gone_and_takes_no_more(spool: Spool) -> None:
    file = spool.create()
    file.append(b"one")
    file.remove()
    file.remove()
    assert not file.path.exists()
    with pytest.raises(BasinClosed):
        file.append(b"two")
    with pytest.raises(StorageError):
        file.read(0, 3)


def test_a_file_whose_name_somebody_deleted_is_still_read(spool: Spool) -> None:
    file = spool.create()
    file.append(b"one")
    file.path.unlink()
    assert file.read(0, 3) == b"one"
    file.remove()


def test_closing_deletes_everything_of_its_own(spool: Spool, parent: Path) -> None:
    other = Spool(parent)
    spool.create().append(b"one")
    kept = other.create()
    spool.close()
    spool.close()
    assert spools(parent) == [kept.path.parent]
    other.close()
    assert spools(parent) == []


def test_a_spool_in_use_is_not_swept(spool: Spool, parent: Path) -> None:
    file = spool.create()
    file.append(b"one")
    Spool(parent).close()
    assert file.path.read_bytes() == b"one"


_OTHER = """
import sys, time
from pathlib import Path
from basin.storage.spool import Spool
spool = Spool(Path(sys.argv[1]))
spool.create().append(b"x")
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_dead_process_left_goes_with_the_next_spool(parent: Path, spawn: Spawn) -> None:
    other = spawn([sys.executable, "-c", _OTHER, str(parent)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"ready\n"
    Spool(parent).close()
    (left,) = spools(parent)
    assert len(list(left.iterdir())) == 2  # A process that lives keeps its own.
    other.kill()
    other.communicate()
    assert spools(parent) == [left]
    own = Spool(parent)
    assert spools(parent) == [own.create().path.parent] != [left]
    own.close()


def test_nothing_but_spools_is_swept(parent: Path) -> None:
    kept = [parent / "basin-spool-x", parent / "other", parent / "basin-spool-file"]
    for path in kept[:2]:
        path.mkdir(parents=True)
    (parent / "other" / "lock").write_bytes(b"")
    kept[2].write_bytes(b"")
    elsewhere = parent.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_bytes(b"")
    (parent / "basin-spool-link").symlink_to(elsewhere)
    Spool(parent).close()
    assert all(path.exists() for path in (*kept, elsewhere / "lock"))


@pytest.mark.root
def test_a_spool_of_another_user_is_not_swept(parent: Path) -> None:
    left = parent / "basin-spool-x"
    left.mkdir(parents=True)
    (left / "lock").write_bytes(b"")
    os.chown(left, 12_345, 12_345)
    Spool(parent).close()
    assert left.exists()
    os.chown(left, os.geteuid(), -1)
    Spool(parent).close()
    assert not left.exists()


@pytest.mark.parametrize("sweeper_is_done", [False, True])
def test_one_who_sweeps_at_the_wrong_moment_costs_only_a_folder(
    parent: Path, monkeypatch: pytest.MonkeyPatch, sweeper_is_done: bool
) -> None:
    """Between the moment at which the lock's file is made and the lock, a spool looks as if it were left behind."""
    flock = fcntl.flock
    sweeping: list[bool] = []
    held: list[int] = []

    def late(descriptor: int, operation: int) -> None:
        if not sweeping:
            sweeping.append(True)
            if sweeper_is_done:
                module._sweep(parent)
            else:
                held.append(os.open(next(parent.glob("*/lock")), os.O_RDWR))
                flock(held[0], fcntl.LOCK_EX)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    spool = Spool(parent)
    monkeypatch.undo()
    file = spool.create()
    file.append(b"one")
    Spool(parent).close()
    assert file.path.read_bytes() == b"one"
    for descriptor in held:
        assert not os.path.samestat(os.fstat(descriptor), (file.path.parent / "lock").stat())
        os.close(descriptor)
    spool.close()


def test_a_forked_child_changes_nothing(spool: Spool) -> None:
    file = spool.create()
    file.append(b"one")

    def in_child() -> None:
        with pytest.raises(BasinClosed):
            file.append(b"two")
        file.remove()
        spool.close()

    assert _forked(in_child) == 0
    assert file.path.read_bytes() == b"one"
    file.append(b"2")
    assert file.read(0, 9) == b"one2"


def _forked(action: Callable[[], None]) -> int:
    """Run `action` in a forked child; return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException as error:  # noqa: BLE001 (the child has nobody to raise to)
            os.write(2, repr(error).encode() + b"\n")
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_without_a_folder_it_lies_among_the_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spool = Spool(None)
    assert spool.create().path.parent.parent == tmp_path
    spool.close()
    assert spools(tmp_path) == []

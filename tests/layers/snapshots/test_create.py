"""Backups: what is saved, what is not read again, what is told; kills and what the next run finds."""

from __future__ import annotations

import io
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from basin.api import Database
from basin.errors import InvalidArgument, NameNotFound, ReadOnly
from basin.format.tree import RowKind
from basin.layers.snapshots import BackupProgress, Rules, Snapshot
from tests.layers.snapshots.material import inside, opened, settle


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    with opened(tmp_path / "basin") as database:
        yield database


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small tree with all kinds of things in it."""
    top = tmp_path / "tree"
    (top / "a" / "deep" / "er").mkdir(parents=True)
    (top / "b").mkdir()
    (top / "a" / "one").write_bytes(b"1" * 1000)
    (top / "a" / "deep" / "two").write_bytes(os.urandom(100_000))
    (top / "a" / "empty").write_bytes(b"")
    (top / "large").write_bytes(random.Random(1).randbytes(6 << 20))
    (top / "b" / "link").symlink_to("../a/one")
    os.link(top / "a" / "one", top / "b" / "same")
    os.mkfifo(top / "b" / "fifo")
    settle()
    return top


def test_all_that_was_there_is_in_the_snapshot(db: Database, tree: Path) -> None:
    snapshot = db.snapshots.create([tree], tags=["x", "b"])
    rows = inside(snapshot, tree)
    assert {path: RowKind(row.kind).name for path, row in rows.items()} == {
        b"a": "DIRECTORY",
        b"a/deep": "DIRECTORY",
        b"a/deep/er": "DIRECTORY",
        b"a/deep/two": "FILE",
        b"a/empty": "FILE",
        b"a/one": "FILE",
        b"b": "DIRECTORY",
        b"b/fifo": "FIFO",
        b"b/link": "LINK",
        b"b/same": "FILE",
        b"large": "FILE",
    }
    for path in (b"a/deep/two", b"a/empty", b"a/one", b"b/same", b"large"):
        with snapshot.open(os.fsencode(tree) + b"/" + path) as file:
            assert file.read() == (tree / os.fsdecode(path)).read_bytes()
    assert snapshot.attributes(rows[b"b/link"]).target == b"../a/one"
    assert snapshot.attributes(rows[b"b/same"]).linked == snapshot.attributes(rows[b"a/one"]).linked
    assert snapshot.attributes(rows[b"a/one"]).mtime_ns == (tree / "a" / "one").stat().st_mtime_ns
    assert rows[b"a"].files == 3
    assert rows[b"a"].size == 101_000
    assert list(snapshot.tags) == ["b", "x"]
    assert list(snapshot.paths) == [str(tree)]
    assert snapshot.host == socket.gethostname()
    found = snapshot.statistics
    assert (found.files, found.others, found.new_files, found.problems) == (5, 2, 4, 0)
    assert found.read_size == found.size == 6 * (1 << 20) + 102_000
    assert snapshot.document.owners[str(os.getuid())]


def test_what_is_unchanged_is_not_read(db: Database, tree: Path) -> None:
    first = db.snapshots.create(tree)
    settle()
    again = db.snapshots.create(tree)
    assert again.statistics.read_files == 0
    assert again.document.tree == first.document.tree
    assert again.document.parent == first.id
    (tree / "a" / "one").write_bytes(b"2" * 1000)
    (tree / "new").write_bytes(b"new")
    settle()
    third = db.snapshots.create(tree)
    assert (third.statistics.read_files, third.statistics.changed_files, third.statistics.new_files) == (3, 2, 1)
    with third.open(f"{tree}/b/same") as file:
        assert file.read() == b"2" * 1000
    with first.open(f"{tree}/b/same") as file:
        assert file.read() == b"1" * 1000


@pytest.mark.parametrize("what", ["size", "mtime", "ctime", "inode", "kind"])
def test_each_sign_of_a_change_is_heeded(db: Database, tree: Path, what: str) -> None:
    path = tree / "a" / "deep" / "two"
    before = path.stat()
    db.snapshots.create(tree)
    settle()
    content = bytes(100_000) if what != "size" else bytes(99_999)
    if what == "inode":
        other = tree / "other"
        other.write_bytes(content)
        other.rename(path)
    elif what == "kind":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content)
    if what != "kind":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (what == "mtime")))
    settle()
    found = db.snapshots.create(tree)
    assert found.statistics.read_files == (what != "kind")
    if what != "kind":
        with found.open(path) as file:
            assert file.read() == content


def test_a_file_written_in_the_tick_in_which_it_was_read_is_read_again(db: Database, tree: Path) -> None:
    (tree / "a" / "one").write_bytes(b"3" * 1000)
    first = db.snapshots.create(tree)
    assert db.snapshots.create(tree).statistics.read_files == 2, "a/one and its second name"
    settle()
    assert first.statistics.problems == 0
    assert db.snapshots.create(tree).statistics.read_files == 0


def test_nothing_of_the_parent_is_believed_if_it_is_to_be_read(db: Database, tree: Path) -> None:
    first = db.snapshots.create(tree)
    forced = db.snapshots.create(tree, parent="")
    assert forced.statistics.read_files == first.statistics.read_files == 4
    assert forced.document.tree == first.document.tree
    assert forced.statistics.new_size < 10_000
    assert db.snapshots.create(tree, parent=first.id[:6]).document.parent == first.id
    with pytest.raises(NameNotFound):
        db.snapshots.create(tree, parent="f" * 16)


def test_what_the_basin_holds_no_more_is_read_again(db: Database, tree: Path, tmp_path: Path) -> None:
    first = db.snapshots.create(tree)
    db.close()
    for path in (tmp_path / "basin" / "data").iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1  # In the large file, which is most of it.
        path.write_bytes(content)
    with opened(tmp_path / "basin") as again:
        assert [one for one in again.check() if one.severity == "damage"]
        list(again.repair(dry_run=False))
        healed = again.snapshots.create(tree)
        assert healed.statistics.changed_files == 1
        assert healed.document.tree == first.document.tree
        for name in ("large", "a/one", "a/deep/two"):
            with healed.open(tree / name) as file:
                assert file.read() == (tree / name).read_bytes()


def test_another_host_or_path_is_no_parent(db: Database, tree: Path) -> None:
    db.snapshots.create(tree)
    settle()
    assert db.snapshots.create(tree, host="other").statistics.read_files == 4
    assert db.snapshots.create([tree / "a"]).statistics.read_files == 2


def test_a_dry_run_reads_and_writes_nothing(db: Database, tree: Path) -> None:
    head = db.head
    found = db.snapshots.create(tree, dry_run=True)
    assert (found.statistics.read_files, found.statistics.files) == (4, 5)
    assert db.head == head
    assert db.snapshots.list() == []


def test_what_cannot_be_read_is_told_and_the_rest_is_saved(
    db: Database, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Privileged users can read all: the error comes from the call."""
    real = os.open

    def refuse(path: bytes | str, *rest: int, **named: int) -> int:
        if os.fsencode(path).endswith((b"/two", b"/large")):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    snapshot = db.snapshots.create(tree)
    monkeypatch.undo()
    assert sorted((one.path, one.error) for one in snapshot.problems) == [
        (f"{tree}/a/deep/two", "Permission denied"),
        (f"{tree}/large", "Permission denied"),
    ]
    rows = inside(snapshot, tree)
    assert b"large" not in rows
    assert rows[b"a/one"].size == 1000
    assert db.snapshots.create(tree).statistics.read_files == 2, "what was missing is read the next time"


@pytest.mark.parametrize("name", ["one", "large"])
def test_a_file_that_changes_while_it_is_read_is_noted(
    db: Database, tree: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = next(tree.rglob(name))
    real = os.fstat
    calls: list[int] = []

    def change(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        if found.st_ino == inode:
            calls.append(1)
            if len(calls) == 2:
                with path.open("ab") as file:
                    file.write(b"more")
        return found

    inode = path.stat().st_ino
    monkeypatch.setattr(os, "fstat", change)
    snapshot = db.snapshots.create(tree)
    monkeypatch.undo()
    assert "changed while it was read" in {one.error for one in snapshot.problems}
    assert str(path) in {one.path for one in snapshot.problems}
    assert snapshot.attributes(inside(snapshot, tree)[os.fsencode(path.relative_to(tree))]).changed
    settle()
    assert db.snapshots.create(tree).statistics.read_files >= 1


def test_a_link_that_takes_the_place_of_a_file_is_not_followed(
    db: Database, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside").write_bytes(b"o" * 100_000)
    real = os.open

    def swap(path: bytes | str, *rest: int, **named: int) -> int:
        if os.fsencode(path).endswith(b"/two"):
            victim = Path(os.fsdecode(path))
            victim.unlink()
            victim.symlink_to(tmp_path / "outside")
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", swap)
    snapshot = db.snapshots.create(tree)
    monkeypatch.undo()
    assert [one.path for one in snapshot.problems] == [f"{tree}/a/deep/two"]
    assert b"a/deep/two" not in inside(snapshot, tree)


def test_rules_leave_things_out(db: Database, tree: Path) -> None:
    rows = inside(db.snapshots.create(tree, rules=Rules(excludes=["deep/", "*arge"])), tree)
    assert set(rows) == {b"a", b"a/one", b"a/empty", b"b", b"b/link", b"b/same", b"b/fifo"}


def test_standard_input_is_a_file(db: Database) -> None:
    content = os.urandom(9 << 20)
    snapshot = db.snapshots.create_from_stream(io.BytesIO(content), "dump.sql", tags=["t"])
    assert [row.name for row in snapshot.ls()] == [b"dump.sql"]
    with snapshot.open("dump.sql") as file:
        assert file.read() == content
    assert db.snapshots.create_from_stream(io.BytesIO(), "nothing").statistics.size == 0
    for name in ("", "..", "a/b"):
        with pytest.raises(InvalidArgument):
            db.snapshots.create_from_stream(io.BytesIO(b"x"), name)


def test_snapshots_are_found_by_id_by_its_beginning_and_as_the_latest(db: Database, tree: Path) -> None:
    with pytest.raises(NameNotFound):
        db.snapshots.get("latest")
    made = [db.snapshots.create(tree, tags=[f"t{number}"]) for number in range(3)]
    assert db.snapshots.list() == made
    assert db.snapshots.get("latest") == made[-1]
    assert db.snapshots.get(made[0].id) == db.snapshots.get(made[0].id[:8]) == made[0]
    assert db.snapshots.list(tag="t1") == [made[1]]
    assert db.snapshots.list(path=tree) == made
    assert db.snapshots.list(host="nobody") == []
    for wrong in ("", "abc", "zzzz", made[0].id + "0", "../x"):
        with pytest.raises(NameNotFound):
            db.snapshots.get(wrong)
    db.snapshots.forget([made[0].id, made[2].id])
    assert db.snapshots.list() == [made[1]]
    with pytest.raises(NameNotFound):
        db.snapshots.forget([made[1].id, made[0].id])
    assert db.snapshots.list() == [made[1]]


def test_what_snapshots_need_outlives_a_prune_and_what_they_forgot_goes(db: Database, tree: Path) -> None:
    first = db.snapshots.create(tree)
    (tree / "large").write_bytes(os.urandom(5 << 20))
    second = db.snapshots.create(tree)
    for _ in range(2):
        db.compact(grace_s=0, prune=True)
    for snapshot, size in ((first, 6 << 20), (second, 5 << 20)):
        with snapshot.open(tree / "large") as file:
            assert len(file.read()) == size
    stored = db.stats()["strata"]["data"]["bytes"]
    db.snapshots.forget([first.id])
    with opened(Path(db.stats()["path"]), history_s=0.0) as other:
        for _ in range(3):
            other.compact(grace_s=0, prune=True)
        assert other.stats()["strata"]["data"]["bytes"] < stored - (5 << 20)
        with other.snapshots.get(second.id).open(tree / "large") as file:
            assert len(file.read()) == 5 << 20


def test_a_view_shows_the_snapshots_of_its_position(db: Database, tree: Path) -> None:
    first = db.snapshots.create(tree)
    with db.view() as view:
        db.snapshots.forget([first.id])
        assert view.snapshots.list() == [first]
        with view.snapshots.get(first.id).open(tree / "a" / "one") as file:
            assert file.read() == b"1" * 1000
        with pytest.raises(InvalidArgument):
            view.snapshots.create(tree)


def test_a_reader_makes_none(db: Database, tree: Path, tmp_path: Path) -> None:
    with opened(tmp_path / "basin", mode="r") as reader, pytest.raises(ReadOnly):
        reader.snapshots.create(tree)
    with pytest.raises(InvalidArgument):
        db.snapshots.create([])
    with pytest.raises(InvalidArgument):
        db.snapshots.create(tree, tags="word")


def test_progress_is_told(db: Database, tree: Path) -> None:
    told: list[BackupProgress] = []
    db.snapshots.create(tree, progress=told.append)
    assert told[-1].files == 5
    assert told[-1].read_size == told[-1].size
    assert [one.read_size for one in told] == sorted(one.read_size for one in told)
    assert len(told) > 5, "a large file tells while it is read"
    told.clear()
    settle()
    db.snapshots.create(tree, progress=told.append)
    assert told[-1].files_expected == 5
    assert told[-1].size_expected == told[-1].size


# --- interrupted ------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """What ends a backup in a test."""


def wide(folder: Path, count: int, size: int) -> Path:
    """A tree of `count` files in ten folders."""
    for number in range(10):
        (folder / f"{number:02}").mkdir(parents=True)
    source = random.Random(7)
    for number in range(count):
        (folder / f"{number % 10:02}" / f"{number:05}").write_bytes(source.randbytes(size))
    settle()
    return folder


def interrupt_at(size: int, told: list[int] | None = None) -> Callable[[BackupProgress], None]:
    """Ends a backup when so much was read; `told` gets how much that was."""

    def progress(done: BackupProgress) -> None:
        if told is not None:
            told.append(done.read_size)
        if done.read_size >= size:
            raise Interrupted

    return progress


def test_an_interrupted_backup_goes_on_where_it_was(tmp_path: Path) -> None:
    top = wide(tmp_path / "tree", 1200, 20_000)
    with opened(tmp_path / "whole") as whole:
        wanted = whole.snapshots.create(top)
    with opened(tmp_path / "basin") as db:
        total, interval = 1200 * 20_000, 1 << 20
        read = 0
        for part in (0.3, 0.6, 0.9):
            before = {one.id for one in db.snapshots.list()}
            progress = interrupt_at(int(total * part) - read)
            with pytest.raises(Interrupted):
                db.snapshots.create(top, journal_size=interval, progress=progress)
            (broken,) = [one for one in db.snapshots.list() if one.id not in before]
            assert not broken.is_complete
            assert "incomplete" in repr(broken)
            there = [row for row in broken.walk(top) if row.kind == RowKind.FILE]
            read = sum(row.size for row in there)
            assert total * part - 3 * (4 << 20) - interval <= read <= total * part + (4 << 20)
            for row in there[:: len(there) // 7]:
                with broken.open_entry(row) as file:
                    assert file.read() == Path("/" + os.fsdecode(row.path)).read_bytes()
        for _ in range(2):
            db.compact(grace_s=0, prune=True)  # What the journals name is needed.
        last = db.snapshots.create(top, journal_size=interval)
        assert last.statistics.read_size <= total - read
        assert last.document.tree == wanted.document.tree
        assert [one.id for one in db.snapshots.list()] == [last.id], "what it supersedes is gone"
        assert not [name for name in db.reserved_keyspace(3).scan(keys_only=True) if name[:1] in b"jk"]


def test_a_large_file_is_not_read_again_up_to_where_it_was_interrupted(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    size, interval = 100 << 20, 32 << 20
    (top / "large").write_bytes(random.Random(5).randbytes(size))
    (top / "small").write_bytes(b"small")
    settle()
    with opened(tmp_path / "whole") as whole:
        wanted = whole.snapshots.create(top)
    with opened(tmp_path / "basin") as db:
        read = 0
        for stop in (50 << 20, 40 << 20):
            told: list[int] = []
            with pytest.raises(Interrupted):
                db.snapshots.create(top, journal_size=interval, progress=interrupt_at(stop, told))
            read += told[-1]
        db.compact(grace_s=0, prune=True)
        db.compact(grace_s=0, prune=True)  # The parts in the journals are needed.
        assert len(db.snapshots.list()) == 2
        last = db.snapshots.create(top, journal_size=interval)
        assert last.document.tree == wanted.document.tree
        again = read + last.statistics.read_size - size
        assert 0 < again <= 2 * interval, f"{again} bytes were read again after two interruptions"
        assert last.statistics.read_size < size - (stop - interval)
        with last.open(top / "large") as file:
            assert file.read() == (top / "large").read_bytes()
        assert not [name for name in db.reserved_keyspace(3).scan(keys_only=True) if name[:1] in b"jkl"]


def test_a_large_file_that_changed_since_is_read_from_its_beginning(tmp_path: Path) -> None:
    top = tmp_path / "tree"
    top.mkdir()
    content = bytearray(random.Random(5).randbytes(60 << 20))
    (top / "large").write_bytes(content)
    settle()
    with opened(tmp_path / "basin") as db:
        with pytest.raises(Interrupted):
            db.snapshots.create(top, journal_size=20 << 20, progress=interrupt_at(50 << 20))
        before = (top / "large").stat()
        content[:3] = b"new"
        (top / "large").write_bytes(content)
        os.utime(top / "large", ns=(before.st_atime_ns, before.st_mtime_ns))
        settle()
        last = db.snapshots.create(top)
        assert last.statistics.read_size == len(content)
        with last.open(top / "large") as file:
            assert file.read() == content


def test_an_interrupted_backup_is_forgotten_like_any_other(tmp_path: Path, tree: Path) -> None:
    with opened(tmp_path / "basin") as db:
        progress = interrupt_at(1)
        with pytest.raises(Interrupted):
            db.snapshots.create(tree, journal_size=1, progress=progress)
        (broken,) = db.snapshots.list()
        db.snapshots.forget([broken.id])
        assert list(db.reserved_keyspace(3).scan(keys_only=True)) == []


def test_snapshots_compare_as_what_they_are(db: Database, tree: Path) -> None:
    first = db.snapshots.create(tree)
    same = db.snapshots.get(first.id)
    other = db.snapshots.create(tree)
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    assert isinstance(first, Snapshot)
    assert list(first.diff(other)) == []
    (tree / "a" / "one").unlink()
    third = db.snapshots.create(tree)
    gone = [
        (new, old.path) for new, old in third.diff(first, meta=False) if old is not None and old.kind == RowKind.FILE
    ]
    assert gone == [(None, os.fsencode(tree / "a" / "one").lstrip(b"/"))]

"""Restoring trees: what is made, what is there already, selections, removal, progress, durability."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from basin.errors import CorruptionError, InvalidArgument
from basin.format.tree import RowKind
from basin.layers.snapshots.restore import RestoreOptions, RestoreProgress, restore
from basin.layers.snapshots.target import Target
from tests.layers.snapshots.restore_material import PART_SIZE, WHEN_NS, MemoryContents, Rows, below, descriptors, told


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def small_tree(rows: Rows) -> None:
    rows.directory("a", "a/deep", "empty")
    rows.file("one", b"one")
    rows.file("nothing", b"")
    rows.file("a/two", b"two", mode=0o600, mtime_ns=-5)
    rows.file("a/deep/three", b"three", mode=0o444)
    rows.link("a/link", b"../one")
    rows.link("dangling", b"/nowhere/at all")


def test_a_tree_is_restored_with_modes_and_times(rows: Rows, target: Path) -> None:
    small_tree(rows)
    report = rows.restore(target)
    assert not report.problems
    assert not report.warnings
    assert below(target) == ["a", "a/deep", "a/deep/three", "a/link", "a/two", "dangling", "empty", "nothing", "one"]
    assert (target / "a/two").read_bytes() == b"two"
    assert (target / "nothing").read_bytes() == b""
    assert stat.S_IMODE((target / "a/two").stat().st_mode) == 0o600
    assert (target / "a/two").stat().st_mtime_ns == -5
    assert stat.S_IMODE((target / "a/deep/three").stat().st_mode) == 0o444
    assert (target / "a/link").readlink() == Path("../one")
    assert (target / "dangling").readlink() == Path("/nowhere/at all")
    for name in ("a", "a/deep", "empty", "one", "a/link"):
        assert (target / name).lstat().st_mtime_ns == WHEN_NS, name
    assert (report.files, report.size, report.directories, report.others) == (4, 11, 3, 2)
    assert report.seconds > 0


def test_an_empty_snapshot_makes_the_target(rows: Rows, target: Path) -> None:
    assert rows.restore(target / "deeper").files == 0
    assert (target / "deeper").is_dir()


def test_a_target_that_is_a_file_is_refused(rows: Rows, target: Path) -> None:
    target.write_bytes(b"x")
    rows.file("one")
    for dry_run in (False, True):
        with pytest.raises(InvalidArgument, match="no directory"):
            rows.restore(target, dry_run=dry_run)
    assert target.read_bytes() == b"x"


def test_rows_without_metadata_get_what_new_files_get(rows: Rows, target: Path) -> None:
    rows.add("folder", RowKind.DIRECTORY, plain=True)
    rows.add("folder/file", RowKind.FILE, size=1, key=rows.contents.put(b"x"), plain=True)
    assert not rows.restore(target).problems
    (target / "mine").mkdir()
    (target / "mine.txt").write_bytes(b"")
    assert (target / "folder").stat().st_mode == (target / "mine").stat().st_mode
    assert (target / "folder/file").stat().st_mode == (target / "mine.txt").stat().st_mode
    assert rows.restore(target).files == 1  # Nothing says that it agrees.


def test_a_directory_whose_row_is_missing_is_made(rows: Rows, target: Path) -> None:
    rows.file("a/b/file")
    rows.file("a/c/file")
    assert not rows.restore(target).problems
    assert below(target) == ["a", "a/b", "a/b/file", "a/c", "a/c/file"]


def test_a_directory_that_only_led_there_keeps_its_time(rows: Rows, target: Path) -> None:
    rows.directory("way", mtime_ns=0, inode=0, mode=0o711)
    rows.file("way/file")
    assert not rows.restore(target).problems
    assert stat.S_IMODE((target / "way").stat().st_mode) == 0o711
    assert (target / "way").stat().st_mtime_ns > WHEN_NS


@pytest.mark.parametrize("name", [b"\xff\xfe", "ümläut".encode(), b"new\nline", b"-rf", b"a" * 255])
def test_any_name_is_restored(rows: Rows, target: Path, name: bytes) -> None:
    rows.directory(name)
    rows.file(name + b"/" + name, name)
    assert not rows.restore(target).problems
    assert (target / os.fsdecode(name) / os.fsdecode(name)).read_bytes() == name


def test_read_only_directories_are_filled_first_and_again(rows: Rows, target: Path) -> None:
    rows.directory("locked", mode=0o555)
    rows.file("locked/file", b"1")
    assert not rows.restore(target).problems
    assert stat.S_IMODE((target / "locked").stat().st_mode) == 0o555
    (target / "locked").chmod(0)
    rows.entries.pop()
    rows.file("locked/file", b"22")
    assert not rows.restore(target).problems
    assert stat.S_IMODE((target / "locked").stat().st_mode) == 0o555
    assert (target / "locked/file").read_bytes() == b"22"


def test_fifos_and_sockets_are_restored(rows: Rows, target: Path) -> None:
    rows.add("fifo", RowKind.FIFO, mode=0o640)
    rows.add("socket", RowKind.SOCKET, mode=0o600)
    assert not rows.restore(target).problems
    assert stat.S_ISFIFO((target / "fifo").stat().st_mode)
    assert stat.S_IMODE((target / "fifo").stat().st_mode) == 0o640
    assert stat.S_ISSOCK((target / "socket").stat().st_mode)
    assert (target / "fifo").stat().st_mtime_ns == WHEN_NS
    before = (target / "fifo").stat().st_ino
    assert rows.restore(target).others == 0
    assert (target / "fifo").stat().st_ino == before


# --- what is there already --------------------------------------------------------------------------------------------


def inodes(folder: Path) -> dict[str, int]:
    return {name: (folder / name).lstat().st_ino for name in below(folder)}


def test_what_agrees_is_not_written_again(rows: Rows, target: Path) -> None:
    small_tree(rows)
    rows.restore(target)
    before = inodes(target)
    rows.contents.batches.clear()
    report = rows.restore(target)
    assert (report.files, report.unchanged, report.others, report.directories) == (0, 4, 0, 0)
    assert inodes(target) == before
    assert rows.contents.batches == []


def test_what_differs_is_replaced_and_its_metadata_mended(rows: Rows, target: Path) -> None:
    small_tree(rows)
    rows.restore(target)
    (target / "one").write_bytes(b"longer")
    os.utime(target / "a/two", ns=(0, 7))
    (target / "nothing").chmod(0o777)
    (target / "dangling").unlink()
    (target / "dangling").symlink_to("elsewhere")
    (target / "a").chmod(0o700)
    before = inodes(target)
    report = rows.restore(target)
    assert (report.files, report.unchanged, report.others) == (2, 2, 1)
    assert (target / "one").read_bytes() == b"one"
    assert (target / "a/two").stat().st_mtime_ns == -5
    assert stat.S_IMODE((target / "nothing").stat().st_mode) == 0o644
    assert (target / "dangling").readlink() == Path("/nowhere/at all")
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o755
    assert (target / "a").stat().st_mtime_ns == WHEN_NS
    after = inodes(target)
    assert {name for name in before if before[name] == after[name]} == {
        "a", "a/deep", "a/deep/three", "a/link", "empty", "nothing",
    }  # fmt: skip


def test_a_file_that_is_replaced_is_never_half_there(rows: Rows, target: Path) -> None:
    """Whoever has the old file open keeps it whole, and a failure leaves it."""
    rows.file("file", b"new content")
    target.mkdir()
    (target / "file").write_bytes(b"old")
    with (target / "file").open("rb") as old:
        assert not rows.restore(target).problems
        assert old.read() == b"old"
    assert (target / "file").read_bytes() == b"new content"
    rows.contents.stored.clear()
    report = rows.restore(target, overwrite="always")
    assert list(told(report)) == ["file"]
    assert report.damage_count == 1
    assert (target / "file").read_bytes() == b"new content"
    assert below(target) == ["file"]


def test_a_new_file_in_an_old_directory_has_its_name_when_it_is_whole(rows: Rows, target: Path) -> None:
    class Watching(Target):
        def set_times(self, at: int | bytes, atime_ns: int, mtime_ns: int) -> None:
            seen.append(below(target))
            super().set_times(at, atime_ns, mtime_ns)

    seen: list[list[str]] = []
    target.mkdir()
    rows.file("file")
    assert not rows.restore(target, target=Watching()).problems
    assert len(seen) == len(seen[0]) == 1
    assert seen[0] != ["file"]
    assert below(target) == ["file"]


def test_a_file_that_fails_leaves_nothing_behind(rows: Rows, target: Path) -> None:
    class Failing(Target):
        def set_times(self, at: int | bytes, atime_ns: int, mtime_ns: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

    target.mkdir()
    rows.directory("new")
    rows.file("file", b"file")
    rows.file("new/file", b"file")
    rows.link("new/link", b"x")
    report = rows.restore(target, target=Failing())
    assert set(told(report)) == {"file", "new", "new/file", "new/link"}
    assert report.files == 0
    assert below(target) == ["new"]


def test_always_writes_everything_anew(rows: Rows, target: Path) -> None:
    small_tree(rows)
    rows.restore(target)
    before = inodes(target)
    report = rows.restore(target, overwrite="always")
    assert (report.files, report.unchanged, report.others) == (4, 0, 2)
    assert {name for name, inode in inodes(target).items() if inode == before[name]} == {"a", "a/deep", "empty"}


def test_never_leaves_what_is_there_as_it_is(rows: Rows, target: Path) -> None:
    small_tree(rows)
    (target / "a").mkdir(parents=True, mode=0o700)
    (target / "one").write_bytes(b"mine")
    (target / "dangling").mkdir()
    report = rows.restore(target, overwrite="never")
    assert (report.kept, report.files) == (2, 3)
    assert not report.problems
    assert (target / "one").read_bytes() == b"mine"
    assert (target / "dangling").is_dir()
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o700
    assert (target / "a/two").read_bytes() == b"two"


def test_what_is_in_the_way_of_another_kind(rows: Rows, target: Path) -> None:
    """A directory in the place of a file goes only with everything that the caller allows."""
    rows.file("file", b"file")
    rows.directory("folder")
    rows.file("folder/inside", b"inside")
    (target / "file").mkdir(parents=True)
    (target / "file/mine").write_bytes(b"mine")
    (target / "folder").write_bytes(b"mine")
    report = rows.restore(target)
    assert set(told(report)) == {"file", "folder"}
    assert report.skipped == 1
    report = rows.restore(target, overwrite="always")
    assert set(told(report)) == {"file"}
    assert (target / "folder/inside").read_bytes() == b"inside"
    assert (target / "file/mine").read_bytes() == b"mine"
    report = rows.restore(target, overwrite="always", delete=True)
    assert not report.problems
    assert report.deleted == 2
    assert (target / "file").read_bytes() == b"file"


def test_verify_finds_a_file_that_agrees_but_holds_something_else(rows: Rows, target: Path) -> None:
    rows.file("good", b"same")
    rows.file("bad", b"real")
    rows.restore(target)
    (target / "bad").write_bytes(b"fake")
    os.utime(target / "bad", ns=(0, WHEN_NS))
    assert rows.restore(target).unchanged == 2
    report = rows.restore(target, verify=True)
    assert (report.files, report.unchanged, report.verified) == (1, 1, 2)
    assert (target / "bad").read_bytes() == b"real"


def test_verify_finds_what_was_not_written_as_it_should(
    rows: Rows, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.file("file", b"what was stored")
    rows.file("large", bytes(range(256)) * (PART_SIZE // 256 + 1))
    assert rows.restore(target, verify=True).verified == 2
    write = os.pwrite

    def flip(descriptor: int, data: bytes, offset: int) -> int:
        return write(descriptor, bytes([data[0] ^ 1]) + bytes(data[1:]), offset)

    monkeypatch.setattr(os, "pwrite", flip)
    report = rows.restore(target, overwrite="always", verify=True)
    assert told(report) == dict.fromkeys(["file", "large"], "what was read back is not what was written")
    assert below(target) == ["file", "large"]
    assert (target / "file").read_bytes() == b"what was stored"


# --- removing ---------------------------------------------------------------------------------------------------------


def test_delete_removes_what_the_snapshot_has_not(rows: Rows, target: Path) -> None:
    small_tree(rows)
    rows.restore(target)
    (target / "extra").write_bytes(b"")
    (target / "empty/extra/deep").mkdir(parents=True)
    (target / "empty/extra/deep/file").write_bytes(b"")
    (target / "a/deep/extra").symlink_to(target / "one")
    expected = [name for name in below(target) if "extra" not in name]
    assert rows.restore(target).deleted == 0
    assert (target / "extra").exists()
    would = rows.restore(target, delete=True, dry_run=True)
    assert would.deleted == 5
    assert (target / "extra").exists()
    report = rows.restore(target, delete=True)
    assert report.deleted == 5
    assert not report.problems
    assert below(target) == expected
    assert (target / "a/deep").stat().st_mtime_ns == WHEN_NS


def test_delete_spares_what_is_not_wanted(rows: Rows, target: Path) -> None:
    rows.file("file")
    (target / "extra/some").mkdir(parents=True)
    for name in ("extra/keep.o", "extra/gone", "keep.o", "extra/some/gone"):
        (target / name).write_bytes(b"")
    (target / "empty.o").mkdir()
    report = rows.restore(target, delete=True, wanted=lambda path, _: not path.endswith(b".o"))
    assert below(target) == ["empty.o", "extra", "extra/keep.o", "file", "keep.o"]
    assert report.deleted == 3


def test_delete_removes_nothing_if_the_rows_break_off(rows: Rows, target: Path) -> None:
    target.mkdir()
    (target / "later").write_bytes(b"")
    rows.file("file")

    def broken() -> Any:
        yield from rows
        raise CorruptionError("a page is damaged")

    with pytest.raises(CorruptionError):
        restore(broken(), rows.contents, os.fsencode(target), RestoreOptions(delete=True))
    assert (target / "later").exists()


def test_delete_does_not_follow_links(rows: Rows, target: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_bytes(b"x")
    target.mkdir()
    (target / "link").symlink_to(tmp_path / "outside")
    rows.file("file")
    assert rows.restore(target, delete=True).deleted == 1
    assert (tmp_path / "outside/file").exists()


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_only_what_is_wanted_is_restored_and_what_leads_there(rows: Rows, target: Path) -> None:
    rows.directory("a", "a/b", "c", mode=0o711)
    for name in ("a/b/yes", "a/b/no", "c/no"):
        rows.file(name)
    asked: list[tuple[bytes, bool]] = []

    def wanted(path: bytes, is_directory: bool) -> bool:
        asked.append((path, is_directory))
        return path == b"a/b/yes"

    report = rows.restore(target, wanted=wanted)
    assert below(target) == ["a", "a/b", "a/b/yes"]
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o711
    assert (report.files, report.directories) == (1, 2)
    assert (b"a", True) in asked
    assert (b"c/no", False) in asked


def test_directories_that_are_not_wanted_are_left_as_they_are(rows: Rows, target: Path) -> None:
    rows.directory("a")
    rows.file("a/yes")
    (target / "a").mkdir(parents=True, mode=0o700)
    rows.restore(target, wanted=lambda path, _: path == b"a/yes")
    assert stat.S_IMODE((target / "a").stat().st_mode) == 0o700


def test_a_dry_run_changes_nothing_and_counts_the_same(rows: Rows, target: Path) -> None:
    small_tree(rows)
    would = rows.restore(target, dry_run=True)
    assert not target.exists()
    did = rows.restore(target)
    numbers = ("files", "size", "unchanged", "directories", "others")
    assert [getattr(would, name) for name in numbers] == [getattr(did, name) for name in numbers]
    (target / "one").write_bytes(b"longer")
    before = {name: (target / name).lstat() for name in below(target)}
    would = rows.restore(target, dry_run=True)
    assert (would.files, would.unchanged) == (1, 3)
    assert {name: (target / name).lstat() for name in below(target)} == before


# --- progress, threads, durability ------------------------------------------------------------------------------------


def test_progress_ends_at_everything(rows: Rows, target: Path) -> None:
    rows.add("a", RowKind.DIRECTORY, mode=0o755, size=700 * 3)
    rows.entries[-1] = rows.entries[-1]._replace(files=700)
    for number in range(700):
        rows.file(f"a/{number:03}", b"abc")
    rows.file("top", b"12345")
    seen: list[RestoreProgress] = []
    rows.restore(target, progress=seen.append)
    last = seen[-1]
    assert (last.files, last.size, last.files_expected, last.size_expected) == (701, 2105, 701, 2105)
    assert last.current.startswith("a/")
    seen.clear()
    rows.restore(target, progress=seen.append)
    assert (seen[-1].files, seen[-1].size) == (701, 2105)
    seen.clear()
    rows.restore(target / "other", progress=seen.append, dry_run=True)
    assert seen


@pytest.mark.parametrize(("is_remote", "threads", "count"), [(False, None, 2), (True, None, 4), (False, 3, 3)])
def test_several_batches_are_written_at_once(
    is_remote: bool, threads: int | None, count: int, rows: Rows, target: Path
) -> None:
    """So many threads meet in the contents, or the test would wait in vain."""
    meeting = threading.Barrier(count, timeout=30)

    class Meeting(MemoryContents):
        are_remote = is_remote

        def get_many(self, addresses: Any, /) -> list[bytes]:
            meeting.wait()
            return super().get_many(addresses)

    rows.contents = Meeting()
    for number in range(count * 512):
        rows.file(f"{number:04}", b"%d" % number)
    assert rows.restore(target, threads=threads).files == count * 512


def test_directories_are_opened_again_if_too_many_are_open(rows: Rows, target: Path) -> None:
    class Few(Target):
        open_folders_max = 3

    for number in range(40):
        rows.directory(f"d{number:02}")
        path = f"d{number:02}"
        for level in range(8):
            path += f"/{level}"
            rows.directory(path)
            rows.file(f"{path}/file", path.encode())
    before = descriptors()
    report = rows.restore(target, target=Few())
    assert not report.problems
    assert report.files == 320
    assert (target / "d39/0/1/2/3/4/5/6/7").stat().st_mtime_ns == WHEN_NS
    assert (target / "d39/0/1/2/3/4/5/6/7/file").read_bytes() == b"d39/0/1/2/3/4/5/6/7"
    assert descriptors() == before


def test_a_tree_deeper_than_descriptors_and_recursion_go_is_restored_and_removed(rows: Rows, target: Path) -> None:
    path = b""
    for _ in range(1100):
        path = path + b"/d" if path else b"d"
        rows.directory(path)
    rows.file(path + b"/file", b"deep")
    report = rows.restore(target, wanted=lambda _, is_directory: not is_directory)
    try:
        assert not report.problems
        assert (report.files, report.directories) == (1, 1100)
        assert (target / os.fsdecode(path) / "file").read_bytes() == b"deep"
    finally:
        report = Rows().restore(target, delete=True)  # Nobody else would get rid of it either.
    assert not report.problems
    assert report.deleted == 1101
    assert below(target) == []


@pytest.mark.parametrize("at_once", [True, False])
def test_what_was_restored_is_synced_unless_that_is_not_wanted(
    rows: Rows, target: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    class Watched(Target):
        syncs_at_once = at_once
        synced = 0

        def sync(self, descriptor: int) -> None:
            self.synced += 1
            super().sync(descriptor)

    synced: list[int] = []
    sync = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    rows.directory("a")
    rows.file("a/b")
    for durable in (True, False):
        watched = Watched()
        rows.restore(target, target=watched, durable=durable, overwrite="always")
        assert watched.synced == (0 if not durable else 1 if at_once else 2)
        assert len(synced) == (0 if at_once else 3)  # The file, its directory, the target.


def test_what_makes_no_sense_is_refused() -> None:
    options: list[dict[str, Any]] = [{"overwrite": "sometimes"}, {"owners": "mine"}, {"threads": 0}]
    for one in options:
        with pytest.raises(InvalidArgument):
            RestoreOptions(**one)

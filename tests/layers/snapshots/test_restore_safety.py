"""A restore never writes outside of its target, whatever the rows say and whatever somebody does there meanwhile."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from basin.errors import InvalidArgument
from basin.format.tree import RowKind
from basin.layers.snapshots.restore import RestoreOptions, restore
from basin.layers.snapshots.target import Target
from tests.layers.snapshots.restore_material import WHEN_NS, Rows, below, told


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Lies in a folder of its own: what is beside it can be looked at."""
    return tmp_path / "around" / "target"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder that must stay empty but for one file, which must stay as it is."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "theirs").write_bytes(b"theirs")
    os.utime(folder / "theirs", ns=(0, WHEN_NS))
    (folder / "theirs").chmod(0o604)
    before = (folder / "theirs").stat()
    yield folder
    assert below(folder) == ["theirs"]
    after = (folder / "theirs").stat()
    assert (folder / "theirs").read_bytes() == b"theirs"
    assert (before.st_mode, before.st_uid, before.st_mtime_ns) == (after.st_mode, after.st_uid, after.st_mtime_ns)


KINDS: dict[str, Callable[[Rows, bytes, bytes], Any]] = {
    "file": lambda rows, parent, name: rows.add(name, RowKind.FILE, parent=parent, size=1, key=rows.contents.put(b"x")),
    "directory": lambda rows, parent, name: rows.add(name, RowKind.DIRECTORY, parent=parent, mode=0o755),
    "link": lambda rows, parent, name: rows.add(name, RowKind.LINK, parent=parent, target=b"/etc"),
    "fifo": lambda rows, parent, name: rows.add(name, RowKind.FIFO, parent=parent),
}


@pytest.mark.parametrize("name", [b"", b".", b"..", b"../up", b"/abs", b"a/b", b"nul\0", b"..\0", b"x" * 5000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_leads_elsewhere_is_refused_and_the_rest_restored(
    rows: Rows, target: Path, name: bytes, kind: str
) -> None:
    rows.directory("folder")
    KINDS[kind](rows, b"folder", name)
    KINDS[kind](rows, b"", name)
    rows.file("good")
    rows.file("folder/good")
    report = rows.restore(target, overwrite="always")
    assert report.problem_count == 2
    assert all("no name" in error for error in told(report).values())
    assert below(target.parent) == ["target", "target/folder", "target/folder/good", "target/good"]


@pytest.mark.parametrize(
    "parent", [b"..", b"../..", b"/", b"/tmp", b"a/../..", b"a//b", b"a/", b".", b"a/./b", b"a\0b", b"a/\0"]
)
def test_a_parent_that_leads_elsewhere_is_refused(rows: Rows, target: Path, parent: bytes) -> None:
    rows.directory("a")
    rows.file("good")
    for number in range(3):
        rows.add(b"escaped%d" % number, RowKind.FILE, parent=parent, size=1, key=rows.contents.put(b"x"))
    report = rows.restore(target)
    assert report.problem_count == 1
    assert report.skipped == 3
    assert below(target.parent) == ["target", "target/a", "target/good"]


def test_a_name_that_stands_twice_is_refused(rows: Rows, target: Path) -> None:
    """A link, and then a file through it: the oldest trick."""
    rows.link("name", b"/etc")
    rows.directory("name")
    rows.file("name/passwd")
    rows.entries.sort(key=lambda one: one.path)
    report = rows.restore(target)
    assert told(report) == {"name": "the snapshot has this name twice"}
    assert report.skipped == 1
    assert (target / "name").is_symlink()


@pytest.mark.parametrize("options", [{}, {"delete": True}, {"overwrite": "never"}, {"verify": True}, {"dry_run": True}])
def test_a_link_where_a_directory_belongs_is_refused(
    rows: Rows, target: Path, outside: Path, options: dict[str, Any]
) -> None:
    rows.directory("folder", "folder/deeper")
    rows.file("folder/file")
    rows.file("folder/theirs", b"theirs", mode=0o777)
    rows.file("folder/deeper/file")
    rows.link("folder/link", b"x")
    rows.file("good")
    target.mkdir(parents=True)
    (target / "folder").symlink_to(outside)
    report = rows.restore(target, **options)
    assert told(report).keys() == {"folder"}
    assert "not followed" in told(report)["folder"]
    assert report.skipped == 5
    assert report.files == 1
    assert (target / "folder").readlink() == outside


def test_a_link_where_a_directory_belongs_is_replaced_if_all_is(rows: Rows, target: Path, outside: Path) -> None:
    rows.directory("folder")
    rows.file("folder/file")
    target.mkdir(parents=True)
    (target / "folder").symlink_to(outside)
    assert not rows.restore(target, overwrite="always").problems
    assert not (target / "folder").is_symlink()
    assert (target / "folder/file").read_bytes() == b"content"


def test_a_link_where_a_file_belongs_is_replaced_and_not_followed(rows: Rows, target: Path, outside: Path) -> None:
    rows.file("file", b"theirs", mode=0o777)
    target.mkdir(parents=True)
    (target / "file").symlink_to(outside / "theirs")
    assert not rows.restore(target).problems
    assert not (target / "file").is_symlink()
    assert stat.S_IMODE((target / "file").stat().st_mode) == 0o777


def test_the_metadata_of_a_link_is_not_that_of_what_it_leads_to(rows: Rows, target: Path, outside: Path) -> None:
    rows.link("link", os.fsencode(outside / "theirs"), mtime_ns=5)
    rows.restore(target)
    rows.entries.clear()
    rows.link("link", os.fsencode(outside / "theirs"), mtime_ns=6)
    assert not rows.restore(target).problems
    assert (target / "link").lstat().st_mtime_ns == 6


@pytest.mark.parametrize("verify", [False, True])
def test_a_file_that_has_a_name_outside_is_not_changed_in_place(
    rows: Rows, target: Path, outside: Path, verify: bool
) -> None:
    """It agrees in size and time, so only its mode would be set: on an inode that is somebody else's."""
    rows.file("file", b"theirs", mode=0o777)
    target.mkdir(parents=True)
    (target / "file").hardlink_to(outside / "theirs")
    assert not rows.restore(target, verify=verify).problems
    assert stat.S_IMODE((target / "file").stat().st_mode) == 0o777
    assert (target / "file").stat().st_nlink == 1


def test_the_target_itself_may_be_reached_through_a_link(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    rows.file("file")
    assert not rows.restore(tmp_path / "link").problems
    assert below(tmp_path / "real") == ["file"]


# --- names that differ in case ----------------------------------------------------------------------------------------


class WithoutCase(Target):
    """As on a file system that ignores case; counts how often that was asked."""

    asked = 0

    def ignores_case(self, folder: int) -> bool:
        self.asked += 1
        assert not super().ignores_case(folder)
        return True


@pytest.mark.parametrize("names", [("Name", "name"), ("STRASSE ä", "strasse Ä"), ("\u00e9", "e\u0301")])
def test_of_names_that_differ_in_case_only_the_first_is_restored(
    rows: Rows, target: Path, names: tuple[str, str]
) -> None:
    first, second = sorted(names, key=os.fsencode)
    rows.file(first, b"first")
    rows.file(second, b"second")
    rows.file("another")
    without = WithoutCase()
    report = rows.restore(target, target=without)
    assert told(report).keys() == {second}
    assert first in told(report)[second]
    assert below(target) == sorted([first, "another"])
    assert without.asked == 1


def test_a_directory_that_differs_in_case_only_is_refused_with_all_below(rows: Rows, target: Path) -> None:
    rows.directory("Folder", "folder")
    rows.file("Folder/file", b"first")
    rows.file("folder/file", b"second")
    report = rows.restore(target, target=WithoutCase())
    assert told(report).keys() == {"folder"}
    assert report.skipped == 1
    assert (target / "Folder/file").read_bytes() == b"first"


def test_where_case_counts_both_are_restored_and_nothing_is_probed_without_need(rows: Rows, target: Path) -> None:
    class Counting(WithoutCase):
        def ignores_case(self, folder: int) -> bool:
            self.asked += 1
            return Target.ignores_case(self, folder)

    counting = Counting()
    rows.directory("plain", "twins")
    rows.file("plain/a")
    rows.file("twins/A", b"upper")
    rows.file("twins/a", b"lower")
    assert not rows.restore(target, target=counting).problems
    assert counting.asked == 1
    assert (target / "twins/A").read_bytes() == b"upper"
    assert (target / "twins/a").read_bytes() == b"lower"
    assert below(target) == ["plain", "plain/a", "twins", "twins/A", "twins/a"]


def test_what_is_there_in_another_case_is_not_removed_as_a_stranger(rows: Rows, target: Path) -> None:
    rows.file("name")
    target.mkdir(parents=True)
    (target / "NAME").write_bytes(b"")
    assert rows.restore(target, delete=True, target=WithoutCase()).deleted == 0
    assert rows.restore(target, delete=True).deleted == 1


# --- races ------------------------------------------------------------------------------------------------------------


@contextmanager
def swapping(folder: Path, outside: Path) -> Iterator[list[int]]:
    """A thread that puts a link in the place of a folder and takes it away again, until the body ends.

    The list holds how often it did.
    """
    away = folder.with_name(folder.name + ".away")
    swaps = [0]
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            with suppress(OSError):
                folder.rename(away)
            with suppress(OSError):
                folder.symlink_to(outside)
            with suppress(OSError):
                folder.unlink()
            with suppress(OSError):
                away.rename(folder)
                swaps[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield swaps
    finally:
        ended.set()
        thread.join()


class FewFolders(Target):
    """Opens directories again and again, so that every file is a chance to be led astray."""

    open_folders_max = 1


@pytest.mark.parametrize("overwrite", ["differing", "always", "never"])
@pytest.mark.parametrize("kind", [Target, FewFolders])
def test_a_thread_that_swaps_a_directory_for_a_link_leads_nothing_outside(
    rows: Rows, target: Path, outside: Path, kind: type[Target], overwrite: str
) -> None:
    rows.directory("folder", *(f"folder/{number:02}" for number in range(30)))
    for number in range(600):
        rows.file(f"folder/{number % 30:02}/f{number:03}", b"%d" % number)
        rows.link(f"folder/{number % 30:02}/l{number:03}", b"x")
    for number in range(300):
        rows.file(f"folder/{number:03}", b"%d" % number, mode=0o600)
    (target / "folder").mkdir(parents=True)
    (target / "folder/000").write_bytes(b"older")
    with swapping(target / "folder", outside) as swaps:
        while swaps[0] < 20:
            rows.restore(target, target=kind(), overwrite=overwrite, delete=True, durable=False)
    rest = rows.restore(target)
    assert not rest.problems
    assert (target / "folder/29/f599").read_bytes() == b"599"


def test_a_directory_swapped_between_making_and_opening_is_not_entered(rows: Rows, target: Path, outside: Path) -> None:
    """The same race, with its moment chosen: right behind `mkdir`."""

    class Swapped(Target):
        def make_directory(self, folder: int, name: bytes, *, mode: int) -> None:
            super().make_directory(folder, name, mode=mode)
            self.remove_directory(folder, name)
            self.make_link(folder, name, target=os.fsencode(outside))

    rows.directory("folder", "folder/below")
    rows.file("folder/file")
    rows.file("folder/below/file")
    rows.link("folder/link", b"x")
    report = rows.restore(target, target=Swapped())
    assert report.files == report.others == 0
    assert "not followed" in told(report)["folder/file"]


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_something_slipped_in_under_a_new_name_gets_no_metadata(
    rows: Rows, target: Path, outside: Path, tmp_path: Path, kind: str
) -> None:
    """A link, or another name of what lies elsewhere, in the place of what was just made."""

    class Slipped(Target):
        def make_node(self, folder: int, name: bytes, *, mode: int, device: tuple[int, int]) -> None:
            if kind == "link":
                self.make_link(folder, name, target=os.fsencode(outside / "theirs"))
            else:
                os.link(theirs[kind], name, dst_dir_fd=folder)

    theirs = {"file": outside / "theirs", "fifo": tmp_path / "fifo"}
    os.mkfifo(theirs["fifo"], 0o600)
    target.mkdir(parents=True)
    rows.add("fifo", RowKind.FIFO, mode=0o777)
    report = rows.restore(target, target=Slipped())
    assert "something else" in told(report)["fifo"]
    assert stat.S_IMODE(theirs["fifo"].stat().st_mode) == 0o600
    assert below(target) == []


def test_a_directory_that_stands_where_one_was_to_be_new_is_not_overwritten_through_links(
    rows: Rows, target: Path, outside: Path
) -> None:
    """Somebody is faster in a directory of ours: links with the names of our files, right after it is made."""

    class Faster(Target):
        def make_directory(self, folder: int, name: bytes, *, mode: int) -> None:
            super().make_directory(folder, name, mode=mode)
            descriptor = self.open_directory(folder, name)
            self.make_link(descriptor, b"file", target=os.fsencode(outside / "theirs"))
            self.make_link(descriptor, b"new", target=os.fsencode(outside / "new"))
            self.make_link(descriptor, b"fifo", target=os.fsencode(outside / "theirs"))
            os.close(descriptor)

    rows.directory("folder")
    rows.file("folder/file", b"ours")
    rows.file("folder/new", b"ours")
    rows.add("folder/fifo", RowKind.FIFO)
    assert not rows.restore(target, target=Faster()).problems
    assert below(target) == ["folder", "folder/fifo", "folder/file", "folder/new"]
    assert (target / "folder/file").read_bytes() == b"ours"
    assert not (target / "folder/new").is_symlink()


def test_rows_out_of_order_end_the_restore_before_anything_is_removed(rows: Rows, target: Path) -> None:
    rows.directory("a", "b")
    rows.file("a/one")
    rows.file("b/two")
    rows.restore(target)
    late = [*rows, rows.entries[-2]]
    with pytest.raises(InvalidArgument, match="tree order"):
        restore(late, rows.contents, os.fsencode(target), RestoreOptions(delete=True))
    assert below(target) == ["a", "a/one", "b", "b/two"]

"""Restoring contents: fetched together, damaged ones, large ones and holes, hard links."""

from __future__ import annotations

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from basin.errors import CorruptionError, OutOfSpace, StorageUnavailable
from basin.layers.snapshots.attributes import HAS_HOLES
from basin.layers.snapshots.target import Target
from basin.terms import ContentKey
from tests.layers.snapshots.restore_material import PART_SIZE, WHEN_NS, MemoryContents, Rows, below, told


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


# --- contents ---------------------------------------------------------------------------------------------------------


def test_small_files_are_fetched_together_and_equal_ones_once(rows: Rows, target: Path) -> None:
    for number in range(700):
        rows.file(f"f{number:03}", b"%d" % (number % 100))
    assert rows.restore(target).files == 700
    assert sum(rows.contents.batches) == 200
    assert len(rows.contents.batches) == 2


def test_one_content_that_cannot_be_read_does_not_take_others_along(rows: Rows, target: Path) -> None:
    rows.directory("new")
    for name in ("a", "b", "c"):
        rows.file(f"new/{name}", name.encode())
    bad = rows.file("new/bad", b"bad")
    assert bad.key is not None
    rows.contents.broken[bad.key] = CorruptionError("the grain is damaged")
    report = rows.restore(target)
    assert told(report) == {"new/bad": "the grain is damaged"}
    assert (report.files, report.damage_count) == (3, 1)
    assert below(target) == ["new", "new/a", "new/b", "new/c"]


def test_a_content_of_another_size_than_the_row_says_is_damage(rows: Rows, target: Path) -> None:
    small = rows.file("small", b"12345")
    large = rows.file("large", bytes(PART_SIZE + 5))
    rows.entries = [small._replace(size=4), large._replace(size=large.size + 1), small._replace(name=b"none", key=None)]
    report = rows.restore(target)
    assert set(told(report)) == {"small", "large", "none"}
    assert report.damage_count == 3
    assert below(target) == []


def test_storage_that_is_away_ends_the_restore(rows: Rows, target: Path) -> None:
    row = rows.file("file")
    assert row.key is not None
    rows.contents.broken[row.key] = StorageUnavailable("no answer")
    with pytest.raises(StorageUnavailable):
        rows.restore(target)
    assert below(target) == []


def test_a_full_target_ends_the_restore(rows: Rows, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    rows.file("file")
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutOfSpace):
        rows.restore(target)
    assert below(target) == []


def test_metadata_that_is_damaged_concerns_its_row_only(rows: Rows, target: Path) -> None:
    rows.file("good")
    rows.file("bad")
    rows.entries[-1] = rows.entries[-1]._replace(meta=b"short")
    report = rows.restore(target)
    assert set(told(report)) == {"bad"}
    assert below(target) == ["good"]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_large_files_are_streamed_and_their_zero_parts_are_not_read(rows: Rows, target: Path) -> None:
    content = b"head" + bytes(3 * PART_SIZE) + b"tail" * 1000 + bytes(PART_SIZE)
    aligned = os.urandom(PART_SIZE) + bytes(2 * PART_SIZE) + b"t" * 777 + bytes(PART_SIZE - 777) + bytes(999)
    rows.file("shifted", content)
    rows.file("aligned", aligned)
    report = rows.restore(target, verify=True)
    assert not report.problems
    assert (target / "shifted").read_bytes() == content
    assert (target / "aligned").read_bytes() == aligned
    assert allocated(target / "aligned") <= 2 * PART_SIZE + 65536
    assert rows.contents.read_size <= len(content) + 2 * PART_SIZE
    rows.contents.read_size = 0
    rows.restore(target, overwrite="always", sparse=False)
    assert allocated(target / "aligned") >= len(aligned)
    assert rows.contents.read_size == len(content) + len(aligned)
    assert (target / "aligned").read_bytes() == aligned


@pytest.mark.parametrize("size", [100_000, PART_SIZE + 12_345])
def test_a_file_that_had_holes_gets_them_again(rows: Rows, target: Path, size: int) -> None:
    content = bytearray(size)
    for at in (0, 5000, 40_000, size - 1):
        content[at] = 1
    rows.file("holes", bytes(content), flags=HAS_HOLES)
    rows.file("zeros", bytes(content[:100_000]))
    assert not rows.restore(target, verify=True).problems
    assert (target / "holes").read_bytes() == content
    assert (target / "zeros").read_bytes() == content[:100_000]
    assert 4 * 4096 <= allocated(target / "holes") <= 6 * 4096
    assert allocated(target / "zeros") >= 100_000 // 4096 * 4096
    assert (target / "holes").stat().st_size == size


def test_a_file_of_nothing_but_a_hole(rows: Rows, target: Path) -> None:
    rows.file("hole", bytes(3 * PART_SIZE), flags=HAS_HOLES)
    rows.file("small hole", bytes(10_000), flags=HAS_HOLES)
    assert not rows.restore(target, verify=True).problems
    assert allocated(target / "hole") == allocated(target / "small hole") == 0
    assert (target / "hole").stat().st_size == 3 * PART_SIZE
    assert rows.contents.read_size == 0


# --- hard links -------------------------------------------------------------------------------------------------------


def linked(rows: Rows, *paths: str, content: bytes = b"shared", count: int = 0, **options: Any) -> None:
    for path in paths:
        rows.file(path, content, linked=(5, count or len(paths)), **{"inode": 77} | options)


def same(target: Path, *paths: str) -> bool:
    return len({(target / path).lstat().st_ino for path in paths}) == 1


def test_hard_links_are_made_again(rows: Rows, target: Path) -> None:
    rows.directory("a", "b")
    linked(rows, "a/one", "b/two", "three")
    linked(rows, "b/other", "b/same", inode=78)
    report = rows.restore(target)
    assert not report.problems
    assert (report.files, report.hard_links, report.size) == (2, 3, 12)
    assert same(target, "a/one", "b/two", "three")
    assert same(target, "b/other", "b/same")
    assert not same(target, "three", "b/same")
    assert (target / "b").stat().st_mtime_ns == WHEN_NS
    report = rows.restore(target)
    assert (report.files, report.hard_links, report.unchanged) == (0, 0, 5)
    (target / "b/two").unlink()
    (target / "b/two").write_bytes(b"shared")
    assert rows.restore(target).hard_links == 1
    assert same(target, "a/one", "b/two", "three")
    assert sorted(below(target)) == below(target) == ["a", "a/one", "b", "b/other", "b/same", "b/two", "three"]


def test_hard_links_of_links_are_made_again(rows: Rows, target: Path) -> None:
    for path in ("one", "two"):
        rows.link(path, b"nowhere", linked=(5, 2), inode=9)
    assert not rows.restore(target).problems
    assert same(target, "one", "two")
    assert (target / "two").readlink() == Path("nowhere")


def test_a_hard_link_waits_for_a_large_file_and_so_does_its_directory(rows: Rows, target: Path) -> None:
    class Slow(MemoryContents):
        def open(self, address: ContentKey, /) -> io.BytesIO:
            time.sleep(0.1)
            return super().open(address)

    rows.contents = Slow()
    rows.directory("a")
    linked(rows, "a/one", "a/two", content=b"x" * (PART_SIZE + 1))
    report = rows.restore(target)
    assert (report.files, report.hard_links) == (1, 1)
    assert same(target, "a/one", "a/two")
    assert (target / "a").stat().st_mtime_ns == WHEN_NS


def test_a_hard_link_whose_first_is_not_wanted_is_written(rows: Rows, target: Path) -> None:
    linked(rows, "one", "two", "zzz")
    report = rows.restore(target, wanted=lambda path, _: path != b"one")
    assert (report.files, report.hard_links) == (1, 1)
    assert same(target, "two", "zzz")


def test_a_hard_link_whose_first_fails_is_written(rows: Rows, target: Path) -> None:
    """Also where an older file stands in the first one's place: its content must not be taken for the snapshot's."""
    linked(rows, "one", "two", "zzz")
    (target / "one/full").mkdir(parents=True)
    report = rows.restore(target)
    assert set(told(report)) == {"one"}
    assert (report.files, report.hard_links) == (1, 1)
    assert (target / "two").read_bytes() == b"shared"
    assert same(target, "two", "zzz")


def test_a_first_link_that_somebody_replaced_is_not_linked_to(rows: Rows, target: Path) -> None:
    class Replaced(Target):
        def replace(self, folder: int, name: bytes, *, source: bytes) -> None:
            super().replace(folder, name, source=source)
            if name == b"one":
                (target / "new").write_bytes(b"theirs")
                (target / "new").rename(target / "one")

    target.mkdir()
    linked(rows, "one", "two", "zzz")
    report = rows.restore(target, target=Replaced())
    assert (target / "two").read_bytes() == b"shared"
    assert same(target, "two", "zzz")
    assert (report.files, report.hard_links) == (2, 1)


def test_a_hard_link_to_what_was_kept_is_not_made(rows: Rows, target: Path) -> None:
    linked(rows, "one", "two")
    target.mkdir()
    (target / "one").write_bytes(b"mine")
    report = rows.restore(target, overwrite="never")
    assert (target / "one").read_bytes() == b"mine"
    assert (target / "two").read_bytes() == b"shared"
    assert (report.kept, report.files) == (1, 1)


def test_where_there_are_no_hard_links_files_are_written(rows: Rows, target: Path) -> None:
    class Without(Target):
        def make_hard_link(self, folder: int, name: bytes, *, source_folder: int, source: bytes) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    linked(rows, "one", "two", "zzz")
    report = rows.restore(target, target=Without())
    assert not report.problems
    assert (report.files, report.hard_links, report.warning_count) == (3, 0, 2)
    assert (target / "zzz").read_bytes() == b"shared"

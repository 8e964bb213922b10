"""What was backed up and restored is what it was, and the handle's own contents serve several threads."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from basin.layers.snapshots.restore import RestoreOptions
from tests.layers.snapshots.material import inside, opened, seen, settle
from tests.layers.snapshots.restore_material import below


def grow(top: Path, dice: random.Random) -> None:
    """A tree of everything that a user may make."""
    (top / "deep/er/still").mkdir(parents=True)
    (top / "empty").mkdir(mode=0o700)
    for number in range(300):
        path = top / ("deep" if number % 2 else "deep/er") / f"file{number:03}"
        path.write_bytes(dice.randbytes(dice.randrange(3000)))
        path.chmod(dice.choice([0o600, 0o644, 0o755, 0o444]))
    (top / "large").write_bytes(dice.randbytes(9 << 20))
    with (top / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(20 << 20)
        file.write(b"end")
    (top / os.fsdecode(b"odd\xff\n")).write_bytes(b"odd")
    (top / "link").symlink_to("deep/file001")
    (top / "one").hardlink_to(top / "large")
    (top / "deep/er/two").hardlink_to(top / "large")
    os.mkfifo(top / "fifo", 0o640)
    os.utime(top / "deep/file001", ns=(5, 5))
    os.utime(top / "deep/er", ns=(7, 7))
    (top / "deep/er/still").chmod(0o555)


@pytest.mark.parametrize("verify", [False, True])
def test_a_tree_is_restored_as_it_was(tmp_path: Path, verify: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    grow(source, random.Random(7))
    settle()
    with opened(tmp_path / "basin") as db:
        snapshot = db.snapshots.create(source)
        report = snapshot.restore(target, source, RestoreOptions(verify=verify))
        assert not report.problems
        assert not report.warnings
        assert seen(target) == seen(source)
        assert (target / "sparse").stat().st_blocks * 512 < 1 << 20
        assert report.files + report.hard_links == sum(row.key is not None for row in inside(snapshot, source).values())
        (target / "deep/er/still").chmod(0o755)
        (target / "deep/er/still/extra").write_bytes(b"")
        (target / "link").unlink()
        (target / "large").write_bytes(b"changed")
        report = snapshot.restore(target, source, RestoreOptions(delete=True, verify=verify))
        assert seen(target) == seen(source)
        assert (report.files, report.deleted, report.others, report.problem_count) == (1, 1, 1, 0)


def test_a_single_file_and_a_whole_snapshot(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(b"x")
    with opened(tmp_path / "basin") as db:
        snapshot = db.snapshots.create(source)
        assert not snapshot.restore(tmp_path / "one", source / "file").problems
        assert not snapshot.restore(tmp_path / "all").problems
    assert below(tmp_path / "one") == ["file"]
    assert (tmp_path / "all" / str(source)[1:] / "file").read_bytes() == b"x"

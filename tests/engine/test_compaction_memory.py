"""What a compaction holds in memory, and for how long."""

from __future__ import annotations

from pathlib import Path

import basin
from basin.engine.memory import give_memory_back
from basin.engine.merging import flush
from basin.format.layout import MIB

PIECE = 4000
"""More than Python's own allocator deals with, less than what has pages of its own."""


def resident() -> int:
    """Bytes of memory that this process has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


def leave_holes(size: int) -> list[bytes]:
    """Free `size` bytes between pieces that stay. Returns those."""
    pieces = [bytes([number % 251]) * PIECE for number in range(size // PIECE)]
    return pieces[::20]


def test_a_step_begins_without_what_those_before_it_have_freed(tmp_path: Path) -> None:
    with basin.open(tmp_path / "basin", profile="open", history_s=0.0) as db:
        db[b"name"] = b"value"
        db.commit()
        give_memory_back()
        staying = leave_holes(64 * MIB)
        before = resident()
        db.compact(grace_s=0)
        after = resident()
        assert sum(map(len, staying)) < before - after - 32 * MIB


def test_a_merge_after_a_mark_makes_a_filter_for_the_names_that_stay(tmp_path: Path) -> None:
    count = 12_000
    with basin.open(tmp_path / "basin", profile="open", history_s=0.0) as db:
        for start, stop in ((0, count), (0, count * 3 // 4)):
            db.put_many([(b"name %06d" % number, b"value of %d" % stop) for number in range(start, stop)])
            db.commit()
            assert flush(db.core)
        assert sum(run.run.entries for run in db.core.current.tables.runs) == count * 7 // 4
        db.compact(grace_s=0)
        (run,) = db.core.current.tables.runs
        assert run.run.entries == count
        words = run.directory.filter_words
        assert words is not None
        assert len(words) < 1.1 * count / 6  # For all entries it would have 1.75 times as many.
        wrong = sum(run.directory.may_contain(b"\0\0\0\0other %06d" % number) for number in range(count))
        assert wrong < 0.04 * count

"""Memory of a backup does not grow with the number of files: the first one's, and that of one that reads nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.source_tree import ROOT

FEW, MANY = 60_000, 240_000
"""Few are enough to fill what is kept of pages and of the journal."""
GROWTH_MAX_MIB = 24
"""The rows of those that are more take 100 MiB as Python objects."""
PROGRAM = """
import os, resource, sys
import basin
from basin.layers.snapshots import create, reading
from basin.layers.snapshots.attributes import attributes_of
from basin.layers.snapshots.scan import Found

count = int(sys.argv[2])
FOLDER = os.stat_result((0o40755, 1, 1, 2, 0, 0, 0, 5, 5, 5), {"st_mtime_ns": 5, "st_ctime_ns": 5, "st_blocks": 0})

def scan(*_paths, **_options):
    folders = [b"%05d" % number for number in range(count // 1000)]
    yield [Found(b"", name, 1, FOLDER, b"/" + name, attributes_of(FOLDER)) for name in folders]
    for folder in folders:
        found = []
        for number in range(1000):
            stat = os.stat_result(
                (0o100644, number, 1, 1, 0, 0, 9, 5, number, number),
                {"st_mtime_ns": number, "st_ctime_ns": number * 1000, "st_blocks": 8},
            )
            name = b"a name of usual length %04d" % number
            found.append(Found(folder, name, 0, stat, b"/" + folder + b"/" + name, attributes_of(stat)))
        yield found

create.scan = scan
reading.read_one = lambda found: reading.Content(b"%09d" % (found.stat.st_ino % 50), found.meta, is_changed=False)
with basin.open(sys.argv[1], "c", profile="open", reserve_size=0, sync_interval_s=5.0) as db:
    snapshot = db.snapshots.create("/anything", host="one")
assert snapshot.statistics.files == count, snapshot.statistics
print(snapshot.statistics.read_files, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def backed_up(folder: Path, count: int) -> tuple[int, int]:
    """How many files a backup read, and the peak of its memory in MiB."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(count)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, memory = done.stdout.split()
    return int(read), int(memory)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    first = [backed_up(few, FEW), backed_up(many, MANY)]
    again = [backed_up(few, FEW), backed_up(many, MANY)]
    print(f"peak memory in MiB: first backup {first}, unchanged {again}")
    assert [read for read, _ in first] == [FEW, MANY]
    assert [read for read, _ in again] == [0, 0]
    for small, large in (first, again):
        assert large[1] - small[1] <= GROWTH_MAX_MIB

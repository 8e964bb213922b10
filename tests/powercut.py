"""Real power cuts: `nox -s powercut` (needs root, and `mkfs.ext4` and `mkfs.xfs`).

A file system in a loop file is shut down by its own ioctl while several processes write a basin on it: what was not
synced is lost, every later call fails. Then it is mounted again, which replays its journal, and the basin is opened:
every commit that a writer reported through a pipe, after `batch()` had returned, must be there, whole; what else is
there must be whole too, and nothing that was once found may be missing later.

The machine does not boot in between, so the engine sees the boot id it knows, and a watermark that may be older than
the log: exactly what a pulled USB disk leaves. The test changes nothing about that. Readers come before writers,
because a reader repairs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

import basin
from basin.api import Database
from basin.errors import BasinError

SHUTDOWN: Final = 0x8004587D
"""_IOR('X', 125, __u32): XFS_IOC_GOINGDOWN, which ext4 knows as EXT4_IOC_SHUTDOWN."""
FLUSH_LOG: Final = 1
FLUSH_NOTHING: Final = 2
FILE_SYSTEMS: Final = {"ext4": ("64M", ["mkfs.ext4", "-q", "-F"]), "xfs": ("320M", ["mkfs.xfs", "-q", "-f"])}
CUTS_A_FILE_SYSTEM: Final = 25
"""After so many cuts a new file system is made, so that small and large basins are met."""
WRITERS: Final = 3
NAMES_A_COMMIT: Final = 4
OPTIONS: Final[dict[str, Any]] = {
    "memtable_size": 32 << 10,
    "stratum_size": 128 << 10,
    "reserve_size": 0,
    "lock_timeout_s": 60.0,
}
_REPORT: Final = struct.Struct("<QQ")  # (writer, commit), written in one piece: below PIPE_BUF

Writer = int


def value_of(writer: Writer, commit: int, place: int) -> bytes:
    """What a commit stores under its name number `place`: inline for some, content of its own for others."""
    size = (40, 200, 700, 5000)[place]
    return blake3(b"%d %d %d" % (writer, commit, place)).digest(size)


def name_of(writer: Writer, commit: int, place: int) -> bytes:
    """A name of a commit; names of one writer sort in the order of its commits."""
    return b"%08d/%08d/%d" % (writer, commit, place)


def write(folder: Path, secret: basin.Secret, writer: Writer, pipe: int) -> None:
    """A writer process: commit, report, until the disk is gone."""
    with basin.open(folder, "w", secret=secret, **OPTIONS) as database:
        commit = 0
        while True:
            with database.batch() as batch:
                for place in range(NAMES_A_COMMIT):
                    batch[name_of(writer, commit, place)] = value_of(writer, commit, place)
                batch.blobs.put(b"content of %d %d" % (writer, commit))
            os.write(pipe, _REPORT.pack(writer, commit))
            commit += 1


@dataclass
class Expected:
    """For each writer how many commits it reported; `found` how many were there when somebody last looked."""

    reported: dict[Writer, int] = field(default_factory=dict)
    found: dict[Writer, int] = field(default_factory=dict)

    def check(self, database: Database) -> list[str]:
        """What is missing or wrong; empty if all is well. Remembers what is there."""
        names = dict(database.scan())
        roots = set(database.blobs)
        problems = []
        found: dict[Writer, int] = {}
        for writer, reported in self.reported.items():
            commit = 0
            while name_of(writer, commit, 0) in names:
                places = range(NAMES_A_COMMIT)
                stored = [names.pop(name_of(writer, commit, place), None) for place in places]
                if stored != [value_of(writer, commit, place) for place in places]:
                    problems.append(f"commit {commit} of writer {writer} is not whole")
                content = b"content of %d %d" % (writer, commit)
                key = basin.ContentKey(blake3(content).digest())
                if key not in roots or database.blobs[key] != content:
                    problems.append(f"the content of commit {commit} of writer {writer} is missing")
                commit += 1
            found[writer] = commit
            wanted = max(reported, self.found.get(writer, 0))
            if commit < wanted:
                problems.append(f"writer {writer}: {wanted} commits were acknowledged, {commit} are there")
        if names:
            problems.append(f"{len(names)} names of commits that never were, as {min(names)!r}")
        self.found = found
        return problems


class Disk:
    """A file system in a loop file."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.image = folder / f"{kind}.img"
        self.mount_point = folder / f"{kind}.mounted"
        self.mount_point.mkdir(exist_ok=True)
        self.mounted = False

    def make(self) -> None:
        """A new, empty file system."""
        size, command = FILE_SYSTEMS[self.kind]
        self.image.unlink(missing_ok=True)
        subprocess.run(["truncate", "-s", size, self.image], check=True)
        subprocess.run([*command, self.image], check=True)

    def mount(self) -> None:
        """Mount it, replaying its journal."""
        subprocess.run(["mount", "-o", "loop", self.image, self.mount_point], check=True)
        self.mounted = True

    def unmount(self) -> None:
        """Unmount it; nobody may have files open."""
        if self.mounted:
            subprocess.run(["umount", self.mount_point], check=True)
            self.mounted = False

    def cut(self, flag: int) -> None:
        """From now on nothing reaches the disk."""
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", flag))
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def writers(folder: Path, secret: basin.Secret, numbers: range, expected: Expected) -> Iterator[None]:
    """Run writer processes; at the end kill them, and read what they had reported until then."""
    reading, writing = os.pipe()
    processes = []
    for writer in numbers:
        expected.reported[writer] = 0
        process = os.fork()
        if process == 0:
            os.close(reading)
            _become_writer(folder, secret, writer, writing)
        processes.append(process)
    os.close(writing)
    reader = threading.Thread(target=_read_reports, args=(reading, expected))
    reader.start()
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        reader.join()
        os.close(reading)


def _become_writer(folder: Path, secret: basin.Secret, writer: Writer, pipe: int) -> None:
    """In the child: never returns. An error is what a disk that is gone gives."""
    try:
        write(folder, secret, writer, pipe)
    except BasinError:
        pass
    finally:
        os._exit(0)


def _read_reports(pipe: int, expected: Expected) -> None:
    while report := os.read(pipe, _REPORT.size):
        writer, commit = _REPORT.unpack(report)
        expected.reported[writer] = max(expected.reported[writer], commit + 1)


def look(folder: Path, secret: basin.Secret, expected: Expected, *, damage_too: bool) -> list[str]:
    """What a reader finds wrong, then a writer, then (with `damage_too`) `check`."""
    problems: list[str] = []
    try:
        with basin.open(folder, "r", secret=secret, **OPTIONS) as database:
            problems += [f"reader: {problem}" for problem in expected.check(database)]
        with basin.open(folder, "w", secret=secret, **OPTIONS) as database:
            with database.batch() as batch:
                batch.keyspace("looks")[b"last"] = b"here"
            problems += [f"writer: {problem}" for problem in expected.check(database)]
            if damage_too:
                problems += [str(one) for one in database.check() if one.severity == "damage"]
    except BasinError as error:
        problems.append(f"{type(error).__name__}: {error}")
    return problems


def cut_power(kind: str, cuts: int, draw: random.Random, folder: Path) -> int:
    """Cut the power of one kind of file system so many times; returns in how many cases something was wrong."""
    disk = Disk(kind, folder)
    secret = basin.Secret.generate()
    basin_folder = disk.mount_point / "basin"
    expected = Expected()
    acknowledged = bad = 0
    begin = time.monotonic()
    try:
        for number in range(cuts):
            if number % CUTS_A_FILE_SYSTEM == 0:
                disk.unmount()
                disk.make()
                disk.mount()
                expected = Expected()
                basin.open(basin_folder, "x", secret=secret, **OPTIONS).close()
            before = sum(expected.reported.values())
            first = number * WRITERS
            with writers(basin_folder, secret, range(first, first + WRITERS), expected):
                time.sleep(draw.uniform(0.02, 0.6))
                disk.cut(FLUSH_LOG if draw.random() < 0.25 else FLUSH_NOTHING)
            disk.unmount()
            disk.mount()
            acknowledged += sum(expected.reported.values()) - before
            problems = look(basin_folder, secret, expected, damage_too=number % 5 == 0)
            bad += bool(problems)
            for problem in problems[:5]:
                print(f"{kind}, cut {number + 1}: {problem}", flush=True)
            if (number + 1) % CUTS_A_FILE_SYSTEM == 0 or number + 1 == cuts:
                print(
                    f"{kind}: {number + 1} power cuts, {acknowledged:,} acknowledged commits, "
                    f"{bad} cuts after which something was missing or wrong, {time.monotonic() - begin:.0f} s",
                    flush=True,
                )
    finally:
        disk.unmount()
    return bad


def main() -> int:
    """Run it; the exit code says whether everything was there."""
    parser = argparse.ArgumentParser(
        description="Real power cuts on loop mounts, under a workload of several processes"
    )
    parser.add_argument("--cuts", type=int, default=200, help="power cuts for each file system")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("file_systems", nargs="*", default=list(FILE_SYSTEMS), metavar="ext4|xfs")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("power cuts need root: file systems are mounted and shut down")
        return 2
    print(f"seed {arguments.seed}, {WRITERS} writer processes")
    folder = Path(tempfile.mkdtemp(prefix="basin-powercut-"))
    try:
        draw = random.Random(arguments.seed)
        bad = sum(cut_power(kind, arguments.cuts, draw, folder) for kind in arguments.file_systems)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{bad} bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Backups that are killed, each in a process of its own.

`python -m tests.layers.snapshots.kills FOLDER TREE ROUNDS SEED [STORAGE_OPTIONS]`, where the options are JSON: every
round makes a basin, has a child back the tree up until it is killed at a random point, and another one finish. One line
of JSON tells of each. The children are forked before this process has any thread.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import basin
from basin.layers.blobs import FileSource
from basin.layers.snapshots import reading

JOURNAL_SIZE = 512 << 10
OPTIONS: dict[str, Any] = {"reserve_size": 0, "grace_s": 3600.0}
_COUNT = struct.Struct("<Q")


class Shared:
    """A number that a child leaves behind, however it ends."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, _COUNT.size)
        self._lock = threading.Lock()

    @property
    def value(self) -> int:
        (value,) = _COUNT.unpack(self._map[: _COUNT.size])
        return int(value)

    def add(self, size: int) -> None:
        with self._lock:
            self._map[: _COUNT.size] = _COUNT.pack(self.value + size)

    def clear(self) -> None:
        self._map[: _COUNT.size] = _COUNT.pack(0)


def count_reads(count: Callable[[int], None]) -> None:
    """Tell `count` every byte that is read of a file that is backed up."""
    read_one, read_into = reading.read_one, FileSource.read_into

    def read_whole(found: Any) -> Any:
        content = read_one(found)
        count(len(content.data))
        return content

    def read_piece(self: FileSource, buffer: memoryview) -> int:
        size = read_into(self, buffer)
        count(size)
        return size

    reading.read_one = read_whole
    FileSource.read_into = read_piece  # type: ignore[method-assign]  # for this process


def child(work: Callable[[], None]) -> int:
    """Run `work` in a process of its own; how that ended."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def back_up(url: str, tree: str, secret: basin.Secret, read: Shared, kill_at: int | None, delay_s: float = 0.0) -> None:
    """One backup; killed so long after so much was read."""

    def count(size: int) -> None:
        read.add(size)
        if kill_at is not None and read.value >= kill_at:
            threading.Thread(target=kill, daemon=True).start()

    def kill() -> None:
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGKILL)

    count_reads(count)
    with basin.open(url, mode="w", secret=secret, job="backup", **OPTIONS) as db:
        if kill_at == 0:
            kill()
        db.snapshots.create(tree, journal_size=JOURNAL_SIZE)


def main(folder: str, tree: str, rounds: int, seed: int, storage_options: str = "{}") -> None:
    OPTIONS["storage_options"] = json.loads(storage_options)
    source = random.Random(seed)
    total = sum(path.stat().st_size for path in Path(tree).rglob("*") if path.is_file() and not path.is_symlink())
    secret = basin.Secret.generate()
    read = Shared()
    for number in range(rounds):
        url = f"{folder}/{number}"
        point, delay = source.randrange(total), source.uniform(0, 0.05)
        read.clear()

        def create_basin(url: str = url) -> None:
            basin.open(url, mode="x", secret=secret, **OPTIONS).close()

        def interrupted(url: str = url, point: int = point, delay: float = delay) -> None:
            back_up(url, tree, secret, read, point, delay)

        def finished(url: str = url) -> None:
            back_up(url, tree, secret, read, None)

        codes = [child(create_basin), child(interrupted)]
        first = read.value
        codes.append(child(finished))

        def tell(url: str = url, codes: list[int] = codes, first: int = first) -> None:
            with basin.open(url, mode="r", secret=secret, **OPTIONS) as db:
                found = db.snapshots.list()
                damage = [one.detail for one in db.check() if one.severity == "damage"]
            line = {
                "codes": codes,
                "total": total,
                "first": first,
                "read": read.value,
                "trees": [one.document.tree for one in found],
                "damage": damage,
            }
            print(json.dumps(line), flush=True)

        child(tell)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:])

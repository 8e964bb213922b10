"""`nox -s demo`: what Basin promises, shown on Python's own standard library in a temporary folder.

Stores every file of the library as a name (path -> value, or reference to a blob) in an encrypted basin, stores it
again to show that no content is written twice, reopens, scans, reads everything back and compares every byte, runs
`check`, and then kills a writer process in the middle of its commits, again and again, and looks at what survived.

Exit code 0: everything was as promised. 1: something differs, and the last line says what. It uses only the public
names of `basin`, with default options.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TransferSpeedColumn
from rich.table import Table

import basin
from basin.api import Database

PASSPHRASE: Final = "correct horse battery staple"
NOT_PART_OF_THE_LIBRARY: Final = {"__pycache__", "site-packages", "dist-packages"}  # these change while Python runs
BATCH_FILES: Final = 256
BATCH_SIZE: Final = 16 << 20
STREAMED_SIZE: Final = 4 << 20  # larger files are never held in memory as a whole
INLINE_SIZE: Final = 512  # smaller files become plain values
COMPARED_SIZE: Final = 1 << 20
PREFIX: Final = "lib/json/"

KILLS: Final = 5
KILL_DELAY_MAX_S: Final = 0.6
KILLED_NAMES: Final = 40  # names in each batch of the process that gets killed
KILLED_VALUE_SIZE: Final = 3000

console = Console(soft_wrap=True)


class Differs(Exception):
    """Something is not as promised."""


@dataclass
class SourceFile:
    """One file of the library: its name in the basin, where it lies, its size in bytes."""

    name: bytes
    path: Path
    size: int


@dataclass
class Report:
    """What the table at the end shows."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, label: str, value: str) -> None:
        self.rows.append((label, value))

    def print(self) -> None:
        table = Table(show_header=False, title="Basin: the standard library, stored, read back and compared")
        table.add_column(style="bold")
        table.add_column(justify="right")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)


def require(holds: bool, what: str) -> None:  # noqa: FBT001  (reads as an assertion: require(a == b, "...") )
    """Raise `Differs` unless `holds`."""
    if not holds:
        raise Differs(what)


def mebibytes(size: float) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


def rate(size: int, seconds: float) -> str:
    return f"{size / 1e6 / seconds:,.0f} MB/s"


def library_files() -> list[SourceFile]:
    """Every regular file of the standard library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.is_file() and not path.is_symlink() and not NOT_PART_OF_THE_LIBRARY & set(relative.parts):
            found.append(SourceFile(b"lib/" + os.fsencode(relative.as_posix()), path, path.stat().st_size))
    return sorted(found, key=lambda file: file.name)


def batches(files: Sequence[SourceFile]) -> Iterator[list[SourceFile]]:
    """Cut `files` into runs of at most `BATCH_FILES` files and about `BATCH_SIZE` bytes."""
    batch: list[SourceFile] = []
    size = 0
    for file in files:
        batch.append(file)
        size += file.size
        if len(batch) == BATCH_FILES or size >= BATCH_SIZE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def with_progress(label: str, files: Sequence[SourceFile], work: Callable[[list[SourceFile]], None]) -> float:
    """Do `work` batch by batch under a progress bar, or with one plain line where there is no terminal.

    Returns the seconds it took.
    """
    total = sum(file.size for file in files)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TaskProgressColumn(), TransferSpeedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        for batch in batches(files):
            work(batch)
            progress.advance(task, sum(file.size for file in batch))
    seconds = time.perf_counter() - started
    console.print(f"{label}: {len(files):,} files, {mebibytes(total)} in {seconds:.2f} s, {rate(total, seconds)}")
    return seconds


def store(db: Database, batch: list[SourceFile]) -> None:
    """Store the files of one batch in one atomic commit: small ones as values, the others as references to blobs."""
    with db.batch() as changes:
        small = [file for file in batch if file.size <= INLINE_SIZE]
        middle = [file for file in batch if INLINE_SIZE < file.size <= STREAMED_SIZE]
        changes.put_many((file.name, file.path.read_bytes()) for file in small)
        content_keys = changes.blobs.put_many(file.path.read_bytes() for file in middle)
        changes.put_many((file.name, basin.Ref(key)) for file, key in zip(middle, content_keys, strict=True))
        for file in batch:
            if file.size > STREAMED_SIZE:
                changes.put(file.name, basin.Ref(changes.blobs.put(file.path)))


def compare(db: Database, batch: list[SourceFile]) -> None:
    """Read the files of one batch back and compare every byte with what lies on the disk."""
    whole = [file for file in batch if file.size <= STREAMED_SIZE]
    for file, value in zip(whole, db.get_many([file.name for file in whole]), strict=True):
        require(value == file.path.read_bytes(), f"{file.name!r} reads differently")
    for file in batch:
        if file.size > STREAMED_SIZE:
            compare_streamed(db, file)


def compare_streamed(db: Database, file: SourceFile) -> None:
    content_key = db.ref(file.name)
    if content_key is None:
        raise Differs(f"{file.name!r} is no reference")
    with db.blobs.open(content_key) as stored, file.path.open("rb") as original:
        while expected := original.read(COMPARED_SIZE):
            require(stored.read(len(expected)) == expected, f"{file.name!r} reads differently")
        require(stored.read(1) == b"", f"{file.name!r} is longer than the file")


def store_twice(folder: str, files: Sequence[SourceFile], key_file: Path, report: Report) -> None:
    """The first and the second pass, in one encrypted basin with two secrets: a passphrase and a key file."""
    size = sum(file.size for file in files)
    with basin.open(folder, mode="x", secret=basin.Secret.from_passphrase(PASSPHRASE)) as db:
        second = basin.Secret.generate()
        second.to_file(key_file)
        db.secrets.add(second)
        seconds = with_progress("first pass", files, lambda batch: store(db, batch))
        first = db.stats()
        again = with_progress("second pass", files, lambda batch: store(db, batch))
        written = db.stats()["written"]
        new_blobs = written["blobs_new"] - first["written"]["blobs_new"]
        known_blobs = written["blobs_duplicate"] - first["written"]["blobs_duplicate"]
        require(new_blobs == 0, f"the second pass wrote {new_blobs} blobs again")
        require(known_blobs > 0, "the second pass found nothing that was there already")
    console.print(f"second pass: {new_blobs} blobs written, {known_blobs:,} recognised")
    report.add("files", f"{len(files):,}")
    report.add("bytes in", mebibytes(size))
    report.add("bytes stored", f"{mebibytes(first['bytes_stored'])} ({first['bytes_stored'] / size:.0%})")
    report.add("first pass", rate(size, seconds))
    report.add("second pass (nothing new)", rate(size, again))
    report.add("blobs: new / recognised", f"{written['blobs_new']:,} / {written['blobs_duplicate']:,}")


def reopen(folder: str, key_file: Path, report: Report) -> None:
    """How long opening takes with either secret; the passphrase is slow on purpose (argon2id)."""
    for label, secret in (
        ("passphrase", basin.Secret.from_passphrase(PASSPHRASE)),
        ("key file", basin.Secret.from_file(key_file)),
    ):
        started = time.perf_counter()
        with basin.open(folder, mode="r", secret=secret):
            seconds = time.perf_counter() - started
        report.add(f"time to reopen ({label})", f"{seconds * 1000:,.0f} ms")


def read_back(folder: str, files: Sequence[SourceFile], key_file: Path, report: Report) -> None:
    """Scan by prefix, compare every byte, check the whole store."""
    with basin.open(folder, mode="r", secret=basin.Secret.from_file(key_file)) as db:
        names = [name for name, _ in db.scan(prefix=PREFIX)]
        expected = [file.name for file in files if file.name.startswith(PREFIX.encode())]
        require(names == expected, f"the scan of {PREFIX} gives other names")
        require(len(db) == len(files), "the basin holds more names than there are files")
        console.print(f"scan of {PREFIX}: {len(names)} names, in order, as expected")
        seconds = with_progress("read, compare", files, lambda batch: compare(db, batch))
        report.add("read and compared", rate(sum(file.size for file in files), seconds))
        check(db)


def check(db: Database) -> None:
    """Every stored byte is verified; a finding worse than a remark is a difference."""
    started = time.perf_counter()
    bad = [finding for finding in db.check() if finding.severity != "info"]
    require(not bad, f"check found: {bad[:3]}")
    console.print(f"check: every grain verified in {time.perf_counter() - started:.2f} s, nothing found")


def killed_value(batch: int, number: int) -> bytes:
    """The value that batch `batch` gives to its name `number`; nobody needs to remember it."""
    return random.Random(f"{batch}.{number}").randbytes(KILLED_VALUE_SIZE)


def write_until_killed(folder: str, first: int) -> None:
    """The process that gets killed: commits batch after batch, and says `try n` before and `done n` after each."""
    with basin.open(folder, mode="w", secret=basin.Secret.from_env()) as db:
        number = first
        while True:
            os.write(1, b"try %d\n" % number)
            with db.batch() as changes:
                for item in range(KILLED_NAMES):
                    changes.put(f"killed/{number:06}/{item:03}", killed_value(number, item))
            os.write(1, b"done %d\n" % number)
            number += 1


def run_and_kill(folder: str, key_file: Path, first: int) -> tuple[int, int]:
    """Start the writer and kill it at a random moment: (last batch it tried, last batch acknowledged to it)."""
    command = [sys.executable, "-m", "benchmarks.demo", "--write-until-killed", folder, str(first)]
    environment = {**os.environ, "BASIN_SECRET_FILE": str(key_file)}
    environment.pop("BASIN_PASSPHRASE", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as writer:
        if writer.stdout is None:
            raise Differs("the writer has no pipe")
        lines = [writer.stdout.readline()]  # it has opened the basin and begins
        time.sleep(random.uniform(0, KILL_DELAY_MAX_S))
        writer.kill()
        lines += writer.stdout.read().splitlines()
    heard = [line.split() for line in lines if line.strip()]
    tried = [int(words[1]) for words in heard if words[0] == b"try"]
    done = [int(words[1]) for words in heard if words[0] == b"done"]
    require(bool(tried), "the writer ended before it began")
    return tried[-1], done[-1] if done else first - 1


def surviving_batches(db: Database) -> int:
    """Number of the last surviving batch; raises `Differs` on a batch that is not whole, or where one is missing."""
    found: dict[int, set[int]] = {}
    for name, value in db.scan(prefix="killed/"):
        batch, item = (int(part) for part in name.split(b"/")[1:])
        require(value == killed_value(batch, item), f"{name!r} has another value than was written")
        found.setdefault(batch, set()).add(item)
    for batch, items in found.items():
        require(len(items) == KILLED_NAMES, f"of batch {batch} only {len(items)} of {KILLED_NAMES} names survived")
    require(sorted(found) == list(range(len(found))), "a batch is missing between others")
    return len(found) - 1


def kill_writers(folder: str, key_file: Path, report: Report) -> None:
    """Kill a writer `KILLS` times; after each, the basin holds the acknowledged batches and at most one more."""
    last, in_flight, unacknowledged = -1, 0, 0
    for _ in range(KILLS):
        tried, acknowledged = run_and_kill(folder, key_file, last + 1)
        with basin.open(folder, mode="r", secret=basin.Secret.from_file(key_file)) as db:
            survived = surviving_batches(db)
        require(survived >= acknowledged, f"batch {acknowledged} was acknowledged, but the last is {survived}")
        require(survived <= tried, f"batch {survived} survived, but the last one tried was {tried}")
        in_flight += tried > acknowledged
        unacknowledged += survived > acknowledged
        fate = "is there as a whole" if survived > acknowledged else "left no trace"
        fate = f", the one in flight {fate}" if tried > acknowledged else ""
        console.print(f"killed a writer: its {acknowledged - last} acknowledged commits are there{fate}")
        last = survived
    with basin.open(folder, mode="r", secret=basin.Secret.from_file(key_file)) as db:
        check(db)
    report.add("writers killed / in mid-commit", f"{KILLS} / {in_flight}")
    report.add("commits acknowledged to them", f"{last + 1 - unacknowledged:,}, all there, all whole")


def demonstrate(folder: Path) -> None:
    files = library_files()
    store_folder, key_file, report = str(folder / "library"), folder / "key", Report()
    console.print(f"an encrypted basin in {store_folder}")
    store_twice(store_folder, files, key_file, report)
    reopen(store_folder, key_file, report)
    read_back(store_folder, files, key_file, report)
    kill_writers(store_folder, key_file, report)
    report.print()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--write-until-killed"]:
        write_until_killed(arguments[1], int(arguments[2]))
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="basin-demo-") as folder:
            demonstrate(Path(folder))
    except (Differs, basin.BasinError) as error:
        console.print(f"[bold red]NOT as promised[/]: {type(error).__name__}: {error}")
        return 1
    console.print("[bold green]everything as promised[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

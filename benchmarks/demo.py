"""`nox -s demo`: what Basin promises, shown with a backup of Python's own standard library in a temporary folder.

Copies the library, backs the copy up into an encrypted basin, backs it up again to show that nothing is read twice,
changes it and backs it up once more, kills a backup at random moments and lets it go on, restores the first snapshot
and the last one and compares every file, and runs `check`.

Exit code 0: everything was as promised. 1: something differs, and the last line says what. It uses only the public
names of `basin`, with default options.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TransferSpeedColumn
from rich.table import Table

import basin
from basin.api import Database
from basin.layers.snapshots import BackupProgress, Snapshot

T = TypeVar("T")

NOT_PART_OF_THE_LIBRARY: Final = ("__pycache__", "site-packages", "dist-packages")  # these change while Python runs
CHANGED_EACH: Final = 100
"""One of so many files is changed."""
COMPARED_SIZE: Final = 1 << 20
KILLS: Final = 5
KILLED_HOST: Final = "killed"
JOURNAL_SIZE: Final = 4 << 20
"""Of the backups that are killed: the library is too small for the interval of an ordinary one."""
SETTLE_S: Final = 0.05
"""Longer than a tick of the clock: what was written before it is believed by the next backup."""

console = Console(soft_wrap=True)


class Differs(Exception):
    """Something is not as promised."""


@dataclass
class Report:
    """What the table at the end shows."""

    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, label: str, value: str) -> None:
        self.rows.append((label, value))

    def print(self) -> None:
        table = Table(show_header=False, title="Basin: the standard library, backed up, restored and compared")
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


def copy_library(target: Path) -> None:
    """A copy of the standard library that may be changed."""
    shutil.copytree(
        sysconfig.get_path("stdlib"), target, symlinks=True, ignore=shutil.ignore_patterns(*NOT_PART_OF_THE_LIBRARY)
    )
    time.sleep(SETTLE_S)


@contextmanager
def bar(label: str) -> Iterator[Callable[[BackupProgress], None]]:
    """A progress bar, where there is a terminal."""
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TaskProgressColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done: progress.update(task, completed=done.size, total=done.size_expected or None)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    result = work()
    return result, time.perf_counter() - started


def back_up(db: Database, tree: Path, label: str) -> tuple[Snapshot, float]:
    """A snapshot of the tree, and the seconds that it took; everything could be read."""
    with bar(label) as progress:
        snapshot, seconds = timed(lambda: db.snapshots.create(tree, progress=progress))
    found = snapshot.statistics
    require(not snapshot.problems, f"{label}: {list(snapshot.problems)[:3]}")
    console.print(
        f"{label}: {found.files:,} files, {mebibytes(found.size)}; "
        f"read {found.read_files:,}, {mebibytes(found.read_size)}; "
        f"stored {mebibytes(found.stored_size)} in {seconds:.2f} s"
    )
    return snapshot, seconds


def change(tree: Path) -> tuple[set[str], set[str], set[str]]:
    """Change some files, remove others, add new ones; what was added, removed and changed."""
    files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
    changed, removed = files[::CHANGED_EACH], files[CHANGED_EACH // 2 :: CHANGED_EACH]
    for path in changed:
        with path.open("ab") as file:
            file.write(b"# changed")
    for path in removed:
        path.unlink()
    added = [path.with_name(path.name + ".new") for path in changed]
    for path in added:
        path.write_bytes(b"new")
    time.sleep(SETTLE_S)
    return {str(path) for path in added}, {str(path) for path in removed}, {str(path) for path in changed}


def require_difference(new: Snapshot, old: Snapshot, changes: tuple[set[str], set[str], set[str]]) -> None:
    """The difference of two snapshots is what was done."""
    added, removed, changed = set[str](), set[str](), set[str]()
    for here, there in new.diff(old, meta=False):
        entry = here or there
        if entry is None or entry.kind != 0:
            continue
        kinds = added if there is None else removed if here is None else changed
        kinds.add("/" + os.fsdecode(entry.path))
    require((added, removed, changed) == changes, "the difference of two snapshots is not what was changed")
    console.print(f"diff: {len(added)} new, {len(removed)} gone, {len(changed)} changed, as was done")


def restore_and_compare(snapshot: Snapshot, tree: Path, target: Path, label: str) -> float:
    """Restore a snapshot and compare every file with those of `tree`; the seconds that the restore took."""
    report, seconds = timed(lambda: snapshot.restore(target, tree_of(snapshot)))
    require(not report.problems, f"{label}: {report.problems[:3]}")
    here = {path.relative_to(tree): path for path in tree.rglob("*")}
    there = {path.relative_to(target): path for path in target.rglob("*")}
    require(here.keys() == there.keys(), f"{label}: the restored tree has other paths")
    for name, original in here.items():
        require_same(original, there[name])
    console.print(f"{label}: {report.files:,} files in {seconds:.2f} s; every byte, mode and time is as it was")
    return seconds


def tree_of(snapshot: Snapshot) -> str:
    return snapshot.paths[0]


def require_same(original: Path, restored: Path) -> None:
    one, two = original.lstat(), restored.lstat()
    require(
        (one.st_mode, one.st_size, one.st_mtime_ns) == (two.st_mode, two.st_size, two.st_mtime_ns) or original.is_dir(),
        f"{restored} has another mode, size or time",
    )
    if original.is_symlink():
        require(original.readlink() == restored.readlink(), f"{restored} leads elsewhere")
    elif original.is_file():
        with original.open("rb") as first, restored.open("rb") as second:
            while expected := first.read(COMPARED_SIZE):
                require(second.read(len(expected)) == expected, f"{restored} has other content")


def back_up_until_killed(folder: str, tree: str) -> None:
    """The process that gets killed: says how much it has read, again and again."""

    def tell(done: BackupProgress) -> None:
        os.write(1, b"%d\n" % done.read_size)

    with basin.open(folder, mode="w", secret=basin.Secret.from_env()) as db:
        db.snapshots.create(tree, host=KILLED_HOST, journal_size=JOURNAL_SIZE, progress=tell)
        os.write(1, b"done\n")


def kill_backups(folder: str, tree: Path, key_file: Path, wanted: Snapshot, report: Report) -> None:
    """Kill a backup `KILLS` times at a random amount; let the next one go on; it ends with the same tree."""
    command = [sys.executable, "-m", "benchmarks.demo", "--back-up-until-killed", folder, str(tree)]
    environment = {**os.environ, "BASIN_SECRET_FILE": str(key_file)}
    environment.pop("BASIN_PASSPHRASE", None)
    total = wanted.statistics.size
    read = 0
    for _ in range(KILLS):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            if process.stdout is None:
                raise Differs("the backup has no pipe")
            stop, last = random.randrange(total // KILLS), b"0"
            for line in process.stdout:
                last = line.strip()
                if last == b"done" or int(last) >= stop:
                    break
            process.kill()
            last = (process.stdout.read().splitlines() or [last])[-1]
        require(last != b"done", "a backup was done before it could be killed")
        read += int(last)
    with basin.open(folder, mode="w", secret=basin.Secret.from_file(key_file)) as db:
        left = db.snapshots.list(host=KILLED_HOST)
        require(any(not one.is_complete for one in left), "no interrupted snapshot is listed")
        last_one = db.snapshots.create(tree, host=KILLED_HOST)
        require(last_one.document.tree == wanted.document.tree, "the resumed backup has another tree")
        require(all(one.is_complete for one in db.snapshots.list()), "an interrupted snapshot is left")
        read += last_one.statistics.read_size
    again = read - total
    limit = KILLS * 2 * JOURNAL_SIZE
    require(again <= limit, f"{mebibytes(again)} were read again")
    console.print(
        f"killed {KILLS} backups; the next one ended with the same tree; {mebibytes(max(0, again))} read again"
    )
    report.add("backups killed / read again", f"{KILLS} / {mebibytes(max(0, again))}")


def check(db: Database) -> None:
    """Every stored byte is verified; a finding worse than a remark is a difference."""
    started = time.perf_counter()
    bad = [finding for finding in db.check() if finding.severity != "info"]
    require(not bad, f"check found: {bad[:3]}")
    console.print(f"check: every grain verified in {time.perf_counter() - started:.2f} s, nothing found")


def demonstrate(folder: Path) -> None:
    tree, original, store, key_file = folder / "library", folder / "original", str(folder / "basin"), folder / "key"
    report = Report()
    copy_library(tree)
    secret = basin.Secret.generate()
    secret.to_file(key_file)
    console.print(f"an encrypted basin in {store}")
    with basin.open(store, mode="x", secret=secret) as db:
        first, seconds = back_up(db, tree, "first backup")
        size = first.statistics.size
        report.add("files", f"{first.statistics.files:,}")
        report.add("bytes", mebibytes(size))
        report.add("bytes stored", f"{mebibytes(db.stats()['bytes_stored'])} ({db.stats()['bytes_stored'] / size:.0%})")
        report.add("first backup", rate(size, seconds))
        again, seconds = back_up(db, tree, "nothing changed")
        require(again.statistics.read_files == 0, "an unchanged file was read")
        require(again.document.tree == first.document.tree, "the same files make another tree")
        report.add("nothing changed", f"{seconds * 1000:,.0f} ms, no file read")
        shutil.copytree(tree, original, symlinks=True)
        changes = change(tree)
        second, seconds = back_up(db, tree, "some changed")
        require(second.statistics.read_files == len(changes[0]) + len(changes[2]), "other files were read than changed")
        require_difference(second, again, changes)
        report.add("one in a hundred changed", f"{seconds * 1000:,.0f} ms, {second.statistics.read_files} files read")
    kill_backups(store, tree, key_file, second, report)
    with basin.open(store, mode="r", secret=basin.Secret.from_file(key_file)) as db:
        seconds = restore_and_compare(db.snapshots.get(first.id), original, folder / "first", "first restored")
        report.add("restored, compared", rate(size, seconds))
        restore_and_compare(db.snapshots.get(second.id), tree, folder / "last", "last restored")
        check(db)
    report.print()


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--back-up-until-killed"]:
        back_up_until_killed(*arguments[1:])
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

"""`basin backup`: a snapshot of files and directories. Uses the public names of `basin` only.

Invariants:
- What could not be saved, or changed while it was read, is named on standard error, and the exit code is 4.
- With `--json` standard output has one object a line: progress, a second apart, then the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from basin.cli.common import READ_ONCE_CACHE_SIZE, Command, Size, Target, pass_target
from basin.cli.failures import EXIT_UNREADABLE, Failure, warn
from basin.cli.output import input_stream, print_json, print_line, wants_json
from basin.cli.progress import Teller
from basin.cli.snapshots import snapshot_fields

if TYPE_CHECKING:
    from basin.layers.snapshots import Rules, Snapshot

_SYNC_INTERVAL_S: Final = 5.0
"""The journal commits; in between nothing needs to be durable."""

_RULES: Final = (
    click.option(
        "--exclude", "-e", multiple=True, metavar="PATTERN", help="Leave out what matches, as .gitignore has it."
    ),
    click.option("--exclude-file", multiple=True, type=click.Path(), metavar="FILE", help="Such patterns, one a line."),
    click.option("-i", "--include", multiple=True, metavar="PATTERN", help="Save it even if it is excluded."),
    click.option(
        "--ignore-file", multiple=True, metavar="NAME", help="Files of this name hold patterns for their folder."
    ),
    click.option("--exclude-if-present", multiple=True, metavar="NAME", help="Leave out folders with such a file."),
    click.option("--exclude-larger-than", type=Size(), metavar="SIZE", help="Leave out larger files: 500k, 10M, 2G."),
    click.option("--exclude-caches", is_flag=True, help="Leave out what a CACHEDIR.TAG marks as a cache."),
    click.option("-x", "--one-file-system", is_flag=True, help="Do not enter other file systems."),
)


def _with_rules(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_RULES):
        command = option(command)
    return command


@click.command(cls=Command)
@click.argument("paths", nargs=-1, type=click.Path(), metavar="PATH...")
@_with_rules
@click.option("--tag", "tags", multiple=True, metavar="WORD", help="Give the snapshot this tag.")
@click.option("--parent", metavar="SNAP", help="Compare with this one. [the newest of the same host and paths]")
@click.option("-f", "--force", is_flag=True, help="Read all files, also those that look unchanged.")
@click.option("--host", metavar="NAME", help="The machine's name. [its own]")
@click.option("--stdin", is_flag=True, help="Save what standard input gives as one file.")
@click.option("--stdin-name", default="stdin", metavar="NAME", help="Its name. [stdin]")
@click.option("-n", "--dry-run", is_flag=True, help="Read no file and write nothing; say what would be done.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but problems.")
@pass_target
def backup(
    target: Target,
    /,
    *,
    paths: tuple[str, ...],
    tags: tuple[str, ...],
    parent: str | None,
    force: bool,
    host: str | None,
    stdin: bool,
    stdin_name: str,
    dry_run: bool,
    quiet: bool,
    exclude_caches: bool,
    one_file_system: bool,
    **rules: Any,
) -> None:
    """Save files and directories as a snapshot.

    Files that the last snapshot has, with the same size, times and inode, are not read. If it is interrupted, the same
    command again goes on where it was.
    """
    if stdin == bool(paths):
        raise click.UsageError("give paths, or --stdin")
    if force and parent:
        raise click.UsageError("--force and --parent exclude each other")
    if stdin and (dry_run or force or parent):
        raise click.UsageError("--stdin goes with --stdin-name, --tag and --host only")
    with (
        target.open("w", sync_interval_s=_SYNC_INTERVAL_S, cache_size=READ_ONCE_CACHE_SIZE) as db,
        Teller("saving", quiet=quiet) as teller,
    ):
        if stdin:
            snapshot = db.snapshots.create_from_stream(
                input_stream(), stdin_name, tags=tags, host=host, progress=teller.tell
            )
        else:
            snapshot = db.snapshots.create(
                paths,
                tags=tags,
                rules=_rules(**rules),
                one_file_system=one_file_system,
                exclude_caches=exclude_caches,
                parent="" if force else parent,
                host=host,
                dry_run=dry_run,
                progress=teller.tell,
            )
        _show(snapshot, dry_run=dry_run, quiet=quiet)
    _end(snapshot)


def _rules(
    exclude: tuple[str, ...],
    exclude_file: tuple[str, ...],
    include: tuple[str, ...],
    ignore_file: tuple[str, ...],
    exclude_if_present: tuple[str, ...],
    exclude_larger_than: int | None,
) -> Rules:
    from basin.layers.snapshots import Rules, read_patterns

    return Rules(
        excludes=[*(line for path in exclude_file for line in read_patterns(Path(path))), *exclude],
        includes=include,
        ignore_files=ignore_file,
        exclude_larger_than=exclude_larger_than,
        exclude_if_present=exclude_if_present,
    )


def _show(snapshot: Snapshot, *, dry_run: bool, quiet: bool) -> None:
    if quiet:
        return
    if wants_json():
        print_json({"type": "snapshot", **snapshot_fields(snapshot), "dry_run": dry_run})
        return
    found = snapshot.statistics
    if not dry_run:
        print_line(f"snapshot {snapshot.id}")
    print_line(
        f"{found.files:,} files ({found.new_files:,} new, {found.changed_files:,} changed), "
        f"{found.directories:,} directories, {found.others:,} others; {found.size:,} bytes"
    )
    read = "to be read" if dry_run else "read"
    line = f"{found.read_files:,} files, {found.read_size:,} bytes {read}"
    if not dry_run:
        line += f"; {found.new_size:,} bytes were new, and take {found.stored_size:,}; {found.seconds:.1f} s"
    print_line(line)


def _end(snapshot: Snapshot) -> None:
    for problem in snapshot.problems:
        warn(f"{problem.path}: {problem.error}")
    count = snapshot.statistics.problems
    if count:
        raise Failure(f"{count:,} problem{'' if count == 1 else 's'}; all else was saved", EXIT_UNREADABLE)

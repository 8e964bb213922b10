"""`basin restore`: write what a snapshot holds into a folder. Uses the public names of `basin` only.

Invariants:
- Nothing is written outside of the target.
- What could not be restored is named on standard error, and the exit code is 4; damage that was met is 3.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import click

from basin.cli.common import READ_ONCE_CACHE_SIZE, Command, Target, pass_target
from basin.cli.failures import EXIT_DAMAGE, EXIT_UNREADABLE, Failure, warn
from basin.cli.output import print_json, print_line, wants_json
from basin.cli.progress import Teller
from basin.cli.snapshots import located

if TYPE_CHECKING:
    from basin.layers.snapshots.restore import RestoreReport


@click.command(cls=Command)
@click.argument("place", metavar="SNAP[:PATH]")
@click.argument("folder", type=click.Path(), metavar="TARGET")
@click.option("-i", "--include", multiple=True, metavar="PATTERN", help="Only what matches, as .gitignore has it.")
@click.option("-e", "--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches.")
@click.option(
    "--overwrite",
    type=click.Choice(["differing", "always", "never"]),
    default="differing",
    help="What is there: leave it if size and time agree, write it anew, or leave it. [differing]",
)
@click.option("--delete", is_flag=True, help="Remove what the snapshot has not, from folders that it has.")
@click.option(
    "--owners",
    type=click.Choice(["names", "numbers", "none"]),
    default="names",
    help="Give files to the users of the same names, or numbers. [names]",
)
@click.option("--verify", is_flag=True, help="Read what was written, and compare.")
@click.option("--no-sync", is_flag=True, help="End before what was written is sure to survive a power cut.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but problems.")
@pass_target
def restore(
    target: Target,
    *,
    place: str,
    folder: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    overwrite: Literal["differing", "always", "never"],
    delete: bool,
    owners: Literal["names", "numbers", "none"],
    verify: bool,
    no_sync: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Write a snapshot, or what lies below a path of it, into the folder TARGET.

    SNAP is an id, the beginning of one, or `latest`. What is in TARGET already and agrees is not written again.
    """
    from basin.layers.snapshots.patterns import selection
    from basin.layers.snapshots.restore import RestoreOptions

    with target.open("r", cache_size=READ_ONCE_CACHE_SIZE) as db, Teller("restoring", quiet=quiet) as teller:
        snapshot, path = located(db, place)
        options = RestoreOptions(
            wanted=selection(include, exclude),
            overwrite=overwrite,
            delete=delete,
            owners=owners,
            verify=verify,
            durable=not no_sync,
            dry_run=dry_run,
            progress=teller.tell,
        )
        report = snapshot.restore(folder, path, options)
    _show(report, dry_run=dry_run, quiet=quiet)


def _show(report: RestoreReport, *, dry_run: bool, quiet: bool) -> None:
    numbers: dict[str, Any] = dataclasses.asdict(report)
    if not quiet and wants_json():
        print_json({"type": "restored", **numbers, "dry_run": dry_run})
    elif not quiet:
        verb = "would write" if dry_run else "wrote"
        print_line(
            f"{verb} {report.files:,} files of {report.size:,} bytes; {report.unchanged:,} agreed already; "
            f"{report.deleted:,} removed; {report.seconds:.1f} s"
        )
    for one in (*report.warnings, *report.problems):
        warn(f"{one.path}: {one.error}")
    if report.damage_count:
        raise Failure(
            f"{report.damage_count:,} files are damaged or missing in the basin; see `basin check`", EXIT_DAMAGE
        )
    if report.problem_count:
        count = report.problem_count
        raise Failure(f"{count:,} problem{'' if count == 1 else 's'}; all else was restored", EXIT_UNREADABLE)

"""`basin thaw`: have contents in cold storage made readable. Uses the public names of `basin` only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.output import print_json, print_line, wants_json
from basin.cli.progress import Progress

if TYPE_CHECKING:
    from basin import ThawReport


@click.command(cls=Command)
@click.argument("addresses", nargs=-1, metavar="[ADDRESS...]")
@click.option("--all", "everything", is_flag=True, help="All contents.")
@click.option("--days", type=click.IntRange(min=1), default=7, metavar="N", help="How long they can be read. [7]")
@click.option(
    "--tier",
    type=click.Choice(["Standard", "Bulk", "Expedited"]),
    default="Standard",
    help="How fast: hours, up to two days and cheap, minutes and dear. [Standard]",
)
@click.option("--no-wait", is_flag=True, help="Ask for it, and do not wait until they can be read.")
@pass_target
def thaw(
    target: Target,
    *,
    addresses: tuple[str, ...],
    everything: bool,
    days: int,
    tier: Literal["Standard", "Bulk", "Expedited"],
    no_wait: bool,
) -> None:
    """Make contents in cold storage readable, and wait for it.

    ADDRESS is a content key, a part of one, or data/… as an error names it. What is readable already, or on its way, is
    not asked for again.
    """
    if everything == bool(addresses):
        raise click.UsageError("give addresses, or --all")
    with target.open("r") as db, Progress("thawing") as progress:
        report = db.thaw(
            None if everything else addresses, days=days, tier=tier, wait=not no_wait, progress=progress.show
        )
    if wants_json():
        print_json(
            {
                "strata": report.strata,
                "bytes": report.size,
                "requested": report.requested,
                "waiting": report.waiting,
            }
        )
    else:
        print_line(_outcome(report))


def _outcome(report: ThawReport) -> str:
    files = f"{report.strata} file{'' if report.strata == 1 else 's'}"
    if report.waiting:
        return f"{files}, {report.size:,} bytes: asked for {report.requested}; not readable yet: {report.waiting}"
    return f"{files}, {report.size:,} bytes: readable"

"""`basin log`: the records that are the basin's history. Uses the public names of `basin` only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.output import print_json, print_table, printable, time_text, wants_json

if TYPE_CHECKING:
    from basin import LogEntry


@click.command(cls=Command)
@click.option("--since", type=click.IntRange(min=0), metavar="POSITION", help="Only records after this position.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="The newest N records only.")
@pass_target
def log(target: Target, since: int | None, limit: int | None) -> None:
    """List what was committed, oldest first.

    One record a line: position, time (UTC), session, and what changed.
    """
    with target.open("r") as db:
        entries = db.log(0 if since is None else since + 1)
        if limit is not None:
            entries = iter(deque(entries, maxlen=limit))
        if wants_json():
            for entry in entries:
                print_json(_fields(entry))
        else:
            print_table(("position", "time", "session", "changes"), _rows(entries))


def _fields(entry: LogEntry) -> dict[str, Any]:
    return {
        "position": entry.position,
        "time": time_text(entry.time_ms),
        "time_ms": entry.time_ms,
        "session": entry.session,
        "sequence": entry.sequence,
        "size": entry.size,
        "changes": entry.summary,
    }


def _rows(entries: Iterator[LogEntry]) -> Iterator[tuple[str, ...]]:
    for entry in entries:
        yield str(entry.position), time_text(entry.time_ms), str(entry.session), _sentence(entry.summary)


def _sentence(summary: Mapping[str, Any]) -> str:
    """`names 3, strata added 1`."""
    return ", ".join(f"{printable(word.replace('_', ' '))} {printable(str(value))}" for word, value in summary.items())

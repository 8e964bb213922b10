"""`basin check` and `basin repair`: find damage, and mend it when told to. Uses the public names of `basin` only.

Invariants:
- `check` changes nothing; `repair` changes nothing without `--yes`.
- Both end with exit code 3 while there is damage that nobody has mended, or something is lost.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.failures import EXIT_DAMAGE
from basin.cli.output import bytes_field, print_json, print_line, printable, wants_json
from basin.cli.progress import Progress

if TYPE_CHECKING:
    from basin import Finding, RepairAction

_NAMES_SHOWN_MAX: Final = 5


@click.command(cls=Command)
@click.option("--no-data", is_flag=True, help="Check the structure only; do not read every grain.")
@pass_target
def check(target: Target, *, no_data: bool) -> None:
    """Look for damage; exit with 3 if there is any.

    Says which names the damage touches and whether they stay readable. Changes nothing.
    """
    counts = {"damage": 0, "warning": 0, "info": 0}
    with target.open("r", salvage=True) as db, Progress("checking") as progress:
        for finding in db.check(read_data=not no_data, progress=progress.show):
            counts[finding.severity] += 1
            with progress.hidden():
                _print_finding(finding)
    if not wants_json():
        print_line(_verdict(counts["damage"], counts["warning"]))
    if counts["damage"]:
        raise click.exceptions.Exit(EXIT_DAMAGE)


def _print_finding(finding: Finding) -> None:
    if wants_json():
        print_json(asdict(finding) | {"names": [bytes_field("name", name) for name in finding.names]})
        return
    parts = [finding.severity, finding.kind, finding.object, finding.detail.removeprefix(f"{finding.object} ")]
    if finding.names:
        parts.append(f"(names: {_names_shown(finding.names)})")
    if finding.readable:
        parts.append(f"(still readable: {finding.readable})")
    print_line("  ".join(printable(part) for part in parts))


def _names_shown(names: tuple[bytes, ...]) -> str:
    shown = ", ".join(printable(name) for name in names[:_NAMES_SHOWN_MAX])
    more = len(names) - _NAMES_SHOWN_MAX
    return f"{shown}{f' and {more} more; see --json' if more > 0 else ''}"


def _verdict(damage: int, warnings: int) -> str:
    if not damage:
        return f"no damage found{f'; warnings: {warnings}' if warnings else ''}"
    return f"damage found: {damage}; warnings: {warnings}; `basin repair` shows what can be done"


@click.command(cls=Command)
@click.option("--yes", is_flag=True, help="Do it. Without this, only show what would be done.")
@pass_target
def repair(target: Target, *, yes: bool) -> None:
    """Show what can be mended; mend it with --yes.

    Never drops what can still be read. Exits with 3 while something is left to do, or was lost.
    """
    with target.open("w" if yes else "r", salvage=True) as db, Progress("repairing"):
        actions = db.repair(dry_run=not yes)
    for action in actions:
        _print_action(action)
    left = sum(action.possible and not action.done for action in actions)
    lost = sum(not action.possible for action in actions)
    if not wants_json():
        print_line(_outcome(len(actions), left, lost, is_dry_run=not yes))
    if left or lost or any(action.names or action.content_keys for action in actions):
        raise click.exceptions.Exit(EXIT_DAMAGE)


def _print_action(action: RepairAction) -> None:
    if wants_json():
        print_json(asdict(action) | {"names": [bytes_field("name", name) for name in action.names]})
        return
    state = "done" if action.done else "to do" if action.possible else "lost"
    parts = [state, action.kind, action.object, action.detail]
    if action.names:
        parts.append(f"(names lost: {_names_shown(action.names)})")
    if action.content_keys:
        parts.append(f"(contents lost: {_names_shown(tuple(key.encode() for key in action.content_keys))})")
    print_line("  ".join(printable(part) for part in parts))


def _outcome(count: int, left: int, lost: int, *, is_dry_run: bool) -> str:
    if not count:
        return "nothing to repair"
    unmended = f"; not possible: {lost}" if lost else ""
    if is_dry_run:
        return f"to do: {left}{unmended}{'; `basin repair --yes` does it' if left else ''}"
    return f"done: {count - left - lost}{f'; not done: {left}' if left else ''}{unmended}"

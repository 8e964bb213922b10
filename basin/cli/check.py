"""`basin check` and `basin repair`: find damage, and mend it when told to. Uses the public names of `basin` only.

Invariants:
- `check` changes nothing but its cursor, where it reads a part of the data; `repair` changes nothing without `--yes`.
- Both end with exit code 3 while there is damage that nobody has mended, or something is lost.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import click

from basin.cli.common import Command, Size, Target, pass_target
from basin.cli.failures import EXIT_DAMAGE, describe, warn
from basin.cli.output import bytes_field, print_json, print_line, printable, time_text, wants_json
from basin.cli.progress import Progress
from basin.errors import BasinPoisoned

if TYPE_CHECKING:
    from basin import Finding, RepairAction
    from basin.engine.rounds import Coverage

_NAMES_SHOWN_MAX: Final = 5
_ALL: Final = "all"
_PERCENT: Final = re.compile(r"[0-9]{1,3}(\.[0-9]{1,9})?%")


class Amount(click.ParamType[dict[str, Any]]):
    """How much of the data a run reads, as arguments of `db.check`: `5%`, `500M` as `Size` has it, or all."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Click's contract."""
        text = str(value)
        if text == _ALL:
            return {"read_data": True}
        if text.endswith("%"):
            share = float(text[:-1]) / 100 if _PERCENT.fullmatch(text) else 0.0
            if not 0 < share <= 1:
                self.fail(f"{text!r} is not a share above 0% and up to 100%", param, ctx)
            return {"read_data": share}
        size = Size().convert(text, param, ctx)
        if not size:
            self.fail("to read no data, say --no-data", param, ctx)
        return {"read_size": size}


@click.command(cls=Command)
@click.option("--no-data", is_flag=True, help="Check the structure only; do not read every grain.")
@click.option(
    "--read-data",
    "amount",
    type=Amount(),
    is_flag=False,
    flag_value=_ALL,
    metavar="[SHARE|SIZE]",
    help="Read all data (the default), or the next 5% or 500M of it, going on where the last run ended.",
)
@pass_target
def check(target: Target, *, no_data: bool, amount: dict[str, Any] | None) -> None:
    """Look for damage; exit with 3 if there is any.

    Says which names the damage touches and whether they stay readable. Changes nothing, except that a run which reads a
    part of the data keeps in the basin where the next one goes on.
    """
    if no_data and amount is not None:
        raise click.UsageError("--no-data and --read-data contradict each other")
    chosen = {"read_data": not no_data} if amount is None else amount
    is_part = type(chosen.get("read_data")) is not bool
    counts = {"damage": 0, "warning": 0, "info": 0}
    with target.open("w" if is_part else "r", salvage=True) as db, Progress("checking") as progress:
        found = db.check(**chosen, progress=progress.show)
        try:
            for finding in found:
                counts[finding.severity] += 1
                with progress.hidden():
                    _print_finding(finding)
        except BasinPoisoned as error:
            if not counts["damage"]:
                raise
            warn(describe(error))  # The damage that was found, of the log, is why nothing can be kept.
    _print_outcome(found.coverage, counts)
    if counts["damage"]:
        raise click.exceptions.Exit(EXIT_DAMAGE)


def _print_outcome(coverage: Coverage | None, counts: dict[str, int]) -> None:
    if wants_json():
        if coverage is not None:
            round_fields = {"began": time_text(coverage.began_ms), "complete": coverage.is_round_complete}
            print_json({"kind": "coverage", **asdict(coverage), **round_fields})
        return
    print_line(_verdict(counts["damage"], counts["warning"]))
    if coverage is not None:
        print_line(_progress_of(coverage))


def _progress_of(coverage: Coverage) -> str:
    """How much was read, and how far the round is."""
    share = _percent(coverage.read, coverage.total)
    passed = _percent(coverage.round_passed, coverage.round_total)
    state = "is complete" if coverage.is_round_complete else f"is at {passed}"
    archived = f"; passed over, for it is archived: {coverage.archived:,} bytes" if coverage.archived else ""
    read = f"read {share} ({coverage.read:,} of {coverage.total:,} bytes){archived}"
    return f"{read}; the round began on {time_text(coverage.began_ms)} and {state}"


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that 100 % is all."""
    return f"{part * 1000 // whole / 10 if whole else 100.0:.1f} %"


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

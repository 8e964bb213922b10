"""`basin stats`: counts and sizes. Uses the public names of `basin` only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.output import print_json, print_table, printable, time_text, wants_json

if TYPE_CHECKING:
    from basin import Space
    from basin.engine.space import StratumSpace

_SIZES: Final = ("needed", "past", "held", "dead", "condemned", "names", "indexes", "log")
_SUPERSEDED_MUCH: Final = 0.1
"""A prune lets less than this share be."""
_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@click.command(cls=Command)
@click.option(
    "--explain-space", is_flag=True, help="Say what is needed, dead, condemned, superseded, and what frees it."
)
@click.option("--strata", is_flag=True, help="With --explain-space: of each stratum of contents, too.")
@pass_target
def stats(target: Target, *, explain_space: bool, strata: bool) -> None:
    """Show counts and sizes. Reads no content."""
    if strata and not explain_space:
        raise click.UsageError("--strata goes with --explain-space")
    with target.open("r") as db:
        if explain_space:
            _show_space(db.explain_space(), db.pins(), strata=strata)
            return
        numbers = db.stats()
    numbers.pop("written", None)  # by this handle, which has only been opened
    if wants_json():
        print_json(numbers)
    else:
        print_table(("what", "value"), _rows(numbers, ""))


def _show_space(space: Space, pins: Mapping[str, int], *, strata: bool) -> None:
    whole = dataclasses.asdict(space)
    each = [{**one, "id": str(one["id"])} for one in whole.pop("strata")]
    advice = list(_advice(space, pins))
    if wants_json():
        print_json({**whole, "pins": dict(pins), "advice": advice} | ({"strata": each} if strata else {}))
        return
    rows = [(label, _shown("bytes", whole[label])) for label in _SIZES]
    rows += [
        ("runs", f"{space.runs:,} of names"),
        ("superseded", f"{space.superseded:.0%} of the entries of names"),
        ("waiting_files", f"{space.waiting_files:,}"),
    ]
    if strata:
        rows += [(f"{one.folder}/{one.id}", _figures(one)) for one in space.strata]
    print_table(("what", "value"), [*rows, *(("advice", printable(sentence)) for sentence in advice)])


def _figures(one: StratumSpace) -> str:
    condemned = f", condemned until {time_text(one.due_ms)}" if one.condemned_ms else ""
    return f"{one.size:,} bytes: {one.needed:,} needed, {one.held:,} held, {one.dead:,} dead{condemned}"


def _advice(space: Space, pins: Mapping[str, int]) -> Iterator[str]:
    """What would free what, a sentence each."""
    grace = f"a grace of {space.grace_s:g} s"
    if space.dead:
        yield f"dead: a prune condemns the emptiest strata, with what is needed copied first; deleted after {grace}"
    if space.held:
        yield "held: a prune condemns the dead parents that link to it, and it is dead when they are deleted"
    if space.condemned:
        yield f"condemned until {time_text(space.due_ms)} ({grace}): a prune deletes it from then on"
    if space.past:
        yield f"past: history is kept for {space.history_s:g} s; what only old versions need is dead after that"
    for label, position in pins.items():
        yield f"past: the pin {label} keeps what is needed at position {position} and later, until it is taken away"
    if space.superseded > _SUPERSEDED_MUCH:
        yield "superseded: a prune writes the runs of names anew without them"
    if space.waiting_files:
        yield f"waiting_files: kept for who still reads them; a compaction deletes them after {grace}"


def _rows(numbers: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Nested results as dotted paths, in the order given."""
    for label, value in numbers.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{path}{label}.")
        else:
            yield f"{path}{printable(str(label))}", _shown(label, value)


def _shown(label: str, value: object) -> str:
    if not isinstance(value, int) or isinstance(value, bool):
        return printable(str(value))
    if "bytes" in label and value >= 1024:
        return f"{value:,} ({_rounded(value)})"
    return f"{value:,}"


def _rounded(size: int) -> str:
    exponent = min((size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / (1 << 10 * exponent):.1f} {_UNITS[exponent]}"

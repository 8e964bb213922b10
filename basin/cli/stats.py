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

_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@click.command(cls=Command)
@click.option("--explain-space", is_flag=True, help="Say what is needed, dead, condemned, superseded; by stratum.")
@pass_target
def stats(target: Target, explain_space: bool) -> None:  # noqa: FBT001  (click)
    """Show counts and sizes. Reads no content."""
    with target.open("r") as db:
        if explain_space:
            _show_space(db.explain_space())
            return
        numbers = db.stats()
    numbers.pop("written", None)  # by this handle, which has only been opened
    if wants_json():
        print_json(numbers)
    else:
        print_table(("what", "value"), _rows(numbers, ""))


def _show_space(space: Space) -> None:
    whole = dataclasses.asdict(space)
    strata = [{**one, "id": str(one["id"])} for one in whole.pop("strata")]
    if wants_json():
        print_json({**whole, "strata": strata})
        return
    sized = ((label, value) for label, value in whole.items() if label not in ("superseded", "waiting_files"))
    rows = [(label, _shown("bytes", value)) for label, value in sized]
    rows += [
        ("superseded", f"{space.superseded:.0%} of the entries of names"),
        ("waiting_files", str(space.waiting_files)),
    ]
    for one in space.strata:
        condemned = f", condemned {time_text(one.condemned_ms)}" if one.condemned_ms else ""
        figures = f"{one.size:,} bytes: {one.needed:,} needed, {one.held:,} held, {one.dead:,} dead{condemned}"
        rows.append((f"{one.folder}/{one.id}", figures))
    print_table(("what", "value"), rows)


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

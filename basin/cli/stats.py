"""`basin stats`: counts and sizes. Uses the public names of `basin` only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.output import print_json, print_table, printable, wants_json

_UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


@click.command(cls=Command)
@pass_target
def stats(target: Target) -> None:
    """Show counts and sizes. Reads no content."""
    with target.open("r") as db:
        numbers = db.stats()
    numbers.pop("written", None)  # by this handle, which has only been opened
    if wants_json():
        print_json(numbers)
    else:
        print_table(("what", "value"), _rows(numbers, ""))


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

"""`basin kv`: names and their values. Uses the public names of `basin` only.

Invariant: `get` prints the value's bytes and nothing else (a terminal also gets a line end), so it can be piped.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import click

from basin.cli.common import Group, Target, pass_target
from basin.cli.output import print_json, print_line, wants_json, write
from basin.cli.spelling import Spelling, names_of, raw_value, show_value
from basin.errors import Conflict, NameNotFound

_keyspace = click.option("--keyspace", metavar="K", help="Names of this keyspace, in place of the basin's own.")
_hex = click.option("--hex", "is_hex", is_flag=True, help="Names are given, and shown, as hex digits.")


@click.group(cls=Group)
def kv() -> None:
    """Get, put, delete and scan names."""


@kv.command("get")
@click.argument("name")
@_keyspace
@_hex
@click.option("--at", "position", type=click.IntRange(min=0), metavar="POSITION", help="As it was at this position.")
@pass_target
def get(target: Target, *, name: str, keyspace: str | None, is_hex: bool, position: int | None) -> None:
    """Print the value of NAME."""
    with target.open("r") as db, ExitStack() as stack:
        source = db if position is None else stack.enter_context(db.at(position))
        names, spelling = names_of(source, keyspace, is_hex=is_hex)
        parsed = spelling.parse_name(name)
        try:
            value = names[parsed]
        except NameNotFound:
            raise NameNotFound(f"no such name: {spelling.show_name(parsed)}", name=parsed) from None
    if wants_json():
        print_json(spelling.entry(parsed, value))
        return
    write(raw_value(value))
    if sys.stdout.isatty():
        write(b"\n")


@kv.command("put")
@click.argument("name")
@click.argument("value")
@_keyspace
@_hex
@click.option("--ttl", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Expires after this time.")
@click.option("--if-absent", is_flag=True, help="Only if NAME has no value; otherwise exit with 5.")
@pass_target
def put(
    target: Target, *, name: str, value: str, keyspace: str | None, is_hex: bool, ttl: float | None, if_absent: bool
) -> None:
    """Store VALUE under NAME.

    VALUE is the text itself, @FILE for the bytes of a file, or - for standard input.
    """
    with target.open("w") as db:
        names, spelling = names_of(db, keyspace, is_hex=is_hex)
        parsed = spelling.parse_name(name)
        if not names.put(parsed, spelling.parse_value(value), ttl=ttl, if_absent=if_absent):
            raise Conflict(f"the name has a value already: {spelling.show_name(parsed)}", names=[parsed])
        position = db.commit()
    if wants_json():
        print_json(spelling.entry(parsed) | {"position": position})


@kv.command("del")
@click.argument("names", nargs=-1, metavar="NAME...")
@_keyspace
@_hex
@click.option("--prefix", metavar="P", help="Also delete every name that starts with P.")
@pass_target
def delete(target: Target, *, names: tuple[str, ...], keyspace: str | None, is_hex: bool, prefix: str | None) -> None:
    """Delete names, all in one step. A name that has no value is no error."""
    if not names and prefix is None:
        raise click.UsageError("give at least one NAME, or --prefix P")
    with target.open("w") as db:
        with db.batch() as batch:
            space, spelling = names_of(batch, keyspace, is_hex=is_hex)
            parsed = [spelling.parse_name(name) for name in names]
            for name in parsed:
                space.delete(name)
            if prefix is not None:
                _delete_prefix(space, spelling, prefix)
        position = batch.position
    if wants_json():
        print_json({"deleted": [spelling.show_name(name) for name in parsed], "prefix": prefix, "position": position})


def _delete_prefix(names: Any, spelling: Spelling, prefix: str) -> None:
    if spelling.order != "bytes":
        raise click.UsageError("--prefix is for names of bytes")
    start = spelling.parse_name(prefix)
    stem = start.rstrip(b"\xff")
    # The first name behind all that start with the prefix; after nothing but 0xff there is none.
    names.delete_range(start, stem[:-1] + bytes([stem[-1] + 1]) if stem else None)


@kv.command("scan")
@_keyspace
@_hex
@click.option("--prefix", metavar="P", help="Only names that start with P.")
@click.option("--start", metavar="NAME", help="From this name on, itself included.")
@click.option("--stop", metavar="NAME", help="Up to this name, itself excluded.")
@click.option("--reverse", is_flag=True, help="Last name first.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N names.")
@click.option("--keys-only", is_flag=True, help="Names without their values.")
@pass_target
def scan(target: Target, /, *, keyspace: str | None, is_hex: bool, **options: Any) -> None:
    r"""List names in order, with their values: NAME, a tab, VALUE.

    Bytes that do not print are shown as \xNN. With --json, bytes that are not UTF-8 stand in "name_base64" and
    "value_base64" in place of "name" and "value".
    """
    with target.open("r") as db:
        names, spelling = names_of(db, keyspace, is_hex=is_hex)
        for bound in ("prefix", "start", "stop"):
            options[bound] = None if options[bound] is None else spelling.parse_name(options[bound])
        for entry in names.scan(**options):
            _print_entry(spelling, *((entry,) if options["keys_only"] else entry))


def _print_entry(spelling: Spelling, name: Any, *value: Any) -> None:
    if wants_json():
        print_json(spelling.entry(name, *value))
    else:
        print_line("\t".join((spelling.show_name(name), *map(show_value, value))))

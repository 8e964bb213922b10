"""`basin kv`: names and their values. Uses the public names of `basin` only.

Invariants:
- A name on the command line is the bytes that the shell passed, or with `--hex` what the hex digits say; it is shown
  the same way.
- `get` prints the value's bytes and nothing else (a terminal also gets a line end), so it can be piped.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from basin.cli.common import Group, Target, pass_target
from basin.cli.failures import EXIT_USAGE, Failure, reason
from basin.cli.output import bytes_field, print_json, print_line, printable, wants_json, write
from basin.errors import NameNotFound


@dataclass(frozen=True, slots=True)
class Spelling:
    """How names are written on the command line and shown: as text, or as hex digits."""

    is_hex: bool

    def parse(self, text: str) -> bytes:
        """The name that an argument means; not hex digits where they must be is a usage error."""
        if not self.is_hex:
            return os.fsencode(text)  # exactly the bytes the shell passed, whether they are UTF-8 or not
        try:
            return bytes.fromhex(text)
        except ValueError:
            raise Failure(f"not hex digits: {text!r}", EXIT_USAGE) from None

    def show(self, name: bytes) -> str:
        """The name as one printable piece of text."""
        return name.hex() if self.is_hex else printable(name)

    def field(self, label: str, name: bytes) -> dict[str, str]:
        """The name as a JSON field."""
        return {label: name.hex()} if self.is_hex else bytes_field(label, name)


_keyspace = click.option("--keyspace", metavar="K", help="Names of this keyspace, in place of the basin's own.")
_spelling = click.option(
    "--hex",
    "spelling",
    is_flag=True,
    callback=lambda _context, _parameter, value: Spelling(value),
    help="Names are given, and shown, as hex digits.",
)


@click.group(cls=Group)
def kv() -> None:
    """Get, put, delete and scan names."""


@kv.command("get")
@click.argument("name")
@_keyspace
@_spelling
@click.option("--at", "position", type=click.IntRange(min=0), metavar="POSITION", help="As it was at this position.")
@pass_target
def get(target: Target, *, name: str, keyspace: str | None, spelling: Spelling, position: int | None) -> None:
    """Print the value of NAME."""
    raw = spelling.parse(name)
    with target.open("r") as db, ExitStack() as stack:
        source = db if position is None else stack.enter_context(db.at(position))
        value = _names_of(source, keyspace).get(raw)
    if value is None:
        raise NameNotFound(f"no such name: {spelling.show(raw)}", name=raw)
    if wants_json():
        print_json(spelling.field("name", raw) | bytes_field("value", value))
        return
    write(value)
    if sys.stdout.isatty():
        write(b"\n")


@kv.command("put")
@click.argument("name")
@click.argument("value")
@_keyspace
@_spelling
@click.option("--ttl", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Expires after this time.")
@click.option("--if-absent", is_flag=True, help="Only if NAME has no value; otherwise exit with 5.")
@pass_target
def put(
    target: Target,
    *,
    name: str,
    value: str,
    keyspace: str | None,
    spelling: Spelling,
    ttl: float | None,
    if_absent: bool,
) -> None:
    """Store VALUE under NAME.

    VALUE is the text itself, @FILE for the bytes of a file, or - for standard input.
    """
    raw = spelling.parse(name)
    data = _value_bytes(value)
    with target.open("w") as db:
        _names_of(db, keyspace).put(raw, data, ttl=ttl, if_absent=if_absent)
        db.commit()
        if wants_json():
            print_json(spelling.field("name", raw) | {"size": len(data), "position": db.head.position})


@kv.command("del")
@click.argument("names", nargs=-1, metavar="NAME...")
@_keyspace
@_spelling
@click.option("--prefix", metavar="P", help="Also delete every name that starts with P.")
@pass_target
def delete(
    target: Target, *, names: tuple[str, ...], keyspace: str | None, spelling: Spelling, prefix: str | None
) -> None:
    """Delete names, all in one step. A name that has no value is no error."""
    if not names and prefix is None:
        raise click.UsageError("give at least one NAME, or --prefix P")
    raws = [spelling.parse(name) for name in names]
    with target.open("w") as db:
        with db.batch() as batch:
            space = _names_of(batch, keyspace)
            for raw in raws:
                space.delete(raw)
            if prefix is not None:
                start = spelling.parse(prefix)
                space.delete_range(start, _after_prefix(start))
        if wants_json():
            deleted = [spelling.show(raw) for raw in raws]
            print_json({"deleted": deleted, "prefix": prefix, "position": db.head.position})


@kv.command("scan")
@_keyspace
@_spelling
@click.option("--prefix", metavar="P", help="Only names that start with P.")
@click.option("--start", metavar="NAME", help="From this name on, itself included.")
@click.option("--stop", metavar="NAME", help="Up to this name, itself excluded.")
@click.option("--reverse", is_flag=True, help="Last name first.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N names.")
@click.option("--keys-only", is_flag=True, help="Names without their values.")
@pass_target
def scan(target: Target, *, keyspace: str | None, spelling: Spelling, **options: Any) -> None:
    r"""List names in order, with their values: NAME, a tab, VALUE.

    Bytes that do not print are shown as \xNN. With --json, bytes that are not UTF-8 stand in "name_base64" and
    "value_base64" in place of "name" and "value".
    """
    for bound in ("prefix", "start", "stop"):
        options[bound] = None if options[bound] is None else spelling.parse(options[bound])
    with target.open("r") as db:
        for entry in _names_of(db, keyspace).scan(**options):
            name, value = (entry, None) if options["keys_only"] else entry
            _print_entry(spelling, name, value)


def _print_entry(spelling: Spelling, name: bytes, value: bytes | None) -> None:
    if wants_json():
        print_json(spelling.field("name", name) | ({} if value is None else bytes_field("value", value)))
    else:
        print_line(spelling.show(name) if value is None else f"{spelling.show(name)}\t{printable(value)}")


def _names_of(source: Any, keyspace: str | None) -> Any:
    """The mapping that holds the names: a database, view or batch itself, or one of its keyspaces."""
    return source if keyspace is None else source.keyspace(keyspace)


def _value_bytes(text: str) -> bytes:
    if text == "-":
        return sys.stdin.buffer.read()
    if not text.startswith("@"):
        return os.fsencode(text)
    try:
        return Path(text[1:]).read_bytes()
    except OSError as error:
        raise Failure(f"cannot read {text[1:]}: {reason(error)}") from None


def _after_prefix(prefix: bytes) -> bytes | None:
    """The first name behind all that start with `prefix`; None if there is none (nothing but 0xff)."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None

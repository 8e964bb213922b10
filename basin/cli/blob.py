"""`basin blob`: content by content key. Uses the public names of `basin` only.

Invariants:
- A content key is printed only when its content is durable.
- A source that cannot be read is named, the others are stored, and the command ends with exit code 4.
- `get -o FILE` replaces FILE whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Final

import click

from basin.cli.common import Group, Target, pass_target
from basin.cli.failures import EXIT_UNREADABLE, Failure, reason, warn
from basin.cli.output import input_stream, print_json, print_line, printable, wants_json, write
from basin.cli.progress import CountingReader, Progress

if TYPE_CHECKING:
    from basin.api import Database
    from basin.terms import ContentKey

# A commit per so many bytes: rare enough to cost nothing, often enough that an interrupted run has printed its keys.
_COMMIT_EVERY: Final = 64 << 20
_COPY_SIZE: Final = 1 << 20


@click.group(cls=Group)
def blob() -> None:
    """Put, get, remove and list content."""


@blob.command("put")
@click.argument("sources", nargs=-1, required=True, metavar="FILE...|-")
@pass_target
def put(target: Target, sources: tuple[str, ...]) -> None:
    """Store files (- is standard input) and print their content keys; with several, each with its file."""
    with target.open("w") as db, Progress("storing", _total_size(sources)) as progress:
        readable = _put_all(db, sources, progress)
    if readable < len(sources):
        raise Failure(f"{len(sources) - readable} of {len(sources)} sources could not be read", EXIT_UNREADABLE)


def _put_all(db: Database, sources: tuple[str, ...], progress: Progress) -> int:
    """Store every source, printing as it becomes durable; return how many could be read."""
    count = pending_size = 0
    pending: list[tuple[str, ContentKey, int]] = []
    for source in sources:
        stored = _put_one(db, source, progress)
        if stored is None:
            continue
        count += 1
        pending.append(stored)
        pending_size += stored[2]
        if pending_size >= _COMMIT_EVERY:
            _commit_and_print(db, pending, progress, is_single=len(sources) == 1)
            pending_size = 0
    _commit_and_print(db, pending, progress, is_single=len(sources) == 1)
    return count


def _put_one(db: Database, source: str, progress: Progress) -> tuple[str, ContentKey, int] | None:
    try:
        with _opened(source) as file:
            reader = CountingReader(file, progress)
            return source, db.blobs.put(reader), reader.size
    except OSError as error:  # of the source: what the basin's own files do is a BasinError
        warn(f"cannot read {source}: {reason(error)}")
        return None


@contextmanager
def _opened(source: str) -> Iterator[IO[bytes]]:
    if source == "-":
        yield input_stream()
        return
    with Path(source).open("rb") as file:
        yield file


def _commit_and_print(
    db: Database, pending: list[tuple[str, ContentKey, int]], progress: Progress, *, is_single: bool
) -> None:
    db.commit()
    with progress.hidden():
        for source, content_key, size in pending:
            if wants_json():
                print_json({"source": source, "content_key": str(content_key), "size": size})
            else:
                print_line(str(content_key) if is_single else f"{content_key}  {printable(os.fsencode(source))}")
    pending.clear()


def _total_size(sources: tuple[str, ...]) -> int | None:
    """Bytes to read, for the progress bar; None if that is not known beforehand."""
    try:
        return None if "-" in sources else sum(Path(source).stat().st_size for source in sources)
    except OSError:
        return None


@blob.command("get")
@click.argument("address", metavar="KEY")
@click.option("-o", "--output", metavar="FILE", type=click.Path(), help="Write to FILE, in place of standard output.")
@pass_target
def get(target: Target, address: str, output: str | None) -> None:
    """Print the content of KEY: 64 hex digits, or "<hex>-<n>" for part n alone."""
    from basin.terms import parse_address

    if wants_json() and output is None:
        raise click.UsageError("--json needs -o FILE: the content itself goes to standard output")
    key = parse_address(address)
    with target.open("r") as db, db.blobs.open(key) as content, Progress("reading", db.blobs.size(key)) as progress:
        if output is None:
            _copy(content, None, progress)
            return
        with _replacing(output) as file:
            size = _copy(content, file, progress)
    if wants_json():
        print_json({"content_key": address, "path": output, "size": size})


def _copy(content: BinaryIO, file: IO[bytes] | None, progress: Progress) -> int:
    """Copy everything to `file`, or to standard output; return the size."""
    size = 0
    while data := content.read(_COPY_SIZE):
        if file is None:
            write(data)
        else:
            file.write(data)
        size += len(data)
        progress.advance(len(data))
    return size


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A new file that takes the name `path` when the body succeeds, and vanishes when it does not.

    A device or pipe is written to instead: replacing /dev/null would be a surprise. A link is followed.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    partial = target.with_name(f".basin-{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            yield file
        if target.exists():
            shutil.copymode(target, partial)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@blob.command("rm")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@pass_target
def remove(target: Target, keys: tuple[str, ...]) -> None:
    """Take back what `put` did, all in one step; content that nothing else refers to goes with the next compaction."""
    from basin.terms import ContentKey

    content_keys = [ContentKey.parse(key) for key in keys]
    with target.open("w") as db:
        with db.batch() as batch:
            for content_key in content_keys:
                batch.blobs.delete(content_key)
        if wants_json():
            print_json({"removed": [str(content_key) for content_key in content_keys], "position": db.head.position})


@blob.command("ls")
@click.option("-l", "--long", "is_long", is_flag=True, help="With sizes; - where only the archive knows it.")
@pass_target
def ls(target: Target, *, is_long: bool) -> None:
    """List the content keys that were put and not removed, in order."""
    with target.open("r") as db:
        for content_key in db.blobs:
            fields: dict[str, Any] = {"content_key": str(content_key)}
            if is_long:
                fields["size"] = _known_size(db, content_key)
            if wants_json():
                print_json(fields)
            else:
                print_line("\t".join("-" if field is None else str(field) for field in fields.values()))


def _known_size(db: Database, content_key: ContentKey) -> int | None:
    """Bytes of a content; None of one that must be restored first, and is too small to have a list of parts."""
    from basin.errors import GrainNotReady

    try:
        return db.blobs.size(content_key)
    except GrainNotReady:
        return None

"""`basin snapshots`, `ls`, `cat`, `find`, `diff`, `forget`: look at backups, and let go of them.

Uses the public names of `basin` only.

Invariant: what is printed of paths is what `basin restore` and the others take again.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from basin.cli.common import Command, Target, pass_target
from basin.cli.output import bytes_field, print_json, print_line, print_table, printable, time_text, wants_json, write

if TYPE_CHECKING:
    from basin.api import Database
    from basin.format.tree import Entry
    from basin.layers.snapshots import Snapshot

    _Decided: TypeAlias = tuple[Snapshot, bool, tuple[str, ...]]

_KINDS: Final = ("file", "directory", "link", "fifo", "character device", "block device", "socket")
_LETTERS: Final = "-dlpcbs"
_MS: Final = 1_000_000
_COPY_SIZE: Final = 1 << 20


def snapshot_fields(snapshot: Snapshot) -> dict[str, Any]:
    """What JSON says of a snapshot."""
    document = snapshot.document
    return {
        "id": document.id,
        "time": time_text(document.start_ns // _MS),
        "end": time_text(document.end_ns // _MS) if document.end_ns else None,
        "host": document.host,
        "user": document.user,
        "paths": list(document.paths),
        "tags": list(document.tags),
        "rules": list(document.rules),
        "parent": document.parent or None,
        "complete": document.is_complete,
        "tree": document.tree or None,
        "statistics": dataclasses.asdict(document.statistics),
        "problems": [dataclasses.asdict(problem) for problem in document.problems],
    }


def located(db: Database, place: str) -> tuple[Snapshot, bytes]:
    """The snapshot and the path of `SNAP[:PATH]`."""
    identity, _, path = place.partition(":")
    return db.snapshots.get(identity), os.fsencode(path).strip(b"/")


@click.command(cls=Command)
@click.option("--host", metavar="NAME", help="Of this machine only.")
@click.option("--tag", metavar="WORD", help="With this tag only.")
@click.option("--path", metavar="PATH", help="Of this path only.")
@pass_target
def snapshots(target: Target, *, host: str | None, tag: str | None, path: str | None) -> None:
    """List snapshots, the oldest first. An interrupted backup is one, and says so."""
    with target.open("r") as db:
        found = db.snapshots.list(host=host, tag=tag, path=path)
    if wants_json():
        for one in found:
            print_json(snapshot_fields(one))
        return
    print_table(
        ("id", "time", "host", "files", "bytes", "tags", "paths"),
        (
            (
                one.id,
                time_text(one.start_ns // _MS),
                printable(one.host),
                f"{one.statistics.files:,}" if one.is_complete else "incomplete",
                f"{one.statistics.size:,}" if one.is_complete else "-",
                printable(",".join(one.tags)),
                printable(" ".join(one.paths)),
            )
            for one in found
        ),
    )


@click.command("ls", cls=Command)
@click.argument("place", metavar="SNAP[:PATH]")
@click.option("-l", "--long", "detailed", is_flag=True, help="With mode, owner, size and time.")
@click.option("-R", "--recursive", is_flag=True, help="With all that lies below.")
@pass_target
def ls(target: Target, *, place: str, detailed: bool, recursive: bool) -> None:
    """List a directory of a snapshot. SNAP is an id, the beginning of one, or `latest`."""
    with target.open("r") as db:
        snapshot, path = located(db, place)
        meta = detailed or wants_json()
        for entry in snapshot.walk(path, meta=meta) if recursive else snapshot.ls(path, meta=meta):
            _show_entry(snapshot, entry, detailed=detailed)


def _show_entry(snapshot: Snapshot, entry: Entry, *, detailed: bool) -> None:
    if wants_json():
        print_json(entry_fields(snapshot, entry))
    elif detailed:
        print_line("\t".join(_details(snapshot, entry)))
    else:
        print_line(printable(entry.path))


def entry_fields(snapshot: Snapshot, entry: Entry) -> dict[str, Any]:
    """What JSON says of a path."""
    fields: dict[str, Any] = {
        **bytes_field("path", entry.path),
        "kind": _KINDS[entry.kind],
        "size": entry.size,
        "key": entry.key.hex() if entry.key else None,
    }
    if entry.kind == 1:
        fields["files"] = entry.files
    if entry.meta:
        found = snapshot.attributes(entry)
        fields |= {
            "mode": f"{found.mode:04o}",
            "uid": found.uid,
            "gid": found.gid,
            "user": snapshot.document.owners.get(str(found.uid)),
            "group": snapshot.document.groups.get(str(found.gid)),
            "mtime_ns": found.mtime_ns,
        }
        if found.target is not None:
            fields |= bytes_field("target", found.target)
        if found.xattrs:
            fields["xattrs"] = {printable(name): value.hex() for name, value in found.xattrs.items()}
    return fields


def _details(snapshot: Snapshot, entry: Entry) -> Iterator[str]:
    found = snapshot.attributes(entry)
    owners, groups = snapshot.document.owners, snapshot.document.groups
    yield _LETTERS[entry.kind] + stat.filemode(found.mode)[1:]
    yield printable(owners.get(str(found.uid), str(found.uid)))
    yield printable(groups.get(str(found.gid), str(found.gid)))
    yield f"{entry.size:,}"
    yield time_text(found.mtime_ns // _MS)
    yield printable(entry.path) + (f" -> {printable(found.target)}" if found.target is not None else "")


@click.command(cls=Command)
@click.argument("place", metavar="SNAP:PATH")
@pass_target
def cat(target: Target, place: str) -> None:
    """Write a file of a snapshot to standard output."""
    with target.open("r") as db:
        snapshot, path = located(db, place)
        with snapshot.open(path) as file:
            while piece := file.read(_COPY_SIZE):
                write(piece)


@click.command(cls=Command)
@click.argument("pattern")
@click.option("-s", "--snapshot", "identities", multiple=True, metavar="SNAP", help="In this one. [in all]")
@click.option("-l", "--long", "detailed", is_flag=True, help="With mode, owner, size and time.")
@pass_target
def find(target: Target, *, pattern: str, identities: tuple[str, ...], detailed: bool) -> None:
    """Find paths in snapshots: PATTERN (*, ?, [abc]) is compared with names, or with paths if it has a slash."""
    wanted = os.fsencode(pattern.lstrip("/"))
    whole = b"/" in wanted
    with target.open("r") as db:
        chosen = [db.snapshots.get(one) for one in identities] if identities else db.snapshots.list()
        for snapshot in chosen:
            for entry in snapshot.walk(meta=detailed or wants_json()):
                if fnmatch.fnmatchcase(entry.path if whole else entry.name, wanted):
                    if wants_json():
                        print_json({"snapshot": snapshot.id, **entry_fields(snapshot, entry)})
                    elif detailed:
                        print_line("\t".join((snapshot.id, *_details(snapshot, entry))))
                    else:
                        print_line(f"{snapshot.id}:{printable(entry.path)}")


@click.command(cls=Command)
@click.argument("one", metavar="SNAP")
@click.argument("other", metavar="SNAP")
@click.option("-m", "--metadata", is_flag=True, help="Also where nothing but modes, owners or times differ.")
@pass_target
def diff(target: Target, *, one: str, other: str, metadata: bool) -> None:
    """Show what differs from the first snapshot to the second: + new, - gone, M content, T kind, U metadata."""
    counts = dict.fromkeys("+-MTU", 0)
    with target.open("r") as db:
        before, after = db.snapshots.get(one), db.snapshots.get(other)
        for new, old in after.diff(before, meta=metadata):
            mark = _mark(new, old)
            entry = new or old
            if mark is None or entry is None:
                continue
            counts[mark] += 1
            if wants_json():
                print_json({"change": mark, **bytes_field("path", entry.path), "kind": _KINDS[entry.kind]})
            else:
                print_line(f"{mark} {printable(entry.path)}{'/' if entry.kind == 1 else ''}")
    if not wants_json():
        print_line(
            f"{counts['+']:,} new, {counts['-']:,} gone, {counts['M']:,} changed, {counts['T']:,} of another kind"
            + (f", {counts['U']:,} with other metadata" if metadata else "")
        )


def _mark(new: Entry | None, old: Entry | None) -> str | None:
    """How a path changed; None for a directory in which something changed."""
    if new is None or old is None:
        return "-" if new is None else "+"
    if new.kind != old.kind:
        return "T"
    if new.kind != 1 and (new.key, new.size) != (old.key, old.size):
        return "M"
    return "U" if new.meta != old.meta else None


_KEEP: Final = {
    "last": "The newest N; -1: all.",
    "hourly": "The newest of each hour, for the last N hours that have one.",
    "daily": "Likewise of each day.",
    "weekly": "Of each week.",
    "monthly": "Of each month.",
    "yearly": "Of each year.",
}


def _keep_options(command: Any) -> Any:
    for period in reversed(list(_KEEP)):
        command = click.option(
            f"--keep-{period}", type=click.IntRange(min=-1), default=0, metavar="N", help=_KEEP[period]
        )(command)
    return command


@click.command(cls=Command)
@click.argument("identities", nargs=-1, metavar="[SNAP...]")
@_keep_options
@click.option("--keep-within", metavar="DURATION", help="Those not older than this before the newest: 2y5m7d3h.")
@click.option("--keep-tag", multiple=True, metavar="WORD", help="Those with this tag.")
@click.option("--host", metavar="NAME", help="Decide about this machine's only.")
@click.option("--tag", metavar="WORD", help="Decide about those with this tag only.")
@click.option("--path", metavar="PATH", help="Decide about those of this path only.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would go.")
@pass_target
def forget(
    target: Target,
    /,
    *,
    identities: tuple[str, ...],
    keep_within: str | None,
    keep_tag: tuple[str, ...],
    host: str | None,
    tag: str | None,
    path: str | None,
    dry_run: bool,
    **keep: int,
) -> None:
    """Let go of snapshots: those named, or all that no rule keeps, for each host and its paths apart.

    Their space is free after `basin compact --prune`.
    """
    policy = {name.removeprefix("keep_"): value for name, value in keep.items() if value}
    if bool(identities) == bool(policy or keep_within or keep_tag):
        raise click.UsageError("give snapshots, or what to keep")
    with target.open("r" if dry_run else "w") as db:
        if identities:
            decided: list[_Decided] = [(db.snapshots.get(one), False, ("named",)) for one in identities]
        else:
            found = db.snapshots.list(host=host, tag=tag, path=path)
            decided = _decided(found, policy, keep_within, keep_tag)
        gone = [snapshot.id for snapshot, kept, _ in decided if not kept]
        if gone and not dry_run:
            db.snapshots.forget(gone)
    for snapshot, kept, reasons in decided:
        verb = "keep" if kept else "would forget" if dry_run else "forgot"
        if wants_json():
            print_json({"kept": kept, "dry_run": dry_run, "reasons": list(reasons), **snapshot_fields(snapshot)})
        else:
            when = time_text(snapshot.start_ns // _MS)
            print_line(f"{verb}\t{snapshot.id}\t{when}\t{printable(', '.join(reasons))}")


def _decided(
    found: Sequence[Snapshot], numbers: Mapping[str, int], within: str | None, tags: tuple[str, ...]
) -> list[_Decided]:
    from basin.layers.snapshots.retention import Duration, Policy, decide

    policy = Policy(**numbers, within=Duration.parse(within) if within else None, tags=tags)
    decisions = decide(found, policy, time.time_ns())
    return [(one, decision.keep, decision.reasons) for one, decision in zip(found, decisions, strict=True)]

"""Snapshots: backups of directory trees. `db.snapshots`."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from getpass import getuser
from typing import TYPE_CHECKING, Final

from basin.engine.basin import Basin, Names
from basin.errors import InvalidArgument, NameNotFound
from basin.layers.snapshots.create import (
    JOURNAL_INTERVAL_S,
    JOURNAL_SIZE,
    Backup,
    BackupOptions,
    BackupProgress,
)
from basin.layers.snapshots.documents import (
    Document,
    Problem,
    Statistics,
    bytes_of,
    decode_document,
    id_of,
    new_id,
    snapshot_name,
    text_of,
)
from basin.layers.snapshots.earlier import Known
from basin.layers.snapshots.journal import delete_journal, journal_beginning, journal_rows, names
from basin.layers.snapshots.patterns import Rules, read_patterns
from basin.layers.snapshots.snapshot import Snapshot, TreePath, tree_path

if TYPE_CHECKING:
    from basin.engine.basin import Batch
    from basin.engine.sources import Source

__all__ = [
    "BackupProgress",
    "Document",
    "Problem",
    "Rules",
    "Snapshot",
    "Snapshots",
    "Statistics",
    "TreePath",
    "read_patterns",
]

LATEST: Final = "latest"
_PREFIX_MIN: Final = 4
_READ_TOGETHER: Final = 256


class Snapshots:
    """The snapshots of a basin. On a view, those of its position, to be read."""

    def __init__(self, basin: Names) -> None:
        self._basin = basin

    # --- making -----------------------------------------------------------------------------------------------------

    def create(
        self,
        paths: Sequence[TreePath] | TreePath,
        *,
        tags: Iterable[str] = (),
        rules: Rules | None = None,
        one_file_system: bool = False,
        exclude_caches: bool = False,
        parent: str | None = None,
        host: str | None = None,
        dry_run: bool = False,
        progress: Callable[[BackupProgress], None] | None = None,
        journal_interval_s: float = JOURNAL_INTERVAL_S,
        journal_size: int = JOURNAL_SIZE,
    ) -> Snapshot:
        """Back up files and directories; returns the snapshot, durable. Its `problems` say what could not be saved.

        `parent`: the snapshot whose unchanged files are not read again; by default the newest complete one of the same
        host and paths, with `""` none. What an interrupted backup of the same host and paths had finished is found and
        not read again either, whatever the parent. `rules` say what is left out. A `dry_run` reads no file, writes
        nothing, and returns a snapshot that exists nowhere, for its statistics.

        Raises `InvalidArgument`, `ReadOnly`, `NameNotFound` (no such parent), `StorageError`. Memory: about 100 MiB
        beside the handle's own, however many files there are.
        """
        basin = self._writable(dry_run=dry_run)
        given = [paths] if isinstance(paths, (str, bytes, os.PathLike)) else list(paths)
        if not given:
            raise InvalidArgument("no path to back up")
        real = [os.path.abspath(bytes_of(path)) for path in given]  # noqa: PTH100  # of bytes, and without following links
        rules = rules or Rules()
        document = self._document(sorted({text_of(path) for path in real}), tags, host, rules.describe())
        earlier = [one for one in self.list() if (one.host, list(one.paths)) == (document.host, list(document.paths))]
        basis = self._basis(parent, earlier)
        interrupted = [one for one in reversed(earlier) if not one.is_complete]
        known = [
            Known(journal_rows(self._basin, one.id), one.start_ns, journal_beginning(self._basin, one.id))
            for one in interrupted
        ]
        if basis is not None:
            known.append(Known(basis.walk(), basis.start_ns))
        if parent == "":
            known = []
        options = BackupOptions(
            rules, one_file_system, exclude_caches, dry_run, journal_interval_s, journal_size, progress
        )
        expected = basis.statistics if basis is not None else Statistics()
        backup = Backup(basin, _with_parent(document, basis), options, known, expected)
        return Snapshot(self._basin, backup.run(real, [one.id for one in interrupted]))

    def create_from_stream(
        self,
        source: Source,
        name: str = "stdin",
        *,
        tags: Iterable[str] = (),
        host: str | None = None,
        progress: Callable[[BackupProgress], None] | None = None,
    ) -> Snapshot:
        """A snapshot of one file, `name`, whose content is read from `source` in bounded memory, to its end."""
        basin = self._writable(dry_run=False)
        path = tree_path(name)
        if not path or b"/" in path:
            raise InvalidArgument(f"not the name of a file: {name!r}")
        document = self._document([name], tags, host, ())
        backup = Backup(basin, document, BackupOptions(Rules(), progress=progress), [], Statistics())
        return Snapshot(self._basin, backup.put_stream(path, source))

    def _writable(self, *, dry_run: bool) -> Basin:
        if not isinstance(self._basin, Basin):
            raise InvalidArgument("snapshots are made on the handle itself, not in a batch, transaction or view")
        if not dry_run:
            self._basin.scope.require_writable()
        return self._basin

    def _document(self, paths: Sequence[str], tags: Iterable[str], host: str | None, rules: Sequence[str]) -> Document:
        if isinstance(tags, str):
            raise InvalidArgument("tags are several words, not one text")
        return Document(
            new_id(),
            time.time_ns(),
            socket.gethostname() if host is None else host,
            _user(),
            paths,
            sorted(set(tags)),
            rules,
        )

    def _basis(self, parent: str | None, earlier: Sequence[Snapshot]) -> Snapshot | None:
        if parent:
            return self.get(parent)
        if parent is None:
            return next((one for one in reversed(earlier) if one.is_complete), None)
        return None

    # --- finding ----------------------------------------------------------------------------------------------------

    def list(self, *, host: str | None = None, path: TreePath | None = None, tag: str | None = None) -> list[Snapshot]:
        """All snapshots, or those of a host, of a path, with a tag; the oldest first. Reads a small grain each."""
        found = []
        where = names(self._basin)
        ids = [one for one in map(id_of, where.scan(prefix=b"s", keys_only=True)) if one is not None]
        for at in range(0, len(ids), _READ_TOGETHER):
            together = ids[at : at + _READ_TOGETHER]
            for identity, data in zip(together, where.get_many(map(snapshot_name, together)), strict=True):
                if data is not None:
                    found.append(Snapshot(self._basin, decode_document(data, identity)))
        wanted = None if path is None else text_of(os.path.abspath(bytes_of(path)))  # noqa: PTH100  # of bytes
        return sorted(
            (
                one
                for one in found
                if host in (None, one.host)
                and (wanted is None or wanted in one.paths)
                and (tag is None or tag in one.tags)
            ),
            key=lambda one: (one.start_ns, one.id),
        )

    def get(self, identity: str) -> Snapshot:
        """A snapshot by its id, by the beginning of its id (four digits at least), or the `latest` complete one.

        Raises `NameNotFound`, and `InvalidArgument` if several begin like this.
        """
        if identity == LATEST:
            complete = [one for one in self.list() if one.is_complete]
            if not complete:
                raise NameNotFound("there is no complete snapshot", name=identity)
            return complete[-1]
        name = snapshot_name(identity)
        found = (
            [one for one in names(self._basin).scan(prefix=name, limit=2, keys_only=True) if id_of(one)]
            if len(identity) >= _PREFIX_MIN
            else []
        )
        if len(found) > 1:
            raise InvalidArgument(f"several snapshots begin with {identity}")
        whole = id_of(found[0]) if found else None
        if whole is None:
            raise NameNotFound(f"no snapshot {identity}", name=identity)
        return Snapshot(self._basin, decode_document(names(self._basin)[found[0]], whole))

    def forget(self, identities: Iterable[str]) -> None:
        """Let go of snapshots, all together; their space is free after a prune. Raises `NameNotFound` for one."""
        basin = self._writable(dry_run=False)
        found = [self.get(identity) for identity in identities]
        with basin.batch() as batch:
            for one in found:
                _forget(batch, one.id)


def _forget(batch: Batch, identity: str) -> None:
    names(batch).delete(snapshot_name(identity))
    delete_journal(batch, identity)


def _user() -> str:
    try:
        return getuser()
    except (KeyError, OSError):  # A number without a name.
        return str(os.getuid())


def _with_parent(document: Document, basis: Snapshot | None) -> Document:
    return document if basis is None else dataclasses.replace(document, parent=basis.id)

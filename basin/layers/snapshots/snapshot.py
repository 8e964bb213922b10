"""A snapshot, to be looked at and restored.

Paths are those of the tree: the absolute paths that were backed up, without the slash in front. They are given as text
or bytes, with or without that slash.

Invariant: an interrupted backup shows what its journal holds, and says that it is incomplete.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

from basin.engine.basin import Names
from basin.errors import InvalidArgument, NameNotFound
from basin.format.tree import Entry, RowKind, is_name
from basin.layers.blobs import Blobs
from basin.layers.snapshots.attributes import Attributes, decode_attributes
from basin.layers.snapshots.documents import Document, bytes_of, text_of
from basin.layers.snapshots.journal import journal_rows
from basin.layers.tree import BlobStore, MemoryStore, Tree, TreeWriter
from basin.terms import ContentKey

if TYPE_CHECKING:
    from collections.abc import Sequence

    from basin.layers.snapshots.documents import Problem, Statistics
    from basin.layers.snapshots.restore import RestoreOptions, RestoreReport

TreePath: TypeAlias = "str | bytes | os.PathLike[Any]"


class Snapshot:
    """One backup of directories. Safe for one thread at a time."""

    def __init__(self, basin: Names, document: Document) -> None:
        self._basin = basin
        self._blobs = Blobs(basin)
        self.document = document

    def __repr__(self) -> str:
        state = "" if self.is_complete else ", incomplete"
        return f"<Snapshot {self.id[:8]} of {', '.join(self.paths)}{state}>"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same snapshot, not whether it holds the same."""
        return isinstance(other, Snapshot) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> str:
        """16 hexadecimal digits."""
        return self.document.id

    @property
    def start_ns(self) -> int:
        """When the backup began, in nanoseconds since 1970."""
        return self.document.start_ns

    @property
    def host(self) -> str:
        """The machine that was backed up."""
        return self.document.host

    @property
    def paths(self) -> Sequence[str]:
        """The absolute paths that were backed up."""
        return self.document.paths

    @property
    def tags(self) -> Sequence[str]:
        """Words that the user gave it."""
        return self.document.tags

    @property
    def is_complete(self) -> bool:
        """Whether the backup came to its end."""
        return self.document.is_complete

    @property
    def complete(self) -> bool:
        """`is_complete`, by the name that retention knows."""
        return self.document.is_complete

    @property
    def statistics(self) -> Statistics:
        """What the backup met and did."""
        return self.document.statistics

    @property
    def problems(self) -> Sequence[Problem]:
        """What could not be saved, or changed while it was read: the first thousand."""
        return self.document.problems

    @cached_property
    def tree(self) -> Tree:
        """The tree; that of an interrupted backup is put together in memory, about 300 bytes a row."""
        if self.is_complete:
            return Tree(BlobStore(lambda: self._blobs), bytes.fromhex(self.document.tree))
        store = MemoryStore()
        writer = TreeWriter(store)
        for row in journal_rows(self._basin, self.id):
            writer.add(row)
        return Tree(store, writer.finish())

    # --- looking ----------------------------------------------------------------------------------------------------

    def entry(self, path: TreePath) -> Entry:
        """The row of a path, with its metadata; raise `NameNotFound`."""
        wanted = tree_path(path)
        if not wanted:
            return Entry(b"", b"", RowKind.DIRECTORY, self.tree.size, self.tree.files)
        found = self.tree.entry(wanted, meta=True)
        if found is None:
            raise NameNotFound(f"no {text_of(wanted)} in snapshot {self.id}", name=wanted)
        return found

    def ls(self, path: TreePath = b"", *, meta: bool = True) -> Iterator[Entry]:
        """The children of a directory, by name; a file itself. Raises `NameNotFound`."""
        entry = self.entry(path)
        if entry.kind == RowKind.DIRECTORY:
            return self.tree.ls(tree_path(path), meta=meta)
        return iter([entry])

    def walk(self, path: TreePath = b"", *, meta: bool = True) -> Iterator[Entry]:
        """All rows below a directory: its children, then those of each of its directories; a file itself.

        Raises `NameNotFound`. Cost: all pages below, some read together.
        """
        entry = self.entry(path)
        if entry.kind == RowKind.DIRECTORY:
            return self.tree.walk(tree_path(path), meta=meta)
        return iter([entry])

    def attributes(self, entry: Entry) -> Attributes:
        """The metadata of an entry that was listed with it."""
        return decode_attributes(entry.meta)

    def open(self, path: TreePath) -> io.BufferedReader:
        """A seekable file of what a file held; raise `NameNotFound`, or `InvalidArgument` for what is no file."""
        return self.open_entry(self.entry(path))

    def open_entry(self, entry: Entry) -> io.BufferedReader:
        """`open` of an entry that was listed."""
        if entry.kind != RowKind.FILE:
            raise InvalidArgument(f"{text_of(entry.path)} is no file")
        if entry.key is None:
            return io.BufferedReader(io.BytesIO())
        return self._blobs.open(ContentKey(entry.key))

    def diff(self, other: Snapshot, *, meta: bool = True) -> Iterator[tuple[Entry | None, Entry | None]]:
        """What differs from `other`: (here, there), None where there is none. Reads only pages that differ.

        With `meta=False` only kinds, sizes and contents count.
        """
        return self.tree.diff(other.tree, meta=meta)

    # --- restoring --------------------------------------------------------------------------------------------------

    def restore(self, target: TreePath, path: TreePath = b"", options: RestoreOptions | None = None) -> RestoreReport:
        """Write what lies below `path` into the directory `target`, which is made if it is not there.

        A file is written into `target` under its name. Never writes outside of `target`. What could not be restored is
        in the report. Raises `NameNotFound`.
        """
        from basin.layers.snapshots.restore import RestoreOptions, restore

        wanted = tree_path(path)
        entry = self.entry(wanted)
        if entry.kind == RowKind.DIRECTORY:
            rows: Iterable[Entry] = (_below(row, wanted) for row in self.tree.walk(wanted, meta=True))
        else:
            rows = [entry._replace(parent=b"")]
        return restore(rows, self._blobs, bytes_of(target), options or RestoreOptions(), self.document)


def _below(entry: Entry, directory: bytes) -> Entry:
    """The row with its path from `directory` on."""
    return entry._replace(parent=entry.parent[len(directory) :].lstrip(b"/")) if directory else entry


def tree_path(path: TreePath) -> bytes:
    """A path as trees have it; raise `InvalidArgument` for one that leads out of it."""
    parts = [part for part in bytes_of(path).split(b"/") if part and part != b"."]
    if not all(map(is_name, parts)):
        raise InvalidArgument(f"not a path in a snapshot: {text_of(bytes_of(path))!r}")
    return b"/".join(parts)

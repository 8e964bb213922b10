"""Trees for tests: a store in memory that says what is read, rows of generated trees, and odd names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from blake3 import blake3
from hypothesis import strategies as st

from basin.format.tree import Entry, RowKind, order_of
from basin.layers.tree import Tree, TreeWriter

Folder: TypeAlias = "dict[bytes, Folder | bytes]"
"""Names to sub-directories or contents."""


class MemoryStore:
    """A tree's grains by content key; `read` lists the keys that were asked for."""

    def __init__(self) -> None:
        self.grains: dict[bytes, tuple[bytes, list[bytes]]] = {}
        self.read: list[bytes] = []

    def get(self, keys: Sequence[bytes]) -> list[tuple[bytes, list[bytes]]]:
        self.read += keys
        return [self.grains[key] for key in keys]

    def put(self, content: bytes, links: Sequence[bytes]) -> bytes:
        key = blake3(content).digest()
        self.grains[key] = (content, list(links))
        return key

    def put_many(self, contents: Sequence[bytes]) -> list[bytes]:
        return [self.put(content, ()) for content in contents]


def rows_of(folder: Folder, path: bytes = b"", meta: bytes = b"") -> list[Entry]:
    """The rows of nested dicts, in tree order, with totals; `meta` and the path are each row's metadata."""
    here, below = [], []
    for name, inside in sorted(folder.items()):
        whole = path + b"/" + name if path else name
        of_row = meta + whole if meta else b""
        if isinstance(inside, bytes):
            key = blake3(inside).digest() if inside else None
            here.append(Entry(path, name, RowKind.FILE, len(inside), 0, key, of_row))
        else:
            rows = rows_of(inside, whole, meta)
            files = [row for row in rows if row.kind == RowKind.FILE]
            size = sum(row.size for row in files)
            here.append(Entry(path, name, RowKind.DIRECTORY, size, len(files), None, of_row))
            below += rows
    return here + below


def written(store: MemoryStore, rows: Iterable[Entry], header: bytes = b"") -> Tree:
    """A tree of rows; totals in them are ignored, as the writer finds them out."""
    writer = TreeWriter(store, header)
    for row in rows:
        writer.add(row._replace(size=0, files=0) if row.kind == RowKind.DIRECTORY else row)
    return Tree(store, writer.finish())


def in_order(rows: Iterable[Entry]) -> list[Entry]:
    return sorted(rows, key=lambda row: (order_of(row.parent), row.name))


names = (
    st.binary(min_size=1, max_size=12)
    .map(lambda name: name.replace(b"/", b"-").replace(b"\0", b"\1"))
    .filter(lambda name: name not in (b".", b".."))
)
"""Not UTF-8, with every byte that sorts before and behind the slash."""

folders: st.SearchStrategy[Folder] = st.recursive(
    st.dictionaries(names, st.binary(max_size=6), max_size=6),
    lambda inner: st.dictionaries(names, st.one_of(st.binary(max_size=6), inner), max_size=6),
    max_leaves=40,
)

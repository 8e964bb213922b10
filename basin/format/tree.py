"""Tree pages: a sorted list of paths, cut into pages by what it holds, so that versions of a tree share pages.

Four structures, each the content of one grain. Content keys stand in the grain's link list, so that marking follows
them without understanding any of this; a structure refers to them by number, and holds a digest of the list, so that
its own content key covers them.

- A *page* holds rows: parents once, names, kinds, sizes, and the number of a content key for each file.
- A *node* lists pages, or lower nodes, with the first row of each; the highest one is the tree, and holds its totals.
- A *metadata list* names the metadata chunks of a page; a *chunk* holds the metadata of `CHUNK_ROWS` rows, opaque here.

Rows are sorted by parent, compared part by part, then by name: the rows of a directory are one stretch, and so are
those of each of its sub-directories. Where a page ends depends on the paths in it alone.

Invariants: what is decoded is sorted, within its caps, and has names that are safe to use as parts of a path. Pure.
"""

from __future__ import annotations

import enum
import operator
import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from blake3 import blake3

from basin.errors import CorruptionError, InvalidArgument, UnsupportedVersion

TREE_VERSION: Final = 1
PAGE_ROWS_MIN: Final = 1024
"""A page has at least so many rows, unless it is the last."""
PAGE_ROWS_MAX: Final = 8192
PAGE_CUT: Final = 3072
"""One of so many paths ends a page that is long enough."""
CHUNK_ROWS: Final = 256
NODE_ENTRIES_MAX: Final = 4096
NODE_LEVEL_MAX: Final = 4
PATH_SIZE_MAX: Final = 65_535
NAME_PART_MAX: Final = 4096
PAGE_SIZE_MAX: Final = 96 << 20
"""Of the parents and names of a page; a page that would be larger ends earlier."""

_PAGE_MAGIC: Final = b"BTPG"
_NODE_MAGIC: Final = b"BTND"
_LIST_MAGIC: Final = b"BTML"
TREE_PAGE: Final = struct.Struct("<4sHHIIIIIII16s")
TREE_PAGE_SIZE: Final = 52
TREE_NODE: Final = struct.Struct("<4sHBBIIIIQQQ16s")
TREE_NODE_SIZE: Final = 64
METADATA_LIST: Final = struct.Struct("<4sHHII16s")
METADATA_LIST_SIZE: Final = 32
_NONE: Final = 0xFFFFFFFF
_NO_CHUNK: Final = 0xFFFF
_U64: Final = np.dtype("<u8")


class RowKind(enum.IntEnum):
    """What a row stands for."""

    FILE = 0
    DIRECTORY = 1
    LINK = 2
    FIFO = 3
    CHARACTER_DEVICE = 4
    BLOCK_DEVICE = 5
    SOCKET = 6


_KINDS: Final = bytes(RowKind)
_FILE: Final = int(RowKind.FILE)
_DIRECTORY: Final = int(RowKind.DIRECTORY)


class Entry(NamedTuple):
    """One row. `size` of a directory is that of all files below it, `files` their number; `key` is of a file's content.

    `meta` is empty where nobody asked for it.
    """

    parent: bytes
    name: bytes
    kind: int
    size: int
    files: int = 0
    key: bytes | None = None
    meta: bytes = b""

    @property
    def path(self) -> bytes:
        """Parent and name, joined by `/`."""
        return self.parent + b"/" + self.name if self.parent else self.name


def order_of(path: bytes) -> bytes:
    """What parents are compared by: `/` sorts before all that a name may hold."""
    return path.replace(b"/", b"\0")


def ends_page(path: bytes) -> bool:
    """Whether a page that is long enough ends behind this path."""
    return int.from_bytes(blake3(path).digest(8), "little") % PAGE_CUT == 0


def links_tag(links: Sequence[bytes]) -> bytes:
    """What a structure holds of its grain's link list."""
    return blake3(b"".join(links)).digest(16)


def is_name(name: bytes) -> bool:
    """Whether a name can stand in a row: no path, and no way out of its directory."""
    return 0 < len(name) <= NAME_PART_MAX and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


# --- pages ------------------------------------------------------------------------------------------------------------


class Page:
    """The rows of a page, by column. `firsts` has one more element than `parents`: the last is the number of rows."""

    __slots__ = ("files", "firsts", "keys", "kinds", "names", "parents", "sizes")

    def __init__(
        self,
        parents: list[bytes],
        firsts: list[int],
        names: list[bytes],
        kinds: bytes | bytearray,
        sizes: list[int],
        files: list[int],
        keys: list[bytes | None],
    ) -> None:
        self.parents = parents
        self.firsts = firsts
        self.names = names
        self.kinds = kinds
        self.sizes = sizes
        self.files = files
        self.keys = keys

    def __len__(self) -> int:
        return len(self.names)

    def entries(self, start: int = 0, stop: int = PAGE_ROWS_MAX, metas: Sequence[bytes] = ()) -> Iterator[Entry]:
        """The rows from `start` to `stop`; `metas` is the metadata of all rows of the page."""
        metas = metas or [b""] * len(self.names)
        for parent, (first, end) in zip(self.parents, pairwise(self.firsts), strict=True):
            part = slice(max(first, start), min(end, stop))
            if part.start < part.stop:
                for columns in zip(
                    self.names[part],
                    self.kinds[part],
                    self.sizes[part],
                    self.files[part],
                    self.keys[part],
                    metas[part],
                    strict=True,
                ):
                    yield Entry(parent, *columns)


def encode_page(page: Page) -> tuple[bytes, list[bytes]]:
    """The page's grain: its content, and its links."""
    numbers: dict[bytes, int] = {}
    of_row = [numbers.setdefault(key, len(numbers)) for key in page.keys if key is not None]
    links = list(numbers)
    parents, names = b"\0".join(page.parents), b"\0".join(page.names)
    counts = [count for count, kind in zip(page.files, page.kinds, strict=True) if kind == _DIRECTORY]
    keyed = np.array([key is not None for key in page.keys], dtype=np.bool_)
    header = TREE_PAGE.pack(
        _PAGE_MAGIC,
        TREE_VERSION,
        0,
        len(page.names),
        len(page.parents),
        len(of_row),
        len(counts),
        len(links),
        len(parents),
        len(names),
        links_tag(links),
    )
    content = b"".join(
        (
            header,
            parents,
            np.array(page.firsts[:-1], dtype="<u2").tobytes(),
            names,
            bytes(page.kinds),
            np.packbits(keyed, bitorder="little").tobytes(),
            _planes(page.sizes),
            _planes(counts),
            np.array(of_row, dtype="<u2").tobytes(),
        )
    )
    return content, links


def _planes(numbers: Sequence[int]) -> bytes:
    """Numbers of 64 bits by byte: all lowest bytes first. The high ones, mostly zero, then compress to nothing."""
    return np.ascontiguousarray(np.array(numbers, dtype=_U64).view(np.uint8).reshape(-1, 8).T).tobytes()


def _from_planes(data: bytes) -> list[int]:
    bytewise = np.frombuffer(data, dtype=np.uint8).reshape(8, -1)
    numbers: list[int] = np.ascontiguousarray(bytewise.T).view(_U64).reshape(-1).tolist()
    return numbers


class _Sections:
    """Takes sections from a content, one after another; raises `CorruptionError` when there is not enough of it."""

    def __init__(self, content: bytes, what: str, at: int) -> None:
        self._content, self._what, self._at = content, what, at

    def take(self, size: int) -> bytes:
        part = self._content[self._at : self._at + size]
        if len(part) != size:
            raise CorruptionError(f"{self._what} is cut short")
        self._at += size
        return part

    def numbers(self, count: int, dtype: str) -> list[int]:
        width = int(dtype[-1])
        found: list[int] = np.frombuffer(self.take(count * width), dtype=dtype).tolist()
        return found

    def end(self) -> None:
        if self._at != len(self._content):
            raise CorruptionError(f"{self._what} has {len(self._content) - self._at} bytes too many")


def _header(layout: struct.Struct, magic: bytes, content: bytes, what: str) -> tuple[Any, ...]:
    """The fields behind magic and version."""
    if len(content) < layout.size:
        raise CorruptionError(f"{what} is cut short")
    found, version, *fields = layout.unpack_from(content)
    if found != magic:
        raise CorruptionError(f"{what} does not start with its magic bytes")
    if version != TREE_VERSION:
        raise UnsupportedVersion(f"tree format {version} needs a newer Basin", version=version)
    return tuple(fields)


def decode_page(content: bytes, links: Sequence[bytes]) -> Page:
    """Undo `encode_page`; raise `CorruptionError` for what it would not have written."""
    what = "a tree page"
    flags, rows, parent_count, keyed_count, directories, link_count, parents_size, names_size, tag = _header(
        TREE_PAGE, _PAGE_MAGIC, content, what
    )
    if flags or not 0 < rows <= PAGE_ROWS_MAX or not 0 < parent_count <= rows or keyed_count > rows:
        raise CorruptionError(f"{what} holds impossible counts")
    _require_links(links, link_count, tag, what)
    sections = _Sections(content, what, TREE_PAGE_SIZE)
    parents = sections.take(parents_size).split(b"\0")
    firsts = [*sections.numbers(parent_count, "<u2"), rows]
    names = sections.take(names_size).split(b"\0")
    kinds = sections.take(rows)
    keyed = np.unpackbits(
        np.frombuffer(sections.take((rows + 7) // 8), dtype=np.uint8), count=rows, bitorder="little"
    ).astype(np.bool_)
    sizes = _from_planes(sections.take(8 * rows))
    of_directories = _from_planes(sections.take(8 * directories))
    numbers = sections.numbers(keyed_count, "<u2")
    sections.end()
    if len(parents) != parent_count or len(names) != rows:
        raise CorruptionError(f"{what} has not the parents or names that it counts")
    if kinds.translate(None, _KINDS) or kinds.count(_DIRECTORY) != directories or int(keyed.sum()) != keyed_count:
        raise CorruptionError(f"{what} holds impossible kinds")
    _require_order(parents, firsts, names)
    kind_of = np.frombuffer(kinds, dtype=np.uint8)
    if keyed_count and (np.any(kind_of[keyed] != _FILE) or max(numbers) >= link_count):
        raise CorruptionError(f"{what} holds content keys where none belong")
    if np.any((np.array(sizes, dtype=_U64) > 0) & (kind_of == _FILE) & ~keyed):
        raise CorruptionError(f"{what} holds a file without its content key")
    files = [0] * rows
    for row, count in zip(np.flatnonzero(kind_of == _DIRECTORY).tolist(), of_directories, strict=True):
        files[row] = count
    keys: list[bytes | None] = [None] * rows
    for row, number in zip(np.flatnonzero(keyed).tolist(), numbers, strict=True):
        keys[row] = links[number]
    return Page(parents, firsts, names, kinds, sizes, files, keys)


def _require_links(links: Sequence[bytes], count: int, tag: bytes, what: str) -> None:
    if len(links) != count or links_tag(links) != tag:
        raise CorruptionError(f"{what} has not the links that it was written with")


def _require_order(parents: Sequence[bytes], firsts: Sequence[int], names: Sequence[bytes]) -> None:
    """Parents and names ascend, and none leads out of the tree."""
    what = "a tree page"
    if firsts[0] != 0 or not all(map(operator.lt, firsts, firsts[1:])):
        raise CorruptionError(f"{what} has parents without rows")
    ordered = [order_of(parent) for parent in parents]
    if not all(map(operator.lt, ordered, ordered[1:])):
        raise CorruptionError(f"{what} is not sorted")
    for parent in parents:
        if len(parent) > PATH_SIZE_MAX or (parent and not all(map(is_name, parent.split(b"/")))):
            raise CorruptionError(f"{what} holds a parent that is no path")
    if b"" in names or not {b".", b".."}.isdisjoint(names) or b"/" in b"".join(names):
        raise CorruptionError(f"{what} holds a name that is none")
    if max(map(len, names)) > NAME_PART_MAX:
        raise CorruptionError(f"{what} holds a name that is too long")
    for first, end in pairwise(firsts):
        of_parent = names[first:end]
        if not all(map(operator.lt, of_parent, of_parent[1:])):
            raise CorruptionError(f"{what} is not sorted")


# --- nodes ------------------------------------------------------------------------------------------------------------


class NodeEntry(NamedTuple):
    """A page, or a lower node: its first row, how many rows it has, and its content key.

    `meta` is the key of a page's metadata list, if any of its rows has metadata.
    """

    parent: bytes
    name: bytes
    rows: int
    key: bytes
    meta: bytes | None


class Node(NamedTuple):
    """Pages (level 0) or nodes of the level below, in order. Totals are those of all rows below; `header` is opaque."""

    level: int
    files: int
    size: int
    header: bytes
    entries: list[NodeEntry]


def encode_node(node: Node) -> tuple[bytes, list[bytes]]:
    """The node's grain: its content, and its links."""
    numbers: dict[bytes, int] = {}
    keys = [numbers.setdefault(entry.key, len(numbers)) for entry in node.entries]
    metas = [_NONE if one.meta is None else numbers.setdefault(one.meta, len(numbers)) for one in node.entries]
    links = list(numbers)
    paths = b"\0\0".join(entry.parent + b"\0" + entry.name for entry in node.entries)
    rows = [entry.rows for entry in node.entries]
    header = TREE_NODE.pack(
        _NODE_MAGIC,
        TREE_VERSION,
        node.level,
        0,
        len(node.entries),
        len(links),
        len(node.header),
        len(paths),
        node.files,
        node.size,
        sum(rows),
        links_tag(links),
    )
    columns = np.array([keys, metas], dtype="<u4").tobytes()
    return b"".join((header, node.header, paths, columns, np.array(rows, dtype=_U64).tobytes())), links


def decode_node(content: bytes, links: Sequence[bytes]) -> Node:
    """Undo `encode_node`; raise `CorruptionError` for what it would not have written."""
    what = "a tree node"
    level, flags, count, link_count, header_size, paths_size, files, size, row_count, tag = _header(
        TREE_NODE, _NODE_MAGIC, content, what
    )
    if flags or level > NODE_LEVEL_MAX or count > NODE_ENTRIES_MAX:
        raise CorruptionError(f"{what} holds impossible counts")
    _require_links(links, link_count, tag, what)
    sections = _Sections(content, what, TREE_NODE_SIZE)
    header = sections.take(header_size)
    joined = sections.take(paths_size)
    keys, metas = sections.numbers(count, "<u4"), sections.numbers(count, "<u4")
    rows = sections.numbers(count, "<u8")
    sections.end()
    paths = joined.split(b"\0\0") if count else []
    if len(paths) != count or (not count and joined):
        raise CorruptionError(f"{what} has not the paths that it counts")
    if any(key >= link_count for key in keys) or any(meta != _NONE and meta >= link_count for meta in metas):
        raise CorruptionError(f"{what} refers to links that it has not")
    if 0 in rows or sum(rows) != row_count:
        raise CorruptionError(f"{what} does not add up to its rows")
    entries = []
    before: tuple[bytes, bytes] | None = None
    for path, number, key, meta in zip(paths, rows, keys, metas, strict=True):
        parent, zero, name = path.partition(b"\0")
        place = (order_of(parent), name)
        if not zero or not is_name(name) or (before is not None and place <= before):
            raise CorruptionError(f"{what} is not sorted")
        before = place
        entries.append(NodeEntry(parent, name, number, links[key], None if meta == _NONE else links[meta]))
    return Node(level, files, size, header, entries)


# --- metadata ---------------------------------------------------------------------------------------------------------


def encode_chunk(metas: Sequence[bytes]) -> bytes:
    """The metadata of up to `CHUNK_ROWS` rows."""
    ends = np.cumsum([0, *map(len, metas)], dtype=np.uint64).astype("<u4")
    return struct.pack("<I", len(metas)) + ends.tobytes() + b"".join(metas)


def decode_chunk(content: bytes) -> list[bytes]:
    """Undo `encode_chunk`."""
    what = "a metadata chunk"
    if len(content) < 4:
        raise CorruptionError(f"{what} is cut short")
    (count,) = struct.unpack_from("<I", content)
    if not 0 < count <= CHUNK_ROWS:
        raise CorruptionError(f"{what} holds {count} rows")
    sections = _Sections(content, what, 4)
    ends = sections.numbers(count + 1, "<u4")
    start = 4 + 4 * (count + 1)
    if ends[0] != 0 or ends[-1] != len(content) - start or not all(map(operator.le, ends, ends[1:])):
        raise CorruptionError(f"{what} does not add up to its size")
    return [content[start + first : start + end] for first, end in pairwise(ends)]


def encode_metadata_list(rows: int, chunks: Sequence[bytes | None]) -> tuple[bytes, list[bytes]]:
    """The grain that names the chunks of a page with `rows` rows; `None` for a chunk without any metadata."""
    numbers: dict[bytes, int] = {}
    of_chunk = [_NO_CHUNK if key is None else numbers.setdefault(key, len(numbers)) for key in chunks]
    links = list(numbers)
    header = METADATA_LIST.pack(_LIST_MAGIC, TREE_VERSION, 0, rows, len(links), links_tag(links))
    return header + np.array(of_chunk, dtype="<u2").tobytes(), links


def decode_metadata_list(content: bytes, links: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Undo `encode_metadata_list`: the number of rows, and a key or `None` for each chunk."""
    what = "a metadata list"
    flags, rows, link_count, tag = _header(METADATA_LIST, _LIST_MAGIC, content, what)
    if flags or not 0 < rows <= PAGE_ROWS_MAX:
        raise CorruptionError(f"{what} holds impossible counts")
    _require_links(links, link_count, tag, what)
    sections = _Sections(content, what, METADATA_LIST_SIZE)
    numbers = sections.numbers(-(-rows // CHUNK_ROWS), "<u2")
    sections.end()
    if any(number != _NO_CHUNK and number >= link_count for number in numbers):
        raise CorruptionError(f"{what} refers to links that it has not")
    return rows, [None if number == _NO_CHUNK else links[number] for number in numbers]


def require_row(parent: bytes, name: bytes) -> None:
    """Raise `InvalidArgument` unless a row may have this name."""
    if not is_name(name) or len(parent) + len(name) >= PATH_SIZE_MAX:
        raise InvalidArgument(f"not a name in a tree: {name[:80]!r} in {parent[:80]!r}")

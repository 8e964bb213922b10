"""Trees: sorted paths with what they hold, read page by page, and written in one pass.

A tree is the content key of its highest node (`basin.format.tree`). Equal trees have equal keys, and what two trees
share is stored once.

Invariants:

- Reading one path, or the children of one directory, touches the node and the pages that hold these rows.
- The writer takes rows in tree order, and holds those of pages that still wait for the totals of a directory in them.
- What a tree refers to is kept alive by its links, from the node through pages to the contents.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, takewhile
from typing import Final, NamedTuple, Protocol

from blake3 import blake3

from basin.errors import CorruptionError, InvalidArgument
from basin.format.tree import (
    CHUNK_ROWS,
    NODE_ENTRIES_MAX,
    NODE_LEVEL_MAX,
    PAGE_ROWS_MAX,
    PAGE_ROWS_MIN,
    PAGE_SIZE_MAX,
    Entry,
    Node,
    NodeEntry,
    Page,
    RowKind,
    decode_chunk,
    decode_metadata_list,
    decode_node,
    decode_page,
    encode_chunk,
    encode_metadata_list,
    encode_node,
    encode_page,
    ends_page,
    order_of,
    require_row,
)
from basin.layers.blobs import Blobs
from basin.terms import ContentKey

_PAGES_TOGETHER: Final = 4
"""Pages that are read together by who walks: what a bucket answers at once."""
_PAGES_KEPT: Final = 8
_NODE_ENTRIES_MIN: Final = 512
_NODE_CUT: Final = 1024
_FILE: Final = int(RowKind.FILE)
_DIRECTORY: Final = int(RowKind.DIRECTORY)


class TreeStore(Protocol):
    """Where a tree's grains are: contents with links, by content key."""

    def get(self, keys: Sequence[bytes]) -> list[tuple[bytes, list[bytes]]]:
        """Content and links of each; raise `ContentNotFound`."""
        ...

    def put(self, content: bytes, links: Sequence[bytes]) -> bytes:
        """Store a content that keeps `links` alive; returns its key."""
        ...

    def put_many(self, contents: Sequence[bytes]) -> list[bytes]:
        """Store contents without links."""
        ...


class BlobStore:
    """A tree's grains in a basin, kept alive only by who links to the tree, and stored where metadata is."""

    def __init__(self, blobs: Callable[[], Blobs]) -> None:
        """`blobs` gives those of the handle, view or batch to read and put with now."""
        self._blobs = blobs

    def get(self, keys: Sequence[bytes]) -> list[tuple[bytes, list[bytes]]]:
        found = self._blobs().get_linked_many([ContentKey(key) for key in keys])
        return [(content, [link.digest for link in links]) for content, links in found]

    def put(self, content: bytes, links: Sequence[bytes]) -> bytes:
        return self._blobs().put(content, [ContentKey(link) for link in links], root=False, hot=True).digest

    def put_many(self, contents: Sequence[bytes]) -> list[bytes]:
        return [key.digest for key in self._blobs().put_many(contents, root=False, hot=True)]


class MemoryStore:
    """A tree's grains in memory: of a tree that nobody stored."""

    def __init__(self) -> None:
        self._grains: dict[bytes, tuple[bytes, list[bytes]]] = {}

    def get(self, keys: Sequence[bytes]) -> list[tuple[bytes, list[bytes]]]:
        return [self._grains[key] for key in keys]

    def put(self, content: bytes, links: Sequence[bytes]) -> bytes:
        key = blake3(content).digest()
        self._grains[key] = (content, list(links))
        return key

    def put_many(self, contents: Sequence[bytes]) -> list[bytes]:
        return [self.put(content, ()) for content in contents]


class _Place(NamedTuple):
    """Where a row stands in tree order."""

    parent: bytes
    name: bytes


def _place_of(path: bytes) -> _Place:
    parent, _, name = path.rpartition(b"/")
    return _Place(order_of(parent), name)


def _begin_of(directory: bytes) -> _Place:
    """Before the first child of a directory."""
    return _Place(order_of(directory), b"")


class Tree:
    """A stored tree, to be read. Safe for one thread at a time."""

    def __init__(self, store: TreeStore, root: bytes) -> None:
        """Reads the highest node."""
        self._store = store
        self.root = root
        self._nodes: dict[bytes, Node] = {}
        self._pages: OrderedDict[bytes, Page] = OrderedDict()
        self._top = self._node(root, level=None)

    @property
    def files(self) -> int:
        """Number of files."""
        return self._top.files

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self._top.size

    @property
    def header(self) -> bytes:
        """What the writer was given to keep with the tree."""
        return self._top.header

    def __len__(self) -> int:
        """Number of rows."""
        return sum(entry.rows for entry in self._top.entries)

    # --- looking ----------------------------------------------------------------------------------------------------

    def entry(self, path: bytes, *, meta: bool = False) -> Entry | None:
        """The row of a path. Reads one page, and with `meta` one chunk more."""
        place = _place_of(path)
        for listed in self._listed_from(place):
            page = self._page(listed)
            row = _row_at(page, place)
            found = next(page.entries(row, row + 1), None)
            if found is None or found.path != path:
                return None
            return found._replace(meta=self._meta_of_row(listed, row)) if meta else found
        return None

    def ls(self, directory: bytes = b"", *, meta: bool = False) -> Iterator[Entry]:
        """The children of a directory, by name; none if there is no such directory. Reads the pages they are on."""
        return self._stretch(directory, meta=meta, below=False)

    def walk(self, directory: bytes = b"", *, meta: bool = False) -> Iterator[Entry]:
        """All rows below a directory, in tree order: the children of a directory before those of its children."""
        return self._stretch(directory, meta=meta, below=True)

    def _stretch(self, directory: bytes, *, meta: bool, below: bool) -> Iterator[Entry]:
        start = _begin_of(directory)
        inside = start.parent + b"\0" if directory else b""

        def is_part(row: Entry | NodeEntry) -> bool:
            return row.parent == directory or (below and order_of(row.parent).startswith(inside))

        listed = self._listed_from(start)
        pages = chain(islice(listed, 1), takewhile(is_part, listed))
        for page, metas in self.read_pages(pages, _PAGES_TOGETHER if below else 1, meta=meta):
            for entry in page.entries(_row_at(page, start), metas=metas):
                if not is_part(entry):
                    return
                yield entry

    def diff(self, other: Tree, *, meta: bool = False) -> Iterator[tuple[Entry | None, Entry | None]]:
        """Rows that differ from those of `other`: (the one here, the one there), None where there is none.

        In tree order. Pages that are equal are not read. Directories differ where a file below them has another size,
        or where their number of files does; with `meta` metadata counts, and is given.
        """
        here, there = _Rows(self, meta=meta), _Rows(other, meta=meta)
        while True:
            while here.at_page and there.at_page and here.page_keys == there.page_keys:
                here.skip()
                there.skip()
            one, two = here.row, there.row
            if one is None and two is None:
                return
            if two is None or (one is not None and _order_of_row(one) < _order_of_row(two)):
                yield one, None
                here.step()
            elif one is None or _order_of_row(two) < _order_of_row(one):
                yield None, two
                there.step()
            else:
                if one != two:
                    yield one, two
                here.step()
                there.step()

    # --- pages ------------------------------------------------------------------------------------------------------

    def listed(self) -> Iterator[NodeEntry]:
        """All pages, in order."""
        return self._listed_from(_Place(b"", b""))

    def _listed_from(self, place: _Place) -> Iterator[NodeEntry]:
        """The pages from the one on which a row at `place` would be."""
        return self._listed_below(self._top, place)

    def _listed_below(self, node: Node, place: _Place) -> Iterator[NodeEntry]:
        firsts = [_Place(order_of(entry.parent), entry.name) for entry in node.entries]
        first = max(0, bisect_right(firsts, place) - 1)
        for entry in node.entries[first:]:
            if node.level == 0:
                yield entry
            else:
                yield from self._listed_below(self._node(entry.key, level=node.level - 1), place)

    def _node(self, key: bytes, level: int | None) -> Node:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = decode_node(*self._store.get([key])[0])
        if level is not None and node.level != level:
            raise CorruptionError(f"a tree node of level {node.level} stands where one of level {level} belongs")
        return node

    def _page(self, listed: NodeEntry) -> Page:
        page = self._pages.get(listed.key)
        return page if page is not None else next(self.read_pages([listed], 1, meta=False))[0]

    def read_pages(self, pages: Iterable[NodeEntry], count: int, *, meta: bool) -> Iterator[tuple[Page, list[bytes]]]:
        """Pages that the tree lists, and with `meta` the metadata of their rows; `count` are read together, but for the
        first.
        """
        waiting = iter(pages)
        together = list(islice(waiting, 1))
        while together:
            self._load(together)
            metas = self._load_metas(together) if meta else [[] for _ in together]
            for listed, of_rows in zip(together, metas, strict=True):
                yield self._pages[listed.key], of_rows
            while len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
            together = list(islice(waiting, count))

    def _load(self, pages: Sequence[NodeEntry]) -> None:
        missing = [listed for listed in pages if listed.key not in self._pages]
        for listed, grain in zip(missing, self._store.get([one.key for one in missing]), strict=True):
            page = decode_page(*grain)
            first = next(page.entries(0, 1))
            if len(page) != listed.rows or (first.parent, first.name) != (listed.parent, listed.name):
                raise CorruptionError("a tree page is not the one that its node lists")
            self._pages[listed.key] = page
        for listed in pages:
            self._pages.move_to_end(listed.key)

    # --- metadata ---------------------------------------------------------------------------------------------------

    def _load_metas(self, pages: Sequence[NodeEntry]) -> list[list[bytes]]:
        """The metadata of all rows of each page."""
        lists = self._lists(pages)
        keys = list({key for chunks in lists for key in chunks if key is not None})
        grains = dict(zip(keys, self._store.get(keys), strict=True)) if keys else {}
        metas = []
        for listed, chunks in zip(pages, lists, strict=True):
            pieces: list[list[bytes]] = []
            for number, key in enumerate(chunks):
                rows = min(CHUNK_ROWS, listed.rows - number * CHUNK_ROWS)
                pieces.append([b""] * rows if key is None else _chunk(grains[key][0], rows))
            metas.append(list(chain.from_iterable(pieces)))
        return metas

    def _lists(self, pages: Sequence[NodeEntry]) -> list[list[bytes | None]]:
        """The keys of the chunks of each page."""
        keys = [listed.meta for listed in pages if listed.meta is not None]
        grains = iter(self._store.get(keys) if keys else [])
        lists: list[list[bytes | None]] = []
        for listed in pages:
            if listed.meta is None:
                lists.append([None] * -(-listed.rows // CHUNK_ROWS))
                continue
            rows, chunks = decode_metadata_list(*next(grains))
            if rows != listed.rows:
                raise CorruptionError("a metadata list is of another page")
            lists.append(chunks)
        return lists

    def _meta_of_row(self, listed: NodeEntry, row: int) -> bytes:
        number, at = divmod(row, CHUNK_ROWS)
        key = self._lists([listed])[0][number]
        if key is None:
            return b""
        return _chunk(self._store.get([key])[0][0], min(CHUNK_ROWS, listed.rows - number * CHUNK_ROWS))[at]


def _chunk(content: bytes, rows: int) -> list[bytes]:
    metas = decode_chunk(content)
    if len(metas) != rows:
        raise CorruptionError("a metadata chunk is of another page")
    return metas


def _order_of_row(entry: Entry) -> tuple[bytes, bytes]:
    return order_of(entry.parent), entry.name


def _row_at(page: Page, place: _Place) -> int:
    """Number of the first row at or behind `place`."""
    at = bisect_left(page.parents, place.parent, key=order_of)
    if at == len(page.parents) or order_of(page.parents[at]) != place.parent:
        return page.firsts[at]
    return bisect_left(page.names, place.name, page.firsts[at], page.firsts[at + 1])


class _Rows:
    """A tree's rows one after another; knows where a page begins, and can pass over it unread."""

    def __init__(self, tree: Tree, *, meta: bool) -> None:
        self._tree, self._meta = tree, meta
        self._pages = tree.listed()
        self._rows: Iterator[Entry] = iter(())
        self._page: NodeEntry | None = None
        self._row: Entry | None = None
        self.skip()

    @property
    def at_page(self) -> bool:
        """Whether the next row is the first of a page that has not been read."""
        return self._page is not None

    @property
    def page_keys(self) -> tuple[bytes, bytes | None] | None:
        """What two pages have in common if they are equal."""
        return None if self._page is None else (self._page.key, self._page.meta if self._meta else None)

    @property
    def row(self) -> Entry | None:
        """The row to be looked at; None behind the last."""
        if self._page is not None:
            page, metas = next(self._tree.read_pages([self._page], 1, meta=self._meta))
            self._rows = page.entries(metas=metas)
            self._page = None
            self._row = next(self._rows)
        return self._row

    def skip(self) -> None:
        """Go to the next page."""
        self._page, self._row = next(self._pages, None), None

    def step(self) -> None:
        """Go to the next row."""
        self._row = next(self._rows, None)
        if self._row is None:
            self.skip()


# --- writing ----------------------------------------------------------------------------------------------------------


class _Draft:
    """A page that is being filled, or waits for the totals of directories in it."""

    __slots__ = (
        "files",
        "firsts",
        "is_full",
        "keys",
        "kinds",
        "metas",
        "names",
        "number",
        "parents",
        "sizes",
        "waits",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.parents: list[bytes] = []
        self.firsts: list[int] = []
        self.names: list[bytes] = []
        self.kinds = bytearray()
        self.sizes: list[int] = []
        self.files: list[int] = []
        self.keys: list[bytes | None] = []
        self.metas: list[bytes] = []
        self.waits = 0
        self.is_full = False


class _Directory:
    """A directory on the way to the row that was added last. `children`: its sub-directories that wait for totals."""

    __slots__ = ("children", "draft", "files", "order", "path", "row", "size")

    def __init__(self, path: bytes, draft: _Draft | None, row: int) -> None:
        self.path = path
        self.order = order_of(path)
        self.draft = draft
        self.row = row
        self.files = self.size = 0
        self.children: dict[bytes, tuple[_Draft, int]] = {}


class TreeWriter:
    """Writes a tree from rows in tree order. Every parent must have been given as a directory before."""

    def __init__(self, store: TreeStore, header: bytes = b"") -> None:
        """`header` is kept with the tree."""
        self._store = store
        self._header = header
        self._way = [_Directory(b"", None, 0)]
        self._draft = _Draft(0)
        self._draft_size = 0
        self._last = b""
        self._listed: list[NodeEntry | None] = []
        self.rows = 0

    def add(self, entry: Entry) -> None:
        """The next row. The size and count of a directory are found out here; `key` is needed for a file with bytes.

        Raises `InvalidArgument` for a row out of order, without its directory, or that no page may hold.
        """
        parent, name = entry.parent, entry.name
        here = self._way[-1]
        if here.path != parent:
            here = self._enter(parent)
            self._last = b""
        if name <= self._last or (entry.kind == _FILE and (entry.key is None) != (entry.size == 0)):
            raise InvalidArgument(f"a row that cannot follow {self._last[:80]!r}: {entry!r}")
        require_row(parent, name)
        self._last = name
        draft = self._draft
        if not draft.parents or draft.parents[-1] != parent:
            draft.parents.append(parent)
            draft.firsts.append(len(draft.names))
            self._draft_size += len(parent)
        row = len(draft.names)
        draft.names.append(name)
        draft.kinds.append(entry.kind)
        draft.metas.append(entry.meta)
        draft.keys.append(entry.key)
        draft.files.append(0)
        if entry.kind == _DIRECTORY:
            draft.sizes.append(0)
            draft.waits += 1
            here.children[name] = (draft, row)
        else:
            draft.sizes.append(entry.size)
            if entry.kind == _FILE:
                here.files += 1
                here.size += entry.size
        self.rows += 1
        self._draft_size += len(name)
        if row + 1 >= PAGE_ROWS_MIN and (
            row + 1 == PAGE_ROWS_MAX or self._draft_size >= PAGE_SIZE_MAX or ends_page(entry.path)
        ):
            self._next_draft()

    def _enter(self, parent: bytes) -> _Directory:
        """Leave directories until the one above `parent`, and go down one step."""
        above, _, name = parent.rpartition(b"/")
        order = order_of(parent)
        while self._way[-1].path != above:
            left = self._way[-1]
            if len(self._way) == 1 or left.order >= order:
                break
            self._leave()
        here = self._way[-1]
        child = here.children.pop(name, None) if here.path == above and parent else None
        if child is None:
            raise InvalidArgument(f"rows of {parent[:80]!r} come before its own, or too late")
        self._way.append(_Directory(parent, *child))
        return self._way[-1]

    def _leave(self) -> None:
        """All below the last directory of the way has been added: its totals are known."""
        done = self._way.pop()
        for draft, _ in done.children.values():
            self._settle(draft)
        if done.draft is not None:
            above = self._way[-1]
            above.files += done.files
            above.size += done.size
            done.draft.files[done.row] = done.files
            done.draft.sizes[done.row] = done.size
            self._settle(done.draft)
        else:
            self._totals = done.files, done.size

    def _settle(self, draft: _Draft) -> None:
        """A directory of a page has its totals."""
        draft.waits -= 1
        if draft.is_full and not draft.waits:
            self._write(draft)

    def _next_draft(self) -> None:
        draft = self._draft
        draft.is_full = True
        self._listed.append(None)
        self._draft, self._draft_size = _Draft(draft.number + 1), 0
        if not draft.waits:
            self._write(draft)

    def _write(self, draft: _Draft) -> None:
        page = Page(
            draft.parents,
            [*draft.firsts, len(draft.names)],
            draft.names,
            draft.kinds,
            draft.sizes,
            draft.files,
            draft.keys,
        )
        key = self._store.put(*encode_page(page))
        self._listed[draft.number] = NodeEntry(
            draft.parents[0], draft.names[0], len(page), key, self._write_metas(draft.metas)
        )

    def _write_metas(self, metas: list[bytes]) -> bytes | None:
        if not any(metas):
            return None
        chunks = [metas[at : at + CHUNK_ROWS] for at in range(0, len(metas), CHUNK_ROWS)]
        keys = iter(self._store.put_many([encode_chunk(chunk) for chunk in chunks if any(chunk)]))
        return self._store.put(
            *encode_metadata_list(len(metas), [next(keys) if any(chunk) else None for chunk in chunks])
        )

    def finish(self) -> bytes:
        """Write what is left; returns the tree's content key. The writer is of no more use."""
        if self._draft.names:
            self._next_draft()
        while self._way:
            self._leave()
        entries = [entry for entry in self._listed if entry is not None]
        files, size = self._totals
        level = 0
        while len(entries) > NODE_ENTRIES_MAX and level < NODE_LEVEL_MAX:
            entries = [self._lower_node(level, part) for part in _cut(entries)]
            level += 1
        return self._store.put(*encode_node(Node(level, files, size, self._header, entries)))

    def _lower_node(self, level: int, entries: list[NodeEntry]) -> NodeEntry:
        """Totals stand in the highest node alone."""
        key = self._store.put(*encode_node(Node(level, 0, 0, b"", entries)))
        return entries[0]._replace(rows=sum(entry.rows for entry in entries), key=key, meta=None)


def _cut(entries: Sequence[NodeEntry]) -> Iterator[list[NodeEntry]]:
    """Stretches for nodes, cut by what they list."""
    part: list[NodeEntry] = []
    for entry in entries:
        part.append(entry)
        if len(part) >= _NODE_ENTRIES_MIN and (
            len(part) == NODE_ENTRIES_MAX or int.from_bytes(entry.key[:4], "little") % _NODE_CUT == 0
        ):
            yield part
            part = []
    if part:
        yield part

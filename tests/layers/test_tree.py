"""Trees: written in one pass, read page by page, compared without reading what is equal."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from itertools import islice

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import CorruptionError, InvalidArgument, UnsupportedVersion
from basin.format.tree import PAGE_ROWS_MAX, PAGE_ROWS_MIN, Entry, NodeEntry, RowKind, encode_node, encode_page
from basin.format.tree import Node as TreeNode
from basin.layers.tree import Tree, TreeWriter
from tests.layers.tree_material import Folder, MemoryStore, folders, in_order, rows_of, written

MANY = 20_000


def file_row(parent: bytes, name: bytes, size: int = 1, meta: bytes = b"") -> Entry:
    return Entry(parent, name, RowKind.FILE, size, 0, blake3(parent + b"/" + name).digest() if size else None, meta)


def directory_row(parent: bytes, name: bytes) -> Entry:
    return Entry(parent, name, RowKind.DIRECTORY, 0)


def large(count: int, *, meta: bytes = b"") -> list[Entry]:
    """`count` files in directories of a thousand."""
    rows: list[Entry] = [directory_row(b"", b"%04d" % number) for number in range(-(-count // 1000))]
    rows += [file_row(b"%04d" % (at // 1000), b"file-%06d" % at, at, meta) for at in range(count)]
    return rows


@given(folders, st.booleans())
def test_what_was_written_is_read(folder: Folder, with_meta: bool) -> None:
    rows = rows_of(folder, meta=b"meta of " if with_meta else b"")
    store = MemoryStore()
    tree = written(store, rows, b"header")
    assert rows == in_order(rows)
    assert list(tree.walk(meta=True)) == rows
    bare = [row._replace(meta=b"") for row in rows]
    assert list(tree.walk()) == bare
    assert len(tree) == len(rows)
    assert tree.header == b"header"
    assert tree.files == sum(row.kind == RowKind.FILE for row in rows)
    assert tree.size == sum(row.size for row in rows if row.kind == RowKind.FILE)
    for row in rows:
        assert tree.entry(row.path, meta=True) == row
        if row.kind == RowKind.DIRECTORY:
            assert list(tree.ls(row.path)) == [one for one in bare if one.parent == row.path]
            below = [one for one in bare if one.parent == row.path or one.parent.startswith(row.path + b"/")]
            assert list(tree.walk(row.path)) == below
    assert tree.entry(b"~ absent") is None
    assert tree.entry(b"absent/absent") is None
    assert list(tree.ls(b"~ absent")) == []


@given(folders, folders)
def test_differences_are_those_of_the_rows(one: Folder, two: Folder) -> None:
    store = MemoryStore()
    here, there = {row.path: row for row in rows_of(one)}, {row.path: row for row in rows_of(two)}
    found = list(written(store, rows_of(one)).diff(written(store, rows_of(two))))
    expected = {(here.get(path), there.get(path)) for path in here.keys() | there.keys()}
    assert set(found) == {pair for pair in expected if pair[0] != pair[1]}
    assert len(found) == len(set(found))
    places = [pair[0] or pair[1] for pair in found]
    assert places == in_order(row for row in places if row is not None)


def test_a_tree_is_the_same_however_it_came_about() -> None:
    rows = large(MANY, meta=b"x")
    assert written(MemoryStore(), rows).root == written(MemoryStore(), rows).root
    other = [row._replace(meta=b"y") if row.name == b"file-000500" else row for row in rows]
    assert written(MemoryStore(), other).root != written(MemoryStore(), rows).root


def test_pages_have_sizes_between_their_bounds() -> None:
    tree = written(MemoryStore(), large(100_000))
    sizes = [listed.rows for listed in tree.listed()]
    assert sum(sizes) == 100_100
    assert all(PAGE_ROWS_MIN <= size <= PAGE_ROWS_MAX for size in sizes[:-1])
    assert len(set(sizes)) > 5


def test_one_directory_of_a_million_files_takes_two_pages_at_most() -> None:
    store = MemoryStore()
    root = written(store, large(1_000_000)).root
    for number in (0, 1, 499, 998, 999):
        store.read.clear()
        tree = Tree(store, root)
        children = list(tree.ls(b"%04d" % number))
        assert [row.name for row in children] == [
            b"file-%06d" % at for at in range(1000 * number, 1000 * number + 1000)
        ]
        assert len(store.read) <= 1 + 2, "the node, and two pages"
        store.read.clear()
        tree = Tree(store, root)
        assert tree.entry(b"%04d/file-%06d" % (number, 1000 * number + 7)) == children[7]
        assert len(store.read) == 2


def test_metadata_of_one_path_takes_one_chunk() -> None:
    store = MemoryStore()
    root = written(store, large(MANY, meta=b"some")).root
    store.read.clear()
    found = Tree(store, root).entry(b"0007/file-007077", meta=True)
    assert found is not None
    assert found.meta == b"some"
    assert len(store.read) == 4, "node, page, list, chunk"


def test_differences_read_only_what_differs() -> None:
    store = MemoryStore()
    rows = large(100_000, meta=b"x")
    changed = [row._replace(size=7) if row.path == b"0050/file-050123" else row for row in rows]
    extra = [*changed[:-500], file_row(b"0099", b"file-099499-", 3), *changed[-500:]]
    one, two = written(store, rows), written(store, extra)
    shared = {listed.key for listed in one.listed()} & {listed.key for listed in two.listed()}
    store.read.clear()
    found = list(one.diff(two, meta=True))
    paths = {(pair[0] or pair[1]).path for pair in found}  # type: ignore[union-attr]  # never both None
    assert paths == {b"0050", b"0099", b"0050/file-050123", b"0099/file-099499-"}
    assert not shared & set(store.read)
    assert len(shared) >= len(list(one.listed())) - 4


def test_nodes_of_a_huge_tree_lie_above_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("basin.layers.tree.NODE_ENTRIES_MAX", 8)
    monkeypatch.setattr("basin.layers.tree._NODE_ENTRIES_MIN", 4)
    monkeypatch.setattr("basin.layers.tree._NODE_CUT", 4)
    rows = large(300_000)
    store = MemoryStore()
    tree = written(store, rows)
    assert [row.path for row in tree.walk()] == [row.path for row in rows]
    assert len(list(tree.ls(b"0123"))) == 1000
    assert tree.entry(b"0299/file-299999") == rows[-1]
    assert tree.files == 300_000
    assert len(tree) == len(rows)
    assert [pair[0] for pair in tree.diff(written(store, rows[:-1]))] == [tree.entry(b"0299"), rows[-1]]


def test_rows_out_of_order_are_refused() -> None:
    good = [directory_row(b"", b"a"), file_row(b"", b"b"), file_row(b"a", b"x"), directory_row(b"a", b"y")]
    bad = [
        file_row(b"a", b"x"),  # again
        file_row(b"a", b"a"),  # before the last
        file_row(b"", b"c"),  # back to a directory that was left
        file_row(b"b", b"x"),  # below a file
        file_row(b"c", b"x"),  # below what was not given
        file_row(b"a/y/z", b"x"),
        file_row(b"a", b".."),
        file_row(b"a", b"."),
        file_row(b"a", b""),
        file_row(b"a", b"z/z"),
        file_row(b"a", b"z\0"),
        file_row(b"a", b"z" * 5000),
        Entry(b"a", b"z", RowKind.FILE, 1),  # bytes without a key
        Entry(b"a", b"z", RowKind.FILE, 0, 0, bytes(32)),
    ]
    for row in bad:
        writer = TreeWriter(MemoryStore())
        for one in good:
            writer.add(one)
        with pytest.raises(InvalidArgument):
            writer.add(row)


def test_a_page_that_is_not_the_one_listed_is_damage() -> None:
    store = MemoryStore()
    tree = written(store, large(5000))
    first, second = list(islice(tree.listed(), 2))
    swapped = [first._replace(key=second.key), second]
    with pytest.raises(CorruptionError):
        list(Tree(store, store.put(*encode_node(TreeNode(0, 0, 0, b"", swapped)))).walk())
    lower = NodeEntry(first.parent, first.name, 1, store.put(*encode_node(TreeNode(3, 0, 0, b"", [first]))), None)
    with pytest.raises(CorruptionError):
        list(Tree(store, store.put(*encode_node(TreeNode(1, 0, 0, b"", [lower])))).walk())


def test_metadata_of_another_page_is_damage() -> None:
    store = MemoryStore()
    tree = written(store, large(9000, meta=b"m"))
    first, second = list(islice(tree.listed(), 2))
    assert first.rows != second.rows
    swapped = [first._replace(meta=second.meta)]
    broken = Tree(store, store.put(*encode_node(TreeNode(0, 0, 0, b"", swapped))))
    assert len(list(broken.walk())) == first.rows
    with pytest.raises(CorruptionError):
        list(broken.walk(meta=True))


def test_writing_and_walking_hold_some_pages_only() -> None:
    store = MemoryStore()
    rows = large(MANY, meta=bytes(40))
    store.put = lambda content, links: blake3(content).digest()  # type: ignore[method-assign]  # keeps nothing
    tracemalloc.start()
    try:
        writer = TreeWriter(store)
        for row in rows:
            writer.add(row)
        writer.finish()
        small = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        writer = TreeWriter(store)
        for row in (row for start in range(10) for row in _moved(rows, b"%d" % start)):
            writer.add(row)
        writer.finish()
        assert tracemalloc.get_traced_memory()[1] < 3 * small
    finally:
        tracemalloc.stop()


def _moved(rows: list[Entry], prefix: bytes) -> Iterator[Entry]:
    """The rows below a directory of their own; the first time with all these directories before them."""
    if prefix == b"0":
        yield from (directory_row(b"", b"%d" % number) for number in range(10))
    for row in rows:
        yield row._replace(parent=prefix + (b"/" + row.parent if row.parent else b""))


@given(st.integers(min_value=0, max_value=400), st.integers(min_value=0, max_value=255))
def test_a_flipped_byte_of_a_page_is_damage_or_another_page(at: int, byte: int) -> None:
    """Grains are authenticated: the decoder must only never crash, and never return rows that lead out of the tree."""
    store = MemoryStore()
    tree = written(store, rows_of({b"a": {b"x": b"1", b"y": b"22"}, b"b": b"333", b"c": {}}))
    listed = next(tree.listed())
    content, links = store.grains[listed.key]
    assert encode_page(tree._page(listed)) == (content, links)
    broken = bytearray(content)
    broken[at % len(broken)] = byte
    store.grains[listed.key] = (bytes(broken), links)
    try:
        rows = list(Tree(store, tree.root).walk())
    except (CorruptionError, InvalidArgument, UnsupportedVersion):
        return
    assert rows == in_order(rows)
    assert all(row.name not in (b"", b".", b"..") and b"/" not in row.name for row in rows)

"""Tree pages: rows are sorted, and no name leads out of the tree; what decodes is written again byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.payload import join_links, split_links
from basin.format.tree import Page, RowKind, decode_page, encode_page, order_of
from fuzz.material import KEY, OTHER_KEY


def one_input(data: bytes) -> None:
    links, content = split_links(data)
    page = decode_page(content, links)
    rows = list(page.entries())
    places = [(order_of(row.parent), row.name) for row in rows]
    if places != sorted(set(places)) or any(row.name in (b"", b".", b"..") or b"/" in row.name for row in rows):
        raise AssertionError("rows that are not sorted, or that lead out of the tree")
    if any(row.key is None and row.kind == RowKind.FILE and row.size for row in rows):
        raise AssertionError("a file without its content")


def seeds() -> Iterator[bytes]:
    kinds = bytes([RowKind.DIRECTORY, RowKind.FILE, RowKind.FILE, RowKind.LINK])
    names = [b"a", b"b", b"x", b"y"]
    page = Page([b"", b"a"], [0, 2, 4], names, kinds, [7, 5, 7, 0], [1, 0, 0, 0], [None, KEY, OTHER_KEY, None])
    content, links = encode_page(page)
    yield join_links(links, content)
    single = Page([b"a/b"], [0, 1], [b"c"], bytes([RowKind.FILE]), [0], [0], [None])
    content, links = encode_page(single)
    yield join_links(links, content)

"""Tree nodes: what they list is sorted, and has content keys; what decodes is written again."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.payload import join_links, split_links
from basin.format.tree import Node, NodeEntry, decode_node, encode_node, order_of
from fuzz.material import KEY, OTHER_KEY


def one_input(data: bytes) -> None:
    links, content = split_links(data)
    node = decode_node(content, links)
    places = [(order_of(entry.parent), entry.name) for entry in node.entries]
    if places != sorted(set(places)):
        raise AssertionError("a node that is not sorted")
    if decode_node(*encode_node(node)) != node:
        raise AssertionError("a node that changes when it is written again")


def seeds() -> Iterator[bytes]:
    entries = [NodeEntry(b"", b"a", 1024, KEY, OTHER_KEY), NodeEntry(b"a/b", b"c", 3, OTHER_KEY, None)]
    for node in (Node(0, 1000, 5, b"{}", entries), Node(1, 0, 0, b"", entries[:1]), Node(0, 0, 0, b"", [])):
        content, links = encode_node(node)
        yield join_links(links, content)

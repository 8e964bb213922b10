"""Clasts, of parts and of lists: the lengths add up, and the offsets ascend."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.clast import decode_clast, encode_clast, encode_clast_of_lists
from basin.format.payload import join_links, split_links
from fuzz.material import KEY, OTHER_KEY


def one_input(data: bytes) -> None:
    clast = decode_clast(split_links(data))
    if len(clast.starts) != len(clast.parts) + 1 or clast.starts != sorted(set(clast.starts)):
        raise AssertionError("the parts of a clast do not follow one another")
    if clast.counts and (len(clast.counts) != len(clast.parts) or 0 in clast.counts):
        raise AssertionError("a clast has a list of no parts")


def seeds() -> Iterator[bytes]:
    yield join_links([KEY, OTHER_KEY], encode_clast([1 << 20, 17], 0))
    yield join_links([OTHER_KEY, KEY], encode_clast([5], 1))
    yield join_links([OTHER_KEY, KEY], encode_clast_of_lists([1 << 34, 5], [1 << 14, 2], 0))
    yield join_links([OTHER_KEY, KEY, KEY], encode_clast_of_lists([1 << 34], [1 << 14], 2))

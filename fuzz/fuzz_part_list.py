"""Lists of parts: the lengths add up, the offsets ascend, and the tag is of the parts."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.clast import decode_part_list, encode_part_list
from basin.format.payload import join_links, split_links
from fuzz.material import KEY, OTHER_KEY


def one_input(data: bytes) -> None:
    payload = split_links(data)
    listed = decode_part_list(payload)
    if len(listed.starts) != len(listed.parts) + 1 or listed.starts != sorted(set(listed.starts)):
        raise AssertionError("the parts of a list do not follow one another")
    lengths = [stop - start for start, stop in zip(listed.starts, listed.starts[1:], strict=False)]
    if encode_part_list(listed.parts, lengths) != payload.content:
        raise AssertionError("a list of parts is spelled in two ways")


def seeds() -> Iterator[bytes]:
    yield join_links([KEY, OTHER_KEY], encode_part_list([KEY, OTHER_KEY], [1 << 20, 17]))
    yield join_links([KEY], encode_part_list([KEY], [5]))

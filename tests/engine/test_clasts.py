"""Lists of parts: whatever is asked of them is answered from the lists that are needed, and a wrong list is refused."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from basin.engine import clasts
from basin.engine.clasts import ListedParts, Part, Parts
from basin.errors import CorruptionError
from basin.format.clast import Clast, decode_clast, decode_part_list, encode_clast_of_lists
from basin.format.payload import Payload


class Store:
    """Lists by content key, and which of them were read."""

    def __init__(self) -> None:
        self.lists: dict[bytes, Payload] = {}
        self.read: list[bytes] = []

    def put_list(self, content: bytes, parts: list[bytes]) -> bytes:
        key = blake3(content).digest()
        self.lists[key] = Payload(list(parts), content)
        return key

    def read_list(self, key: bytes) -> Clast:
        self.read.append(key)
        return decode_part_list(self.lists[key])


def made(store: Store, lengths: list[int], links: list[bytes], listed_max: int) -> tuple[Parts, list[Part]]:
    """The parts as they are looked up, and as they are."""
    wanted, at = [], 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(clasts, "PARTS_LISTED_MAX", listed_max)
        listed = ListedParts(store.put_list)  # type: ignore[arg-type]  # it is given lists
        for number, length in enumerate(lengths):
            key = number.to_bytes(32, "big")
            listed.add(key, length)
            wanted.append(Part(key, at, at + length))
            at += length
        content, keys = listed.finish(links)
    return Parts(decode_clast(Payload(keys, content)), store.read_list), wanted


@given(st.lists(st.integers(1, 1 << 32 - 1), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_all_parts_are_found(lengths: list[int], listed_max: int, link_count: int) -> None:
    links = [bytes([number]) * 32 for number in range(link_count)]
    parts, wanted = made(Store(), lengths, links, listed_max)
    assert list(parts) == wanted == [parts[number] for number in range(len(parts))]
    assert (parts.size, parts.links, len(parts)) == (sum(lengths), links, len(lengths))
    for number, part in enumerate(wanted):
        assert parts.number_at(part.start) == parts.number_at(part.stop - 1) == number


@pytest.mark.parametrize(("count", "lists"), [(1, 0), (4, 0), (5, 2), (8, 2), (9, 3)])
def test_there_are_lists_only_above_as_many_parts_as_one_has(count: int, lists: int) -> None:
    store = Store()
    parts, _ = made(store, [10] * count, [], 4)
    assert len(store.lists) == lists
    assert len(list(parts)) == count


def test_a_list_is_read_when_it_is_needed_and_kept_for_a_while() -> None:
    store = Store()
    parts, wanted = made(store, [10] * 100, [], 4)
    assert (len(parts), parts.size, store.read) == (100, 1000, [])
    assert parts[50] == wanted[50]
    assert parts.number_at(505) == 50
    assert len(store.read) == 1
    for _ in range(3):
        assert [parts[number] for number in range(48, 64)] == wanted[48:64]
    assert len(store.read) == 4
    list(parts)
    assert len(parts._lists) == clasts._LISTS_KEPT


@pytest.mark.parametrize("wrong", ["size", "count"])
def test_another_list_than_the_clast_names_is_refused(wrong: str) -> None:
    store = Store()
    made(store, [random.Random(1).randrange(5, 99) for _ in range(8)], [], 4)
    (first, second) = store.lists
    sizes = [store.read_list(key).size for key in store.lists]
    counts = [4, 4]
    if wrong == "size":
        sizes[1] += 1
    else:
        counts[1] -= 1
    content = encode_clast_of_lists(sizes, counts, 0)
    parts = Parts(decode_clast(Payload([first, second], content)), store.read_list)
    assert parts[3].stop == sizes[0]
    with pytest.raises(CorruptionError, match="another list"):
        parts[4]

"""Names that are numbers and tuples: they come back, and their bytes sort as they do."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import CorruptionError, InvalidArgument
from basin.format.ordered import (
    TUPLE_DEPTH_MAX,
    U64_MAX,
    decode_tuple,
    decode_u64,
    encode_tuple,
    encode_u64,
)
from tests.format.material import U64, answered, refused

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-U64_MAX, U64_MAX)
    | st.floats(allow_nan=False)
    | st.binary(max_size=6)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
)
TUPLES = st.recursive(
    st.lists(SCALARS, max_size=4).map(tuple),
    lambda inner: st.lists(SCALARS | inner, max_size=4).map(tuple),
    max_leaves=8,
)
KINDS: tuple[type, ...] = (type(None), bool, int, float, bytes, str, tuple)


def order(element: Any) -> tuple[Any, ...]:
    """A sort key that says what the order is meant to be: type first, then value; -0.0 before 0.0."""
    kind = KINDS.index(type(element))
    if type(element) is tuple:
        return (kind, tuple(order(one) for one in element))
    if type(element) is float:
        return (kind, element, math.copysign(1, element))
    if type(element) is str:
        return (kind, element.encode())
    return (kind,) if element is None else (kind, element)


@given(TUPLES)
def test_a_tuple_comes_back(elements: tuple[Any, ...]) -> None:
    assert repr(decode_tuple(encode_tuple(elements))) == repr(elements)


@given(TUPLES, TUPLES)
def test_bytes_sort_as_tuples_do(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert (encode_tuple(one) < encode_tuple(other)) == (order(one) < order(other))


@given(TUPLES, SCALARS)
def test_a_longer_tuple_begins_with_the_bytes_of_a_shorter_one(elements: tuple[Any, ...], more: Any) -> None:
    assert encode_tuple((*elements, more)).startswith(encode_tuple(elements))


@given(U64, U64)
def test_numbers_come_back_and_sort(one: int, other: int) -> None:
    assert decode_u64(encode_u64(one)) == one
    assert (encode_u64(one) < encode_u64(other)) == (one < other)


BOUNDARIES = [0, 1, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 63, U64_MAX]


def test_integers_sort_across_their_sizes() -> None:
    numbers = sorted({sign * number for number in BOUNDARIES for sign in (1, -1)})
    encoded = [encode_tuple((number,)) for number in numbers]
    assert encoded == sorted(encoded)
    assert [decode_tuple(one)[0] for one in encoded] == numbers


def test_strings_with_zeros_sort_before_longer_ones() -> None:
    pieces = [bytes(piece) for piece in itertools.product((0, 1, 255), repeat=3)]
    values = sorted({piece[:size] for piece in pieces for size in range(4)})
    encoded = [encode_tuple((value, 1)) for value in values]
    assert encoded == sorted(encoded)


@pytest.mark.parametrize("number", [-1, U64_MAX + 1, 1.0, True, "1", None])
def test_what_is_no_number_is_refused(number: Any) -> None:
    refused(InvalidArgument, lambda: encode_u64(number))


@pytest.mark.parametrize("elements", [[], "text", None, (object(),), ([],), (1 << 64,), (-(1 << 64),), ((), [])])
def test_what_is_no_tuple_of_known_types_is_refused(elements: Any) -> None:
    refused(InvalidArgument, lambda: encode_tuple(elements))


def test_text_that_is_no_text_is_refused() -> None:
    refused(InvalidArgument, lambda: encode_tuple(("\ud800",)))


def nested(depth: int) -> tuple[Any, ...]:
    elements: tuple[Any, ...] = ()
    for _ in range(depth):
        elements = (elements,)
    return elements


def test_depth_is_bounded() -> None:
    deepest = nested(TUPLE_DEPTH_MAX)
    assert decode_tuple(encode_tuple(deepest)) == deepest
    refused(InvalidArgument, lambda: encode_tuple(nested(TUPLE_DEPTH_MAX + 1)))
    refused(CorruptionError, lambda: decode_tuple(b"\x50" * 100_000 + b"\0" * 100_000))


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    answered(lambda: decode_u64(data))
    elements = answered(lambda: decode_tuple(data))
    assert elements is None or encode_tuple(elements) == data


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        b"\x01",
        b"\x05",
        b"\x19",
        b"\x29",
        b"\x28" + bytes(7),
        b"\x30" + bytes(7),
        b"\x40abc",
        b"\x40\0\xff",
        b"\x41\xff\0",
        b"\x50",
        b"\x50\x02",
        b"\x02\0",
        b"\xff",
    ],
    ids=lambda data: data.hex(),
)
def test_bytes_that_are_no_tuple(data: bytes) -> None:
    refused(CorruptionError, partial(decode_tuple, data))


@pytest.mark.parametrize("data", [b"", bytes(7), bytes(9)])
def test_bytes_that_are_no_number(data: bytes) -> None:
    refused(CorruptionError, partial(decode_u64, data))


def test_a_value_has_one_spelling() -> None:
    """Otherwise two names would show as one: integers without leading zeros, negative ones too."""
    for data in (b"\x21\0", b"\x22\0\1", b"\x17\xff", b"\x16\xff\x01", b"\x10" + b"\xff" * 8, b"\x18"):
        refused(CorruptionError, partial(decode_tuple, data))

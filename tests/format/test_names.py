"""Blocks and directories of names."""

from __future__ import annotations

import random
import struct
import tracemalloc
from functools import partial

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import CorruptionError, UnsupportedVersion
from basin.format.layout import (
    CONTENT_SIZE_MAX,
    ENTRY_DELETE,
    ENTRY_INLINE,
    ENTRY_REFERENCE,
    FULL_NAME_SIZE_MAX,
    KEYSPACE_PREFIX_SIZE,
    NAMES_BLOCK_HEADER,
    NAMES_BLOCK_HEADER_SIZE,
)
from basin.format.names import (
    FILTER_RESTS_FROM,
    FilterBuilder,
    NameEntry,
    NamesDirectory,
    PackedBlock,
    build_filter,
    check_versions,
    decode_block,
    decode_directory,
    encode_block,
    encode_directory,
)
from tests.format.material import KEY, U64, answered, patched, refused

SPACE = bytes(4)
"""The keyspace that a full name begins with."""
PLAIN = [NameEntry(SPACE + b"a", 9, ENTRY_INLINE, b"first", 0), NameEntry(SPACE + b"b", 9, ENTRY_INLINE, b"", 0)]
MIXED = [
    NameEntry(SPACE + b"a", 9, ENTRY_DELETE, b"", 0),
    NameEntry(SPACE + b"a", 8, ENTRY_REFERENCE, KEY, 5),
    NameEntry(SPACE + b"b", 7, ENTRY_INLINE, b"value", 0),
]


@st.composite
def sorted_entries(draw: st.DrawFn) -> list[NameEntry]:
    """Names ascending, versions of one name descending, values as their kinds want them."""
    places = draw(st.sets(st.tuples(st.binary(max_size=6), st.integers(0, 1 << 60)), min_size=1, max_size=30))
    entries = []
    for name, version in sorted(places, key=lambda place: (place[0], -place[1])):
        kind = draw(st.sampled_from([ENTRY_DELETE, ENTRY_INLINE, ENTRY_REFERENCE]))
        value = {ENTRY_DELETE: b"", ENTRY_REFERENCE: KEY}.get(kind, b"") or b"v" * draw(st.integers(0, 9))
        entries.append(NameEntry(SPACE + name, version, kind, value if kind else b"", draw(st.integers(0, 3))))
    return entries


@given(sorted_entries())
def test_a_block_comes_back(entries: list[NameEntry]) -> None:
    block = decode_block(encode_block(entries))
    assert [block.entry(index) for index in range(len(entries))] == entries
    check_versions(block)


def test_columns_that_say_nothing_are_left_out() -> None:
    plain = encode_block(PLAIN)
    assert len(plain) == NAMES_BLOCK_HEADER_SIZE + 2 * 8 + 2 * 5 + 5
    block = decode_block(plain)
    assert (block.kinds, block.versions, block.expiries, block.version) == (None, None, None, 9)
    assert len(encode_block(MIXED)) == NAMES_BLOCK_HEADER_SIZE + 3 * (8 + 1 + 8 + 8) + 3 * 5 + 37


@pytest.mark.parametrize("size", [KEYSPACE_PREFIX_SIZE, FULL_NAME_SIZE_MAX])
def test_names_up_to_the_limit(size: int) -> None:
    entries = [NameEntry(b"n" * size, 1, ENTRY_INLINE, b"", 0)]
    assert decode_block(encode_block(entries)).entry(0) == entries[0]


def test_blocks_that_are_not_valid() -> None:
    plain, mixed = encode_block(PLAIN), encode_block(MIXED)

    def header(count: int, flags: int, names: int, values: int) -> bytes:
        return NAMES_BLOCK_HEADER.pack(count, flags, names, values, 9) + plain[NAMES_BLOCK_HEADER_SIZE:]

    assert header(2, 0, 10, 5) == plain
    kinds_at = NAMES_BLOCK_HEADER_SIZE + 3 * 8
    for damaged in (
        b"",
        plain[: NAMES_BLOCK_HEADER_SIZE - 1],
        plain[:-1],
        plain + b"\0",
        NAMES_BLOCK_HEADER.pack(0, 0, 0, 0, 9),
        header(3, 0, 10, 5),
        header((1 << 32) - 1, 0, (1 << 32) - 1, (1 << 32) - 1),
        header(2, 0, 11, 4),
        header(2, 1, 10, 5),
        patched(plain, NAMES_BLOCK_HEADER_SIZE, struct.pack("<II", 6, 5)),
        patched(plain, NAMES_BLOCK_HEADER_SIZE + 8, struct.pack("<II", (1 << 32) - 1, 6)),
        patched(mixed, kinds_at, b"\3"),
        patched(mixed, kinds_at, b"\2"),
        patched(mixed, kinds_at + 1, b"\0"),
        encode_block([PLAIN[1], PLAIN[0]]),
        encode_block([NameEntry(b"n" * (FULL_NAME_SIZE_MAX + 1), 1, ENTRY_INLINE, b"", 0)]),
        encode_block([NameEntry(b"n" * (KEYSPACE_PREFIX_SIZE - 1), 1, ENTRY_INLINE, b"", 0)]),
    ):
        refused(CorruptionError, partial(decode_block, damaged))


@pytest.mark.parametrize("flag", [8, 1 << 31])
def test_a_column_that_is_not_known_needs_a_newer_version(flag: int) -> None:
    refused(UnsupportedVersion, lambda: decode_block(patched(encode_block(PLAIN), 4, struct.pack("<I", flag))))


@pytest.mark.parametrize("versions", [(8, 8), (8, 9)])
def test_versions_of_one_name_that_do_not_descend(versions: tuple[int, int]) -> None:
    entries = [NameEntry(b"name", version, ENTRY_INLINE, b"", 0) for version in versions]
    refused(CorruptionError, lambda: check_versions(decode_block(encode_block(entries))))


@given(st.binary(max_size=120))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    block = answered(lambda: decode_block(data))
    if block is not None:
        answered(lambda: check_versions(block))
    answered(lambda: decode_directory(data))


# --- directories ------------------------------------------------------------------------------------------------------

FIELDS = {
    "entries": 2,
    "firsts": [b"a", b"b"],
    "last": b"c",
    "offsets": [128, 300],
    "lengths": [172, 50],
    "ranges": [(b"a", b"b", 65536)],
    "filter": build_filter([b"a", b"b", b"c"]),
}


@given(
    st.lists(st.tuples(st.binary(max_size=9), U64, st.integers(0, CONTENT_SIZE_MAX)), max_size=9).map(sorted),
    st.lists(st.tuples(st.binary(max_size=4), st.binary(max_size=4), U64), max_size=4),
    st.booleans(),
)
def test_a_directory_comes_back(
    blocks: list[tuple[bytes, int, int]], ranges: list[tuple[bytes, bytes, int]], filtered: bool
) -> None:
    firsts = [first for first, _, _ in blocks]
    offsets = [offset for _, offset, _ in blocks]
    lengths = [length for _, _, length in blocks]
    directory = decode_directory(
        encode_directory(
            entries=len(blocks),
            firsts=firsts,
            last=firsts[-1] if firsts else b"",
            offsets=offsets,
            lengths=lengths,
            ranges=ranges,
            filter_bytes=build_filter(firsts) if filtered else b"",
        )
    )
    assert (directory.firsts, [*directory.offsets], [*directory.lengths]) == (firsts, offsets, lengths)
    assert directory.ranges == ranges
    assert (directory.filter_words is not None) == filtered
    for number, first in enumerate(firsts):
        assert directory.may_contain(first)
        assert firsts[directory.block_for(first)] == first
        assert directory.block_for(first) >= number


def test_a_name_leads_to_the_block_that_may_hold_it() -> None:
    directory = decode_directory(msgpack.packb(FIELDS))
    assert [directory.block_for(name) for name in (b"", b"a", b"az", b"b", b"z")] == [-1, 0, 0, 1, 1]


def test_the_filter_of_names_misses_nothing_and_errs_on_few() -> None:
    source = random.Random(3)
    names = [source.randbytes(source.randrange(1, 40)) for _ in range(10_000)]
    directory = decode_directory(msgpack.packb({**FIELDS, "filter": build_filter(names)}))
    assert all(map(directory.may_contain, names))
    others = [b"other" + source.randbytes(16) for _ in range(10_000)]
    assert sum(map(directory.may_contain, others)) / len(others) < 0.04


@pytest.mark.parametrize("missing", list(FIELDS))
def test_a_directory_without_a_field_is_refused(missing: str) -> None:
    fields = {name: value for name, value in FIELDS.items() if name != missing}
    refused(CorruptionError, lambda: decode_directory(msgpack.packb(fields)))


@pytest.mark.parametrize(
    "changed",
    [
        {"entries": -1},
        {"entries": "2"},
        {"firsts": [b"b", b"a"]},
        {"firsts": [b"a"]},
        {"firsts": ["a", "b"]},
        {"firsts": [b"a", b"n" * (FULL_NAME_SIZE_MAX + 1)]},
        {"firsts": 7},
        {"last": None},
        {"offsets": [1, 2, 3]},
        {"offsets": [1.5, 2.5]},
        {"lengths": [1, CONTENT_SIZE_MAX + 1]},
        {"lengths": [True, False]},
        {"ranges": [(b"a", b"b")]},
        {"ranges": [(b"a", b"b", -1)]},
        {"filter": b"1234567"},
        {"filter": "12345678"},
        {"filter": None},
    ],
    ids=str,
)
def test_a_directory_of_wrong_values_is_refused(changed: dict[str, object]) -> None:
    refused(CorruptionError, lambda: decode_directory(msgpack.packb({**FIELDS, **changed})))


def test_an_unknown_field_of_a_directory_is_skipped() -> None:
    assert decode_directory(msgpack.packb({**FIELDS, "newer": 1})).entries == 2


@pytest.mark.parametrize("size", [0, 8, 248, 256, 1 << 16])
@pytest.mark.parametrize("behind", [{}, {"newer": [1, b"2"], "last": b"c"}])
def test_a_filter_is_found_wherever_it_stands(size: int, behind: dict[str, object]) -> None:
    """Its length is stated in one, two or four bytes, and other fields may follow it."""
    fields = {**FIELDS, "filter": b"\xff" * size}
    directory = decode_directory(msgpack.packb({name: fields[name] for name in sorted(fields)} | behind))
    assert directory.last == fields["last"]
    assert directory.filter_words == (memoryview(b"\xff" * size).cast("Q") if size else None)
    assert directory.may_contain(b"anything")


def test_a_directory_that_is_cut_short_or_followed_by_something_is_refused() -> None:
    whole = msgpack.packb({**FIELDS, "filter": bytes(64)})
    for length in range(len(whole)):
        refused(CorruptionError, partial(decode_directory, whole[:length]))
    for more in (b"\0", b"\xc1", whole):
        refused(CorruptionError, partial(decode_directory, whole + more))


# --- memory of a directory --------------------------------------------------------------------------------------------


BLOCKS = 20_000
FILTERED = [b"name %d" % number for number in range(200_000)]


def large_directory(filtered: list[bytes] = FILTERED, blocks: int = BLOCKS) -> bytes:
    """As a run of some million names has: the first names have 24 bytes, the filter is large."""
    return encode_directory(
        entries=blocks,
        firsts=[b"a name of %014d" % number for number in range(blocks)],
        last=b"b",
        offsets=[128 + 16_000 * number for number in range(blocks)],
        lengths=[16_000] * blocks,
        ranges=[],
        filter_bytes=build_filter(filtered),
    )


def test_a_directory_holds_little_for_each_block_and_no_filter_that_it_can_read_again() -> None:
    """A block: its first name, 57 bytes and 8 in a list; where it lies, twice 4."""
    payload = large_directory()
    tracemalloc.start()
    try:
        directory = decode_directory(payload, lambda: payload)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (directory.offsets[-1], directory.lengths[-1]) == (128 + 16_000 * (BLOCKS - 1), 16_000)
    assert held < 76 * BLOCKS
    assert peak < held + 90 * BLOCKS  # Nor does decoding copy it: 16 bytes a list slot, 32 a number, once for each.
    assert (directory.offsets.nbytes, directory.lengths.nbytes) == (4 * BLOCKS, 4 * BLOCKS)


def test_a_directory_of_more_than_4_gib_is_exact() -> None:
    offsets = [128, 1 << 32, (1 << 64) - 1]
    fields = {**FIELDS, "firsts": [b"a", b"b", b"c"], "offsets": offsets, "lengths": [1, 2, CONTENT_SIZE_MAX]}
    directory = decode_directory(msgpack.packb(fields))
    assert [*directory.offsets] == offsets
    assert [*directory.lengths] == [1, 2, CONTENT_SIZE_MAX]


class Loads:
    """A directory that can be read again, and how often it was."""

    def __init__(self, payload: bytes) -> None:
        self.payload = payload
        self.count = 0

    def __call__(self) -> bytes:
        self.count += 1
        return self.payload

    def directory(self) -> NamesDirectory:
        return decode_directory(self.payload, self)


def test_a_filter_that_rests_is_read_by_the_first_who_asks_and_says_the_same() -> None:
    loads = Loads(large_directory(blocks=3))
    kept, resting = decode_directory(loads.payload), loads.directory()
    assert kept.filter_words is not None
    assert kept.filter_words.nbytes >= FILTER_RESTS_FROM
    assert kept.filter_words.obj is not loads.payload  # Which would be held with it, as a whole.
    assert resting.filter_words is None
    assert resting.block_for(b"b") == 2
    assert loads.count == 0
    probes = FILTERED[:1000] + [b"other %d" % number for number in range(1000)]
    assert list(map(resting.may_contain, probes)) == list(map(kept.may_contain, probes))
    assert loads.count == 1
    assert resting.filter_words == kept.filter_words
    resting.forget_filter(loads)
    assert resting.filter_words is None
    assert all(map(resting.may_contain, FILTERED[:10]))
    assert loads.count == 2


def test_a_small_filter_does_not_rest() -> None:
    loads = Loads(large_directory(FILTERED[:1000], blocks=3))
    directory = loads.directory()
    directory.forget_filter(loads)
    assert directory.filter_words is not None
    assert all(map(directory.may_contain, FILTERED[:1000]))
    assert loads.count == 0


def test_another_filter_than_the_one_that_was_there_is_refused() -> None:
    loads = Loads(large_directory(blocks=3))
    directory = loads.directory()
    for other in (large_directory(FILTERED[:1000], blocks=3), loads.payload[:-1], msgpack.packb(7)):
        loads.payload = other
        refused(CorruptionError, partial(directory.may_contain, b"a"))
    assert directory.filter_words is None


def test_a_filter_is_built_in_the_memory_that_it_takes() -> None:
    """Folding it, too, makes no second one, and gives half of it back."""
    for expected in (1, 2):
        count = 2_000_000
        tracemalloc.start()
        try:
            builder = FilterBuilder(count * expected)
            for start in range(0, len(FILTERED), 5000):
                builder.add(FILTERED[start : start + 5000])
            builder._count = count
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            filter_bytes = builder.to_bytes()
            left, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < held + (512 << 10)
        assert left < 1.1 * len(filter_bytes)
        assert len(filter_bytes) < 1.4 * count


# --- searching a block where it lies ----------------------------------------------------------------------------------


def newest(entries: list[NameEntry], name: bytes, version_max: int) -> NameEntry | None:
    """What `PackedBlock.find` promises, by looking at every entry."""
    return next((entry for entry in entries if entry.name == name and entry.version <= version_max), None)


@given(sorted_entries(), st.lists(st.binary(max_size=6), max_size=5), st.integers(0, 1 << 60))
def test_a_packed_block_finds_what_the_decoded_one_holds(
    entries: list[NameEntry], others: list[bytes], version_max: int
) -> None:
    packed = PackedBlock(encode_block(entries))
    for name in {*[SPACE + other for other in others], *[entry.name for entry in entries]}:
        for version in (version_max, (1 << 64) - 1, *[entry.version for entry in entries[:3]]):
            assert packed.find(name, version) == newest(entries, name, version)


@pytest.mark.parametrize("repeated", [b"\0", b"ab", b"aba"])
def test_a_packed_block_of_names_within_names(repeated: bytes) -> None:
    """Names that occur inside and across others are not taken for them."""
    names = sorted({repeated * count for count in range(4, 12)} | {repeated * count + b"\xff" for count in range(4, 8)})
    entries = [NameEntry(name, 5, ENTRY_INLINE, name[::-1], 0) for name in names]
    packed = PackedBlock(encode_block(entries))
    for name in [*names, *[name + b"!" for name in names], repeated[:1] * 5 + b"\1", repeated * 12]:
        assert packed.find(name, 9) == newest(entries, name, 9)
        assert packed.find(name, 4) is None


@given(st.binary(max_size=120), st.binary(max_size=3))
def test_arbitrary_packed_blocks_are_answered(data: bytes, name: bytes) -> None:
    answered(lambda: PackedBlock(data).find(SPACE + name, 1 << 63))


@pytest.mark.parametrize("count", [0, 1, 6, 383, 384, 385, 5000])
@pytest.mark.parametrize("expected", [0, 1, 4, 50])
def test_a_filter_for_more_names_than_there_are_is_made_smaller(count: int, expected: int) -> None:
    """A merge knows only how many names there are at most."""
    names = [b"name %d" % number for number in range(count)]
    builder = FilterBuilder(count * expected)
    for start in range(0, count, 100):
        builder.add(names[start : start + 100])
    filter_bytes = builder.to_bytes()
    directory = decode_directory(msgpack.packb({**FIELDS, "filter": filter_bytes}))
    assert all(directory.may_contain(name) for name in names)
    assert len(filter_bytes) <= 8 * max(64, 2 * count // 6 + 1)
    if expected and count >= 384:
        wrong = sum(directory.may_contain(b"other %d" % number) for number in range(2000))
        assert wrong < 0.08 * 2000

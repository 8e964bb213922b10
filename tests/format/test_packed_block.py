"""A packed block answers what the decoded one does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from basin.errors import BasinError
from basin.format.names import NameEntry, PackedBlock, decode_block, encode_block

NAMES = st.binary(min_size=4, max_size=12)
VERSIONS = st.integers(min_value=1, max_value=9)


@st.composite
def sorted_entries(draw: st.DrawFn) -> list[NameEntry]:
    """Entries as a run holds them: names ascending, versions of one name descending, of every kind."""
    keys = draw(st.sets(st.tuples(NAMES, VERSIONS), min_size=1, max_size=40))
    entries = []
    for name, version in sorted(keys, key=lambda key: (key[0], -key[1])):
        kind = draw(st.integers(min_value=0, max_value=2))
        value = (b"", draw(st.binary(max_size=20)), draw(st.binary(min_size=32, max_size=32)))[kind]
        entries.append(NameEntry(name, version, kind, value, draw(st.sampled_from([0, 0, 77]))))
    return entries


@given(sorted_entries(), VERSIONS, st.lists(NAMES, max_size=5))
def test_a_look_up_finds_the_newest_entry_at_or_below_a_version(
    entries: list[NameEntry], version_max: int, others: list[bytes]
) -> None:
    block = PackedBlock(encode_block(entries))
    for name in [*(entry.name for entry in entries), *(entry.name[:4] for entry in entries), *others]:
        expected = next((one for one in entries if one.name == name and one.version <= version_max), None)
        assert block.find(name, version_max) == expected


@given(sorted_entries(), st.data())
def test_a_changed_block_is_refused_or_searched_without_another_exception(
    entries: list[NameEntry], data: st.DataObject
) -> None:
    payload = bytearray(encode_block(entries))
    for _ in range(data.draw(st.integers(min_value=1, max_value=3))):
        payload[data.draw(st.integers(min_value=0, max_value=len(payload) - 1))] ^= data.draw(
            st.integers(min_value=1, max_value=255)
        )
    try:
        block = PackedBlock(bytes(payload))
        for entry in entries:
            block.find(entry.name, 9)
        decode_block(bytes(payload))
    except BasinError:
        return

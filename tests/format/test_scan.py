"""Scanning raw bytes: intact grains and frames are found around damage, without keys, and in bounded time."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import CorruptionError
from basin.format.grain import encode_body, encode_grain
from basin.format.layout import FRAME_HEADER, GRAIN_HEADER_SIZE, RECORD_MAGIC, Kind
from basin.format.scan import Damage, GrainFound, find_frames, scan_grains
from tests.format.material import KEY, OPEN_CIPHER, OTHER_KEY, SEALED_CIPHER, checksum_first, patched

PIECES = st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=80)), max_size=8)


def grain(content: bytes, kind: int = Kind.BLOB) -> bytes:
    return encode_grain(encode_body(kind, 0, 0, KEY, len(content)), content)


def scan(data: bytes) -> list[GrainFound | Damage]:
    return list(scan_grains(memoryview(data), 0, len(data)))


@given(PIECES)
def test_grains_around_damage_are_found_and_nothing_is_left_out(pieces: list[tuple[bool, bytes]]) -> None:
    data, offsets = b"", []
    for intact, content in pieces:
        if intact:
            offsets.append(len(data))
        data += grain(content) if intact else content
    found = scan(data)
    assert [one.offset for one in found if isinstance(one, GrainFound)] == offsets
    reached = 0
    for one in found:
        assert one.offset == reached
        reached = one.end if isinstance(one, Damage) else one.offset + one.header.stored_size
    assert reached == len(data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    assert sum(
        (one.end - one.offset) if isinstance(one, Damage) else one.header.stored_size for one in scan(data)
    ) == len(data)
    list(find_frames(data, 0))


@pytest.mark.parametrize("at", range(3 * (GRAIN_HEADER_SIZE + 5)))
def test_a_changed_byte_costs_one_grain(at: int) -> None:
    whole = [grain(b"first"), grain(b"other"), grain(b"third")]
    data = b"".join(whole)
    found = scan(patched(data, at, bytes((data[at] ^ 2,))))
    size = len(whole[0])
    assert [one.offset for one in found if isinstance(one, GrainFound)] == [
        offset for offset in (0, size, 2 * size) if not offset <= at < offset + size
    ]
    assert [(one.offset, one.end) for one in found if isinstance(one, Damage)] == [
        (at // size * size, (at // size + 1) * size)
    ]


def test_a_stretch_of_the_bytes_is_scanned() -> None:
    data = grain(b"first") + grain(b"other")
    size = len(grain(b"first"))
    assert [one.offset for one in scan_grains(memoryview(data), size, 2 * size)] == [size]
    assert isinstance(list(scan_grains(memoryview(data), 0, 2 * size - 1))[1], Damage)


def test_a_kind_that_must_be_understood_is_damage_to_a_scan() -> None:
    found = scan(grain(b"newer", kind=0x80) + grain(b"other"))
    assert isinstance(found[0], Damage)
    assert "newer Basin" in found[0].reason
    assert isinstance(found[1], GrainFound)


def test_damage_of_megabytes_is_passed_over_quickly() -> None:
    data = grain(b"first") + bytes(range(256)) * (1 << 15) + grain(b"other")
    begun = time.perf_counter()
    found = scan(data)
    assert time.perf_counter() - begun < 5
    assert [type(one) for one in found] == [GrainFound, Damage, GrainFound]


def test_bytes_crafted_to_look_like_grains_do_not_hang_a_scan() -> None:
    """Every 11 bytes a header that claims nearly all the rest: hashing each would take hours."""
    header = struct.pack("<IIBBB", 0, 1 << 20, Kind.BLOB, 0, 0)
    data = header * ((4 << 20) // len(header))
    begun = time.perf_counter()
    found = scan(grain(b"first") + data + grain(b"other"))
    assert time.perf_counter() - begun < 20
    assert isinstance(found[0], GrainFound)
    assert isinstance(found[1], Damage)


# --- frames -----------------------------------------------------------------------------------------------------------


def frame(payload: bytes) -> bytes:
    return SEALED_CIPHER.seal(RECORD_MAGIC, 1, payload, generation=0, randomness=OTHER_KEY)


@given(PIECES)
def test_frames_around_damage_are_found(pieces: list[tuple[bool, bytes]]) -> None:
    data, places = b"", []
    for intact, content in pieces:
        piece = frame(content) if intact else content
        if intact:
            places.append((len(data), len(piece)))
        data += piece
    assert list(find_frames(data, 0)) == places
    assert list(find_frames(data, 1)) == [place for place in places if place[0] >= 1]


def test_a_frame_with_a_wrong_checksum_or_cut_short_is_not_found() -> None:
    whole = OPEN_CIPHER.seal(RECORD_MAGIC, 1, b"payload", generation=0, randomness=KEY)
    assert list(find_frames(b"before" + whole, 0)) == [(6, len(whole))]
    assert list(find_frames(patched(whole, 0, bytes(4)), 0)) == []
    assert list(find_frames(whole[:-1], 0)) == []
    assert list(find_frames(checksum_first(patched(whole, 4, b"\xff\xff\xff\xff")), 0)) == []


def test_bytes_crafted_to_look_like_frames_do_not_hang_a_scan() -> None:
    header = FRAME_HEADER.pack(0, 1 << 19, RECORD_MAGIC, 0, 1, 0, 0, bytes(32))
    data = header[:32] * (1 << 15)
    begun = time.perf_counter()
    with pytest.raises(CorruptionError):
        list(find_frames(data, 0))
    assert time.perf_counter() - begun < 20

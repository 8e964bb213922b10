"""A row's metadata: what goes in comes out, what is malformed is named, and the plain file stays small."""

from __future__ import annotations

import os
import stat as modes
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import CorruptionError, InvalidArgument
from basin.layers.snapshots.attributes import (
    HAS_HOLES,
    IDENTITY,
    IDENTITY_SIZE,
    META_SIZE_MAX,
    Attributes,
    attributes_of,
    attributes_of_way,
    decode_attributes,
    encode_attributes,
    identity_of,
)

PLAIN = Attributes(1, 2, 3, 0o644, 1000, 1001)

times = st.integers(-(1 << 63), (1 << 63) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
words = st.binary(min_size=1, max_size=40).filter(lambda word: b"\0" not in word)
attributes = st.builds(
    Attributes,
    times,
    times,
    u64,
    st.integers(0, 0o7777),
    u32,
    u32,
    u32,
    target=st.none() | words,
    xattrs=st.dictionaries(words, st.binary(max_size=40), max_size=4),
    device=st.none() | st.tuples(u32, u32),
    linked=st.none() | st.tuples(u64, u64),
    changed=st.booleans(),
)


def stat_of(**fields: int) -> os.stat_result:
    """A stat result whose times, in nanoseconds, and other fields are given."""
    values: dict[str, Any] = {"st_mtime_ns": 5, "st_ctime_ns": 6, "st_blocks": 0, "st_rdev": 0, **fields}
    order = ("st_mode", "st_ino", "st_dev", "st_nlink", "st_uid", "st_gid", "st_size")
    return os.stat_result(([values.get(name, 1 if name == "st_nlink" else 0) for name in order] + [0, 0, 0]), values)


def with_extras(extras: Any) -> bytes:
    packed: bytes = msgpack.packb(extras)
    return encode_attributes(PLAIN) + packed


@given(attributes)
def test_what_was_encoded_is_decoded(one: Attributes) -> None:
    meta = encode_attributes(one)
    assert decode_attributes(meta) == one
    assert identity_of(meta) == IDENTITY.pack(one.mtime_ns, one.ctime_ns, one.inode)


@given(attributes)
def test_equal_attributes_have_equal_bytes(one: Attributes) -> None:
    turned = one._replace(xattrs=dict(reversed(list(one.xattrs.items()))))
    assert encode_attributes(one) == encode_attributes(turned)


@given(attributes, st.data())
def test_whatever_bytes_are_attributes_or_corruption(one: Attributes, data: st.DataObject) -> None:
    meta = bytearray(encode_attributes(one))
    at = data.draw(st.integers(0, len(meta) - 1))
    meta[at] = data.draw(st.integers(0, 255))
    meta = meta[: data.draw(st.integers(0, len(meta)))]
    try:
        found = decode_attributes(bytes(meta))
    except CorruptionError:
        return
    assert decode_attributes(encode_attributes(found)) == found


@given(st.binary(max_size=120))
def test_random_extras_are_attributes_or_corruption(extras: bytes) -> None:
    try:
        decode_attributes(encode_attributes(PLAIN) + extras)
    except CorruptionError:
        return


def test_a_plain_file_takes_forty_bytes() -> None:
    meta = attributes_of(stat_of(st_mode=modes.S_IFREG | 0o644, st_ino=9))
    assert len(meta) == 40
    assert len(identity_of(meta)) == IDENTITY_SIZE == 24


def test_a_stat_says_the_same_as_its_attributes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    path.chmod(0o4751)
    os.utime(path, ns=(1, 1_234_567_891))
    other = tmp_path / "other"
    other.hardlink_to(path)
    stat = path.lstat()
    expected = Attributes(
        1_234_567_891,
        stat.st_ctime_ns,
        stat.st_ino,
        0o4751,
        os.getuid(),
        os.getgid(),
        xattrs={b"user.b": b"2", b"user.a": b"1"},
        linked=(stat.st_dev, 2),
        changed=True,
    )
    meta = attributes_of(stat, xattrs={b"user.b": b"2", b"user.a": b"1"}, changed=True)
    assert meta == encode_attributes(expected)
    assert decode_attributes(meta) == expected


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("links", [1, 3])
@pytest.mark.parametrize("xattrs", [None, {}, {b"user.a": b"1"}])
def test_each_extra_is_kept_alone_and_with_others(changed: bool, links: int, xattrs: dict[bytes, bytes] | None) -> None:
    stat = stat_of(st_mode=modes.S_IFREG | 0o600, st_ino=7, st_dev=8, st_nlink=links)
    linked = (8, links) if links > 1 else None
    expected = Attributes(5, 6, 7, 0o600, 0, 0, xattrs=xattrs or {}, linked=linked, changed=changed)
    assert attributes_of(stat, xattrs=xattrs, changed=changed) == encode_attributes(expected)


def test_a_link_keeps_its_target() -> None:
    meta = attributes_of(stat_of(st_mode=modes.S_IFLNK | 0o777), target=b"../\xff")
    assert decode_attributes(meta).target == b"../\xff"


@pytest.mark.parametrize("kind", [modes.S_IFCHR, modes.S_IFBLK])
def test_a_device_keeps_its_numbers(kind: int) -> None:
    meta = attributes_of(stat_of(st_mode=kind | 0o600, st_rdev=os.makedev(8, 300)))
    assert decode_attributes(meta).device == (8, 300)


def test_a_file_with_holes_says_so(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 20)
    (tmp_path / "full").write_bytes(os.urandom(1 << 16))
    os.sync()
    assert decode_attributes(attributes_of((tmp_path / "sparse").stat())).flags == HAS_HOLES
    assert decode_attributes(attributes_of((tmp_path / "full").stat())).flags == 0
    assert decode_attributes(attributes_of(stat_of(st_mode=modes.S_IFREG, st_size=100))).flags == 0
    assert decode_attributes(attributes_of(stat_of(st_mode=modes.S_IFDIR, st_size=4096))).flags == 0


def test_a_directory_is_never_a_hard_link() -> None:
    assert decode_attributes(attributes_of(stat_of(st_mode=modes.S_IFDIR, st_nlink=7))).linked is None


@pytest.mark.parametrize("sign", [1, -1])
def test_a_time_beyond_64_bits_becomes_the_last_that_fits(sign: int) -> None:
    meta = attributes_of(stat_of(st_mode=modes.S_IFREG, st_mtime_ns=sign * (1 << 70)))
    found = decode_attributes(meta)
    assert (found.mtime_ns, found.ctime_ns) == (sign * ((1 << 63) - 1), 6)


def test_of_a_way_only_owner_and_mode_are_kept() -> None:
    stat = stat_of(st_mode=modes.S_IFDIR | 0o1777, st_uid=3, st_gid=4, st_ino=5, st_nlink=2)
    assert decode_attributes(attributes_of_way(stat)) == Attributes(0, 0, 0, 0o1777, 3, 4)


def test_unknown_extras_of_a_later_writer_are_passed_over() -> None:
    assert decode_attributes(with_extras({"b": 12, "c": 1, "z": [1]})) == PLAIN._replace(changed=True)


@pytest.mark.parametrize(
    "extras",
    [
        {},
        [],
        1,
        {1: 2},
        {b"c": 1},
        {"c": 0},
        {"c": 2},
        {"c": True},
        {"t": "text"},
        {"t": b""},
        {"t": b"a\0b"},
        {"t": b"x" * 70_000},
        {"x": {}},
        {"x": {b"": b"1"}},
        {"x": {"text": b"1"}},
        {"x": {b"name": "text"}},
        {"x": {b"a\0": b"1"}},
        {"x": {b"b": b"1", b"a": b"2"}},
        {"x": [b"a"]},
        {"r": [1]},
        {"r": [1, 2, 3]},
        {"r": [1, -1]},
        {"r": [1, 1 << 32]},
        {"r": [1, True]},
        {"r": [1, 1.0]},
        {"h": b"ab"},
        {"t": b"a", "c": 1},
    ],
    ids=repr,
)
def test_malformed_extras_are_corruption(extras: Any) -> None:
    with pytest.raises(CorruptionError):
        decode_attributes(with_extras(extras))


def test_other_malformed_bytes_are_corruption() -> None:
    good = encode_attributes(PLAIN)
    twice = good + b"\x82" + 2 * (b"\xa1c\x01")  # The key "c" is there twice.
    nested = good + b"\x81\xa1t" + 5000 * b"\x91"
    wrong_mode = encode_attributes(PLAIN)[:24] + (0o10000).to_bytes(4, "little") + good[28:]
    too_large = with_extras({"x": {b"a": bytes(META_SIZE_MAX)}})
    for meta in (b"", good[:-1], good + b"\xc1", good + b"\x81\xa1c\x01\x00", twice, nested, wrong_mode, too_large):
        with pytest.raises(CorruptionError):
            decode_attributes(meta)
    assert decode_attributes(good) == PLAIN


@pytest.mark.parametrize(
    "changes",
    [
        {"mtime_ns": 1 << 63},
        {"inode": -1},
        {"mode": 0o10000},
        {"uid": 1 << 32},
        {"target": b""},
        {"device": (1, -1)},
        {"xattrs": {b"": b""}},
        {"xattrs": {b"a": bytes(META_SIZE_MAX)}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_could_not_be_read_back_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        encode_attributes(PLAIN._replace(**changes))

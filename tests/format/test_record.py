"""Frames, records, checkpoints: round trips, every condition broken once, hostile MessagePack."""

from __future__ import annotations

import dataclasses
import tracemalloc
from functools import partial
from typing import Any

import msgpack
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from basin.errors import (
    AuthenticationFailed,
    ChecksumMismatch,
    CorruptionError,
    TruncatedStratum,
    UnsupportedVersion,
)
from basin.format.checkpoint import decode_checkpoint, encode_checkpoint
from basin.format.layout import (
    CHECKPOINT_MAGIC,
    FRAME_FLAG_COMPRESSED,
    FRAME_FLAG_UNSYNCED,
    FRAME_HEADER_SIZE,
    FRAME_SIZE_MAX,
    FULL_NAME_SIZE_MAX,
    RECORD_MAGIC,
    RULES_VERSION,
)
from basin.format.record import (
    Batch,
    Condemn,
    FrameCipher,
    IndexRun,
    Kill,
    NameRun,
    Pin,
    Record,
    Slot,
    StratumAdded,
    chain_hash,
    decode_frame_header,
    decode_record,
    encode_record,
)
from tests.format.material import (
    BASIN_ID,
    IDS,
    KEY,
    KEYS,
    OPEN_CIPHER,
    OTHER_KEY,
    SEALED_CIPHER,
    STRATUM_ID,
    U32,
    U64,
    answered,
    checksum_first,
    patched,
    refused,
)

NAMES = st.binary(max_size=12)
CIPHERS = st.sampled_from([OPEN_CIPHER, SEALED_CIPHER])


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    names = draw(st.lists(NAMES, max_size=4))
    references = draw(st.lists(NAMES, max_size=3))
    return Batch(
        ranges=draw(st.lists(st.tuples(NAMES, NAMES), max_size=3)),
        names=names,
        values=[draw(st.binary(max_size=20)) for _ in names],
        reference_names=references,
        reference_keys=[draw(KEYS) for _ in references],
        deletes=draw(st.lists(NAMES, max_size=3)),
        expiries=draw(st.dictionaries(NAMES, U64, max_size=2)),
        run=draw(st.just(b"") | IDS),
    )


RECORDS = st.builds(
    Record,
    session=U64,
    sequence=U64,
    previous=KEYS,
    time_ms=U64,
    batches=st.lists(batches(), max_size=3),
    strata_added=st.lists(
        st.builds(
            StratumAdded, IDS, st.integers(1, 3), st.integers(1, 3), U64, U64, KEYS, U32, U64, KEYS | st.just(b"")
        ),
        max_size=2,
    ),
    strata_removed=st.lists(IDS, max_size=2),
    relied=st.lists(IDS, max_size=2),
    name_runs_added=st.lists(st.builds(NameRun, IDS, *[U64] * 9), max_size=2),
    name_runs_removed=st.lists(IDS, max_size=2),
    index_runs_added=st.lists(st.builds(IndexRun, IDS, U64, st.lists(IDS, max_size=2)), max_size=2),
    index_runs_removed=st.lists(IDS, max_size=2),
    condemned=st.lists(st.builds(Condemn, U64, st.lists(IDS, max_size=2)), max_size=2),
    revived=st.lists(IDS, max_size=2),
    killed=st.lists(st.builds(Kill, U64, st.lists(IDS, max_size=2)), max_size=2),
    session_begun=st.booleans(),
    sessions_ended=st.lists(U64, max_size=2),
    sessions_revoked=st.lists(U64, max_size=2),
    pins_added=st.lists(st.builds(Pin, st.binary(max_size=16), U64), max_size=2),
    pins_removed=st.lists(st.binary(max_size=16), max_size=2),
    floor=U64,
    expire_through_ms=U64,
    slots_added=st.lists(st.builds(Slot, st.text(max_size=16), KEYS), max_size=2),
    slots_removed=st.lists(st.text(max_size=16), max_size=2),
    generation=U32,
    damaged=st.lists(KEYS, max_size=2),
    job=st.text(max_size=16),
    files_kept=st.booleans(),
    files_deleted=st.lists(IDS, max_size=2),
    generations_dropped=st.lists(U32, max_size=2),
)
PLAIN = Record(session=1, sequence=2, previous=KEY, time_ms=3)
FIELDS: dict[str, Any] = msgpack.unpackb(encode_record(PLAIN))


@given(RECORDS)
def test_a_record_comes_back(record: Record) -> None:
    assert decode_record(encode_record(record)) == record


def test_fields_that_are_empty_cost_nothing() -> None:
    assert FIELDS == {"s": 1, "q": 2, "p": KEY, "t": 3, "r": RULES_VERSION}
    everything = {entry.name for entry in dataclasses.fields(Record)}
    assert len(everything) == len(msgpack.unpackb(encode_record(_full())))


def _full() -> Record:
    stratum = StratumAdded(STRATUM_ID, 1, 1, 1, 1, KEY, 1, 1)
    run = NameRun(STRATUM_ID, *[1] * 9)
    of_strata = ("strata_removed", "relied", "name_runs_removed", "index_runs_removed", "revived")
    lists: dict[str, Any] = {name: [STRATUM_ID] for name in of_strata}
    lists |= {name: [1] for name in ("sessions_ended", "sessions_revoked")}
    return Record(
        1,
        1,
        KEY,
        1,
        batches=[Batch()],
        strata_added=[stratum],
        name_runs_added=[run],
        index_runs_added=[IndexRun(STRATUM_ID, 1, [])],
        condemned=[Condemn(1, [])],
        killed=[Kill(1, [])],
        session_begun=True,
        pins_added=[Pin(b"", 1)],
        pins_removed=[b""],
        floor=1,
        expire_through_ms=1,
        slots_added=[Slot("", KEY)],
        slots_removed=[""],
        generation=1,
        damaged=[KEY],
        job="nightly",
        files_kept=True,
        files_deleted=[STRATUM_ID],
        generations_dropped=[1],
        **lists,
    )


def test_a_stratum_of_an_earlier_version_has_no_key_material() -> None:
    added = StratumAdded(STRATUM_ID, 1, 2, 3, 4, KEY, 5, 6)
    earlier = msgpack.packb({**FIELDS, "a+": [list(added)[:8]]})
    assert decode_record(earlier).strata_added == [added]
    with pytest.raises(CorruptionError):
        decode_record(msgpack.packb({**FIELDS, "a+": [[*list(added)[:8], bytes(31)]]}))


def test_frames_of_an_open_basin_differ_so_that_a_writer_knows_its_own() -> None:
    payload = encode_record(PLAIN)
    frames = {OPEN_CIPHER.seal(RECORD_MAGIC, 5, payload, generation=0, randomness=key) for key in (KEY, OTHER_KEY)}
    assert len(frames) == 2
    assert {OPEN_CIPHER.open(frame)[1] for frame in frames} == {payload}


def test_an_unknown_field_is_skipped_unless_it_must_be_understood() -> None:
    assert decode_record(msgpack.packb({**FIELDS, "newer": [1, 2]})) == PLAIN
    assert decode_record(msgpack.packb(dict[Any, Any](FIELDS) | {7: None, b"raw": 1})) == PLAIN
    refused(UnsupportedVersion, lambda: decode_record(msgpack.packb({**FIELDS, "!newer": 0})))
    refused(UnsupportedVersion, lambda: decode_record(msgpack.packb({**FIELDS, "r": RULES_VERSION + 1})))


@pytest.mark.parametrize("missing", "sqpt")
def test_a_record_without_a_field_that_is_always_there(missing: str) -> None:
    fields = {name: value for name, value in FIELDS.items() if name != missing}
    refused(CorruptionError, lambda: decode_record(msgpack.packb(fields)))


def batch_with(column: int, value: Any) -> dict[str, Any]:
    columns: list[Any] = Batch().to_list()
    columns[column] = value
    return {"b": [columns]}


def stratum_with(column: int, value: Any) -> dict[str, Any]:
    columns: list[Any] = [STRATUM_ID, 1, 1, 0, 0, KEY, 0, 0]
    columns[column] = value
    return {"a+": [columns]}


@pytest.mark.parametrize(
    "changed",
    [
        {"s": -1},
        {"s": 1.0},
        {"s": True},
        {"q": None},
        {"p": KEY[1:]},
        {"p": "text"},
        {"p": []},
        {"b": 1},
        {"b": [[]]},
        {"b": [Batch().to_list()[:-1]]},
        {"b": [[*Batch().to_list(), 0]]},
        batch_with(0, [[b"a"]]),
        batch_with(0, [[b"a", "b"]]),
        batch_with(1, [b"name"]),
        batch_with(1, [b"n" * (FULL_NAME_SIZE_MAX + 1)]),
        batch_with(2, [b"value"]),
        batch_with(3, [b"name"]),
        batch_with(4, [KEY]),
        batch_with(5, ["text"]),
        batch_with(6, []),
        batch_with(6, {b"name": -1}),
        batch_with(6, {"name": 1}),
        batch_with(7, b"short"),
        batch_with(7, 5),
        stratum_with(0, b"short"),
        stratum_with(1, 4),
        stratum_with(2, 0),
        stratum_with(2, 4),
        stratum_with(3, -1),
        stratum_with(5, KEY[1:]),
        {"a-": [b"short"]},
        {"n+": [[STRATUM_ID, 1]]},
        {"n+": [[STRATUM_ID, *[1] * 10]]},
        {"i+": [[STRATUM_ID, 1, [b"short"]]]},
        {"con": [[1]]},
        {"con": [[-1, []]]},
        {"kil": [[1, STRATUM_ID]]},
        {"s+": 1},
        {"s-": [None]},
        {"p+": [["text", 1]]},
        {"k+": [[b"bytes", KEY]]},
        {"k-": [b"bytes"]},
        {"dmg": b"bytes"},
        {"f": "1"},
        {"g": 1 << 32},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_or_size_is_refused(changed: dict[str, Any]) -> None:
    refused(CorruptionError, lambda: decode_record(msgpack.packb({**FIELDS, **changed})))


def test_columns_of_different_lengths_are_refused() -> None:
    for batch in (
        Batch(names=[b"a", b"b"], values=[b"1"]),
        Batch(reference_names=[b"a"], reference_keys=[KEY, KEY]),
        Batch(reference_names=[b"a"], reference_keys=[KEY[1:]]),
    ):
        refused(CorruptionError, partial(decode_record, encode_record(dataclasses.replace(PLAIN, batches=[batch]))))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_answered(data: bytes) -> None:
    answered(lambda: decode_record(data))
    answered(lambda: OPEN_CIPHER.open(data))
    frame = patched(data.ljust(FRAME_HEADER_SIZE, b"\0"), 4, len(data).to_bytes(4, "little") + RECORD_MAGIC)
    answered(lambda: OPEN_CIPHER.open(checksum_first(frame)))
    answered(lambda: decode_checkpoint(SEALED_CIPHER, checksum_first(frame), 1))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.binary(max_size=4) | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    ),
    st.sampled_from(sorted(msgpack.unpackb(encode_record(_full())))),
)
def test_arbitrary_values_of_any_field_are_answered(value: Any, field: str) -> None:
    answered(lambda: decode_record(msgpack.packb({**FIELDS, field: value})))


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * 100_000,
        b"\x81" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\x90\x00",
        b"\x81\xa1\xff\x00",
        b"\x81\xd7\xff" + bytes(8) + b"\0",
        b"\xc1",
        b"",
        b"\x80\x80",
        b"\x01",
    ],
    ids=[
        "deep list",
        "deep map",
        "map",
        "list",
        "bytes",
        "list as key",
        "no utf-8",
        "timestamp",
        "unused",
        "empty",
        "two",
        "integer",
    ],
)
def test_hostile_messagepack_is_refused_and_allocates_nothing(payload: bytes) -> None:
    tracemalloc.start()
    try:
        refused(CorruptionError, lambda: decode_record(payload))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


# --- frames -----------------------------------------------------------------------------------------------------------


@given(
    CIPHERS, st.sampled_from([RECORD_MAGIC, CHECKPOINT_MAGIC]), U64, st.binary(max_size=300), st.integers(0, 1), KEYS
)
def test_a_frame_comes_back(
    cipher: FrameCipher, magic: bytes, position: int, payload: bytes, generation: int, randomness: bytes
) -> None:
    frame = cipher.seal(
        magic, position, payload, generation=generation, randomness=randomness, flags=FRAME_FLAG_UNSYNCED
    )
    header, opened = cipher.open(frame)
    assert opened == payload
    assert header == decode_frame_header(frame)
    assert (header.size, header.magic, header.position) == (len(frame), magic, position)
    assert (header.generation, header.flags) == (generation, FRAME_FLAG_UNSYNCED)
    assert chain_hash(frame) == blake3(frame).digest()
    if cipher is SEALED_CIPHER and len(payload) > 8:
        assert payload not in frame[FRAME_HEADER_SIZE:]


def sealed(cipher: FrameCipher, payload: bytes = b"payload") -> bytes:
    return cipher.seal(RECORD_MAGIC, 5, payload, generation=0, randomness=OTHER_KEY)


@pytest.mark.parametrize("cipher", [OPEN_CIPHER, SEALED_CIPHER], ids=["open", "encrypted"])
def test_every_changed_byte_of_a_frame_is_refused(cipher: FrameCipher) -> None:
    frame = sealed(cipher)
    for at in range(len(frame)):
        with pytest.raises(CorruptionError):
            cipher.open(patched(frame, at, bytes((frame[at] ^ 0x10,))))


def test_every_changed_byte_with_the_right_checksum_does_not_authenticate() -> None:
    frame = sealed(SEALED_CIPHER)
    for at in range(4, len(frame)):
        changed = checksum_first(patched(frame, at, bytes((frame[at] ^ 1,))))
        with pytest.raises((CorruptionError, UnsupportedVersion)):
            SEALED_CIPHER.open(changed)


def test_large_frames_are_compressed() -> None:
    payload = b"again " * 2000
    for cipher in (OPEN_CIPHER, SEALED_CIPHER):
        frame = sealed(cipher, payload)
        assert len(frame) < 500
        header, opened = cipher.open(frame)
        assert header.flags == FRAME_FLAG_COMPRESSED
        assert opened == payload


def test_frames_that_are_not_valid() -> None:
    frame = sealed(OPEN_CIPHER)
    big = FRAME_SIZE_MAX + 1
    refused(TruncatedStratum, lambda: OPEN_CIPHER.open(frame[: FRAME_HEADER_SIZE - 1]))
    refused(TruncatedStratum, lambda: OPEN_CIPHER.open(frame[:-1]))
    refused(TruncatedStratum, lambda: OPEN_CIPHER.open(frame + b"\0"))
    refused(ChecksumMismatch, lambda: OPEN_CIPHER.open(patched(frame, 0, bytes(4))))
    for offset, new in [
        (4, (FRAME_HEADER_SIZE - 1).to_bytes(4, "little")),
        (4, big.to_bytes(4, "little")),
        (8, b"BXXX"),
        (28, b"\1"),
    ]:
        refused(CorruptionError, partial(OPEN_CIPHER.open, checksum_first(patched(frame, offset, new))))
    refused(UnsupportedVersion, lambda: OPEN_CIPHER.open(checksum_first(patched(frame, 12, b"\4"))))


def test_a_frame_opens_in_its_basin_and_generation_only() -> None:
    frame = sealed(SEALED_CIPHER)
    refused(AuthenticationFailed, lambda: FrameCipher(bytes(16), {0: KEY}).open(frame))
    refused(AuthenticationFailed, lambda: FrameCipher(BASIN_ID, {0: OTHER_KEY}).open(frame))
    refused(AuthenticationFailed, lambda: FrameCipher(BASIN_ID, {1: KEY}).open(frame))
    refused(AuthenticationFailed, lambda: SEALED_CIPHER.open(checksum_first(patched(frame, 24, b"\1"))))


def compressed(payload: bytes) -> bytes:
    """A frame whose payload claims to be compressed, with the right checksum."""
    frame = sealed(OPEN_CIPHER, payload)
    return checksum_first(patched(frame, 12, bytes((FRAME_FLAG_COMPRESSED,))))


def test_what_does_not_decompress_is_refused() -> None:
    whole = zstandard.compress(b"again " * 100)
    assert OPEN_CIPHER.open(compressed(whole))[1] == b"again " * 100
    bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + bytes(12)
    for payload in (b"", b"nothing", whole[:-1], whole + b"\0", bomb):
        refused(CorruptionError, partial(OPEN_CIPHER.open, compressed(payload)))


# --- checkpoints ------------------------------------------------------------------------------------------------------


@given(CIPHERS, U64, st.dictionaries(st.text(max_size=5).filter(lambda name: name != "rules"), U32, max_size=3))
def test_a_checkpoint_comes_back(cipher: FrameCipher, position: int, fields: dict[str, int]) -> None:
    frame = encode_checkpoint(cipher, position, fields, generation=0, randomness=OTHER_KEY)
    assert decode_checkpoint(cipher, frame, position) == fields
    refused(CorruptionError, lambda: decode_checkpoint(cipher, frame, position ^ 1))


def test_a_checkpoint_is_no_record_and_a_record_no_checkpoint() -> None:
    payload = msgpack.packb({"rules": RULES_VERSION})
    for cipher in (OPEN_CIPHER, SEALED_CIPHER):
        record = cipher.seal(RECORD_MAGIC, 5, payload, generation=0, randomness=OTHER_KEY)
        refused(CorruptionError, partial(decode_checkpoint, cipher, record, 5))


@pytest.mark.parametrize(
    ("payload", "kind"),
    [
        ({"rules": RULES_VERSION + 1}, UnsupportedVersion),
        ({}, CorruptionError),
        ({"rules": "1"}, CorruptionError),
        ([], CorruptionError),
    ],
    ids=["newer", "no rules", "text", "list"],
)
def test_checkpoints_that_are_not_valid(payload: Any, kind: type[CorruptionError]) -> None:
    frame = OPEN_CIPHER.seal(CHECKPOINT_MAGIC, 5, msgpack.packb(payload), generation=0, randomness=OTHER_KEY)
    refused(kind, lambda: decode_checkpoint(OPEN_CIPHER, frame, 5))

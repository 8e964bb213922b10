"""Payloads of records: what decodes can be encoded, and then decodes to the same record."""

from __future__ import annotations

from collections.abc import Iterator

from basin.format.record import (
    Batch,
    Condemn,
    IndexRun,
    Kill,
    NameRun,
    Pin,
    Record,
    Slot,
    StratumAdded,
    decode_record,
    encode_record,
)
from fuzz.material import KEY, OTHER_KEY, STRATUM_ID


def one_input(data: bytes) -> None:
    record = decode_record(data)
    if decode_record(encode_record(record)) != record:
        raise AssertionError("a record encodes differently")


def seeds() -> Iterator[bytes]:
    yield encode_record(Record(0, 1, bytes(32), 0, session_begun=True))
    batch = Batch(
        ranges=[(b"a", b"b")],
        names=[b"name"],
        values=[b"value"],
        reference_names=[b"other"],
        reference_keys=[KEY],
        deletes=[b"gone"],
        expiries={b"name": 1_700_000_000_000},
    )
    yield encode_record(
        Record(
            1,
            2,
            OTHER_KEY,
            1_700_000_000_000,
            batches=[batch, Batch(run=STRATUM_ID)],
            strata_added=[StratumAdded(STRATUM_ID, 1, 2, 1000, 3, KEY, 0, 1)],
            name_runs_added=[NameRun(STRATUM_ID, 0, 1, 0, 1, 2, 3, 400, 128, 50)],
            index_runs_added=[IndexRun(STRATUM_ID, 3, [STRATUM_ID])],
            condemned=[Condemn(1, [STRATUM_ID])],
            killed=[Kill(1, [STRATUM_ID])],
            pins_added=[Pin(b"pin", 1)],
            slots_added=[Slot("0123456789abcdef", KEY)],
            damaged=[KEY],
        )
    )

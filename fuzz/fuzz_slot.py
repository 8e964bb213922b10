"""`slot.json`, and generations sealed to a slot. After a `j` come fields of a slot, which get the right spelling."""

from __future__ import annotations

import json
from collections.abc import Iterator

from basin.format.document import encode_document
from basin.format.slots import (
    KIND_KEY_FILE,
    Slot,
    SlotKeys,
    create_slot,
    decode_slot,
    open_generation,
    public_key_of,
    seal_generation,
)
from fuzz.material import BASIN_ID, KEY, OTHER_KEY, with_checksum_behind

SLOT_ID = "0123456789abcdef"
KEYS = SlotKeys(private_key=KEY, id_key=OTHER_KEY)


def _slot() -> tuple[bytes, Slot]:
    return create_slot(
        bytes(32),
        kind=KIND_KEY_FILE,
        basin_id=BASIN_ID,
        slot_id=SLOT_ID,
        keys=KEYS,
        salt=bytes(16),
        created_ms=1_700_000_000_000,
    )


_, SLOT = _slot()


def one_input(data: bytes) -> None:
    if data[:1] == b"g":
        open_generation(with_checksum_behind(data[1:]), generation=1, slot=SLOT, keys=KEYS)
    elif data[:1] == b"j":
        _decode_fields(data[1:])
    else:
        decode_slot(data, SLOT_ID)


def _decode_fields(data: bytes) -> None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict):
        cost = decode_slot(encode_document("basin slot", fields), SLOT_ID).cost
        if cost is not None and (cost.memory_kib > 1 << 20 or cost.passes > 16 or cost.lanes > 16):
            raise AssertionError("a slot states a cost above the caps")


def seeds() -> Iterator[bytes]:
    encoded = _slot()[0]
    yield encoded
    fields = {name: value for name, value in json.loads(encoded).items() if name != "checksum"}
    yield b"j" + json.dumps(fields).encode("ascii")
    cost = {"kind": "passphrase", "memory_kib": 65_536, "passes": 3, "lanes": 4}
    yield b"j" + json.dumps(fields | cost).encode("ascii")
    yield (
        b"g"
        + seal_generation(
            bytes(32),
            generation=1,
            basin_id=BASIN_ID,
            slot_id=SLOT_ID,
            public_key=public_key_of(KEY),
            id_key=OTHER_KEY,
            ephemeral_private_key=bytes(range(1, 33)),
        )[:-4]
    )

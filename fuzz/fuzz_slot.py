"""`slot.json`, and generations sealed to a slot."""

from __future__ import annotations

from collections.abc import Iterator

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
    else:
        decode_slot(data, SLOT_ID)


def seeds() -> Iterator[bytes]:
    yield _slot()[0]
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

"""Frames of the log and checkpoints, in an open basin: the frame, what it carries, the state of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from basin.engine.state import State, state_from_map, state_to_map
from basin.format.checkpoint import decode_checkpoint, encode_checkpoint
from basin.format.layout import CHECKPOINT_MAGIC, RECORD_MAGIC
from basin.format.record import Record, decode_record, encode_record
from fuzz.material import KEY, OPEN_CIPHER, with_checksum_before


def one_input(data: bytes) -> None:
    frame = with_checksum_before(data)
    header, payload = OPEN_CIPHER.open(frame)
    if header.magic == CHECKPOINT_MAGIC:
        state_from_map(decode_checkpoint(OPEN_CIPHER, frame, header.position))
    else:
        decode_record(payload)


def seeds() -> Iterator[bytes]:
    for payload in (
        encode_record(Record(0, 1, bytes(32), 0)),
        encode_record(Record(0, 1, KEY, 0, damaged=[KEY] * 200)),
    ):
        yield OPEN_CIPHER.seal(RECORD_MAGIC, 1, payload, generation=0, randomness=bytes(32))[4:]
    state = State(position=3, hash=KEY, sessions={1: 2}, slots={"0123456789abcdef": KEY})
    yield encode_checkpoint(OPEN_CIPHER, 3, state_to_map(state), generation=0, randomness=bytes(32))[4:]

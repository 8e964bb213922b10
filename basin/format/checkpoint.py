"""Checkpoints: the folded state at one log position, as one sealed frame.

The frame is that of a record (see `record`) with its own magic, so that neither can be taken for the other; the payload
is a MessagePack map that `basin.engine.state` writes and reads. Pure.
"""

from __future__ import annotations

from typing import Any

import msgpack

from basin.errors import CorruptionError, UnsupportedVersion
from basin.format.layout import CHECKPOINT_MAGIC, RULES_VERSION
from basin.format.record import FrameCipher, unpack_map


def encode_checkpoint(
    cipher: FrameCipher, position: int, fields: dict[str, Any], *, generation: int, randomness: bytes
) -> bytes:
    """One frame that holds the state `fields` at `position`."""
    payload: bytes = msgpack.packb({"rules": RULES_VERSION, **fields}, use_bin_type=True)
    return cipher.seal(CHECKPOINT_MAGIC, position, payload, generation=generation, randomness=randomness)


def decode_checkpoint(cipher: FrameCipher, frame: bytes, position: int) -> dict[str, Any]:
    """The state's fields; raise a `CorruptionError` unless `frame` is the checkpoint of `position`."""
    header, payload = cipher.open(frame)
    if header.magic != CHECKPOINT_MAGIC or header.position != position:
        raise CorruptionError(f"this is not the checkpoint of position {position}")
    fields = unpack_map(payload)
    rules = fields.pop("rules", None)
    if type(rules) is not int:
        raise CorruptionError("a checkpoint names no rules")
    if rules > RULES_VERSION:
        raise UnsupportedVersion(f"log rules {rules} need a newer Basin", version=rules)
    return fields

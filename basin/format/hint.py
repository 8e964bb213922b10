"""What a bucket keeps beside its log: the hint, which spares an opener a search, and stubs of folded records.

The hint is overwritten, in the clear, and believed by nobody: it says where a checkpoint and the key slots probably
are, and an opener that does not find them there looks for itself. Its copies of the key slots are the bytes of the slot
files, which anybody who can read the bucket can read as well.

A stub is a sealed frame with a magic of its own in the place of a record whose body was folded into a checkpoint. Pure.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgpack
import xxhash

from basin.errors import CorruptionError
from basin.format.layout import HASH_SIZE, HINT_MAGIC, HINT_SIZE_MAX, STUB_MAGIC
from basin.format.record import FrameCipher, plain_bytes, plain_text, unpack_map, unsigned

_CHECKSUM_SIZE: Final = 16
_PREFIX_SIZE: Final = len(HINT_MAGIC) + _CHECKSUM_SIZE


class Hint(NamedTuple):
    """Positions of the newest checkpoint and the one before (0: none), and the files below `keys/` by name."""

    checkpoint: int = 0
    older_checkpoint: int = 0
    keys: dict[str, bytes] = {}  # noqa: RUF012  # never changed in place


def encode_hint(hint: Hint) -> bytes:
    """Magic, XXH3-128 of the rest, MessagePack map."""
    payload: bytes = msgpack.packb(
        {"checkpoint": hint.checkpoint, "older": hint.older_checkpoint, "keys": hint.keys}, use_bin_type=True
    )
    return HINT_MAGIC + xxhash.xxh3_128_digest(payload) + payload


def decode_hint(data: bytes) -> Hint:
    """Raises `CorruptionError` on anything that is not a whole hint."""
    payload = data[_PREFIX_SIZE:]
    if len(data) > HINT_SIZE_MAX or data[: len(HINT_MAGIC)] != HINT_MAGIC:
        raise CorruptionError("this is no hint")
    if data[len(HINT_MAGIC) : _PREFIX_SIZE] != xxhash.xxh3_128_digest(payload):
        raise CorruptionError("a hint does not match its checksum")
    fields = unpack_map(payload)
    try:
        return Hint(
            unsigned(fields["checkpoint"]),
            unsigned(fields["older"]),
            {plain_text(name): plain_bytes(data) for name, data in fields["keys"].items()},
        )
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CorruptionError("a hint is malformed") from error


class Stub(NamedTuple):
    """The position of a checkpoint that holds the record, and the record's chain hash.

    `gap`: in a segment, how many bytes behind the stub belong to what it stands for, and are passed over.
    """

    checkpoint: int
    hash: bytes
    gap: int = 0


_CHECKPOINT_FIELD: Final = b"\xaacheckpoint"
_HASH_FIELD: Final = b"\xa4hash"
_GAP_FIELD: Final = b"\xa3gap\xce"
_GAP_SIZE: Final = len(_GAP_FIELD) + 4
_PADDING_FIELD: Final = b"\xa0\xc4"
_PADDING_MIN: Final = len(_PADDING_FIELD) + 1


def encode_stub(
    cipher: FrameCipher, position: int, stub: Stub, *, generation: int, randomness: bytes, size: int = 0
) -> bytes:
    """The frame that replaces the record at `position`.

    `size`: with the `gap` that it states (that of `stub` is not looked at) it takes exactly as many bytes; raises
    `CorruptionError` if those are too few. Bytes of a gap are not part of what is returned.
    """
    payload: bytes = msgpack.packb({"checkpoint": stub.checkpoint, "hash": stub.hash}, use_bin_type=True)
    frame = cipher.seal(STUB_MAGIC, position, payload, generation=generation, randomness=randomness)
    if not size or size == len(frame):
        return frame
    payload = _widened(payload, size - len(frame))
    return cipher.seal(STUB_MAGIC, position, payload, generation=generation, randomness=randomness)


def _widened(payload: bytes, more: int) -> bytes:
    """The same map, so that it takes `more` bytes, by itself or with the gap that it states.

    Few bytes come from longer forms of the texts, or an empty field; many are a gap.
    """
    if more < 0:
        raise CorruptionError(f"a stub does not fit into {-more} bytes less than it has")
    if more == 1:
        return payload.replace(_HASH_FIELD, b"\xd9\x04hash", 1)
    if more == 2:
        return _widened(payload, 1).replace(_CHECKPOINT_FIELD, b"\xd9\x0acheckpoint", 1)
    fields = b"\x83" + payload[1:]
    if more < _GAP_SIZE:
        padding = more - _PADDING_MIN
        return fields + _PADDING_FIELD + bytes([padding]) + bytes(padding)
    return fields + _GAP_FIELD + (more - _GAP_SIZE).to_bytes(4, "big")


def decode_stub(cipher: FrameCipher, frame: bytes, position: int) -> Stub:
    """Raises a `CorruptionError` unless `frame` is the stub of `position`."""
    header, payload = cipher.open(frame)
    if header.magic != STUB_MAGIC or header.position != position:
        raise CorruptionError(f"this is not the stub of position {position}")
    fields: dict[str, Any] = unpack_map(payload)
    try:
        stub = Stub(unsigned(fields["checkpoint"]), plain_bytes(fields["hash"]), unsigned(fields.get("gap", 0)))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError("a stub is malformed") from error
    if stub.checkpoint < position or len(stub.hash) != HASH_SIZE:
        raise CorruptionError("a stub names no checkpoint that holds its record")
    return stub

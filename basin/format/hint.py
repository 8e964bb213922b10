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
    """The position of a checkpoint that holds the record, and the record's chain hash."""

    checkpoint: int
    hash: bytes


def encode_stub(cipher: FrameCipher, position: int, stub: Stub, *, generation: int, randomness: bytes) -> bytes:
    """The frame that replaces the record at `position`."""
    payload: bytes = msgpack.packb({"checkpoint": stub.checkpoint, "hash": stub.hash}, use_bin_type=True)
    return cipher.seal(STUB_MAGIC, position, payload, generation=generation, randomness=randomness)


def decode_stub(cipher: FrameCipher, frame: bytes, position: int) -> Stub:
    """Raises a `CorruptionError` unless `frame` is the stub of `position`."""
    header, payload = cipher.open(frame)
    if header.magic != STUB_MAGIC or header.position != position:
        raise CorruptionError(f"this is not the stub of position {position}")
    fields: dict[str, Any] = unpack_map(payload)
    try:
        stub = Stub(unsigned(fields["checkpoint"]), plain_bytes(fields["hash"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError("a stub is malformed") from error
    if stub.checkpoint < position or len(stub.hash) != HASH_SIZE:
        raise CorruptionError("a stub names no checkpoint that holds its record")
    return stub

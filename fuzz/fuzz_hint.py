"""Hints (after an `h`), and stubs of folded records: what decodes can be encoded, and then decodes to the same."""

from __future__ import annotations

from collections.abc import Iterator

import xxhash

from basin.format.hint import Hint, Stub, decode_hint, decode_stub, encode_hint, encode_stub
from basin.format.layout import HINT_MAGIC
from basin.format.record import decode_frame_header
from fuzz.material import KEY, OPEN_CIPHER, OTHER_KEY, with_checksum_before


def one_input(data: bytes) -> None:
    if data[:1] == b"h":
        payload = data[1:]
        hint = decode_hint(HINT_MAGIC + xxhash.xxh3_128_digest(payload) + payload)
        if decode_hint(encode_hint(hint)) != hint:
            raise AssertionError("a hint encodes differently")
    else:
        frame = with_checksum_before(data[1:])
        header = decode_frame_header(frame)
        stub = decode_stub(OPEN_CIPHER, frame, header.position)
        again = encode_stub(
            OPEN_CIPHER, header.position, stub, generation=header.generation, randomness=header.randomness
        )
        if decode_stub(OPEN_CIPHER, again, header.position) != stub:
            raise AssertionError("a stub encodes differently")


def seeds() -> Iterator[bytes]:
    prefix_size = len(HINT_MAGIC) + 16
    yield b"h" + encode_hint(Hint())[prefix_size:]
    keys = {"keys/0123456789abcdef/slot.json": b"{}", "keys/0123456789abcdef/1": KEY}
    yield b"h" + encode_hint(Hint(1000, 900, keys))[prefix_size:]
    yield b"s" + encode_stub(OPEN_CIPHER, 7, Stub(1000, KEY), generation=1, randomness=OTHER_KEY)[4:]

"""Payloads: links and compression. Whatever decodes can be joined again."""

from __future__ import annotations

from collections.abc import Iterator

import zstandard

from basin.format.layout import CODEC_ZSTD, FLAG_LINKS
from basin.format.payload import decode_payload, join_links
from fuzz.material import KEY, OTHER_KEY

_decompressor = zstandard.ZstdDecompressor()


def one_input(data: bytes) -> None:
    codec, flags = data[:1].ljust(1, b"\0")[0] & 3, data[1:2].ljust(1, b"\0")[0] & 1
    payload = decode_payload(codec, flags, data[2:], _decompressor)
    if codec == 0 and flags & FLAG_LINKS and join_links(payload.links, payload.content) != data[2:]:
        raise AssertionError("a payload joins differently")


def seeds() -> Iterator[bytes]:
    linked = join_links([KEY, OTHER_KEY], b"content")
    yield bytes((0, 0)) + b"content"
    yield bytes((0, FLAG_LINKS)) + linked
    yield bytes((CODEC_ZSTD, 0)) + zstandard.compress(bytes(1000))
    yield bytes((CODEC_ZSTD, FLAG_LINKS)) + zstandard.compress(linked)

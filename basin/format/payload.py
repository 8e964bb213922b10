"""Payload of a grain: links and content, compressed. What lies between a user's bytes and the seal.

Layout before compression: with the has-links flag `u32 count`, then `count` content keys of 32 bytes, then the
content; without it just the content. The content key hashes the content alone.

Invariants: what does not shrink is stored; the decompressor never produces more than its cap, which it reads from
zstd's own content size *after* the seal has authenticated it. Pure; contexts come as arguments, because they are
not safe to share among threads.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

import zstandard

from basin.errors import CorruptionError, UnsupportedVersion
from basin.format.layout import CODEC_STORED, CODEC_ZSTD, CONTENT_SIZE_MAX, FLAG_LINKS

COMPRESS_SIZE_MIN: Final = 128
"""Below this zstd costs 3 to 5 µs and rarely saves a byte."""
_LINK_COUNT: Final = struct.Struct("<I")
_KEY_SIZE: Final = 32


class Payload(NamedTuple):
    """A decoded payload: the content keys it keeps alive, and the content."""

    links: list[bytes]
    content: bytes


def join_links(links: Sequence[bytes], content: bytes) -> bytes:
    """Put the link list before the content, as the has-links flag announces."""
    return b"".join((_LINK_COUNT.pack(len(links)), *links, content))


def split_links(payload: bytes) -> Payload:
    """Undo `join_links`; raise `CorruptionError` when the count does not fit."""
    if len(payload) < _LINK_COUNT.size:
        raise CorruptionError("a link list is cut short")
    (count,) = _LINK_COUNT.unpack_from(payload)
    end = _LINK_COUNT.size + count * _KEY_SIZE
    if end > len(payload):
        raise CorruptionError(f"a link list claims {count} links in {len(payload)} bytes")
    links = [payload[at : at + _KEY_SIZE] for at in range(_LINK_COUNT.size, end, _KEY_SIZE)]
    return Payload(links, payload[end:])


def compress(plain: bytes, compressor: zstandard.ZstdCompressor | None) -> tuple[int, bytes]:
    """Return (codec, bytes): compressed, or as they are where that is not smaller or no compressor is given."""
    if compressor is None or len(plain) < COMPRESS_SIZE_MIN:
        return CODEC_STORED, plain
    return shorter(plain, compressor.compress(plain))


def shorter(plain: bytes, small: bytes) -> tuple[int, bytes]:
    """(codec, bytes) of whichever is smaller: the content itself or its compressed form."""
    return (CODEC_ZSTD, small) if len(small) < len(plain) else (CODEC_STORED, plain)


def decompress(codec: int, data: bytes, decompressor: zstandard.ZstdDecompressor) -> bytes:
    """Undo `compress`. Raises `CorruptionError`; allocates at most `CONTENT_SIZE_MAX`."""
    if codec == CODEC_STORED:
        return data
    if codec != CODEC_ZSTD:
        raise UnsupportedVersion(f"codec {codec} needs a newer Basin", version=codec)
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= CONTENT_SIZE_MAX:
            raise CorruptionError(f"a compressed grain claims {size} bytes")
        plain: bytes = decompressor.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"a grain does not decompress: {error}") from error
    if len(plain) != size:
        raise CorruptionError("a grain decompresses to another size than it claims")
    return plain


def decode_payload(codec: int, flags: int, data: bytes, decompressor: zstandard.ZstdDecompressor) -> Payload:
    """Authenticated bytes of a grain to its links and content."""
    plain = data if codec == CODEC_STORED else decompress(codec, data, decompressor)
    return split_links(plain) if flags & FLAG_LINKS else Payload([], plain)

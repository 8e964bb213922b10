"""Header and footer of a stratum: who wrote it, under which keys, and, once finished, what it holds.

Invariants: the header is written first and never changes; a footer exists only on a finished stratum; both carry a
checksum of their own, so that they decode or raise. Pure.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import xxhash

from basin.errors import ChecksumMismatch, CorruptionError, TruncatedStratum, UnsupportedVersion
from basin.format.layout import (
    FOOTER_MAGIC,
    FORMAT_VERSION,
    PROFILE_ENCRYPTED,
    PROFILE_OPEN,
    STRATUM_FOOTER,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER,
    STRATUM_HEADER_SIZE,
    STRATUM_MAGIC,
    StratumKind,
)
from basin.terms import StratumId

_CHECKSUM_SIZE: Final = 4
_FOOTER_CHECKSUM_AT: Final = STRATUM_FOOTER_SIZE - len(FOOTER_MAGIC) - _CHECKSUM_SIZE


class StratumHeader(NamedTuple):
    """The first 128 bytes of every stratum. `session` is the log position of the writer's begin record."""

    kind: StratumKind
    profile: int
    generation: int
    basin_id: bytes
    stratum_id: StratumId
    session: int
    key_material: bytes
    commitment: bytes


class StratumFooter(NamedTuple):
    """The last 80 bytes of a finished stratum. `length` and `hash` (BLAKE3) are of everything before the footer."""

    index_offset: int
    index_length: int
    grain_count: int
    length: int
    hash: bytes


def encode_header(header: StratumHeader) -> bytes:
    """128 bytes, with their checksum at the end."""
    packed = STRATUM_HEADER.pack(
        STRATUM_MAGIC,
        FORMAT_VERSION,
        header.kind,
        header.profile,
        header.generation,
        header.basin_id,
        header.stratum_id,
        header.session,
        header.key_material,
        header.commitment,
        0,
        0,
    )[:-_CHECKSUM_SIZE]
    return packed + xxhash.xxh32_intdigest(packed).to_bytes(_CHECKSUM_SIZE, "little")


def decode_header(data: bytes) -> StratumHeader:
    """Read and verify a header. Raises the kinds of `CorruptionError`, and `UnsupportedVersion`."""
    if len(data) < STRATUM_HEADER_SIZE:
        raise TruncatedStratum(f"a stratum header has {STRATUM_HEADER_SIZE} bytes, here are {len(data)}")
    magic, version, kind, profile, generation, basin_id, stratum_id, session, material, commitment, zero, checksum = (
        STRATUM_HEADER.unpack_from(data)
    )
    if magic != STRATUM_MAGIC:
        raise CorruptionError("a stratum does not start with its magic bytes")
    if xxhash.xxh32_intdigest(data[: STRATUM_HEADER_SIZE - _CHECKSUM_SIZE]) != checksum:
        raise ChecksumMismatch("a stratum header does not match its checksum")
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(f"stratum format {version} needs a newer Basin", version=version)
    if kind not in (StratumKind.DATA, StratumKind.META, StratumKind.INDEX):
        raise UnsupportedVersion(f"stratum kind {kind} needs a newer Basin", version=kind)
    if profile not in (PROFILE_OPEN, PROFILE_ENCRYPTED) or zero:
        raise CorruptionError("a stratum header holds impossible values")
    return StratumHeader(
        StratumKind(kind), profile, generation, basin_id, StratumId(stratum_id), session, material, commitment
    )


def encode_footer(footer: StratumFooter) -> bytes:
    """80 bytes: pointer to the index directory grain, count, length, hash, checksum, magic."""
    packed = STRATUM_FOOTER.pack(
        footer.index_offset,
        footer.index_length,
        0,
        footer.grain_count,
        footer.length,
        footer.hash,
        0,
        0,
        FOOTER_MAGIC,
    )
    checksum = xxhash.xxh32_intdigest(packed[:_FOOTER_CHECKSUM_AT])
    return packed[:_FOOTER_CHECKSUM_AT] + checksum.to_bytes(_CHECKSUM_SIZE, "little") + FOOTER_MAGIC


def decode_footer(data: bytes, file_size: int) -> StratumFooter:
    """Read and verify the last 80 bytes of a file of `file_size` bytes. Does not verify the hash of the rest."""
    if len(data) != STRATUM_FOOTER_SIZE:
        raise TruncatedStratum(f"a stratum footer has {STRATUM_FOOTER_SIZE} bytes, here are {len(data)}")
    index_offset, index_length, zero, count, length, digest, zero_too, checksum, magic = STRATUM_FOOTER.unpack(data)
    if magic != FOOTER_MAGIC:
        raise TruncatedStratum("a stratum does not end with its footer")
    if xxhash.xxh32_intdigest(data[:_FOOTER_CHECKSUM_AT]) != checksum:
        raise ChecksumMismatch("a stratum footer does not match its checksum")
    if zero or zero_too or length + STRATUM_FOOTER_SIZE != file_size:
        raise CorruptionError("a stratum has another length than its footer says")
    if index_offset < STRATUM_HEADER_SIZE or index_offset + index_length > length:
        raise CorruptionError("a stratum footer points outside its stratum")
    return StratumFooter(index_offset, index_length, count, length, digest)

"""The flat file: all files of a basin in one, for whoever only reads them.

    header │ basin.json │ keys/… │ data/…, meta/… │ log/… │ index/… │ checkpoint/… │ table │ end pointer

Invariants:

- The files lie one behind the other, without gaps, from the header to the table; so their sizes alone say where each
  of them is, and every byte belongs to one of them.
- The end pointer leads to the table and holds its hash; the table holds the name, size and hash of every file.
- Every size is compared with the bytes that there are before anything is allocated: the table, the only part of a size
  that the file itself chooses, has at most `FLAT_TABLE_SIZE_MAX` bytes.

Pure. It knows names and sizes, and nothing of what is in the files.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import xxhash
from blake3 import blake3

from basin.errors import (
    ChecksumMismatch,
    CorruptionError,
    InvalidArgument,
    NotABasin,
    TruncatedStratum,
    UnsupportedVersion,
)
from basin.format.layout import FORMAT_VERSION, MIB

FLAT_MAGIC: Final = b"\x89BSN-FLT"
FLAT_HEADER: Final = struct.Struct("<8sHHI")
FLAT_HEADER_SIZE: Final = 16
FLAT_ENTRY: Final = struct.Struct("<Q32sB")
"""Size, hash, and how long the name is that follows."""
FLAT_ENTRY_SIZE: Final = 41
FLAT_END: Final = struct.Struct("<QQ32sHHI8s")
FLAT_END_SIZE: Final = 64
FLAT_END_MAGIC: Final = b"BSN-FLT\x0a"
FLAT_TABLE_SIZE_MAX: Final = 16 * MIB
"""200,000 strata: a basin has about a thousand, because strata grow with it. Decoded, it takes ten times as much."""

_CHECKSUM_SIZE: Final = 4
_HEADER_CHECKSUM_AT: Final = FLAT_HEADER_SIZE - _CHECKSUM_SIZE
_END_CHECKSUM_AT: Final = FLAT_END_SIZE - len(FLAT_END_MAGIC) - _CHECKSUM_SIZE
_NAME: Final = re.compile(rb"[a-z0-9][a-z0-9.-]*(?:/[a-z0-9][a-z0-9.-]*)*")


class FlatFile(NamedTuple):
    """One file in a flat file: where its `size` bytes begin, and their BLAKE3."""

    name: str
    offset: int
    size: int
    hash: bytes


class FlatEnd(NamedTuple):
    """What the end pointer says of the table: where it begins, how long it is, and its BLAKE3."""

    table_offset: int
    table_size: int
    table_hash: bytes


def encode_flat_header() -> bytes:
    """The first 16 bytes."""
    packed = FLAT_HEADER.pack(FLAT_MAGIC, FORMAT_VERSION, 0, 0)[:_HEADER_CHECKSUM_AT]
    return packed + _checksum(packed)


def decode_flat_header(data: bytes) -> None:
    """Verify the first 16 bytes of a file, or fewer if it has no more.

    Raises `NotABasin` for what was never a flat file; else the kinds of `CorruptionError`, and `UnsupportedVersion`.
    """
    if data[: len(FLAT_MAGIC)] != FLAT_MAGIC[: len(data)]:
        raise NotABasin("the file does not start with the magic bytes of a flat basin")
    if len(data) < FLAT_HEADER_SIZE:
        raise TruncatedStratum("a flat file ends within its header: it was cut short", offset=len(data))
    _, version, zero, _ = FLAT_HEADER.unpack_from(data)
    if _checksum(data[:_HEADER_CHECKSUM_AT]) != data[_HEADER_CHECKSUM_AT:FLAT_HEADER_SIZE]:
        raise ChecksumMismatch("the header of a flat file does not match its checksum", offset=0)
    _require_version(version)
    if zero:
        raise CorruptionError("the header of a flat file holds impossible values", offset=0)


def encode_flat_table(files: Sequence[tuple[str, int, bytes]]) -> bytes:
    """The table of files (name, size, BLAKE3) in the order in which they lie. Raises `InvalidArgument` if too many."""
    pieces: list[bytes] = []
    for name, size, digest in files:
        pieces += (FLAT_ENTRY.pack(size, digest, len(name)), name.encode("ascii"))
    table = b"".join(pieces)
    if len(table) > FLAT_TABLE_SIZE_MAX:
        raise InvalidArgument(f"{len(files)} files are too many for one flat file: compact the basin first")
    return table


def decode_flat_table(table: bytes, end: FlatEnd) -> list[FlatFile]:
    """The files of a flat file. Raises the kinds of `CorruptionError` unless all of `table` is what `end` says.

    Memory: about ten times that of `table`.
    """
    if len(table) != end.table_size or blake3(table).digest() != end.table_hash:
        raise ChecksumMismatch("the table of a flat file does not have its hash", offset=end.table_offset)
    names: list[str] = []
    sizes: list[int] = []
    hashes: list[bytes] = []
    at = 0
    while at < len(table):
        if len(table) - at < FLAT_ENTRY_SIZE:
            raise CorruptionError("the table of a flat file ends within an entry", offset=end.table_offset + at)
        size, digest, name_size = FLAT_ENTRY.unpack_from(table, at)
        at += FLAT_ENTRY_SIZE
        name = table[at : at + name_size]
        if len(name) != name_size or not _NAME.fullmatch(name):
            raise CorruptionError("the table of a flat file holds an impossible name", offset=end.table_offset + at)
        at += name_size
        names.append(name.decode("ascii"))
        sizes.append(size)
        hashes.append(digest)
    offsets = list(accumulate(sizes, initial=FLAT_HEADER_SIZE))
    if offsets[-1] != end.table_offset or len(set(names)) != len(names):
        raise CorruptionError("the files of a flat file do not fill it", offset=end.table_offset)
    return [FlatFile(*one) for one in zip(names, offsets, sizes, hashes, strict=False)]


def encode_flat_end(end: FlatEnd) -> bytes:
    """The last 64 bytes."""
    packed = FLAT_END.pack(*end, FORMAT_VERSION, 0, 0, FLAT_END_MAGIC)[:_END_CHECKSUM_AT]
    return packed + _checksum(packed) + FLAT_END_MAGIC


def decode_flat_end(data: bytes, file_size: int) -> FlatEnd:
    """Read and verify the last 64 bytes of a flat file of `file_size` bytes.

    Raises `TruncatedStratum` where they are no end pointer, the other kinds of `CorruptionError`, and
    `UnsupportedVersion`. The table is no larger than the file, and than `FLAT_TABLE_SIZE_MAX`.
    """
    if len(data) != FLAT_END_SIZE or not data.endswith(FLAT_END_MAGIC):
        raise TruncatedStratum("a flat file does not end with its end pointer: it was cut short", offset=file_size)
    offset, size, digest, version, zero, _, _ = FLAT_END.unpack(data)
    start = file_size - FLAT_END_SIZE
    if _checksum(data[:_END_CHECKSUM_AT]) != data[_END_CHECKSUM_AT : _END_CHECKSUM_AT + _CHECKSUM_SIZE]:
        raise ChecksumMismatch("the end pointer of a flat file does not match its checksum", offset=start)
    _require_version(version)
    if zero or size > FLAT_TABLE_SIZE_MAX:
        raise CorruptionError("the end pointer of a flat file holds impossible values", offset=start)
    if offset < FLAT_HEADER_SIZE or offset + size != start:
        raise CorruptionError("a flat file has another length than its end pointer says", offset=start)
    return FlatEnd(offset, size, digest)


def _require_version(version: int) -> None:
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(f"flat file version {version} needs a newer Basin", version=version)


def _checksum(data: bytes) -> bytes:
    return xxhash.xxh32_intdigest(data).to_bytes(_CHECKSUM_SIZE, "little")

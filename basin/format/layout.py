"""Every magic number, size, code and cap of the on-disk format; mirrors `docs/format.md` table by table.

Invariants:

- Numbers written to disk are never reused; retired ones stay listed here.
- All integers are little-endian. One `Struct` and one named size for each fixed structure.
- A cap bounds what a decoder allocates before it has authenticated anything.

Pure: imported by all of `basin.format` and by the engine; imports only the standard library's `struct`.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

FORMAT_VERSION: Final = 1

MIB: Final = 1 << 20


class Kind(enum.IntEnum):
    """What a grain, or a stratum, holds. Codes with the top bit must be understood by whoever reads them."""

    BLOB = 1
    PART = 2
    CLAST = 3
    NAMES_BLOCK = 4
    NAMES_DIRECTORY = 5
    INDEX_PAGES = 6
    INDEX_DIRECTORY = 7
    NAMES_RANGES = 8


class StratumKind(enum.IntEnum):
    """Which folder a stratum lives in: `data/`, `meta/` or `index/`."""

    DATA = 1
    META = 2
    INDEX = 3


STRATUM_FOLDERS: Final = {StratumKind.DATA: "data", StratumKind.META: "meta", StratumKind.INDEX: "index"}

MUST_UNDERSTAND: Final = 0x80

CODEC_STORED: Final = 0
CODEC_ZSTD: Final = 1

FLAG_LINKS: Final = 1
GRAIN_FLAGS_KNOWN: Final = FLAG_LINKS

STRATUM_ACTIVE: Final = 1
STRATUM_FINISHED: Final = 2
STRATUM_CUT: Final = 3
"""How a record describes a stratum: still growing, with its footer, or of a dead session and valid up to its length."""

HASH_SIZE: Final = 32

PROFILE_OPEN: Final = 0
PROFILE_ENCRYPTED: Final = 1

# --- grain ----------------------------------------------------------------------------------------------------------

GRAIN_HEADER: Final = struct.Struct("<IIBBH32s")
GRAIN_HEADER_SIZE: Final = 44
GRAIN_BODY: Final = struct.Struct("<IBBH32s")
"""The header without its checksum: what the checksum and the associated data cover."""
GRAIN_BODY_SIZE: Final = 40
GRAIN_LENGTH_MIN: Final = GRAIN_BODY_SIZE
GRAIN_LENGTH_MAX: Final = 128 * MIB
"""Cap of the length field. Parts are at most 64 MiB (`Options.part_max`); the rest is room for long link lists."""
GRAIN_SIZE_MAX: Final = GRAIN_LENGTH_MAX + 4
CONTENT_SIZE_MAX: Final = 128 * MIB
"""Cap of one grain's decompressed payload."""

# --- stratum --------------------------------------------------------------------------------------------------------

STRATUM_MAGIC: Final = b"\x89BSN-STR"
STRATUM_HEADER: Final = struct.Struct("<8sHBBI16s16sQ32s32sII")
STRATUM_HEADER_SIZE: Final = 128
KEY_MATERIAL_SIZE: Final = 32
FOOTER_MAGIC: Final = b"BSN-END\x0a"
STRATUM_FOOTER: Final = struct.Struct("<QIIQQ32sII8s")
STRATUM_FOOTER_SIZE: Final = 80
STRATUM_GRAINS_MAX: Final = 1 << 17

# --- grain index ----------------------------------------------------------------------------------------------------

INDEX_ENTRY: Final = struct.Struct("<32sIIHBB")
INDEX_ENTRY_SIZE: Final = 44
ENTRY_PLACE: Final = struct.Struct("<IIHH")
"""An index entry behind its key: offset, length, stratum, kind and flags."""
PAGE_ENTRIES: Final = 93
"""93 entries of 44 bytes are 4,092: the most that fit a 4 KiB page."""
PAGE_SIZE: Final = PAGE_ENTRIES * INDEX_ENTRY_SIZE
PAGES_PER_GRAIN: Final = 1024
"""Index pages travel in grains of at most 4 MiB, so that an index of any size is written in one pass."""
PAGE_TAG_SIZE: Final = 16
INDEX_DIRECTORY: Final = struct.Struct("<QQIII")
INDEX_DIRECTORY_SIZE: Final = 28
INDEX_ENTRIES_MAX: Final = 1 << 27
INDEX_STRATA_MAX: Final = 1 << 16
FILTER_GRAINS_PER_WORD: Final = 8

# --- names ----------------------------------------------------------------------------------------------------------

KEYSPACE_PREFIX_SIZE: Final = 4
NAME_SIZE_MAX: Final = 65_535
FULL_NAME_SIZE_MAX: Final = NAME_SIZE_MAX + KEYSPACE_PREFIX_SIZE
NAMES_BLOCK_HEADER: Final = struct.Struct("<IIIIQ")
NAMES_BLOCK_HEADER_SIZE: Final = 24
NAMES_BLOCK_SIZE: Final = 16 << 10
BLOCK_HAS_KINDS: Final = 1
BLOCK_HAS_VERSIONS: Final = 2
BLOCK_HAS_EXPIRIES: Final = 4
BLOCK_FLAGS_KNOWN: Final = 7

ENTRY_DELETE: Final = 0
ENTRY_INLINE: Final = 1
ENTRY_REFERENCE: Final = 2

VERSION_BATCH_BITS: Final = 16
"""A version is (log position << 16 | number of the batch in its record): versions order all changes."""
BATCHES_PER_RECORD_MAX: Final = (1 << VERSION_BATCH_BITS) - 1

# --- log ------------------------------------------------------------------------------------------------------------

RECORD_MAGIC: Final = b"BREC"
CHECKPOINT_MAGIC: Final = b"BCKP"
STUB_MAGIC: Final = b"BSTB"
"""Stands where a record of a bucket's log was, after its body was folded into a checkpoint."""
HINT_MAGIC: Final = b"\x89BSN-HNT"
HINT_SIZE_MAX: Final = MIB
FRAME_HEADER: Final = struct.Struct("<II4sIQII32s")
FRAME_HEADER_SIZE: Final = 64
FRAME_SIZE_MAX: Final = 256 * MIB
FRAME_FLAG_UNSYNCED: Final = 1
FRAME_FLAG_COMPRESSED: Final = 2
FRAME_FLAGS_KNOWN: Final = 3

SEGMENT_MAGIC: Final = b"\x89BSN-LOG"
SEGMENT_HEADER: Final = struct.Struct("<8sHHI16sQQ32sQ36sI")
SEGMENT_HEADER_SIZE: Final = 128

WATERMARK_MAGIC: Final = b"BWMK"
WATERMARK: Final = struct.Struct("<4sHH16sQQQ16s")
WATERMARK_SIZE: Final = 64
WATERMARK_FLAG_UNSYNCED: Final = 1
WATERMARK_FLAG_CUT: Final = 2

RULES_VERSION: Final = 1

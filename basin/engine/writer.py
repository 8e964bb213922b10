"""`StratumWriter`: appends grains to one new stratum, and finishes it with its index and footer.

Invariants:

- A stratum is written once, front to back, by one writer. After any failed write or sync it is abandoned: an offset is
  never written twice, because the offset is the nonce.
- What `append` returned can be read once `flush` has run, and is durable once `sync` has; the folder is synced with the
  first `sync`.
- The index in memory holds every grain of the stratum, so that finishing reads nothing back: in a dict where grains are
  looked for while the stratum grows, else (`forgo_search`) as the rows that it will be written as.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
import xxhash
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from basin.engine.keyring import Keyring
from basin.errors import StorageError, StorageUnavailable
from basin.format.crypto import TAG_SIZE, StratumKeys
from basin.format.grain import CHECKSUM, associated_data, encode_body
from basin.format.index import ENTRY, Entries, IndexBuilder, IndexDirectory, directory_size, pages_size, sort_entries
from basin.format.layout import (
    CODEC_STORED,
    FORMAT_VERSION,
    GRAIN_HEADER_SIZE,
    INDEX_ENTRY,
    MIB,
    PAGE_ENTRIES,
    PAGES_PER_GRAIN,
    PROFILE_ENCRYPTED,
    PROFILE_OPEN,
    STRATUM_FOLDERS,
    STRATUM_FOOTER_SIZE,
    STRATUM_GRAINS_MAX,
    Kind,
    StratumKind,
)
from basin.format.record import StratumAdded
from basin.format.stratum import StratumFooter, StratumHeader, encode_footer, encode_header
from basin.storage.protocol import AppendFile, Storage
from basin.terms import Location, StratumId

_BUFFER_SIZE: Final = MIB
"""Bytes gathered before a write: large enough that a system call costs nothing a grain, small enough to stay cached."""
_JOINED_SIZE_MAX: Final = 64 << 10
_SPARE_FROM: Final = 16 * MIB
"""From this size on a stratum ends a part of 1 MiB early: one of 64 MiB is then one request to a bucket, not seven."""
_OFFSET_BITS: Final = 32
_LENGTH_MASK: Final = (1 << _OFFSET_BITS) - 1
_PREFIX: Final = struct.Struct("<H16s")
_PLACED_BODY: Final = struct.Struct("<QIBBH32s")
_NONCE_TAIL: Final = bytes(4)
_KEY_AT: Final = 12


def stratum_name(kind: int, identity: StratumId) -> str:
    """Path of a stratum: its folder says its kind."""
    return f"{STRATUM_FOLDERS[StratumKind(kind)]}/{identity.hex()}"


class StratumWriter:
    """One active stratum. Not safe for threads: its owner holds a lock."""

    def __init__(
        self,
        storage: Storage,
        keyring: Keyring,
        kind: StratumKind,
        *,
        session: int,
        identity: StratumId,
        key_material: bytes,
        size_target: int = 64 * MIB,
    ) -> None:
        """Create the file and its header. `identity` and the 32 random bytes `key_material` were never used before.

        `size_target`: from this size on the stratum is full.
        """
        self.kind = kind
        self.size_target = size_target
        self.id = identity
        self.session = session
        self.generation = keyring.generation
        self.name = stratum_name(kind, identity)
        keys = keyring.stratum_keys(self.generation, key_material, identity, kind)
        self._keys: StratumKeys = keys
        self._key_material = key_material
        self._aead = AESGCM(keys.cipher_key) if keys.cipher_key else None
        self._storage = storage
        self._file: AppendFile = storage.create(self.name)
        self._hasher = blake3()
        self._parts: list[bytes | memoryview] = []
        self._parts_size = 0
        self._flushed = 0
        self._folder_synced = False
        self._is_complete = False
        self.failed = False
        self._half_appended = False
        self.synced_offset = 0
        self.synced_count = 0
        self.offset = 0
        self.locations: dict[bytes, int] = {}
        """Grain key to `offset << 32 | length` of its newest grain here; empty after `forgo_search`."""
        self._kinds: dict[int, tuple[int, int]] = {}
        self._doubles: list[tuple[bytes, int]] = []
        self._rows: bytearray | None = None
        self._row_count = 0
        profile = PROFILE_OPEN if self._aead is None else PROFILE_ENCRYPTED
        header = StratumHeader(
            kind, profile, self.generation, keyring.basin_id, identity, session, key_material, keys.commitment
        )
        self._write(encode_header(header))

    def forgo_search(self) -> None:
        """Nobody looks for a grain here before the stratum is finished. Call it before the first append.

        The index in memory then takes 44 bytes a grain and not 220, which is 23 MiB of a full stratum.
        """
        self._rows = bytearray()

    def places(self, key: bytes) -> list[int]:
        """Every grain of `key` here, the newest first, as in `locations`. O(1) unless some key has several."""
        newest = self.locations.get(key)
        if newest is None:
            return []
        return [newest, *(place for double, place in reversed(self._doubles) if double == key)]

    @property
    def grain_count(self) -> int:
        """Grains appended so far, index grains not counted."""
        return self._row_count if self._rows is not None else len(self.locations) + len(self._doubles)

    @property
    def is_full(self) -> bool:
        """Whether the stratum should be finished."""
        return self.room <= 0 or self.grain_count >= STRATUM_GRAINS_MAX

    @property
    def room(self) -> int:
        """Bytes of grains until it is full: the index that will follow them is part of its size, and so is a part."""
        index_size = pages_size(self.grain_count) + directory_size(self.grain_count) + STRATUM_FOOTER_SIZE
        return self.size_target - self.offset - index_size - (MIB if self.size_target >= _SPARE_FROM else 0)

    def append(self, kind: int, key: bytes, codec: int, flags: int, data: bytes) -> Location:
        """Seal and append one grain; `data` is its compressed payload. Cost: one AES-GCM, one XXH32."""
        location = self._append_sealed(kind, key, codec, flags, data)
        _, offset, length = location
        if self._rows is not None:
            self._rows += INDEX_ENTRY.pack(key, offset, length, 0, kind, flags)
            self._row_count += 1
        else:
            if kind != Kind.BLOB or flags:
                self._kinds[offset] = (kind, flags)
            before = self.locations.get(key)
            if before is not None:
                self._doubles.append((key, before))
            self.locations[key] = offset << _OFFSET_BITS | length
        self._half_appended = False
        return location

    def append_directory(self, payload: bytes) -> Location:
        """Append the directory of an index, which is no entry of it."""
        location = self._append_sealed(Kind.INDEX_DIRECTORY, blake3(payload).digest(), CODEC_STORED, 0, payload)
        self._half_appended = False
        return location

    def _append_sealed(self, kind: int, key: bytes, codec: int, flags: int, data: bytes) -> Location:
        """Append one grain that the index does not know of yet: until it does, the append is half done."""
        self._require_whole()
        offset = self.offset
        aead = self._aead
        body = encode_body(kind, codec, flags, key, len(data) + (TAG_SIZE if aead is not None else 0))
        if aead is not None:
            nonce = offset.to_bytes(8, "little") + _NONCE_TAIL
            data = aead.encrypt(nonce, data, associated_data(self.id, offset, body))
        self._half_appended = True
        self._write_grain(body, data)
        return Location(self.id, offset, len(body) + len(data) + CHECKSUM.size)

    def append_blobs(self, keys: Sequence[bytes], codecs: Sequence[int], payloads: Sequence[bytes]) -> None:
        """Append many BLOB grains with keys that are new to this stratum.

        The same as `append` in a loop, but flat: a 100-byte grain costs 3.5 µs here and 6 µs there, and this is the
        path that a bulk load spends its time in.
        """
        self._require_whole()
        self._half_appended = True
        aead = self._aead
        encrypt = aead.encrypt if aead is not None else None
        overhead = GRAIN_HEADER_SIZE - 4 + (TAG_SIZE if aead is not None else 0)
        prefix = _PREFIX.pack(FORMAT_VERSION, self.id)
        pack, digest = _PLACED_BODY.pack, xxhash.xxh32_intdigest
        locations, parts, kind = self.locations, self._parts, int(Kind.BLOB)
        rows, pack_row = self._rows, INDEX_ENTRY.pack
        offset, size_before = self.offset, self.offset
        for key, codec, data in zip(keys, codecs, payloads, strict=True):
            length = overhead + len(data)
            placed = pack(offset, length, kind, codec, 0, key)
            if encrypt is not None:
                data = encrypt(placed[:8] + _NONCE_TAIL, data, prefix + placed)
            grain = placed[8:] + data
            parts.append(digest(grain).to_bytes(4, "little"))
            parts.append(grain)
            length += 4
            if rows is None:
                locations[key] = offset << 32 | length
            else:
                rows += pack_row(key, offset, length, 0, kind, 0)
            offset += length
        self.offset = offset
        self._parts_size += offset - size_before
        self._row_count += len(keys)
        self._half_appended = False
        if self._parts_size >= _BUFFER_SIZE:
            self.flush()

    def append_stored(self, grains: Sequence[bytes]) -> None:
        """Append intact BLOB grains without flags as they are stored in another stratum of an open basin.

        Only after `forgo_search`. Cost: 0.3 µs a grain.
        """
        self._require_whole()
        rows = self._rows
        if rows is None or self._aead is not None:
            raise StorageError(f"{self.name} takes no grains as they are stored", object=self.name, operation="append")
        self._half_appended = True
        pack_row, offset, kind = INDEX_ENTRY.pack, self.offset, int(Kind.BLOB)
        for grain in grains:
            length = len(grain)
            rows += pack_row(grain[_KEY_AT:GRAIN_HEADER_SIZE], offset, length, 0, kind, 0)
            offset += length
        self._parts += grains
        self._parts_size += offset - self.offset
        self.offset = offset
        self._row_count += len(grains)
        self._half_appended = False
        if self._parts_size >= _BUFFER_SIZE:
            self.flush()

    def _write_grain(self, body: bytes, data: bytes | memoryview) -> None:
        """Checksum, body and data; not joined where the data is large: an index directory can have 100 MiB."""
        if len(data) < _JOINED_SIZE_MAX:
            grain = b"".join((body, data))
            self._write(CHECKSUM.pack(xxhash.xxh32_intdigest(grain)) + grain)
            return
        checksum = xxhash.xxh32(body)
        checksum.update(data)
        self._write(CHECKSUM.pack(checksum.intdigest()), body, data)

    def _write(self, *pieces: bytes | memoryview) -> None:
        size = sum(map(len, pieces))
        self._parts += pieces
        self._parts_size += size
        self.offset += size
        if self._parts_size >= _BUFFER_SIZE:
            self.flush()

    def _require_whole(self) -> None:
        """After an interrupt in the middle of an append nothing follows: offset and index may not know of its bytes."""
        if self._half_appended:
            raise StorageError(
                f"{self.name} was abandoned: an append to it was interrupted", object=self.name, operation="append"
            )

    def flush(self) -> None:
        """Hand everything appended to the operating system, so that readers can see it."""
        if self.failed:
            raise StorageError(f"{self.name} was abandoned after a failed write", object=self.name, operation="append")
        if not self._parts:
            return
        self.failed = True  # Until the write has returned: an interrupt in the middle leaves the file half written.
        last = self._parts[-1]
        if len(last) < _BUFFER_SIZE:
            self._hand_over(b"".join(self._parts))
        else:  # A buffer ends with whatever filled it, so that what is large is never copied.
            self._hand_over(b"".join(self._parts[:-1]))
            self._hand_over(last)
        self.failed = False
        self._flushed += self._parts_size
        self._parts.clear()
        self._parts_size = 0

    def _hand_over(self, data: bytes | memoryview) -> None:
        self._file.append(data)
        self._hasher.update(data)

    @property
    def flushed_offset(self) -> int:
        """Grains before this offset can be read from the file."""
        return self._flushed

    def is_sent(self) -> bool:
        """Whether `sync` of the completed stratum would return at once."""
        return self._file.is_sent()

    def sync(self) -> None:
        """Make everything appended durable, with the directory entry."""
        self._require_whole()
        if self.synced_offset == self.offset and not self.failed:
            return
        self.flush()
        self.failed = True
        try:
            self._file.sync()
        except StorageUnavailable:
            # The spooled file is whole, and can be sent again; but no sync of a disk is repeated after it failed.
            self.failed = self._storage.objects is None
            raise
        if not self._folder_synced:
            self._storage.sync_folder(STRATUM_FOLDERS[self.kind])
            self._folder_synced = True
        self.failed = False
        self.synced_offset = self.offset
        self.synced_count = self.grain_count

    def describe(self, status: int) -> StratumAdded:
        """The stratum as a record adds or extends it, up to its durable length; of a complete one, all of it.

        `hash` is of everything that was flushed, which is that.
        """
        return StratumAdded(
            self.id,
            self.kind,
            status,
            self.offset if self._is_complete else self.synced_offset,
            self.grain_count if self._is_complete else self.synced_count,
            self._hasher.digest(),
            self.generation,
            self.session,
            self._key_material,
        )

    def read_back(self, offset: int, length: int) -> bytes | None:
        """A grain's bytes while they are still buffered, else None (read the file)."""
        if offset < self._flushed:
            return None
        return b"".join(self._parts)[offset - self._flushed : offset - self._flushed + length]

    def entries(self) -> Entries:
        """All grains as sorted index entries of stratum number 0."""
        if self._rows is not None:
            return sort_entries(np.frombuffer(self._rows, dtype=ENTRY))
        count = self.grain_count
        keys = b"".join(self.locations) + b"".join([key for key, _ in self._doubles])
        places = np.fromiter(
            (*self.locations.values(), *(place for _, place in self._doubles)), dtype=np.uint64, count=count
        )
        entries = np.zeros(count, dtype=ENTRY)
        joined = np.frombuffer(keys, dtype=np.dtype([("prefix", ">u8"), ("rest", "V24")]))
        entries["prefix"], entries["rest"] = joined["prefix"], joined["rest"]
        del keys, joined  # 4 MiB for a full stratum, while the sort needs another copy.
        entries["offset"] = places >> np.uint64(_OFFSET_BITS)
        entries["length"] = places & np.uint64(_LENGTH_MASK)
        entries["kind"] = int(Kind.BLOB)
        if self._kinds:
            for row, place in enumerate(places.tolist()):
                special = self._kinds.get(place >> _OFFSET_BITS)
                if special is not None:
                    entries["kind"][row], entries["flags"][row] = special
        return sort_entries(entries)

    def _sorted_parts(self) -> Iterator[Entries]:
        """`entries`, in parts that are grains of pages: of rows no second copy is made."""
        if self._rows is None:
            yield self.entries()
            return
        rows = np.frombuffer(self._rows, dtype=ENTRY)
        order = np.argsort(rows["prefix"], kind="stable")
        for start in range(0, len(rows), PAGE_ENTRIES * PAGES_PER_GRAIN):
            yield rows[order[start : start + PAGE_ENTRIES * PAGES_PER_GRAIN]]

    def finish(self) -> IndexDirectory:
        """Write index and footer, sync, and close. Returns the index as a reader would decode it."""
        directory = self.complete()
        self.sync()
        self.close()
        return directory

    def complete(self) -> IndexDirectory:
        """Write index and footer, which ends the stratum; `sync` and `close` are still due.

        Where files are sent elsewhere, that begins, and goes on while others are written. Returns the index as a reader
        would decode it.
        """
        count = self.grain_count
        builder = IndexBuilder([self.id], count, self._keys.tag_key, self.id)
        payload, location = append_index(self, builder, self._sorted_parts())
        self._complete_with(location)
        return IndexDirectory(payload, self._keys.tag_key, self.id)

    def finish_with(self, directory: Location) -> None:
        """Write a footer that points to an index directory appended before; sync, and close."""
        self._complete_with(directory)
        self.sync()
        self.close()

    def _complete_with(self, directory: Location) -> None:
        self.flush()
        footer = StratumFooter(directory.offset, directory.length, self.grain_count, self.offset, self._hasher.digest())
        self._write(encode_footer(footer))
        self.flush()
        self._is_complete = True
        self._file.finish()

    def append_unsealed(self, kind: int, data: bytes | memoryview) -> int:
        """Append one grain in the clear (index pages, whose tags protect them); returns its offset."""
        offset = self.offset
        self._write_grain(encode_body(kind, CODEC_STORED, 0, bytes(32), len(data)), data)
        return offset

    @property
    def tag_key(self) -> bytes:
        """The key of the page tags of an index in this stratum."""
        return self._keys.tag_key

    def close(self) -> None:
        """Release the file. What was not synced counts for nothing."""
        self._file.close()

    def abandon(self, *, logged: bool = False) -> None:
        """Give the stratum up. Unless a record names it (`logged`), a file whose write or sync failed is deleted.

        After a failed sync it may look whole to whoever takes over this session, and be gone after a power cut: Linux
        marks the pages clean, and no later sync writes them. An intact one stays, to be adopted or swept.
        """
        lost, self.failed = self.failed, True
        with contextlib.suppress(StorageError):
            self.close()
            if lost and not logged:
                self._storage.delete(self.name)


def append_index(writer: StratumWriter, builder: IndexBuilder, batches: Iterable[Entries]) -> tuple[bytes, Location]:
    """Append an index's pages and directory to `writer`; returns the directory's payload and place."""
    first_offset = writer.offset
    for entries in batches:
        for pages in builder.feed(entries):
            writer.append_unsealed(Kind.INDEX_PAGES, pages)
    for pages in builder.finish(first_offset):
        writer.append_unsealed(Kind.INDEX_PAGES, pages)
    payload = builder.directory()
    return payload, writer.append_directory(payload)

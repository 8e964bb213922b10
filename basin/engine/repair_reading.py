"""`DamagedStratum`: what can still be read of a stratum some of whose bytes are not what was written.

Invariants:

- A grain is given back only if it proves to be what was written: by its checksum and seal, by its seal alone, or, in an
  open basin, by the hash of its content. Nothing is guessed that is not proved afterwards.
- A header that is lost is made again from what the log says of the stratum; it is the same, byte by byte.
- Whatever may be passing (a bucket that does not answer, an archived object, a key that this secret has not) raises:
  it is no loss.

A stratum is held in memory as a whole, as `check` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from blake3 import blake3

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.reader import StratumReader
from basin.engine.rewrite import grains_end
from basin.engine.state import ACTIVE, CUT
from basin.engine.writer import stratum_name
from basin.errors import BasinError, CorruptionError, ObjectMissing, TruncatedStratum, UnsupportedVersion
from basin.format.clast import decode_clast
from basin.format.grain import CHECKSUM, decode_header, encode_body, encode_grain
from basin.format.index import IndexEntry
from basin.format.layout import (
    CODEC_STORED,
    CODEC_ZSTD,
    FLAG_LINKS,
    GRAIN_HEADER_SIZE,
    PROFILE_ENCRYPTED,
    PROFILE_OPEN,
    STRATUM_FOLDERS,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.payload import Payload
from basin.format.record import StratumAdded
from basin.format.scan import Damage, GrainFound, scan_grains
from basin.format.stratum import StratumHeader, encode_header
from basin.format.stratum import decode_header as decode_stratum_header
from basin.storage.protocol import ReadFile
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

INDEX_KINDS: Final = frozenset({Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY})
HASHED_KINDS: Final = frozenset({Kind.BLOB, Kind.PART})
"""Kinds whose grain key is the image of the hash of the content in them, whatever stands around that."""


class HeldFile(ReadFile):
    """A whole file in memory."""

    def __init__(self, name: str, body: bytes) -> None:
        self.name = name
        self._body = body

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._body):
            raise TruncatedStratum(f"{self.name} ends at byte {len(self._body)}", object=self.name, offset=offset)
        return self._body[offset : offset + size]

    def size(self) -> int:
        return len(self._body)

    def close(self) -> None:
        """Nothing is held open."""


class ReadableGrain(NamedTuple):
    """A grain that is what was written. `data` is its compressed payload, as a writer seals it; `payload`, opened."""

    offset: int
    length: int
    kind: int
    codec: int
    flags: int
    key: bytes
    data: bytes
    payload: Payload


class DamagedStratum:
    """Reads all of one stratum; `grains` gives what is readable, and `lost` is complete afterwards."""

    def __init__(self, core: Core, added: StratumAdded) -> None:
        """Raises what is passing: see the module. A file that is gone for good has no grains."""
        self.added = added
        self.lost: dict[bytes, None] = {}
        """Grain keys of what the indexes list and nobody can read, in order; what no index lists has no key."""
        self.lost_stretches = 0
        """Stretches of bytes of which nothing could be read."""
        self._core = core
        self._content_key = core.keyring.grain_keys.content_key
        self._is_sealed = core.keyring.profile == "encrypted"
        self._reader, self._data = _opened(core, added)
        self._entries: dict[int, IndexEntry] | None = None

    @property
    def is_missing(self) -> bool:
        """Whether there is no file, or none of which anything can be read."""
        return self._reader is None

    def grains(self) -> Iterator[ReadableGrain]:
        """Every readable grain but those of the index, in their order."""
        self.lost.clear()
        self.lost_stretches = 0
        if self._reader is None:
            self.lost.update(dict.fromkeys(entry.key for entry in self._listed().values()))
            self.lost_stretches = 1
            return
        stop = min(len(self._data), grains_end(self.added))
        for found in scan_grains(self._data, STRATUM_HEADER_SIZE, stop):
            grain = self._whole(found) if isinstance(found, GrainFound) else None
            if grain is not None:
                yield grain
            elif not (isinstance(found, GrainFound) and found.header.kind in INDEX_KINDS):
                yield from self._salvaged(found)
        if stop < grains_end(self.added):
            self._lose(stop, grains_end(self.added))

    def _whole(self, found: GrainFound) -> ReadableGrain | None:
        """The grain that was found by its checksum, if all of it holds; None for one of the index, too."""
        grain = bytes(self._data[found.offset : found.offset + found.header.stored_size])
        return self._proved(grain, found.offset, is_intact=True)

    def _proved(self, grain: bytes, offset: int, *, is_intact: bool) -> ReadableGrain | None:
        """The grain if it is what was written. `is_intact`: its own checksum says so, and not one made here."""
        assert self._reader is not None
        header = decode_header(grain)
        if header.kind in INDEX_KINDS:
            return None  # What comes of this has an index of its own.
        try:
            kind, payload = self._reader.decode_grain(grain, offset, header.key)
            if kind == Kind.CLAST:
                decode_clast(payload)
            elif kind in HASHED_KINDS and blake3(payload.content).digest() != self._content_key(header.key):
                return None
            data = self._reader.unseal(grain, offset)
        except UnsupportedVersion:
            raise
        except BasinError:
            return None
        says_itself = kind in HASHED_KINDS and not header.flags & FLAG_LINKS
        if not (is_intact or self._is_sealed or says_itself):
            return None
        return ReadableGrain(offset, len(grain), kind, header.codec, header.flags, header.key, data, payload)

    def _salvaged(self, found: GrainFound | Damage) -> Iterator[ReadableGrain]:
        """What can be proved of a damaged stretch: grains whose checksum or header is damaged, and not their data."""
        end = found.offset + found.header.stored_size if isinstance(found, GrainFound) else found.end
        entries = self._listed_in(found.offset, end)
        saved = [grain for entry in entries if (grain := self._restored(entry)) is not None]
        if not entries:
            with contextlib.suppress(CorruptionError):
                header = decode_header(self._data, found.offset)
                guessed = IndexEntry(header.key, found.offset, header.stored_size, 0, header.kind, header.flags)
                saved += [grain] if (grain := self._restored(guessed)) is not None else []
        yield from saved
        if len(saved) < max(1, len(entries)):
            self._lose(found.offset, end, but={grain.offset for grain in saved})

    def _lose(self, start: int, end: int, but: frozenset[int] | set[int] = frozenset()) -> None:
        self.lost_stretches += 1
        self.lost.update(dict.fromkeys(entry.key for entry in self._listed_in(start, end) if entry.offset not in but))

    def _restored(self, entry: IndexEntry) -> ReadableGrain | None:
        """The grain that an index lists, under its own header or one made from the entry, with a checksum made here."""
        stored = bytes(self._data[entry.offset : entry.offset + entry.length])
        if len(stored) != entry.length or entry.length < GRAIN_HEADER_SIZE:
            return None
        data = stored[GRAIN_HEADER_SIZE:]
        bodies = [stored[CHECKSUM.size : GRAIN_HEADER_SIZE]]
        codecs = (CODEC_STORED, CODEC_ZSTD)
        bodies += [encode_body(entry.kind, codec, entry.flags, entry.key, len(data)) for codec in codecs]
        for body in bodies:
            grain = encode_grain(body, data)
            with contextlib.suppress(CorruptionError, UnsupportedVersion):
                if decode_header(grain).stored_size == entry.length and decode_header(grain).key == entry.key:
                    proved = self._proved(grain, entry.offset, is_intact=False)
                    if proved is not None:
                        return proved
        return None

    # --- what indexes say ---------------------------------------------------------------------------------------------

    def _listed_in(self, start: int, end: int) -> list[IndexEntry]:
        return [entry for offset, entry in sorted(self._listed().items()) if start <= offset < end]

    def _listed(self) -> dict[int, IndexEntry]:
        """Entries by offset: of the stratum's own index, and of merged ones, as far as their pages can be read."""
        if self._entries is None:
            self._entries = {entry.offset: entry for entry in _merged_entries(self._core, self.added.id)}
            for entry in self._own_entries():
                self._entries[entry.offset] = entry
        return self._entries

    def _own_entries(self) -> Iterator[IndexEntry]:
        if self._reader is None or self.added.status in (ACTIVE, CUT):
            return
        for offset, length in self._directory_places():
            with contextlib.suppress(CorruptionError, IndexError):
                index = IndexReader(self._reader, self._reader.directory_at(offset, length), Cache(0))
                yield from (entry for entry, _ in readable_rows(index))
                return

    def _directory_places(self) -> Iterator[tuple[int, int]]:
        """Where the directory of the own index may lie: by the footer, and by looking for it."""
        assert self._reader is not None
        with contextlib.suppress(CorruptionError):
            footer = self._reader.footer()
            yield footer.index_offset, footer.index_length
        stop = min(len(self._data), grains_end(self.added))
        for found in scan_grains(self._data, STRATUM_HEADER_SIZE, stop):
            if isinstance(found, GrainFound) and found.header.kind == Kind.INDEX_DIRECTORY:
                yield found.offset, found.header.stored_size


def readable_rows(index: IndexReader) -> Iterator[tuple[IndexEntry, StratumId]]:
    """The entries of an index whose pages verify, and the stratum of each."""
    strata = index.directory.strata
    for number in range(index.directory.page_count):
        with contextlib.suppress(CorruptionError):
            for entry in index.rows(number):
                yield entry, strata[entry.stratum]


def _merged_entries(core: Core, identity: StratumId) -> Iterator[IndexEntry]:
    """What merged indexes say of a stratum, as far as they can be read."""
    for run in core.state.index_runs:
        if identity not in run.strata:
            continue
        with contextlib.suppress(CorruptionError, ObjectMissing, IndexError):
            reader = core.readers.get(StratumKind.INDEX, run.id)
            index = IndexReader(reader, reader.directory(), Cache(0))
            yield from (entry for entry, stratum in readable_rows(index) if stratum == identity)


# --- opening ----------------------------------------------------------------------------------------------------------


def _opened(core: Core, added: StratumAdded) -> tuple[StratumReader | None, memoryview]:
    """A reader of the stratum and its bytes, from wherever they lie; None if they lie nowhere."""
    name = stratum_name(added.kind, added.id)
    for body in _bodies(core, added, name):
        try:
            file = HeldFile(name, body)
            return StratumReader(core.storage, core.keyring, added.kind, added.id, file=file), memoryview(body)
        except CorruptionError as error:
            if error.fields.get("object") != name:
                raise  # The file of a key, say: with another secret, or mended, this stratum can be read.
    return None, memoryview(b"")


def _bodies(core: Core, added: StratumAdded, name: str) -> Iterator[bytes]:
    """The bytes that may be the stratum's: its file, that under a header made again, or another file."""
    body = b""
    with contextlib.suppress(ObjectMissing):
        body = core.storage.read_file(name, added.length)
        yield body
    if len(body) > STRATUM_HEADER_SIZE and not _is_whole_header(body):
        if added.key_material or core.keyring.profile == "open":
            yield _header_again(core, added) + body[STRATUM_HEADER_SIZE:]
        return
    with contextlib.suppress(ObjectMissing):
        misplaced = _misplaced(core, added)
        if misplaced:
            yield core.storage.read_file(misplaced, added.length)


def _is_whole_header(body: bytes) -> bool:
    """Whether a file begins with the header of a stratum, if of another one."""
    with contextlib.suppress(CorruptionError):
        decode_stratum_header(body)
        return True
    return False


def _header_again(core: Core, added: StratumAdded) -> bytes:
    keyring = core.keyring
    keys = keyring.stratum_keys(added.generation, added.key_material, added.id, added.kind)
    profile = PROFILE_ENCRYPTED if keyring.profile == "encrypted" else PROFILE_OPEN
    material = added.key_material or bytes(32)
    return encode_header(
        StratumHeader(
            StratumKind(added.kind),
            profile,
            added.generation,
            keyring.basin_id,
            added.id,
            added.session,
            material,
            keys.commitment,
        )
    )


def _misplaced(core: Core, added: StratumAdded) -> str:
    """The file that holds the stratum under another's name; empty if none does. One small read for each file."""
    folder = STRATUM_FOLDERS[StratumKind(added.kind)]
    for other in core.storage.list(folder):
        if other != added.id.hex():
            with contextlib.suppress(CorruptionError, ObjectMissing, UnsupportedVersion):
                header = decode_stratum_header(core.storage.read_file(f"{folder}/{other}", STRATUM_HEADER_SIZE))
                if header.stratum_id == added.id and header.basin_id == core.keyring.basin_id:
                    return f"{folder}/{other}"
    return ""

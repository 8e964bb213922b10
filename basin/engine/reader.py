"""`StratumReader`: reads single grains of one stratum; `StratumReaders` keeps the open ones.

Invariants: nothing is returned that did not pass its checksum, its header's key and, where encrypted, its seal; errors
name the file and the offset. Safe for threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Final, NamedTuple, TypeVar

import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from basin.engine.cache import Cache
from basin.engine.keyring import Keyring
from basin.engine.state import FINISHED, Stratum
from basin.engine.writer import stratum_name
from basin.errors import (
    AuthenticationFailed,
    BasinError,
    ChecksumMismatch,
    CorruptionError,
    GrainNotReady,
    ObjectMissing,
    TruncatedStratum,
    UnsupportedVersion,
)
from basin.format.crypto import TAG_SIZE
from basin.format.grain import associated_data, verify_grain
from basin.format.index import IndexDirectory, directory_size, pages_size
from basin.format.layout import (
    CODEC_STORED,
    CODEC_ZSTD,
    GRAIN_BODY,
    GRAIN_HEADER_SIZE,
    PROFILE_ENCRYPTED,
    PROFILE_OPEN,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.payload import Payload, decode_payload, decompress
from basin.format.record import StratumAdded
from basin.format.stratum import StratumFooter, StratumHeader, decode_footer, decode_header
from basin.storage.objects import ByteRange
from basin.storage.protocol import Extent, ReadFile, Storage
from basin.terms import Location, StratumId

UNREADABLE: Final = (CorruptionError, ObjectMissing, UnsupportedVersion, GrainNotReady)
"""Why a stratum that the log lists cannot be read. Others still can: whoever catches these calls nothing absent."""

CHANGED_IN_MEMORY: Final = (InvalidTag, zstandard.ZstdError)
"""What opening a grain again raises if its bytes are not those that were opened before."""

_PAGES_SHARE: Final = 4
"""One part in four is for pages of indexes. A load of new contents touches all of them, by the 4 % that pass a filter
in vain, and reading one again costs little: they must not drive out what costs a decryption."""
T = TypeVar("T")
_KEY_AT: Final = 12
_NONCE_TAIL: Final = bytes(4)
_PLAIN_BLOBS: Final = {
    GRAIN_BODY.pack(0, kind, codec, 0, b"")[4:8]: codec
    for kind in (Kind.BLOB, Kind.PART)
    for codec in (CODEC_STORED, CODEC_ZSTD)
}
"""Header bytes 8..12 (kind, codec, flags) of the grains that `read_content` serves, and their codec."""
_CACHED_SIZE_MAX: Final = 256 << 10
"""Reading a larger grain costs little beside opening it."""
_CACHED_OVERHEAD: Final = 560
"""Bytes of a cached grain's dict slot, key, tuple, nonce, associated data and bytes objects, with CPython 3.11."""
_INDEX_DIRECTORY_SHARE: Final = 24
"""A directory is at most this part of a merged index: 1.3 bytes an entry against 44."""
_contexts = threading.local()


def decompressor() -> zstandard.ZstdDecompressor:
    """This thread's decompressor: contexts are expensive to make and not safe to share."""
    try:
        return _contexts.decompressor  # type: ignore[no-any-return]  # threading.local has no types
    except AttributeError:
        _contexts.decompressor = zstandard.ZstdDecompressor()
        return _contexts.decompressor  # type: ignore[no-any-return]  # threading.local has no types


class SealedGrain(NamedTuple):
    """A grain in memory as it is stored, with all that opening it takes. `decrypt` is None in an open basin.

    Kept like this, because what is kept decrypted could be returned after it was changed in memory, and would stand in
    core dumps; and compressed, because more of them fit.
    """

    decrypt: Callable[[bytes, bytes, bytes], bytes] | None
    nonce: bytes
    data: bytes
    associated: bytes
    codec: int


class Opened(NamedTuple):
    """A content, and the grain that it came from."""

    content: bytes
    sealed: SealedGrain


def open_again(sealed: SealedGrain) -> bytes:
    """The content of a grain that was opened before, so that its size is known to be below the cap.

    Raises one of `CHANGED_IN_MEMORY` if it was.
    """
    decrypt, nonce, data, associated, codec = sealed
    if decrypt is not None:
        data = decrypt(nonce, data, associated)
    return data if codec == CODEC_STORED else decompressor().decompress(data)


def open_all(grains: Sequence[SealedGrain]) -> list[bytes]:
    """`open_again` for many, without a call for each."""
    decompress_again = decompressor().decompress
    contents = []
    for decrypt, nonce, data, associated, codec in grains:
        if decrypt is not None:
            data = decrypt(nonce, data, associated)
        contents.append(data if codec == CODEC_STORED else decompress_again(data))
    return contents


def open_together(grains: Sequence[SealedGrain]) -> list[bytes]:
    """`open_all` on a thread beside others: all decompression is one call, which takes the interpreter's lock once."""
    plain = [
        sealed.data if sealed.decrypt is None else sealed.decrypt(sealed.nonce, sealed.data, sealed.associated)
        for sealed in grains
    ]
    is_packed = [sealed.codec != CODEC_STORED for sealed in grains]
    packed: list[bytes | bytearray | memoryview[int]] = list(compress(plain, is_packed))
    if not packed:
        return plain
    segments = decompressor().multi_decompress_to_buffer(packed)
    unpacked = (segments[number].tobytes() for number in range(len(packed)))
    return [next(unpacked) if compressed else data for data, compressed in zip(plain, is_packed, strict=True)]


class StratumReader:
    """An open stratum, its header verified and its keys derived."""

    def __init__(
        self,
        storage: Storage,
        keyring: Keyring,
        kind: int,
        identity: StratumId,
        logged: StratumAdded | None = None,
        file: ReadFile | None = None,
    ) -> None:
        """Open the file; raise `ObjectMissing`, or a `CorruptionError` that names it.

        `logged` is what a record says of it. In a bucket nothing is read then: what the header says, the record does,
        and that the object is there shows when it is read. `file`: read from this one, which is open.
        """
        self.id = identity
        self.name = stratum_name(kind, identity)
        self._file: ReadFile
        if logged is not None and logged.key_material and logged.status == FINISHED and storage.objects is not None:
            self._file = storage.open_known(extent_of(logged))
            self._read = self._file.read
            self.header = _header_of(keyring, logged)
        else:
            self._file = file if file is not None else storage.open(self.name)
            self._read = self._file.read
            try:
                self.header = self._read_header(keyring, kind)
            except BaseException:
                self._file.close()
                raise
        self.keys = keyring.stratum_keys(self.header.generation, self.header.key_material, identity, kind)
        if self.header.commitment and self.keys.commitment != self.header.commitment:
            raise AuthenticationFailed(f"{self.name}: not written under this basin's key", object=self.name, offset=0)
        self._aead = AESGCM(self.keys.cipher_key) if self.keys.cipher_key else None
        self._decrypt = self._aead.decrypt if self._aead is not None else None
        self._prefix = associated_data(identity, 0, b"")[:-8]

    def _read_header(self, keyring: Keyring, kind: int) -> StratumHeader:
        try:
            header = self._decoded(0, STRATUM_HEADER_SIZE, decode_header)
        except CorruptionError as error:
            raise self._named(error, 0) from error
        encrypted = keyring.profile == "encrypted"
        if (
            header.basin_id != keyring.basin_id
            or header.stratum_id != self.id
            or header.kind != kind
            or (header.profile == PROFILE_ENCRYPTED) != encrypted
        ):
            raise CorruptionError(f"{self.name} holds another stratum than its name says", object=self.name, offset=0)
        return header

    def _named(self, error: CorruptionError, offset: int) -> CorruptionError:
        """The same error, naming file and place and what to do."""
        return type(error)(
            f"{self.name} at byte {offset}: {error.message}; run `basin check`", object=self.name, offset=offset
        )

    def size(self) -> int:
        """Length of the file now."""
        return self._file.size()

    def read_raw(self, offset: int, size: int) -> bytes:
        """Bytes as stored, unverified. What the file does not have is not allocated either."""
        self._require_room(offset, size)
        return self._read(offset, size)

    def _require_room(self, offset: int, size: int) -> None:
        have = self._file.size()
        if not (0 <= offset <= have and 0 <= size <= have - offset):
            raise self._named(TruncatedStratum(f"the file ends at {have}, {size} more bytes were expected"), offset)

    def read_again(self, offset: int, size: int) -> bytes | None:
        """Bytes that were not what was written, once more: None if they would be the same. See `ReadFile`."""
        return self._file.read_again(offset, size)

    def read_grain(self, offset: int, length: int, key: bytes) -> tuple[int, Payload]:
        """(kind, payload) of the grain at `offset`, which must have the grain key `key`.

        Cost: one read, one XXH32, one AES-GCM, and a decompression where it was compressed. In an open basin the caller
        compares the content key, because a checksum alone does not detect malice.
        """
        try:
            return self._decode(self._read(offset, length), offset, key)
        except CorruptionError as error:
            again = self.read_again(offset, length)
            if again is None:
                raise self._named(error, offset) from error
        return self.decode_grain(again, offset, key)

    def decode_grain(self, grain: bytes, offset: int, key: bytes) -> tuple[int, Payload]:
        """`read_grain` for bytes that are in hand."""
        try:
            return self._decode(grain, offset, key)
        except CorruptionError as error:
            raise self._named(error, offset) from error

    def _decode(self, grain: bytes, offset: int, key: bytes) -> tuple[int, Payload]:
        header = verify_grain(grain)
        if header.key != key:
            raise CorruptionError("another grain stands where the index points")
        if self._aead is None:
            data = grain[GRAIN_HEADER_SIZE:]
        else:
            nonce = offset.to_bytes(8, "little") + _NONCE_TAIL
            sealed = memoryview(grain)[GRAIN_HEADER_SIZE:]  # Not copied: an index directory can have 100 MiB.
            try:
                data = self._aead.decrypt(nonce, sealed, associated_data(self.id, offset, grain[4:GRAIN_HEADER_SIZE]))
            except InvalidTag:
                raise AuthenticationFailed("a grain does not authenticate: it was changed or moved") from None
        return header.kind, decode_payload(header.codec, header.flags, data, decompressor())

    def read_content(self, offset: int, length: int, key: bytes) -> Opened | None:
        """The content of a BLOB or PART grain without links, and the grain; or None if `read_grain` must look closer.

        The path of every first `get`, flat. In an encrypted basin the seal proves header and data, so the checksum,
        which is for scans without keys, is not computed; in an open one the caller hashes the content, which proves
        more.
        """
        return self.open_content(self._read(offset, length), offset, key)

    def open_content(self, grain: bytes, offset: int, key: bytes) -> Opened | None:
        """`read_content` for bytes that are in hand."""
        codec = _PLAIN_BLOBS.get(grain[8:12])
        if codec is None or grain[_KEY_AT:GRAIN_HEADER_SIZE] != key:
            return None
        place = offset.to_bytes(8, "little")
        nonce, associated = place + _NONCE_TAIL, self._prefix + place + grain[4:GRAIN_HEADER_SIZE]
        data = content = grain[GRAIN_HEADER_SIZE:]
        try:
            if self._decrypt is not None:
                content = self._decrypt(nonce, data, associated)
            if codec != CODEC_STORED:
                content = decompress(codec, content, decompressor())
        except (InvalidTag, BasinError):
            return None
        return Opened(content, SealedGrain(self._decrypt, nonce, data, associated, codec))

    def unseal(self, grain: bytes, offset: int) -> bytes:
        """The compressed payload of one intact grain, decrypted: what a rewrite seals again elsewhere."""
        data = grain[GRAIN_HEADER_SIZE:]
        if self._aead is None:
            return data
        nonce = offset.to_bytes(8, "little") + _NONCE_TAIL
        try:
            return self._aead.decrypt(nonce, data, associated_data(self.id, offset, grain[4:GRAIN_HEADER_SIZE]))
        except InvalidTag:
            raise self.damage(offset, "a grain does not authenticate: it was changed or moved") from None

    def damage(self, offset: int, reason: str) -> CorruptionError:
        """An error that names this file."""
        return self._named(CorruptionError(reason), offset)

    def grains_end(self, length: int, *, finished: bool) -> int:
        """Where the grains of the valid `length` bytes end: before the footer, if there is one."""
        return length - STRATUM_FOOTER_SIZE if finished else length

    def footer(self) -> StratumFooter:
        """The verified footer of a finished stratum."""
        size = self.size()
        try:
            if size < STRATUM_HEADER_SIZE + STRATUM_FOOTER_SIZE:
                raise TruncatedStratum("the file is shorter than a header and a footer")
            start = size - STRATUM_FOOTER_SIZE
            return self._decoded(start, STRATUM_FOOTER_SIZE, lambda data: decode_footer(data, size))
        except CorruptionError as error:
            raise self._named(error, size) from error

    def _decoded(self, offset: int, size: int, decode: Callable[[bytes], T]) -> T:
        """What `decode` makes of stored bytes; of another reading of them, if it refuses the first."""
        try:
            return decode(self._read(offset, size))
        except CorruptionError:
            again = self.read_again(offset, size)
            if again is None:
                raise
        return decode(again)

    def directory(self) -> IndexDirectory:
        """The stratum's own grain index. Two reads."""
        footer = self.footer()
        return self.directory_at(footer.index_offset, footer.index_length)

    def directory_at(self, offset: int, length: int) -> IndexDirectory:
        """The grain index whose directory grain lies at `offset`."""

        def decode(grain: bytes) -> IndexDirectory:
            kind, payload = self._decode(grain, offset, grain[_KEY_AT:GRAIN_HEADER_SIZE])
            if kind != Kind.INDEX_DIRECTORY or blake3(payload.content).digest() != grain[_KEY_AT:GRAIN_HEADER_SIZE]:
                raise ChecksumMismatch("the footer does not point to a grain index")
            return IndexDirectory(payload.content, self.keys.tag_key, self.id)

        self._require_room(offset, length)
        try:
            return self._decoded(offset, length, decode)
        except CorruptionError as error:
            raise self._named(error, offset) from error

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def extent_of(added: StratumAdded) -> Extent:
    """Where the index of a finished stratum lies: all of it is one, but for grains of contents."""
    name = stratum_name(added.kind, added.id)
    directory = GRAIN_HEADER_SIZE + TAG_SIZE + directory_size(added.grain_count) + STRATUM_FOOTER_SIZE
    if added.kind == StratumKind.INDEX:
        return Extent(name, added.length, added.length, added.length // _INDEX_DIRECTORY_SHARE)
    size = added.length if added.kind == StratumKind.META else pages_size(added.grain_count) + directory
    return Extent(name, added.length, size, directory)


def _header_of(keyring: Keyring, added: StratumAdded) -> StratumHeader:
    """The header of a stratum, by what a record says of it. The record is sealed, so no commitment is needed."""
    profile = PROFILE_ENCRYPTED if keyring.profile == "encrypted" else PROFILE_OPEN
    return StratumHeader(
        StratumKind(added.kind),
        profile,
        added.generation,
        keyring.basin_id,
        added.id,
        added.session,
        added.key_material,
        b"",
    )


class StratumReaders:
    """The open strata of one handle, at most `open_max` of them, the oldest opened closed first; and grains of them."""

    def __init__(self, storage: Storage, keyring: Keyring, open_max: int, cache_size: int) -> None:
        """`cache_size`: bytes that all who read through this keep in memory."""
        self.cache = Cache(cache_size - cache_size // _PAGES_SHARE)
        self.page_cache = Cache(cache_size // _PAGES_SHARE)
        self.grains: dict[bytes, SealedGrain] = {}
        """Grains read lately, by content key."""
        self._grains_of: set[StratumId] = set()
        self.are_remote = storage.objects is not None
        """Whether reading costs a request."""
        self._storage = storage
        self._keyring = keyring
        self._open_max = open_max
        self._readers: dict[StratumId, StratumReader] = {}
        self._mutex = threading.Lock()
        self.logged: Mapping[StratumId, Stratum] = {}
        """What the log says of the strata that count."""
        self.run_directories: Mapping[StratumId, int] = {}
        """Where the directory of a run of names begins in its stratum."""

    def opened(self, identity: StratumId) -> StratumReader | None:
        """The reader, if it is open already."""
        return self._readers.get(identity)

    def get(self, kind: int, identity: StratumId, logged: StratumAdded | None = None) -> StratumReader:
        """The reader of a stratum, opened if need be. `logged`: what a record will say of one that no record names."""
        reader = self._readers.get(identity)
        if reader is not None:
            return reader
        if logged is None and identity in self.logged:
            logged = self.logged[identity].added
        opened = StratumReader(self._storage, self._keyring, kind, identity, logged)
        with self._mutex:
            reader = self._readers.setdefault(identity, opened)
            while len(self._readers) > self._open_max:
                # Dropped, not closed: another thread may be reading. The file closes with its last user.
                self._readers.pop(next(iter(self._readers)))
        return reader

    def prefetch(self, strata: Iterable[StratumId]) -> None:
        """Hint that the indexes of these strata are opened next: those of a bucket are all fetched at once."""
        if self._storage.objects is None:
            return
        logged = self.logged
        known = [logged[identity].added for identity in strata if identity in logged and identity not in self._readers]
        self._storage.prefetch([self._extent_of(added) for added in known])

    def _extent_of(self, added: StratumAdded) -> Extent:
        extent = extent_of(added)
        directory = self.run_directories.get(added.id)
        return extent if directory is None else extent._replace(directory_size=added.length - directory)

    def read_grains(self, places: Sequence[Location], kind_of: Callable[[StratumId], int]) -> list[bytes | BasinError]:
        """Grains of many strata as they are stored, unverified; an error in the place of one that cannot be read."""
        names = {place.stratum: "" for place in places}
        for stratum in names:
            names[stratum] = stratum_name(kind_of(stratum), stratum)
        return self._storage.read_ranges(
            [ByteRange(names[stratum], offset, offset + length) for stratum, offset, length in places]
        )

    def keep_grain(self, content_key: bytes, sealed: SealedGrain, stratum: StratumId) -> None:
        """Remember a grain of `stratum` that was opened successfully."""
        size = len(sealed.data)
        if size > _CACHED_SIZE_MAX:
            return
        self._grains_of.add(stratum)
        self.cache.keep(self.grains, content_key, sealed, size + _CACHED_OVERHEAD)
        if stratum not in self._readers:  # Forgotten while we read of it: `forget` may have cleared too early.
            self.grains.pop(content_key, None)

    def forget(self, identity: StratumId) -> None:
        """Drop a stratum that the log removed.

        If grains of it are in memory, all go: that is rare, and reading them again is cheap.
        """
        with self._mutex:
            self._readers.pop(identity, None)
        if identity in self._grains_of:
            self._grains_of.clear()
            self.grains.clear()

    def close(self) -> None:
        """Close all, and keep nothing."""
        self.cache.clear()
        self.page_cache.clear()
        with self._mutex:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

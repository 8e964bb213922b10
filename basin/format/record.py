"""Records of the log: the frame that carries one sealed payload, and the payload itself, a MessagePack map.

A frame stands on its own: the same bytes are a stretch of a local segment and an object in a bucket. Every record has
a cipher key of its own, derived from 32 fresh random bytes, because a log has many writers.

Invariants:

- The checksum covers the frame behind it; the seal's associated data is version, basin id, header behind the checksum.
- The chain hash of a record is the BLAKE3 of its whole frame; the next record's payload names it.
- A decoder raises errors of `basin.errors` on any input, and allocates no more than the input's own size and a cap.

Checkpoints use the same frame with another magic (see `checkpoint`). Pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Final, NamedTuple

import msgpack
import xxhash
import zstandard
from blake3 import blake3

from basin.errors import (
    AuthenticationFailed,
    ChecksumMismatch,
    CorruptionError,
    TruncatedStratum,
    UnsupportedVersion,
)
from basin.format.crypto import Cipher, derive_record_key
from basin.format.layout import (
    CHECKPOINT_MAGIC,
    FORMAT_VERSION,
    FRAME_FLAG_COMPRESSED,
    FRAME_FLAGS_KNOWN,
    FRAME_HEADER,
    FRAME_HEADER_SIZE,
    FRAME_SIZE_MAX,
    FULL_NAME_SIZE_MAX,
    HASH_SIZE,
    KEY_MATERIAL_SIZE,
    RECORD_MAGIC,
    RULES_VERSION,
    STRATUM_ACTIVE,
    STRATUM_CUT,
    STRATUM_FOLDERS,
    STUB_MAGIC,
)
from basin.terms import CONTENT_KEY_SIZE, StratumId

_CHECKSUM_SIZE: Final = 4
_TAG_SIZE: Final = 16
_NONCE: Final = bytes(12)
_COMPRESS_MIN: Final = 4096
"""A frame this large is worth a zstd call; a commit of one small name is not."""


class FrameHeader(NamedTuple):
    """A decoded frame header. `size` is the whole frame in bytes."""

    size: int
    magic: bytes
    flags: int
    position: int
    generation: int
    randomness: bytes


def decode_frame_header(data: bytes | memoryview, offset: int = 0) -> FrameHeader:
    """Read a header, not its checksum. Raises `TruncatedStratum` or `CorruptionError`."""
    if len(data) - offset < FRAME_HEADER_SIZE:
        raise TruncatedStratum("a log record is cut short")
    _, size, magic, flags, position, generation, zero, randomness = FRAME_HEADER.unpack_from(data, offset)
    if (
        magic not in (RECORD_MAGIC, CHECKPOINT_MAGIC, STUB_MAGIC)
        or not FRAME_HEADER_SIZE <= size <= FRAME_SIZE_MAX
        or zero
    ):
        raise CorruptionError("these bytes are no log record")
    return FrameHeader(size, magic, flags, position, generation, randomness)


class FrameCipher:
    """Seals and opens frames of one basin. `log_keys` maps a generation to its log key; None is an open basin."""

    def __init__(self, basin_id: bytes, log_keys: Mapping[int, bytes] | None) -> None:
        self._context = FORMAT_VERSION.to_bytes(2, "little") + basin_id
        self._log_keys = log_keys

    def seal(
        self, magic: bytes, position: int, payload: bytes, *, generation: int, randomness: bytes, flags: int = 0
    ) -> bytes:
        """One frame. `randomness` is 32 bytes that were never used before: by them a writer knows its own again."""
        if len(payload) >= _COMPRESS_MIN:
            payload = zstandard.ZstdCompressor(level=1).compress(payload)
            flags |= FRAME_FLAG_COMPRESSED
        tag_size = 0 if self._log_keys is None else _TAG_SIZE
        size = FRAME_HEADER_SIZE + len(payload) + tag_size
        if size > FRAME_SIZE_MAX:
            raise CorruptionError(f"a record of {size} bytes is larger than {FRAME_SIZE_MAX}")
        header = FRAME_HEADER.pack(0, size, magic, flags, position, generation, 0, randomness)[_CHECKSUM_SIZE:]
        if self._log_keys is not None:
            cipher = Cipher(derive_record_key(self._log_keys[generation], randomness))
            payload = cipher.seal(_NONCE, payload, self._context + header)
        rest = header + payload
        return xxhash.xxh32_intdigest(rest).to_bytes(_CHECKSUM_SIZE, "little") + rest

    def open(self, frame: bytes) -> tuple[FrameHeader, bytes]:
        """Verify and decrypt one whole frame. Raises the kinds of `CorruptionError`, and `UnsupportedVersion`."""
        header = decode_frame_header(frame)
        if header.size != len(frame):
            raise TruncatedStratum("a log record is cut short")
        rest = frame[_CHECKSUM_SIZE:]
        if xxhash.xxh32_intdigest(rest) != int.from_bytes(frame[:_CHECKSUM_SIZE], "little"):
            raise ChecksumMismatch(f"the record at position {header.position} does not match its checksum")
        if header.flags & ~FRAME_FLAGS_KNOWN:  # Judged behind the checksum: a rotten bit is no newer version.
            raise UnsupportedVersion(f"log record flags {header.flags:#x} need a newer Basin", version=header.flags)
        payload = frame[FRAME_HEADER_SIZE:]
        if self._log_keys is not None:
            log_key = self._log_keys.get(header.generation)
            if log_key is None:
                raise AuthenticationFailed(f"no key of generation {header.generation} for a log record")
            cipher = Cipher(derive_record_key(log_key, header.randomness))
            payload = cipher.open(_NONCE, payload, self._context + frame[_CHECKSUM_SIZE:FRAME_HEADER_SIZE])
        if header.flags & FRAME_FLAG_COMPRESSED:
            payload = _inflate(payload)
        return header, payload


def _inflate(payload: bytes) -> bytes:
    try:
        size = zstandard.frame_content_size(payload)
        if not 0 <= size <= FRAME_SIZE_MAX:
            raise CorruptionError(f"a log record claims {size} bytes")
        return zstandard.ZstdDecompressor().decompress(payload, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptionError(f"a log record does not decompress: {error}") from error


def chain_hash(frame: bytes) -> bytes:
    """What the next record's `previous` must be."""
    return blake3(frame).digest()


@dataclass(slots=True)
class Batch:
    """Changes of names that happen together. Names here are full names: 4 bytes of keyspace, then the name.

    Range deletions come first, then the single changes; a name stands in one column at most. `run` names a stratum of
    names that holds the batch's single changes instead, when they are large. `expiries` are absolute milliseconds.
    """

    ranges: list[tuple[bytes, bytes]] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    values: list[bytes] = field(default_factory=list)
    reference_names: list[bytes] = field(default_factory=list)
    reference_keys: list[bytes] = field(default_factory=list)
    deletes: list[bytes] = field(default_factory=list)
    expiries: dict[bytes, int] = field(default_factory=dict)
    run: bytes = b""

    def to_list(self) -> list[Any]:
        """The columns, for MessagePack."""
        return [
            self.ranges,
            self.names,
            self.values,
            self.reference_names,
            self.reference_keys,
            self.deletes,
            self.expiries,
            self.run,
        ]

    @classmethod
    def from_list(cls, columns: Any) -> Batch:
        """Undo `to_list`; raise `CorruptionError` unless every column has its type and length."""
        try:
            ranges, names, values, reference_names, reference_keys, deletes, expiries, run = columns
            batch = cls(
                [(_name(start), _name(stop)) for start, stop in ranges],
                _names(names),
                _bytes_list(values),
                _names(reference_names),
                _content_keys(reference_keys),
                _names(deletes),
                {_name(name): unsigned(moment) for name, moment in expiries.items()},
                stratum_id(run) if run else b"",
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise CorruptionError("a batch in a log record is malformed") from error
        if len(names) != len(values) or len(reference_names) != len(reference_keys):
            raise CorruptionError("a batch in a log record has columns of different lengths")
        return batch

    def __len__(self) -> int:
        return len(self.ranges) + len(self.names) + len(self.reference_names) + len(self.deletes)


class StratumAdded(NamedTuple):
    """A stratum, finished, cut (valid up to `length`, without a footer) or active, as a record describes it."""

    id: StratumId
    kind: int
    status: int
    length: int
    grain_count: int
    hash: bytes
    generation: int
    session: int
    key_material: bytes = b""
    """As the header says, so that a bucket need not be asked for it; empty in records of earlier versions."""


class NameRun(NamedTuple):
    """A sorted run of names in a META stratum, found through its directory grain.

    Covers the changes of positions (`after`, `through`]. `version` is 0, or the one version of all its entries.
    """

    id: StratumId
    after: int
    through: int
    version: int
    version_min: int
    version_max: int
    entries: int
    size: int
    directory_offset: int
    directory_length: int


class IndexRun(NamedTuple):
    """A merged grain index: its stratum in `index/`, and the number of entries and covered strata."""

    id: StratumId
    entries: int
    strata: list[StratumId]


class Condemn(NamedTuple):
    """Strata to be deleted later: marked at `mark`, refused if one was relied on after it."""

    mark: int
    strata: list[StratumId]


class Kill(NamedTuple):
    """Completes the condemn logged at `condemn`."""

    condemn: int
    strata: list[StratumId]


class Pin(NamedTuple):
    """A log position that someone holds."""

    id: bytes
    position: int


class Slot(NamedTuple):
    """A valid key slot and its public key."""

    id: str
    public_key: bytes


@dataclass(slots=True)
class Record:
    """One atomic step of the log. Everything but the first five fields is optional and absent when empty.

    Whoever wants something recorded leaves the first four out: `Core` fills them in when it appends.
    """

    session: int = 0
    sequence: int = 0
    previous: bytes = bytes(HASH_SIZE)
    time_ms: int = 0
    rules: int = RULES_VERSION
    batches: list[Batch] = field(default_factory=list)
    strata_added: list[StratumAdded] = field(default_factory=list)
    strata_removed: list[StratumId] = field(default_factory=list)
    relied: list[StratumId] = field(default_factory=list)
    name_runs_added: list[NameRun] = field(default_factory=list)
    name_runs_removed: list[StratumId] = field(default_factory=list)
    index_runs_added: list[IndexRun] = field(default_factory=list)
    index_runs_removed: list[StratumId] = field(default_factory=list)
    condemned: list[Condemn] = field(default_factory=list)
    revived: list[StratumId] = field(default_factory=list)
    killed: list[Kill] = field(default_factory=list)
    session_begun: bool = False
    sessions_ended: list[int] = field(default_factory=list)
    sessions_revoked: list[int] = field(default_factory=list)
    pins_added: list[Pin] = field(default_factory=list)
    pins_removed: list[bytes] = field(default_factory=list)
    floor: int = 0
    expire_through_ms: int = 0
    slots_added: list[Slot] = field(default_factory=list)
    slots_removed: list[str] = field(default_factory=list)
    generation: int = 0
    damaged: list[bytes] = field(default_factory=list)
    job: str = ""
    """What the session that this record begins is for: the next one of the same job takes over from it."""
    files_kept: bool = False
    """Whether the files of the strata that this record removes or kills are deleted later, and listed until then."""
    files_deleted: list[StratumId] = field(default_factory=list)
    """Strata removed earlier whose kept files are gone now."""
    generations_dropped: list[int] = field(default_factory=list)
    """Key generations under which nothing is sealed any more: their keys are deleted behind this record."""


_SHORT: Final = {
    "session": "s",
    "sequence": "q",
    "previous": "p",
    "time_ms": "t",
    "rules": "r",
    "batches": "b",
    "strata_added": "a+",
    "strata_removed": "a-",
    "relied": "rel",
    "name_runs_added": "n+",
    "name_runs_removed": "n-",
    "index_runs_added": "i+",
    "index_runs_removed": "i-",
    "condemned": "con",
    "revived": "rev",
    "killed": "kil",
    "session_begun": "s+",
    "sessions_ended": "s-",
    "sessions_revoked": "sx",
    "pins_added": "p+",
    "pins_removed": "p-",
    "floor": "f",
    "expire_through_ms": "e",
    "slots_added": "k+",
    "slots_removed": "k-",
    "generation": "g",
    "damaged": "dmg",
    "job": "job",
    "files_kept": "fk",
    "files_deleted": "f-",
    "generations_dropped": "g-",
}
"""Names of the fields in the map: short, because a commit of one small name should be one small write."""
_REQUIRED: Final = frozenset({"s", "q", "p", "t"})
_ALWAYS: Final = _REQUIRED | {"r"}
_SHORT_NAMES: Final = tuple(_SHORT.values())
_values_of: Final = attrgetter(*_SHORT)
_LONG: Final = {short: name for name, short in _SHORT.items()}


def encode_record(record: Record) -> bytes:
    """The payload of a record's frame."""
    values = zip(_SHORT_NAMES, _values_of(record), strict=True)
    fields: dict[str, Any] = {short: value for short, value in values if value or short in _ALWAYS}
    if record.batches:
        fields["b"] = [batch.to_list() for batch in record.batches]
    packed: bytes = msgpack.packb(fields, use_bin_type=True)
    return packed


def unpack_map(payload: bytes) -> dict[Any, Any]:
    """A MessagePack map with text keys, or `CorruptionError`. Strict, and bounded by the payload's own size."""
    try:
        fields = msgpack.unpackb(payload, raw=False, strict_map_key=False, use_list=True)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CorruptionError("authenticated bytes hold no MessagePack map") from error
    if not isinstance(fields, dict):
        raise CorruptionError("authenticated bytes hold no MessagePack map")
    return fields


def decode_record(payload: bytes) -> Record:
    """Undo `encode_record`. Unknown fields are skipped, unless their name starts with `!` (`UnsupportedVersion`)."""
    fields = unpack_map(payload)
    values: dict[str, Any] = {}
    for short, value in fields.items():
        name = _LONG.get(short)
        if name is not None:
            values[name] = value
        elif isinstance(short, str) and short.startswith("!"):
            raise UnsupportedVersion(f"log field {short!r} needs a newer Basin", version=short)
    if not fields.keys() >= _REQUIRED:
        raise CorruptionError("a log record is malformed")
    try:
        decoded = {name: _DECODERS[name](value) for name, value in values.items()}
        record = Record(**decoded)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CorruptionError("a log record is malformed") from error
    if len(record.previous) != HASH_SIZE:
        raise CorruptionError("a log record names no previous record")
    if record.rules > RULES_VERSION:
        raise UnsupportedVersion(f"log rules {record.rules} need a newer Basin", version=record.rules)
    return record


def unsigned(value: Any) -> int:
    """An integer of 64 bits out of decoded MessagePack, or `ValueError`."""
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError("not an unsigned integer")
    return value


def generation_number(value: Any) -> int:
    """A key generation, which has 32 bits in every header, out of decoded MessagePack, or `ValueError`."""
    if unsigned(value) >> 32:
        raise ValueError("not a key generation")
    return int(value)


def plain_bytes(value: Any) -> bytes:
    """Bytes out of decoded MessagePack, or `ValueError`."""
    if type(value) is not bytes:
        raise ValueError("not bytes")
    return value


def _name(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > FULL_NAME_SIZE_MAX:
        raise ValueError("not a name")
    return value


def plain_text(value: Any) -> str:
    """Text out of decoded MessagePack, or `ValueError`."""
    if type(value) is not str:
        raise ValueError("not text")
    return value


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("not a truth value")
    return value


def _bytes_list(values: Any) -> list[bytes]:
    if type(values) is not list or not all(type(value) is bytes for value in values):
        raise ValueError("not a list of bytes")
    return values


def _content_keys(values: Any) -> list[bytes]:
    keys = _bytes_list(values)
    if any(len(key) != CONTENT_KEY_SIZE for key in keys):
        raise ValueError("not a content key")
    return keys


def _names(values: Any) -> list[bytes]:
    names = _bytes_list(values)
    if names and max(map(len, names)) > FULL_NAME_SIZE_MAX:
        raise ValueError("a name is too long")
    return names


def stratum_id(value: Any) -> StratumId:
    """A stratum id out of decoded MessagePack, or `ValueError`."""
    if type(value) is not bytes or len(value) != 16:
        raise ValueError("not a stratum id")
    return StratumId(value)


def _stratum_ids(values: Any) -> list[StratumId]:
    return [stratum_id(value) for value in values]


def stratum_added(value: Any) -> StratumAdded:
    """A `StratumAdded` out of decoded MessagePack, or `ValueError`."""
    identity, kind, status, length, count, digest, generation, session, *later = value
    key_material = plain_bytes(later[0]) if later else b""
    numbers = [unsigned(number) for number in (kind, status, length, count)]
    if kind not in STRATUM_FOLDERS or not STRATUM_ACTIVE <= status <= STRATUM_CUT or len(digest) != HASH_SIZE:
        raise ValueError("not a stratum")
    if len(key_material) not in (0, KEY_MATERIAL_SIZE):
        raise ValueError("not key material")
    return StratumAdded(
        stratum_id(identity),
        numbers[0],
        numbers[1],
        numbers[2],
        numbers[3],
        plain_bytes(digest),
        generation_number(generation),
        unsigned(session),
        key_material,
    )


def name_run(value: Any) -> NameRun:
    """A `NameRun` out of decoded MessagePack, or `ValueError`."""
    identity, *numbers = value
    return NameRun(stratum_id(identity), *[unsigned(number) for number in numbers])


def index_run(value: Any) -> IndexRun:
    """An `IndexRun` out of decoded MessagePack, or `ValueError`."""
    identity, entries, strata = value
    return IndexRun(stratum_id(identity), unsigned(entries), _stratum_ids(strata))


def _pairs(kind: Any, first: Any, second: Any) -> Any:
    return lambda values: [kind(first(one), second(two)) for one, two in values]


_DECODERS: Final[dict[str, Any]] = {
    "session": unsigned,
    "sequence": unsigned,
    "previous": plain_bytes,
    "time_ms": unsigned,
    "rules": unsigned,
    "batches": lambda values: [Batch.from_list(value) for value in values],
    "strata_added": lambda values: [stratum_added(value) for value in values],
    "strata_removed": _stratum_ids,
    "relied": _stratum_ids,
    "name_runs_added": lambda values: [name_run(value) for value in values],
    "name_runs_removed": _stratum_ids,
    "index_runs_added": lambda values: [index_run(value) for value in values],
    "index_runs_removed": _stratum_ids,
    "condemned": _pairs(Condemn, unsigned, _stratum_ids),
    "revived": _stratum_ids,
    "killed": _pairs(Kill, unsigned, _stratum_ids),
    "session_begun": _boolean,
    "sessions_ended": lambda values: [unsigned(value) for value in values],
    "sessions_revoked": lambda values: [unsigned(value) for value in values],
    "pins_added": _pairs(Pin, plain_bytes, unsigned),
    "pins_removed": _bytes_list,
    "floor": unsigned,
    "expire_through_ms": unsigned,
    "slots_added": _pairs(Slot, plain_text, plain_bytes),
    "slots_removed": lambda values: [plain_text(value) for value in values],
    "generation": generation_number,
    "damaged": _bytes_list,
    "job": plain_text,
    "files_kept": _boolean,
    "files_deleted": _stratum_ids,
    "generations_dropped": lambda values: [generation_number(value) for value in values],
}

if {entry.name for entry in dataclasses.fields(Record)} != set(_SHORT) or set(_SHORT) != set(_DECODERS):
    raise ImportError("the fields of Record, their short names and their decoders differ")

"""Sorted runs of names: columnar blocks of about 16 KiB, and the directory that leads to them.

A block holds entries sorted by full name, newest version first within a name. Columns that say nothing new are left
out: a block of plain puts of one version has just lengths, names and values. A run's directory holds the first name of
every block, the range deletions, and a filter over all names. The range deletions stand in a grain of their own as
well, so that losing the directory does not lose them.

Invariants: a block decodes only if its columns fill it exactly; names ascend, versions of one name descend strictly. A
decoded directory holds nothing for each name but the filter, and no filter that it was told to do without.
Pure; uses NumPy to build the filter.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from operator import le, lt
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
import xxhash

from basin.errors import CorruptionError, UnsupportedVersion
from basin.format.layout import (
    BLOCK_FLAGS_KNOWN,
    BLOCK_HAS_EXPIRIES,
    BLOCK_HAS_KINDS,
    BLOCK_HAS_VERSIONS,
    CONTENT_SIZE_MAX,
    ENTRY_DELETE,
    ENTRY_INLINE,
    ENTRY_REFERENCE,
    FULL_NAME_SIZE_MAX,
    KEYSPACE_PREFIX_SIZE,
    NAMES_BLOCK_HEADER,
    NAMES_BLOCK_HEADER_SIZE,
)
from basin.format.record import unpack_map
from basin.terms import CONTENT_KEY_SIZE

_U64: Final = struct.Struct("<Q")
_VALUE_SIZES: Final = {ENTRY_DELETE: 0, ENTRY_REFERENCE: CONTENT_KEY_SIZE}
_FILTER_NAMES_PER_WORD: Final = 6
_FILTER_FOLDS: Final = 64
_FILTER_PIECE: Final = 4096
_FOLDED_TOGETHER: Final = 1 << 13
"""Words of a filter that are put together at a time: 64 KiB and not as much as half the filter."""
FILTER_RESTS_FROM: Final = 256 << 10
"""Bytes of a filter that is not kept before somebody looks for a name, where it can be read again: 190,000 names. One
that is smaller is read again in less time than it takes to find out."""
_READ_TOGETHER: Final = 64 << 10
"""Bytes of a directory that are unpacked at a time."""
_U32_MAX: Final = (1 << 32) - 1
_FILTER_COUNT_MAX: Final = 1 << 26
"""About 10.7 bits a name: 2 % of the look-ups of absent names read a block in vain."""


class NameEntry(NamedTuple):
    """One version of one name. `value` is the bytes, or the content key of a reference, or empty for a deletion."""

    name: bytes
    version: int
    kind: int
    value: bytes
    expiry_ms: int


@dataclass(slots=True)
class Block:
    """A decoded block: parallel columns. `kinds`, `versions` and `expiries` are None when all are inline puts, of
    `version`, that never expire.
    """

    names: list[bytes]
    values: list[bytes]
    kinds: bytes | None
    versions: Sequence[int] | None
    expiries: Sequence[int] | None
    version: int
    distinct: bool
    """Whether no name has two versions here."""

    def entry(self, index: int) -> NameEntry:
        """The entry at `index`."""
        return NameEntry(
            self.names[index],
            self.versions[index] if self.versions is not None else self.version,
            self.kinds[index] if self.kinds is not None else ENTRY_INLINE,
            self.values[index],
            self.expiries[index] if self.expiries is not None else 0,
        )

    @property
    def memory_size(self) -> int:
        """Rough bytes of memory, for the cache: objects of 33 bytes overhead, list slots of 8."""
        return sum(map(len, self.names)) + sum(map(len, self.values)) + 100 * len(self.names)


def encode_block(entries: Sequence[NameEntry]) -> bytes:
    """Columns of sorted entries (at least one)."""
    names, versions, kinds, values, expiries = zip(*entries, strict=True)
    return encode_columns(names, versions, kinds, values, expiries)


def encode_columns(
    names: Sequence[bytes],
    versions: Sequence[int],
    kinds: Sequence[int],
    values: Sequence[bytes],
    expiries: Sequence[int],
) -> bytes:
    """`encode_block` for entries that are columns already."""
    count = len(names)
    flags = 0
    columns = [struct.pack(f"<{count}I", *map(len, names)), struct.pack(f"<{count}I", *map(len, values))]
    if kinds.count(ENTRY_INLINE) != count:
        flags |= BLOCK_HAS_KINDS
        columns.append(bytes(kinds))
    version = versions[0]
    if versions.count(version) != count:
        flags |= BLOCK_HAS_VERSIONS
        columns.append(struct.pack(f"<{count}Q", *versions))
    if any(expiries):
        flags |= BLOCK_HAS_EXPIRIES
        columns.append(struct.pack(f"<{count}Q", *expiries))
    joined_names, joined_values = b"".join(names), b"".join(values)
    header = NAMES_BLOCK_HEADER.pack(count, flags, len(joined_names), len(joined_values), version)
    return b"".join((header, *columns, joined_names, joined_values))


def _block_header(payload: bytes) -> tuple[int, int, int, int, int]:
    """(count, flags, bytes of names, bytes of values, version) of a block that has the size they say."""
    if len(payload) < NAMES_BLOCK_HEADER_SIZE:
        raise CorruptionError("a block of names is cut short")
    count, flags, names_size, values_size, version = NAMES_BLOCK_HEADER.unpack_from(payload)
    if flags & ~BLOCK_FLAGS_KNOWN:
        raise UnsupportedVersion(f"a block of names with flags {flags:#x} needs a newer Basin", version=flags)
    widths = (
        8,
        1 if flags & BLOCK_HAS_KINDS else 0,
        8 if flags & BLOCK_HAS_VERSIONS else 0,
        8 if flags & BLOCK_HAS_EXPIRIES else 0,
    )
    if NAMES_BLOCK_HEADER_SIZE + count * sum(widths) + names_size + values_size != len(payload) or not count:
        raise CorruptionError("a block of names does not have the size that its columns say")
    return count, flags, names_size, values_size, version


def decode_block(payload: bytes) -> Block:
    """Undo `encode_block`; raise `CorruptionError` on anything else."""
    count, flags, names_size, values_size, version = _block_header(payload)
    at = NAMES_BLOCK_HEADER_SIZE
    lengths_at = at
    at += 8 * count
    kinds = versions = expiries = None
    if flags & BLOCK_HAS_KINDS:
        kinds = payload[at : at + count]
        at += count
        if max(kinds) > ENTRY_REFERENCE:
            raise CorruptionError("a block of names holds an entry of unknown kind")
    if flags & BLOCK_HAS_VERSIONS:
        versions = struct.unpack_from(f"<{count}Q", payload, at)
        at += 8 * count
    if flags & BLOCK_HAS_EXPIRIES:
        expiries = struct.unpack_from(f"<{count}Q", payload, at)
        at += 8 * count
    names = _column(payload, lengths_at, count, at, names_size)
    values = _column(payload, lengths_at + 4 * count, count, at + names_size, values_size)
    distinct = all(map(lt, names, names[1:]))
    if not distinct and not all(map(le, names, names[1:])):
        raise CorruptionError("a block of names is out of order")
    sizes = set(map(len, names))
    _require_full_names(min(sizes), max(sizes))
    if kinds is not None:
        for kind, value in zip(kinds, values, strict=True):
            if kind != ENTRY_INLINE and len(value) != (CONTENT_KEY_SIZE if kind == ENTRY_REFERENCE else 0):
                raise CorruptionError("a block of names holds an impossible value")
    return Block(names, values, kinds, versions, expiries, version, distinct)


class PackedBlock:
    """A block that is searched where it lies: a look-up of one name needs no object for each of the others.

    For authenticated payloads: it checks that the columns fill the block, not that the names are in order.
    """

    __slots__ = (
        "_expiries_at",
        "_kinds_at",
        "_name_starts",
        "_names_at",
        "_value_starts",
        "_versions_at",
        "payload",
        "version",
    )

    def __init__(self, payload: bytes) -> None:
        """Locate the columns; raise `CorruptionError` unless they fill the block."""
        count, flags, names_size, values_size, version = _block_header(payload)
        at = NAMES_BLOCK_HEADER_SIZE
        lengths = np.frombuffer(payload, dtype="<u4", count=2 * count, offset=at)
        at += 8 * count
        self._kinds_at, at = (at, at + count) if flags & BLOCK_HAS_KINDS else (0, at)
        self._versions_at, at = (at, at + 8 * count) if flags & BLOCK_HAS_VERSIONS else (0, at)
        self._expiries_at, at = (at, at + 8 * count) if flags & BLOCK_HAS_EXPIRIES else (0, at)
        _require_full_names(int(lengths[:count].min()), int(lengths[:count].max()))
        self.payload = payload
        self.version: int = version
        self._names_at = at
        self._name_starts = _starts(lengths[:count], at, names_size)
        self._value_starts = _starts(lengths[count:], at + names_size, values_size)

    @property
    def first(self) -> bytes:
        """The first name."""
        return self.payload[self._name_starts[0] : self._name_starts[1]]

    @property
    def memory_size(self) -> int:
        """Bytes of memory, for the cache."""
        return len(self.payload) + 8 * len(self._name_starts) + 200

    def find(self, name: bytes, version_max: int) -> NameEntry | None:
        """The newest entry of `name` at or below `version_max`. About 1.5 µs.

        By halves: a search for the bytes takes 5 µs where names have long parts in common, as paths do.
        """
        payload, starts = self.payload, self._name_starts
        low, high = 0, len(starts) - 1
        while low < high:
            middle = low + high >> 1
            if payload[starts[middle] : starts[middle + 1]] < name:
                low = middle + 1
            else:
                high = middle
        while low < len(starts) - 1 and payload[starts[low] : starts[low + 1]] == name:
            entry = self._entry(low, name)
            if entry.version <= version_max:
                return entry
            low += 1
        return None

    def _entry(self, index: int, name: bytes) -> NameEntry:
        payload = self.payload
        kind = payload[self._kinds_at + index] if self._kinds_at else ENTRY_INLINE
        version = _U64.unpack_from(payload, self._versions_at + 8 * index)[0] if self._versions_at else self.version
        expiry_ms = _U64.unpack_from(payload, self._expiries_at + 8 * index)[0] if self._expiries_at else 0
        value = payload[self._value_starts[index] : self._value_starts[index + 1]]
        if kind != ENTRY_INLINE and len(value) != _VALUE_SIZES.get(kind, -1):
            raise CorruptionError("a block of names holds an impossible value")
        return NameEntry(name, version, kind, value, expiry_ms)

    def set_version(self, version: int) -> None:
        """Give all entries the version of the record that adopted their run."""
        self.version, self._versions_at = version, 0


def _require_full_names(shortest: int, longest: int) -> None:
    if shortest < KEYSPACE_PREFIX_SIZE or longest > FULL_NAME_SIZE_MAX:
        raise CorruptionError("a block of names holds one that is too short or too long")


def _starts(lengths: Any, first: int, size: int) -> memoryview:
    """Where each piece of a column starts, and where the last ends."""
    starts = np.empty(len(lengths) + 1, dtype=np.uint32)
    starts[0] = first
    np.cumsum(lengths, out=starts[1:])
    starts[1:] += np.uint32(first)
    if int(starts[-1]) != first + size or int(np.sum(lengths, dtype=np.uint64)) != size:
        raise CorruptionError("a block of names holds lengths that do not add up")
    return memoryview(starts.tobytes()).cast("I")


def _column(payload: bytes, lengths_at: int, count: int, start: int, total: int) -> list[bytes]:
    """The pieces of a column: 30 ns each where all have one length (hashes, numbers, roots), else 100."""
    packed = payload[lengths_at : lengths_at + 4 * count]
    if packed == packed[:4] * count:
        size = int.from_bytes(packed[:4], "little")
        if size * count != total:
            raise CorruptionError("a block of names holds lengths that do not add up")
        return list(struct.unpack_from(f"{size}s" * count, payload, start))
    ends = list(accumulate(struct.unpack(f"<{count}I", packed), initial=start))
    if ends[-1] != start + total:
        raise CorruptionError("a block of names holds lengths that do not add up")
    return [payload[begin:end] for begin, end in pairwise(ends)]


@dataclass(slots=True)
class NamesDirectory:
    """Where the blocks of one run lie in its stratum, and what is known of all its names.

    `firsts[i]` is the first name of block i; `offsets` and `lengths` locate its grain, in 4 bytes each unless the run
    has more than 4 GiB. `ranges` are the range deletions as (start, stop, version).
    """

    entries: int
    firsts: list[bytes]
    last: bytes
    offsets: memoryview
    lengths: memoryview
    ranges: list[tuple[bytes, bytes, int]]
    filter_words: memoryview | None
    """None while the filter rests where it is stored, and where there is none: every look-up must read a block."""
    _word_count: int
    _load: Callable[[], bytes | memoryview] | None = field(default=None, repr=False, compare=False)

    def block_for(self, name: bytes) -> int:
        """Number of the last block whose first name is at most `name`, or -1."""
        return bisect_right(self.firsts, name) - 1

    def forget_filter(self, load: Callable[[], bytes | memoryview]) -> None:
        """Do without a large filter, a byte a name, until somebody looks for one, who waits for `load`.

        `load` gives the payload of the directory again. What it raises, `may_contain` does.
        """
        if 8 * self._word_count >= FILTER_RESTS_FROM:
            self._load = load
            self.filter_words = None

    def may_contain(self, name: bytes) -> bool:
        """False means that no entry of exactly this name is in the run."""
        words = self.filter_words
        if words is None:
            words = self._filter()
            if words is None:
                return True
        digest = xxhash.xxh3_64_intdigest(name)
        mask = 1 << (digest >> 32 & 63) | 1 << (digest >> 38 & 63) | 1 << (digest >> 44 & 63) | 1 << (digest >> 50 & 63)
        word: int = words[(digest & 0xFFFFFFFF) * len(words) >> 32]
        return word & mask == mask

    def _filter(self) -> memoryview | None:
        """The words of the filter, read again; None if there is none."""
        if self._load is None:
            return None
        _, stored = _directory_fields(self._load(), wants_columns=False)
        if len(stored) != 8 * self._word_count:
            raise CorruptionError("the directory of a run of names is not what it was when it was read first")
        words = self.filter_words = memoryview(bytes(stored)).cast("Q")
        return words


class FilterBuilder:
    """Collects a filter over names, piece by piece. Memory: the filter, once, and 40 bytes for each name of a piece."""

    def __init__(self, count_max: int) -> None:
        """`count_max`: names at most; with fewer, the filter is made smaller at the end.

        Above 2^26 it is not believed, because a forged one must not cost memory: the filter says "maybe" more often.
        """
        words = -(-min(count_max, _FILTER_COUNT_MAX) // _FILTER_NAMES_PER_WORD)
        self._words = np.zeros(max(1, -(-words // _FILTER_FOLDS) * _FILTER_FOLDS), dtype=np.uint64)
        self._count = 0

    def add(self, names: Sequence[bytes]) -> None:
        """Take more names (duplicates do no harm)."""
        self._count += len(names)
        for start in range(0, len(names), _FILTER_PIECE):
            piece = names[start : start + _FILTER_PIECE]
            digests = np.fromiter(map(xxhash.xxh3_64_intdigest, piece), dtype=np.uint64, count=len(piece))
            slot = ((digests & np.uint64(0xFFFFFFFF)) * np.uint64(len(self._words))) >> np.uint64(32)
            mask = np.zeros(len(piece), dtype=np.uint64)
            for shift in (32, 38, 44, 50):
                mask |= np.uint64(1) << ((digests >> np.uint64(shift)) & np.uint64(63))
            np.bitwise_or.at(self._words, slot, mask)

    def to_bytes(self) -> memoryview:
        """The words, one for each 6 names or a few more. Call it once: they are the builder's own, not a copy.

        Half as many words send a digest to half the number, rounded down: so neighbours are put together.
        """
        words = self._words
        count = len(words)
        while count % 2 == 0 and count // 2 * _FILTER_NAMES_PER_WORD >= self._count:
            count //= 2
            for start in range(0, count, _FOLDED_TOGETHER):
                stop = min(count, start + _FOLDED_TOGETHER)
                # What is read lies at or behind what is written, and the sum is made before any of it is.
                words[start:stop] = words[2 * start : 2 * stop : 2] | words[2 * start + 1 : 2 * stop : 2]
        words.resize(count, refcheck=False)  # In place: what is cut off goes back to the system.
        return words.astype("<u8", copy=False).data.cast("B")


def build_filter(names: Sequence[bytes]) -> bytes:
    """Filter words over `names`."""
    builder = FilterBuilder(len(names))
    builder.add(names)
    return bytes(builder.to_bytes())


def encode_directory(
    *,
    entries: int,
    firsts: list[bytes],
    last: bytes,
    offsets: list[int],
    lengths: list[int],
    ranges: list[tuple[bytes, bytes, int]],
    filter_bytes: bytes | memoryview,
) -> bytes:
    """The payload of a NAMES_DIRECTORY grain: a MessagePack map."""
    packer = msgpack.Packer(autoreset=False)
    fields = {
        "entries": entries,
        "firsts": firsts,
        "last": last,
        "offsets": offsets,
        "lengths": lengths,
        "ranges": ranges,
    }
    packer.pack_map_header(len(fields) + 1)
    for name, value in fields.items():
        packer.pack(name)
        packer.pack(value)
    packer.pack("filter")
    # Joined only here: ten million names have 13 MiB, of which the packer would hold two more copies.
    return b"".join((packer.bytes(), _binary_header(len(filter_bytes)), filter_bytes))


_BINARY_SIZE_BYTES: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4}
"""What MessagePack puts before a byte string: this, then its size in so many bytes, big-endian."""


def _binary_header(size: int) -> bytes:
    """What MessagePack puts before a byte string."""
    if size < 1 << 8:
        return b"\xc4" + size.to_bytes(1, "big")
    return b"\xc5" + size.to_bytes(2, "big") if size < 1 << 16 else b"\xc6" + size.to_bytes(4, "big")


def decode_directory(
    payload: bytes | memoryview, load: Callable[[], bytes | memoryview] | None = None
) -> NamesDirectory:
    """Undo `encode_directory`; raise `CorruptionError` on anything else.

    With `load`, which gives the payload again, a large filter is not kept: see `NamesDirectory.forget_filter`. Nothing
    of `payload` is kept either way.
    """
    fields, stored = _directory_fields(payload)
    try:
        firsts = [_full_name(name) for name in fields["firsts"]]
        offsets, lengths = _numbers(fields.pop("offsets")), _numbers(fields.pop("lengths"))
        ranges = _ranges(fields)
        entries, last = _size(fields["entries"]), _full_name(fields["last"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError("the directory of a run of names is malformed") from error
    if not (len(firsts) == len(offsets) == len(lengths)):
        raise CorruptionError("the directory of a run of names has columns of different lengths")
    if not all(map(le, firsts, firsts[1:])) or max(lengths, default=0) > CONTENT_SIZE_MAX:
        raise CorruptionError("the directory of a run of names is out of order")
    directory = NamesDirectory(entries, firsts, last, offsets, lengths, ranges, None, len(stored) // 8)
    if load is not None:
        directory.forget_filter(load)
    if len(stored) and directory._load is None:
        directory.filter_words = memoryview(bytes(stored)).cast("Q")
    return directory


def _directory_fields(payload: bytes | memoryview, *, wants_columns: bool = True) -> tuple[dict[Any, Any], memoryview]:
    """The fields of a directory, and its filter, as a part of `payload`: of ten million names it has 13 MiB.

    Unless `wants_columns`, only the filter is of interest. Raises `CorruptionError` unless `payload` is one MessagePack
    map, and its filter whole words.
    """
    fields: dict[Any, Any] = {}
    stored: memoryview | None = None
    try:
        stream = _FieldStream(payload)
        for _ in range(stream.count):
            name = stream.take()
            if name == "filter":
                stored = stream.take_binary()
            elif wants_columns:
                fields[name] = stream.take()
            else:
                stream.skip()
        stream.require_end()
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise CorruptionError("the directory of a run of names is malformed") from error
    if stored is None or len(stored) % 8:
        raise CorruptionError("the directory of a run of names has no filter of whole words")
    return fields, stored


class _Pieces:
    """Bytes as the unpacker asks for them, so that it does not copy them as a whole."""

    def __init__(self, payload: bytes | memoryview, offset: int) -> None:
        self._payload = payload
        self._offset = offset

    def read(self, size: int) -> bytes:
        """The next bytes."""
        start, self._offset = self._offset, self._offset + size
        return bytes(self._payload[start : start + size])


class _FieldStream:
    """A MessagePack map, object by object, with memory for one of them; but byte strings can be left where they are.

    Raises what the library does on other bytes, or `ValueError`. `count`: fields in the map.
    """

    def __init__(self, payload: bytes | memoryview) -> None:
        self._payload = payload
        self._start_at(0)
        self.count: int = self._unpacker.read_map_header()

    def _start_at(self, offset: int) -> None:
        """Go on with the object at `offset`."""
        self._start = offset
        # No object has more elements than there are bytes: what a forged header claims is not allocated.
        size_max = max(1, len(self._payload))
        self._unpacker = msgpack.Unpacker(
            _Pieces(self._payload, offset),
            read_size=min(_READ_TOGETHER, size_max),
            max_buffer_size=size_max,
            raw=False,
            strict_map_key=False,
        )

    def take(self) -> Any:
        """The next object."""
        return self._unpacker.unpack()

    def skip(self) -> None:
        """Pass over the next object."""
        self._unpacker.skip()

    def take_binary(self) -> memoryview:
        """The next object, which must be a byte string, as a part of the payload."""
        at = self._start + self._unpacker.tell()
        size_bytes = _BINARY_SIZE_BYTES.get(self._payload[at]) if at < len(self._payload) else None
        if size_bytes is None:
            raise ValueError("not a byte string")
        start = at + 1 + size_bytes
        stop = start + int.from_bytes(self._payload[at + 1 : start], "big")
        if stop > len(self._payload):
            raise ValueError("a byte string is cut short")
        self._start_at(stop)
        return memoryview(self._payload)[start:stop]

    def require_end(self) -> None:
        """Raise unless nothing follows."""
        if self._start + self._unpacker.tell() != len(self._payload):
            raise ValueError("something follows the map")


def encode_ranges(ranges: list[tuple[bytes, bytes, int]]) -> bytes:
    """The payload of a NAMES_RANGES grain: the range deletions that the directory holds as well."""
    packed: bytes = msgpack.packb({"ranges": ranges})
    return packed


def decode_ranges(payload: bytes) -> list[tuple[bytes, bytes, int]]:
    """Undo `encode_ranges`; raise `CorruptionError` on anything else. Unknown fields are skipped."""
    fields = unpack_map(payload)
    try:
        return _ranges(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError("the range deletions of a run of names are malformed") from error


def _ranges(fields: dict[Any, Any]) -> list[tuple[bytes, bytes, int]]:
    return [(_full_name(start), _full_name(stop), _size(version)) for start, stop, version in fields["ranges"]]


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError("not an unsigned integer")
    return value


def _numbers(values: Any) -> memoryview:
    """Unsigned integers as a column of 4 bytes each, or of 8 where one does not fit."""
    checked = [_size(value) for value in values]
    return np.array(checked, dtype=np.uint32 if max(checked, default=0) <= _U32_MAX else np.uint64).data


def _full_name(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > FULL_NAME_SIZE_MAX:
        raise ValueError("not a name")
    return value


def check_versions(block: Block) -> None:
    """Raise `CorruptionError` unless the versions of each name descend."""
    for index in range(1, len(block.names)):
        if block.names[index] == block.names[index - 1] and (
            block.versions is None or block.versions[index] >= block.versions[index - 1]
        ):
            raise CorruptionError("a block of names holds versions out of order")

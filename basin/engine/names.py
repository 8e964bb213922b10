"""Reading names: sorted runs on disk, and the merge of everything that may hold a name.

Three kinds of sources lie over one another: pending changes (not logged), memtables (logged, not flushed), and runs. A
look-up asks the newest first; a scan merges them block by block.

Invariants: of each name the newest row at or below the asked version counts, unless a newer range deletion covers it;
a scan's cost is that of the blocks it touches. Readers take a `Tables` once and need no lock.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from typing import Final, NamedTuple, TypeAlias

from basin.engine.cache import Cache
from basin.engine.memtable import Memtable, Row
from basin.engine.reader import UNREADABLE, StratumReader, StratumReaders
from basin.errors import BasinError, CorruptionError
from basin.format.grain import verify_grain
from basin.format.layout import (
    CODEC_STORED,
    ENTRY_DELETE,
    ENTRY_INLINE,
    ENTRY_REFERENCE,
    GRAIN_HEADER_SIZE,
    PROFILE_OPEN,
    Kind,
    StratumKind,
)
from basin.format.names import Block, NamesDirectory, PackedBlock, decode_block, decode_directory
from basin.format.record import NameRun
from basin.terms import StratumId

_MEMTABLE_CHUNK: Final = 512
_SCAN_BLOCKS_KEPT: Final = 256
"""A scan over more blocks than this (4 MiB) does not cache them: it would only drive out what single reads need."""
_FEW: Final = 3
"""A merge puts fewer than a third of the names between the others one by one; more are sorted with them."""
_KIND_AT, _KEY_AT = 8, 12
"""In a grain's header."""
_STORED_DIRECTORY: Final = bytes([Kind.NAMES_DIRECTORY, CODEC_STORED, 0, 0])
"""Kind, codec and flags of a directory that is not compressed."""

Range: TypeAlias = tuple[bytes, bytes, int]
"""A range deletion: (start, stop, version)."""


class RunReader:
    """One sorted run of names."""

    def __init__(self, run: NameRun, reader: StratumReader, cache: Cache, *, is_searched: bool = False) -> None:
        """Read the run's directory: one read, and another for the filter as soon as a name is looked for.

        `is_searched`: a name is looked for at once, so the filter is kept from the first.
        """
        self.run = run
        self._reader = reader
        self._cache = cache
        self._decoded: dict[int, Block] = {}
        self._packed: dict[int, PackedBlock] = {}
        self._load = partial(_directory_payload, reader, run)  # Not a method: a run that is merged away goes at once.
        self._directory = decode_directory(self._load(), None if is_searched else self._load)
        version = run.version
        self._ranges: list[Range] = [(start, stop, version or at) for start, stop, at in self._directory.ranges]

    @property
    def ranges(self) -> list[Range]:
        """The range deletions in it."""
        return self._ranges

    @property
    def directory(self) -> NamesDirectory:
        """Where the blocks lie."""
        return self._directory

    def rest(self) -> None:
        """Do without the filter until somebody looks for a name."""
        self._directory.forget_filter(self._load)

    def block(self, number: int, *, keep: bool = True) -> Block:
        """A decoded block; one read and one decryption unless cached."""
        block = self._decoded.get(number)
        if block is None:
            with self._named(self.directory.offsets[number]):
                block = decode_block(self._block_payload(number))
                self._require_first(number, block.names[0])
            if self.run.version:
                block.version, block.versions = self.run.version, None
            if keep:
                self._cache.keep(self._decoded, number, block, block.memory_size)
        return block

    def find(self, name: bytes, version_max: int) -> Row | None:
        """The newest row of `name` at or below `version_max`."""
        directory = self._directory
        if not directory.may_contain(name):
            return None
        number = directory.block_for(name)
        if number < 0:
            return None
        block = self._packed.get(number) or self._packed_block(number)
        entry = block.find(name, version_max)
        return None if entry is None else (entry.version, entry.kind, entry.value, entry.expiry_ms, None)

    def _packed_block(self, number: int) -> PackedBlock:
        """Read a block to search for one name: one read and one decryption."""
        with self._named(self._directory.offsets[number]):
            block = PackedBlock(self._block_payload(number))
            self._require_first(number, block.first)
        if self.run.version:
            block.set_version(self.run.version)
        self._cache.keep(self._packed, number, block, block.memory_size)
        return block

    def _block_payload(self, number: int) -> bytes:
        directory = self._directory
        return _content(self._reader, directory.offsets[number], directory.lengths[number], Kind.NAMES_BLOCK)

    def _require_first(self, number: int, first: bytes) -> None:
        """In an open basin no seal binds a block to its place: whole blocks that were swapped pass their checksums."""
        if first != self._directory.firsts[number]:
            raise CorruptionError("another block of names stands where the directory points")

    @contextlib.contextmanager
    def _named(self, offset: int) -> Iterator[None]:
        """Make errors of a block's decoder name the file and the place."""
        try:
            yield
        except CorruptionError as error:
            if error.fields:
                raise
            name = self._reader.name
            raise type(error)(f"{name} at byte {offset}: {error.message}", object=name, offset=offset) from error


def _directory_payload(reader: StratumReader, run: NameRun) -> bytes | memoryview:
    """The directory of a run; of an open basin as a part of its grain: of ten million names it has 15 MiB."""
    offset, length = run.directory_offset, run.directory_length
    grain = reader.read_raw(offset, length)
    if reader.header.profile == PROFILE_OPEN and grain[_KIND_AT:_KEY_AT] == _STORED_DIRECTORY:
        with contextlib.suppress(CorruptionError):
            verify_grain(grain)
            return memoryview(grain)[GRAIN_HEADER_SIZE:]
    return _decoded(reader, grain, offset, Kind.NAMES_DIRECTORY)


def _content(reader: StratumReader, offset: int, length: int, expected: Kind) -> bytes:
    """The payload of a grain of names: one read and one decryption."""
    return _decoded(reader, reader.read_raw(offset, length), offset, expected)


def _decoded(reader: StratumReader, grain: bytes, offset: int, expected: Kind) -> bytes:
    """The payload of a grain of names; where it is damaged, that of another reading of it."""
    if len(grain) < GRAIN_HEADER_SIZE:
        raise reader.damage(offset, "a block of names is cut short")
    try:
        kind, payload = reader.decode_grain(grain, offset, grain[_KEY_AT:GRAIN_HEADER_SIZE])
    except CorruptionError:
        again = reader.read_again(offset, len(grain))
        if again is None:
            raise
        kind, payload = reader.decode_grain(again, offset, again[_KEY_AT:GRAIN_HEADER_SIZE])
    if kind != expected:
        raise reader.damage(offset, "another grain stands where names belong")
    return payload.content


class BrokenRun(RunReader):
    """A run that cannot be opened: whatever would have to look into it raises why, and nothing is called absent."""

    def __init__(self, run: NameRun, error: BasinError) -> None:
        self.run = run
        self._ranges = []
        self.error = error

    def rest(self) -> None:
        """There is nothing that could."""

    @property
    def directory(self) -> NamesDirectory:
        """Raise the error that opening raised."""
        raise self.error

    def find(self, name: bytes, version_max: int) -> Row | None:
        """Raise the error that opening raised."""
        raise self.error


class LazyRun(RunReader):
    """A run in a bucket: opened by whoever first looks into it, who meets there what is wrong with it."""

    def __init__(self, run: NameRun, readers: StratumReaders, siblings: Sequence[StratumId]) -> None:
        """`siblings`: runs that will be looked into as well, and are fetched with it."""
        self.run = run
        self._readers = readers
        self._siblings = siblings
        self._opened: RunReader | None = None

    def _open(self, *, is_searched: bool = False) -> RunReader:
        opened = self._opened
        if opened is None:
            self._readers.prefetch(self._siblings)
            reader = self._readers.get(StratumKind.META, self.run.id)
            opened = self._opened = RunReader(self.run, reader, self._readers.cache, is_searched=is_searched)
        return opened

    def rest(self) -> None:
        if self._opened is not None:
            self._opened.rest()

    @property
    def ranges(self) -> list[Range]:
        return self._open().ranges

    @property
    def directory(self) -> NamesDirectory:
        return self._open().directory

    def block(self, number: int, *, keep: bool = True) -> Block:
        return self._open().block(number, keep=keep)

    def find(self, name: bytes, version_max: int) -> Row | None:
        return (self._opened or self._open(is_searched=True)).find(name, version_max)


@dataclass(frozen=True, slots=True)
class Tables:
    """Everything logged that may hold a name. Replaced as a whole, never changed in place (the first memtable grows).

    `memtables` are newest first; `runs` by their newest version, newest first.
    """

    memtables: tuple[Memtable, ...]
    runs: tuple[RunReader, ...]

    def ranges(self, version_max: int) -> list[Range]:
        """All range deletions at or below `version_max`."""
        found = [entry for table in self.memtables for entry in table.ranges if entry[2] <= version_max]
        for run in self.runs:
            if run.ranges:
                found += [entry for entry in run.ranges if entry[2] <= version_max]
        return found


def order_runs(runs: Sequence[RunReader]) -> tuple[RunReader, ...]:
    """Newest first, as `Tables` wants them."""
    return tuple(sorted(runs, key=lambda run: run.run.version_max, reverse=True))


def lazy_runs(runs: Sequence[NameRun], readers: StratumReaders) -> list[RunReader]:
    """Runs that are opened when they are needed, all together."""
    siblings = [run.id for run in runs]
    return [LazyRun(run, readers, siblings) for run in runs]


def open_run(run: NameRun, readers: StratumReaders) -> RunReader:
    """Open a run that the state lists; one that is damaged or missing becomes a `BrokenRun`."""
    try:
        return RunReader(run, readers.get(StratumKind.META, run.id), readers.cache)
    except UNREADABLE as error:
        return BrokenRun(run, error)


def find_row(overlays: Sequence[Memtable], tables: Tables, name: bytes, version_max: int) -> Row | None:
    """The row of `name` that counts (perhaps a deletion, perhaps expired), or None. `overlays`: newest first."""
    for overlay in overlays:
        row = overlay.rows.get(name)
        if row is not None:
            return row
        for start, stop, version in overlay.ranges:
            if start <= name < stop:
                return (version, ENTRY_DELETE, b"", 0, None)
    best = None
    for table in tables.memtables:
        best = table.find(name, version_max)
        if best is not None:
            break
    for run in tables.runs:
        if best is not None and best[0] >= run.run.version_max:
            break
        if run.run.version_min <= version_max:
            row = run.find(name, version_max)
            if row is not None and (best is None or row[0] > best[0]):
                best = row
    if best is None:
        return None
    for start, stop, version in tables.ranges(version_max):
        if start <= name < stop and version > best[0]:
            return (version, ENTRY_DELETE, b"", 0, None)
    return best


def newer_than(tables: Tables, start: bytes, stop: bytes, version: int) -> bool:
    """Whether anything in [start, stop) has a row or a range deletion newer than `version`."""
    if any(low < stop and start < high and at > version for low, high, at in tables.ranges((1 << 64) - 1)):
        return True
    for table in tables.memtables:
        if table.version_max > version:
            names = table.names(start, stop, 1 << 62, reverse=False)
            if any(table.rows[name][0] > version for name in names):
                return True
    for run in tables.runs:
        if run.run.version_max > version:
            chunks = _run_chunks(run, start, stop, (1 << 64) - 1, reverse=False)
            if any(row[0] > version for chunk in chunks for row in chunk.as_rows()):
                return True
    return False


# --- scanning -------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """Ascending names of one source. `rows` is None when all are inline puts that never expire: see `values`.

    Then `versions` holds the version of each, or is None where all are of `version`.
    """

    names: list[bytes]
    rows: list[Row] | None
    values: list[bytes]
    version: int
    versions: Sequence[int] | None = None

    def part(self, start: int, stop: int) -> Chunk:
        """A stretch of it."""
        if start == 0 and stop == len(self.names):
            return self
        rows = None if self.rows is None else self.rows[start:stop]
        versions = None if self.versions is None else self.versions[start:stop]
        return Chunk(self.names[start:stop], rows, self.values[start:stop], self.version, versions)

    def each_version(self) -> Iterable[int]:
        """The version of each, where `rows` is None; without end where all have the same."""
        return repeat(self.version) if self.versions is None else self.versions

    def as_rows(self) -> Iterator[Row]:
        """Its rows, made where they were left out."""
        if self.rows is not None:
            return iter(self.rows)
        return zip(self.each_version(), repeat(ENTRY_INLINE), self.values, repeat(0), repeat(None), strict=False)


class Found(NamedTuple):
    """Visible names in scan order. `references` are the places in `values` that hold content keys."""

    names: list[bytes]
    values: list[bytes]
    references: list[int]


def scan(
    overlays: Sequence[Memtable],
    tables: Tables,
    start: bytes,
    stop: bytes,
    *,
    version_max: int,
    now_ms: int,
    reverse: bool = False,
) -> Iterator[Found]:
    """The visible names in [start, stop), in chunks: ascending, or descending from the end."""
    sources = [_memtable_chunks(table, start, stop, 1 << 64, reverse=reverse) for table in overlays if table.rows]
    sources += [_memtable_chunks(table, start, stop, version_max, reverse=reverse) for table in tables.memtables]
    sources += [
        _run_chunks(run, start, stop, version_max, reverse=reverse)
        for run in tables.runs
        if run.run.version_min <= version_max
    ]
    ranges = [entry for table in overlays for entry in table.ranges] + tables.ranges(version_max)
    ranges = [entry for entry in ranges if entry[0] < stop and start < entry[1]]
    for chunk in _merge(sources, reverse=reverse, versioned=bool(ranges)):
        found = _visible(chunk, ranges, now_ms)
        if reverse:
            found = _reversed(found)
        if found.names:
            yield found


def _visible(chunk: Chunk, ranges: list[Range], now_ms: int) -> Found:
    """Drop deletions and expired rows, and what a newer range deletion covers."""
    if chunk.rows is None and not ranges:
        return Found(chunk.names, chunk.values, [])
    names: list[bytes] = []
    values: list[bytes] = []
    references: list[int] = []
    for name, (version, kind, value, expiry_ms, _) in zip(chunk.names, chunk.as_rows(), strict=True):
        if kind == ENTRY_DELETE or (expiry_ms and expiry_ms <= now_ms):
            continue
        if ranges and any(start <= name < stop and version < at for start, stop, at in ranges):
            continue
        if kind == ENTRY_REFERENCE:
            references.append(len(names))
        names.append(name)
        values.append(value)
    return Found(names, values, references)


def _reversed(found: Found) -> Found:
    last = len(found.names) - 1
    return Found(found.names[::-1], found.values[::-1], [last - at for at in reversed(found.references)])


class _Waiting(NamedTuple):
    """What is left of a chunk, from `low` to `high`, and where the next one comes from."""

    chunk: Chunk
    low: int
    high: int
    source: Iterator[Chunk]


def _merge(sources: list[Iterator[Chunk]], *, reverse: bool, versioned: bool) -> Iterator[Chunk]:
    """Merge chunks of several sources; of equal names the newest row stays.

    Each round takes from every source what lies before the nearest end of a chunk, so that all work is done on slices.
    Unless `versioned`, the versions of what comes out are of no interest.
    """
    waiting: list[_Waiting] = []
    for source in sources:
        _refill(waiting, source)
    while len(waiting) > 1:
        taken: list[Chunk] = []
        if reverse:
            pivot = max([chunk.names[low] for chunk, low, _, _ in waiting])
        else:
            pivot = min([chunk.names[high - 1] for chunk, _, high, _ in waiting])
        before, waiting = waiting, []
        for chunk, low, high, source in before:
            if reverse:
                cut = bisect_left(chunk.names, pivot, low, high)
                part, left = (cut, high), (low, cut)
            else:
                cut = bisect_right(chunk.names, pivot, low, high)
                part, left = (low, cut), (cut, high)
            if part[0] < part[1]:
                taken.append(chunk.part(*part))
            if left[0] < left[1]:
                waiting.append(_Waiting(chunk, *left, source))
            else:
                _refill(waiting, source)
        yield taken[0] if len(taken) == 1 else _merged(taken, versioned=versioned)
    for chunk, low, high, source in waiting:
        yield chunk.part(low, high)
        yield from source


def _refill(waiting: list[_Waiting], source: Iterator[Chunk]) -> None:
    chunk = next(source, None)
    if chunk is not None:
        waiting.append(_Waiting(chunk, 0, len(chunk.names), source))


def _merged(chunks: list[Chunk], *, versioned: bool) -> Chunk:
    """Rows of several chunks as one, the newest row of each name."""
    if all(chunk.rows is None for chunk in chunks):
        plain = _merged_plain(chunks, versioned=versioned)
        if plain is not None:
            return plain
    newest: dict[bytes, Row] = {}
    get = newest.get
    for chunk in chunks:
        for name, row in zip(chunk.names, chunk.as_rows(), strict=False):
            other = get(name)
            if other is None or other[0] < row[0]:
                newest[name] = row
    names = sorted(newest)
    return Chunk(names, [newest[name] for name in names], [], 0)


def _merged_plain(chunks: list[Chunk], *, versioned: bool) -> Chunk | None:
    """`_merged` without a step per name, for inline puts that never expire; None if a name stands in two chunks."""
    sizes = [len(chunk.names) for chunk in chunks]
    total, largest = sum(sizes), max(sizes)
    if (total - largest) * _FEW < largest:
        base = chunks[sizes.index(largest)]
        return _inserted(base, [chunk for chunk in chunks if chunk is not base], versioned=versioned)
    values: dict[bytes, bytes] = {}
    versions: dict[bytes, int] = {}
    for chunk in chunks:
        values.update(zip(chunk.names, chunk.values, strict=True))
        if versioned:
            versions.update(zip(chunk.names, chunk.each_version(), strict=False))
    if len(values) != total:
        return None
    names = sorted(values)
    kept = [versions[name] for name in names] if versioned else None
    return Chunk(names, None, [values[name] for name in names], 0, kept)


def _inserted(base: Chunk, few: list[Chunk], *, versioned: bool) -> Chunk | None:
    """The names of `few` put between those of `base`; None if one stands there already."""
    names, values = base.names.copy(), base.values.copy()
    versions = list(islice(base.each_version(), len(names))) if versioned else None
    for chunk in few:
        at = 0
        for name, value, version in zip(chunk.names, chunk.values, chunk.each_version(), strict=False):
            at = bisect_left(names, name, at)
            if at < len(names) and names[at] == name:
                return None
            names.insert(at, name)
            values.insert(at, value)
            if versions is not None:
                versions.insert(at, version)
    return Chunk(names, None, values, 0, versions)


def _memtable_chunks(table: Memtable, start: bytes, stop: bytes, version_max: int, *, reverse: bool) -> Iterator[Chunk]:
    """Chunks of a memtable; names that come while we scan are newer than `version_max` and are skipped."""
    size = 16  # The first chunk is small: many scans want a few names only.
    while True:
        names = table.names(start, stop, size, reverse=reverse)
        if not names:
            return
        if reverse:
            stop = names[-1]
            names.reverse()
        else:
            start = names[-1] + b"\0"
        chunk = _table_chunk(table, names, version_max)
        if chunk.names:
            yield chunk
        size = _MEMTABLE_CHUNK


def _table_chunk(table: Memtable, names: list[bytes], version_max: int) -> Chunk:
    """The newest rows of some names at or below `version_max`."""
    rows = [row for row in map(table.rows.get, names) if row is not None]
    if len(rows) == len(names):
        versions, kinds, values, expiries, _ = zip(*rows, strict=True)
        if max(versions) <= version_max:
            if kinds.count(ENTRY_INLINE) == len(kinds) and not any(expiries):
                return Chunk(names, None, list(values), 0, versions)
            return Chunk(names, rows, [], 0)
    kept, rows = [], []
    for name in names:
        row = table.find(name, version_max)
        if row is not None:
            kept.append(name)
            rows.append(row)
    return Chunk(kept, rows, [], 0)


def _run_chunks(run: RunReader, start: bytes, stop: bytes, version_max: int, *, reverse: bool) -> Iterator[Chunk]:
    directory = run.directory
    first = max(0, bisect_right(directory.firsts, start) - 1)
    last = bisect_left(directory.firsts, stop)
    numbers = range(last - 1, first - 1, -1) if reverse else range(first, last)
    for number in numbers:
        block = run.block(number, keep=len(numbers) <= _SCAN_BLOCKS_KEPT)
        names = block.names
        begin = bisect_left(names, start) if names[0] < start else 0
        end = bisect_left(names, stop) if names[-1] >= stop else len(names)
        if begin < end:
            chunk = _block_chunk(block, begin, end, version_max)
            if chunk.names:
                yield chunk


def _block_chunk(block: Block, begin: int, end: int, version_max: int) -> Chunk:
    """The newest rows of a stretch of a block at or below `version_max`."""
    if block.kinds is None and block.versions is None and block.expiries is None:
        if block.version > version_max:
            return Chunk([], [], [], 0)
        return Chunk(block.names[begin:end], None, block.values[begin:end], block.version)
    if block.kinds is None and block.expiries is None and block.versions is not None and block.distinct:
        versions = block.versions[begin:end]
        if max(versions) <= version_max:
            return Chunk(block.names[begin:end], None, block.values[begin:end], 0, versions)
    names: list[bytes] = []
    rows: list[Row] = []
    for at in range(begin, end):
        entry = block.entry(at)
        if entry.version <= version_max and not (names and names[-1] == entry.name):
            names.append(entry.name)
            rows.append((entry.version, entry.kind, entry.value, entry.expiry_ms, None))
    return Chunk(names, rows, [], 0)

"""`check` a share at a time: each run reads the next share of all stored bytes, so that some runs have read everything.

Runs go round and round over the strata in the order of their ids. A cursor in the basin (keyspace 4) says where the
next run begins. The structure is checked whole by every run.

Invariants:

- The cursor stands behind no byte that was not read in its round, but those of strata that cannot be read (archived, or
  damaged, and told). It is stored behind what was read, never before; a kill costs what was read since.
- A run that ends by itself has read at least its share of what can be read. So a round of a basin that does not change
  takes 1/share runs.
- A round reads the strata that were there when it began, and still are: those up to the highest id of then. What came
  since, also by merging, is the next round's: else whoever writes faster than this reads would keep a round from ever
  coming to its end, and old strata from being read again.
- A round that begins within a run began when the run did: what the run has read already is not read again.
- A stretch ends with a whole grain, so that each is looked at whole in one run.

Imported by `Basin` alone; what is wrong with the bytes of a stretch is the business of `verify`.
"""

from __future__ import annotations

import contextlib
import struct
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.keyspace import CHECK_KEYSPACE, NameMap, prefix_of
from basin.engine.reader import StratumReader, extent_of
from basin.engine.scopes import HandleScope
from basin.engine.state import ACTIVE, CUT, Stratum
from basin.engine.verify import Finding, Walk, check, check_all, check_bytes, finding, unreadable
from basin.engine.writer import stratum_name
from basin.errors import (
    BasinError,
    CorruptionError,
    GrainNotReady,
    InvalidArgument,
    NameNotFound,
    ObjectMissing,
    ReadOnly,
    StorageError,
    StorageUnavailable,
    TruncatedStratum,
    UnsupportedVersion,
    WrongSecret,
)
from basin.format.grain import decode_header, verify_grain
from basin.format.layout import ENTRY_INLINE, GRAIN_HEADER_SIZE, STRATUM_FOOTER_SIZE, STRATUM_HEADER_SIZE, StratumKind
from basin.format.record import StratumAdded
from basin.format.stratum import decode_footer
from basin.storage.objects import ByteRange
from basin.storage.protocol import ReadFile
from basin.terms import STRATUM_ID_SIZE, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

CURSOR_NAME: Final = b"cursor"
CURSOR: Final = struct.Struct("<16s16sQ16sQ")
"""The basin's id, and the fields of `Cursor`."""
SAVE_INTERVAL_S: Final = 10.0
"""What a kill costs, at most, and one stratum: a commit for each would dominate where strata are small."""
_INDEX_CACHE_SIZE: Final = 16 << 20
_FIRST: Final = StratumId(bytes(STRATUM_ID_SIZE))
_END: Final = (1 << 64) - 1
"""The offset behind all of a stratum, however long it is."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What one run of a check read, and how far its round is. All sizes are of strata, in bytes."""

    read: int
    """Read by this run."""
    total: int
    """All that can be read."""
    round_passed: int
    """Read since the round began."""
    round_total: int
    """All that this round reads."""
    archived: int
    """In cold storage: passed over, and not in `total`."""
    began_ms: int
    """When the round began, in milliseconds since 1970."""

    @property
    def is_round_complete(self) -> bool:
        """Whether everything was read since the round began; the next run begins another."""
        return self.round_passed >= self.round_total


class Cursor(NamedTuple):
    """Read in this round, of the strata up to `last`: all before `stratum`, and of that the bytes before `offset`."""

    stratum: StratumId
    offset: int
    last: StratumId
    began_ms: int

    @property
    def place(self) -> tuple[StratumId, int]:
        """What orders cursors of one round."""
        return self.stratum, self.offset


class Check(Iterator[Finding]):
    """The findings of a check, one after another while it goes on; of one that reads a share, `coverage` at its end."""

    coverage: Coverage | None = None

    def __init__(
        self,
        core: Core,
        *,
        read_data: bool | float,
        read_size: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Arguments as of `Basin.check`."""
        if type(read_data) is bool and read_size is None:
            self._findings = check(core, read_data=read_data, progress=progress)
            return
        quota = _quota_of(read_data, read_size)
        if not core.writable:
            raise ReadOnly("a check that goes on where the last one ended must be able to write down where it ends")
        self._findings = self._read_share(_Round(Walk(core, read_data=False, progress=progress)), quota)

    def _read_share(self, reading: _Round, quota: Callable[[int], int]) -> Iterator[Finding]:
        yield from check_all(reading.walk, lambda _: None)
        reading.core.require_writable()
        try:
            yield from reading.read(quota)
        except BaseException:
            with contextlib.suppress(BasinError):  # What was read until then was.
                reading.save()
            raise
        reading.save()
        self.coverage = reading.coverage()

    def __next__(self) -> Finding:
        return next(self._findings)


def _quota_of(read_data: bool | float, read_size: int | None) -> Callable[[int], int]:  # noqa: FBT001  (as `check`)
    """How many bytes a run reads, of so many. Raises `InvalidArgument`."""
    if read_size is not None:
        if type(read_data) is not bool or not read_data:
            raise InvalidArgument("read_data and read_size: a run reads a share, or a number of bytes")
        if type(read_size) is not int or read_size < 1:
            raise InvalidArgument(f"read_size is a number of bytes from 1, not {read_size!r}")
        return lambda total: min(total, read_size)
    share = read_data
    if type(share) not in (int, float) or not 0 < share <= 1:
        raise InvalidArgument(f"read_data is True, False, or a share above 0 and up to 1, not {share!r}")
    return lambda total: min(total, ceil(total * share))


class _Round:
    """One run of a check through its part of a round."""

    def __init__(self, walk: Walk) -> None:
        self.core = walk.core
        self.walk = walk
        self._names: NameMap[bytes, bytes] = NameMap(HandleScope(self.core), CHECK_KEYSPACE, "bytes", "bytes")
        self._began_ms = time.time_ns() // 1_000_000
        self._cursor = self._stored_cursor() or self._beginning()
        self._saved_at = time.monotonic()
        self._read = 0
        self._of: object = None
        self._sorted: list[StratumId] = []
        self._indexes: dict[StratumId, IndexReader | None] = {}
        self._index_cache = Cache(_INDEX_CACHE_SIZE)

    # --- the cursor -------------------------------------------------------------------------------------------------

    def _stored_cursor(self) -> Cursor | None:
        """Where the last run ended; None where nothing says so, or it is of a basin that was imported."""
        try:
            basin_id, stratum, offset, last, began_ms = CURSOR.unpack(self._names[CURSOR_NAME])
        except (NameNotFound, CorruptionError, StorageError, struct.error):
            return None
        if basin_id != self.core.keyring.basin_id:
            return None
        return Cursor(StratumId(stratum), offset, StratumId(last), began_ms)

    def _beginning(self) -> Cursor:
        """The beginning of the next round."""
        return Cursor(_FIRST, 0, max(self.core.state.strata, default=_FIRST), self._began_ms)

    def save(self) -> None:
        """Store the cursor, durably, with whatever waits in this handle.

        Always in the name's own entry, whatever `inline_max`: a content for each run would be something new to read.
        """
        packed = CURSOR.pack(self.core.keyring.basin_id, *self._cursor)
        self.core.put_row(prefix_of(CHECK_KEYSPACE) + CURSOR_NAME, ENTRY_INLINE, packed)
        self.core.commit_pending()
        self._saved_at = time.monotonic()

    def coverage(self) -> Coverage:
        """How far the run came."""
        strata = self.core.state.strata
        archived = sum(strata[one].added.length for one in self.walk.archived if one in strata)
        cursor, passed, in_round = self._cursor, 0, 0
        for identity, known in strata.items():
            if identity in self.walk.unreadable or identity > cursor.last:
                continue
            in_round += known.added.length
            if identity <= cursor.stratum:
                passed += known.added.length if identity < cursor.stratum else min(cursor.offset, known.added.length)
        return Coverage(self._read, self._readable_size(), passed, in_round, archived, cursor.began_ms)

    def _readable_size(self) -> int:
        strata = self.core.state.strata.items()
        return sum(known.added.length for identity, known in strata if identity not in self.walk.unreadable)

    # --- going round ------------------------------------------------------------------------------------------------

    def read(self, quota_of: Callable[[int], int]) -> Iterator[Finding]:
        """Read the next bytes, as many as the quota says, round the end of the order; yield what is wrong with them."""
        quota = self.walk.total = quota_of(self._readable_size())
        start, is_next_round = self._cursor, False
        while self._read < quota:
            known = self._next()
            if known is None and is_next_round:
                return
            if known is None:
                self._cursor, is_next_round = self._beginning(), True
            elif is_next_round and start.place <= (known.added.id, self._offset_in(known.added.id)) <= (
                start.last,
                _END,
            ):
                self._cursor = self._cursor._replace(stratum=start.last, offset=_END)  # This run has read it.
            else:
                yield from self._read_of(known, quota - self._read)
                if time.monotonic() - self._saved_at >= SAVE_INTERVAL_S:
                    self.save()

    def _next(self) -> Stratum | None:
        """The next stratum of which there are bytes to read, passing over what cannot be read; None at the end."""
        strata = self.core.state.strata
        if self._of is not strata:
            self._of, self._sorted = strata, sorted(strata)
        for at in range(bisect_left(self._sorted, self._cursor.stratum), len(self._sorted)):
            known = strata[self._sorted[at]]
            if known.added.id > self._cursor.last:
                return None
            if known.added.id not in self.walk.unreadable and self._offset_in(known.added.id) < known.added.length:
                return known
        return None

    def _offset_in(self, identity: StratumId) -> int:
        return self._cursor.offset if identity == self._cursor.stratum else 0

    def _read_of(self, known: Stratum, size: int) -> Iterator[Finding]:
        """About `size` bytes of a stratum, in whole grains; the cursor moves behind them when they were looked at."""
        added, begin = known.added, self._offset_in(known.added.id)
        end = added.length
        try:
            file = _open(self.core, added)
            try:
                data = _read_stretch(self.core, file, added, begin, size)
                end = begin + len(data)
                yield from self._check_stretch(known, _HeldStretch(file, begin, data), begin, data)
            finally:
                file.close()
        except StorageUnavailable:
            raise  # It may pass: the next run reads this.
        except GrainNotReady:
            self.walk.unreadable.add(added.id)
            self.walk.archived.add(added.id)
        except (CorruptionError, StorageError, UnsupportedVersion, WrongSecret) as error:
            yield from unreadable(self.walk, added, error)
        else:
            self._read += end - begin
            self.walk.advance(end - begin)
        self._cursor = self._cursor._replace(stratum=added.id, offset=end)

    def _check_stretch(self, known: Stratum, file: ReadFile, begin: int, data: bytes) -> Iterator[Finding]:
        added = known.added
        reader = StratumReader(self.core.storage, self.core.keyring, added.kind, added.id, file=file)
        index: IndexReader | None = None
        if added.status not in (ACTIVE, CUT):
            if begin + len(data) == added.length:
                decode_footer(data[-STRATUM_FOOTER_SIZE:], added.length)
            with contextlib.suppress(CorruptionError, StorageError):  # Told with the structure.
                index = IndexReader(reader, reader.directory(), Cache(0))
        places: set[tuple[bytes, int, int]] = set()
        yield from check_bytes(self.walk, known, reader, index, begin, memoryview(data), places)
        yield from self._check_index_runs(added, places)

    def _check_index_runs(self, added: StratumAdded, places: set[tuple[bytes, int, int]]) -> Iterator[Finding]:
        """That merged indexes lead to the grains that were found."""
        for run in self.core.state.index_runs:
            index = self._index_run(run.id) if added.id in run.strata else None
            if index is None:
                continue
            name = stratum_name(StratumKind.INDEX, run.id)
            try:
                for key, offset, length in sorted(places):
                    place = (added.id, offset, length)
                    if index.first(key) != place and place not in index.find(key):
                        detail = f"the grain {key.hex()} at byte {offset} of {added.id} is missing from this index"
                        yield finding("index", name, detail, readable="every grain, after `basin repair`")
            except (CorruptionError, ObjectMissing):
                self._indexes[run.id] = None  # Told with the structure.

    def _index_run(self, identity: StratumId) -> IndexReader | None:
        if identity not in self._indexes:
            self._indexes[identity] = None
            with contextlib.suppress(CorruptionError, ObjectMissing, UnsupportedVersion):
                reader = self.core.readers.get(StratumKind.INDEX, identity)
                self._indexes[identity] = IndexReader(reader, reader.directory(), self._index_cache)
        return self._indexes[identity]


# --- reading ----------------------------------------------------------------------------------------------------------


class _HeldStretch(ReadFile):
    """A file of which a stretch was read: what lies in that is not read again, so that it is what is checked."""

    def __init__(self, file: ReadFile, begin: int, data: bytes) -> None:
        self.name = file.name
        self._file, self._begin, self._data = file, begin, data

    def read(self, offset: int, size: int) -> bytes:
        at = offset - self._begin
        if at >= 0 and at + size <= len(self._data):
            return self._data[at : at + size]
        return self._file.read(offset, size)

    def size(self) -> int:
        return self._file.size()

    def close(self) -> None:
        """Whoever opened the file closes it."""


def _open(core: Core, added: StratumAdded) -> ReadFile:
    """The file of a stratum; in a bucket without a request."""
    if core.is_remote and added.status not in (ACTIVE, CUT):
        return core.storage.open_known(extent_of(added))
    return core.storage.open(stratum_name(added.kind, added.id))


def _read_stretch(core: Core, file: ReadFile, added: StratumAdded, begin: int, size: int) -> bytes:
    """The bytes as they are stored now from `begin` to the end of the grain in which `size` bytes end.

    To the end of the stratum where it cannot be seen where that grain ends.
    """
    stop = added.length if added.status in (ACTIVE, CUT) else added.length - STRATUM_FOOTER_SIZE
    first = max(0, STRATUM_HEADER_SIZE - begin)
    size = max(size, first + 1)
    if begin + size >= stop:
        return _stored(core, file, begin, added.length)
    ahead = min(begin + size + GRAIN_HEADER_SIZE, stop)
    data = _stored(core, file, begin, ahead)
    last = _last_grain(data, first, size)
    if begin + last.stop > ahead and begin + last.stop <= stop:
        data += _stored(core, file, ahead, begin + last.stop)
    if begin + last.stop == stop or not _is_whole(data, last):
        return data + _stored(core, file, begin + len(data), added.length)
    return data[: last.stop]


def _last_grain(data: bytes, at: int, size: int) -> range:
    """Where the grain lies in which the first `size` bytes end, by the headers from `at` on; empty if it is unknown."""
    last = range(at, at)
    try:
        while last.stop < size:
            last = range(last.stop, last.stop + decode_header(data, last.stop).stored_size)
    except CorruptionError:
        return range(0)
    return last


def _is_whole(data: bytes, grain: range) -> bool:
    """Whether a grain is there, so that another begins where it ends."""
    try:
        verify_grain(memoryview(data)[grain.start : grain.stop])
    except BasinError:
        return False
    return True


def _stored(core: Core, file: ReadFile, begin: int, end: int) -> bytes:
    """Bytes of a file past all caches. Raises `TruncatedStratum` where it ends before."""
    if core.is_remote:
        (data,) = core.storage.read_ranges([ByteRange(file.name, begin, end)])
        if isinstance(data, BasinError):
            raise data
    else:
        data = file.read(begin, end - begin)
    if len(data) != end - begin:
        raise TruncatedStratum(f"{file.name} ends at byte {begin + len(data)}", object=file.name, offset=begin)
    return data

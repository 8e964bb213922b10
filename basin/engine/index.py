"""`GrainLocator`: from a grain key to the places where its grain lies, over all countable strata of one state.

Sources, asked in this order: the strata this handle is writing, the active strata of other sessions (scanned as far as
the log vouches for them), finished strata not yet merged, merged index runs.

Invariants: a place is returned only if its stratum counts in the state the locator was last told, or is this handle's
own; a page of an index is verified at its first touch. Look-ups need no lock; `update` is called by one thread.

In a bucket, indexes are opened by the first look-up that comes after an update, all at once: whoever only reads names
never waits for them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from basin.engine.cache import Cache
from basin.engine.reader import UNREADABLE, StratumReader, StratumReaders
from basin.engine.state import ACTIVE, CUT, FINISHED, State
from basin.engine.writer import StratumWriter
from basin.errors import BasinError, CorruptionError, ObjectMissing
from basin.format.index import ENTRY, Entries, IndexDirectory, IndexEntry, decode_page, find_in_page
from basin.format.layout import (
    ENTRY_PLACE,
    INDEX_ENTRY_SIZE,
    PAGE_SIZE,
    PAGES_PER_GRAIN,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.record import StratumAdded
from basin.format.scan import Damage, scan_grains
from basin.terms import CONTENT_KEY_SIZE, Location, StratumId

if TYPE_CHECKING:
    import numpy.typing as npt

_LENGTH_MASK: Final = (1 << 32) - 1
_KEY: Final = np.dtype([("prefix", ">u8"), ("rest", "V24")])
"""The columns of `ENTRY` that make the key."""
_TOGETHER_MIN: Final = 16
"""From so many keys on it pays to search the pages of all of them at once."""
_KEYS_AT_ONCE: Final = 512
"""So many pages, 2 MiB, are joined at most."""
_PAGE_OVERHEAD: Final = 200
"""Bytes of a cached page's object, dict slot and place in the cache's order."""


class IndexReader:
    """One grain index in a stratum: finds places, page by page."""

    def __init__(self, reader: StratumReader, directory: IndexDirectory, cache: Cache) -> None:
        self.id = reader.id
        self.kind: int = reader.header.kind
        self.directory = directory
        self._reader = reader
        self._cache = cache
        self._pages: dict[int, bytes] = {}
        self._verified = bytearray(directory.page_count)

    def rest(self) -> None:
        """Do without the filter until somebody looks for a key: 1.1 of the 1.3 bytes an entry that it takes."""
        self.directory.forget_filter(self._reader.directory)

    def page(self, number: int, *, keep: bool = True) -> bytes:
        """A verified page. One read, unless cached."""
        cached = self._pages.get(number)
        if cached is not None:
            return cached
        offset, size = self.directory.page_extent(number)
        page = self._reader.read_raw(offset, size)
        if not self._verified[number]:
            try:
                page = self._whole_page(number, page, offset)
            except CorruptionError as error:
                name = self._reader.name
                raise type(error)(f"{name}: {error.message}; run `basin repair`", object=name, offset=offset) from error
            self._verified[number] = 1
        if keep:
            self._cache.keep(self._pages, number, page, PAGE_SIZE + _PAGE_OVERHEAD)
        return page

    def _whole_page(self, number: int, page: bytes, offset: int) -> bytes:
        """The page if it verifies, else another reading of it that does."""
        try:
            self.directory.verify_page(number, page)
        except CorruptionError:
            again = self._reader.read_again(offset, len(page))
            if again is None:
                raise
            self.directory.verify_page(number, again)
            return again
        return page

    def first(self, key: bytes) -> tuple[StratumId, int, int] | None:
        """One (stratum, offset, length) of `key`: the first that `find` would yield, at a third of its cost."""
        number = self.directory.only_page_for(key)
        if number >= 0:
            page = self._pages.get(number) or self.page(number)
            at = page.find(key)
            if at < 0:
                return None
            if at % INDEX_ENTRY_SIZE == 0:
                offset, length, stratum, _ = ENTRY_PLACE.unpack_from(page, at + CONTENT_KEY_SIZE)
                return self.directory.strata[stratum], offset, length
        return next(self.find(key), None)

    def first_of_many(self, keys: Sequence[bytes]) -> list[tuple[StratumId, int, int] | None]:
        """`first` of each of many keys: 0.7 us each where a page has several of them, half of what `first` takes."""
        table = np.frombuffer(b"".join(keys), dtype=_KEY)
        prefixes = table["prefix"].astype(np.uint64)
        order = np.argsort(prefixes)
        found: list[tuple[StratumId, int, int] | None] = [None] * len(keys)
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            rows = order[start : start + _KEYS_AT_ONCE]
            self._first_of_sorted(keys, table, prefixes, rows, found)
        return found

    def _first_of_sorted(
        self,
        keys: Sequence[bytes],
        table: Entries,
        prefixes: npt.NDArray[np.uint64],
        rows: npt.NDArray[np.int64],
        found: list[tuple[StratumId, int, int] | None],
    ) -> None:
        """Fill in the places of `rows`, which are in the order of their keys."""
        firsts = self.directory.firsts
        leading = (prefixes[rows] >> np.uint64(32)).astype(np.uint32)
        after = np.searchsorted(firsts, leading)
        is_plain = after > 0  # In one page, or nowhere; what may be in several is looked for by itself.
        within = after < len(firsts)
        is_plain[within] &= firsts[after[within]] != leading[within]
        plain = rows[is_plain]
        if len(plain):
            pages = [self.page(number) for number in np.unique(after[is_plain] - 1).tolist()]
            entries = np.frombuffer(b"".join(pages), dtype=ENTRY)
            of_entries = entries["prefix"].astype(np.uint64)
            at = np.searchsorted(of_entries, prefixes[plain])
            at[at == len(entries)] = 0  # Behind all of them: it is not there, and equals no first one either.
            has_prefix = of_entries[at] == prefixes[plain]
            is_same = has_prefix & (entries["rest"][at] == table["rest"][plain])
            hits = entries[at[is_same]]
            strata = self.directory.strata
            places = zip(hits["stratum"].tolist(), hits["offset"].tolist(), hits["length"].tolist(), strict=True)
            for row, (stratum, offset, length) in zip(plain[is_same].tolist(), places, strict=True):
                found[row] = strata[stratum], offset, length
            is_plain[is_plain] = is_same | ~has_prefix
        for row in rows[~is_plain].tolist():
            found[row] = self.first(keys[row])

    def find(self, key: bytes) -> Iterator[tuple[StratumId, int, int]]:
        """(stratum, offset, length) of every entry of `key`."""
        strata = self.directory.strata
        for number in self.directory.pages_for(key):
            for offset, length, stratum, _, _ in find_in_page(self.page(number), key):
                yield strata[stratum], offset, length

    def rows(self, number: int) -> list[IndexEntry]:
        """The decoded entries of one page."""
        return list(decode_page(self.page(number)))

    def entries(self, start_page: int, stop_page: int) -> Entries:
        """All entries of a range of pages, which are read for a merge and not kept: one read for neighbours."""
        stretches = []
        while start_page < stop_page:
            stop = min(stop_page, (start_page // PAGES_PER_GRAIN + 1) * PAGES_PER_GRAIN)
            stretches.append(self._stretch(start_page, stop))
            start_page = stop
        return np.frombuffer(b"".join(stretches), dtype=ENTRY)

    def _stretch(self, start_page: int, stop_page: int) -> bytes:
        """Verified pages of one grain of pages."""
        offset, _ = self.directory.page_extent(start_page)
        last, size = self.directory.page_extent(stop_page - 1)
        data = self._reader.read_raw(offset, last + size - offset)
        for number in range(start_page, stop_page):
            if self._verified[number]:
                continue
            at = (number - start_page) * PAGE_SIZE
            try:
                self.directory.verify_page(number, data[at : at + PAGE_SIZE])
            except CorruptionError:
                # Looked at closer: another reading may be whole, and the error says where this one is not.
                return b"".join([self.page(one, keep=False) for one in range(start_page, stop_page)])
            self._verified[number] = 1
        return data

    def pages_near(self, prefixes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The pages that may hold keys with these first 8 bytes, sorted, each once."""
        leading = (prefixes >> np.uint64(32)).astype(np.uint32)
        firsts = self.directory.firsts
        low = np.maximum(np.searchsorted(firsts, leading, side="left") - 1, 0)
        high = np.searchsorted(firsts, leading, side="right")
        counts = np.maximum(high - low, 0)
        # Nearly always one or two pages a key; more only where many keys share their first 4 bytes.
        starts = np.repeat(low, counts)
        within = np.arange(len(starts)) - np.repeat(np.cumsum(counts) - counts, counts)
        pages = np.sort(starts + within)
        fresh = np.ones(len(pages), dtype=bool)
        np.not_equal(pages[1:], pages[:-1], out=fresh[1:])
        return pages[fresh].astype(np.int64)


class Scanned(NamedTuple):
    """Grains of a stratum without an index, up to byte `reached`: the newest of each key, and older ones of it."""

    reached: int
    places: dict[bytes, int]
    doubles: list[tuple[bytes, int]]


class GrainLocator:
    """Where grains lie, as of the last `update`."""

    def __init__(self, readers: StratumReaders, *, lazy: bool = False) -> None:
        """`lazy`: let the first look-up after an update do its work."""
        self._readers = readers
        self._lazy = lazy
        self._deferred: tuple[State, set[StratumId]] | None = None
        self._rests = False
        self._settling = threading.RLock()
        self._broken: dict[StratumId, BasinError] = {}
        self._writers: list[StratumWriter] = []
        self._own_finished: dict[StratumId, IndexReader] = {}
        self._scanned: dict[StratumId, Scanned] = {}
        self._indexes: dict[StratumId, IndexReader] = {}
        self._search: tuple[IndexReader, ...] = ()
        self._countable: dict[StratumId, object] = {}
        self._condemned: frozenset[StratumId] = frozenset()
        """Strata that count, and that somebody wants to delete: they are asked last."""
        self._state: State | None = None
        self._swap = threading.Lock()
        """Held while strata move from one source to another: whoever finds nothing looks once more when it is free."""

    @property
    def broken(self) -> dict[StratumId, BasinError]:
        """Strata whose grains cannot be looked up, and why. What was not looked at yet is not in it."""
        return self._broken

    @property
    def is_behind(self) -> bool:
        """Whether strata are gone that the state names: somebody merged them since it was."""
        return any(isinstance(error, ObjectMissing) for error in self._broken.values())

    def rest(self) -> None:
        """Do without the filters of indexes, also of those that come from now on, until somebody looks for a key.

        For whoever reads whole indexes. In a bucket, where reading a filter again is a request, they all stay.
        """
        if self._lazy:
            return
        self._rests = True
        for index in self._search:
            index.rest()

    # --- keeping up -------------------------------------------------------------------------------------------------

    def add_writer(self, writer: StratumWriter) -> None:
        """A stratum of this handle: its grains count for this handle at once."""
        self._writers = [*self._writers, writer]

    def writer_finished(self, writer: StratumWriter, directory: IndexDirectory) -> None:
        """Replace a finished stratum's in-memory index by the one in its file."""
        reader = self._readers.get(writer.kind, writer.id, writer.describe(FINISHED))
        with self._swap:
            self._own_finished[writer.id] = IndexReader(reader, directory, self._readers.page_cache)
            self._writers = [one for one in self._writers if one is not writer]
            self._rebuild_search()

    def strata_indexed(self, run: StratumAdded, strata: Sequence[StratumId], directory: IndexDirectory) -> None:
        """Search a run of indexes for grains of own finished data strata, and no longer those strata themselves."""
        reader = self._readers.get(StratumKind.INDEX, run.id, run)
        index = IndexReader(reader, directory, self._readers.page_cache)
        with self._swap:
            self._own_finished.update(dict.fromkeys(strata, index))
            self._rebuild_search()

    def writer_abandoned(self, writer: StratumWriter) -> None:
        """Forget a stratum that failed."""
        self._writers = [one for one in self._writers if one is not writer]

    def update(self, state: State, runs_of_names: set[StratumId]) -> None:
        """Follow the log: open indexes that are new, scan what others appended, drop what is gone.

        `runs_of_names` hold no contents. An index that cannot be read is kept in `broken`: what is found elsewhere can
        still be read, and nothing is called absent.
        """
        if self._lazy:
            with self._settling:
                self._deferred = (state, runs_of_names)
            return
        self._update(state, runs_of_names)

    def settle(self) -> None:
        """Do what `update` left to the first look-up."""
        with self._settling:
            if self._deferred is not None:
                state, runs_of_names = self._deferred
                self._update(state, runs_of_names)
                self._deferred = None

    def _update(self, state: State, runs_of_names: set[StratumId]) -> None:
        before = self._state
        if before is not None and before.strata is state.strata and before.index_runs is state.index_runs:
            self._state = state
            return
        own = {writer.id for writer in self._writers}
        wanted: dict[StratumId, IndexReader] = {}
        broken_before, broken = self._broken, dict[StratumId, BasinError]()
        covered: set[StratumId] = set()
        if self._lazy:
            self._prefetch(state, runs_of_names, own)
        for run in state.index_runs:
            # A merged index that cannot be read is no loss: every stratum has its own.
            with contextlib.suppress(*UNREADABLE):
                wanted[run.id] = self._indexes.get(run.id) or self._open_index(StratumKind.INDEX, run.id)
                covered.update(run.strata)
        scanned: dict[StratumId, Scanned] = {}
        for identity, known in state.strata.items():
            added = known.added
            if identity in own or identity in covered or identity in runs_of_names or added.kind == StratumKind.INDEX:
                continue
            finished = added.status not in (ACTIVE, CUT)
            if identity in self._own_finished:
                if finished:
                    wanted[identity] = self._own_finished[identity]
                continue
            if finished:
                with contextlib.suppress(*UNREADABLE):
                    wanted[identity] = self._indexes.get(identity) or self._open_index(added.kind, identity)
                    continue
            try:
                length = added.length - STRATUM_FOOTER_SIZE if finished else added.length
                if identity in broken_before:
                    broken[identity] = broken_before[identity]
                scanned[identity] = self._scan(added.kind, identity, length, broken)
            except UNREADABLE as error:
                broken[identity] = error
        gone = set(before.strata.keys() - state.strata.keys()) if before is not None else set()
        # Of this handle's own, some may have come and gone since it last looked.
        gone |= self._own_finished.keys() & state.gone.keys()
        with self._swap:
            self._indexes, self._scanned, self._broken = wanted, scanned, broken
            self._condemned = frozenset(identity for listed in state.condemns.values() for identity in listed)
            self._countable = dict.fromkeys(state.strata.keys() - self._condemned)
            for identity in (*wanted, *covered, *gone):
                self._own_finished.pop(identity, None)
            self._state = state
            self._rebuild_search()
        for identity in gone:
            self._readers.forget(identity)

    def _prefetch(self, state: State, runs_of_names: set[StratumId], own: set[StratumId]) -> None:
        """Fetch at once all indexes that are about to be opened."""
        covered = {identity for run in state.index_runs for identity in run.strata}
        wanted = [run.id for run in state.index_runs if run.id not in self._indexes]
        wanted += [
            identity
            for identity, known in state.strata.items()
            if known.added.kind != StratumKind.INDEX
            and known.added.status == FINISHED
            and identity not in covered
            and identity not in runs_of_names
            and identity not in own
            and identity not in self._own_finished
            and identity not in self._indexes
        ]
        self._readers.prefetch(wanted)

    def _rebuild_search(self) -> None:
        # One index run may stand for several own strata, and under its own name.
        indexes = {index.id: index for index in (*self._own_finished.values(), *self._indexes.values())}.values()
        self._search = tuple(sorted(indexes, key=lambda index: -index.directory.count))

    def _open_index(self, kind: int, identity: StratumId) -> IndexReader:
        reader = self._readers.get(kind, identity)
        index = IndexReader(reader, reader.directory(), self._readers.page_cache)
        if self._rests:
            index.rest()
        return index

    def _scan(self, kind: int, identity: StratumId, length: int, broken: dict[StratumId, BasinError]) -> Scanned:
        """Grains of a stratum without an index, up to `length`. Cost: 1.7 µs a grain that was not seen before.

        Intact grains count; because of the others, `broken` keeps their keys from being called absent.
        """
        reached, places, doubles = self._scanned.get(identity, Scanned(STRATUM_HEADER_SIZE, {}, []))
        if reached >= length:
            return Scanned(reached, places, doubles)
        reader = self._readers.get(kind, identity)
        places, doubles = dict(places), list(doubles)
        data = memoryview(reader.read_raw(reached, min(reader.size(), length) - reached))
        if len(data) < length - reached:
            broken[identity] = reader.damage(reached + len(data), "the file is cut short")
        for found in scan_grains(data, 0, len(data)):
            if isinstance(found, Damage):
                broken[identity] = reader.damage(reached + found.offset, found.reason)
                continue
            if found.header.kind in (Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY):
                continue
            key = found.header.key
            if key in places:
                doubles.append((key, places[key]))
            places[key] = reached + found.offset << 32 | found.header.stored_size
        return Scanned(length, places, doubles)

    # --- looking up -------------------------------------------------------------------------------------------------

    def find(self, key: bytes) -> Location | None:
        """One place of `key`, or None; one in a condemned stratum only where there is no other."""
        place = self.place(key)
        return None if place is None else Location(*place)

    def find_surely(self, key: bytes) -> Location | None:
        """`find`, and once more before saying that there is none: a stratum may be on its way between two sources."""
        found = self.find(key)
        if found is None:
            with self._swap:
                found = self.find(key)
        return found

    def place(self, key: bytes) -> tuple[StratumId, int, int] | None:
        """`find` as a plain tuple: the path of every `get`."""
        if self._deferred is not None:
            self.settle()
        for writer in self._writers:
            place = writer.locations.get(key)
            if place is not None:
                return writer.id, place >> 32, place & _LENGTH_MASK
        if self._scanned:
            for identity, (_, places, _) in self._scanned.items():
                place = places.get(key)
                if place is not None:
                    return identity, place >> 32, place & _LENGTH_MASK
        for index in self._search:
            if index.directory.may_contain(key):
                found = index.first(key)
                if found is None:
                    continue
                if found[0] in self._countable or found[0] in self._own_finished:
                    return found
                for other in index.find(key):
                    if other[0] in self._countable or other[0] in self._own_finished:
                        return other
        return next(self._find_condemned(key), None) if self._condemned else None

    def _find_condemned(self, key: bytes) -> Iterator[tuple[StratumId, int, int]]:
        for index in self._search:
            if index.directory.may_contain(key):
                for found in index.find(key):
                    if found[0] in self._condemned and found[0] not in self._own_finished:
                        yield found

    def find_all(self, key: bytes) -> Iterator[Location]:
        """Every known place of `key`; those in condemned strata last."""
        if self._deferred is not None:
            self.settle()
        for writer in self._writers:
            for found in writer.places(key):
                yield Location(writer.id, found >> 32, found & _LENGTH_MASK)
        for identity, (_, places, doubles) in self._scanned.items():
            place = places.get(key)
            if place is not None:
                for found in (place, *(older for double, older in doubles if double == key)):
                    yield Location(identity, found >> 32, found & _LENGTH_MASK)
        for index in self._search:
            if index.directory.may_contain(key):
                for stratum, offset, length in index.find(key):
                    if stratum in self._countable or stratum in self._own_finished:
                        yield Location(stratum, offset, length)
        if self._condemned:
            for condemned in self._find_condemned(key):
                yield Location(*condemned)

    def find_many(self, keys: Sequence[bytes]) -> list[Location | None]:
        """`find` for many keys: filters are asked in bulk, so that misses cost 0.1 µs a key and index."""
        if self._deferred is not None:
            self.settle()
        found: list[Location | None] = [None] * len(keys)
        missing = range(len(keys))
        for writer in self._writers:
            if writer.locations.keys().isdisjoint(keys):
                continue
            get = writer.locations.get
            rest = []
            for row in missing:
                place = get(keys[row])
                if place is None:
                    rest.append(row)
                else:
                    found[row] = Location(writer.id, place >> 32, place & _LENGTH_MASK)
            missing = rest  # type: ignore[assignment]  # a range first, lists afterwards
        for identity, (_, places, _) in self._scanned.items():
            for row in missing:
                place = places.get(keys[row])
                if place is not None:
                    found[row] = Location(identity, place >> 32, place & _LENGTH_MASK)
        if self._search:
            missing = [row for row in missing if found[row] is None]  # type: ignore[assignment]  # see above
            self._search_many(keys, missing, found)
        return found

    def _search_many(self, keys: Sequence[bytes], rows: Sequence[int], found: list[Location | None]) -> None:
        for index in self._search:
            if not rows:
                return
            joined = b"".join([keys[row] for row in rows])
            table: npt.NDArray[np.uint8] = np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)
            hits = [rows[hit] for hit in np.flatnonzero(index.directory.may_contain_many(table)).tolist()]
            if len(hits) < _TOGETHER_MIN:
                places = [index.first(keys[row]) for row in hits]
            else:
                places = index.first_of_many([keys[row] for row in hits])
            for row, place in zip(hits, places, strict=True):
                if place is not None and (place[0] in self._countable or place[0] in self._own_finished):
                    found[row] = Location(*place)
                elif place is not None:
                    found[row] = self.find(keys[row])
            if hits:
                rows = [row for row in rows if found[row] is None]

    def is_own(self, identity: StratumId) -> bool:
        """Whether the stratum is one of this handle that no record describes in full yet."""
        return identity in self._own_finished or self.writer_of(identity) is not None

    def kind_of(self, identity: StratumId) -> int:
        """DATA or META, of a stratum that `find` returned. Raises `ObjectMissing` if it went meanwhile."""
        if self._deferred is not None:
            self.settle()
        for writer in self._writers:
            if writer.id == identity:
                return writer.kind
        own = self._own_finished.get(identity)
        if own is not None:
            return StratumKind.DATA if own.kind == StratumKind.INDEX else own.kind
        known = self._state.strata.get(identity) if self._state is not None else None
        if known is None:
            raise ObjectMissing(f"stratum {identity} was removed", object=str(identity), operation="find")
        return known.added.kind

    def writer_of(self, identity: StratumId) -> StratumWriter | None:
        """The writer, if the stratum is one that this handle is writing."""
        for writer in self._writers:
            if writer.id == identity:
                return writer
        return None

    @property
    def indexes(self) -> tuple[IndexReader, ...]:
        """The indexes that look-ups search."""
        if self._deferred is not None:
            self.settle()
        return self._search

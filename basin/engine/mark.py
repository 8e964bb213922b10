"""Which grains are needed: reached from names, and through the links of what is reached.

`mark(core)` gives a `Marks`: for every entry of every grain index one bit, *kept* or not, as of one log position. It
reads runs of names, indexes, and the link lists of grains in `meta/`; never a data stratum, so never a cold object.

Invariants:

- Every content that a position at or above the history floor can reach is kept in at least one stratum. One copy of it
  is enough: which other strata were spared a copy because of which is told by `relied_on`.
- What cannot be read stops the marking with an error; nothing is taken for garbage because its parent is unreadable.
- Memory: a bit for each grain, and a fixed amount.

What is kept is an upper bound: keys are compared by their first 8 bytes where a chance match only keeps garbage, and in
full where it would drop something.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from basin.engine.index import IndexReader
from basin.engine.keyspace import ROOTS_KEYSPACE, prefix_of
from basin.engine.merging import column_entries, merged_columns, run_entries
from basin.engine.names import BrokenRun
from basin.engine.plan import Usage
from basin.engine.rewrite import PLACE, grains_at, scanned_entries
from basin.engine.runs import Columns, memtable_columns
from basin.engine.state import ACTIVE, State, last_version
from basin.engine.wanted import Prefixes, Wanted, prefixes_of
from basin.errors import ContentNotFound, CorruptionError, ObjectMissing
from basin.format.index import Entries, join_entries, sort_entries
from basin.format.layout import ENTRY_REFERENCE, FLAG_LINKS, KEYSPACE_PREFIX_SIZE, PAGE_ENTRIES, StratumKind
from basin.storage.row_spool import RowSpool
from basin.terms import CONTENT_KEY_SIZE, Position, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

_SLICE_PAGES: Final = 256
"""Pages of an index that are in memory at a time: 1 MiB, and some more while they are matched."""
_MATCHED_TOGETHER: Final = 1 << 14
"""Keys that are looked for at a time: 250 bytes of memory each, while what is found is sorted."""
_FRESH_MAX: Final = 1 << 18
"""Grains with links that were reached in one round and are remembered; above, the indexes are gone through for them."""
_LOOKS: Final = 3
"""Attempts to mark while others merge away what is being read."""
_ROOTS: Final = prefix_of(ROOTS_KEYSPACE)
_ROOT_SIZE: Final = KEYSPACE_PREFIX_SIZE + CONTENT_KEY_SIZE

Bits: TypeAlias = npt.NDArray[np.uint8]
Rows: TypeAlias = npt.NDArray[np.int64]
Chosen: TypeAlias = npt.NDArray[np.bool_]


def _are_set(bits: Bits, rows: Rows) -> Chosen:
    found: Chosen = ((bits[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1).astype(bool)
    return found


def _set(bits: Bits, rows: Rows) -> None:
    np.bitwise_or.at(bits, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))


class _Source(ABC):
    """The grain entries of one index, or of one stratum that has none, and a bit for each."""

    def __init__(self, strata: Sequence[StratumId], count: int, numbers: dict[StratumId, int]) -> None:
        self.count = count
        self.numbers = np.array([numbers.get(one, -1) for one in strata] or [-1], dtype=np.int64)
        self.kept: Bits = np.zeros(-(-count // 8), dtype=np.uint8)
        self.expanded: Bits = np.zeros_like(self.kept)
        """Entries whose links were followed."""

    @abstractmethod
    def near(self, wanted: Prefixes) -> Iterator[tuple[int, Entries]]:
        """Stretches of entries, each with the row of its first, among which all of `wanted` are that are here."""

    @abstractmethod
    def all(self) -> Iterator[tuple[int, Entries]]:
        """All entries, in stretches."""


class _IndexSource(_Source):
    def __init__(self, index: IndexReader, numbers: dict[StratumId, int]) -> None:
        super().__init__(index.directory.strata, index.directory.count, numbers)
        self._index = index

    def near(self, wanted: Prefixes) -> Iterator[tuple[int, Entries]]:
        pages = self._index.pages_near(wanted)
        start = 0
        while start < len(pages):
            stop = start + 1
            while stop < len(pages) and pages[stop] == pages[stop - 1] + 1 and stop - start < _SLICE_PAGES:
                stop += 1
            first, last = int(pages[start]), int(pages[stop - 1])
            yield first * PAGE_ENTRIES, self._index.entries(first, last + 1)
            start = stop

    def all(self) -> Iterator[tuple[int, Entries]]:
        for first in range(0, self._index.directory.page_count, _SLICE_PAGES):
            stop = min(first + _SLICE_PAGES, self._index.directory.page_count)
            yield first * PAGE_ENTRIES, self._index.entries(first, stop)


class _ScannedSource(_Source):
    def __init__(self, stratum: StratumId, entries: Entries, numbers: dict[StratumId, int]) -> None:
        super().__init__([stratum], len(entries), numbers)
        self._entries = sort_entries(entries)

    def near(self, wanted: Prefixes) -> Iterator[tuple[int, Entries]]:  # all of it is one stretch
        yield 0, self._entries

    def all(self) -> Iterator[tuple[int, Entries]]:
        yield 0, self._entries


class _Matches(NamedTuple):
    """Entries with a wanted key: the number of their source, their row there, the number of their stratum."""

    source: npt.NDArray[np.int64]
    row: Rows
    stratum: npt.NDArray[np.int64]
    entries: Entries

    def at(self, which: npt.NDArray[Any]) -> _Matches:
        return _Matches(self.source[which], self.row[which], self.stratum[which], self.entries[which])


class Marks:
    """What is kept, as of `position`. Close it."""

    def __init__(self, core: Core, state: State, indexes: Iterable[IndexReader], pause: Callable[[int], None]) -> None:
        """`pause(bytes)` is called for what was read: it may wait, or raise to stop."""
        self._core = core
        self._pause = pause
        self.state = state
        self.position: Position = state.position
        names = {run.id for run in state.name_runs}
        self.strata = [
            identity
            for identity, known in state.strata.items()
            if identity not in names and known.added.kind != StratumKind.INDEX
        ]
        """Strata of contents."""
        numbers = {identity: number for number, identity in enumerate(self.strata)}
        self._numbers = numbers
        self._ranks = _ranks(state, self.strata)
        self._sources: list[_Source] = []
        left = dict(numbers)  # A stratum may just be in two indexes: its own, and a merged one.
        for index in indexes:
            self._sources.append(_IndexSource(index, left))
            for identity in index.directory.strata:
                left.pop(identity, None)
        for identity in list(left):
            if state.strata[identity].added.grain_count:
                entries = scanned_entries(core, state.strata[identity].added)
                self._sources.append(_ScannedSource(identity, entries, numbers))
        self.names_waste = 0.0
        """The share of entries of names that no position at or above the floor sees."""
        self.names_unseen = 0
        """How many of those stand in runs, at least."""
        self._wanted = Wanted(core.options.spool_folder)
        self._fresh: list[_Matches] = []
        self._fresh_count = 0
        self._must_sweep = False
        self._spared: set[int] = set()
        """Pairs of strata, as one number: the first was spared a copy because the second has one."""

    def close(self) -> None:
        """Delete temporary files."""
        self._wanted.close()

    # --- reaching -----------------------------------------------------------------------------------------------------

    def want(self, content_keys: Sequence[bytes]) -> None:
        """Contents that are needed."""
        if content_keys:
            self._wanted.add(prefixes_of(self._core.keyring.grain_keys.grain_keys(b"".join(content_keys))))

    def follow(self) -> None:
        """Keep what is wanted, and what that links to, until nothing is new."""
        while self._wanted:
            for chunk in self._wanted.take():
                for start in range(0, len(chunk), _MATCHED_TOGETHER):
                    self._keep(self._matches(chunk[start : start + _MATCHED_TOGETHER]))
            self._expand()

    def hold(self, strata: Iterable[StratumId]) -> None:
        """Keep what *any* grain of these strata links to, needed or not, and what that links to.

        A stratum that stays keeps its dead parents, and somebody may find one of those and refer to it.
        """
        staying = np.zeros(len(self.strata) + 1, dtype=bool)
        staying[[self._numbers[identity] for identity in strata]] = True
        for number, source in enumerate(self._sources):
            if staying[source.numbers].any():
                self._expand_all(number, staying, kept_only=False)
        self.follow()

    def _matches(self, wanted: Prefixes) -> _Matches | None:
        parts = []
        for number, source in enumerate(self._sources):
            for first, entries in source.near(wanted):
                self._pause(entries.nbytes)
                prefixes = entries["prefix"].astype(np.uint64)
                at = np.searchsorted(wanted, prefixes)
                at[at == len(wanted)] = 0
                strata = source.numbers[entries["stratum"]]
                rows = np.flatnonzero((wanted[at] == prefixes) & (strata >= 0))
                if len(rows):
                    parts.append(_Matches(np.full(len(rows), number), rows + first, strata[rows], entries[rows]))
        if not parts:
            return None
        columns = [np.concatenate([part[column] for part in parts]) for column in range(3)]
        sources, rows, strata = columns
        return _Matches(sources, rows, strata, join_entries([part.entries for part in parts]))

    def _keep(self, matches: _Matches | None) -> None:
        """Keep one copy of each wanted key, and all that have links of their own."""
        if matches is None:
            return
        entries = matches.entries
        has_links = (entries["flags"] & FLAG_LINKS).astype(bool)
        rest = np.ascontiguousarray(entries["rest"]).view(">u8").reshape(-1, 3)
        columns = [rest[:, 2], rest[:, 1], rest[:, 0], entries["prefix"].astype(np.uint64)]
        order = np.lexsort([self._ranks[matches.stratum], ~has_links, *columns])
        matches, has_links = matches.at(order), has_links[order]
        same = np.ones(len(order), dtype=bool)
        for column in columns:
            same[1:] &= column[order][1:] == column[order][:-1]
        same[0] = False
        kept = ~same | has_links
        doubles = np.flatnonzero(same & has_links)
        if len(doubles):
            kept[self._link_doubles(matches, same, doubles)] = False
        leaders = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        spared = np.flatnonzero(~kept)
        pairs = matches.stratum[spared] * len(self.strata) + matches.stratum[leaders[spared]]
        self._spared.update(np.unique(pairs).tolist())
        self._set(matches.at(kept), has_links[kept])

    def _link_doubles(self, matches: _Matches, same: npt.NDArray[np.bool_], doubles: Rows) -> list[int]:
        """Grains of one key with the very links of one before: nothing is lost without them."""
        superfluous = []
        for row in doubles.tolist():
            before = row - 1
            links = self._links_at(matches, row)
            while True:
                if before not in superfluous and self._links_at(matches, before) == links:
                    superfluous.append(row)
                    break
                if not same[before]:
                    break
                before -= 1
        return superfluous

    def _links_at(self, matches: _Matches, row: int) -> list[bytes]:
        entry = matches.entries[row]
        ((prefix, rest),) = _key_halves(matches.entries[row : row + 1])
        identity = self.strata[int(matches.stratum[row])]
        reader = self._core.readers.get(self.state.strata[identity].added.kind, identity)
        return reader.read_grain(int(entry["offset"]), int(entry["length"]), prefix + rest)[1].links

    def _set(self, matches: _Matches, has_links: npt.NDArray[np.bool_]) -> None:
        for number in np.unique(matches.source).tolist():
            source = self._sources[number]
            here = matches.source == number
            rows = matches.row[here]
            fresh = here.copy()
            fresh[here] = ~_are_set(source.kept, rows) & has_links[here]
            _set(source.kept, rows)
            self._remember(matches.at(fresh))

    def _remember(self, fresh: _Matches) -> None:
        """Grains whose links must be followed."""
        if not len(fresh.row) or self._must_sweep:
            return
        self._fresh.append(fresh)
        self._fresh_count += len(fresh.row)
        if self._fresh_count > _FRESH_MAX:
            self._must_sweep = True
            self._fresh = []

    # --- links --------------------------------------------------------------------------------------------------------

    def _expand(self) -> None:
        """Want what was newly reached links to."""
        fresh, self._fresh, self._fresh_count = self._fresh, [], 0
        if not self._must_sweep:
            for matches in fresh:
                for number in np.unique(matches.source).tolist():
                    here = matches.at(matches.source == number)
                    self._expand_these(number, here.row, here.stratum, here.entries)
            return
        self._must_sweep = False
        everywhere = np.ones(len(self.strata) + 1, dtype=bool)
        for number in range(len(self._sources)):
            self._expand_all(number, everywhere, kept_only=True)

    def _expand_all(self, number: int, within: Chosen, *, kept_only: bool) -> None:
        """Follow the links of the entries of a source that were not followed yet, in strata that are `within`."""
        source = self._sources[number]
        for first, entries in source.all():
            self._pause(entries.nbytes)
            strata = source.numbers[entries["stratum"]]
            chosen = np.flatnonzero((entries["flags"] & FLAG_LINKS).astype(bool) & (strata >= 0))
            chosen = chosen[within[strata[chosen]] & ~_are_set(source.expanded, chosen + first)]
            if kept_only:
                chosen = chosen[_are_set(source.kept, chosen + first)]
            if len(chosen):
                self._expand_these(number, chosen + first, strata[chosen], entries[chosen])

    def _expand_these(self, number: int, rows: Rows, strata: npt.NDArray[np.int64], entries: Entries) -> None:
        _set(self._sources[number].expanded, rows)
        for stratum in np.unique(strata).tolist():
            self._follow_links(self.strata[stratum], entries[strata == stratum])

    def _follow_links(self, identity: StratumId, entries: Entries) -> None:
        """Read link lists of one stratum, in the order in which they lie there."""
        core = self._core
        reader = core.readers.get(self.state.strata[identity].added.kind, identity)
        entries = entries[np.argsort(entries["offset"], kind="stable")]
        places = np.zeros(len(entries), dtype=PLACE)
        places["offset"], places["length"] = entries["offset"], entries["length"]
        for (prefix, rest), (offset, grain) in zip(_key_halves(entries), grains_at(reader, places), strict=True):
            key, length = prefix + rest, len(grain)
            self._pause(length)
            try:
                links = reader.decode_grain(grain, offset, key)[1].links
            except CorruptionError:
                if core.keyring.grain_keys.content_key(key) in self.state.damaged:
                    continue  # Recorded as lost; what it linked to is nobody's any more.
                links = reader.read_grain(offset, length, key)[1].links
            self.want(links)

    # --- results ------------------------------------------------------------------------------------------------------

    def usage(self) -> dict[StratumId, Usage]:
        """How much of every stratum is kept."""
        count = len(self.strata)
        totals = np.zeros((5, count + 1))
        for source in self._sources:
            for first, entries in source.all():
                self._pause(entries.nbytes)
                rows = np.arange(first, first + len(entries))
                strata = source.numbers[entries["stratum"]]
                kept = _are_set(source.kept, rows)
                dead_parents = ~kept & (entries["flags"] & FLAG_LINKS).astype(bool)
                lengths = entries["length"].astype(np.float64)
                for line, weights in enumerate((np.ones(len(rows)), lengths, kept, kept * lengths, dead_parents)):
                    totals[line] += np.bincount(strata + 1, weights=weights, minlength=count + 1)
        columns = totals[:, 1:].astype(np.int64).T.tolist()
        return {identity: Usage(*column) for identity, column in zip(self.strata, columns, strict=True)}

    def kept_places(self, strata: Sequence[StratumId]) -> RowSpool:
        """Offset and length of every kept grain of `strata`; part n is of the n-th. Close it."""
        spool = RowSpool(PLACE, self._core.options.spool_folder)
        try:
            self._spool_places(spool, strata)
        except BaseException:
            spool.close()
            raise
        return spool

    def _spool_places(self, spool: RowSpool, strata: Sequence[StratumId]) -> None:
        parts = np.full(len(self.strata) + 1, -1, dtype=np.int64)
        parts[[self._numbers[identity] for identity in strata]] = np.arange(len(strata))
        for source in self._sources:
            if (parts[source.numbers] < 0).all():
                continue
            for first, entries in source.all():
                self._pause(entries.nbytes)
                chosen = parts[source.numbers[entries["stratum"]]]
                rows = np.flatnonzero(chosen >= 0)
                rows = rows[_are_set(source.kept, rows + first)]
                if len(rows):
                    places = np.zeros(len(rows), dtype=PLACE)
                    places["offset"], places["length"] = entries["offset"][rows], entries["length"][rows]
                    spool.add(chosen[rows], places)

    def relied_on(self, identity: StratumId) -> set[StratumId]:
        """The strata that hold what is not kept in this one, because they have it as well."""
        number, count = self._numbers[identity], len(self.strata)
        return {self.strata[pair % count] for pair in self._spared if pair // count == number}

    def save(self) -> list[tuple[Bits, Bits | None]]:
        """What is kept now, for `restore`."""
        # Where nothing links to anything, its bits are memory that was never touched, and a copy would be.
        return [
            (source.kept.copy(), source.expanded.copy() if source.expanded.any() else None) for source in self._sources
        ]

    def restore(self, saved: Sequence[tuple[Bits, Bits | None]]) -> None:
        """Forget what was kept since `save`."""
        for source, (kept, expanded) in zip(self._sources, saved, strict=True):
            source.kept = kept.copy()
            source.expanded = np.zeros_like(kept) if expanded is None else expanded.copy()


def _key_halves(entries: Entries) -> Iterator[tuple[bytes, bytes]]:
    prefixes, rests = entries["prefix"].tobytes(), entries["rest"].tobytes()
    for number in range(len(entries)):
        yield prefixes[number * 8 : number * 8 + 8], rests[number * 24 : number * 24 + 24]


def _ranks(state: State, strata: Sequence[StratumId]) -> npt.NDArray[np.int64]:
    """Which copy of several is kept: one that stays hot; of a finished stratum, the newest; of an active one; of a
    condemned one at last.

    A copy that a compaction wrote and could not log in time is newer than what it was copied from, so that goes.
    """

    def rank(identity: StratumId) -> tuple[bool, bool, bool, int]:
        known = state.strata[identity]
        is_cold = known.added.kind != StratumKind.META
        return bool(known.condemned), is_cold, known.added.status == ACTIVE, -int.from_bytes(identity, "big")

    ranks = np.zeros(len(strata) + 1, dtype=np.int64)
    for place, number in enumerate(sorted(range(len(strata)), key=lambda number: rank(strata[number]))):
        ranks[number] = place
    return ranks


def mark(core: Core, pause: Callable[[int], None], floor: Position = 0) -> Marks:
    """Mark as of now. Raises why if something that must be read cannot be.

    `floor`: as if the history floor were there already.
    """
    for _ in range(_LOOKS):
        try:
            return _mark(core, pause, floor)
        except (ObjectMissing, ContentNotFound):
            core.refresh()  # Somebody merged away what was being read.
    return _mark(core, pause, floor)


def _mark(core: Core, pause: Callable[[int], None], floor: Position) -> Marks:
    with core.commit_mutex:
        core.catch_up()
        core.locator.rest()
        indexes = core.locator.indexes
        state, tables = core.current
        columns = [memtable_columns(table) for table in tables.memtables]
        ranges = tables.ranges((1 << 64) - 1)
    for run in tables.runs:
        if isinstance(run, BrokenRun):
            raise run.error
        run.rest()
    for identity, error in core.locator.broken.items():
        if state.strata[identity].added.kind == StratumKind.META or isinstance(error, ObjectMissing):
            raise error
    marks = Marks(core, state, indexes, pause)
    try:
        bottom = last_version(max(floor, state.floor))
        blocks = [*(run_entries(run) for run in tables.runs), *map(column_entries, columns)]
        in_runs = sum(run.run.entries for run in tables.runs)
        entries = in_runs + sum(len(table.names) for table in columns)
        seen = 0
        for part in merged_columns(blocks, ranges, state.expire_through_ms, floor=bottom, bottom=bottom):
            marks.want(_content_keys(part))
            seen += len(part.names)
        marks.names_waste = 1 - seen / entries if entries else 0.0
        marks.names_unseen = max(0, in_runs - seen)
        marks.follow()
    except BaseException:
        marks.close()
        raise
    return marks


def _content_keys(columns: Columns) -> list[bytes]:
    """The contents that names refer to: by reference, or by being their root."""
    references = [value for kind, value in zip(columns.kinds, columns.values, strict=True) if kind == ENTRY_REFERENCE]
    if columns.names[-1] < _ROOTS or columns.names[0][:KEYSPACE_PREFIX_SIZE] > _ROOTS:
        return references
    names = columns.names
    are_roots = names[0].startswith(_ROOTS) and names[-1].startswith(_ROOTS) and all(columns.kinds)
    if are_roots and set(map(len, names)) == {_ROOT_SIZE}:
        return references + [name[KEYSPACE_PREFIX_SIZE:] for name in names]
    return references + [
        name[KEYSPACE_PREFIX_SIZE:]
        for name, kind in zip(columns.names, columns.kinds, strict=True)
        if kind and name.startswith(_ROOTS) and len(name) == _ROOT_SIZE
    ]

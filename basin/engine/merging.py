"""Merges of sorted runs: those of names and those of grain indexes; and the flush that makes the first.

Invariants:

- Nothing is dropped that a position at or above the history floor can see.
- An output is durable before the one record that swaps it in. If `State.apply` refuses that, because an input went
  meanwhile, the output is deleted.
- Memory is bounded by a block or a few pages of each input, and 1.3 bytes an entry of the output's directory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from basin.engine.index import IndexReader
from basin.engine.names import Range, RunReader
from basin.engine.runs import Columns, memtable_columns, write_run
from basin.engine.state import FINISHED, last_version
from basin.engine.writer import append_index
from basin.format.index import Entries, IndexBuilder, join_entries, sort_entries
from basin.format.layout import ENTRY_DELETE, INDEX_STRATA_MAX, NAMES_BLOCK_SIZE, StratumKind
from basin.format.names import Block
from basin.format.record import IndexRun, NameRun, Record, StratumAdded
from basin.terms import StratumId

if TYPE_CHECKING:
    import numpy.typing as npt

    from basin.engine.core import Core

_GATHERED_SIZE: Final = 16 * NAMES_BLOCK_SIZE
"""Bytes of names and values that a merge of names gives on together: of 16 blocks the last is not full. When each round
was written by itself, six runs became one whose blocks were a third full, and its directory three times as large."""
_INDEX_PAGES_HELD: Final = 512
"""Pages that an index merge holds at a time, of all inputs together: 2 MiB, and as much again while they are sorted."""
_INDEX_SLICE_MAX: Final = 64
_INDEX_SLICE_MIN: Final = 2
"""Pages of one input that are read at a time: a read costs as much as what comes with it."""


def remove_files(core: Core, kind: StratumKind, strata: Iterable[StratumId]) -> None:
    """Delete the files of strata that a record has just removed; in a bucket they are kept for a while.

    There an open file is no hold on it, and whoever reads at an earlier position would find nothing.
    """
    for identity in strata:
        if not core.is_remote:
            core.own_strata.delete(kind, identity)


# --- names ----------------------------------------------------------------------------------------------------------


def flush(core: Core) -> bool:
    """Write the memtable as a run that covers (flushed, position]."""
    core.ensure_session()
    state, tables = core.current
    table = tables.memtables[0]
    if not len(table):
        return False
    columns = memtable_columns(table)
    run, added = write_run(
        core,
        [columns],
        list(table.ranges),
        after=state.flushed,
        through=state.position,
        count_max=len(columns.names),
    )
    done = core.append(
        lambda now: Record(name_runs_added=[run], strata_added=[added]) if now.flushed == state.flushed else None
    )
    if not done:
        core.own_strata.delete(StratumKind.META, run.id)
    return done


def never(_: int) -> None:
    """Neither wait nor stop."""


def merge_names(
    core: Core, window: Sequence[NameRun], pause: Callable[[int], None] = never, *, unseen: int = 0
) -> bool:
    """Replace neighbouring runs by one, without what nobody at or above the floor can see.

    `pause(bytes)` is called for what was read and written: it may wait, or raise to stop. `unseen`: entries that will
    be left out, as a marking has found, so that no filter is made for them first. It may be too high, because others
    merged some of them away since: half of the entries have a filter in any case.
    """
    core.ensure_session()
    state, tables = core.current
    wanted = {run.id for run in window}
    readers = [reader for reader in tables.runs if reader.run.id in wanted]
    ranges = [entry for reader in readers for entry in reader.ranges]
    blocks = [run_entries(reader, pause) for reader in readers]
    floor = last_version(state.floor)
    # A deletion may go only when nothing older lies below it: in no other run, and not in the log behind `flushed`.
    bottom = min(floor, last_version(state.flushed)) if len(window) == len(state.name_runs) else 0
    kept_ranges = [entry for entry in ranges if entry[2] > bottom]
    entries = sum(one.entries for one in window)
    run, added = write_run(
        core,
        merged_columns(blocks, ranges, state.expire_through_ms, floor=floor, bottom=bottom),
        kept_ranges,
        after=min(one.after for one in window),
        through=max(one.through for one in window),
        count_max=max(entries - unseen, entries // 2),
    )
    removed = [one.id for one in window]
    empty = not run.entries and not kept_ranges
    done = core.append(
        lambda _: Record(
            name_runs_added=[] if empty else [run],
            name_runs_removed=removed,
            strata_added=[] if empty else [added],
            strata_removed=removed,
            files_kept=core.is_remote,
        )
    )
    if done:
        remove_files(core, StratumKind.META, removed)
    if not done or empty:
        core.own_strata.delete(StratumKind.META, run.id)
    return done


SortedEntry: TypeAlias = tuple[bytes, int, int, bytes, int]
"""(name, inverted version, kind, value, expiry): sorts as a run wants it."""


def merged_columns(
    blocks: Sequence[Iterator[list[SortedEntry]]], ranges: list[Range], expired_ms: int, *, floor: int, bottom: int
) -> Iterator[Columns]:
    """The entries of several sources, merged block by block, without what nobody sees any more (see `_retained`).

    All versions of a name stand in one block of each source, and in one of the parts that come out. Those are of many
    blocks, of which whoever writes them makes full ones again; a round gives what is left of the shortest.
    """
    gathered: list[SortedEntry] = []
    size = 0
    waiting = [(entries, source) for source in blocks if (entries := next(source, []))]
    while waiting:
        pivot = min(entries[-1][0] for entries, _ in waiting)
        taken: list[SortedEntry] = []
        rest = []
        for entries, source in waiting:
            cut = bisect_right(entries, pivot, key=_name_of)
            taken += entries[:cut]
            # The versions of one name stand in one block, so the next block of a source begins behind the pivot.
            left = entries[cut:] or next(source, [])
            if left:
                rest.append((left, source))
        waiting = rest
        taken.sort()
        kept = _retained(taken, ranges, expired_ms, floor=floor, bottom=bottom)
        gathered += kept
        size += sum([len(entry[0]) + len(entry[3]) for entry in kept])
        if size >= _GATHERED_SIZE:
            yield _columns_of(gathered)
            gathered, size = [], 0
    if gathered:
        yield _columns_of(gathered)


def _columns_of(entries: list[SortedEntry]) -> Columns:
    names, inverted, kinds, values, expiries = zip(*entries, strict=True)
    return Columns(names, [~version for version in inverted], kinds, values, expiries)


def _name_of(entry: SortedEntry) -> bytes:
    return entry[0]


def run_entries(reader: RunReader, pause: Callable[[int], None] = never) -> Iterator[list[SortedEntry]]:
    """The entries of a run, block by block."""
    for number in range(len(reader.directory.firsts)):
        block = reader.block(number, keep=False)
        pause(2 * reader.directory.lengths[number])
        yield _entries_of(block)


def column_entries(columns: Columns) -> Iterator[list[SortedEntry]]:
    """The same of columns in memory: one block."""
    names, versions, kinds, values, expiries = columns
    yield list(zip(names, [~version for version in versions], kinds, values, expiries, strict=True))


def _entries_of(block: Block) -> list[SortedEntry]:
    count = len(block.names)
    versions = block.versions if block.versions is not None else [block.version] * count
    kinds = block.kinds if block.kinds is not None else [1] * count
    expiries = block.expiries if block.expiries is not None else [0] * count
    inverted = [~version for version in versions]
    return list(zip(block.names, inverted, kinds, block.values, expiries, strict=True))


def _retained(
    entries: list[SortedEntry], ranges: list[Range], expired_ms: int, *, floor: int, bottom: int
) -> list[SortedEntry]:
    """Drop what nobody at or above version `floor` sees: superseded entries, and those that a range deletion covers.

    Up to version `bottom`, at most `floor`, nothing older lies below, so that deletions and what expired may go
    as well.
    """
    if not ranges and len({entry[0] for entry in entries}) == len(entries):
        # One version of each name, as nearly always: 0.1 µs an entry, and not 0.7.
        return [
            entry
            for entry in entries
            if (entry[2] != ENTRY_DELETE and not 0 < entry[4] <= expired_ms) or ~entry[1] > bottom
        ]
    kept: list[SortedEntry] = []
    name, settled = None, False
    for entry in entries:
        if entry[0] != name:
            name, settled = entry[0], False
        elif settled:
            continue
        version = ~entry[1]
        if version <= floor:
            settled = True  # Older versions of this name are seen by nobody.
            if ranges and any(start <= entry[0] < stop and version < at <= floor for start, stop, at in ranges):
                continue
            if version <= bottom and (entry[2] == ENTRY_DELETE or 0 < entry[4] <= expired_ms):
                continue
        kept.append(entry)
    return kept


# --- grain indexes --------------------------------------------------------------------------------------------------


def merge_indexes(
    core: Core, sources: Sequence[tuple[int, StratumId, int]], pause: Callable[[int], None] = never
) -> bool:
    """Replace several grain indexes by one index run."""
    core.ensure_session()
    known = {index.id: index for index in core.locator.indexes}
    indexes = [known[identity] for _, identity, _ in sources if identity in known]
    if len(indexes) != len(sources):
        return False
    alive = core.state.strata
    strata = list(dict.fromkeys(one for index in indexes for one in index.directory.strata if one in alive))
    if len(strata) > INDEX_STRATA_MAX:
        return False
    count = count_alive(indexes, alive)
    run, added = write_index_run(core, strata, count, merge_entries(indexes, strata, pause))
    runs = {one.id for one in core.state.index_runs}
    removed = [identity for _, identity, _ in sources if identity in runs]
    done = core.append(
        lambda now: (
            Record(
                index_runs_added=[run],
                index_runs_removed=removed,
                strata_added=[added],
                strata_removed=removed,
                files_kept=core.is_remote,
            )
            if all(one in now.strata for one in strata)
            else None
        )
    )
    if done:
        remove_files(core, StratumKind.INDEX, removed)
    else:
        core.own_strata.delete(StratumKind.INDEX, run.id)
    return done


def count_alive(indexes: Sequence[IndexReader], alive: Container[StratumId]) -> int:
    """Entries of strata that still count. Reads every page only where some stratum went."""
    total = 0
    for index in indexes:
        if all(one in alive for one in index.directory.strata):
            total += index.directory.count
        else:
            total += sum(len(part) for part in _alive_parts(index, alive))
    return total


def _alive_parts(
    index: IndexReader, alive: Container[StratumId], slice_pages: int = _INDEX_SLICE_MAX
) -> Iterator[Entries]:
    counts = np.array([one in alive for one in index.directory.strata])
    for start in range(0, index.directory.page_count, slice_pages):
        entries = index.entries(start, min(index.directory.page_count, start + slice_pages))
        yield entries if counts.all() else entries[counts[entries["stratum"]]]


def merge_entries(
    indexes: Sequence[IndexReader], strata: list[StratumId], pause: Callable[[int], None]
) -> Iterator[Entries]:
    """Entries of several indexes, sorted, renumbered to `strata`, in bounded memory."""
    numbers = {identity: number for number, identity in enumerate(strata)}
    slice_pages = max(_INDEX_SLICE_MIN, min(_INDEX_SLICE_MAX, _INDEX_PAGES_HELD // max(1, len(indexes))))
    waiting = []
    for index in indexes:
        table = np.array([numbers.get(one, 0) for one in index.directory.strata], dtype=np.uint16)
        source = _alive_parts(index, numbers, slice_pages)
        part = _next_part(source, table)
        if part is not None:
            waiting.append((part, source, table))
    while waiting:
        pivot = min(int(part["prefix"][-1]) for part, _, _ in waiting)
        taken, rest = [], []
        for part, source, table in waiting:
            cut = int(np.searchsorted(part["prefix"], pivot, side="right"))
            taken.append(part[:cut])
            left: Entries | None = part[cut:]
            if left is not None and not len(left):
                left = _next_part(source, table)
            if left is not None:
                rest.append((left, source, table))
        waiting = rest
        merged = sort_entries(join_entries(taken))
        pause(2 * merged.nbytes)
        yield merged


def _next_part(source: Iterator[Entries], table: npt.NDArray[np.uint16]) -> Entries | None:
    for part in source:
        if len(part):
            renumbered = part.copy()
            renumbered["stratum"] = table[part["stratum"]]
            return renumbered
    return None


def write_index_run(
    core: Core, strata: list[StratumId], count: int, parts: Iterable[Entries]
) -> tuple[IndexRun, StratumAdded]:
    """Write an index run in a stratum of its own, durable, not yet in the log."""
    writer = core.own_strata.create(StratumKind.INDEX)
    writer.forgo_search()
    try:
        builder = IndexBuilder(strata, count, writer.tag_key, writer.id)
        _, location = append_index(writer, builder, parts)
        writer.finish_with(location)
        return IndexRun(writer.id, count, strata), writer.describe(FINISHED)
    except BaseException:
        core.own_strata.discard(writer)
        raise

"""Upkeep in the process: flush and merge names, merge indexes and small strata, checkpoint, drop old log.

It runs after a commit, in the thread that committed, so that memory, open files and the cost of a read stay bounded
without any other process. What is due is decided from the state by pure functions (`plan_...`); a step writes its
output durably, and then one record swaps it in. A step whose inputs changed meanwhile is refused by `State.apply` and
its output deleted.

Invariants:

- Nothing is dropped that a position at or above the history floor can see.
- Merging moves grains to another stratum and keeps every one of them; deciding what is dead is not this module's.
- A file is deleted only after the record that removed it is durable. Readers that still want it look its content up
  again.
"""

from __future__ import annotations

import contextlib
import os
import time
from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from basin.engine.hints import read_hint, write_hint
from basin.engine.index import IndexReader
from basin.engine.log import CHECKPOINT_FOLDER
from basin.engine.names import Range, RunReader
from basin.engine.runs import Columns, memtable_columns, write_run
from basin.engine.state import ACTIVE, FINISHED, State, last_version, state_to_map
from basin.engine.writer import StratumWriter, append_index
from basin.errors import (
    AlreadyExists,
    BasinError,
    CommitUnknown,
    CorruptionError,
    ObjectMissing,
    OutOfSpace,
    StorageUnavailable,
)
from basin.format.checkpoint import encode_checkpoint
from basin.format.index import Entries, IndexBuilder, join_entries, sort_entries
from basin.format.layout import (
    ENTRY_DELETE,
    INDEX_ENTRIES_MAX,
    INDEX_STRATA_MAX,
    MIB,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.names import Block
from basin.format.record import IndexRun, NameRun, Record, StratumAdded
from basin.format.scan import Damage, scan_grains
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

MERGE_WIDTH: Final = 4
"""Runs of one size class that are merged into one of the next: reads ask at most three runs a class."""
SMALL_STRATUM: Final = 4 * MIB
SMALL_STRATA_MAX: Final = 8
CHECKPOINTS_KEPT: Final = 2
KEPT_DELETED_MIN: Final = 16
"""Deleting kept files costs a record."""
_INDEX_SLICE_PAGES: Final = 64
"""Pages of each input that an index merge holds at a time: 256 KiB, and as much again while they are sorted."""


def upkeep(core: Core) -> None:
    """Do what is due. Called under the commit mutex, after a commit.

    A step that fails is not tried again by this handle: `check` names what is wrong, and the other steps go on.
    """
    if not core.session:
        return  # Nothing of this handle was committed: planning now could be overtaken by its session's begin.
    state = core.state
    structure = (state.strata, state.name_runs, state.index_runs)
    # Most commits only add a few names: nothing to merge that there was not after the last one.
    is_settled = bool(core.settled) and all(old is new for old, new in zip(core.settled, structure, strict=True))
    if is_settled and not is_flush_due(core) and not is_checkpoint_due(core):
        return
    for step in (
        _flush_names,
        _merge_runs,
        _merge_small_strata,
        _merge_index_runs,
        _checkpoint_log,
        _delete_kept_files,
    ):
        if step.__name__ in core.upkeep_problems:
            continue
        try:
            step(core)
        except (OutOfSpace, StorageUnavailable, CommitUnknown):
            core.settled = ()  # It passes: the next commit tries again.
            return
        except BasinError as error:
            core.upkeep_problems[step.__name__] = error
    state = core.state
    core.settled = (state.strata, state.name_runs, state.index_runs)


def is_flush_due(core: Core) -> bool:
    """Whether the names in memory exceed their budget, or are those of more records than an opener should replay."""
    table = core.current.tables.memtables[0]
    unflushed = core.state.position - core.state.flushed
    return table.size > core.options.memtable_size or (unflushed >= core.options.checkpoint_every and len(table) > 0)


def is_checkpoint_due(core: Core) -> bool:
    """Whether an opener would have to replay too much."""
    state = core.state
    return (
        state.flushed > core.checkpoint_position
        or state.position - core.checkpoint_position >= core.options.checkpoint_every
    )


def _flush_names(core: Core) -> None:
    if is_flush_due(core):
        flush(core)


def _merge_runs(core: Core) -> None:
    while (window := plan_names_merge(core.state.name_runs)) and merge_names(core, window):
        pass


def _merge_small_strata(core: Core) -> None:
    small = plan_strata_merge(core.state)
    if small:
        merge_strata(core, small)


def _merge_index_runs(core: Core) -> None:
    while (sources := plan_index_merge(core.state)) and merge_indexes(core, sources):
        pass


def _checkpoint_log(core: Core) -> None:
    if is_checkpoint_due(core) and not _somebody_did(core):
        raise_floor(core)
        checkpoint(core)


def _somebody_did(core: Core) -> bool:
    """Whether another writer of a bucket has just stored a checkpoint: every one of them finds that it is due."""
    hint = read_hint(core.storage) if core.is_remote else None
    if hint is not None and hint.checkpoint > core.checkpoint_position:
        core.checkpoint_position = hint.checkpoint
        return not is_checkpoint_due(core)
    return False


def _delete_kept_files(core: Core) -> None:
    """Delete files that were kept for readers at earlier positions, after `grace_s`; many at a time."""
    oldest_ms = time.time_ns() // 1_000_000 - int(core.options.grace_s * 1000)
    due = [identity for identity, (_, time_ms) in core.state.retired.items() if time_ms <= oldest_ms]
    if len(due) < KEPT_DELETED_MIN:
        return
    core.own_strata.delete_kept({identity: core.state.retired[identity].kind for identity in due})
    core.append(lambda now: Record(files_deleted=[identity for identity in due if identity in now.retired]))


def _remove_files(core: Core, kind: StratumKind, strata: Iterable[StratumId]) -> None:
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


def _size_class(size: int) -> int:
    """Sizes of one class differ by at most four times."""
    return max(0, (size >> 16).bit_length() // 2)


def plan_names_merge(runs: Sequence[NameRun]) -> Sequence[NameRun]:
    """Neighbouring runs to merge, or none. Runs stand in the order of the positions they cover.

    A run counts as one of the largest size class among itself and those that are newer, for it cannot be merged with
    older ones without them; four of a class are merged. So a class never has more than three, whatever the sizes
    are, and a byte is written again about once a class; merging whatever comes to four would write everything again
    each time.
    """
    classes: list[int] = []
    for run in reversed(runs):
        classes.append(max(_size_class(run.size), classes[-1] if classes else 0))
    classes.reverse()
    for number in sorted(set(classes)):
        start, count = classes.index(number), classes.count(number)
        if count >= MERGE_WIDTH:
            return runs[start : start + count]
    return []


def merge_names(core: Core, window: Sequence[NameRun]) -> bool:
    """Replace neighbouring runs by one, without what nobody at or above the floor can see."""
    core.ensure_session()
    state, tables = core.current
    wanted = {run.id for run in window}
    readers = [reader for reader in tables.runs if reader.run.id in wanted]
    ranges = [entry for reader in readers for entry in reader.ranges]
    floor = last_version(state.floor)
    # A deletion may go only when nothing older lies below it: in no other run, and not in the log behind `flushed`.
    bottom = min(floor, last_version(state.flushed)) if len(window) == len(state.name_runs) else 0
    kept_ranges = [entry for entry in ranges if entry[2] > bottom]
    run, added = write_run(
        core,
        _merged_columns(readers, ranges, state.expire_through_ms, floor=floor, bottom=bottom),
        kept_ranges,
        after=min(one.after for one in window),
        through=max(one.through for one in window),
        count_max=sum(one.entries for one in window),
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
        _remove_files(core, StratumKind.META, removed)
    if not done or empty:
        core.own_strata.delete(StratumKind.META, run.id)
    return done


_Entry = tuple[bytes, int, int, bytes, int]
"""(name, inverted version, kind, value, expiry): sorts as a run wants it."""


def _merged_columns(
    readers: Sequence[RunReader], ranges: list[Range], expired_ms: int, *, floor: int, bottom: int
) -> Iterator[Columns]:
    """The entries of several runs, merged block by block."""
    blocks = [_block_entries(reader) for reader in readers]
    waiting = [(entries, source) for source in blocks if (entries := next(source, []))]
    while waiting:
        pivot = min(entries[-1][0] for entries, _ in waiting)
        taken: list[_Entry] = []
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
        if kept:
            names, inverted, kinds, values, expiries = zip(*kept, strict=True)
            yield Columns(names, [~version for version in inverted], kinds, values, expiries)


def _name_of(entry: _Entry) -> bytes:
    return entry[0]


def _block_entries(reader: RunReader) -> Iterator[list[_Entry]]:
    for number in range(len(reader.directory.firsts)):
        block = reader.block(number, keep=False)
        yield _entries_of(block)


def _entries_of(block: Block) -> list[_Entry]:
    count = len(block.names)
    versions = block.versions if block.versions is not None else [block.version] * count
    kinds = block.kinds if block.kinds is not None else [1] * count
    expiries = block.expiries if block.expiries is not None else [0] * count
    inverted = [~version for version in versions]
    return list(zip(block.names, inverted, kinds, block.values, expiries, strict=True))


def _retained(entries: list[_Entry], ranges: list[Range], expired_ms: int, *, floor: int, bottom: int) -> list[_Entry]:
    """Drop what nobody at or above version `floor` sees: superseded entries, and those that a range deletion covers.

    Up to version `bottom` nothing older lies below, so that deletions and expired entries may go as well.
    """
    kept: list[_Entry] = []
    name, settled = None, False
    for entry in entries:
        if entry[0] != name:
            name, settled = entry[0], False
        elif settled:
            continue
        version = ~entry[1]
        if version <= floor:
            settled = True  # Older versions of this name are seen by nobody.
            if any(start <= entry[0] < stop and version < at <= floor for start, stop, at in ranges):
                continue
            if version <= bottom and (entry[2] == ENTRY_DELETE or 0 < entry[4] <= expired_ms):
                continue
        kept.append(entry)
    return kept


# --- grain indexes --------------------------------------------------------------------------------------------------


def plan_index_merge(state: State) -> list[tuple[int, StratumId, int]]:
    """Indexes to merge into one: (kind of the stratum that holds it, its id, entries); none if nothing is due."""
    covered = {identity for run in state.index_runs for identity in run.strata}
    names = {run.id for run in state.name_runs}
    sources = [(int(StratumKind.INDEX), run.id, run.entries) for run in state.index_runs]
    sources += [
        (known.added.kind, identity, known.added.grain_count)
        for identity, known in state.strata.items()
        if known.added.status == FINISHED
        and known.added.kind != StratumKind.INDEX
        and identity not in covered
        and identity not in names
    ]
    classes: dict[int, list[tuple[int, StratumId, int]]] = {}
    for source in sources:
        classes.setdefault(_entries_class(source[2]), []).append(source)
    for number in sorted(classes):
        group = classes[number]
        if len(group) >= MERGE_WIDTH and sum(source[2] for source in group) <= INDEX_ENTRIES_MAX:
            return group
    return []


def _entries_class(count: int) -> int:
    """Counts of one class differ by at most four times; all below 4,096 are one class."""
    return max(0, (count >> 12).bit_length() + 1) // 2


def merge_indexes(core: Core, sources: Sequence[tuple[int, StratumId, int]]) -> bool:
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
    count = _count_alive(indexes, alive)
    run, added = write_index_run(core, strata, count, _merge_entries(indexes, strata))
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
        _remove_files(core, StratumKind.INDEX, removed)
    else:
        core.own_strata.delete(StratumKind.INDEX, run.id)
    return done


def _count_alive(indexes: Sequence[IndexReader], alive: Container[StratumId]) -> int:
    """Entries of strata that still count. Reads every page only where some stratum went."""
    total = 0
    for index in indexes:
        if all(one in alive for one in index.directory.strata):
            total += index.directory.count
        else:
            total += sum(len(part) for part in _alive_parts(index, alive))
    return total


def _alive_parts(index: IndexReader, alive: Container[StratumId]) -> Iterator[Entries]:
    counts = np.array([one in alive for one in index.directory.strata])
    for start in range(0, index.directory.page_count, _INDEX_SLICE_PAGES):
        entries = index.entries(start, min(index.directory.page_count, start + _INDEX_SLICE_PAGES))
        yield entries[counts[entries["stratum"]]]


def _merge_entries(indexes: Sequence[IndexReader], strata: list[StratumId]) -> Iterator[Entries]:
    """Entries of several indexes, sorted, renumbered to `strata`, in bounded memory."""
    numbers = {identity: number for number, identity in enumerate(strata)}
    waiting = []
    for index in indexes:
        table = np.array([numbers.get(one, 0) for one in index.directory.strata], dtype=np.uint16)
        source = _alive_parts(index, numbers)
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
        yield sort_entries(join_entries(taken))


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
    try:
        builder = IndexBuilder(strata, count, writer.tag_key, writer.id)
        _, location = append_index(writer, builder, parts)
        writer.finish_with(location)
        return IndexRun(writer.id, count, strata), writer.describe(FINISHED)
    except BaseException:
        core.own_strata.discard(writer)
        raise


# --- small strata ---------------------------------------------------------------------------------------------------


def plan_strata_merge(state: State) -> list[StratumId]:
    """Small finished strata of one kind and size class, to become one; none if nothing is due."""
    names = {run.id for run in state.name_runs}
    classes: dict[tuple[int, int], list[StratumId]] = {}
    for identity, (added, _, condemned) in state.strata.items():
        if (
            added.status == ACTIVE
            or condemned
            or identity in names
            or added.kind == StratumKind.INDEX
            or added.length > SMALL_STRATUM
        ):
            continue
        classes.setdefault((added.kind, _size_class(added.length)), []).append(identity)
    for group in classes.values():
        if len(group) >= SMALL_STRATA_MAX:
            return group
    return []


def merge_strata(core: Core, small: Sequence[StratumId]) -> bool:
    """Copy all grains of small strata into one new stratum, and remove the small ones."""
    core.ensure_session()
    kind = StratumKind(core.state.strata[small[0]].added.kind)
    writer = core.own_strata.create(kind)
    try:
        for identity in small:
            _copy_grains(core, identity, writer)
        writer.finish()
    except BaseException:
        core.own_strata.discard(writer)
        raise
    added = writer.describe(FINISHED)
    gone = set(small)
    emptied = [run.id for run in core.state.index_runs if set(run.strata) <= gone]
    done = core.append(
        lambda now: (
            Record(
                strata_added=[added],
                strata_removed=[*small, *emptied],
                index_runs_removed=emptied,
                files_kept=core.is_remote,
            )
            if all(one in now.strata and not now.strata[one].condemned for one in small)
            else None
        )
    )
    if done:
        _remove_files(core, kind, small)
        _remove_files(core, StratumKind.INDEX, emptied)
    else:
        core.own_strata.delete(kind, writer.id)
    return done


def _copy_grains(core: Core, identity: StratumId, writer: StratumWriter) -> None:
    """Decrypt and seal again every grain of one stratum; raise `CorruptionError` at the first bad one."""
    known = core.state.strata[identity].added
    reader = core.readers.get(known.kind, identity)
    data = memoryview(reader.read_raw(0, known.length))
    stop = reader.grains_end(known.length, finished=known.status == FINISHED)
    for found in scan_grains(data, STRATUM_HEADER_SIZE, stop):
        if isinstance(found, Damage):
            raise reader.damage(found.offset, found.reason)
        header = found.header
        if header.kind in (Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY):
            continue
        plain = reader.unseal(bytes(data[found.offset : found.offset + header.stored_size]), found.offset)
        writer.append(header.kind, header.key, header.codec, header.flags, plain)


# --- checkpoints and old log ----------------------------------------------------------------------------------------


def checkpoint(core: Core) -> None:
    """Store the folded state, then drop older checkpoints and the log that nobody needs."""
    state = core.state
    with core.log.exclusive():
        core.log.settle()  # A checkpoint of records that a power cut takes back would be of no history.
    frame = encode_checkpoint(
        core.cipher,
        state.position,
        state_to_map(state),
        generation=core.keyring.generation,
        randomness=os.urandom(32),
    )
    with contextlib.suppress(AlreadyExists):
        core.storage.put_if_absent(f"{CHECKPOINT_FOLDER}/{state.position:020d}", frame)
    core.checkpoint_position = state.position
    if core.is_remote:
        positions = write_hint(core, checkpoint=state.position)
    else:
        positions = sorted(int(name) for name in core.storage.list(CHECKPOINT_FOLDER) if name.isdigit())
    for position in positions[:-CHECKPOINTS_KEPT]:
        core.storage.delete(f"{CHECKPOINT_FOLDER}/{position:020d}")
    kept = positions[-CHECKPOINTS_KEPT:]
    if len(kept) == CHECKPOINTS_KEPT:
        with contextlib.suppress(CorruptionError, ObjectMissing):
            older = core.read_checkpoint(f"{kept[0]:020d}")  # Whoever starts there needs its names from the log.
            needed = min(older.position, older.flushed, max(0, state.floor - 1))
            core.log.remove_through(needed, core.cursor, checkpoint=state.position, generation=core.keyring.generation)


def raise_floor(core: Core) -> None:
    """Let go of history that is older than `history_s`, or longer than `history_size`."""
    state = core.state
    oldest_ms = time.time_ns() // 1_000_000 - int(core.options.history_s * 1000)
    floor = max([mark.position for mark in state.marks if mark.time_ms <= oldest_ms], default=0)
    floor = max(floor, core.log.position_within(core.options.history_size))
    floor = min(floor, state.position, *state.pins.values())
    if floor > state.floor:
        core.append(lambda now: Record(floor=floor) if floor > now.floor else None)

"""Repair of sorted runs of names: their readable blocks, and what the log still says, go into a new run.

Invariants:

- Every block that proves to be what was written is kept, wherever the directory says it lies, and if there is none.
- Names in lost blocks come back from the log, as far as that reaches. Only what neither holds is lost.
- Range deletions stand twice in a run, in the directory and in a grain before it; and in the log.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from basin.engine.memtable import Memtable
from basin.engine.merging import SortedEntry, column_entries, merged_columns, remove_files
from basin.engine.names import Range
from basin.engine.repair_reading import DamagedStratum
from basin.engine.repair_tasks import RepairAction, Task, counted, impossible
from basin.engine.runs import Columns, memtable_columns, write_run
from basin.engine.state import State, first_version
from basin.engine.writer import stratum_name
from basin.errors import BasinError, CorruptionError, ObjectMissing
from basin.format.layout import ENTRY_INLINE, VERSION_BATCH_BITS, Kind, StratumKind
from basin.format.names import (
    Block,
    NamesDirectory,
    check_versions,
    decode_block,
    decode_directory,
    decode_ranges,
)
from basin.format.record import NameRun, Record, StratumAdded

if TYPE_CHECKING:
    from basin.engine.core import Core


class ReadableRun:
    """What can still be read of a run. `blocks` are in the order of their names."""

    def __init__(self, core: Core, run: NameRun, added: StratumAdded) -> None:
        """Reads all of it, and if something is lost the log behind `run.after`. Raises what is passing."""
        self.run = run
        self.blocks: list[Block] = []
        self.ranges: list[Range] | None = None
        self.from_log = Columns([], [], [], [], [])
        """Entries that no readable block holds."""
        self._directory: NamesDirectory | None = None
        damaged = DamagedStratum(core, added)
        self.is_missing = damaged.is_missing
        self.directory_at: tuple[int, int] = (0, 0)
        for grain in damaged.grains():
            with contextlib.suppress(CorruptionError):
                self._take(grain.kind, grain.payload.content)
                if grain.kind == Kind.NAMES_DIRECTORY:
                    self.directory_at = (grain.offset, grain.length)
        self.blocks.sort(key=lambda block: block.names[0])
        self._firsts = {block.names[0] for block in self.blocks}
        self._present: set[tuple[bytes, int]] | None = None
        self.are_ranges_known = self.ranges is not None
        if not self.is_whole:
            self._look_into_log(core)

    def _take(self, kind: int, content: bytes) -> None:
        version = self.run.version
        if kind == Kind.NAMES_BLOCK:
            block = decode_block(content)
            check_versions(block)
            self.blocks.append(replace(block, version=version, versions=None) if version else block)
        elif kind == Kind.NAMES_DIRECTORY:
            self._directory = decode_directory(content)
            self.ranges = [(start, stop, version or at) for start, stop, at in self._directory.ranges]
        elif kind == Kind.NAMES_RANGES and self.ranges is None:
            self.ranges = [(start, stop, version or at) for start, stop, at in decode_ranges(content)]

    @property
    def is_whole(self) -> bool:
        """Whether all blocks that the directory lists are readable, and it is, too."""
        return self._directory is not None and len(self.blocks) == len(self._directory.firsts)

    def versions(self) -> tuple[int, int]:
        """The lowest and the highest version in it; the first is 0 in a run of a batch that no record adopted."""
        found = [version for block in self.blocks for version in (block.versions or [block.version])]
        found += [version for _, _, version in self.ranges or ()]
        return min(found, default=0), max(found, default=0)

    @property
    def kept(self) -> int:
        """Entries of readable blocks."""
        return sum(len(block.names) for block in self.blocks)

    @property
    def lost(self) -> int:
        """Entries that nobody can give back."""
        return max(0, self.run.entries - self.kept - len(self.from_log.names))

    def _look_into_log(self, core: Core) -> None:
        """What the log says of the positions that the run covers, and of no other."""
        run, table, reached = self.run, Memtable(), self.run.after
        if run.after < run.through:
            with contextlib.suppress(CorruptionError, ObjectMissing):
                for entry in core.log.follow(core.log.cursor_before(run.after), names_from=run.after):
                    if entry.position > run.through or entry.position != reached + 1:
                        break
                    reached = entry.position
                    for number, batch in enumerate(entry.record.batches):
                        if entry.position not in core.state.voids:
                            table.apply(batch, first_version(entry.position) + number)
        if len(table):
            self.from_log = _chosen(memtable_columns(table), self._is_lost)
        if self.ranges is None:
            self.are_ranges_known = run.after < run.through == reached
            self.ranges = list(table.ranges)

    def _is_lost(self, name: bytes, version: int) -> bool:
        """Whether an entry that the log holds may have stood in what cannot be read."""
        if self._present is None:
            self._present = {
                (one, block.versions[number] if block.versions is not None else block.version)
                for block in self.blocks
                for number, one in enumerate(block.names)
            }
        if self._directory is None:
            return (name, version) not in self._present
        number = bisect_right(self._directory.firsts, name) - 1
        return number >= 0 and self._directory.firsts[number] not in self._firsts

    def parts(self) -> Iterator[Columns]:
        """All entries, as a new run wants them."""
        blocks = (entries for block in self.blocks for entries in column_entries(_columns_of(block)))
        sources: list[Iterator[list[SortedEntry]]] = [blocks]
        if self.from_log.names:
            sources.append(column_entries(self.from_log))
        return merged_columns(sources, [], 0, floor=0, bottom=0)


def _columns_of(block: Block) -> Columns:
    count = len(block.names)
    return Columns(
        block.names,
        block.versions if block.versions is not None else [block.version] * count,
        block.kinds if block.kinds is not None else [ENTRY_INLINE] * count,
        block.values,
        block.expiries if block.expiries is not None else [0] * count,
    )


def _chosen(columns: Columns, is_wanted: Callable[[bytes, int], bool]) -> Columns:
    """The entries whose name and version are wanted."""
    kept = [row for row in zip(*columns, strict=True) if is_wanted(row[0], row[1])]
    return Columns(*map(list, zip(*kept, strict=True))) if kept else Columns([], [], [], [], [])


def stray_run(core: Core, added: StratumAdded, after: int) -> NameRun | None:
    """How a record would describe a run of names that none describes; None unless it is whole, and newer than `after`.

    Of a batch that no record adopted nothing says when it happened: it is none.
    """
    unknown = NameRun(added.id, 0, 0, 0, 0, 0, 0, added.length, 0, 0)
    found = ReadableRun(core, unknown, added)
    low, high = found.versions()
    if not found.is_whole or low < first_version(after + 1):
        return None
    offset, length = found.directory_at
    through = high >> VERSION_BATCH_BITS
    return NameRun(added.id, after, through, 0, low, high, found.kept, added.length, offset, length)


def plan_run(core: Core, run: NameRun) -> Task:
    """What to do about a run of names that is not as it was written. Reads all of it."""
    name = stratum_name(StratumKind.META, run.id)
    try:
        found = ReadableRun(core, run, core.state.strata[run.id].added)
    except (BasinError, KeyError) as error:
        return impossible("names", name, f"cannot be read now: {error}")
    return Task(RepairAction("names", name, _detail(found)), partial(_rewrite, core, run))


def _detail(found: ReadableRun) -> str:
    kept, given = found.kept, len(found.from_log.names)
    total = counted(found.run.entries, "entry", "entries")
    detail = f"keep {kept} of {total}"
    if given:
        detail += f", and {given} that the log still has"
    if found.is_missing:
        detail += "; the file cannot be read: restore it from a copy first if there is one"
    if found.lost:
        detail += f"; {counted(found.lost, 'entry', 'entries')} lost: those names may show older values again"
    if not found.are_ranges_known:
        detail += "; names that a range deletion of this run covered may show again, too"
    return detail


def _rewrite(core: Core, run: NameRun) -> bool:
    """Write what can be read, and swap it in. False if the run went meanwhile."""
    known = core.state.strata.get(run.id)
    if known is None or run not in core.state.name_runs:
        return False
    found = ReadableRun(core, run, known.added)
    count, ranges = found.kept + len(found.from_log.names), found.ranges or []
    new: list[tuple[NameRun, StratumAdded]] = []
    if count or ranges:
        new.append(write_run(core, found.parts(), ranges, after=run.after, through=run.through, count_max=count))

    def build(now: State) -> Record | None:
        if run not in now.name_runs:
            return None
        return Record(
            name_runs_added=[one for one, _ in new],
            name_runs_removed=[run.id],
            strata_added=[added for _, added in new],
            strata_removed=[run.id],
            files_kept=core.is_remote,
        )

    if core.append(build):
        remove_files(core, StratumKind.META, [run.id])
        return True
    for _, added in new:
        core.own_strata.delete(StratumKind.META, added.id)
    return False

"""Writing sorted runs of names: from a memtable, from one large batch, from other runs.

Invariants: all versions of a name stand in one block; a run is durable before a record names it.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple

import zstandard
from blake3 import blake3

from basin.engine.memory import give_memory_back
from basin.engine.memtable import Memtable, versions_of
from basin.engine.state import FINISHED
from basin.engine.writer import StratumWriter
from basin.format.layout import MIB, NAMES_BLOCK_SIZE, Kind, StratumKind
from basin.format.names import FilterBuilder, encode_columns, encode_directory, encode_ranges
from basin.format.payload import compress
from basin.format.record import NameRun, StratumAdded
from basin.terms import Location

if TYPE_CHECKING:
    from basin.engine.core import Core

_ENTRY_OVERHEAD: Final = 8
"""Bytes of lengths in a block, per entry: version and kind are usually left out."""


class Columns(NamedTuple):
    """Sorted entries: names ascending, versions of one name descending."""

    names: Sequence[bytes]
    versions: Sequence[int]
    kinds: Sequence[int]
    values: Sequence[bytes]
    expiries: Sequence[int]

    def part(self, start: int, stop: int) -> Columns:
        """A stretch of the entries."""
        return Columns(
            self.names[start:stop],
            self.versions[start:stop],
            self.kinds[start:stop],
            self.values[start:stop],
            self.expiries[start:stop],
        )


class RunBuilder:
    """Writes sorted entries as blocks into a META stratum, and then their directory."""

    def __init__(self, writer: StratumWriter, core: Core, count_max: int) -> None:
        """`count_max`: entries at most."""
        self._writer = writer
        self._map = core.keyring.grain_keys
        self._compressor = zstandard.ZstdCompressor(level=core.options.compression_level)
        self._firsts: list[bytes] = []
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._last = b""
        self._filter = FilterBuilder(count_max)
        self._version_min, self._version_max = (1 << 64) - 1, 0
        self.entries = 0

    def add(self, columns: Columns) -> None:
        """Append entries that follow all those before. A name's versions must not be split between two calls."""
        names = columns.names
        if not names:
            return
        sizes = map(len, names), map(len, columns.values)
        ends = list(accumulate(map(lambda name, value: name + value + _ENTRY_OVERHEAD, *sizes)))
        start, reached = 0, 0
        while start < len(names):
            stop = max(start + 1, bisect_right(ends, reached + NAMES_BLOCK_SIZE))
            while stop < len(names) and names[stop] == names[stop - 1]:
                stop += 1
            self._add_block(columns.part(start, stop))
            start, reached = stop, ends[stop - 1]
        self._filter.add(names)
        lowest, highest = min(columns.versions), max(columns.versions)
        self._version_min, self._version_max = min(self._version_min, lowest), max(self._version_max, highest)
        self._last = names[-1]
        self.entries += len(names)

    def _add_block(self, columns: Columns) -> None:
        location = self._append(Kind.NAMES_BLOCK, encode_columns(*columns))
        self._firsts.append(columns.names[0])
        self._offsets.append(location.offset)
        self._lengths.append(location.length)

    def _append(self, kind: Kind, payload: bytes) -> Location:
        # A directory of that size is nearly all filter, which does not shrink and is copied often enough.
        codec, data = compress(payload, self._compressor if len(payload) < MIB else None)
        return self._writer.append(kind, self._map.grain_key(blake3(payload).digest()), codec, 0, data)

    def finish(
        self, ranges: list[tuple[bytes, bytes, int]], *, after: int, through: int
    ) -> tuple[NameRun, StratumAdded]:
        """Write ranges, directory, index and footer, durably; returns how a record describes run and stratum."""
        versions = [version for _, _, version in ranges]
        payload = self._directory(ranges)
        if ranges:
            self._append(Kind.NAMES_RANGES, encode_ranges(ranges))
        location = self._append(Kind.NAMES_DIRECTORY, payload)
        del payload  # A byte a name, which the index that follows has no use for.
        self._writer.finish()
        added = self._writer.describe(FINISHED)
        run = NameRun(
            self._writer.id,
            after,
            through,
            0,
            min([self._version_min, *versions]),
            max([self._version_max, *versions]),
            self.entries,
            added.length,
            location.offset,
            location.length,
        )
        return run, added

    def _directory(self, ranges: list[tuple[bytes, bytes, int]]) -> bytes:
        """The payload of the directory; what it is made of is let go of."""
        filter_bytes = self._filter.to_bytes()
        del self._filter
        firsts, self._firsts = self._firsts, []
        payload = encode_directory(
            entries=self.entries,
            firsts=firsts,
            last=self._last,
            offsets=self._offsets.tolist(),
            lengths=self._lengths.tolist(),
            ranges=ranges,
            filter_bytes=filter_bytes,
        )
        del filter_bytes
        if len(payload) >= MIB:
            give_memory_back()  # The filter's place is a little too small for the payload when it is sealed.
        return payload


def memtable_columns(table: Memtable) -> Columns:
    """All versions of all names of a memtable, sorted."""
    names = table.sorted_names()
    rows = [table.rows[name] for name in names]
    if any(row[4] is not None for row in rows):
        chains = [versions_of(row) for row in rows]
        names = [name for name, chain in zip(names, chains, strict=True) for _ in chain]
        rows = [row for chain in chains for row in chain]
    if not rows:
        return Columns([], [], [], [], [])
    versions, kinds, values, expiries, _ = zip(*rows, strict=True)
    return Columns(names, versions, kinds, values, expiries)


def write_run(
    core: Core,
    parts: Iterable[Columns],
    ranges: list[tuple[bytes, bytes, int]],
    *,
    after: int,
    through: int,
    count_max: int,
) -> tuple[NameRun, StratumAdded]:
    """A whole run of at most `count_max` entries in a stratum of its own, durable, not yet in the log."""
    writer = core.own_strata.create(StratumKind.META)
    writer.forgo_search()
    try:
        builder = RunBuilder(writer, core, count_max)
        for columns in parts:
            builder.add(columns)
        return builder.finish(ranges, after=after, through=through)
    except BaseException:
        core.own_strata.discard(writer)
        raise


def write_batch_run(core: Core, names: Memtable) -> tuple[NameRun, StratumAdded]:
    """The single changes of one large batch; versions are given by the record that adopts the run."""
    columns = memtable_columns(names)
    unset = Columns(columns.names, [0] * len(columns.names), columns.kinds, columns.values, columns.expiries)
    return write_run(core, [unset], [], after=0, through=0, count_max=len(unset.names))

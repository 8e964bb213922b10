"""The merged index of an export: one index run over all contents of a state, written wherever it is to stand.

Invariants: each grain of every stratum that counts is in it, also of strata that have no index yet; memory is bounded
by a few pages of each index, 44 bytes for each grain of a stratum without one, and 1.3 bytes an entry of the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.merging import count_alive, merge_entries, never
from basin.engine.reader import UNREADABLE
from basin.engine.rewrite import scanned_entries
from basin.engine.state import FINISHED, State
from basin.engine.writer import StratumWriter, append_index
from basin.errors import CorruptionError
from basin.format.index import Entries, IndexBuilder
from basin.format.layout import PAGE_ENTRIES, StratumKind
from basin.format.record import IndexRun, StratumAdded
from basin.storage.protocol import Storage
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core


def write_merged_index(
    core: Core, state: State, target: Storage, identity: StratumId
) -> tuple[IndexRun, StratumAdded] | None:
    """Write the index of all contents of `state` into `target`, as the stratum `identity`; None if there are none."""
    names = {run.id for run in state.name_runs}
    strata = [one for one, known in state.strata.items() if known.added.kind != StratumKind.INDEX and one not in names]
    if not strata:
        return None
    indexes = list(_indexes(core, state, strata))
    count = count_alive(indexes, set(strata))
    writer = StratumWriter(
        target, core.keyring, StratumKind.INDEX, session=0, identity=identity, key_material=os.urandom(32)
    )
    builder = IndexBuilder(strata, count, writer.tag_key, identity)
    _, directory = append_index(writer, builder, merge_entries(indexes, strata, never))
    writer.finish_with(directory)
    return IndexRun(identity, count, strata), writer.describe(FINISHED)


def _indexes(core: Core, state: State, strata: list[StratumId]) -> Iterator[IndexReader]:
    """Indexes that together hold every grain of `strata`."""
    covered: set[StratumId] = set()
    for run in state.index_runs:
        try:
            index = _open_index(core, StratumKind.INDEX, run.id)
        except UNREADABLE:
            continue  # A merged index that cannot be read is no loss: every stratum has its own.
        covered.update(run.strata)
        yield index
    for identity in strata:
        if identity not in covered:
            yield _index_of(core, state.strata[identity].added)


def _open_index(core: Core, kind: int, identity: StratumId) -> IndexReader:
    reader = core.readers.get(kind, identity)
    return IndexReader(reader, reader.directory(), Cache(0))


def _index_of(core: Core, added: StratumAdded) -> IndexReader:
    """A stratum's own index, or one made of its grains."""
    if added.status == FINISHED:
        try:
            return _open_index(core, added.kind, added.id)
        except CorruptionError:
            pass  # The grains say the same, or what is wrong with them.
    return cast(IndexReader, _ScannedIndex(added.id, scanned_entries(core, added)))


@dataclass(frozen=True, slots=True)
class _ScannedDirectory:
    strata: list[StratumId]
    count: int
    page_count: int


class _ScannedIndex:
    """Entries in memory, with the little of an `IndexReader` that a merge asks for."""

    def __init__(self, identity: StratumId, entries: Entries) -> None:
        self.directory = _ScannedDirectory([identity], len(entries), -(-len(entries) // PAGE_ENTRIES))
        self._entries = entries

    def entries(self, start_page: int, stop_page: int) -> Entries:
        """The entries of a range of pages."""
        return self._entries[start_page * PAGE_ENTRIES : stop_page * PAGE_ENTRIES]

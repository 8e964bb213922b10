"""`HotIndexes`: of strata whose contents may lie in the cold, the index runs that make their own indexes superfluous.

A finished stratum has its index at its own end. Where `data/` is cold, the entries of each finished data stratum wait
here, in memory, until they are written as one run into `index/`, before the record that adds the stratum. So a look-up
never opens a data stratum, neither this handle's nor anybody else's.

Invariants:

- A run is durable before any stratum that it covers leaves the spool, and stands in the record that adds them.
- At most `ENTRIES_HELD` entries, and those of one stratum, wait: 44 bytes each.

Owned by `OwnStrata`, under the contents' mutex.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from basin.engine.state import FINISHED
from basin.engine.writer import StratumWriter, append_index
from basin.format.index import Entries, IndexBuilder, IndexDirectory, join_entries, sort_entries
from basin.format.record import IndexRun, StratumAdded
from basin.terms import StratumId

ENTRIES_HELD: Final = 1 << 19
"""Four full strata."""
STRATA_HELD: Final = 1024


class HotIndexes:
    """The entries that wait, and the runs that no record names yet."""

    def __init__(self) -> None:
        self._waiting: list[tuple[StratumId, Entries]] = []
        self._count = 0
        self._runs: dict[StratumId, IndexRun] = {}

    def add(self, identity: StratumId, entries: Entries) -> None:
        """A data stratum is complete, and these are its grains, sorted."""
        self._waiting.append((identity, entries))
        self._count += len(entries)

    @property
    def is_full(self) -> bool:
        """Whether what waits should be written now."""
        return self._count > ENTRIES_HELD or len(self._waiting) >= STRATA_HELD

    def write(
        self,
        create: Callable[[], StratumWriter],
        discard: Callable[[StratumWriter], None],
        only: Collection[StratumId] | None = None,
    ) -> tuple[StratumAdded, list[StratumId], IndexDirectory] | None:
        """Write what waits (`only`: of these strata) as one run, durable; None if nothing does.

        Returns its stratum, the strata that it covers, and the index. After an error all of it waits on.
        """
        taken = [one for one in self._waiting if only is None or one[0] in only]
        if not taken:
            return None
        strata, count = [identity for identity, _ in taken], sum(len(entries) for _, entries in taken)
        writer = create()
        try:
            builder = IndexBuilder(strata, count, writer.tag_key, writer.id)
            payload, location = append_index(writer, builder, [_joined(taken)] if count else [])
            writer.finish_with(location)
        except BaseException:
            discard(writer)
            raise
        self._runs[writer.id] = IndexRun(writer.id, count, strata)
        self._waiting = [one for one in self._waiting if one[0] not in strata]
        self._count -= count
        return writer.describe(FINISHED), strata, IndexDirectory(payload, writer.tag_key, writer.id)

    def adopt(self, runs: Iterable[IndexRun]) -> None:
        """Runs that a worker wrote: a record will name them."""
        self._runs.update((run.id, run) for run in runs)

    def runs_of(self, added: Sequence[StratumAdded]) -> list[IndexRun]:
        """The runs whose strata are among `added`: what the record that adds those says of them."""
        return [self._runs[one.id] for one in added if one.id in self._runs]

    def held_back(self, sending: Collection[StratumId]) -> set[StratumId]:
        """Runs that cover any of `sending`, and all that they cover: one record adds those, when all are durable."""
        held: set[StratumId] = set()
        for run in self._runs.values():
            if any(one in sending for one in run.strata):
                held.update((run.id, *run.strata))
        return held

    def forget(self, run: StratumId) -> None:
        """A record names it, or never will."""
        self._runs.pop(run, None)

    def clear(self) -> None:
        """Nothing of this handle is logged any more."""
        self._waiting, self._count = [], 0


def _joined(taken: Sequence[tuple[StratumId, Entries]]) -> Entries:
    """The entries of several strata, sorted, with the strata's numbers."""
    parts = []
    for number, (_, entries) in enumerate(taken):
        renumbered = entries.copy()
        renumbered["stratum"] = number
        parts.append(renumbered)
    return sort_entries(join_entries(parts))

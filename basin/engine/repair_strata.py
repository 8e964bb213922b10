"""Repair of strata of contents and of merged indexes: what can be read is written anew, and one record swaps it in.

Invariants:

- Every grain that proves to be what was written goes into a new stratum; the damaged one leaves the log in the record
  that adds it.
- What cannot be read, and lies nowhere else, is recorded as damaged, so that putting it again heals it.
- A merged index is dropped: every stratum has an index of its own. Where `data/` is cold it is written anew instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.merging import remove_files, write_index_run
from basin.engine.recovery import is_dead
from basin.engine.repair_reading import DamagedStratum, ReadableGrain, readable_rows
from basin.engine.repair_tasks import NAMES_LISTED_MAX, RepairAction, Task, counted, impossible
from basin.engine.state import ACTIVE, FINISHED, State, Stratum
from basin.engine.tiers import is_cold
from basin.engine.verify import references, user_name
from basin.engine.writer import StratumWriter, stratum_name
from basin.errors import BasinError, CorruptionError, ObjectMissing, StorageError
from basin.format.index import Entries, IndexEntry, entries_of
from basin.format.layout import StratumKind
from basin.format.record import IndexRun, Record, StratumAdded
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core


# --- strata of contents -----------------------------------------------------------------------------------------------


def plan_stratum(core: Core, known: Stratum) -> Task:
    """What to do about a stratum of contents that is not as it was written. Reads all of it."""
    added = known.added
    name = stratum_name(added.kind, added.id)
    if added.status == ACTIVE and added.session in core.state.sessions and not _is_over(core, added.session):
        return impossible("stratum", name, f"session {added.session} is writing it: close that handle first")
    try:
        damaged = DamagedStratum(core, added)
        kept = sum(1 for _ in damaged.grains())
    except (BasinError, StorageError) as error:
        return impossible("stratum", name, f"cannot be read now: {error}")
    gone = _held_nowhere(core, damaged)
    detail = _detail(damaged, kept, len(gone))
    keys = tuple(key.hex() for key in gone[:NAMES_LISTED_MAX])
    action = RepairAction("stratum", name, detail, names=_names_of(core, gone), content_keys=keys)
    return Task(action, partial(_rewrite, core, added))


def _is_over(core: Core, session: int) -> bool:
    """Whether nobody writes in a session any more. What cannot be found out counts as alive."""
    if session == core.session:
        return False
    try:
        return is_dead(core, session)
    except StorageError:
        return False


def _detail(damaged: DamagedStratum, kept: int, gone: int) -> str:
    if damaged.is_missing:
        what = "let go of it: nothing of it can be read, so restore it from a copy first if there is one"
    elif not kept:
        what = "let go of it: no grain of it can be read"
    else:
        what = f"write {counted(kept, 'grain')} of it anew"
    if gone:
        return f"{what}; lost: {counted(gone, 'content')}"
    return what if not damaged.lost_stretches else f"{what}; what cannot be read lies elsewhere, or is in no index"


def _held_nowhere(core: Core, damaged: DamagedStratum) -> list[bytes]:
    """Content keys of what a stratum has lost, and no other grain holds."""
    content_key = core.keyring.grain_keys.content_key
    return [content_key(key) for key in damaged.lost if not _is_held(core, key, but=damaged.added.id)]


def _is_held(core: Core, key: bytes, *, but: StratumId) -> bool:
    for place in core.locator.find_all(key):
        if place.stratum != but:
            with contextlib.suppress(BasinError, KeyError):
                reader = core.readers.get(core.locator.kind_of(place.stratum), place.stratum)
                reader.read_grain(place.offset, place.length, key)
                return True
    return False


def _names_of(core: Core, keys: Iterable[bytes]) -> tuple[bytes, ...]:
    """Names that refer to contents, at most 100."""
    wanted = set(keys)
    names: list[bytes] = []
    if wanted:
        with contextlib.suppress(CorruptionError, StorageError):  # Names that cannot be read have tasks of their own.
            for name, key in references(core):
                if key in wanted and len(names) < NAMES_LISTED_MAX:
                    names += user_name(name)
    return tuple(names)


class Copier:
    """Writes grains into new strata of one kind."""

    def __init__(self, core: Core, kind: StratumKind) -> None:
        self._core = core
        self._kind = kind
        self._writer: StratumWriter | None = None
        self._strata: list[StratumAdded] = []
        self._entries: list[Entries] = []

    def add(self, grain: ReadableGrain) -> None:
        """Seal one grain again."""
        writer = self._writer
        if writer is None or writer.is_full:
            self._finish()
            writer = self._writer = self._core.own_strata.create(self._kind)
        writer.append(grain.kind, grain.key, grain.codec, grain.flags, grain.data)

    def _finish(self) -> None:
        if self._writer is not None:
            self._entries.append(self._writer.entries())
            self._writer.finish()
            self._strata.append(self._writer.describe(FINISHED))
            self._writer = None

    def finish(self) -> tuple[list[StratumAdded], list[IndexRun]]:
        """Make all durable; returns the new strata, and where contents are cold the runs of their indexes, too."""
        self._finish()
        runs = []
        if self._kind == StratumKind.DATA and is_cold(self._core.options):
            for added, entries in zip(list(self._strata), self._entries, strict=True):
                run, index = write_index_run(self._core, [added.id], len(entries), [entries])
                runs.append(run)
                self._strata.append(index)
        return self._strata, runs

    def discard(self) -> None:
        """Delete what was written; no record names it."""
        if self._writer is not None:
            self._core.own_strata.discard(self._writer)
            self._writer = None
        for added in self._strata:
            self._core.own_strata.delete(added.kind, added.id)
        self._strata = []


def _rewrite(core: Core, added: StratumAdded) -> bool:
    """Copy what can be read, and swap it in. False if the stratum is not any more what was looked at."""
    if not _is_still(core.state, added):
        return False
    damaged = DamagedStratum(core, added)
    copier = Copier(core, StratumKind(added.kind))
    try:
        for grain in damaged.grains():
            copier.add(grain)
        strata, runs = copier.finish()
    except BaseException:
        copier.discard()
        raise
    lost = [key for key in _held_nowhere(core, damaged) if key not in core.state.damaged]
    emptied = [run.id for run in core.state.index_runs if set(run.strata) <= {added.id}]

    def build(now: State) -> Record | None:
        if not _is_still(now, added):
            return None
        return Record(
            strata_added=strata,
            index_runs_added=runs,
            strata_removed=[added.id, *emptied],
            index_runs_removed=emptied,
            revived=[added.id] if now.strata[added.id].condemned else [],
            damaged=lost,
            files_kept=core.is_remote,
        )

    if not core.append(build):
        copier.discard()
        return False
    remove_files(core, StratumKind(added.kind), [added.id])
    remove_files(core, StratumKind.INDEX, emptied)
    return True


def _is_still(state: State, added: StratumAdded) -> bool:
    known = state.strata.get(added.id)
    return known is not None and known.added == added


# --- merged indexes ---------------------------------------------------------------------------------------------------


def plan_index_run(core: Core, run: IndexRun) -> Task:
    """What to do about a merged index that cannot be read, or lacks entries."""
    name = stratum_name(StratumKind.INDEX, run.id)
    if not is_cold(core.options):
        return Task(RepairAction("index", name, "drop it: every stratum has an index of its own"), _dropping(core, run))
    strata = _alive(core.state, run)
    rows, unknown = _cold_entries(core, run, strata)
    count = sum(map(len, rows.values()))
    detail = f"write a new one of {counted(count, 'entry', 'entries')}"
    if unknown:
        detail += f"; of {counted(len(unknown), 'stratum', 'strata')} it lacks some: thaw those, then repair again"
    return Task(RepairAction("index", name, detail), partial(_write_again, core, run))


def _alive(state: State, run: IndexRun) -> list[StratumId]:
    return [identity for identity in run.strata if identity in state.strata]


def _dropping(core: Core, run: IndexRun) -> partial[bool]:
    return partial(_swap_index, core, run, None, None)


def _swap_index(core: Core, run: IndexRun, new: IndexRun | None, added: StratumAdded | None) -> bool:
    """One record that removes a merged index, and adds another where there is one."""

    def build(now: State) -> Record | None:
        if run.id not in {one.id for one in now.index_runs}:
            return None
        return Record(
            index_runs_removed=[run.id],
            strata_removed=[run.id] if run.id in now.strata else [],
            index_runs_added=[new] if new is not None else [],
            strata_added=[added] if added is not None else [],
            files_kept=core.is_remote,
        )

    if core.append(build):
        remove_files(core, StratumKind.INDEX, [run.id])
        return True
    if added is not None:
        core.own_strata.delete(StratumKind.INDEX, added.id)
    return False


def _cold_entries(
    core: Core, run: IndexRun, strata: Sequence[StratumId]
) -> tuple[dict[StratumId, list[IndexEntry]], list[StratumId]]:
    """The entries of each stratum, and the strata of which some are missing.

    From their own indexes, where those can be read now; else from what can be read of the merged one.
    """
    rows: dict[StratumId, list[IndexEntry]] = {identity: [] for identity in strata}
    unread = []
    for identity in strata:
        added = core.state.strata[identity].added
        try:
            reader = core.readers.get(added.kind, identity)
            index = IndexReader(reader, reader.directory(), Cache(0))
            rows[identity] = [entry for number in range(index.directory.page_count) for entry in index.rows(number)]
        except BasinError:
            unread.append(identity)
    with contextlib.suppress(CorruptionError, ObjectMissing, IndexError):
        reader = core.readers.get(StratumKind.INDEX, run.id)
        for entry, stratum in readable_rows(IndexReader(reader, reader.directory(), Cache(0))):
            if stratum in unread:
                rows[stratum].append(entry)
    counts = {identity: core.state.strata[identity].added.grain_count for identity in strata}
    return rows, [identity for identity in strata if len(rows[identity]) < counts[identity]]


def _write_again(core: Core, run: IndexRun) -> bool:
    strata = _alive(core.state, run)
    if not strata:
        return _swap_index(core, run, None, None)
    rows, _ = _cold_entries(core, run, strata)
    renumbered = [entry._replace(stratum=number) for number, identity in enumerate(strata) for entry in rows[identity]]
    new, added = write_index_run(core, strata, len(renumbered), [entries_of(renumbered)])
    return _swap_index(core, run, new, added)

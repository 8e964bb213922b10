"""Repair of a log that rots: what it still says counts, and what it no longer says is cut off.

What counts, of a log that nobody can follow any more:

- The state of the newest checkpoint that is whole, and every record behind it that follows; without one, of the
  beginning.
- Behind a record that cannot be read, what readable records did to files: they are there, or gone. Names that were
  changed behind it count only as far as a run of names holds them: else history would have a hole that nobody sees.
- Strata of contents that are whole and in no record that is left: they are adopted.

That becomes the state at a new position behind all others, as a checkpoint; and stubs that name it stand where records
are damaged, and at that position. So whoever follows the log from anywhere reads the checkpoint.

Invariants: what is replaced is kept aside (`rot/`) first; the checkpoint comes last, and before it the basin is as it
was, one that can be repaired; a record that can be read stays where it is.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from basin.engine.checkpoints import checkpoint
from basin.engine.file_log import FileLog
from basin.engine.hints import write_hint
from basin.engine.log import CHECKPOINT_FOLDER, LOG_FOLDER
from basin.engine.logs import open_log
from basin.engine.memtable import Memtable
from basin.engine.merging import column_entries, flush, merged_columns, run_entries
from basin.engine.names import Tables, open_run, order_runs
from basin.engine.recovery import adoptable, stored_strata
from basin.engine.repair_names import stray_run
from basin.engine.repair_replay import replay
from basin.engine.repair_segments import end_log, put_stubs
from basin.engine.repair_survey import Gap, Survey, read_piece, survey_log
from basin.engine.repair_tasks import NAMES_LISTED_MAX, RepairAction, Task, counted, impossible
from basin.engine.runs import memtable_columns, write_run
from basin.engine.state import State, Stratum, first_version, fold, state_to_map
from basin.engine.verify import user_name
from basin.errors import (
    BasinError,
    BasinPoisoned,
    Conflict,
    CorruptionError,
    ObjectMissing,
    UnsupportedVersion,
)
from basin.format.checkpoint import encode_checkpoint
from basin.format.hint import Hint
from basin.format.layout import HASH_SIZE, StratumKind
from basin.format.record import NameRun, Record, StratumAdded
from basin.terms import Position

if TYPE_CHECKING:
    from basin.engine.core import Core


@dataclass(slots=True)
class Mended:
    """What a damaged log still says: the state at its end, and the names that are in no run."""

    survey: Survey
    state: State
    names: Memtable
    stray: list[tuple[NameRun, StratumAdded]]
    """Runs of names in the state that no readable record names."""
    unreadable: list[Position] = field(default_factory=list)
    """Records of which nothing is known."""
    cut: list[Position] = field(default_factory=list)
    """Readable records whose names do not count."""
    cut_names: dict[bytes, None] = field(default_factory=dict)


_salvaged: Final[weakref.WeakKeyDictionary[Core, Mended]] = weakref.WeakKeyDictionary()
"""Handles whose log could not be followed, and what they show instead."""


_BEGUN_MAX: Final = 10_000


# --- what counts ------------------------------------------------------------------------------------------------------


def mend(core: Core) -> Mended | None:
    """The state that a repair would leave; None if nothing leads to any. Writes nothing."""
    checkpoints = list(_checkpoints(core))
    survey = survey_log(core, max([state.position for state in checkpoints], default=0))
    begun = _last_begun(core, survey.end)
    if begun > survey.end:
        survey = survey_log(core, begun)
    for base in [*checkpoints, *([State()] if survey.first == 1 else [])]:
        following = survey.pieces.get(base.position + 1)
        if following is not None and not following.is_stub and following.previous != base.hash:
            continue  # Of another history than the log.
        return _mended(core, survey, base)
    return None


def _last_begun(core: Core, end: Position) -> Position:
    """The last session that strata tell of: there was a record at that position, though the log ends before.

    A later session must not have its number. A forged header must not cost more than `_BEGUN_MAX` stubs.
    """
    sessions = [header.session for _, _, header in stored_strata(core) if header is not None]
    return max((one for one in sessions if one <= end + _BEGUN_MAX), default=0)


def _checkpoints(core: Core) -> Iterator[State]:
    """Those that can be read, newest first."""
    for name in reversed(core.storage.list(CHECKPOINT_FOLDER)):
        with contextlib.suppress(CorruptionError, ObjectMissing, ValueError, UnsupportedVersion):
            yield core.read_checkpoint(name)


def _mended(core: Core, survey: Survey, base: State) -> Mended:
    state, void = base, set(base.voids)
    while survey.is_record(state.position + 1):
        piece = survey.pieces[state.position + 1]
        state, counts = fold(state, read_piece(core, piece), piece.hash)
        if not counts:
            void.add(state.position)
    followed = state.position
    behind = [at for at in range(followed + 1, survey.end + 1) if survey.is_record(at)]
    reached = _replayed(core, survey, state, behind, hole=survey.end + 1)
    stray = _stray_runs(core, reached)
    flushed = max([reached.flushed, *(run.through for run, _ in stray)])
    missing = [at for at in range(flushed + 1, survey.end + 1) if not survey.is_record(at)]
    hole = min((at for at in missing if at > followed), default=survey.end + 1)
    state = _replayed(core, survey, state, behind, hole)
    state = state._replace(
        position=survey.end,
        hash=survey.hash_of(survey.end) or bytes(HASH_SIZE),
        flushed=max(state.flushed, flushed),
        name_runs=(*state.name_runs, *(run for run, _ in stray)),
        strata={**state.strata, **{added.id: Stratum(added, survey.end, 0) for _, added in stray}},
    )
    mended = Mended(survey, state, Memtable(), stray, missing)
    for at in range(flushed + 1, survey.end + 1):
        if survey.is_record(at) and at not in void:
            record = read_piece(core, survey.pieces[at])
            if at <= followed or at < hole:
                for number, batch in enumerate(record.batches):
                    mended.names.apply(batch, first_version(at) + number)
            elif record.batches:
                _cut(mended, at, record)
    mended.state = _with_slots(core, _with_adopted(core, mended.state))
    return mended


def _replayed(core: Core, survey: Survey, state: State, behind: list[Position], hole: Position) -> State:
    """The state behind readable records, of which names count before `hole`."""
    for at in behind:
        piece = survey.pieces[at]
        state = replay(state, read_piece(core, piece), at, piece.hash, counts_names=at < hole)
    return state


def _stray_runs(core: Core, state: State) -> list[tuple[NameRun, StratumAdded]]:
    """Runs of names that were flushed behind all that the state has, by records that are lost. Oldest first."""
    found = []
    for kind, identity, header in stored_strata(core):
        is_known = identity in state.strata or identity in state.retired or identity in state.gone
        if kind == StratumKind.META and header is not None and not is_known:
            with contextlib.suppress(BasinError):
                added = adoptable(core, kind, header, holds_names=True)
                run = None if added is None else stray_run(core, added, state.flushed)
                found += [(run, added)] if run is not None and added is not None else []
    chosen: list[tuple[NameRun, StratumAdded]] = []
    for run, added in sorted(found, key=lambda one: (one[0].version_min, -one[0].version_max)):
        if not chosen or run.version_min > chosen[-1][0].version_max:
            chosen.append((run, added))
    return chosen


def _cut(mended: Mended, position: Position, record: Record) -> None:
    """Note the names that a record changed and that do not count."""
    mended.cut.append(position)
    for batch in record.batches:
        for name in (*batch.names, *batch.reference_names, *batch.deletes):
            if len(mended.cut_names) < NAMES_LISTED_MAX:
                mended.cut_names.update(dict.fromkeys(user_name(name)))


def _with_adopted(core: Core, state: State) -> State:
    """With the strata of contents that are whole, of sessions that no record which is left lets live."""
    strata = dict(state.strata)
    for kind, identity, header in stored_strata(core):
        is_known = identity in strata or identity in state.retired or identity in state.gone
        if is_known or header is None or header.session in state.sessions or kind == StratumKind.INDEX:
            continue
        with contextlib.suppress(BasinError):
            added = adoptable(core, kind, header)
            if added is not None:
                strata[identity] = Stratum(added, state.position, 0)
    return state._replace(strata=strata)


def _with_slots(core: Core, state: State) -> State:
    """With the slot that opened the basin, if the record that made it valid is lost."""
    slot = core.keyring.slot
    if slot is None or state.slots:
        return state
    return state._replace(slots={slot.slot_id: slot.public_key})


# --- opening what cannot be opened ------------------------------------------------------------------------------------


def load_anyhow(core: Core, hint: Hint | None = None) -> None:
    """`Core.load`; where the log is too damaged for that, show what a repair would leave, and write nothing.

    Raises what `load` raises if nothing leads to any state.
    """
    try:
        core.load(hint)
        _look_behind(core)
    except (CorruptionError, ObjectMissing) as error:
        if not _salvage(core, error):
            raise


def look_again(core: Core) -> None:
    """Of a handle that is open: no longer trust it if records lie behind the last that it could reach."""
    try:
        _look_behind(core)
    except (CorruptionError, ObjectMissing) as error:
        _salvage(core, error)


def _look_behind(core: Core) -> None:
    """See whether the log goes on behind the last record that can be reached. A small read for every stratum.

    In a bucket, a record that is gone looks like the end, but others are listed behind it; on a disk, what is left of
    a log without its end looks whole, but a stratum may tell of a session that began later. Raises `CorruptionError`.
    """
    if core.is_remote:
        last = max([int(name) for name in core.storage.list(LOG_FOLDER) if name.isdigit()], default=0)
        if last > core.state.position:
            for _ in core.log.follow(core.cursor, at_least=last):
                pass
    if _last_begun(core, core.state.position) > core.state.position:
        core.catch_up()  # It may have begun since.
        begun = _last_begun(core, core.state.position)
        if begun > core.state.position:
            text = f"the log ends at position {core.state.position}, and a session began at {begun}"
            raise CorruptionError(text, object=LOG_FOLDER, offset=0)


def _salvage(core: Core, error: BasinError) -> bool:
    """Show what can be read; False if nothing leads to any state."""
    mended = mend(core)
    if mended is None:
        return False
    _show(core, mended)
    _salvaged[core] = mended
    core.poisoned = BasinPoisoned(
        f"the log is damaged ({error.message}): this handle shows what can be read; run `basin repair`",
        dropped=[],
        position=mended.state.position,
    )
    return True


def _show(core: Core, mended: Mended) -> None:
    state = mended.state
    core.readers.logged = state.strata
    opened = [open_run(run, core.readers) for run in state.name_runs]
    core._publish(state, Tables((mended.names,), order_runs(opened)))


def is_salvaged(core: Core) -> bool:
    """Whether `load_anyhow` could not load it."""
    return core in _salvaged


# --- tasks ------------------------------------------------------------------------------------------------------------


def plan_log(core: Core) -> Iterator[Task]:
    """What to do about a log that is damaged: of a handle that could not be loaded, and of one that could."""
    mended = _salvaged.get(core)
    survey = mended.survey if mended is not None else survey_log(core, core.state.position)
    if mended is not None:
        action = RepairAction("log", _first_name(survey), _detail(mended), names=tuple(mended.cut_names))
        yield Task(action, partial(_store, core, mended))
        return
    for piece in survey.unchained():
        yield impossible("log", "log", f"record {piece.position} does not follow the one before: it is skipped")
    healing = _Healing(core)
    detail = "put stubs that name a checkpoint in the place of damaged records, and keep those aside"
    for gap in survey.gaps:
        if gap.missing or not gap.start:
            yield Task(RepairAction("log", gap.name, f"{detail}: {_lost(gap)}"), partial(healing.run, gap))
        else:
            yield impossible("log", gap.name, f"{gap.reason}: no record is missing, but these bytes are none")


def _first_name(survey: Survey) -> str:
    return survey.gaps[0].name if survey.gaps else "log"


def _lost(gap: Gap) -> str:
    if not gap.missing:
        return gap.reason
    which = f"position {gap.first}" if gap.missing == 1 else f"positions {gap.first} to {gap.last}"
    return f"{gap.reason}; of {which}, the time and the list of changes are lost, and no name"


def _detail(mended: Mended) -> str:
    survey, kept = mended.survey, mended.state.position - len(mended.unreadable) - len(mended.cut)
    size = sum(max(0, gap.stop - gap.start) for gap in survey.gaps)
    parts = [f"store what the log still says as a checkpoint at position {survey.end + 1}"]
    if mended.unreadable:
        at = ", ".join(map(str, mended.unreadable[:10])) + ("" if len(mended.unreadable) <= 10 else ", …")
        lost = counted(len(mended.unreadable), "record")
        parts.append(f"{lost} cannot be read (at {at}; {size} bytes): the names that they changed are lost")
    if mended.cut:
        parts.append(f"{counted(len(mended.cut), 'record')} behind them do not count: see the names")
    parts.append(f"{kept} count; what is replaced is kept in rot/")
    return "; ".join(parts)


class _Healing:
    """Puts stubs into the log of a handle that knows the state behind all gaps: with the first task, into all."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._is_done = False

    def run(self, gap: Gap) -> bool:
        """Whether the gap is filled."""
        core = self._core
        if not self._is_done:
            _settle(core, max(gap.last, *(one.last for one in survey_log(core, core.state.position).gaps), 0))
            self._fill()
            self._is_done = True
        gaps = survey_log(core, core.state.position).gaps
        return all((one.name, one.start) != (gap.name, gap.start) for one in gaps)

    def _fill(self) -> None:
        core = self._core
        survey = survey_log(core, core.state.position)
        gaps = [gap for gap in survey.gaps if gap.missing or not gap.start]
        if isinstance(core.log, FileLog) and any(gap.segment == core.cursor.segment for gap in gaps):
            # A segment that goes on is open in other processes, too, which would append to what is replaced.
            with core.log.exclusive():
                core.catch_up()
                core.cursor = core.log.end_segment(core.cursor, core.state.hash)
        put_stubs(core, survey, core.checkpoint_position, gaps)


def _settle(core: Core, position: Position) -> None:
    """See to a checkpoint above `position` whose names are all in runs: nobody follows the log from below it then."""
    with contextlib.suppress(CorruptionError, ObjectMissing):
        state = core.read_checkpoint(f"{core.checkpoint_position:020d}")
        if min(state.position, state.flushed) >= position:
            return
    core.ensure_session()
    if not flush(core):
        _flush_nothing(core)
    checkpoint(core)


def _flush_nothing(core: Core) -> None:
    """A run without names says that all names up to here are in runs."""
    state = core.state
    run, added = write_run(core, [], [], after=state.flushed, through=state.position, count_max=0)
    done = core.append(
        lambda now: Record(name_runs_added=[run], strata_added=[added]) if now.flushed == state.flushed else None
    )
    if not done:
        core.own_strata.delete(StratumKind.META, run.id)


# --- storing what counts ----------------------------------------------------------------------------------------------


def _store(core: Core, mended: Mended) -> bool:
    """Make a mended state that of the basin; then load it as everybody will."""
    survey = mended.survey
    position, digest = survey.end + 1, os.urandom(HASH_SIZE)
    state = mended.state
    core.poisoned = None
    core.own_strata.session = position  # Of no session that lives: what it writes counts by the checkpoint alone.
    try:
        runs = _names_in_run(core, mended, position)
        try:
            end_log(core, survey, position, digest)
        except Conflict:
            for _, added in runs:
                core.own_strata.delete(StratumKind.META, added.id)
            raise
        stray = {run.id for run, _ in mended.stray}  # They are in one of `runs`, in a file of our own.
        strata = {one: known for one, known in state.strata.items() if one not in stray}
        strata |= {added.id: Stratum(added, position, 0) for _, added in runs}
        stored = state._replace(
            position=position,
            hash=digest,
            time_ms=max(state.time_ms, time.time_ns() // 1_000_000),
            flushed=position,
            name_runs=(*(run for run in state.name_runs if run.id not in stray), *(run for run, _ in runs)),
            strata=strata,
        )
        frame = encode_checkpoint(
            core.cipher,
            position,
            state_to_map(stored),
            generation=core.keyring.generation,
            randomness=os.urandom(32),
        )
        core.storage.put_if_absent(f"{CHECKPOINT_FOLDER}/{position:020d}", frame)
    except BaseException as error:
        core.poison(error)
        raise
    finally:
        core.own_strata.session = 0
    del _salvaged[core]
    if core.is_remote:
        write_hint(core, checkpoint=position)
    core.log.close()
    core.log = open_log(core.storage, core.cipher, core.keyring.basin_id, core.options)
    core.load()
    for run, _ in mended.stray:
        core.own_strata.delete(StratumKind.META, run.id)
    return True


def _names_in_run(core: Core, mended: Mended, position: Position) -> list[tuple[NameRun, StratumAdded]]:
    """The names that are in no run of the state, in one; nothing if there are none."""
    stray = [open_run(run, core.readers) for run, _ in mended.stray]
    columns = memtable_columns(mended.names)
    ranges = [*mended.names.ranges, *(entry for run in stray for entry in run.ranges)]
    count = len(columns.names) + sum(run.run.entries for run in stray)
    if not count and not ranges:
        return []
    sources = [*map(run_entries, stray), *([column_entries(columns)] if columns.names else [])]
    parts = merged_columns(sources, [], 0, floor=0, bottom=0)
    after = min([mended.state.flushed, *(run.run.after for run in stray)])
    return [write_run(core, parts, ranges, after=after, through=position, count_max=count)]

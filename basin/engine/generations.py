"""Generations of the master key that come to an end: what still needs one, and how it is dropped.

Invariants:

- A generation is dropped by one record, when nothing that counts is sealed under it: no stratum, no record that an
  opener or a reader of history may read, no checkpoint, no stub. Its keys are deleted behind that record, by
  `finish_drops`, which does what a kill has left undone.
- The log goes only behind two checkpoints, under a newer generation, that hold it.
- Before any key is deleted, every valid slot has those of the generations that stay.

A rotation's own record is the last one under the old generation: whoever appends behind it has read it. So the log of
a generation ends at one position, behind which nothing needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from basin.engine.checkpoints import checkpoint
from basin.engine.file_log import SEGMENT_SIZE, FileLog, segment_name
from basin.engine.hints import read_hint, write_hint
from basin.engine.keyring import delete_generation_files, list_slots
from basin.engine.keyspace import REGISTRY_KEYSPACE, prefix_of
from basin.engine.log import CHECKPOINT_FOLDER
from basin.engine.merging import flush
from basin.engine.object_log import ObjectLog, record_name
from basin.engine.state import ACTIVE, State, Stratum
from basin.engine.writer import stratum_name
from basin.errors import Conflict, CorruptionError, InvalidArgument, ObjectMissing, StorageUnavailable
from basin.format.layout import (
    ENTRY_DELETE,
    FRAME_HEADER_SIZE,
    FRAME_SIZE_MAX,
    RECORD_MAGIC,
    SEGMENT_HEADER_SIZE,
    STUB_MAGIC,
)
from basin.format.record import Record, decode_frame_header
from basin.format.slots import generation_name, parse_generation_name
from basin.terms import Position

if TYPE_CHECKING:
    from basin.engine.core import Core

USES_LISTED_MAX: Final = 100
_ATTEMPTS: Final = 8
_MAGIC_AT: Final = 8
"""Where the magic stands in a frame."""
_SEGMENT_MAX: Final = SEGMENT_SIZE + FRAME_SIZE_MAX
"""A segment is no larger, whatever its last record is."""
_NO_KEYSPACE: Final = prefix_of(REGISTRY_KEYSPACE)
"""A full name that nothing has: the names of keyspaces are not empty."""
_ADVICE: Final = {
    "strata": "run `basin-compact`, which writes them anew",
    "condemned strata": "run `basin-compact` once more when their grace is over",
    "active strata": "let the handles that write them commit again, or close them",
    "records of history": "wait until history has passed them, or give it up: --forget-history, forget_history=True",
    "pins": "let those who hold the positions let go of them",
    "pieces of log": "dropping the generation removes them",
    "checkpoints": "dropping the generation replaces them",
}


@dataclass(frozen=True, slots=True)
class GenerationUse:
    """What needs a generation: `kind` and `count`, at most `USES_LISTED_MAX` names of files, and what to do about it.

    Kinds are "strata", "condemned strata", "active strata"; "records of history", which `at`, `changes` and `log` may
    read; "pins", positions that somebody holds; "pieces of log", segments or objects, and "checkpoints".
    """

    kind: str
    count: int
    objects: tuple[str, ...]
    advice: str


def _use(kind: str, names: Collection[str], count: int | None = None) -> GenerationUse:
    listed = tuple(name for name, _ in zip(names, range(USES_LISTED_MAX), strict=False))
    return GenerationUse(kind, len(names) if count is None else count, listed, _ADVICE[kind])


def generation_uses(core: Core, generation: int) -> list[GenerationUse]:
    """What still needs a generation, at the position that this handle last caught up with; empty: it can be dropped.

    Cost: on a disk, at most the segments of the log; in a bucket, a list and a request of 64 bytes for each record up
    to where the generation's log ends.
    """
    wanted = frozenset({generation})
    reach = log_reach(core, wanted)
    return [
        *strata_uses(core.state, wanted),
        *history_uses(core.state, reach),
        *_stored_uses(core, wanted, reach),
    ]


def strata_uses(state: State, generations: Collection[int]) -> list[GenerationUse]:
    """The strata of a state that are sealed under some of these generations. Pure."""
    kinds: dict[str, list[str]] = {}
    for known in state.strata.values():
        if known.added.generation in generations:
            kinds.setdefault(_stratum_kind(known), []).append(stratum_name(known.added.kind, known.added.id))
    return [_use(kind, names) for kind, names in kinds.items()]


def _stratum_kind(known: Stratum) -> str:
    if known.condemned:
        return "condemned strata"
    return "active strata" if known.added.status == ACTIVE else "strata"


def history_uses(state: State, reach: Position) -> list[GenerationUse]:
    """What may read the log up to `reach`: history from its floor on, and pins. Pure."""
    pins = [position for position in state.pins.values() if position <= reach]
    first = max(state.floor, 1)
    return [
        *([_use("records of history", (), reach - first + 1)] if reach >= first else ()),
        *([_use("pins", (), len(pins))] if pins else ()),
    ]


def log_reach(core: Core, generations: Collection[int]) -> Position:
    """The last position that has to be history before the log of these generations can go; 0: there is none.

    On a disk whole segments go, so that it is the end of one.
    """
    log, state = core.log, core.state
    if isinstance(log, FileLog):
        held = segments_of(core, generations)
        return log.last_held(held[-1], state.position) if held else 0
    if isinstance(log, ObjectLog):
        return log.last_of(generations, state.floor, state.position)
    return 0


def segments_of(core: Core, generations: Collection[int]) -> list[int]:
    """The segments of a log on a disk that hold anything sealed under these generations, also such as does not count.

    Cost: a small read for each segment that begins with them or with later ones, all of it for others.
    """
    log = core.log
    found = log.segments() if isinstance(log, FileLog) else []
    return [segment for segment in found if _holds(core, segment_name(segment), generations)]


def _holds(core: Core, name: str, generations: Collection[int]) -> bool:
    with contextlib.suppress(ObjectMissing):  # Another handle has just removed it.
        start = core.storage.read_file(name, SEGMENT_HEADER_SIZE + FRAME_HEADER_SIZE)
        with contextlib.suppress(CorruptionError):  # Empty, or what a crash left: the whole of it tells.
            first = decode_frame_header(start, SEGMENT_HEADER_SIZE)
            if first.magic == RECORD_MAGIC and first.generation > max(generations):
                return False
        return any(one in generations for one in _generations_in(core.storage.read_file(name, _SEGMENT_MAX)))
    return False


def _generations_in(data: bytes) -> Iterator[int]:
    """Those of whatever begins like a frame. It need not be whole: also a part of one is sealed."""
    for magic in (RECORD_MAGIC, STUB_MAGIC):
        at = data.find(magic)
        while at >= 0:
            with contextlib.suppress(CorruptionError):
                yield decode_frame_header(data, at - _MAGIC_AT).generation
            at = data.find(magic, at + 1)


def _stored_uses(core: Core, generations: Collection[int], reach: Position) -> list[GenerationUse]:
    log = _stored_log(core, generations, reach)
    checkpoints = list(_checkpoints_of(core, generations))
    return [
        *([_use("pieces of log", log)] if log else ()),
        *([_use("checkpoints", checkpoints)] if checkpoints else ()),
    ]


def _stored_log(core: Core, generations: Collection[int], reach: Position) -> list[str]:
    """Segments, or objects, of the log that hold anything sealed under these generations."""
    log = core.log
    if isinstance(log, FileLog):
        return [segment_name(segment) for segment in segments_of(core, generations)]
    if isinstance(log, ObjectLog):
        return [record_name(position) for position in _positions_of(core, log, generations, reach)]
    return []


def _positions_of(core: Core, log: ObjectLog, generations: Collection[int], reach: Position) -> list[Position]:
    """The records and stubs of these generations: up to `reach`, or below the floor if history has passed them."""
    return log.positions_of(generations, reach or max(0, core.state.floor - 1))


def _checkpoints_of(core: Core, generations: Collection[int]) -> Iterator[str]:
    """The checkpoints that are sealed under some of these generations."""
    for name in core.storage.list(CHECKPOINT_FOLDER):
        path = f"{CHECKPOINT_FOLDER}/{name}"
        with contextlib.suppress(CorruptionError, ObjectMissing):
            if decode_frame_header(core.storage.read_file(path, FRAME_HEADER_SIZE)).generation in generations:
                yield path


# --- dropping -------------------------------------------------------------------------------------------------------


def drop_generations(core: Core, generations: Iterable[int], *, forget_history: bool) -> list[int]:
    """Drop generations, none of which is the newest, once nothing needs them; returns those that were not dropped yet.

    The log and the checkpoints under them are removed (in a bucket, records become stubs under the newest generation).
    `forget_history`: history that still needs them is given up first. Each step leaves a basin that opens, and calling
    this again goes on where it broke off.

    Raises `InvalidArgument` (fields `generations`, `uses`) while anything else needs them; `Conflict` if others brought
    back a use meanwhile.
    """
    core.require_writable()
    core.refresh()
    wanted = sorted(set(generations) - core.state.generations_dropped)
    for generation in wanted:
        if not 0 <= generation < core.state.generation:
            raise InvalidArgument(
                f"only generations before {core.state.generation}, which is in use, can be dropped",
                generation=generation,
            )
    if wanted:
        _require_unused(wanted, strata_uses(core.state, wanted))
        _require_keys(core, wanted)
        _let_go_of_log(core, wanted, forget_history=forget_history)
        _require_unused(wanted, strata_uses(core.state, wanted))
        if not core.append(lambda now: _drop_record(now, wanted)):
            raise Conflict("others wrote under these generations meanwhile, or dropped them: try again", uses=[])
    finish_drops(core)
    return wanted


def _drop_record(state: State, generations: Collection[int]) -> Record | None:
    left = [generation for generation in generations if generation not in state.generations_dropped]
    return Record(generations_dropped=left) if left == list(generations) else None


def _require_unused(generations: Collection[int], uses: list[GenerationUse]) -> None:
    if not uses:
        return
    needs = "; ".join(f"{use.count} {use.kind}: {use.advice}" for use in uses)
    shown = ", ".join(map(str, generations))
    raise InvalidArgument(
        f"generation {shown} of the keys is still needed by {needs}", generations=list(generations), uses=uses
    )


def _require_keys(core: Core, going: Collection[int]) -> None:
    """Every valid slot opens what stays: else its secret would open nothing once the old keys are gone."""
    state = core.state
    needed = {state.generation, *(known.added.generation for known in state.strata.values())}.difference(going)
    for slot in list_slots(core.storage, core.keyring.basin_id):
        missing = sorted(needed.difference(slot.generations)) if slot.slot_id in state.slots else ()
        if missing:
            name = generation_name(slot.slot_id, missing[0])
            raise CorruptionError(f"{name} is gone: restore it, or remove the slot and add it again", object=name)


def _let_go_of_log(core: Core, generations: Collection[int], *, forget_history: bool) -> None:
    """Remove, or replace, all log and all checkpoints under these generations."""
    end_segment(core, generations)
    reach = log_reach(core, generations)
    if forget_history:
        _raise_floor(core, reach)
    _require_unused(generations, history_uses(core.state, reach))
    if not _stored_uses(core, generations, reach):
        return
    core.ensure_session()
    _flush_through(core, reach)
    for _ in range(2):  # One might be damaged, and then nothing but the other could tell what the log did.
        if not core.append(lambda _: Record()):
            raise Conflict("the session of this handle was ended by another writer: reopen the basin", uses=[])
        with core.commit_mutex:
            checkpoint(core)
    log = core.log
    if isinstance(log, ObjectLog):
        positions = _positions_of(core, log, generations, reach)
        log.replace(positions, checkpoint=core.checkpoint_position, generation=core.keyring.generation)
    for name in list(_checkpoints_of(core, generations)):
        core.storage.delete(name)
    core.storage.sync_folder(CHECKPOINT_FOLDER)
    _require_unused(generations, _stored_uses(core, generations, reach))


def end_segment(core: Core, generations: Collection[int]) -> None:
    """On a disk: end the segment that is appended to if it holds log of these generations. Then it can go as a whole.

    An error leaves a handle that writes no more, as that of a commit does.
    """
    log = core.log
    if not isinstance(log, FileLog):
        return
    with core.commit_mutex, log.exclusive():
        core.catch_up()
        if core.cursor.segment not in segments_of(core, generations):
            return
        try:
            core.cursor = log.end_segment(core.cursor, core.state.hash)
        except BaseException as error:
            core.poison(error)
            raise


def _raise_floor(core: Core, reach: Position) -> None:
    """Give up the history up to `reach`, as far as no pin holds it."""
    if reach < max(core.state.floor, 1) or any(position <= reach for position in core.state.pins.values()):
        return
    if core.state.position <= reach:
        core.append(lambda _: Record())  # The floor is a position behind `reach`, and there has to be one.
    core.append(lambda now: Record(floor=reach + 1) if now.floor <= reach else None)


def _flush_through(core: Core, reach: Position) -> None:
    """Write names as runs until an opener needs no record up to `reach` for them.

    It reads the log from where names are flushed, also if no name was changed since; and nothing but a run of names
    moves that. So where there is none to write, a name is deleted that nothing has.
    """
    for _ in range(_ATTEMPTS):
        if core.state.flushed >= reach:
            return
        if not len(core.current.tables.memtables[0]):
            core.put_row(_NO_KEYSPACE, ENTRY_DELETE, b"")
            core.commit_pending()
        with core.commit_mutex:
            core.catch_up()
            flush(core)
    raise StorageUnavailable("others flush the names of this basin all the time", object="log", operation="flush")


def finish_drops(core: Core) -> int:
    """Delete what is left of generations that the log says were dropped: their keys, and checkpoints under them.

    Idempotent; for whoever drops, and for whoever looks after what others left. Free of cost while none was dropped;
    then a list for each slot, and one of the checkpoints. Returns how many files went.
    """
    dropped = core.state.generations_dropped
    if not dropped:
        return 0
    removed = delete_generation_files(core.storage, core.keyring.basin_id, dropped)
    left = list(_checkpoints_of(core, dropped))  # Of somebody who was slow to store it; older than those that count.
    for name in left:
        core.storage.delete(name)
    _forget_hinted_keys(core)
    return removed + len(left)


def _forget_hinted_keys(core: Core) -> None:
    """The hint of a bucket has copies of the keys: it must not keep those of dropped generations."""
    if core.is_remote and _hints_dropped(core):
        write_hint(core, keys_changed=True)
        if _hints_dropped(core):
            raise StorageUnavailable(
                "log/hint still holds keys of a dropped generation: try again", object="log/hint", operation="put"
            )


def _hints_dropped(core: Core) -> bool:
    hint = read_hint(core.storage)
    names = hint.keys if hint is not None else ()
    return any(parse_generation_name(name.rpartition("/")[2]) in core.state.generations_dropped for name in names)

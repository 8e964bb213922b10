"""The state of a basin at one log position, and the rules by which a record changes it.

`apply(state, record)` is pure: it returns the next state or raises `Conflict`. `fold` is what everybody who follows the
log uses: a stored record that breaks a rule is void, and all skip it by this same test.

Rules (each found necessary by an explicit-state model; numbers as in the design):

1. A record follows the hash of the one before, and its session is live and counts on from its last sequence number. A
   stratum is added by its own session, or by the record that ends or revokes that; never again after it was removed.
2. A stored record that breaks a rule is void.
3. (Read sets are the appender's business; they are not stored.)
4. A condemn is refused if a listed stratum was relied on after its mark; a kill unless all are still condemned by it.
5. Reviving one stratum of a condemn revives all of it.
6. Every stratum relied on is live, or condemned and revived by the same record. (A rewrite that leaves grains out
   because a copy of them lies elsewhere relies on that; a record that adds grains relies on what they link to.)
7. A flushed run of names covers (flushed, through]; any other start is refused.
8. The history floor only rises, never above a pin; pins below it are refused.
9. Expiry moves forward only, and stays an hour behind the record's clock.
10. A key generation is dropped once, never the newest, and never one of a stratum in the state; from then on no stratum
    of it is added.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final, NamedTuple

from basin.errors import Conflict, CorruptionError
from basin.format.layout import STRATUM_ACTIVE, STRATUM_CUT, STRATUM_FINISHED, VERSION_BATCH_BITS
from basin.format.record import (
    IndexRun,
    NameRun,
    Record,
    StratumAdded,
    generation_number,
    index_run,
    name_run,
    plain_bytes,
    plain_text,
    stratum_added,
    stratum_id,
    unsigned,
)
from basin.terms import Head, Position, StratumId

ACTIVE: Final = STRATUM_ACTIVE
FINISHED: Final = STRATUM_FINISHED
CUT: Final = STRATUM_CUT

EXPIRY_LAG_MS: Final = 3_600_000
_MARK_EVERY_MS: Final = 10_000
EMPTY_HASH: Final = bytes(32)


def first_version(position: Position) -> int:
    """The version of the first batch of the record at `position`."""
    return position << VERSION_BATCH_BITS


def last_version(position: Position) -> int:
    """The highest version visible at `position`."""
    return (position + 1 << VERSION_BATCH_BITS) - 1


class Stratum(NamedTuple):
    """A stratum in the state: what the log says of it, the last position that relied on it, its condemn (0: live)."""

    added: StratumAdded
    relied: Position
    condemned: Position


class Retired(NamedTuple):
    """A stratum that a record removed or killed, and whose file may still be there.

    What was removed stays for those who still read at an earlier position. What was killed has had its time, and stands
    here so that a file is never forgotten.
    """

    kind: int
    time_ms: int
    """The clock of the record that removed or condemned it."""


class Mark(NamedTuple):
    """When a position was written, for deciding what is old."""

    position: Position
    time_ms: int


class State(NamedTuple):
    """All that the log says at `position`, but for the names themselves. Never changed in place."""

    position: Position = 0
    hash: bytes = EMPTY_HASH
    time_ms: int = 0
    sessions: dict[int, int] = {}  # noqa: RUF012  # never changed in place
    """Live sessions and the last sequence number of each."""
    strata: dict[StratumId, Stratum] = {}  # noqa: RUF012  # never changed in place
    condemns: dict[Position, list[StratumId]] = {}  # noqa: RUF012  # never changed in place
    condemned_ms: dict[Position, int] = {}  # noqa: RUF012  # never changed in place
    """The clock of each condemn that stands."""
    name_runs: tuple[NameRun, ...] = ()
    index_runs: tuple[IndexRun, ...] = ()
    flushed: Position = 0
    floor: Position = 0
    expire_through_ms: int = 0
    pins: dict[bytes, Position] = {}  # noqa: RUF012  # never changed in place
    slots: dict[str, bytes] = {}  # noqa: RUF012  # never changed in place
    generation: int = 0
    damaged: frozenset[bytes] = frozenset()
    marks: tuple[Mark, ...] = ()
    voids: tuple[Position, ...] = ()
    named: Position = 0
    """The last position that changed a name."""
    seen_ms: dict[int, int] = {}  # noqa: RUF012  # never changed in place
    """Live sessions and the clock of the last record of each."""
    jobs: dict[int, str] = {}  # noqa: RUF012  # never changed in place
    """Live sessions that are of a job."""
    retired: dict[StratumId, Retired] = {}  # noqa: RUF012  # never changed in place
    gone: dict[StratumId, Position] = {}  # noqa: RUF012  # never changed in place
    """Strata that were removed or killed while their session lives, and the session: who takes over from that must not
    take the file, which may still be there, for one that was never logged."""
    generations_dropped: frozenset[int] = frozenset()
    """Key generations whose keys are deleted, or will be: nothing that counts is sealed under them."""

    @property
    def head(self) -> Head:
        """Position and record hash."""
        return Head(self.position, self.hash)


def fold(state: State, record: Record, record_hash: bytes) -> tuple[State, bool]:
    """The state after a *stored* record, and whether the record counts (False: void)."""
    try:
        return apply(state, record, record_hash), True
    except Conflict:
        position = state.position + 1
        voids = (*state.voids, position)
        return state._replace(position=position, hash=record_hash, voids=voids), False


def apply(state: State, record: Record, record_hash: bytes) -> State:
    """The next state, or `Conflict` with the rule that the record breaks."""
    if record.previous != state.hash:
        raise Conflict("the record follows another one than the last", rule=1)
    position = state.position + 1
    changed: dict[str, Any] = {"position": position, "hash": record_hash, "time_ms": record.time_ms}
    sessions = changed["sessions"] = _apply_session(state, record, position)
    own = position if record.session_begun else record.session
    seen_ms = {session: state.seen_ms.get(session, state.time_ms) for session in sessions}
    if own in seen_ms:
        seen_ms[own] = record.time_ms
    changed["seen_ms"] = seen_ms
    if record.job or state.jobs:
        jobs = {**state.jobs, **({position: record.job} if record.session_begun and record.job else {})}
        changed["jobs"] = {session: job for session, job in jobs.items() if session in sessions}
    if record.batches:
        changed["named"] = position
    if _touches_strata(record):
        changed["strata"], changed["condemns"] = _apply_strata(state, record, position)
        if changed["condemns"] or state.condemned_ms:
            known_ms = {**state.condemned_ms, position: record.time_ms}
            changed["condemned_ms"] = {condemn: known_ms.get(condemn, 0) for condemn in changed["condemns"]}
    if record.strata_removed or record.killed or state.gone:
        changed["gone"] = _apply_gone(state, changed.get("strata", state.strata), sessions)
    if (record.files_kept and (record.strata_removed or record.killed)) or record.files_deleted:
        changed["retired"] = _apply_retired(state, record)
    if record.name_runs_added or record.name_runs_removed:
        changed["name_runs"], changed["flushed"] = _apply_name_runs(state, record, position)
    if record.index_runs_added or record.index_runs_removed:
        changed["index_runs"] = _apply_index_runs(state, record)
    if record.floor or record.pins_added or record.pins_removed:
        changed["floor"], changed["pins"] = _apply_floor(state, record)
    if record.expire_through_ms:
        if not state.expire_through_ms <= record.expire_through_ms <= record.time_ms - EXPIRY_LAG_MS:
            raise Conflict("expiry moves forward only, an hour behind the clock", rule=9)
        changed["expire_through_ms"] = record.expire_through_ms
    if record.slots_added or record.slots_removed or record.generation:
        changed["slots"], changed["generation"] = _apply_slots(state, record)
    if record.generations_dropped or (state.generations_dropped and record.strata_added):
        changed["generations_dropped"] = _apply_drops(state, record, changed.get("strata", state.strata))
    if record.damaged:
        changed["damaged"] = state.damaged | frozenset(record.damaged)
    if not state.marks or record.time_ms - state.marks[-1].time_ms >= _MARK_EVERY_MS:
        kept = tuple(mark for mark in state.marks if mark.position >= state.floor)
        changed["marks"] = (*kept, Mark(position, record.time_ms))
    return state._replace(**changed)


def _apply_session(state: State, record: Record, position: Position) -> dict[int, int]:
    sessions = dict(state.sessions)
    if record.session_begun:
        if record.session or record.sequence != 1:
            raise Conflict("a session begins with sequence 1", rule=1)
        sessions[position] = 1
    else:
        last = sessions.get(record.session)
        if last is None:
            raise Conflict(f"session {record.session} has ended or was revoked", rule=1, session=record.session)
        if record.sequence != last + 1:
            raise Conflict(f"session {record.session} counts on from {last}", rule=1, session=record.session)
        sessions[record.session] = record.sequence
    for ended in (*record.sessions_ended, *record.sessions_revoked):
        if sessions.pop(ended, None) is None:
            raise Conflict(f"session {ended} has ended already", rule=1, session=ended)
    return sessions


def _touches_strata(record: Record) -> bool:
    return bool(
        record.strata_added
        or record.strata_removed
        or record.relied
        or record.condemned
        or record.revived
        or record.killed
    )


def _apply_strata(
    state: State, record: Record, position: Position
) -> tuple[dict[StratumId, Stratum], dict[Position, list[StratumId]]]:
    strata, condemns = dict(state.strata), dict(state.condemns)
    for revived in record.revived:
        _revive(strata, condemns, revived)
    for relied in record.relied:
        known = strata.get(relied)
        if known is None or known.condemned:
            raise Conflict(f"stratum {relied} is gone or condemned", rule=6, stratum=relied)
        strata[relied] = known._replace(relied=position)
    for removed in record.strata_removed:
        known = strata.pop(removed, None)
        if known is None or known.condemned:
            raise Conflict(f"stratum {removed} is no longer live", rule=4, stratum=removed)
    for added in record.strata_added:
        _add_stratum(strata, state.gone, added, record, position)
    for mark, listed in record.condemned:
        for identity in listed:
            known = strata.get(identity)
            if known is None or known.condemned or known.relied > mark or known.added.status == ACTIVE:
                raise Conflict(f"stratum {identity} was relied on after {mark}", rule=4, stratum=identity)
            strata[identity] = known._replace(condemned=position)
        condemns.setdefault(position, []).extend(listed)
    for condemn, listed in record.killed:
        if sorted(condemns.get(condemn, ())) != sorted(listed) or not listed:
            raise Conflict(f"condemn {condemn} no longer stands", rule=4)
        for identity in listed:
            del strata[identity]
        del condemns[condemn]
    return strata, condemns


def _revive(strata: dict[StratumId, Stratum], condemns: dict[Position, list[StratumId]], revived: StratumId) -> None:
    """Rule 5: all of the condemn comes back."""
    known = strata.get(revived)
    if known is None:
        raise Conflict(f"stratum {revived} is gone", rule=5, stratum=revived)
    for identity in condemns.pop(known.condemned, ()):
        strata[identity] = strata[identity]._replace(condemned=0)


def _apply_gone(state: State, strata: dict[StratumId, Stratum], sessions: dict[int, int]) -> dict[StratumId, Position]:
    """Strata that went, now or earlier, while their session lives."""
    went = {identity: known.added.session for identity, known in state.strata.items() if identity not in strata}
    return {identity: session for identity, session in {**state.gone, **went}.items() if session in sessions}


def _add_stratum(
    strata: dict[StratumId, Stratum],
    gone: Collection[StratumId],
    added: StratumAdded,
    record: Record,
    position: Position,
) -> None:
    """A new stratum, or the next length or status of an active one."""
    known = strata.get(added.id)
    if added.id in gone:
        raise Conflict(f"stratum {added.id} was removed before", rule=1, stratum=added.id)
    owners = {record.session, *record.sessions_revoked, *record.sessions_ended}
    if record.session_begun:
        owners.add(position)
    if added.session not in owners:
        raise Conflict(f"stratum {added.id} belongs to session {added.session}", rule=1, stratum=added.id)
    if known is not None:
        before = known.added
        if before.status != ACTIVE or before.session != added.session or added.length < before.length:
            raise Conflict(f"stratum {added.id} was finished before", rule=1, stratum=added.id)
    strata[added.id] = Stratum(added, position, 0)


def _apply_retired(state: State, record: Record) -> dict[StratumId, Retired]:
    """Files that are kept, and those that are gone now."""
    retired = dict(state.retired)
    for deleted in record.files_deleted:
        retired.pop(deleted, None)  # Somebody else may have deleted it at the same time.
    for removed in record.strata_removed if record.files_kept else ():
        retired[removed] = Retired(state.strata[removed].added.kind, record.time_ms)
    for condemn, killed in record.killed if record.files_kept else ():
        for identity in killed:
            retired[identity] = Retired(state.strata[identity].added.kind, state.condemned_ms.get(condemn, 0))
    return retired


def _apply_name_runs(state: State, record: Record, position: Position) -> tuple[tuple[NameRun, ...], Position]:
    runs = {run.id: run for run in state.name_runs}
    flushed = state.flushed
    adopted = {batch.run: index for index, batch in enumerate(record.batches) if batch.run}
    for removed in record.name_runs_removed:
        if runs.pop(StratumId(removed), None) is None:
            raise Conflict(f"run of names {removed} is gone", rule=7, run=removed)
    for run in record.name_runs_added:
        if run.id in adopted:
            version = first_version(position) + adopted[run.id]
            run = run._replace(
                after=position, through=position, version=version, version_min=version, version_max=version
            )
        elif not record.name_runs_removed:
            if run.after != flushed or not flushed < run.through <= state.position:
                raise Conflict(f"names are flushed up to {flushed}, not {run.after}", rule=7)
            flushed = run.through
        runs[run.id] = run
    return tuple(sorted(runs.values(), key=lambda run: (run.through, run.after))), flushed


def _apply_index_runs(state: State, record: Record) -> tuple[IndexRun, ...]:
    runs = {run.id: run for run in state.index_runs}
    for removed in record.index_runs_removed:
        if runs.pop(StratumId(removed), None) is None:
            raise Conflict(f"index run {removed} is gone", rule=7, run=removed)
    for run in record.index_runs_added:
        runs[run.id] = run
    return tuple(runs.values())


def _apply_floor(state: State, record: Record) -> tuple[Position, dict[bytes, Position]]:
    pins, floor = dict(state.pins), state.floor
    for identity in record.pins_removed:
        pins.pop(identity, None)
    for identity, pinned in record.pins_added:
        if pinned < floor:
            raise Conflict(f"position {pinned} is below the history floor {floor}", rule=8)
        pins[identity] = pinned
    if record.floor:
        lowest = min(pins.values(), default=state.position)
        if not floor <= record.floor <= min(lowest, state.position):
            raise Conflict(f"the history floor cannot move from {floor} to {record.floor}", rule=8)
        floor = record.floor
    return floor, pins


def _apply_slots(state: State, record: Record) -> tuple[dict[str, bytes], int]:
    slots = {**state.slots, **{slot.id: slot.public_key for slot in record.slots_added}}
    for identity in record.slots_removed:
        if slots.pop(identity, None) is None:
            raise Conflict(f"key slot {identity} is gone", rule=1, slot=identity)
    if state.slots and not slots:
        raise Conflict("the last key slot stays", rule=1)
    generation = record.generation or state.generation
    if record.generation and record.generation <= state.generation:
        raise Conflict(f"key generation {generation} does not follow {state.generation}", rule=1)
    return slots, generation


def _apply_drops(state: State, record: Record, strata: dict[StratumId, Stratum]) -> frozenset[int]:
    """Rule 10. `strata` are those after the record."""
    for generation in record.generations_dropped:
        if generation >= state.generation:
            raise Conflict(f"key generation {generation} is not older than {state.generation}", rule=10)
        if generation in state.generations_dropped:
            raise Conflict(f"key generation {generation} was dropped before", rule=10)
        if any(known.added.generation == generation for known in strata.values()):
            raise Conflict(f"strata of key generation {generation} still count", rule=10)
    for added in record.strata_added:
        if added.generation in state.generations_dropped:
            raise Conflict(
                f"stratum {added.id} was written under key generation {added.generation}, which was dropped since: "
                "reopen the basin, and write it again",
                rule=10,
                stratum=added.id,
                generation=added.generation,
            )
    return state.generations_dropped.union(record.generations_dropped)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def state_to_map(state: State) -> dict[str, Any]:
    """The state as MessagePack can hold it; `state_from_map` reads it."""
    return {
        "position": state.position,
        "hash": state.hash,
        "time_ms": state.time_ms,
        "sessions": list(state.sessions.items()),
        "strata": [list(known) for known in state.strata.values()],
        "condemns": list(state.condemns.items()),
        "condemned_ms": list(state.condemned_ms.items()),
        "name_runs": state.name_runs,
        "index_runs": state.index_runs,
        "flushed": state.flushed,
        "floor": state.floor,
        "expire_through_ms": state.expire_through_ms,
        "pins": list(state.pins.items()),
        "slots": list(state.slots.items()),
        "generation": state.generation,
        "damaged": sorted(state.damaged),
        "marks": state.marks,
        "voids": state.voids,
        "named": state.named,
        "seen_ms": list(state.seen_ms.items()),
        "jobs": list(state.jobs.items()),
        "gone": list(state.gone.items()),
        "retired": [[identity, *known] for identity, known in state.retired.items()],
        "generations_dropped": sorted(state.generations_dropped),
    }


def state_from_map(fields: dict[str, Any]) -> State:
    """Undo `state_to_map`; raise `CorruptionError` on anything else. Unknown fields are skipped."""
    try:
        strata = {}
        for added, relied, condemned in fields["strata"]:
            described = stratum_added(added)
            strata[described.id] = Stratum(described, unsigned(relied), unsigned(condemned))
        return State(
            position=unsigned(fields["position"]),
            hash=plain_bytes(fields["hash"]),
            time_ms=unsigned(fields["time_ms"]),
            sessions={unsigned(session): unsigned(sequence) for session, sequence in fields["sessions"]},
            strata=strata,
            condemns={unsigned(at): [stratum_id(one) for one in listed] for at, listed in fields["condemns"]},
            name_runs=tuple(name_run(run) for run in fields["name_runs"]),
            index_runs=tuple(index_run(run) for run in fields["index_runs"]),
            flushed=unsigned(fields["flushed"]),
            floor=unsigned(fields["floor"]),
            expire_through_ms=unsigned(fields["expire_through_ms"]),
            pins={plain_bytes(identity): unsigned(pinned) for identity, pinned in fields["pins"]},
            slots={plain_text(identity): plain_bytes(public) for identity, public in fields["slots"]},
            generation=generation_number(fields["generation"]),
            damaged=frozenset(plain_bytes(key) for key in fields["damaged"]),
            marks=tuple(Mark(unsigned(position), unsigned(time_ms)) for position, time_ms in fields["marks"]),
            voids=tuple(unsigned(position) for position in fields["voids"]),
            # Absent in checkpoints of earlier versions.
            condemned_ms={unsigned(at): unsigned(ms) for at, ms in fields.get("condemned_ms", ())},
            named=unsigned(fields.get("named", fields["position"])),
            seen_ms={unsigned(session): unsigned(ms) for session, ms in fields.get("seen_ms", ())},
            jobs={unsigned(session): plain_text(job) for session, job in fields.get("jobs", ())},
            gone={stratum_id(identity): unsigned(session) for identity, session in fields.get("gone", ())},
            retired={
                stratum_id(identity): Retired(unsigned(kind), unsigned(ms))
                for identity, kind, ms in fields.get("retired", ())
            },
            generations_dropped=frozenset(generation_number(one) for one in fields.get("generations_dropped", ())),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptionError("a checkpoint is malformed") from error

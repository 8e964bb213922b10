"""The state behind damaged records: what a readable record does where the one before it cannot be read.

`apply` refuses a record that does not follow the state; here its effect on files is taken all the same, because files
that it removed are gone, and those that it added are there. Names that it changed are another matter: who calls says
whether they count.

Invariants: pure; never raises; what names nothing that is known has no effect.
"""

from __future__ import annotations

from typing import Any

from basin.engine.state import Retired, State, Stratum, first_version
from basin.format.record import NameRun, Record
from basin.terms import Position, StratumId


def flushed_by(record: Record) -> Position:
    """Up to which position a record says that names are in runs; 0 if it flushes none."""
    if record.name_runs_removed:
        return 0
    adopted = {batch.run for batch in record.batches if batch.run}
    return max((run.through for run in record.name_runs_added if run.id not in adopted), default=0)


def replay(state: State, record: Record, position: Position, digest: bytes, *, counts_names: bool) -> State:
    """`state` with the effect of the record at `position`, whose chain hash is `digest`, as far as it has one.

    `counts_names`: else the batches are left out, and the record is listed among those that everybody skips.
    """
    changed: dict[str, Any] = {"position": position, "hash": digest, "time_ms": max(state.time_ms, record.time_ms)}
    changed |= _sessions(state, record, position)
    changed |= _strata(state, record, position)
    went = {one: known.added.session for one, known in state.strata.items() if one not in changed["strata"]}
    gone = {**state.gone, **went}
    changed["gone"] = {one: session for one, session in gone.items() if session in changed["sessions"]}
    changed["name_runs"] = _name_runs(state, record, position, counts_names=counts_names)
    changed["flushed"] = max(state.flushed, flushed_by(record))
    runs = {run.id: run for run in state.index_runs if run.id not in record.index_runs_removed}
    changed["index_runs"] = tuple((runs | {run.id: run for run in record.index_runs_added}).values())
    changed["floor"] = max(state.floor, min(record.floor, position))
    pins = {one: at for one, at in state.pins.items() if one not in record.pins_removed}
    changed["pins"] = pins | {pin.id: pin.position for pin in record.pins_added}
    changed["expire_through_ms"] = max(state.expire_through_ms, record.expire_through_ms)
    slots = {one: key for one, key in state.slots.items() if one not in record.slots_removed}
    changed["slots"] = slots | {slot.id: slot.public_key for slot in record.slots_added}
    changed["generation"] = max(state.generation, record.generation)
    changed["generations_dropped"] = state.generations_dropped.union(record.generations_dropped)
    changed["damaged"] = state.damaged.union(record.damaged)
    if record.batches and counts_names:
        changed["named"] = position
    elif record.batches:
        changed["voids"] = (*state.voids, position)
    return state._replace(**changed)


def _sessions(state: State, record: Record, position: Position) -> dict[str, Any]:
    """A session that is met for the first time began in a record that is lost: it can be revoked like any other."""
    own = position if record.session_begun else record.session
    sessions = {**state.sessions, own: record.sequence}
    for ended in (*record.sessions_ended, *record.sessions_revoked):
        sessions.pop(ended, None)
    seen_ms = {**state.seen_ms, own: record.time_ms}
    jobs = {**state.jobs, **({own: record.job} if record.job else {})}
    return {
        "sessions": sessions,
        "seen_ms": {one: seen_ms.get(one, record.time_ms) for one in sessions},
        "jobs": {one: job for one, job in jobs.items() if one in sessions},
    }


def _strata(state: State, record: Record, position: Position) -> dict[str, Any]:
    strata, condemns, retired = dict(state.strata), dict(state.condemns), dict(state.retired)
    condemned_ms = dict(state.condemned_ms)

    def remove(identity: StratumId, time_ms: int) -> None:
        known = strata.pop(identity, None)
        if known is not None and record.files_kept:
            retired[identity] = Retired(known.added.kind, time_ms)

    for identity in record.revived:
        known = strata.get(identity)
        for one in condemns.pop(known.condemned, ()) if known is not None else ():
            strata[one] = strata[one]._replace(condemned=0)
    for identity in record.relied:
        if identity in strata:
            strata[identity] = strata[identity]._replace(relied=position)
    for identity in record.strata_removed:
        remove(identity, record.time_ms)
    for added in record.strata_added:
        strata[added.id] = Stratum(added, position, 0)
    for _, listed in record.condemned:
        present = [identity for identity in listed if identity in strata]
        for identity in present:
            strata[identity] = strata[identity]._replace(condemned=position)
        if present:
            condemns[position] = [*condemns.get(position, ()), *present]
            condemned_ms[position] = record.time_ms
    for condemn, listed in record.killed:
        for identity in listed:
            remove(identity, condemned_ms.get(condemn, 0))
        condemns.pop(condemn, None)
    for deleted in record.files_deleted:
        retired.pop(deleted, None)
    return {
        "strata": strata,
        "condemns": {at: [one for one in listed if one in strata] for at, listed in condemns.items()},
        "condemned_ms": {at: condemned_ms.get(at, 0) for at in condemns},
        "retired": retired,
    }


def _name_runs(state: State, record: Record, position: Position, *, counts_names: bool) -> tuple[NameRun, ...]:
    """Runs of batches whose names do not count stay out."""
    runs = {run.id: run for run in state.name_runs if run.id not in record.name_runs_removed}
    adopted = {batch.run: number for number, batch in enumerate(record.batches) if batch.run}
    for run in record.name_runs_added:
        if run.id not in adopted:
            runs[run.id] = run
        elif counts_names:
            version = first_version(position) + adopted[run.id]
            runs[run.id] = run._replace(
                after=position, through=position, version=version, version_min=version, version_max=version
            )
    return tuple(sorted(runs.values(), key=lambda run: (run.through, run.after)))

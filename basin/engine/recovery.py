"""What a new session does about sessions that died: revoke them, keep what they committed, sweep the rest.

Invariants:

- On a disk a session is dead only if nobody holds its lock; its lock is taken before its begin record can be read. In a
  bucket a session that is taken for dead loses only what no record names.
- One record revokes a session, cuts its active strata where the log vouches for them, indexes them, and adopts what it
  had finished but not logged. A damaged stratum stays as it is: `check` names it.
- A file is deleted only if no record names it and its session has ended; of files that name no session, only while no
  other session lives. The folders are listed first, then the log is read, then it is decided.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from basin.engine.cache import Cache
from basin.engine.index import IndexReader
from basin.engine.merging import write_index_run
from basin.engine.rewrite import grains_end, walk_grains
from basin.engine.state import ACTIVE, CUT, FINISHED, State, Stratum
from basin.engine.tiers import is_archived, is_cold
from basin.errors import BasinError, CorruptionError, ObjectMissing, StorageUnavailable
from basin.format.grain import decode_header as decode_grain_header
from basin.format.index import Entries, IndexEntry, entries_of
from basin.format.layout import (
    FLAG_LINKS,
    GRAIN_HEADER_SIZE,
    STRATUM_FOLDERS,
    STRATUM_FOOTER_SIZE,
    STRATUM_HEADER_SIZE,
    Kind,
    StratumKind,
)
from basin.format.record import IndexRun, Record, StratumAdded
from basin.format.scan import Damage, scan_grains
from basin.format.stratum import StratumHeader, decode_footer, decode_header
from basin.storage.protocol import TEMPORARY_FOLDER
from basin.terms import Position, StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core

SESSION_FOLDER: Final = "session"
_HASH_CHUNK: Final = 4 << 20


def recover(core: Core) -> None:
    """Revoke dead sessions and sweep what they left. Under the commit mutex, with a session of our own."""
    dead = [session for session in core.state.sessions if session != core.session and is_dead(core, session)]
    for session in dead:
        with contextlib.suppress(CorruptionError, ObjectMissing):
            revoke(core, session)
    if dead:
        sweep(core)


def is_dead(core: Core, session: Position) -> bool:
    """Whether nobody holds the session's lock; in a bucket, whether it is of our job, or silent for too long.

    There a session that was taken for dead loses what it has not logged, and learns it: nothing else depends on it.
    """
    if core.is_remote:
        job, seen_ms = core.state.jobs.get(session, ""), core.state.seen_ms.get(session, 0)
        silent_ms = time.time_ns() // 1_000_000 - seen_ms
        return bool(job and job == core.options.job) or silent_ms > core.options.session_timeout_s * 1000
    name = f"{session:020d}"
    if name not in core.storage.list(SESSION_FOLDER):
        return True
    lock = core.storage.lock(f"{SESSION_FOLDER}/{name}")
    try:
        lock.acquire(0)
    except StorageUnavailable:
        return False
    finally:
        lock.close()
    return True


def revoke(core: Core, session: Position) -> None:
    """End a dead session: one record that keeps all it committed, and adopts what it had finished."""
    runs: list[IndexRun] = []
    needed: set[StratumId] = set()
    done = False

    def build(state: State) -> Record | None:
        if session not in state.sessions:
            return None
        # The session may have gone on while we looked, and others may have merged what it had logged.
        missing = [one for one in strata if one.id not in state.gone and _is_news(state, one)]
        relied = [one for one in sorted(needed) if one in state.strata]
        revived = [one for one in relied if state.strata[one].condemned]
        if len(relied) < len(needed):
            return None  # Something went that what is adopted links to: the next one who looks decides anew.
        return Record(
            sessions_revoked=[session], strata_added=missing, index_runs_added=runs, relied=relied, revived=revived
        )

    try:
        strata = _taken_over(core, session, runs, needed)
        done = core.append(build)
    except (CorruptionError, ObjectMissing):
        _forget(core, runs)  # A damaged stratum: the session stays until `repair` has written it anew.
        raise
    if not done:
        _forget(core, runs)


def _forget(core: Core, runs: list[IndexRun]) -> None:
    """Delete indexes that no record names."""
    for run in runs:
        core.own_strata.delete(StratumKind.INDEX, run.id)


def _taken_over(core: Core, session: Position, runs: list[IndexRun], needed: set[StratumId]) -> list[StratumAdded]:
    """What the record that revokes a session adds; the indexes that are written for that go into `runs` at once.

    What is adopted must find what it links to: `needed` are the strata where that lies.
    """
    strata: list[StratumAdded] = []
    for known in core.state.strata.values():
        if known.added.session == session and known.added.status == ACTIVE:
            cut, entries = cut_stratum(core, known)
            strata.append(cut)
            if len(entries):
                run, added = write_index_run(core, [cut.id], len(entries), [entries])
                runs.append(run)
                strata.append(added)
    for added in _linked_strata(core, list(_unlogged_strata(core, session)), needed):
        strata.append(added)
        if added.kind == StratumKind.DATA and is_cold(core.options):
            run, index = write_index_run(core, [added.id], added.grain_count, [_own_entries(core, added)])
            runs.append(run)
            strata.append(index)
    return strata


def _linked_strata(core: Core, adopted: list[StratumAdded], needed: set[StratumId]) -> list[StratumAdded]:
    """Those strata whose every link leads to one of them, or to a stratum that counts, which goes into `needed`."""
    while True:
        indexes = [index for index in (_index_of(core, added) for added in adopted) if index is not None]
        needed.clear()
        dangling = [
            added for added in adopted if added.kind == StratumKind.META and _dangles(core, added, indexes, needed)
        ]
        if not dangling:
            return adopted
        adopted = [added for added in adopted if added not in dangling]


def _index_of(core: Core, added: StratumAdded) -> IndexReader | None:
    if added.kind == StratumKind.DATA and is_archived(core.options):
        return None
    reader = core.readers.get(added.kind, added.id, added)
    return IndexReader(reader, reader.directory(), Cache(0))


def _dangles(core: Core, added: StratumAdded, indexes: Sequence[IndexReader], needed: set[StratumId]) -> bool:
    """Whether a grain of a stratum links to what is nowhere."""
    reader = core.readers.get(added.kind, added.id, added)
    for offset, grain in walk_grains(reader, grains_end(added)):
        header = decode_grain_header(grain)
        if not header.flags & FLAG_LINKS:
            continue
        for link in reader.decode_grain(grain, offset, header.key)[1].links:
            key = core.keyring.grain_keys.grain_key(link)
            if any(next(index.find(key), None) for index in indexes if index.directory.may_contain(key)):
                continue
            place = core.locator.find(key)
            if place is None:
                return True
            needed.add(place.stratum)
    return False


def _own_entries(core: Core, added: StratumAdded) -> Entries:
    """All entries of a finished stratum's own index, of which it is the only one."""
    reader = core.readers.get(added.kind, added.id)
    index = IndexReader(reader, reader.directory(), Cache(0))
    return index.entries(0, index.directory.page_count)


def _is_news(state: State, added: StratumAdded) -> bool:
    """Whether the log does not say of the stratum what `added` does, or more."""
    known = state.strata.get(added.id)
    return known is None or known.added.status == ACTIVE


def cut_stratum(core: Core, known: Stratum) -> tuple[StratumAdded, Entries]:
    """An unfinished stratum as valid up to its logged length, and the index entries of its grains."""
    added = known.added
    reader = core.readers.get(added.kind, added.id)
    data = memoryview(reader.read_raw(0, added.length))
    rows = []
    for found in scan_grains(data, STRATUM_HEADER_SIZE, added.length):
        if isinstance(found, Damage):
            raise reader.damage(found.offset, found.reason)
        header = found.header
        if header.kind not in (Kind.INDEX_PAGES, Kind.INDEX_DIRECTORY):
            rows.append(IndexEntry(header.key, found.offset, header.stored_size, 0, header.kind, header.flags))
    return added._replace(status=CUT, grain_count=len(rows), hash=blake3(data).digest()), entries_of(rows)


def _files(core: Core) -> Iterator[tuple[StratumKind, StratumId]]:
    """The strata that lie in the folders."""
    for kind, folder in STRATUM_FOLDERS.items():
        for name in core.storage.list(folder):
            with contextlib.suppress(ValueError):
                identity = bytes.fromhex(name)
                if len(identity) == 16:
                    yield kind, StratumId(identity)


def _header_of(core: Core, kind: StratumKind, identity: StratumId) -> StratumHeader | None:
    """The header of a file, if it has one that is whole and its own, and that can be read at once."""
    if kind == StratumKind.DATA and is_archived(core.options):
        return None
    name = f"{STRATUM_FOLDERS[kind]}/{identity}"
    try:
        header = decode_header(core.storage.read_file(name, STRATUM_HEADER_SIZE))
    except BasinError:
        return None
    return header if header.stratum_id == identity and header.basin_id == core.keyring.basin_id else None


def stored_strata(core: Core) -> Iterator[tuple[StratumKind, StratumId, StratumHeader | None]]:
    """Every stratum that lies in the folders, and its header if it is whole."""
    for kind, identity in list(_files(core)):
        yield kind, identity, _header_of(core, kind, identity)


def _unlogged_strata(core: Core, session: Position) -> Iterator[StratumAdded]:
    """Strata of contents that a dead session had finished, and no record names: whole, and made durable now."""
    for kind, identity in list(_files(core)):
        if identity in core.state.strata or identity in core.state.gone or kind == StratumKind.INDEX:
            continue
        header = _header_of(core, kind, identity)
        if header is None or header.session != session or header.generation in core.state.generations_dropped:
            continue
        with contextlib.suppress(BasinError):
            added = adoptable(core, kind, header)
            if added is not None:
                yield added


def adoptable(
    core: Core, kind: StratumKind, header: StratumHeader, *, holds_names: bool = False
) -> StratumAdded | None:
    """How a record describes a finished stratum, after hashing all of it; None if it holds names, or contents."""
    reader = core.readers.get(kind, header.stratum_id)
    size = reader.size()
    footer = decode_footer(reader.read_raw(size - STRATUM_FOOTER_SIZE, STRATUM_FOOTER_SIZE), size)
    first = decode_grain_header(reader.read_raw(STRATUM_HEADER_SIZE, GRAIN_HEADER_SIZE))
    if (first.kind in (Kind.NAMES_BLOCK, Kind.NAMES_RANGES, Kind.NAMES_DIRECTORY)) != holds_names:
        return None
    hasher = blake3()
    for offset in range(0, footer.length, _HASH_CHUNK):
        hasher.update(reader.read_raw(offset, min(_HASH_CHUNK, footer.length - offset)))
    if hasher.digest() != footer.hash:
        return None
    hasher.update(reader.read_raw(footer.length, STRATUM_FOOTER_SIZE))
    if not core.is_remote:
        file = core.storage.append_to(reader.name, size)
        try:
            file.sync()
        finally:
            file.close()
        core.storage.sync_folder(STRATUM_FOLDERS[kind])
    return StratumAdded(
        header.stratum_id,
        kind,
        FINISHED,
        size,
        footer.grain_count,
        hasher.digest(),
        header.generation,
        header.session,
        header.key_material,
    )


def sweep(core: Core) -> int:
    """Delete files of ended sessions that no record names. Returns how many."""
    removed = 0
    with core.contents.mutex, core.log.exclusive():  # No thread of ours is just creating a stratum.
        files = list(_files(core))
        core.catch_up()
        state = core.state
        alone = set(state.sessions) <= {core.session} and not core.tickets
        for kind, identity in files:
            if identity in state.strata or identity in state.retired or core.own_strata.owns(identity):
                continue
            header = _header_of(core, kind, identity)
            ended = header is not None and header.session <= state.position and header.session not in state.sessions
            if ended or (header is None and alone):
                core.own_strata.delete(kind, identity)
                removed += 1
        removed += 0 if core.is_remote else _sweep_sessions(core)
        if alone and not core.is_remote:
            for name in core.storage.list(TEMPORARY_FOLDER):
                core.storage.delete(f"{TEMPORARY_FOLDER}/{name}")
                removed += 1
    return removed


def _sweep_sessions(core: Core) -> int:
    """Delete the lock files of sessions that have ended."""
    removed = 0
    for name in core.storage.list(SESSION_FOLDER):
        if name.isdigit() and int(name) not in core.state.sessions and int(name) <= core.state.position:
            core.storage.delete(f"{SESSION_FOLDER}/{name}")
            removed += 1
    return removed

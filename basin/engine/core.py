"""`Core`: what one handle holds, and how a commit happens. Everything else in the engine is called from here.

Order, enforced in `_commit_group` alone: strata durable -> folder synced -> record durable -> acknowledge.

Invariants:

- `current` (state and tables) is replaced as a whole, after the names and the locator know all that it refers to; so a
  reader that takes it once sees one log position.
- Lock order: the commit mutex, then the contents' mutex, then the log's lock.
- After a failed write or sync the handle is poisoned: nothing is acknowledged, no stratum is appended to again, pending
  changes are dropped and named in the error, reads go on at the last durable position.
- A session begins with the handle's first record, and before its first file.
- In a bucket nothing can be locked: a record is appended at once, and built anew if somebody else was faster. An append
  whose outcome is unknown poisons nothing, because the log says later what became of it; what it may refer to stays.

Longer than most files because the commit path is read as one story.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from basin.engine.contents import Contents, Relied
from basin.engine.hints import read_hint
from basin.engine.index import GrainLocator
from basin.engine.keyring import Keyring
from basin.engine.log import CHECKPOINT_FOLDER, RESERVE_NAME, START, Cursor, Entry
from basin.engine.logs import open_log
from basin.engine.memtable import Memtable
from basin.engine.names import BrokenRun, RunReader, Tables, lazy_runs, open_run, order_runs
from basin.engine.object_log import ObjectLog, split_token
from basin.engine.options import Options
from basin.engine.reader import StratumReaders
from basin.engine.recovery import recover
from basin.engine.runs import write_batch_run
from basin.engine.state import (
    ACTIVE,
    State,
    apply,
    first_version,
    fold,
    last_version,
    state_from_map,
)
from basin.engine.strata import OwnStrata
from basin.engine.upkeep import upkeep
from basin.engine.writer import StratumWriter
from basin.errors import (
    BasinClosed,
    BasinError,
    BasinPoisoned,
    CommitUnknown,
    Conflict,
    CorruptionError,
    InvalidArgument,
    ObjectMissing,
    OutOfSpace,
    PositionGone,
    ReadOnly,
    StorageError,
    StorageUnavailable,
)
from basin.format.checkpoint import decode_checkpoint
from basin.format.hint import Hint
from basin.format.layout import (
    BATCHES_PER_RECORD_MAX,
    FRAME_FLAG_UNSYNCED,
    FRAME_SIZE_MAX,
    MIB,
    RECORD_MAGIC,
    StratumKind,
)
from basin.format.record import Batch, FrameCipher, IndexRun, NameRun, Record, StratumAdded, chain_hash, encode_record
from basin.storage.protocol import LockFile, Storage
from basin.terms import CONTENT_KEY_SIZE, ContentKey, Location, Position, StratumId

BATCH_INLINE_MAX: Final = MIB
"""A batch above this is written as a run of names and adopted by its record."""
GROUP_SIZE_MAX: Final = 16 * MIB
SESSION_FOLDER: Final = "session"
DROPPED_LISTED_MAX: Final = 1000
_LEADER_TRUSTED_S: Final = 1.0
KEEP_BATCHES_S: Final = 60.0
"""How often a handle with an open batch looks whether somebody condemned what that relies on; far below any grace."""
_CATCH_UPS: Final = 3
"""Times that the log is followed while files of the state that it leads to are gone."""


class Current(NamedTuple):
    """What readers see: one log position, and the names up to it."""

    state: State
    tables: Tables


@dataclass(slots=True, eq=False, weakref_slot=True)
class Pending:
    """Changes on their way into the log. `check` raises `Conflict` when they may no longer be committed."""

    names: Memtable = field(default_factory=Memtable)
    relied: Relied = field(default_factory=dict)
    check: Callable[[Sequence[Pending]], None] | None = None
    written: bool = False
    """Whether contents were put, perhaps without any name."""
    batch: Batch | None = None
    run: NameRun | None = None
    error: BaseException | None = None
    reported: bool = False
    """Whether somebody was told of `error`."""
    done: bool = False
    position: Position = 0

    def __bool__(self) -> bool:
        return bool(len(self.names)) or self.written

    def report(self) -> None:
        """Raise what kept the changes out of the log, if anything did."""
        if self.error is not None:
            self.reported = True
            raise self.error


class Core:
    """One open handle. Safe for threads."""

    def __init__(self, storage: Storage, keyring: Keyring, options: Options, *, writable: bool) -> None:
        self.storage = storage
        self.keyring = keyring
        self.options = options
        self.writable = writable
        self.cipher = FrameCipher(keyring.basin_id, keyring.log_keys)
        self.is_remote = storage.objects is not None
        self.log = open_log(storage, self.cipher, keyring.basin_id, options)
        self.readers = StratumReaders(storage, keyring, options.open_files_max, options.cache_size)
        self.locator = GrainLocator(self.readers, lazy=self.is_remote)
        self.own_strata = OwnStrata(storage, keyring, options, self.readers, self.locator)
        self.contents = Contents(keyring, self.readers, self.locator, options, self.writer_for, self.refresh)
        self.current = Current(State(), Tables((Memtable(),), ()))
        self.cursor = START
        self._recovered = False
        self.closed = ""
        self.poisoned: BasinPoisoned | None = None
        self.checkpoint_position: Position = 0
        self.commit_mutex = threading.RLock()
        self._turn = threading.Condition(threading.Lock())
        self._leader = 0
        """The thread that commits what all have queued, or 0. A hint: what excludes is the commit mutex."""
        self._group_size = 1
        """How many batches the last record held."""
        self.tickets = 0
        self.upkeep_problems: dict[str, BasinError] = {}
        self.settled: tuple[object, ...] = ()
        """What the last upkeep looked at: strata, runs of names, runs of indexes."""
        self._unreported: BaseException | None = None
        self.commits = 0
        self._queue: deque[Pending] = deque()
        self._session_lock: LockFile | None = None
        self._has_reserve = False
        self._begin_hashes: set[bytes] = set()
        """Hashes of records that would begin a session of this handle, and of which it is not known."""
        self._half_followed = False
        """Whether the memtable may hold names of a position that nobody reached."""
        self._pending = Pending()
        self._committing: tuple[Pending, ...] = ()
        self.open_batches: weakref.WeakSet[Pending] = weakref.WeakSet()
        """Batches that go on: what they rely on is kept from being collected."""
        self._kept_at = time.monotonic()
        self._links: Relied = {}
        """What grains link to that were appended, and that no record relies on yet."""
        self._pending_mutex = threading.Lock()
        self._refreshed = time.monotonic()
        self._timer: threading.Thread | None = None
        self._timer_wake = threading.Event()

    # --- opening ----------------------------------------------------------------------------------------------------

    def load(self, hint: Hint | None = None) -> None:
        """Read the newest good checkpoint, and follow the log to its end. Forgets what this handle knew before.

        `hint`: what was just read of a bucket's.
        """
        self.log.prepare(writable=self.writable)
        state = self._hinted_checkpoint(hint) if self.is_remote else self._newest_checkpoint()
        while True:
            try:
                self._load(state)
                return
            except (CorruptionError, ObjectMissing):
                newest = self._newest_checkpoint()
                if newest.position <= state.position:
                    raise
                state = newest  # Others stored it, and let go of the log behind the one that was read before.

    def _load(self, state: State) -> None:
        start = min(state.position, state.flushed)
        if self.is_remote and state.named <= state.flushed:
            start = state.position  # No record in between changed a name, and each would be a request.
        memtable = Memtable()
        tables = Tables((memtable,), self._open_runs(state.name_runs, ()))
        cursor = self.log.cursor_before(start) if state.position else START
        self.checkpoint_position = state.position
        for entry in self.log.follow(cursor, names_from=start, at_least=state.position):
            cursor = entry.end
            if entry.position <= state.position:
                if entry.position not in state.voids:
                    _apply_names(memtable, entry.record.batches, entry.position)
            else:
                state, tables = self._next(state, tables, entry.record, entry.hash)
                memtable = tables.memtables[0]
            if self._begin_hashes:
                self._recognise(entry)
        reached = max(cursor.position, start)
        if reached < state.position:
            raise CorruptionError(
                f"the log ends at position {reached}, but a checkpoint says {state.position}; run `basin check`",
                object="log",
                offset=0,
            )
        if cursor.position < start:
            cursor = self._skip(cursor, start)
        self._publish(state, tables)
        self.cursor = cursor
        self._half_followed = False

    def _skip(self, cursor: Cursor, position: Position) -> Cursor:
        """The cursor behind `position`, when the log holds nothing newer."""
        for entry in self.log.follow(cursor):
            cursor = entry.end
            if entry.position >= position:
                break
        return cursor

    def read_checkpoint(self, name: str) -> State:
        """The state in a checkpoint file; raises `CorruptionError`, `ObjectMissing`, or `ValueError` for its name."""
        position = int(name)
        frame = self.storage.read_file(f"{CHECKPOINT_FOLDER}/{name}", FRAME_SIZE_MAX)
        return state_from_map(decode_checkpoint(self.cipher, frame, position))

    def _hinted_checkpoint(self, hint: Hint | None) -> State:
        """The newest that a bucket's hint names; without a good hint, the newest that is there."""
        hint = hint if hint is not None else read_hint(self.storage)
        if hint is None:
            return self._newest_checkpoint()
        for position in (hint.checkpoint, hint.older_checkpoint):
            if position:
                with contextlib.suppress(CorruptionError, ObjectMissing):
                    return self.read_checkpoint(f"{position:020d}")
        return self._newest_checkpoint() if hint.checkpoint else State()

    def _newest_checkpoint(self) -> State:
        """The newest that is whole. An older one, or the log, leads to the same state; `check` names the bad file."""
        for name in reversed(self.storage.list(CHECKPOINT_FOLDER)):
            with contextlib.suppress(CorruptionError, ObjectMissing, ValueError):
                return self.read_checkpoint(name)
        return State()

    def _open_runs(self, runs: Sequence[NameRun], known: Sequence[RunReader]) -> tuple[RunReader, ...]:
        by_id = {reader.run.id: reader for reader in known}
        missing = [run for run in runs if run.id not in by_id]
        if self.is_remote:
            opened = lazy_runs(missing, self.readers)
        else:
            opened = [open_run(run, self.readers) for run in missing]
        by_id |= {reader.run.id: reader for reader in opened}
        return order_runs([by_id[run.id] for run in runs])

    # --- following the log ------------------------------------------------------------------------------------------

    @property
    def session(self) -> Position:
        """The session of this handle; 0 if it has none yet, or none any more."""
        return self.own_strata.session

    @property
    def state(self) -> State:
        """The state at the position this handle last caught up with."""
        return self.current.state

    def refresh(self) -> None:
        """Catch up with what others appended. One small read if there is nothing new."""
        self.require_open()
        if self.poisoned is not None:
            return
        with self.commit_mutex:
            self.catch_up()

    def look_again(self, tables: Tables, position: Position) -> Tables:
        """What to read at `position` when files of `tables` are gone: somebody merged them, and the log says where to.

        Raises `PositionGone` below the history floor; `ObjectMissing`, from what is being handled, if nothing changed.
        """
        self.refresh()
        current = self.current.tables
        if current.runs == tables.runs:
            raise  # noqa: PLE0704  # called while the error is being handled
        self.require_kept(position)
        return current

    def require_kept(self, position: Position) -> None:
        """Raise `PositionGone` if a position lies below the history floor, as far as this handle knows."""
        floor = self.state.floor
        if position < floor:
            raise PositionGone(
                f"position {position} is below the history floor {floor}", position=position, floor=floor
            ) from None

    def maybe_refresh(self) -> None:
        """`refresh`, if the last one is longer ago than the refresh interval. Called before every read."""
        if self.closed:
            self.require_open()
        now = time.monotonic()
        if now - self._refreshed >= self.options.refresh_interval_s:
            self._refreshed = now
            self.refresh()

    def catch_up(self) -> None:
        """Apply what was appended since. Under the commit mutex."""
        for _ in range(_CATCH_UPS):
            self._catch_up()
            if not self._is_behind():
                return

    def open_everything(self) -> None:
        """Look now at the indexes and runs of names that a bucket's handle looks at when it needs them.

        For `check` and `repair`: what cannot be opened is known afterwards.
        """
        if not self.is_remote:
            return
        with self.commit_mutex:
            self.locator.settle()
            state, tables = self.current
            opened = [open_run(run, self.readers) for run in state.name_runs]
            self.current = Current(state, Tables(tables.memtables, order_runs(opened)))

    def _is_behind(self) -> bool:
        """Whether files were gone already that the state names: somebody merged them since it was."""
        if self.is_remote:
            return False  # Whoever looks into one meets it, and follows the log then.
        broken = [run.error for run in self.current.tables.runs if isinstance(run, BrokenRun)]
        return any(isinstance(error, ObjectMissing) for error in (*broken, *self.locator.broken.values()))

    def _catch_up(self) -> None:
        self._refreshed = time.monotonic()
        if self._half_followed:
            self.load()
            return
        state, tables = self.current
        cursor = self.cursor
        try:
            for entry in self.log.follow(cursor):
                self._half_followed = True
                state, tables = self._next(state, tables, entry.record, entry.hash)
                cursor = entry.end
                if self._begin_hashes:
                    self._recognise(entry)
        except (CorruptionError, ObjectMissing):
            if self.log.keeps(cursor):
                raise
            # Old records were removed while we did not look: start over from the newest checkpoint.
            self.load()
            return
        if cursor is not self.cursor:
            self._publish(state, tables)
            self.cursor = cursor
        self._half_followed = False

    def _recognise(self, entry: Entry) -> None:
        """Whether a record that stands in the log is one of this handle's whose append had no known outcome.

        Sequence numbers are counted by the log; only that a session is ours has to be found out.
        """
        if entry.hash in self._begin_hashes:
            self._begin_hashes.clear()
            self.own_strata.session = entry.position

    def _next(self, state: State, tables: Tables, record: Record, record_hash: bytes) -> tuple[State, Tables]:
        """State and tables after one stored record."""
        following, counts = fold(state, record, record_hash)
        return following, self._next_tables(state, following, tables, record) if counts else tables

    def _next_tables(self, state: State, following: State, tables: Tables, record: Record) -> Tables:
        """The tables after a record that counts, which led from `state` to `following`."""
        _apply_names(tables.memtables[0], record.batches, following.position)
        if following.name_runs is state.name_runs:
            return tables
        memtables = tables.memtables
        if following.flushed != state.flushed:
            memtables = _without_flushed(memtables, last_version(following.flushed))
        return Tables(memtables, self._open_runs(following.name_runs, tables.runs))

    def _publish(self, state: State, tables: Tables) -> None:
        if state.generation != self.keyring.generation:
            self.keyring.select_generation(state.generation)
        if state.strata is not self.readers.logged:
            self.readers.logged = state.strata
            self.own_strata.stored_size = sum(known.added.length for known in state.strata.values())
        if state.name_runs is not self.current.state.name_runs:
            self.readers.run_directories = {run.id: run.directory_offset for run in state.name_runs}
        self.locator.update(state, {run.id for run in state.name_runs})
        self.contents.damaged = state.damaged
        self.current = Current(state, tables)

    # --- pending changes --------------------------------------------------------------------------------------------

    def put_row(self, name: bytes, kind: int, value: bytes, expiry_ms: int = 0, relied: Relied | None = None) -> None:
        """Change one full name: visible through this handle at once, durable with the next commit."""
        self.require_writable()
        with self._pending_mutex:
            self._pending.names.put(name, kind, value, expiry_ms)
            if relied:
                self._pending.relied.update(relied)
        self._changed()

    def put_rows(
        self, rows: Sequence[tuple[bytes, int, bytes]], expiry_ms: int = 0, relied: Relied | None = None
    ) -> None:
        """`put_row` for many (name, kind, value), together, with what their contents rely on."""
        self.require_writable()
        with self._pending_mutex:
            self._pending.names.put_all(rows, expiry_ms)
            if relied:
                self._pending.relied.update(relied)
        self._changed()

    def put_same(self, names: Sequence[bytes], value: bytes, relied: Relied) -> None:
        """Give many full names the same small value, together."""
        self.require_writable()
        with self._pending_mutex:
            self._pending.names.put_same(names, value)
            self._pending.relied.update(relied)
        self._changed()

    def delete_rows(self, start: bytes, stop: bytes) -> None:
        """Delete the full names in [start, stop)."""
        self.require_writable()
        with self._pending_mutex:
            self._pending.names.delete_range(start, stop)
        self._changed()

    def rely(self, relied: Relied) -> None:
        """Contents were put without a name: they are committed with the next batch."""
        self.require_writable()
        with self._pending_mutex:
            self._pending.relied.update(relied)
            self._pending.written = True
        self._changed()

    def _changed(self) -> None:
        self._start_timer_once()
        if self._pending.names.size > self.options.memtable_size:
            self.commit_pending()

    def overlays(self) -> list[Memtable]:
        """Changes that are visible through this handle and not logged yet, newest first."""
        return [pending.names for pending in (self._pending, *self._committing) if len(pending.names)]

    def commit_pending(self) -> Position:
        """Commit what waits, durably; returns the position of the log afterwards."""
        self.require_open()
        if self.poisoned is not None:
            self._unreported = None
            raise self.poisoned
        waiting = self._enqueue()
        if waiting is None:
            with self.commit_mutex:
                self.catch_up()
        else:
            self._commit_queued(waiting)
            waiting.report()
        return self.state.position

    def _enqueue(self, batch: Pending | None = None) -> Pending | None:
        """Queue what waits, and `batch` behind it: changes are logged in the order in which they were made.

        Returns what holds the newest changes made outside of batches, if that is not committed yet. Another thread may
        have queued it: then the changes of this one are in there as well.
        """
        with self._pending_mutex:
            if self._pending:
                # In this order: a reader without the mutex finds the changes in one place or in both.
                self._committing = (self._pending, *self._committing)
                self._queue.append(self._pending)
                self._pending = Pending()
            if batch is not None:
                self._queue.append(batch)
            return self._committing[0] if self._committing else None

    def _restore(self, pending: Pending) -> None:
        """Nothing was written: the changes wait on, below those that came since. Under the mutex of pending changes."""
        pending = Pending(pending.names, pending.relied, written=pending.written)
        newer, self._pending = self._pending, pending
        for start, stop, _ in newer.names.ranges:
            pending.names.delete_range(start, stop)
        for name, (_, kind, value, expiry_ms, _) in newer.names.rows.items():
            pending.names.put(name, kind, value, expiry_ms)
        pending.relied.update(newer.relied)
        pending.written |= newer.written

    def _start_timer_once(self) -> None:
        if self._timer is None and self.options.sync_interval_s < 3600:
            self._start_timer()

    def _start_timer(self) -> None:
        with self._pending_mutex:
            if self._timer is None:
                self._timer = threading.Thread(target=self._run_timer, name="basin-timer", daemon=True)
                self._timer.start()

    def _run_timer(self) -> None:
        """Commit what waits, every interval, until the handle closes."""
        while not self._timer_wake.wait(self.options.sync_interval_s):
            if self.poisoned is None and not self.closed:
                try:
                    self._keep_batches()
                    if self._pending or self._committing:
                        self.commit_pending()
                    elif self.is_remote:
                        with contextlib.suppress(CommitUnknown):  # Nothing but contents that nobody names yet.
                            self._log_what_landed()
                except StorageUnavailable:
                    continue  # The changes wait on; the next round tries again.
                except BasinError as error:
                    self._unreported = error  # Whoever uses the handle next, or closes it, is told.

    def _take_links(self) -> None:
        """What is about to be synced links to these. Under the commit mutex and the contents' mutex."""
        self._links.update(self.contents.linked)
        self.contents.linked = {}

    def _rely_on_links(self, record: Record) -> None:
        """A record that adds grains with links relies on what they link to, also for batches that lost.

        Their grains stay, and whoever finds one later may refer to it.
        """
        links = {**self._links, **dict(self.contents.linked)}
        if not links or not any(one.kind == StratumKind.META for one in record.strata_added):
            return
        try:
            needed, revived = self._check_relied(links)
        except Conflict as error:
            self.poison(error)
            raise
        record.relied = sorted({*record.relied, *needed})
        record.revived = sorted({*record.revived, *revived})

    def relied_by_batches(self) -> set[StratumId]:
        """The strata that changes rely on which are not logged yet."""
        waiting = [*self.open_batches, self._pending, *self._committing]
        return {identity for pending in waiting for identity in list(pending.relied.values())}

    def _keep_batches(self) -> None:
        """Take back from a collector what a batch relies on that has been open for long."""
        if not self.open_batches or time.monotonic() - self._kept_at < KEEP_BATCHES_S:
            return
        self._kept_at = time.monotonic()
        self.refresh()
        self._follow_merges()
        if self.session and self._condemned_by_mistake(self.state):
            self.append(lambda state: Record() if self._condemned_by_mistake(state) else None)

    def _follow_merges(self) -> None:
        """Rely on the strata to which others merged what open batches rely on: those are what may be condemned next."""
        for pending in list(self.open_batches):
            moved = {key: one for key, one in list(pending.relied.items()) if self._is_gone(one)}
            try:
                places = self._places_of(list(moved)) if moved else []
            except (CorruptionError, ObjectMissing):
                continue  # They move again just now: the next look, or the commit, finds them.
            for (key, before), place in zip(moved.items(), places, strict=True):
                if place is not None and pending.relied.get(key) == before:
                    pending.relied[key] = place.stratum

    def _is_gone(self, identity: StratumId) -> bool:
        return identity not in self.state.strata and not self.own_strata.owns(identity)

    def _condemned_by_mistake(self, state: State) -> set[StratumId]:
        relied = self.relied_by_batches() if state.condemns else set()
        return {identity for identity in relied if identity in state.strata and state.strata[identity].condemned}

    def _log_what_landed(self) -> None:
        """Log strata of contents that are in the bucket already, while a batch goes on that will refer to them.

        So whoever takes over from a writer that dies in the middle of a large batch finds its contents by their keys.
        """
        with self.contents.mutex:
            landed = self.own_strata.landed()

        def build(_: State) -> Record | None:
            missing = self._still_to_log(landed)
            return Record(strata_added=missing, index_runs_added=self.own_strata.runs_of(missing)) if missing else None

        if landed:
            self.append(build)
            self.own_strata.settle(landed, self.state.strata)

    # --- committing -------------------------------------------------------------------------------------------------

    def commit(self, pending: Pending) -> Position:
        """Commit one batch, durably, together with those of other threads. Raises `Conflict` if its check does."""
        self.require_writable()
        try:
            earlier = self._enqueue(pending)
            self._commit_queued(pending)
        except BaseException:
            # An interrupt before its turn: a batch that raised is not committed later on.
            with self.commit_mutex, self._pending_mutex, contextlib.suppress(ValueError):
                self._queue.remove(pending)
            raise
        if earlier is not None and earlier.error is not None and not earlier.reported:
            self._unreported, earlier.reported = earlier.error, True  # Not the batch's, which may be committed.
        pending.report()
        return pending.position

    def _commit_queued(self, wanted: Pending) -> None:
        """Return when `wanted`, which is queued, is committed or has failed; one thread commits for all that wait.

        Those that wait sleep until their own changes are done, not for the commit mutex: whoever has just committed
        would take that again before they wake, and each would commit alone. Never under the commit mutex.
        """
        me = threading.get_ident()
        with self._turn:
            # An interrupt may have left a leader that leads no more: this thread, or one that takes too long.
            while self._leader not in (0, me) and not wanted.done and self._turn.wait(_LEADER_TRUSTED_S):
                pass
            if wanted.done:
                return
            self._leader = me
        try:
            self._let_others_join()
            with self.commit_mutex:
                self._drain(wanted)
        finally:
            with self._turn:
                self._leader = 0
                self._turn.notify_all()
        if not wanted.done:
            wanted.error = StorageError("the commit was interrupted", object="log", operation="append")
            wanted.done = True
            self._leave([wanted])

    def _let_others_join(self) -> None:
        """Give the threads that were committed together a moment to queue their next changes.

        They have been told that they are done, and wait for the interpreter's lock. Without this, half of them come too
        late for the next record, and 4 threads share a sync by two.
        """
        for _ in range(self._group_size - 1):
            if len(self._queue) >= self._group_size:
                return
            time.sleep(0)

    def _drain(self, wanted: Pending | None = None) -> None:
        """Commit what is queued, in groups, until `wanted` or else all of it is done. Under the commit mutex."""
        while self._queue and not (wanted is not None and wanted.done):
            group: list[Pending] = []
            try:
                self._take(group)
                self._commit_group(group)
            except BaseException as error:
                if isinstance(error, StorageUnavailable):
                    # Those behind wait on as well: what was changed later is never logged before what was earlier.
                    while self._queue:
                        group.append(self._queue.popleft())
                for pending in group:
                    if not pending.done:
                        pending.done, pending.error = True, pending.error or error
                raise
            finally:
                self._leave(group)
            self._run_upkeep()

    def _take(self, group: list[Pending]) -> None:
        """Move what fits into one record from the queue to `group`. After an interrupt it is in one or in both."""
        size = 0
        while self._queue and len(group) < BATCHES_PER_RECORD_MAX and size < GROUP_SIZE_MAX:
            pending = self._queue[0]
            if not pending.done:  # Else it was told that it failed, by whoever was interrupted here.
                group.append(pending)
                size += min(pending.names.size, BATCH_INLINE_MAX)
            self._queue.popleft()

    def _leave(self, group: Sequence[Pending]) -> None:
        """What was committed, or failed, is no longer on its way; a lock that stayed busy puts it back."""
        unwritten = [pending for pending in group if isinstance(pending.error, StorageUnavailable)]
        self.own_strata.forget_runs({pending.run.id for pending in unwritten if pending.run is not None})
        with self._pending_mutex:
            for pending in reversed(unwritten):
                if pending in self._committing:
                    self._restore(pending)
            self._committing = tuple(one for one in self._committing if one not in group)
        with self._turn:
            self._turn.notify_all()  # Before upkeep, which may take a while.

    def _commit_group(self, group: Sequence[Pending]) -> None:
        """One record for all batches of the group that do not conflict."""
        if self.poisoned is not None:
            raise self.poisoned
        with self._poisoning(group):
            for pending in group:
                pending.batch = self._encode_batch(pending)
            with self.contents.mutex:
                self._take_links()
                added = self.own_strata.sync(self.state.strata)
            with self.log.exclusive():
                if self.log.looks_first:
                    self.catch_up()
                while True:
                    accepted, relied, revived = self._accept(group)
                    added = self._still_to_log(self._without_refused_runs(group, added))
                    self._require_generations(added)
                    if not accepted:
                        break
                    if self._append_record(
                        Record(
                            batches=[pending.batch for pending in accepted if pending.batch is not None],
                            strata_added=added,
                            name_runs_added=[pending.run for pending in accepted if pending.run],
                            index_runs_added=self.own_strata.runs_of(added),
                            relied=relied,
                            revived=revived,
                        ),
                        sync=self.options.sync != "never",
                    ):
                        self._links.clear()
                        break
                    self._follow_winner()
        self.own_strata.settle(added, self.state.strata)
        for pending in group:
            pending.position = self.state.position
            pending.done = True
        self._group_size = len(group)
        self.commits += 1

    def _encode_batch(self, pending: Pending) -> Batch | None:
        """The batch of a record; a large one goes into a run of names first."""
        if not len(pending.names) or pending.run is not None:
            return pending.batch
        batch = pending.names.to_batch()
        if _batch_size(batch) <= BATCH_INLINE_MAX:
            return batch
        self.ensure_session()
        pending.run, added = write_batch_run(self, pending.names)
        self.own_strata.add([added])
        return Batch(ranges=batch.ranges, run=pending.run.id)

    def _accept(self, group: Sequence[Pending]) -> tuple[list[Pending], list[StratumId], list[StratumId]]:
        """The batches that may be committed now, in order, and the strata they rely on."""
        accepted: list[Pending] = []
        relied: set[StratumId] = set()
        revived: set[StratumId] = set()
        for pending in group:
            if pending.error is not None:
                continue  # It lost before another writer came first.
            try:
                if pending.check is not None:
                    pending.check(accepted)
                own_relied, own_revived = self._check_relied(pending.relied)
            except Conflict as conflict:
                pending.error = conflict
                continue
            accepted.append(pending)
            relied |= own_relied
            revived |= own_revived
        return accepted, sorted(relied), sorted(revived)

    def _without_refused_runs(self, group: Sequence[Pending], added: list[StratumAdded]) -> list[StratumAdded]:
        """Leave out, and delete, the runs of large batches that lost a conflict."""
        refused = {pending.run.id for pending in group if pending.run is not None and pending.error is not None}
        if not refused:
            return added
        self.own_strata.forget_runs(refused)
        return [one for one in added if one.id not in refused]

    def _still_to_log(self, added: list[StratumAdded]) -> list[StratumAdded]:
        """Without what the log says already: a record that was in doubt is in it, or the timer was faster."""
        strata = self.state.strata
        return [one for one in added if one.id not in strata or strata[one.id].added != one]

    def _check_relied(self, relied: Relied) -> tuple[set[StratumId], set[StratumId]]:
        """Rule 6: every stratum relied on counts, or is revived, or its content is found again elsewhere."""
        strata = self.state.strata
        relied_on = set(relied.values())
        going = {
            one for one in relied_on if (strata[one].condemned if one in strata else not self.own_strata.owns(one))
        }
        if going:
            relied_on = (relied_on - going) | self._found_again([key for key, one in relied.items() if one in going])
        needed, revived = set(), set()
        for identity in relied_on:
            known = strata.get(identity)
            if known is not None and (known.added.session != self.session or known.added.status != ACTIVE):
                needed.add(identity)
                if known.condemned:
                    revived.add(identity)
        return needed, revived

    def _found_again(self, keys: Sequence[bytes]) -> set[StratumId]:
        """Where contents lie now whose strata are gone or condemned: in others if possible."""
        places = self._places_of(keys)
        lost = [ContentKey(key[:CONTENT_KEY_SIZE]) for key, place in zip(keys, places, strict=True) if place is None]
        if lost:
            raise Conflict(
                f"{len(lost)} contents were removed since they were found; put them again", content_keys=lost
            )
        return {place.stratum for place in places if place is not None}

    def _places_of(self, keys: Sequence[bytes]) -> list[Location | None]:
        """Where each of the keys of a `Relied` lies now: in a stratum that is not condemned, if possible."""
        grain_key = self.keyring.grain_keys.grain_key
        places = self.locator.find_many([grain_key(key[:CONTENT_KEY_SIZE]) for key in keys])
        for row, key in enumerate(keys):
            if len(key) > CONTENT_KEY_SIZE:  # One with links: another grain of it may keep other contents alive.
                places[row] = self.contents.find_linked(key[:CONTENT_KEY_SIZE], key[CONTENT_KEY_SIZE:])
        return places

    def _append_record(self, record: Record, *, sync: bool = True) -> bool:
        """Complete, check and append a record; False if somebody else came first. Under commit mutex and log lock."""
        state = self.state
        self._require_session(record)
        self._rely_on_links(record)
        kept = self._condemned_by_mistake(state)
        if kept:
            record.relied = sorted({*record.relied, *kept})
            record.revived = sorted({*record.revived, *kept})
        record.time_ms = time.time_ns() // 1_000_000
        record.previous = state.hash
        if self.session:
            record.session, record.sequence = self.session, state.sessions[self.session] + 1
        else:
            record.session_begun, record.session, record.sequence = True, 0, 1
            record.job = self.options.job
            self._lock_session(state.position + 1)
        end: Cursor | None = None
        digest = b""
        try:
            frame = self.cipher.seal(
                RECORD_MAGIC,
                state.position + 1,
                encode_record(record),
                generation=self.keyring.generation,
                randomness=os.urandom(32),
                flags=0 if sync else FRAME_FLAG_UNSYNCED,
            )
            digest = chain_hash(frame)
            following = apply(state, record, digest)  # A record that everybody would skip is never written.
            end = self._append_frame(frame, record, sync=sync)
        except CommitUnknown:
            if record.session_begun:
                self._begin_hashes.add(digest)
            raise
        finally:
            if end is None and record.session_begun:
                self._unlock_session()  # Somebody else's session will have this position.
        if end is None:
            return False
        tables = self._next_tables(state, following, self.current.tables, record)
        if record.session_begun:
            self.own_strata.session = following.position
        self._publish(following, tables)
        self.cursor = end
        return True

    def _require_session(self, record: Record) -> None:
        """A session that was revoked writes no more; one that has nothing to lose by that begins anew."""
        if not self.session or self.session in self.state.sessions:
            return
        if self.is_remote and not record.strata_added and not self.own_strata.is_busy:
            self.own_strata.session = 0
            return
        error = Conflict(
            f"session {self.session} was revoked: another writer took this one for dead", session=self.session
        )
        self.poison(error)
        raise error

    def _require_generations(self, strata: Sequence[StratumAdded]) -> None:
        """Strata under keys that were dropped since count nowhere: the handle that wrote them writes no more."""
        for added in strata:
            if added.generation in self.state.generations_dropped:
                error = Conflict(
                    f"generation {added.generation} of the keys was dropped while this handle wrote under it: reopen "
                    "the basin, and write again",
                    generation=added.generation,
                )
                self.poison(error)
                raise error

    def _append_frame(self, frame: bytes, record: Record, *, sync: bool) -> Cursor | None:
        """Append; on a full disk, a record that only deletes gets the reserve."""
        previous = self.state.hash
        try:
            return self.log.append(self.cursor, frame, previous, sync=sync)
        except OutOfSpace:
            if not _frees_space(record):
                raise
            self.storage.delete(RESERVE_NAME)
            self._has_reserve = False
            return self.log.append(self.cursor, frame, previous, sync=sync)

    def hold_reserve(self) -> None:
        """Hold back the space of `reserve_size`, if there is so much; a disk that is full is opened all the same."""
        if self._has_reserve or not (self.writable and self.options.reserve_size):
            return
        with contextlib.suppress(OutOfSpace):
            self.storage.reserve(RESERVE_NAME, self.options.reserve_size)
            self._has_reserve = True

    def append(self, build: Callable[[State], Record | None]) -> bool:
        """Append a record of upkeep that `build` makes for the state then; False if it makes none or is refused."""
        self.require_writable()
        with self.commit_mutex, self._poisoning(()), self.log.exclusive():
            if self.log.looks_first:
                self.catch_up()
            while True:
                record = build(self.state)
                if record is None:
                    return False
                try:
                    if self._append_record(record):
                        return True
                except Conflict:
                    return False
                self._follow_winner()

    def _follow_winner(self) -> None:
        """Somebody else appended where this handle wanted to: see what."""
        if self.log.looks_first:
            raise StorageUnavailable("the log moved while it was locked", object="log", operation="append")
        self.catch_up()

    def resolve(self, token: bytes) -> str:
        """What became of an append whose outcome was unknown: "committed" or "absent", for certain from then on.

        If nothing stands at its place, something is put there, so that it cannot arrive any more.
        """
        log = self.log
        if not isinstance(log, ObjectLog):
            raise InvalidArgument("this token is of no commit whose outcome was unknown", token=token)
        position, wanted = split_token(token)
        with self.commit_mutex:
            while (found := log.hash_at(position)) is None:
                self.refresh()
                if self.state.position < position - 1:
                    raise InvalidArgument("this token is of another basin: its log is shorter", token=token)
                if self.state.position < position:
                    self.append(lambda state: Record() if state.position < position else None)
            self.refresh()
        return "committed" if found == wanted else "absent"

    @contextlib.contextmanager
    def _poisoning(self, group: Sequence[Pending]) -> Iterator[None]:
        """Whatever fails inside leaves a handle that writes no more.

        But for a lock that stayed busy or a bucket that did not answer, after which the same can be tried again; and
        for an outcome that is unknown, which the next look at the log settles.
        """
        try:
            yield
        except (StorageUnavailable, CommitUnknown, Conflict, BasinPoisoned):
            raise
        except BaseException as error:
            self.poison(error, group)
            if isinstance(error, BasinError) and self.poisoned is not None:
                error.fields.setdefault("dropped", self.poisoned.fields["dropped"])
            raise

    def poison(self, error: BaseException, group: Sequence[Pending] = ()) -> None:
        """Make the handle read-only at its last durable position. Later writes raise `BasinPoisoned`."""
        dropped: list[bytes] = []
        with self._pending_mutex:
            for pending in (*group, self._pending):
                dropped += list(pending.names.rows)[: DROPPED_LISTED_MAX - len(dropped)]
            self._pending = Pending()
        self.own_strata.abandon(self.state.strata)
        self.poisoned = BasinPoisoned(
            f"a write failed ({error}); nothing of it was acknowledged, and this handle is read-only at position "
            f"{self.state.position}: reopen the basin",
            dropped=dropped,
            position=self.state.position,
        )

    # --- sessions and strata ----------------------------------------------------------------------------------------

    def ensure_session(self) -> None:
        """Begin this handle's session, if it has none, and look after those that died: before its first file."""
        if self.session and self._recovered:
            return
        with self.commit_mutex:
            try:
                if not self.session:
                    self.append(lambda _: Record())
                self._start_timer_once()
                if not self._recovered:
                    self._recovered = True
                    recover(self)
            except (StorageUnavailable, CommitUnknown) as error:
                # Nothing that the caller changed is in doubt. The log shows later whether the session has begun.
                self._recovered = False
                raise StorageUnavailable(
                    f"the session could not begin: {error.message}", object="log", operation="begin"
                ) from error

    def _lock_session(self, position: Position) -> None:
        """Take the lock that shows that the session is alive, before anybody can read of the session."""
        if self.is_remote:
            return  # There the last record of a session says when it was alive.
        lock = self.storage.lock(f"{SESSION_FOLDER}/{position:020d}")
        lock.acquire(0)
        self._session_lock = lock

    def _unlock_session(self) -> None:
        if self._session_lock is not None:
            self._session_lock.close()
            self._session_lock = None

    def writer_for(self, kind: StratumKind) -> StratumWriter:
        """The active stratum of `kind`, made if there is none or the last is full. Under the contents' mutex."""
        writer = self.own_strata.writable(kind)
        if writer is not None:
            return writer
        if self.poisoned is not None:
            raise self.poisoned
        if not self.session:
            raise ReadOnly("a stratum belongs to a session, and none has begun")
        with self._poisoning(()):
            return self.own_strata.switch(kind)

    def commit_strata(
        self,
        strata: Sequence[StratumAdded],
        rows: Sequence[tuple[bytes, int, bytes]],
        relied: Relied,
        runs: Sequence[IndexRun] = (),
    ) -> None:
        """Add finished strata of this session that workers wrote, and the names that refer to them, in one record.

        `runs` are the index runs among them.
        """
        with self.commit_mutex:
            self._links.update(relied)  # They may be parents, and are logged also if the names lose.
            self.own_strata.add(strata, self.state.strata, runs)
            pending = Pending(written=True)
            pending.names.put_all(rows)
            pending.relied.update(relied)
            self._enqueue(pending)
            self._drain()
            pending.report()

    def _run_upkeep(self) -> None:
        """Flush, merge, checkpoint where due. Its failure concerns the next write, not the commit that is done."""
        if self.session and not self._recovered:  # The commit began the session.
            try:
                self.ensure_session()
            except BasinError as error:
                self.upkeep_problems[recover.__name__] = error
        if self.poisoned is None:
            upkeep(self)
            self.hold_reserve()

    # --- closing ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit what waits, finish the strata, end the session, release everything. Closing twice is harmless."""
        if self.closed:
            return
        self._timer_wake.set()
        try:
            if self.poisoned is None and self.writable:
                self._end_session()
        finally:
            self.release("the handle is closed")
        timer = self._timer
        if timer is not None and timer is not threading.current_thread():
            timer.join()
        if self._unreported is not None:
            raise self._unreported

    def finish_strata(self) -> None:
        """End this handle's active strata, and log them: nobody collects what is still being appended to."""
        with self.commit_mutex:
            if not self.session:
                return
            with self._poisoning(()), self.contents.mutex:
                self._take_links()
                added = self.own_strata.finish_all()

            def build(_: State) -> Record | None:
                missing = self._still_to_log(added)
                return (
                    Record(strata_added=missing, index_runs_added=self.own_strata.runs_of(missing)) if missing else None
                )

            if added and self.append(build):
                self._links.clear()
                self.own_strata.settle(added, self.state.strata)

    def _end_session(self) -> None:
        with self.commit_mutex:
            waiting = self._enqueue()
            self._drain()
            if waiting is not None:
                waiting.report()
            if not self.session:
                return
            with self._poisoning(()), self.contents.mutex:
                self._take_links()
                added = self.own_strata.finish_all()
            session = self.session

            def build(state: State) -> Record | None:
                if session not in state.sessions:
                    return None
                missing = self._still_to_log(added)
                runs = self.own_strata.runs_of(missing)
                return Record(strata_added=missing, index_runs_added=runs, sessions_ended=[session])

            with contextlib.suppress(CommitUnknown):  # All that was changed is committed; the session ends in time.
                self.append(build)
            if not self.is_remote:
                self.storage.delete(f"{SESSION_FOLDER}/{session:020d}")
            self.own_strata.session = 0

    def release(self, reason: str) -> None:
        """Close every handle without writing. Used at the end, and in a forked child."""
        self.closed = reason
        self.abandon()
        self.storage.close()

    def abandon(self) -> None:
        """Close whatever this opened, and leave the storage to others."""
        self._timer_wake.set()
        self.own_strata.abandon(self.state.strata)
        self.contents.close()
        self.readers.close()
        self.log.close()
        self._unlock_session()

    def require_open(self) -> None:
        """Raise `BasinClosed` after `close` or in a forked child."""
        if self.closed:
            raise BasinClosed(f"{self.closed}: open the basin again")

    def require_writable(self) -> None:
        """Raise `BasinClosed`, `ReadOnly`, or `BasinPoisoned`."""
        self.require_open()
        if self.poisoned is not None:
            self._unreported = None
            raise self.poisoned
        if not self.writable:
            raise ReadOnly("this handle was opened for reading")


def _apply_names(memtable: Memtable, batches: Sequence[Batch], position: Position) -> None:
    for number, batch in enumerate(batches):
        memtable.apply(batch, first_version(position) + number)


def _without_flushed(memtables: Sequence[Memtable], version: int) -> tuple[Memtable, ...]:
    """The memtables without what a run covers now."""
    kept = [table if table.version_max > version else None for table in memtables]
    newest = memtables[0] if kept[0] is not None else Memtable()
    if kept[0] is not None and newest.version_min <= version:
        newest = newest.after(version)
    older = [table.after(version) for table in kept[1:] if table is not None]
    return (newest, *older)


def _batch_size(batch: Batch) -> int:
    columns = (batch.names, batch.values, batch.reference_names, batch.deletes)
    return sum([sum(map(len, column)) for column in columns]) + 32 * len(batch.reference_names)


def _frees_space(record: Record) -> bool:
    """Whether a record only deletes, ends or replaces what is there: then it may use the space that was held back."""
    if any(batch.names or batch.reference_names or batch.run for batch in record.batches):
        return False
    replaces = record.strata_removed or record.sessions_revoked or record.sessions_ended
    return not record.strata_added or bool(replaces or (record.name_runs_added and not record.batches))

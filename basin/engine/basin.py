"""`Basin`: the handle that users hold. A mapping of names, and everything else that concerns the whole basin.

Reading order for a newcomer: `Basin.put` -> `scopes.HandleScope.put` -> `core.Core.put_row`; then `Basin.commit` ->
`core.Core._commit_group` -> `log.FileLog.append`. And back: `Basin.get` -> `scopes.HandleScope.find` ->
`names.find_row`.

Invariants: a handle that was inherited through `fork` does nothing but raise `BasinClosed`; pickling is refused. What
keeps a basin up - compaction, check, repair, copies - is loaded when it is called: a command that reads one name does
without it.

Longer than most files because all that one handle offers stands in one place.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TypeVar, cast

from basin.engine.core import Core
from basin.engine.keyspace import (
    DEFAULT_KEYSPACE,
    FIRST_USER_KEYSPACE,
    ORDERS,
    REGISTRY_KEYSPACE,
    VALUES,
    NameMap,
    Scope,
    encode_text,
    end_of,
    prefix_of,
)
from basin.engine.log import Entry
from basin.engine.scopes import BatchScope, HandleScope, TransactionScope, ViewScope, run_transaction
from basin.engine.state import State, first_version
from basin.engine.stats import stats
from basin.errors import Conflict, CorruptionError, InvalidArgument, NameNotFound, ObjectMissing, PositionGone, ReadOnly
from basin.format.layout import KEYSPACE_PREFIX_SIZE
from basin.format.record import Pin, Record
from basin.terms import ContentKey, Head, Position

if TYPE_CHECKING:
    from basin.engine.compaction import CompactionReport, Progress
    from basin.engine.copying import CopyReport
    from basin.engine.plan import CompactionStep
    from basin.engine.repair import RepairAction
    from basin.engine.rounds import Check
    from basin.engine.secrets import Secrets
    from basin.engine.space import Space

T = TypeVar("T")
_KEYSPACE_NAME_MAX = 255
_COUNTER = b""
"""The registry's entry that holds the next free keyspace number: no keyspace has an empty name."""


class Change(NamedTuple):
    """One logged change of a name. `kind` is put, ref, delete or delete_range; `stop` ends a range (exclusive)."""

    position: Position
    kind: str
    keyspace: str
    name: bytes
    value: bytes | ContentKey | None = None
    stop: bytes | None = None


class LogEntry(NamedTuple):
    """One record of the log, for people: `summary` counts what it did."""

    position: Position
    time_ms: int
    session: Position
    sequence: int
    size: int
    summary: dict[str, int]


class Names(NameMap[bytes, bytes]):
    """What a handle, a batch, a transaction and a view share: the default keyspace, and the way to the others."""

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope, DEFAULT_KEYSPACE, "bytes", "bytes")

    def _registry(self) -> NameMap[bytes, Any]:
        return NameMap(self._scope, REGISTRY_KEYSPACE, "bytes", "json")

    def keyspace(self, name: str, order: str | None = None, values: str | None = None) -> NameMap[Any, Any]:
        """The names of a keyspace, apart from all others. Created with the first use that may write.

        `order` says what names are ("bytes", "u64", "tuple"), `values` what values are ("bytes", "json"); both are
        fixed at creation (default "bytes"), and later calls may leave them out. Raises `InvalidArgument` if not.
        """
        check_keyspace_name(name)
        if order not in (None, *ORDERS) or values not in (None, *VALUES):
            raise InvalidArgument(f"a keyspace has an order of {list(ORDERS)} and values of {list(VALUES)}")
        entry = self._registry().get(name.encode())
        if entry is None:
            entry = self._create_keyspace(name, order or "bytes", values or "bytes")
        for given, stored in ((order, entry["order"]), (values, entry["values"])):
            if given not in (None, stored):
                raise InvalidArgument(f"keyspace {name!r} was created with {stored!r}, not {given!r}", keyspace=name)
        return NameMap(self._scope, entry["id"], entry["order"], entry["values"])

    def _create_keyspace(self, name: str, order: str, values: str) -> dict[str, Any]:
        try:
            self._scope.require_writable()
        except ReadOnly:
            raise NameNotFound(f"no keyspace {name!r}", name=name) from None

        batch = isinstance(self._scope, BatchScope) and not isinstance(self._scope, TransactionScope)
        dropped = batch and Names(HandleScope(self._core))._registry().get(name.encode()) is not None

        def work(scope: Scope) -> dict[str, Any]:
            registry: NameMap[bytes, Any] = NameMap(scope, REGISTRY_KEYSPACE, "bytes", "json")
            entry: dict[str, Any] | None = None if dropped else registry.get(name.encode())
            if entry is None:
                number = registry.get(_COUNTER, FIRST_USER_KEYSPACE)
                entry = {"id": number, "order": order, "values": values}
                registry.put(_COUNTER, number + 1)
                if not dropped:
                    registry.put(name.encode(), entry)
            return entry

        if not batch:
            return cast(dict[str, Any], self._scope.exclusively(work))
        # At once: nobody checks at the end of a batch whether another one took the same number meanwhile.
        entry: dict[str, Any] = run_transaction(self._core, work)
        if dropped:
            self._registry().put(name.encode(), entry)
        return entry

    def keyspaces(self) -> list[str]:
        """The names of the keyspaces, sorted."""
        return [name.decode() for name in self._registry().scan(keys_only=True) if name != _COUNTER]

    def drop_keyspace(self, name: str) -> None:
        """Delete a keyspace and all its names; raise `NameNotFound` if there is none."""
        self._scope.require_writable()

        def work(scope: Scope) -> None:
            registry: NameMap[bytes, Any] = NameMap(scope, REGISTRY_KEYSPACE, "bytes", "json")
            entry = registry.get(name.encode())
            if entry is None or not name:
                raise NameNotFound(f"no keyspace {name!r}", name=name)
            registry.delete(name.encode())
            prefix = prefix_of(entry["id"])
            scope.delete_range(prefix, end_of(prefix))

        self._scope.exclusively(work)

    def reserved_keyspace(self, number: int) -> NameMap[bytes, bytes]:
        """A keyspace of Basin's own, for layers."""
        return NameMap(self._scope, number, "bytes", "bytes")

    @property
    def scope(self) -> Scope:
        """Where these names are read and written, for layers."""
        return self._scope


def check_keyspace_name(name: str) -> None:
    """Raise `InvalidArgument` unless `name` is text of 1 to 255 bytes that does not begin with "basin."."""
    if type(name) is not str or not 0 < len(encode_text(name)) <= _KEYSPACE_NAME_MAX:
        raise InvalidArgument(f"a keyspace's name is text of 1 to {_KEYSPACE_NAME_MAX} bytes, not {name!r}")
    if name.startswith("basin."):
        raise InvalidArgument("keyspaces whose names begin with 'basin.' are Basin's own", keyspace=name)


class Batch(Names):
    """Changes that are committed together when its block ends, or discarded if an exception leaves it."""

    _scope: BatchScope

    def __init__(self, core: Core) -> None:
        super().__init__(self._new_scope(core))
        self.position: Position = 0
        """The log position of the commit, once the block has ended."""

    @staticmethod
    def _new_scope(core: Core) -> BatchScope:
        return BatchScope(core)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.position = self._scope.commit()
        else:
            self._scope.discard()


class Transaction(Batch):
    """A batch that reads one position, and raises `Conflict` at its end if something it read was changed since."""

    @staticmethod
    def _new_scope(core: Core) -> BatchScope:
        return TransactionScope(core)


class View(Names):
    """A read-only picture of the basin at one log position, and at one time, until it is closed."""

    _scope: ViewScope

    def __init__(self, scope: ViewScope) -> None:
        super().__init__(scope)

    @property
    def position(self) -> Position:
        """The log position that the view shows."""
        return self._scope.position

    def close(self) -> None:
        """End the view."""
        self._scope.closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Basin(Names):
    """An open basin. Safe for threads; not for a forked child; not pickled (see `ticket`).

    Operations outside of a batch are visible at once through this handle, and durable at the next `commit` or `close`,
    or within `sync_interval_s`. Leaving `with basin.open(…)` commits, exception or not.
    """

    def __init__(self, core: Core, url: str) -> None:
        super().__init__(HandleScope(core))
        self.url = url
        _open_cores.add(core)

    # --- batches, transactions, views -------------------------------------------------------------------------------

    def batch(self) -> Batch:
        """Changes that are committed together: `with db.batch() as b: …`."""
        return Batch(self._core)

    def transaction(self) -> Transaction:
        """Reads and changes that are committed together, or not at all: `with db.transaction() as tx: …`."""
        return Transaction(self._core)

    def run(self, work: Callable[[Any], T], retries: int = 8) -> T:
        """Call `work(transaction)` and commit; on `Conflict` again, at most `retries` times. Returns its result."""
        for attempt in range(retries + 1):
            try:
                with self.transaction() as transaction:
                    result = work(transaction)
            except Conflict:
                if attempt == retries:
                    raise
                continue
            return result
        raise InvalidArgument(f"retries is a count, not {retries!r}")

    def _view_scope(self) -> ViewScope:
        core = self._core
        core.require_open()
        if core.writable and core.poisoned is None:
            core.commit_pending()
        else:
            core.refresh()
        state, tables = core.current
        return ViewScope(core, tables, state.position, HandleScope(core).now_ms())

    def view(self) -> View:
        """The basin as it is now, after committing what is pending."""
        return View(self._view_scope())

    def _past_scope(self, position: Position) -> ViewScope:
        core = self._core
        if type(position) is not int or position < 0:
            raise InvalidArgument(f"a log position is a number from 0, not {position!r}")
        scope = self._view_scope()
        state, tables = core.current
        if position < state.floor or (position == 0 and state.floor):
            raise PositionGone(
                f"position {position} is below the history floor {state.floor}", position=position, floor=state.floor
            )
        if position > state.position:
            raise InvalidArgument(f"the log ends at {state.position}, before {position}", position=position)
        time_ms = self._time_of(position)
        return ViewScope(core, tables, position, time_ms) if time_ms is not None else scope

    def _time_of(self, position: Position) -> int | None:
        """The clock of the record at `position`; reads the log from the start of its segment."""
        if position == 0:
            return 0
        with self._while_kept(position):
            for entry in self._core.log.follow(self._core.log.cursor_before(position - 1), names_from=position - 1):
                return entry.record.time_ms
        return None

    @contextlib.contextmanager
    def _while_kept(self, position: Position) -> Iterator[None]:
        """Tell log that is damaged apart from log that somebody has just removed: that raises `PositionGone`."""
        try:
            yield
        except (CorruptionError, ObjectMissing):
            self._core.refresh()
            self._core.require_kept(position)
            raise

    def at(self, position: Position) -> View:
        """The basin as it was at a log position, at the time of its record. Raises `PositionGone` below the floor."""
        return View(self._past_scope(position))

    # --- the log ----------------------------------------------------------------------------------------------------

    def commit(self) -> Position:
        """Make everything changed through this handle durable, and see what others committed. Returns the position.

        With `sync="interval"` it returns at once, and the timer does it within `sync_interval_s`.
        """
        self._core.require_writable()
        if self._core.options.sync == "interval":
            return self._core.state.position
        return self._core.commit_pending()

    def refresh(self) -> Position:
        """See what others committed. Returns the log position that reads see now."""
        self._core.refresh()
        return self._core.state.position

    @property
    def head(self) -> Head:
        """Position and hash of the newest record, after committing what waits; remember it to detect a rollback."""
        core = self._core
        if core.writable and core.poisoned is None:
            core.commit_pending()
        else:
            core.refresh()
        return core.state.head

    def resolve(self, token: bytes) -> str:
        """Settle a `CommitUnknown`: "committed" or "absent", for certain from then on.

        Any handle that can write will do. On a local disk no outcome is ever unknown.
        """
        self._core.require_open()
        return self._core.resolve(token)

    def _entries(self, since: Position) -> Iterator[Entry]:
        core = self._core
        if type(since) is not int or since < 0:
            raise InvalidArgument(f"a log position is a number from 0, not {since!r}")
        if core.writable and core.poisoned is None:
            core.commit_pending()
        state = core.state
        if since < state.floor - 1:
            raise PositionGone(
                f"position {since} is below the history floor {state.floor}", position=since, floor=state.floor
            )
        with self._while_kept(since + 1):
            for entry in core.log.follow(core.log.cursor_before(since), names_from=since):
                self._core.require_kept(entry.position)
                if entry.position not in state.voids:
                    yield entry

    def changes(self, since: Position) -> Iterator[Change]:
        """Every logged change of a name after position `since`, oldest first, after committing what is pending.

        Follow a basin by passing the position of the last change. Changes of Basin's own keyspaces are left out. Raises
        `PositionGone` below the history floor.
        """
        entries = self._entries(since)
        state = self._core.state
        past = View(self._past_scope(since)) if state.floor <= since <= state.position else self
        numbers = {value["id"]: name.decode() for name, value in past._registry().scan() if name != _COUNTER}
        numbers[DEFAULT_KEYSPACE] = ""
        for entry in entries:
            for change in self._changes_of(entry):
                number = int.from_bytes(change.name[:KEYSPACE_PREFIX_SIZE], "big")
                if number == REGISTRY_KEYSPACE:
                    numbers.update(self._keyspace_of(change))
                if number in numbers:
                    yield change._replace(
                        keyspace=numbers[number],
                        name=change.name[KEYSPACE_PREFIX_SIZE:],
                        stop=None if change.stop is None else _stop_in(number, change.stop),
                    )

    def _keyspace_of(self, change: Change) -> dict[int, str]:
        """The number and name of the keyspace that a change of the registry creates, if it does."""
        name = change.name[KEYSPACE_PREFIX_SIZE:]
        if change.kind not in ("put", "ref") or name == _COUNTER:
            return {}
        value = change.value
        data = self._core.contents.get(value.digest) if isinstance(value, ContentKey) else value
        return {VALUES["json"].decode(data or b"")["id"]: name.decode()}

    def _changes_of(self, entry: Entry) -> Iterator[Change]:
        position = entry.position
        for index, batch in enumerate(entry.record.batches):
            for start, stop in batch.ranges:
                yield Change(position, "delete_range", "", start, None, stop)
            for name, value in zip(batch.names, batch.values, strict=True):
                yield Change(position, "put", "", name, value)
            for name, key in zip(batch.reference_names, batch.reference_keys, strict=True):
                yield Change(position, "ref", "", name, ContentKey(key))
            for name in batch.deletes:
                yield Change(position, "delete", "", name)
            if batch.run:
                yield from self._changes_of_run(position, first_version(position) + index)

    def _changes_of_run(self, position: Position, version: int) -> Iterator[Change]:
        """The changes of a batch that was large, at `version`: its run, or whatever the run was merged into."""
        for run in self._core.current.tables.runs:
            if not run.run.version_min <= version <= run.run.version_max:
                continue
            for number in range(len(run.directory.firsts)):
                block = run.block(number)
                for at in range(len(block.names)):
                    found = block.entry(at)
                    if found.version == version:
                        kind = ("delete", "put", "ref")[found.kind]
                        value = ContentKey(found.value) if kind == "ref" else found.value
                        yield Change(position, kind, "", found.name, None if kind == "delete" else value)

    def log(self, start: Position = 0, stop: Position | None = None) -> Iterator[LogEntry]:
        """The records from `start` (inclusive) to `stop` (exclusive), oldest first; `start` 0: the oldest kept."""
        core = self._core
        if core.writable and core.poisoned is None:
            core.commit_pending()  # Before the floor is read: upkeep after a commit may raise it.
        for entry in self._entries(max(start, core.state.floor, 1) - 1):
            if stop is not None and entry.position >= stop:
                return
            yield LogEntry(
                entry.position,
                entry.record.time_ms,
                entry.record.session or entry.position,
                entry.record.sequence,
                entry.size,
                _summary(entry),
            )

    # --- the whole store --------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Sizes and counts, as plain numbers. Reads no stratum."""
        self._core.require_open()
        return stats(self._core, self.url)

    def check(
        self,
        read_data: bool | float = True,  # noqa: FBT001, FBT002  # as the design spells it
        *,
        read_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Check:
        """Yield everything that is wrong: structure and indexes, with `read_data` every byte too. Changes nothing.

        With a share as `read_data` (above 0, up to 1), or with `read_size`, a run reads that much of the stored bytes,
        and the next one goes on behind it: after 1/share runs of a basin that does not change, everything was read.
        Where they are is kept in the basin: this commits, and raises `ReadOnly` through a handle that cannot. How far
        they are is `coverage` of what is returned, at its end.

        `progress` is called with (bytes done, bytes in all).
        """
        from basin.engine.rounds import Check

        self._core.refresh()
        return Check(self._core, read_data=read_data, read_size=read_size, progress=progress)

    def repair(self, *, dry_run: bool = True) -> list[RepairAction]:
        """Mend what `check` names from what can be read; by default only say what would be done."""
        from basin.engine.repair import repair

        return repair(self._core, dry_run=dry_run)

    def compact(
        self,
        *,
        prune: bool = True,
        grace_s: float | None = None,
        rate: float = 0,
        rewrite_cold: bool = False,
        stop: threading.Event | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> CompactionReport:
        """Keep the basin small and fast: merge runs, strata and indexes; with `prune`, let go of what nothing needs.

        Others may write and read meanwhile, and compact, too. What a prune finds dead is condemned, stays for `grace_s`
        (by default the handle's option) and is deleted by a later run; a grace of 0 deletes at once, and is safe, but
        an open batch that found such content stored gets a `Conflict` and must put it again. `rate`: bytes a second to
        read and write at most. `rewrite_cold`: also strata in a cold storage class, which costs money. `stop` ends it
        early at a safe point. Memory is bounded, whatever the size of the basin; cost: one pass over names, indexes and
        links, and what is written anew. Damage is left to `repair` and stands in the report.
        """
        from basin.engine.compaction import Compaction

        return Compaction(
            self._core,
            prune=prune,
            grace_s=grace_s,
            rate=rate,
            rewrite_cold=rewrite_cold,
            stop=stop,
            progress=progress,
        ).run()

    def plan_compaction(self, *, prune: bool = True, grace_s: float | None = None) -> list[CompactionStep]:
        """What `compact` would do first, why, and how many bytes that reads, writes and frees. Writes nothing."""
        from basin.engine.compaction import plan

        self._core.require_open()
        return plan(self._core, prune=prune, grace_s=grace_s)

    def explain_space(self) -> Space:
        """What the stored bytes are: needed, kept alive by dead parents, dead, condemned, superseded; by stratum, too.

        Writes nothing. Cost: that of marking, so one pass over names, indexes and links.
        """
        from basin.engine.space import explain_space

        self._core.require_open()
        return explain_space(self._core)

    def pin(self, label: str, position: Position | None = None) -> Position:
        """Keep a position (default: the newest) readable by `at` until `unpin`; returns it.

        Old versions and contents that it shows are kept. Raises `PositionGone` below the history floor.
        """
        core = self._core
        core.require_writable()
        core.commit_pending()
        if position is not None:
            self._past_scope(position).closed = True
        name, pinned = label.encode(), position

        def build(now: State) -> Record | None:
            nonlocal pinned
            pinned = now.position if position is None else position
            return Record(pins_added=[Pin(name, pinned)]) if pinned >= now.floor else None

        if not core.append(build) or pinned is None:
            raise PositionGone(f"position {pinned} is below the history floor", position=pinned, floor=core.state.floor)
        return pinned

    def unpin(self, label: str) -> None:
        """Let go of a pinned position. No error if there is none of that label."""
        self._core.require_writable()
        name = label.encode()
        self._core.append(lambda now: Record(pins_removed=[name]) if name in now.pins else None)

    def pins(self) -> dict[str, Position]:
        """The pinned positions."""
        self._core.refresh()
        return {name.decode(errors="replace"): position for name, position in self._core.state.pins.items()}

    def import_from(self, source: Basin, *, progress: Callable[[int, int | None], None] | None = None) -> CopyReport:
        """Copy every name of another open basin, such as a flat file, and all contents they reach; durable on return.

        All keyspaces come, with expiry, references, roots and links. Of equal names the source's value counts. What is
        here already is not read again, so importing twice changes nothing. In batches of bounded size, not in one step.
        `progress` is called with the bytes of contents copied. Raises what reading the source raises, and `Conflict` if
        somebody collects meanwhile what was found here: import again.
        """
        from basin.engine.copying import all_spans, copy_names

        self._core.require_writable()
        with source.view() as view:
            return copy_names(view.scope, self, all_spans(view.scope, self), progress)

    @property
    def secrets(self) -> Secrets:
        """The key slots: list, add, remove, rotate."""
        from basin.engine.secrets import Secrets

        return Secrets(self._core)

    # --- life -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Commit what is pending, finish the strata, end the session. Closing twice is harmless."""
        self._core.close()

    @property
    def closed(self) -> bool:
        """Whether the handle was closed."""
        return bool(self._core.closed)

    @property
    def core(self) -> Core:
        """The engine below, for layers."""
        return self._core

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<basin {self.url}{' (closed)' if self.closed else ''}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a basin is not pickled; pass db.ticket() to the other process, and call basin.ingest there")

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _stop_in(number: int, stop: bytes) -> bytes | None:
    """The end of a range as a name of its keyspace; None if the range ends with the keyspace."""
    return stop[KEYSPACE_PREFIX_SIZE:] if stop.startswith(prefix_of(number)) else None


def _summary(entry: Entry) -> dict[str, int]:
    record = entry.record
    counted = {
        "batches": len(record.batches),
        "names": sum(len(batch) for batch in record.batches),
        "strata_added": len(record.strata_added),
        "strata_removed": len(record.strata_removed),
        "name_runs_added": len(record.name_runs_added),
        "index_runs_added": len(record.index_runs_added),
        "session_begun": int(record.session_begun),
        "sessions_ended": len(record.sessions_ended),
        "sessions_revoked": len(record.sessions_revoked),
        "slots_added": len(record.slots_added),
        "slots_removed": len(record.slots_removed),
        "generation": record.generation,
        "floor": record.floor,
    }
    return {name: count for name, count in counted.items() if count}


_open_cores: weakref.WeakSet[Core] = weakref.WeakSet()


def _close_in_child() -> None:
    """In a forked child: no flush, no unlock, no end of session. Using an inherited handle raises `BasinClosed`."""
    for core in list(_open_cores):
        core.closed = core.closed or "this handle was inherited through fork"
        core.commit_mutex = threading.RLock()


os.register_at_fork(after_in_child=_close_in_child)

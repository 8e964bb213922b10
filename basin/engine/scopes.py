"""Scopes: the handle, a batch, a transaction and a view, as the four places where names are read and written.

- The handle reads at its newest position, with its own pending changes on top.
- A batch reads like the handle, with its own changes on top of all; they are committed together at its end.
- A transaction reads one position with its own changes on top, and remembers what it read; its commit is refused if any
  of that changed since (also by a name that came into a range it scanned).
- A view reads one position and one time, for its whole life.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from basin.engine.contents import Relied
from basin.engine.core import Core, Current, Pending
from basin.engine.keyspace import Scope
from basin.engine.memtable import Memtable, Row
from basin.engine.names import Found, Tables, find_row, newer_than, scan
from basin.engine.state import last_version
from basin.errors import BasinClosed, Conflict, ObjectMissing, ReadOnly

_RETRIES: Final = 64
_ALL: Final = (1 << 64) - 1


def _scan(
    core: Core,
    overlays: Sequence[Memtable],
    tables: Tables,
    start: bytes,
    stop: bytes,
    position: int,
    *,
    now_ms: int,
    reverse: bool,
) -> Iterator[Found]:
    """`scan` at one position; where files of it are gone, the scan goes on in what they were merged into."""
    version = last_version(position)
    while True:
        try:
            for found in scan(overlays, tables, start, stop, version_max=version, now_ms=now_ms, reverse=reverse):
                yield found
                if reverse:
                    stop = found.names[-1]
                else:
                    start = found.names[-1] + b"\0"
        except ObjectMissing:
            tables = core.look_again(tables, position)
        else:
            return


class HandleScope(Scope):
    """The handle itself."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def find(self, name: bytes) -> Row | None:
        core = self.core
        core.maybe_refresh()
        overlays = core.overlays()  # First: what is committed in between is then in one place or in both.
        state, tables = core.current
        try:
            return find_row(overlays, tables, name, last_version(state.position))
        except ObjectMissing:
            return find_row(overlays, core.look_again(tables, state.position), name, last_version(state.position))

    def chunks(self, start: bytes, stop: bytes, *, reverse: bool) -> Iterator[Found]:
        core = self.core
        core.maybe_refresh()
        overlays = core.overlays()
        state, tables = core.current
        return _scan(core, overlays, tables, start, stop, state.position, now_ms=self.now_ms(), reverse=reverse)

    def put(self, name: bytes, kind: int, value: bytes, expiry_ms: int, relied: Relied | None) -> None:
        self.core.put_row(name, kind, value, expiry_ms, relied)

    def put_all(self, rows: list[tuple[bytes, int, bytes]], expiry_ms: int, relied: Relied) -> None:
        self.core.put_rows(rows, expiry_ms, relied)

    def put_same(self, names: list[bytes], value: bytes, relied: Relied) -> None:
        self.core.put_same(names, value, relied)

    def rely(self, relied: Relied) -> None:
        self.core.rely(relied)

    def delete_range(self, start: bytes, stop: bytes) -> None:
        self.core.delete_rows(start, stop)

    def require_writable(self) -> None:
        self.core.require_writable()

    def exclusively(self, work: Callable[[Scope], Any]) -> Any:
        return run_transaction(self.core, work)


class BatchScope(Scope):
    """Changes that will be committed together."""

    def __init__(self, core: Core) -> None:
        core.require_writable()
        self.core = core
        self.pending = Pending(Memtable(on_top=True))
        core.open_batches.add(self.pending)
        self.finished = False

    def _overlays(self) -> list[Memtable]:
        return [self.pending.names, *self.core.overlays()]

    def _current(self) -> Current:
        self.core.maybe_refresh()
        return self.core.current

    def find(self, name: bytes) -> Row | None:
        self._require_unfinished()
        overlays = self._overlays()  # First: what is committed in between is then in one place or in both.
        state, tables = self._current()
        try:
            return find_row(overlays, tables, name, last_version(state.position))
        except ObjectMissing:
            again = self.core.look_again(tables, state.position)
            return find_row(overlays, again, name, last_version(state.position))

    def chunks(self, start: bytes, stop: bytes, *, reverse: bool) -> Iterator[Found]:
        self._require_unfinished()
        overlays = self._overlays()
        state, tables = self._current()
        now_ms = self.now_ms()
        return _scan(self.core, overlays, tables, start, stop, state.position, now_ms=now_ms, reverse=reverse)

    def put(self, name: bytes, kind: int, value: bytes, expiry_ms: int, relied: Relied | None) -> None:
        self._require_unfinished()
        self.pending.names.put(name, kind, value, expiry_ms)
        self.pending.relied.update(relied or {})

    def put_all(self, rows: list[tuple[bytes, int, bytes]], expiry_ms: int, relied: Relied) -> None:
        self._require_unfinished()
        self.pending.names.put_all(rows, expiry_ms)
        self.pending.relied.update(relied)

    def put_same(self, names: list[bytes], value: bytes, relied: Relied) -> None:
        self._require_unfinished()
        self.pending.names.put_same(names, value)
        self.pending.relied.update(relied)

    @property
    def relied(self) -> Relied:
        return self.pending.relied

    def hold(self, relied: Relied) -> None:
        self._require_unfinished()
        self.pending.relied.update(relied)

    def rely(self, relied: Relied) -> None:
        """Contents were put without a name."""
        self._require_unfinished()
        self.pending.relied.update(relied)
        self.pending.written = True

    def delete_range(self, start: bytes, stop: bytes) -> None:
        self._require_unfinished()
        self.pending.names.delete_range(start, stop)

    def require_writable(self) -> None:
        self._require_unfinished()
        self.core.require_writable()

    def exclusively(self, work: Callable[[Scope], Any]) -> Any:
        self._require_unfinished()
        return work(self)

    def _require_unfinished(self) -> None:
        if self.finished:
            raise BasinClosed("this batch or transaction is over")
        self.core.require_open()

    def commit(self) -> int:
        """Commit all changes; returns their log position (0 if there were none)."""
        self._require_unfinished()
        self.finished = True
        try:
            return self.core.commit(self.pending) if self.pending else 0
        finally:
            self.core.open_batches.discard(self.pending)

    def discard(self) -> None:
        """Forget all changes."""
        self.finished = True
        self.core.open_batches.discard(self.pending)


class TransactionScope(BatchScope):
    """Reads at one position, remembered; writes committed only if nothing read has changed."""

    def __init__(self, core: Core) -> None:
        super().__init__(core)
        core.commit_pending()
        self._begun = core.current
        self.read_position = self._begun.state.position
        self._version = last_version(self.read_position)
        self._now_ms = super().now_ms()
        self._names_read: set[bytes] = set()
        self._ranges_read: list[list[bytes]] = []
        self.pending.check = self._check

    def _overlays(self) -> list[Memtable]:
        return [self.pending.names]

    def _current(self) -> Current:
        return self._begun

    def now_ms(self) -> int:
        return self._now_ms

    def find(self, name: bytes) -> Row | None:
        self._names_read.add(name)
        return super().find(name)

    def chunks(self, start: bytes, stop: bytes, *, reverse: bool) -> Iterator[Found]:
        inner = super().chunks(start, stop, reverse=reverse)
        # Grows with what is consumed, so that a limited scan conflicts only with what it saw.
        read = [stop, stop] if reverse else [start, start]
        self._ranges_read.append(read)

        def tracked() -> Iterator[Found]:
            for found in inner:
                if reverse:
                    read[0] = found.names[-1]
                else:
                    read[1] = found.names[-1] + b"\0"
                yield found
            read[:] = [start, stop]

        return tracked()

    def _check(self, accepted: Sequence[Pending]) -> None:
        """Raise `Conflict` if something read was changed, in the log since, or by a batch before this one."""
        state, tables = self.core.current
        if state.floor > self._begun.state.position:
            raise Conflict("this transaction is older than the history that is kept", names=[])
        for name in self._names_read:
            row = find_row((), tables, name, _ALL)
            if row is not None and row[0] > self._version:
                raise Conflict("a name read by this transaction was changed by another commit", names=[name[4:]])
            if any(_touches(pending.names, name, name + b"\0") for pending in accepted):
                raise Conflict("a name read by this transaction was changed by another commit", names=[name[4:]])
        for start, stop in self._ranges_read:
            if start >= stop:
                continue
            if newer_than(tables, start, stop, self._version) or any(
                _touches(pending.names, start, stop) for pending in accepted
            ):
                raise Conflict("a range read by this transaction was changed by another commit", names=[start[4:]])


def _touches(names: Memtable, start: bytes, stop: bytes) -> bool:
    """Whether a batch changes anything in [start, stop)."""
    return bool(names.names(start, stop, 1, reverse=False)) or any(
        low < stop and start < high for low, high, _ in names.ranges
    )


def run_transaction(core: Core, work: Callable[[Scope], Any], retries: int = _RETRIES) -> Any:
    """Run `work` in a transaction until it commits, at most `retries` times again; then the `Conflict` is raised."""
    for attempt in range(retries + 1):
        scope = TransactionScope(core)
        result = work(scope)
        try:
            scope.commit()
        except Conflict:
            if attempt == retries:
                raise
            continue
        return result
    raise Conflict("the transaction was retried in vain")


class ViewScope(Scope):
    """One position and one time."""

    def __init__(self, core: Core, tables: Tables, position: int, now_ms: int) -> None:
        self.core = core
        self.position = self.read_position = position
        self._tables = tables
        self._version = last_version(position)
        self._now_ms = now_ms
        self.closed = False

    def now_ms(self) -> int:
        return self._now_ms

    def _require_open(self) -> None:
        self.core.require_open()
        if self.closed:
            raise BasinClosed("this view is over")

    def find(self, name: bytes) -> Row | None:
        self._require_open()
        try:
            return find_row((), self._tables, name, self._version)
        except ObjectMissing:
            self._tables = self.core.look_again(self._tables, self.position)
            return find_row((), self._tables, name, self._version)

    def chunks(self, start: bytes, stop: bytes, *, reverse: bool) -> Iterator[Found]:
        self._require_open()
        tables, now_ms = self._tables, self._now_ms
        return _scan(self.core, (), tables, start, stop, self.position, now_ms=now_ms, reverse=reverse)

    def require_writable(self) -> None:
        raise ReadOnly("a view is read-only")

    def put(self, name: bytes, kind: int, value: bytes, expiry_ms: int, relied: Relied | None) -> None:
        self.require_writable()

    def put_all(self, rows: list[tuple[bytes, int, bytes]], expiry_ms: int, relied: Relied) -> None:
        self.require_writable()

    def put_same(self, names: list[bytes], value: bytes, relied: Relied) -> None:
        self.require_writable()

    def rely(self, relied: Relied) -> None:
        self.require_writable()

    def delete_range(self, start: bytes, stop: bytes) -> None:
        self.require_writable()

    def exclusively(self, work: Callable[[Scope], Any]) -> Any:
        raise ReadOnly("a view is read-only")

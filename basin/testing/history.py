"""`History`: what actors did to a store, as each of them saw it; and whether the store's log explains it.

The log is what the store holds in the end: `LoggedCommit`s in the order of their positions. `check_history` demands:

- Every acknowledged commit stands in the log exactly once, with its changes, at the position that was told. One whose
  outcome is unknown stands there once or not at all; one that failed for sure does not. Nothing else stands there.
- Real time: a commit that was acknowledged before another one began stands before it.
- A read is the state at one position; not older than what its actor saw before, nor than the actor's own acknowledged
  commits (nor, if it is `fresh`, than anybody's that was acknowledged before it began); not from the future: every
  commit below that position had begun when the read returned.

Moments are counted, not timed: each beginning and end is a moment of its own. Safe for several threads.

Imports `basin.errors` only.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from basin.errors import Conflict

Changes: TypeAlias = Mapping[Any, Any]
"""New values by name; `None` deletes. A name without a value reads as `None`."""

Outcome: TypeAlias = Literal["done", "failed", "unknown"]

_SHOWN_MAX: Final = 10


class HistoryError(AssertionError):
    """No order of commits explains what the actors saw."""


class LoggedCommit(NamedTuple):
    """One commit as the store's log has it. `label` tells which one it is."""

    position: int
    label: str
    changes: Changes


@dataclass(slots=True)
class CommitOperation:
    """A commit: who, which, and from when to when. `position` is what the store told, if it did."""

    actor: str
    label: str
    changes: Changes
    invoked: int
    returned: int | None = None
    outcome: Outcome = "unknown"
    position: int | None = None


@dataclass(slots=True)
class ReadOperation:
    """A read of some names in one view. `values` is `None` if it failed; `position` is what the store told."""

    actor: str
    fresh: bool
    invoked: int
    returned: int | None = None
    values: Mapping[Any, Any] | None = None
    position: int | None = None


@dataclass(slots=True)
class History:
    """Operations in the order in which they began."""

    commits: list[CommitOperation] = field(default_factory=list)
    reads: list[ReadOperation] = field(default_factory=list)
    _moments: Iterator[int] = field(default_factory=itertools.count)
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def commit(
        self,
        actor: str,
        label: str,
        changes: Changes,
        action: Callable[[], int | None],
        *,
        failed: tuple[type[BaseException], ...] = (Conflict,),
    ) -> int | None:
        """Perform `action`, which commits `changes` and returns the position (or `None`), and record it.

        An error of a type in `failed` says that nothing was committed; after any other the outcome is unknown. Errors
        are raised on.
        """
        with self._mutex:
            operation = CommitOperation(actor, label, dict(changes), next(self._moments))
            self.commits.append(operation)
        try:
            operation.position = action()
            operation.outcome = "done"
        except failed:
            operation.outcome = "failed"
            raise
        finally:
            operation.returned = next(self._moments)
        return operation.position

    def resolve(self, label: str, *, committed: bool) -> None:
        """Record that the store has now told what became of a commit whose outcome was unknown."""
        for operation in self.commits:
            if operation.label == label:
                operation.outcome = "done" if committed else "failed"
                operation.returned = next(self._moments)

    def read(
        self,
        actor: str,
        action: Callable[[], tuple[int | None, Mapping[Any, Any]]],
        *,
        fresh: bool = False,
    ) -> Mapping[Any, Any]:
        """Perform `action`, which returns its position (or `None`) and the values of the names it read; record it.

        `fresh` says that the actor caught up within `action`. Errors are raised on, and prove nothing.
        """
        with self._mutex:
            operation = ReadOperation(actor, fresh, next(self._moments))
            self.reads.append(operation)
        operation.position, values = action()
        operation.returned = next(self._moments)
        operation.values = dict(values)
        return operation.values


def check_history(history: History, log: Sequence[LoggedCommit], *, initial: Changes | None = None) -> None:
    """Raise `HistoryError`, which names what is wrong, unless `log` explains the history from the state `initial`."""
    _require_nothing([*_log_violations(history, log), *_order_violations(history, log)])
    _require_nothing(list(_read_violations(history, log, initial or {})))


def check_sum(
    history: History,
    log: Sequence[LoggedCommit],
    accounts: Sequence[Any],
    total: int,
    *,
    initial: Changes | None = None,
    amount: Callable[[Any], int] = int,
) -> None:
    """Raise `HistoryError` unless the accounts' amounts sum to `total` at every position and in every read of them all.

    What precedes the first commit to an account is not looked at, if `initial` has none; a missing account holds 0.
    """

    def total_of(values: Mapping[Any, Any]) -> int:
        return sum(amount(values[account]) for account in accounts if values.get(account) is not None)

    wrong = []
    state = dict(initial or {})
    for logged in log:
        state.update(logged.changes)
        found = total_of(state)
        if found != total and any(state.get(account) is not None for account in accounts):
            wrong.append(f"the sum is {found} after {logged.label} at position {logged.position}, not {total}")
    for read in history.reads:
        if read.values is None or not all(account in read.values for account in accounts):
            continue
        found = total_of(read.values)
        if found != total and any(read.values[account] is not None for account in accounts):
            wrong.append(f"{_shown(read)} sums to {found}, not to {total}")
    _require_nothing(wrong)


def _require_nothing(wrong: Sequence[str]) -> None:
    if wrong:
        shown = "\n".join(wrong[:_SHOWN_MAX])
        raise HistoryError(f"{len(wrong)} things are wrong (at most {_SHOWN_MAX} are shown):\n{shown}")


def _log_violations(history: History, log: Sequence[LoggedCommit]) -> Iterator[str]:
    """Each commit against its entries in the log."""
    positions = [logged.position for logged in log]
    if positions != sorted(set(positions)):
        yield f"positions do not ascend: {positions}"
    counts = Counter(logged.label for logged in log)
    found = {logged.label: logged for logged in log}
    for label, count in Counter(operation.label for operation in history.commits).items():
        if count > 1:
            yield f"the history has {count} commits {label}"
    for label in counts.keys() - {operation.label for operation in history.commits}:
        yield f"phantom: nobody committed {label}, which stands at position {found[label].position}"
    for operation in history.commits:
        count = counts[operation.label]
        if count > 1:
            yield f"duplicate: {_shown(operation)} stands in the log {count} times"
        elif operation.outcome == "done" and not count:
            yield f"lost: {_shown(operation)} was acknowledged, and does not stand in the log"
        elif operation.outcome == "failed" and count:
            yield f"revived: {_shown(operation)} failed, and stands at position {found[operation.label].position}"
        elif count:
            yield from _entry_violations(operation, found[operation.label])


def _entry_violations(operation: CommitOperation, logged: LoggedCommit) -> Iterator[str]:
    if dict(logged.changes) != dict(operation.changes):
        yield f"changed: {_shown(operation)} stands in the log with {logged.changes}"
    if operation.position is not None and operation.position != logged.position:
        yield f"misplaced: {_shown(operation)} stands at position {logged.position}, {operation.position} was told"


def _order_violations(history: History, log: Sequence[LoggedCommit]) -> Iterator[str]:
    """Acknowledged before another one began, and yet behind it.

    A sweep in the order of beginnings: only the latest position of what had returned by then need be compared.
    """
    position_of = {logged.label: logged.position for logged in log}
    logged = [operation for operation in history.commits if operation.label in position_of]
    acknowledged = sorted(_acknowledged(logged), key=_end)
    latest: CommitOperation | None = None
    count = 0
    for operation in sorted(logged, key=lambda operation: operation.invoked):
        while count < len(acknowledged) and _end(acknowledged[count]) < operation.invoked:
            returned = acknowledged[count]
            if latest is None or position_of[returned.label] > position_of[latest.label]:
                latest = returned
            count += 1
        if latest is not None and position_of[latest.label] > position_of[operation.label]:
            yield f"reordered: {_shown(latest)} had returned, and stands behind {_shown(operation)}"


def _acknowledged(commits: Sequence[CommitOperation]) -> list[CommitOperation]:
    return [operation for operation in commits if operation.outcome == "done"]


def _end(operation: CommitOperation | ReadOperation) -> int:
    return -1 if operation.returned is None else operation.returned


class _Versions:
    """Each name's values over the log. An index is a count of commits; index 0 is the initial state."""

    def __init__(self, log: Sequence[LoggedCommit], initial: Changes) -> None:
        self.count = len(log)
        self._initial = initial
        self._indexes: dict[Any, list[int]] = {}
        self._values: dict[Any, list[Any]] = {}
        for index, logged in enumerate(log, 1):
            for name, value in logged.changes.items():
                self._indexes.setdefault(name, []).append(index)
                self._values.setdefault(name, []).append(value)

    def value(self, name: Any, index: int) -> Any:
        """What `name` has after `index` commits."""
        place = bisect_right(self._indexes.get(name, []), index)
        return self._values[name][place - 1] if place else self._initial.get(name)

    def first_match(self, values: Mapping[Any, Any], low: int, high: int) -> int | None:
        """The lowest index from `low` to `high` at which every name has its value.

        Only `low`, and the indexes that change one of the names, need be tried.
        """
        changed = {low}
        for name in values:
            indexes = self._indexes.get(name, [])
            changed.update(indexes[bisect_right(indexes, low) : bisect_right(indexes, high)])
        for index in sorted(changed):
            if index <= high and all(self.value(name, index) == value for name, value in values.items()):
                return index
        return None


def _read_violations(history: History, log: Sequence[LoggedCommit], initial: Changes) -> Iterator[str]:
    """Each read against the states it may have seen.

    Without a told position the lowest index that fits is taken as seen: it leaves an actor's later reads most room.
    """
    versions = _Versions(log, initial)
    index_of = {logged.label: index for index, logged in enumerate(log, 1)}
    positions = [logged.position for logged in log]
    begun = {operation.label: operation.invoked for operation in history.commits}
    seen: dict[str, int] = {}
    for read in sorted(history.reads, key=_end):
        if read.values is None:
            continue
        low = max(seen.get(read.actor, 0), _floor(history, read, index_of))
        high = next((index for index, one in enumerate(log) if begun[one.label] > _end(read)), len(log))
        if read.position is None:
            index = versions.first_match(read.values, low, high)
        else:
            told = bisect_right(positions, read.position)
            index = versions.first_match(read.values, told, told) if low <= told <= high else None
        if index is None:
            yield _explained(read, versions, low, high)
        else:
            seen[read.actor] = max(index, seen.get(read.actor, 0))


def _floor(history: History, read: ReadOperation, index_of: Mapping[str, int]) -> int:
    """The index below which a read is stale, by the commits that were acknowledged before it began."""
    return max(
        (
            index_of[operation.label]
            for operation in _acknowledged(history.commits)
            if (read.fresh or operation.actor == read.actor) and _end(operation) < read.invoked
        ),
        default=0,
    )


def _explained(read: ReadOperation, versions: _Versions, low: int, high: int) -> str:
    """Why no allowed state fits: the values are of another one, or of none."""
    fits = versions.first_match(read.values or {}, 0, versions.count)
    if fits is None:
        return f"torn: {_shown(read)} is the state at no position"
    word = "stale" if fits < low else "future" if fits > high else "misplaced"
    return f"{word}: {_shown(read)} is the state after {fits} commits; {low} to {high} were to be seen"


def _shown(operation: CommitOperation | ReadOperation) -> str:
    when = f"(moments {operation.invoked} to {operation.returned})"
    if isinstance(operation, CommitOperation):
        return f"commit {operation.label} of {operation.actor} {when}"
    return f"read of {operation.actor} {when} {operation.values}"

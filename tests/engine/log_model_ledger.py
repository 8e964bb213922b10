"""The log of the collector's model: small records, judged by the real `apply`, and what a log says, in numbers.

A stratum's number holds its contents (bits) and which of those with the same contents it is. A node stands for all logs
that fold to the same state: records are built, judged and appended at once, so nothing refers to a log by its hash.

Imported by `log_model_collector` and its tests. Knows nothing of actors.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Final, NamedTuple

from basin.engine import state as rules
from basin.engine.state import FINISHED, State
from basin.errors import Conflict
from basin.format.record import Batch, Condemn, Kill, Record, StratumAdded
from basin.terms import StratumId

SAME_CONTENTS_MAX: Final = 32
_NOW_MS: Final = 1_800_000_000_000
FIRST_SESSION: Final = 1
STUCK: Final = "somebody is stuck"


class Broken(Exception):
    """An invariant does not hold. `invariant` is its name; the notes are the steps that lead there."""

    def __init__(self, invariant: str) -> None:
        super().__init__(invariant)
        self.invariant = invariant


def contents_of(number: int) -> int:
    """The contents of a stratum, as bits."""
    return number // SAME_CONTENTS_MAX


def unused(contents: int, used: Collection[int]) -> int:
    """A number for a new stratum."""
    numbers = range(contents * SAME_CONTENTS_MAX, (contents + 1) * SAME_CONTENTS_MAX)
    return next(number for number in numbers if number not in used)


@functools.cache
def _identity(number: int) -> StratumId:
    return StratumId(number.to_bytes(16, "big"))


def _identities(numbers: Iterable[int]) -> list[StratumId]:
    return [_identity(number) for number in numbers]


def _numbers(identities: Iterable[bytes]) -> tuple[int, ...]:
    return tuple(sorted(int.from_bytes(identity, "big") for identity in identities))


class Change(NamedTuple):
    """What a record says. Strata are numbers."""

    session: int
    commit: tuple[int, int] | None = None
    """The writer and the step that it commits."""
    names: tuple[tuple[bytes, int], ...] = ()
    dropped: tuple[bytes, ...] = ()
    added: tuple[int, ...] = ()
    owner: int = 0
    """The session of what is added, if it is another one."""
    removed: tuple[int, ...] = ()
    relied: tuple[int, ...] = ()
    revived: tuple[int, ...] = ()
    condemned: tuple[int, ...] = ()
    mark: int = 0
    killed: tuple[int, ...] = ()
    condemn: int = 0
    files_kept: bool = False
    files_deleted: tuple[int, ...] = ()
    revoked: tuple[int, ...] = ()


class View(NamedTuple):
    """What the log says at a node."""

    position: int
    live: tuple[int, ...]
    condemned: tuple[int, ...]
    condemns: dict[int, tuple[int, ...]]
    relied: dict[int, int]
    retired: frozenset[int]
    gone: frozenset[int]
    sessions: frozenset[int]
    names: tuple[tuple[bytes, int], ...]
    commits: tuple[tuple[int, int], ...]

    @property
    def strata(self) -> tuple[int, ...]:
        """All that count."""
        return self.live + self.condemned

    def places(self, content: int) -> list[int]:
        """The strata that hold a content, live ones first."""
        return [number for number in self.strata if contents_of(number) & content]


class Ledger:
    """Every log that can come about."""

    def __init__(self, strata: Iterable[int], names: Iterable[tuple[bytes, int]], sessions: int) -> None:
        """Node 0 is the log in which somebody who is gone wrote `strata` and `names`, and others began sessions."""
        self.views: list[View] = []
        self._states: list[State] = []
        self._known: dict[tuple[object, ...], int] = {}
        self._after: dict[tuple[int, Change], int] = {}
        state = State()
        first = Record(session_begun=True, sequence=1, time_ms=_NOW_MS)
        first.batches = [_batch(Change(FIRST_SESSION, names=tuple(names)))]
        first.strata_added = [_added(number, FIRST_SESSION) for number in strata]
        for record in (first, *(Record(session_begun=True, sequence=1) for _ in range(sessions))):
            record.previous, record.time_ms = state.hash, _NOW_MS
            state = rules.apply(state, record, _hash(state.position + 1))
        self._node(state, tuple(sorted(names)), ())

    def append(self, node: int, change: Change) -> int:
        """The node behind one more record; raises the `Conflict` of the rule that refuses it."""
        after = self._after.get((node, change))
        if after is None:
            after = self._after[node, change] = self._judged(node, change)
        if after < 0:
            raise Conflict("refused", rule=-after)  # A new one: an error that is kept would keep all that it passed.
        return after

    def _judged(self, node: int, change: Change) -> int:
        """The node behind it, or, negated, the rule that refuses it."""
        before, view = self._states[node], self.views[node]
        try:
            state = rules.apply(before, _record(before, change), _hash(before.position + 1))
        except Conflict as conflict:
            return -int(conflict.rule)
        except (KeyError, TypeError, ValueError) as error:
            raise Broken(STUCK) from error
        names = dict(view.names) | dict(change.names)
        for name in change.dropped:
            names.pop(name, None)
        commits = view.commits if change.commit is None else (*view.commits, change.commit)
        return self._node(state, tuple(sorted(names.items())), tuple(sorted(commits)))

    def _node(self, state: State, names: tuple[tuple[bytes, int], ...], commits: tuple[tuple[int, int], ...]) -> int:
        view = _view(state, names, commits)
        key = (
            view.position,
            tuple(sorted(view.relied.items())),
            tuple(sorted((identity, known.condemned) for identity, known in state.strata.items())),
            tuple(sorted(view.condemns.items())),
            view.retired,
            view.gone,
            tuple(sorted(state.sessions.items())),
            names,
            commits,
        )
        node = self._known.setdefault(key, len(self.views))
        if node == len(self.views):
            self.views.append(view)
            self._states.append(state)
        return node


def _hash(position: int) -> bytes:
    return position.to_bytes(32, "big")


def _view(state: State, names: tuple[tuple[bytes, int], ...], commits: tuple[tuple[int, int], ...]) -> View:
    condemned = {identity for identity, known in state.strata.items() if known.condemned}
    return View(
        state.position,
        _numbers(state.strata.keys() - condemned),
        _numbers(condemned),
        {position: _numbers(listed) for position, listed in state.condemns.items()},
        {int.from_bytes(identity, "big"): known.relied for identity, known in state.strata.items()},
        frozenset(_numbers(state.retired)),
        frozenset(_numbers(state.gone)),
        frozenset(state.sessions),
        names,
        commits,
    )


def _added(number: int, session: int) -> StratumAdded:
    return StratumAdded(_identity(number), 1, FINISHED, 200, 1, bytes(32), 0, session)


def _batch(change: Change) -> Batch:
    return Batch(
        reference_names=[name for name, _ in change.names],
        reference_keys=[content.to_bytes(32, "big") for _, content in change.names],
        deletes=list(change.dropped),
    )


def _record(state: State, change: Change) -> Record:
    return Record(
        change.session,
        state.sessions.get(change.session, 0) + 1,
        state.hash,
        _NOW_MS,
        batches=[_batch(change)] if change.names or change.dropped else [],
        strata_added=[_added(number, change.owner or change.session) for number in change.added],
        strata_removed=_identities(change.removed),
        relied=_identities(change.relied),
        revived=_identities(change.revived),
        condemned=[Condemn(change.mark, _identities(change.condemned))] if change.condemned else [],
        killed=[Kill(change.condemn, _identities(change.killed))] if change.killed else [],
        files_kept=change.files_kept,
        files_deleted=_identities(change.files_deleted),
        sessions_revoked=list(change.revoked),
    )

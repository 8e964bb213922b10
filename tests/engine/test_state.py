"""The rules of `State.apply`, each with records that break it, alone and beside what it allows."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import pytest

from basin.engine import state as state_module
from basin.engine.state import (
    ACTIVE,
    CUT,
    EXPIRY_LAG_MS,
    FINISHED,
    State,
    apply,
    first_version,
    fold,
    last_version,
    state_from_map,
    state_to_map,
)
from basin.errors import Conflict, CorruptionError
from basin.format.record import Batch, Condemn, IndexRun, Kill, NameRun, Pin, Record, Slot, StratumAdded
from basin.terms import StratumId

NOW_MS = 1_800_000_000_000


def digest(number: int) -> bytes:
    return number.to_bytes(32, "big")


def stratum(number: int) -> StratumId:
    return StratumId(number.to_bytes(16, "big"))


def added(number: int, session: int = 1, status: int = FINISHED, length: int = 100) -> StratumAdded:
    return StratumAdded(stratum(number), 1, status, length, 1, bytes(32), 0, session)


def run(number: int, after: int, through: int) -> NameRun:
    return NameRun(stratum(number), after, through, 0, first_version(after + 1), last_version(through), 1, 100, 0, 10)


class Log:
    """A state that records are applied to, with the fields that every record needs filled in."""

    def __init__(self) -> None:
        self.state = State()
        self.begin()

    def record(self, *, session: int = 1, **fields: Any) -> Record:
        """The next record of `session` on the present state."""
        fields.setdefault("previous", self.state.hash)
        fields.setdefault("time_ms", NOW_MS)
        fields.setdefault("sequence", self.state.sessions.get(session, 0) + 1)
        return Record(session, **fields)

    def begin(self, **fields: Any) -> int:
        """A record that begins a session; returns the session."""
        self.apply(self.record(session=0, sequence=1, session_begun=True, **fields))
        return self.state.position

    def apply(self, record: Record) -> None:
        self.state = apply(self.state, record, digest(self.state.position + 1))

    def add(self, *, session: int = 1, **fields: Any) -> None:
        self.apply(self.record(session=session, **fields))

    def refuse(self, rule: int, *, session: int = 1, **fields: Any) -> None:
        """The record breaks `rule`; folded, it is void and changes nothing but position and hash."""
        record = self.record(session=session, **fields)
        with pytest.raises(Conflict) as caught:
            apply(self.state, record, digest(99))
        assert caught.value.rule == rule
        folded, counts = fold(self.state, record, digest(99))
        assert not counts
        assert folded == self.state._replace(
            position=self.state.position + 1,
            hash=digest(99),
            voids=(*self.state.voids, self.state.position + 1),
        )


@pytest.fixture
def log() -> Log:
    """A log with one session, whose id is 1."""
    return Log()


# --- rule 1 -----------------------------------------------------------------------------------------------------------


def test_a_record_follows_the_hash_of_the_one_before(log: Log) -> None:
    log.refuse(1, previous=bytes(32))
    log.add()


def test_a_session_counts_its_records_without_a_gap(log: Log) -> None:
    log.refuse(1, sequence=1)
    log.refuse(1, sequence=3)
    log.add(sequence=2)
    assert log.state.sessions == {1: 2}


def test_an_unknown_ended_or_revoked_session_writes_nothing(log: Log) -> None:
    second, third = log.begin(), log.begin()
    log.refuse(1, session=77)
    log.add(session=second, sessions_ended=[second])
    log.refuse(1, session=second)
    log.add(sessions_revoked=[third])
    log.refuse(1, session=third, sequence=2)
    assert set(log.state.sessions) == {1}


def test_a_session_begins_with_its_first_sequence_number_and_ends_once(log: Log) -> None:
    log.refuse(1, session=0, sequence=2, session_begun=True)
    log.refuse(1, session=1, sequence=1, session_begun=True)
    log.refuse(1, sessions_ended=[77])
    log.add(sessions_ended=[1])
    log.refuse(1, session=1)


def test_a_stratum_is_described_by_its_own_session_only(log: Log) -> None:
    second = log.begin()
    log.refuse(1, strata_added=[added(5, session=second)])
    log.add(session=second, strata_added=[added(5, session=second, status=ACTIVE)])
    log.refuse(1, strata_added=[added(5, session=second)])
    log.add(sessions_revoked=[second], strata_added=[added(5, session=second, status=CUT)])
    assert log.state.strata[stratum(5)].added.status == CUT


def test_a_session_may_add_strata_with_its_first_record(log: Log) -> None:
    position = log.state.position + 1
    assert log.begin(strata_added=[added(5, session=position)]) == position


def test_an_active_stratum_grows_and_a_finished_one_stays_as_it_is(log: Log) -> None:
    log.add(strata_added=[added(5, status=ACTIVE, length=100)])
    log.refuse(1, strata_added=[added(5, status=ACTIVE, length=99)])
    log.add(strata_added=[added(5, status=ACTIVE, length=200)])
    log.add(strata_added=[added(5, length=300)])
    log.refuse(1, strata_added=[added(5, length=400)])


def test_key_slots_and_generations(log: Log) -> None:
    log.refuse(1, slots_removed=["absent"])
    log.add(slots_added=[Slot("a", b"public a")])
    log.refuse(1, slots_removed=["a"])  # The last one stays.
    log.add(slots_added=[Slot("b", b"public b")], slots_removed=["a"])
    log.add(generation=1)
    log.refuse(1, generation=1)
    assert (log.state.slots, log.state.generation) == ({"b": b"public b"}, 1)


# --- rule 2 -----------------------------------------------------------------------------------------------------------


def test_records_after_a_void_one_count(log: Log) -> None:
    void = log.record(session=77, sequence=1)
    log.state, counts = fold(log.state, void, digest(50))
    assert not counts
    log.add(strata_added=[added(5)])
    assert log.state.voids == (2,)
    assert log.state.position == 3


# --- rule 4 -----------------------------------------------------------------------------------------------------------


def with_strata(log: Log, *numbers: int) -> int:
    """Finished strata; returns the position at which they were added."""
    log.add(strata_added=[added(number) for number in numbers])
    return log.state.position


def test_what_was_relied_on_after_the_mark_is_not_condemned(log: Log) -> None:
    mark = with_strata(log, 5, 6)
    log.add(relied=[stratum(5)])
    log.refuse(4, condemned=[Condemn(mark, [stratum(5), stratum(6)])])
    log.add(condemned=[Condemn(log.state.position, [stratum(5), stratum(6)])])
    assert log.state.condemns == {log.state.position: [stratum(5), stratum(6)]}


def test_active_absent_and_condemned_strata_are_not_condemned(log: Log) -> None:
    log.add(strata_added=[added(5, status=ACTIVE)])
    log.refuse(4, condemned=[Condemn(9, [stratum(5)])])
    log.refuse(4, condemned=[Condemn(9, [stratum(6)])])
    mark = with_strata(log, 7)
    log.add(condemned=[Condemn(mark, [stratum(7)])])
    log.refuse(4, condemned=[Condemn(99, [stratum(7)])])


def test_a_kill_completes_exactly_its_condemn(log: Log) -> None:
    mark = with_strata(log, 5, 6)
    log.add(condemned=[Condemn(mark, [stratum(5), stratum(6)])])
    condemn = log.state.position
    log.refuse(4, killed=[Kill(condemn, [stratum(5)])])
    log.refuse(4, killed=[Kill(condemn + 1, [stratum(5), stratum(6)])])
    log.refuse(4, killed=[Kill(condemn, [])])
    log.add(killed=[Kill(condemn, [stratum(6), stratum(5)])])
    assert not log.state.strata
    log.refuse(4, killed=[Kill(condemn, [stratum(5), stratum(6)])])


def test_a_rewrite_removes_live_strata_only(log: Log) -> None:
    mark = with_strata(log, 5, 6)
    log.add(strata_removed=[stratum(5)], strata_added=[added(7)])
    log.refuse(4, strata_removed=[stratum(5)])
    log.add(condemned=[Condemn(mark, [stratum(6)])])
    log.refuse(4, strata_removed=[stratum(6)])


# --- rules 5 and 6 ----------------------------------------------------------------------------------------------------


def test_reviving_one_stratum_revives_its_condemn(log: Log) -> None:
    mark = with_strata(log, 5, 6)
    log.add(condemned=[Condemn(mark, [stratum(5), stratum(6)])])
    condemn = log.state.position
    log.refuse(6, relied=[stratum(5)])
    log.add(relied=[stratum(5)], revived=[stratum(5)])
    assert not log.state.condemns
    assert all(known.condemned == 0 for known in log.state.strata.values())
    log.refuse(4, killed=[Kill(condemn, [stratum(5), stratum(6)])])


def test_what_is_gone_is_neither_relied_on_nor_revived(log: Log) -> None:
    log.refuse(6, relied=[stratum(5)])
    log.refuse(5, revived=[stratum(5)])


def test_relying_moves_the_last_position(log: Log) -> None:
    with_strata(log, 5)
    log.add(relied=[stratum(5)])
    assert log.state.strata[stratum(5)].relied == log.state.position


# --- rule 7 -----------------------------------------------------------------------------------------------------------


def test_a_run_of_names_begins_where_names_are_flushed(log: Log) -> None:
    log.add()
    log.refuse(7, name_runs_added=[run(5, 1, 2)])
    log.refuse(7, name_runs_added=[run(5, 0, 0)])  # A run of a large batch, without its batch.
    log.add(name_runs_added=[run(5, 0, 2)])
    assert log.state.flushed == 2
    log.refuse(7, name_runs_added=[run(6, 0, 3)])
    log.refuse(7, name_runs_added=[run(6, 2, 99)])  # Not beyond what is logged.
    log.add(name_runs_added=[run(6, 2, 3)])
    log.refuse(7, name_runs_removed=[stratum(77)])


def test_a_merge_of_runs_leaves_the_flushed_position(log: Log) -> None:
    log.add(name_runs_added=[run(5, 0, 1)])
    log.add(name_runs_added=[run(6, 1, 2)])
    log.add(name_runs_added=[run(7, 0, 2)], name_runs_removed=[stratum(5), stratum(6)])
    assert log.state.flushed == 2
    assert [one.id for one in log.state.name_runs] == [stratum(7)]
    log.refuse(7, name_runs_added=[run(8, 0, 2)], name_runs_removed=[stratum(5), stratum(6)])


def test_a_large_batch_gets_the_version_of_its_place(log: Log) -> None:
    log.add(batches=[Batch(), Batch(run=stratum(5))], name_runs_added=[run(5, 0, 0)])
    (adopted,) = log.state.name_runs
    version = first_version(log.state.position) + 1
    assert (adopted.version, adopted.version_min, adopted.version_max) == (version, version, version)
    assert (adopted.after, adopted.through) == (log.state.position, log.state.position)
    assert log.state.flushed == 0


def test_index_runs_are_replaced_once(log: Log) -> None:
    log.add(index_runs_added=[IndexRun(stratum(5), 1, [stratum(9)])])
    log.add(index_runs_added=[IndexRun(stratum(6), 1, [stratum(9)])], index_runs_removed=[stratum(5)])
    log.refuse(7, index_runs_removed=[stratum(5)])


# --- rules 8 and 9 ----------------------------------------------------------------------------------------------------


def test_the_history_floor_rises_to_the_lowest_pin_at_most(log: Log) -> None:
    for _ in range(8):
        log.add()
    log.add(pins_added=[Pin(b"pin", 5)])
    log.refuse(8, floor=6)
    log.add(floor=5)
    log.refuse(8, floor=4)
    log.refuse(8, pins_added=[Pin(b"other", 4)])
    log.add(pins_removed=[b"pin"], floor=7)
    log.refuse(8, floor=99)
    assert log.state.floor == 7


def test_expiry_moves_forward_an_hour_behind_the_clock(log: Log) -> None:
    log.refuse(9, expire_through_ms=NOW_MS - EXPIRY_LAG_MS + 1)
    log.add(expire_through_ms=NOW_MS - EXPIRY_LAG_MS)
    log.refuse(9, expire_through_ms=NOW_MS - EXPIRY_LAG_MS - 1)
    assert log.state.expire_through_ms == NOW_MS - EXPIRY_LAG_MS


# --- rule 10 ----------------------------------------------------------------------------------------------------------


def of_generation(number: int, generation: int) -> StratumAdded:
    return added(number)._replace(generation=generation)


def test_a_generation_is_dropped_once_when_a_newer_one_is_in_use(log: Log) -> None:
    log.refuse(10, generations_dropped=[0])
    log.add(generation=2)
    log.refuse(10, generations_dropped=[2])
    log.refuse(10, generations_dropped=[0, 3])
    log.add(generations_dropped=[0])
    log.refuse(10, generations_dropped=[0])
    log.add(generations_dropped=[1])
    assert log.state.generations_dropped == {0, 1}
    assert log.state.generation == 2


def test_a_generation_stays_while_a_stratum_of_it_counts(log: Log) -> None:
    log.add(strata_added=[of_generation(5, 0), of_generation(6, 0)], generation=1)
    mark = log.state.position
    log.add(strata_removed=[stratum(5)], strata_added=[of_generation(7, 1)])
    log.add(condemned=[Condemn(mark, [stratum(6)])])
    log.refuse(10, generations_dropped=[0])
    log.add(killed=[Kill(log.state.position, [stratum(6)])])
    log.refuse(10, generations_dropped=[0], strata_added=[of_generation(8, 0)])
    log.add(generations_dropped=[0])


def test_no_stratum_of_a_dropped_generation_is_added(log: Log) -> None:
    log.add(generation=1)
    log.add(generations_dropped=[0])
    log.refuse(10, strata_added=[of_generation(5, 0)])
    log.refuse(10, strata_added=[of_generation(5, 1), of_generation(6, 0)])
    log.add(strata_added=[of_generation(5, 1)])
    assert log.state.generations_dropped == {0}


# --- the state as a whole ---------------------------------------------------------------------------------------------


def full_state() -> State:
    """A state with something in every field."""
    log = Log()
    mark = with_strata(log, 5, 6, 7, 9)
    log.begin(job="nightly")
    log.add(batches=[Batch(names=[b"name"], values=[b"value"])], strata_removed=[stratum(9)], files_kept=True)
    log.add(condemned=[Condemn(mark, [stratum(5)])], slots_added=[Slot("a", b"public")], generation=3)
    log.add(name_runs_added=[run(6, 0, 2)], index_runs_added=[IndexRun(stratum(8), 1, [stratum(7)])])
    log.add(pins_added=[Pin(b"pin", 2)], floor=1, damaged=[digest(1)], expire_through_ms=NOW_MS - EXPIRY_LAG_MS)
    log.add(generations_dropped=[1])
    log.state, _ = fold(log.state, log.record(session=77), digest(60))
    return log.state


def test_a_checkpoint_holds_the_whole_state() -> None:
    state = full_state()
    empty = State()
    assert [name for name in State._fields if getattr(state, name) == getattr(empty, name)] == []
    packed = msgpack.packb(state_to_map(state))
    assert state_from_map(msgpack.unpackb(packed, strict_map_key=False)) == state


LATER_FIELDS = ("named", "seen_ms", "jobs", "gone", "retired", "condemned_ms", "generations_dropped")
"""Fields that checkpoints of earlier versions lack."""


@pytest.mark.parametrize("name", State._fields)
def test_a_checkpoint_that_lacks_a_field_or_holds_nonsense_is_refused(name: str) -> None:
    fields = msgpack.unpackb(msgpack.packb(state_to_map(full_state())), strict_map_key=False)
    with pytest.raises(CorruptionError):
        state_from_map({**fields, name: object()})
    if name not in LATER_FIELDS:
        with pytest.raises(CorruptionError):
            state_from_map({key: value for key, value in fields.items() if key != name})


def test_a_checkpoint_of_an_earlier_version_is_read() -> None:
    fields = msgpack.unpackb(msgpack.packb(state_to_map(full_state())), strict_map_key=False)
    state = state_from_map({key: value for key, value in fields.items() if key not in LATER_FIELDS})
    assert state.named == state.position
    assert (state.seen_ms, state.jobs, state.gone, state.retired, state.condemned_ms) == ({}, {}, {}, {}, {})
    assert state.generations_dropped == frozenset()


def test_a_stratum_is_not_added_again_after_it_was_removed(log: Log) -> None:
    with_strata(log, 5, 6)
    other = log.begin()
    log.add(session=other, strata_removed=[stratum(5)], files_kept=True)
    log.refuse(1, strata_added=[added(5)])
    log.refuse(1, session=other, sessions_revoked=[1], strata_added=[added(5)])
    assert log.state.gone == {stratum(5): 1}
    log.add(session=other, sessions_revoked=[1], strata_added=[added(7)])
    assert log.state.gone == {}
    log.refuse(1, session=other, strata_added=[added(5)])


def test_the_files_of_removed_strata_are_kept_until_a_record_says_that_they_are_gone(log: Log) -> None:
    with_strata(log, 5, 6, 7)
    log.add(strata_removed=[stratum(5)])
    log.add(strata_removed=[stratum(6)], files_kept=True, time_ms=NOW_MS + 1)
    assert log.state.retired == {stratum(6): (1, NOW_MS + 1)}
    log.add(strata_removed=[stratum(7)], files_kept=True, files_deleted=[stratum(6), stratum(99)])
    assert list(log.state.retired) == [stratum(7)]


def test_killed_strata_are_listed_with_the_clock_of_their_condemn_until_their_files_are_gone(log: Log) -> None:
    with_strata(log, 5, 6, 7)
    mark = log.state.position
    log.add(condemned=[Condemn(mark, [stratum(5), stratum(6)])], time_ms=NOW_MS + 1)
    condemn = log.state.position
    log.add(condemned=[Condemn(mark, [stratum(7)])], time_ms=NOW_MS + 2)
    assert log.state.condemned_ms == {condemn: NOW_MS + 1, condemn + 1: NOW_MS + 2}
    log.add(revived=[stratum(7)], relied=[stratum(7)])
    assert log.state.condemned_ms == {condemn: NOW_MS + 1}
    log.add(killed=[Kill(condemn, [stratum(5), stratum(6)])], files_kept=True, time_ms=NOW_MS + 9)
    assert log.state.condemned_ms == {}
    assert log.state.retired == {stratum(5): (1, NOW_MS + 1), stratum(6): (1, NOW_MS + 1)}
    log.add(files_deleted=[stratum(5)])
    assert list(log.state.retired) == [stratum(6)]


def test_a_live_session_is_known_by_its_last_record_and_its_job(log: Log) -> None:
    nightly = log.begin(job="nightly", time_ms=NOW_MS + 5)
    log.add(time_ms=NOW_MS + 9)
    assert log.state.seen_ms == {1: NOW_MS + 9, nightly: NOW_MS + 5}
    assert log.state.jobs == {nightly: "nightly"}
    log.add(sessions_revoked=[nightly])
    assert list(log.state.seen_ms) == [1]
    assert log.state.jobs == {}


def test_the_last_record_that_changed_a_name_is_known(log: Log) -> None:
    log.add(batches=[Batch(names=[b"name"], values=[b"value"])])
    named = log.state.position
    log.add()
    assert log.state.named == named < log.state.position


def test_a_state_does_not_change(log: Log) -> None:
    before = full_state()
    packed = msgpack.packb(state_to_map(before))
    record = Record(1, before.sessions[1] + 1, before.hash, NOW_MS, strata_added=[added(50)], revived=[stratum(5)])
    assert apply(before, record, digest(70)) != before
    assert msgpack.packb(state_to_map(before)) == packed


# --- exploration ------------------------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A reachable situation of two writers and a compactor."""

    state: State
    writers: tuple[int, int] = (0, 0)
    """0: has not looked, 1: has found its stratum, 2: has committed that it relies on it."""
    compactor: int = 0
    """0: has not marked, 1: has marked, 2: has condemned, 3: has killed."""
    mark: int = 0
    listed: tuple[StratumId, ...] = ()
    condemn: int = 0
    promised: frozenset[StratumId] = frozenset()
    """What the log acknowledged that somebody relies on."""

    def identity(self) -> object:
        """Equal for situations that cannot be told apart."""
        strata = tuple(self.state.strata.items())
        return (self.state.position, strata, *self[1:])


def writer_steps(node: Node, which: int, outcomes: set[str]) -> Iterator[Node]:
    """A writer looks its content up, and later commits that it relies on it, reviving it where that is needed."""
    target = stratum(5 + which)
    known = node.state.strata.get(target)
    writers = (node.writers[0] + (which == 0), node.writers[1] + (which == 1))
    if node.writers[which] == 2:
        return
    if known is None:
        outcomes.add("put again")
    elif node.writers[which] == 0:
        yield node._replace(writers=writers)
    else:
        log = Log()
        log.state = node.state
        log.add(relied=[target], revived=[target] if known.condemned else [])
        outcomes.add("revived" if known.condemned else "relied")
        yield node._replace(state=log.state, writers=writers, promised=node.promised | {target})


def compactor_steps(node: Node, outcomes: set[str]) -> Iterator[Node]:
    """The compactor marks what is reachable, condemns the rest, and kills it."""
    log = Log()
    log.state = node.state
    try:
        if node.compactor == 0:
            listed = tuple(one for one in (stratum(5), stratum(6)) if one not in node.promised)
            yield node._replace(compactor=1, mark=node.state.position, listed=listed)
        elif node.compactor == 1 and node.listed:
            log.add(condemned=[Condemn(node.mark, list(node.listed))])
            yield node._replace(state=log.state, compactor=2, condemn=log.state.position)
        elif node.compactor == 2:
            log.add(killed=[Kill(node.condemn, list(node.listed))])
            outcomes.add("killed")
            yield node._replace(state=log.state, compactor=3)
    except Conflict:
        outcomes.add("kill refused" if node.compactor == 2 else "condemn refused")


def test_in_no_order_is_anything_deleted_that_a_writer_was_told_to_rely_on() -> None:
    """Every order of the steps of two writers and a compactor, upon the real rules."""
    log = Log()
    with_strata(log, 5, 6)
    outcomes: set[str] = set()
    waiting = deque([Node(log.state)])
    seen = set()
    while waiting:
        node = waiting.popleft()
        if node.identity() in seen:
            continue
        seen.add(node.identity())
        assert node.promised <= node.state.strata.keys()
        waiting.extend(writer_steps(node, 0, outcomes))
        waiting.extend(writer_steps(node, 1, outcomes))
        waiting.extend(compactor_steps(node, outcomes))
    assert outcomes == {"put again", "revived", "relied", "condemn refused", "kill refused", "killed"}
    assert len(seen) > 50


# --- sabotage ---------------------------------------------------------------------------------------------------------

SOURCE = Path(state_module.__file__).read_text(encoding="utf-8")
REFUSALS = [
    node.lineno for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Raise) and "Conflict" in ast.dump(node)
]


class Dropped(ast.NodeTransformer):
    """Replaces the refusal in one line by nothing."""

    def __init__(self, line: int) -> None:
        self.line = line

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:  # the name that `ast` calls
        return ast.copy_location(ast.Pass(), node) if node.lineno == self.line else node


@pytest.mark.parametrize("line", REFUSALS)
def test_without_one_of_its_refusals_apply_fails_a_test_above(line: int, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = types.ModuleType("broken_state")
    monkeypatch.setitem(sys.modules, "broken_state", broken)
    tree = ast.fix_missing_locations(Dropped(line).visit(ast.parse(SOURCE)))
    exec(compile(tree, "broken_state", "exec"), broken.__dict__)  # our own source, less one line
    monkeypatch.setitem(globals(), "apply", broken.apply)
    monkeypatch.setitem(globals(), "fold", broken.fold)
    tests = [test for name, test in globals().items() if name.startswith("test_") and _takes_a_log(test)]
    assert len(tests) > 15
    assert any(_fails(test) for test in tests)


def _takes_a_log(test: Callable[..., None]) -> bool:
    return list(inspect.signature(test).parameters) == ["log"]


def _fails(test: Callable[[Log], None]) -> bool:
    try:
        test(Log())
    except (Exception, pytest.fail.Exception):  # noqa: BLE001  # however it fails
        return True
    return False

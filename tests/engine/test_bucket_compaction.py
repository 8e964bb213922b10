"""Compactors on a simulated bucket beside writers and readers: whole lives, with faults and without; broken engines.

Seeds and counts are printed. A failure names its seed; `collected(seed, faults, CollectedLife(…))` repeats it.
"""

from __future__ import annotations

import inspect
import random
import re
import textwrap
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import pytest

import basin
from basin.api import Database
from basin.engine import collect, state
from basin.engine import core as core_module
from basin.engine.collect import Pruner
from basin.engine.core import Core
from basin.engine.mark import Marks
from basin.errors import BasinError
from basin.format.layout import StratumKind
from basin.format.record import Condemn, Kill, Record
from basin.terms import StratumId
from basin.testing.bucket import Run
from basin.testing.history import HistoryError
from basin.testing.object_faults import Fault, FaultKind, ObjectFault, ObjectRequest, Plan
from tests.engine.bucket_compaction import (
    GRACE_S,
    CollectedLife,
    Plot,
    collected,
    founded_pool,
    judge_collected,
)
from tests.engine.bucket_life import LifeError, live

KINDS: Final = tuple(
    kind for kind in FaultKind if kind not in (FaultKind.SHORT_BODY, FaultKind.WRONG_BODY, FaultKind.CONDITION_IGNORED)
)
"""What may befall an engine any number of times: it never damages what it reads, and stores keep their word."""
SHARES: Final = (0.001, 0.004, 0.01, 0.03)
CLANS: Final = Plot(
    steps=20, drawn={"family": 4, "disown": 6, "adopt": 6, "gather": 1, "drop": 3, "again": 1, "pause": 4}
)
"""Mostly parents, which die and are found again."""
HELD_UP_S: Final = 1.5 * GRACE_S
HELD_UP_SHARE: Final = 0.25


@dataclass
class Tally:
    """What a test tried; `failures` are the seeds with what went wrong, of which the first are shown."""

    runs: int = 0
    fired: int = 0
    killed: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def live(self, seed: int, faults: Plan, plan: CollectedLife) -> Run[None] | None:
        """One life; None if something was wrong with it."""
        self.runs += 1
        try:
            ran = collected(seed, faults, plan)
        except (AssertionError, BasinError) as error:
            self.failures.append(f"seed {seed}, grace {plan.grace_s}: {type(error).__name__}: {str(error)[:500]}")
            return None
        self.fired += len(ran.bucket.fired)
        self.killed += len(ran.bucket.killed)
        self.seen += plan.seen
        self.seen.update(commit.outcome for commit in plan.history.commits)
        return ran

    def report(self, what: str) -> None:
        """Print the counts, and fail if anything failed."""
        print(f"{what}: {self.runs} lives, {self.fired} faults, {self.killed} killed, {dict(self.seen)}")
        shown = "\n".join(self.failures[:10])
        assert not self.failures, f"{len(self.failures)} of {self.runs} lives failed:\n{shown}"


def at_random(seed: int) -> Plan:
    """A share of all requests, which differs from seed to seed, meets any fault."""
    generator, share = random.Random(f"{seed}/faults"), SHARES[seed % len(SHARES)]
    return lambda _: generator.choice(KINDS) if generator.random() < share else None


def held_up(seed: int) -> Plan:
    """One compactor is held up for longer than the grace before many of its records and deletions."""
    generator = random.Random(f"{seed}/held up")

    def plan(request: ObjectRequest) -> Fault | None:
        acts = request.kind == "delete" or (request.kind == "put_new" and request.name.startswith("log/"))
        if request.actor != "compactor-1" or not acts or generator.random() >= HELD_UP_SHARE:
            return None
        return ObjectFault(FaultKind.PAUSED, int(HELD_UP_S * 1000))

    return plan


def no_faults(_: int) -> Plan:
    return {}


def with_clans() -> CollectedLife:
    return CollectedLife(grace_s=GRACE_S, plot=CLANS)


def alone() -> CollectedLife:
    """Nobody else kills what a compactor was about to kill when it was held up."""
    plot = Plot(compactors=1, steps=60, rest_s=400.0, drawn={"gather": 4, "drop": 4, "pause": 8})
    return CollectedLife(grace_s=GRACE_S, plot=plot)


def faulted(seed: int) -> CollectedLife:
    """A life for faults at random, which differs from seed to seed in whatever may make a difference."""
    number = seed // len(SHARES)
    grace_s, plot = 0.0 if number % 4 == 3 else GRACE_S, CLANS if number % 3 == 2 else Plot()
    return CollectedLife(grace_s=grace_s, plot=plot, impatient=number % 2 == 0, is_calm=False)


class TestLives:
    def test_what_is_needed_stays_and_what_is_not_goes(self) -> None:
        tally = Tally()
        for seed in range(24):
            tally.live(seed, {}, CollectedLife(grace_s=GRACE_S))
        tally.report("with a grace")
        seen = tally.seen
        assert seen["condemns"] >= 60
        assert seen["kills"] >= 25
        assert seen["rewrite"] >= 30
        assert seen["revivals by batches"] >= 3
        assert seen["revivals for open batches"] >= 30
        assert seen["large"] >= 20
        assert seen["views read"] == 720

    def test_without_any_grace(self) -> None:
        tally = Tally()
        for seed in range(100, 110):
            tally.live(seed, {}, CollectedLife(grace_s=0.0))
        tally.report("without a grace")
        assert tally.seen["kills"] >= 15
        assert tally.seen["compactions"] == 200
        assert tally.seen["hold: told to put again"] + tally.seen["stall: told to put again"] >= 3

    def test_a_compactor_that_is_held_up_for_longer_than_the_grace(self) -> None:
        tally = Tally()
        for seed in range(16):
            tally.live(seed, held_up(seed), with_clans() if seed % 3 == 0 else CollectedLife(grace_s=GRACE_S))
        tally.report("held up")
        assert tally.fired >= 100
        assert tally.seen["kills"] >= 15

    def test_faults_at_random(self, effort: int) -> None:
        tally = Tally()
        for seed in range(20 * effort):
            tally.live(seed, at_random(seed), faulted(seed))
        tally.report("faults at random")
        assert tally.fired >= 70 * effort
        assert tally.killed >= 7 * effort
        assert tally.seen["kills"] >= 30 * effort

    def test_the_same_seed_gives_the_same_log_byte_for_byte(self) -> None:
        for seed in (1, 7):
            first, second = (live(seed, at_random(seed), faulted(seed)).log for _ in range(2))
            assert first == second


# --- what these lives have found --------------------------------------------------------------------------------------


@pytest.fixture
def reopened() -> Iterator[Callable[..., Database]]:
    """Opens handles on one basin, which are closed in the end."""
    url = f"memory://{uuid.uuid4().hex}"
    handles: list[Database] = []

    def call(mode: Any) -> Database:
        profile: Any = "open" if mode == "x" else None
        handles.append(basin.open(url, mode, profile=profile, sync_interval_s=3600.0, history_s=0.0))
        return handles[-1]

    yield call
    for handle in handles:
        handle.close()


def condemning(identity: StratumId, now: state.State) -> Record:
    return Record(condemned=[Condemn(now.position, [identity])])


def test_a_condemn_that_another_compactor_has_killed_meanwhile_is_passed_over(
    reopened: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    db = reopened("x")
    for number in range(2):
        db.blobs.put(random.Random(number).randbytes(9000), root=False)
        db.commit()
    strata = [one for one, known in db.core.state.strata.items() if known.added.kind == StratumKind.DATA]
    assert len(strata) == 2
    for identity in strata:
        assert db.core.append(partial(condemning, identity))
    other = reopened("w")
    kill_one = Pruner._kill_one

    def too_late(self: Pruner, *arguments: Any) -> None:
        if other.core.state.condemns:
            other.core.append(lambda now: Record(killed=[Kill(at, list(one)) for at, one in now.condemns.items()]))
        kill_one(self, *arguments)

    monkeypatch.setattr(Pruner, "_kill_one", too_late)
    assert db.compact(grace_s=0).problems == []
    assert not db.core.state.strata.keys() & set(strata)


def test_a_batch_that_goes_on_keeps_what_others_have_merged(
    reopened: Callable[..., Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_module, "KEEP_BATCHES_S", 0.0)
    db = reopened("x")
    contents = [random.Random(number).randbytes(9000) for number in range(5)]
    keys = []
    for content in contents:
        keys.append(db.blobs.put(content))
        db.commit()
    other = reopened("w")
    with other.batch() as batch:
        batch.blobs.put(contents[3])
        for key in keys:
            db.blobs.delete(key)
        assert [step.kind for step in db.compact(prune=False).steps].count("merge-strata") == 1
        other.core._keep_batches()
        db.compact(grace_s=3600)
        assert db.core.state.condemns
        other.core._keep_batches()
        db.refresh()
        assert not db.core.state.condemns
    db.compact(grace_s=0)
    assert db.blobs[keys[3]] == contents[3]


# --- engines that are broken ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sabotage:
    """How the engine is broken; the words by which that shows; and the lives in which it must."""

    apply: Callable[[pytest.MonkeyPatch], None]
    words: str
    faults: Callable[[int], Plan] = no_faults
    plan: Callable[[], CollectedLife] = lambda: CollectedLife(grace_s=GRACE_S)
    first: int = 0
    """The seed to begin with, because it was seen to show it."""


def without(patch: pytest.MonkeyPatch, owner: Any, name: str, changes: dict[str, str]) -> None:
    """Put a copy of a function in its place, in which some lines read otherwise."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    for lines, instead in changes.items():
        assert source.count(lines) == 1, lines
        source = source.replace(lines, instead)
    copy: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + source, name, "exec"), function.__globals__, copy)
    patch.setattr(owner, name, copy[name])


def nobody_sees_to_it_that_what_is_needed_comes_back(patch: pytest.MonkeyPatch) -> None:
    """A prune takes back what is condemned and needed: it makes good many a sabotage before anything is lost."""
    patch.setattr(Pruner, "_revive", lambda *_: None)


def a_condemned_stratum_is_relied_on_and_not_revived(patch: pytest.MonkeyPatch) -> None:
    nobody_sees_to_it_that_what_is_needed_comes_back(patch)
    check_relied = Core._check_relied
    patch.setattr(Core, "_check_relied", lambda self, relied: (check_relied(self, relied)[0], set()))
    patch.setattr(Core, "_condemned_by_mistake", lambda *_: set())
    without(
        patch,
        state,
        "_apply_strata",
        {
            'if known is None or known.condemned:\n            raise Conflict(f"stratum {relied}': "if known is None:\n"
            '            raise Conflict(f"stratum {relied}'
        },
    )


def what_was_relied_on_since_the_mark_is_condemned(patch: pytest.MonkeyPatch) -> None:
    nobody_sees_to_it_that_what_is_needed_comes_back(patch)
    without(patch, state, "_apply_strata", {" or known.relied > mark": ""})
    without(patch, Pruner, "_is_free", {"and known.relied <= marks.position": ""})


def a_commit_does_not_look_whether_what_it_relies_on_stands(patch: pytest.MonkeyPatch) -> None:
    nobody_sees_to_it_that_what_is_needed_comes_back(patch)
    patch.setattr(Core, "_check_relied", lambda *_: (set(), set()))


def a_batch_that_goes_on_is_not_looked_after(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "_keep_batches", lambda _: None)


def merges_of_what_a_batch_relies_on_are_not_followed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Core, "_follow_merges", lambda _: None)


def what_is_condemned_is_killed_without_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collect, "plan_kills", lambda now, _: sorted(now.condemns))


def files_are_deleted_as_soon_as_they_are_condemned(patch: pytest.MonkeyPatch) -> None:
    append_condemn = Pruner._append_condemn

    def append_and_delete(self: Pruner, marks: Marks, *arguments: Any) -> bool:
        done = append_condemn(self, marks, *arguments)
        strata = self._core.state.strata
        for identity in [one for one in marks.strata if one in strata and strata[one].condemned]:
            self._core.own_strata.delete(StratumKind(strata[identity].added.kind), identity)
        return done

    patch.setattr(Pruner, "_append_condemn", append_and_delete)


def a_kill_does_not_ask_whether_its_condemn_still_stands(patch: pytest.MonkeyPatch) -> None:
    without(
        patch,
        state,
        "_apply_strata",
        {
            "if sorted(condemns.get(condemn, ())) != sorted(listed) or not listed:": "if not listed:",
            "del condemns[condemn]": "condemns.pop(condemn, None)",
        },
    )
    without(patch, Pruner, "_kill_one", {"if condemn not in now.condemns:": "if not going <= now.strata.keys():"})


def what_a_dead_parent_links_to_goes_before_it(patch: pytest.MonkeyPatch) -> None:
    nobody_sees_to_it_that_what_is_needed_comes_back(patch)
    patch.setattr(Marks, "hold", lambda *_: None)


def what_is_needed_is_not_copied(patch: pytest.MonkeyPatch) -> None:
    nobody_sees_to_it_that_what_is_needed_comes_back(patch)
    patch.setattr(Pruner, "_copy_kept", lambda *_: [])


def links_are_not_followed(patch: pytest.MonkeyPatch) -> None:
    nobody_sees_to_it_that_what_is_needed_comes_back(patch)
    patch.setattr(Marks, "_expand", lambda _: None)
    patch.setattr(Marks, "hold", lambda *_: None)


def what_is_partly_dead_is_left_as_it_is(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(collect, "plan_partly_dead", lambda *_: [])


def files_are_forgotten_when_they_are_killed(patch: pytest.MonkeyPatch) -> None:
    without(patch, state, "_apply_retired", {"record.killed if record.files_kept else ()": "()"})


LOST: Final = (
    r"cannot be read|ContentNotFound|ObjectMissing|has lost its root|missing in|found missing|a view of .* met"
)
"""The last: a view that is younger than the grace, and whose contents are gone."""
SABOTAGES: Final = (
    Sabotage(a_condemned_stratum_is_relied_on_and_not_revived, LOST, first=2),
    Sabotage(what_was_relied_on_since_the_mark_is_condemned, LOST, held_up, first=4),
    Sabotage(a_commit_does_not_look_whether_what_it_relies_on_stands, LOST, first=16),
    Sabotage(a_batch_that_goes_on_is_not_looked_after, "was looked after", first=4),
    Sabotage(merges_of_what_a_batch_relies_on_are_not_followed, "was looked after", first=10),
    Sabotage(what_is_condemned_is_killed_without_waiting, "was looked after", first=4),
    Sabotage(files_are_deleted_as_soon_as_they_are_condemned, LOST, first=2),
    Sabotage(a_kill_does_not_ask_whether_its_condemn_still_stands, LOST, held_up, alone, first=6),
    Sabotage(what_a_dead_parent_links_to_goes_before_it, LOST, plan=with_clans),
    Sabotage(what_is_needed_is_not_copied, LOST),
    Sabotage(links_are_not_followed, LOST),
    Sabotage(what_is_partly_dead_is_left_as_it_is, "bytes are stored", first=5),
    Sabotage(files_are_forgotten_when_they_are_killed, "found leftover", first=2),
)
SEEDS_MAX: Final = 40


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.apply.__name__)
def test_a_broken_engine_is_caught(sabotage: Sabotage, monkeypatch: pytest.MonkeyPatch) -> None:
    founded_pool()  # By an engine that is whole.
    said: list[str] = []
    for seed in range(sabotage.first, sabotage.first + SEEDS_MAX):
        plan = sabotage.plan()
        with monkeypatch.context() as patch:
            sabotage.apply(patch)
            try:
                judge_collected(live(seed, sabotage.faults(seed), plan), plan)
            except (LifeError, HistoryError) as error:
                said.append(str(error))
        if said and re.search(sabotage.words, said[-1]):
            print(f"{sabotage.apply.__name__}: caught by seed {seed}: {said[-1]}")
            return
    pytest.fail(f"no one of {SEEDS_MAX} seeds says {sabotage.words!r}, but {said[:5]}")

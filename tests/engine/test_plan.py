"""Plans of a compaction: pure, and within the bound on space."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from basin.engine.plan import (
    Policy,
    Usage,
    plan_compaction,
    plan_dead,
    plan_file_deletions,
    plan_kills,
    plan_parents,
    plan_partly_dead,
    plan_reencryption,
)
from basin.engine.state import ACTIVE, FINISHED, Retired, State, Stratum
from basin.format.layout import StratumKind
from basin.format.record import StratumAdded
from basin.terms import StratumId

NOW_MS = 1_800_000_000_000
POLICY = Policy(now_ms=NOW_MS, grace_ms=3_600_000)


def stratum(number: int) -> StratumId:
    return StratumId(number.to_bytes(16, "big"))


def state_of(count: int, kind: StratumKind = StratumKind.DATA, *, generation: int = 0, status: int = FINISHED) -> State:
    strata = {
        stratum(number): Stratum(
            StratumAdded(stratum(number), kind, status, 1 << 20, 100, bytes(32), generation, 1), 1, 0
        )
        for number in range(count)
    }
    return State(position=10, strata=strata, generation=generation)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_after_the_rewrites_little_enough_is_wasted(kept: list[int]) -> None:
    state = state_of(len(kept))
    usage = {stratum(number): Usage(1000, 10_000, grains, 10 * grains, 0) for number, grains in enumerate(kept)}
    chosen = {*plan_partly_dead(state, POLICY, usage), *plan_dead(state, usage)}
    needed = sum(used.kept_size for used in usage.values())
    left = needed + sum(used.size - used.kept_size for one, used in usage.items() if one not in chosen)
    assert left <= POLICY.amplification * needed
    assert all(usage[one].kept_grains < usage[one].grains for one in chosen)


def test_nothing_is_rewritten_while_the_waste_is_small() -> None:
    usage = {stratum(number): Usage(100, 1000, 95, 950, 0) for number in range(5)}
    assert plan_partly_dead(state_of(5), POLICY, usage) == []


def test_cold_strata_are_rewritten_only_on_request_and_when_they_are_old() -> None:
    usage = {stratum(number): Usage(100, 1000, 10, 100, 0) for number in range(3)}
    cold = Policy(now_ms=NOW_MS, grace_ms=0, is_cold=True, cold_minimum_ms=1000)
    assert plan_partly_dead(state_of(3), cold, usage) == []
    asked = Policy(now_ms=NOW_MS, grace_ms=0, is_cold=True, rewrite_cold=True, cold_minimum_ms=1000)
    assert plan_partly_dead(state_of(3), asked, usage)
    young = Policy(now_ms=500, grace_ms=0, is_cold=True, rewrite_cold=True, cold_minimum_ms=1000)
    assert plan_partly_dead(state_of(3), young, usage) == []
    dead = {stratum(number): Usage(100, 1000, 0, 0, 0) for number in range(3)}
    assert len(plan_dead(state_of(3), dead)) == 3


def test_what_is_active_or_condemned_is_left_alone() -> None:
    usage = {stratum(number): Usage(100, 1000, 0, 0, 5) for number in range(3)}
    assert plan_dead(state_of(3, status=ACTIVE), usage) == []
    assert plan_parents(state_of(3, StratumKind.META, status=ACTIVE), usage) == []
    assert len(plan_parents(state_of(3, StratumKind.META), usage)) == 3
    condemned = {one: known._replace(condemned=7) for one, known in state_of(3).strata.items()}
    assert plan_dead(State(position=10, strata=condemned), usage) == []


def test_a_few_dead_parents_count_only_if_it_is_thorough() -> None:
    usage = {stratum(0): Usage(100, 1000, 99, 990, 1)}
    state = state_of(1, StratumKind.META)
    assert plan_parents(state, usage) == []
    assert plan_parents(state, usage, thorough=True) == [stratum(0)]


def test_condemns_and_files_wait_for_the_grace() -> None:
    state = State(
        position=10,
        condemns={4: [stratum(1)], 5: [stratum(2)]},
        condemned_ms={4: NOW_MS - 3_600_000, 5: NOW_MS - 3_599_999},
        retired={stratum(3): Retired(1, NOW_MS - 3_600_000), stratum(4): Retired(2, NOW_MS)},
    )
    assert plan_kills(state, POLICY) == [4]
    assert plan_file_deletions(state, POLICY) == {stratum(3): 1}


def test_what_is_sealed_under_an_old_generation_is_sealed_anew() -> None:
    old = state_of(3, generation=1)
    assert plan_reencryption(old, POLICY) == []
    newer = old._replace(generation=2)
    assert len(plan_reencryption(newer, POLICY)) == 3
    assert [step.kind for step in plan_compaction(newer, POLICY)] == ["re-encrypt"]


def test_a_plan_says_why_and_how_much() -> None:
    usage = {stratum(0): Usage(100, 1000, 0, 0, 0), stratum(1): Usage(100, 1000, 50, 500, 0)}
    condemn, rewrite = plan_compaction(state_of(2), POLICY, usage)
    assert (condemn.kind, condemn.strata, condemn.bytes_freed) == ("condemn", (stratum(0),), 1 << 20)
    assert (rewrite.kind, rewrite.strata, rewrite.bytes_read) == ("rewrite", (stratum(1),), 500)
    assert rewrite.reason == "50 % of it is needed"
    assert rewrite.requests == 3

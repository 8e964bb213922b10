"""What is due, decided from a state alone: which runs to merge, which strata to write anew. Pure.

Invariant: a plan names only what the state lists. Carrying it out is refused later if that went meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from basin.engine.state import ACTIVE, FINISHED, State
from basin.format.layout import INDEX_ENTRIES_MAX, INDEX_ENTRY_SIZE, MIB, StratumKind
from basin.format.record import NameRun
from basin.terms import Position, StratumId

MERGE_WIDTH: Final = 4
"""Runs of one size class that are merged into one of the next: reads ask at most three runs a class."""
SMALL_STRATUM: Final = 4 * MIB
SMALL_STRATA_MAX: Final = 8
_GROUP_SIZE: Final = 64 * MIB
"""Strata that are written anew together: what is done survives an interruption."""
_READ_TOGETHER: Final = 4 * MIB
_PARENTS_SHARE: Final = 0.9
"""A stratum of parents of which less is needed is written anew: few bytes, and each dead parent keeps others alive."""


class Usage(NamedTuple):
    """How much of a stratum is needed. Bytes are those of grains as stored, without the stratum's own index."""

    grains: int
    size: int
    kept_grains: int
    kept_size: int
    dead_parents: int
    """Grains with links that are not kept."""


def _size_class(size: int) -> int:
    """Sizes of one class differ by at most four times."""
    return max(0, (size >> 16).bit_length() // 2)


def plan_names_merge(runs: Sequence[NameRun]) -> Sequence[NameRun]:
    """Neighbouring runs to merge, or none. Runs stand in the order of the positions they cover.

    A run counts as one of the largest size class among itself and those that are newer, for it cannot be merged with
    older ones without them; four of a class are merged. So a class never has more than three, whatever the sizes
    are, and a byte is written again about once a class; merging whatever comes to four would write everything again
    each time.
    """
    classes: list[int] = []
    for run in reversed(runs):
        classes.append(max(_size_class(run.size), classes[-1] if classes else 0))
    classes.reverse()
    for number in sorted(set(classes)):
        start, count = classes.index(number), classes.count(number)
        if count >= MERGE_WIDTH:
            return runs[start : start + count]
    return []


def plan_index_merge(state: State) -> list[tuple[int, StratumId, int]]:
    """Indexes to merge into one: (kind of the stratum that holds it, its id, entries); none if nothing is due."""
    covered = {identity for run in state.index_runs for identity in run.strata}
    names = {run.id for run in state.name_runs}
    sources = [(int(StratumKind.INDEX), run.id, run.entries) for run in state.index_runs]
    sources += [
        (known.added.kind, identity, known.added.grain_count)
        for identity, known in state.strata.items()
        if known.added.status == FINISHED
        and known.added.kind != StratumKind.INDEX
        and identity not in covered
        and identity not in names
    ]
    classes: dict[int, list[tuple[int, StratumId, int]]] = {}
    for source in sources:
        classes.setdefault(_entries_class(source[2]), []).append(source)
    for number in sorted(classes):
        group = classes[number]
        if len(group) >= MERGE_WIDTH and sum(source[2] for source in group) <= INDEX_ENTRIES_MAX:
            return group
    return []


def plan_index_renewal(state: State) -> list[tuple[int, StratumId, int]]:
    """Merged indexes that are sealed under an old key generation, to be written anew; none if there is none."""
    old = [
        (int(StratumKind.INDEX), run.id, run.entries)
        for run in state.index_runs
        if run.id in state.strata and state.strata[run.id].added.generation < state.generation
    ]
    return old if sum(entries for _, _, entries in old) <= INDEX_ENTRIES_MAX else old[:1]


def _entries_class(count: int) -> int:
    """Counts of one class differ by at most four times; all below 4,096 are one class."""
    return max(0, (count >> 12).bit_length() + 1) // 2


def plan_strata_merge(
    state: State, count_min: int | None = None, *, size_target: int = _GROUP_SIZE, cold_data: bool = False
) -> list[StratumId]:
    """Small strata of one kind and size class, to become one; none if there are not `count_min` of them.

    `size_target`: size of a full one. `cold_data`: strata in `data/` cannot simply be read.
    """
    small = min(SMALL_STRATUM, size_target // MERGE_WIDTH)
    names = {run.id for run in state.name_runs}
    classes: dict[tuple[int, int], list[StratumId]] = {}
    for identity, (added, _, condemned) in state.strata.items():
        if (
            added.status == ACTIVE
            or condemned
            or identity in names
            or added.kind == StratumKind.INDEX
            or added.length > small
            or (cold_data and added.kind == StratumKind.DATA)
        ):
            continue
        classes.setdefault((added.kind, _size_class(added.length)), []).append(identity)
    for group in classes.values():
        if len(group) >= (SMALL_STRATA_MAX if count_min is None else count_min):
            return group
    return []


# --- a whole compaction ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Policy:
    """What a compaction may do. Pure plans need no clock and no options: all that they depend on is here."""

    now_ms: int
    grace_ms: int
    """How long condemned strata, and files that were merged away, stay."""
    size_target: int = _GROUP_SIZE
    """Size of a full stratum."""
    amplification: float = 1.15
    """Strata of contents are written anew until stored bytes are at most so many times the bytes that are needed."""
    is_cold: bool = False
    """Whether strata in `data/` are in a storage class whose objects are not simply read."""
    rewrite_cold: bool = False
    cold_minimum_ms: int = 0
    """What is deleted younger than this costs as if it had stayed so long."""


@dataclass(frozen=True, slots=True)
class CompactionStep:
    """One thing that a compaction would do: one record, after its outputs are durable. Sizes in bytes."""

    kind: str
    strata: tuple[StratumId, ...]
    reason: str
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_freed: int = 0

    @property
    def requests(self) -> int:
        """About how many that is in a bucket: a GET for each 4 MiB, a PUT for a stratum and for the record."""
        return -(-self.bytes_read // _READ_TOGETHER) + -(-self.bytes_written // _GROUP_SIZE) + 1


def plan_compaction(
    state: State, policy: Policy, usage: Mapping[StratumId, Usage] | None = None
) -> list[CompactionStep]:
    """What a compaction of this state would do now, in order; with `usage`, what a prune would do as well.

    `usage`: what a marking found. Each step changes the state, so a compaction plans anew where the next one depends on
    that; whoever only wants to know gets the first round here.
    """
    steps = [*_plan_kills(state, policy), *(_plan_prune(state, policy, usage) if usage is not None else ())]
    doomed = {identity for step in steps for identity in step.strata}
    names = plan_names_rewrite(state) or plan_names_merge(state.name_runs)
    if names:
        size = sum(run.size for run in names)
        steps.append(CompactionStep("merge-names", tuple(run.id for run in names), "fewer runs of names", size, size))
    for kind, group, reason in (
        (
            "merge-strata",
            plan_strata_merge(state, MERGE_WIDTH, size_target=policy.size_target, cold_data=policy.is_cold),
            "small strata of one size",
        ),
        ("re-encrypt", plan_reencryption(state, policy), f"of a key generation before {state.generation}"),
    ):
        group = [identity for identity in group if identity not in doomed]
        size = sum(state.strata[identity].added.length for identity in group)
        if group:
            steps.append(CompactionStep(kind, tuple(group), reason, size, size))
    indexes = plan_index_merge(state) or plan_index_renewal(state)
    if indexes:
        size = sum(entries for _, _, entries in indexes) * INDEX_ENTRY_SIZE
        steps.append(
            CompactionStep("merge-indexes", tuple(one for _, one, _ in indexes), "fewer indexes to search", size, size)
        )
    files = plan_file_deletions(state, policy)
    if files:
        steps.append(CompactionStep("delete-files", tuple(files), "nobody reads them any more"))
    return steps


def _plan_kills(state: State, policy: Policy) -> list[CompactionStep]:
    steps = []
    for condemn in plan_kills(state, policy):
        listed = state.condemns[condemn]
        freed = sum(state.strata[identity].added.length for identity in listed)
        steps.append(CompactionStep("kill", tuple(listed), f"condemned at position {condemn}", bytes_freed=freed))
    return steps


def plan_kills(state: State, policy: Policy) -> list[Position]:
    """Condemns that have stood for the grace."""
    return [at for at in sorted(state.condemns) if state.condemned_ms.get(at, 0) <= policy.now_ms - policy.grace_ms]


def plan_file_deletions(state: State, policy: Policy) -> dict[StratumId, int]:
    """Files of strata that were removed or killed, and their kinds, whose time is over."""
    oldest_ms = policy.now_ms - policy.grace_ms
    return {identity: kind for identity, (kind, time_ms) in state.retired.items() if time_ms <= oldest_ms}


def plan_names_rewrite(state: State) -> Sequence[NameRun]:
    """All runs of names, if one is of an old key generation or the smaller ones are a tenth of the largest."""
    runs = state.name_runs
    if any(state.strata[run.id].added.generation < state.generation for run in runs if run.id in state.strata):
        return runs
    sizes = sorted(run.size for run in runs)
    return runs if len(runs) > 1 and sum(sizes[:-1]) * 10 >= sizes[-1] else ()


def plan_reencryption(state: State, policy: Policy) -> list[StratumId]:
    """Strata of contents of one kind that are sealed under an old generation, about as many as fill a new one."""
    names = {run.id for run in state.name_runs}
    for kind in (StratumKind.META, StratumKind.DATA):
        if kind == StratumKind.DATA and policy.is_cold and not policy.rewrite_cold:
            continue
        group: list[StratumId] = []
        size = 0
        for identity, (added, _, condemned) in state.strata.items():
            if (
                added.kind == kind
                and added.generation < state.generation
                and not (condemned or added.status == ACTIVE or identity in names)
                and size < _GROUP_SIZE
            ):
                group.append(identity)
                size += added.length
        if group:
            return group
    return []


class Prune(NamedTuple):
    """Strata to let go of: the parents, which go first and together, then what is dead, then what is partly dead."""

    parents: list[StratumId]
    dead: list[StratumId]
    partly_dead: list[StratumId]


def is_collectable(state: State, identity: StratumId) -> bool:
    """Whether a stratum can be condemned at all."""
    known = state.strata[identity]
    return not known.condemned and known.added.status != ACTIVE


def plan_parents(state: State, usage: Mapping[StratumId, Usage], *, thorough: bool = False) -> list[StratumId]:
    """Strata in `meta/` to condemn because they hold dead parents; `thorough`: all that hold any."""
    return [
        identity
        for identity, used in usage.items()
        if state.strata[identity].added.kind == StratumKind.META
        and is_collectable(state, identity)
        and (used.kept_size < used.size * _PARENTS_SHARE or (thorough and used.dead_parents) or not used.kept_grains)
    ]


def plan_dead(state: State, usage: Mapping[StratumId, Usage]) -> list[StratumId]:
    """Strata in `data/` of which nothing is needed."""
    return [
        identity
        for identity, used in usage.items()
        if not used.kept_grains
        and state.strata[identity].added.kind == StratumKind.DATA
        and is_collectable(state, identity)
    ]


def plan_partly_dead(state: State, policy: Policy, usage: Mapping[StratumId, Usage]) -> list[StratumId]:
    """Strata in `data/` to write anew: the emptiest first, until the rest wastes little enough."""
    if policy.is_cold and not policy.rewrite_cold:
        return []
    shares = []
    total = needed = 0
    for identity, used in usage.items():
        known = state.strata[identity]
        if known.added.kind != StratumKind.DATA or known.condemned:
            continue
        total += used.size
        needed += used.kept_size
        is_young = policy.is_cold and policy.now_ms - identity.time_ms < policy.cold_minimum_ms
        if 0 < used.kept_grains < used.grains and is_collectable(state, identity) and not is_young:
            shares.append((used.kept_size / used.size, identity))
    chosen = []
    for _, identity in sorted(shares):
        if total <= policy.amplification * needed:
            break
        total -= usage[identity].size - usage[identity].kept_size
        chosen.append(identity)
    return chosen


def _plan_prune(state: State, policy: Policy, usage: Mapping[StratumId, Usage]) -> Iterator[CompactionStep]:
    parents, dead = plan_parents(state, usage), plan_dead(state, usage)
    going = [*parents, *dead]
    if going:
        kept = sum(usage[identity].kept_size for identity in parents)
        freed = sum(state.strata[identity].added.length for identity in going) - kept
        yield CompactionStep(
            "condemn", tuple(going), "nothing in them is needed, or what is is copied", kept, kept, freed
        )
    for identity in plan_partly_dead(state, policy, usage):
        used, length = usage[identity], state.strata[identity].added.length
        share = f"{100 * used.kept_size // used.size} % of it is needed"
        yield CompactionStep("rewrite", (identity,), share, used.kept_size, used.kept_size, length - used.kept_size)

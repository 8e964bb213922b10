"""What is due, decided from a state alone: which runs to merge, which strata to write anew. Pure.

Invariant: a plan names only what the state lists. Carrying it out is refused later if that went meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from basin.engine.state import ACTIVE, FINISHED, State
from basin.format.layout import INDEX_ENTRIES_MAX, MIB, StratumKind
from basin.format.record import NameRun
from basin.terms import StratumId

MERGE_WIDTH: Final = 4
"""Runs of one size class that are merged into one of the next: reads ask at most three runs a class."""
SMALL_STRATUM: Final = 4 * MIB
SMALL_STRATA_MAX: Final = 8


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


def _entries_class(count: int) -> int:
    """Counts of one class differ by at most four times; all below 4,096 are one class."""
    return max(0, (count >> 12).bit_length() + 1) // 2


def plan_strata_merge(state: State) -> list[StratumId]:
    """Small finished strata of one kind and size class, to become one; none if nothing is due."""
    names = {run.id for run in state.name_runs}
    classes: dict[tuple[int, int], list[StratumId]] = {}
    for identity, (added, _, condemned) in state.strata.items():
        if (
            added.status == ACTIVE
            or condemned
            or identity in names
            or added.kind == StratumKind.INDEX
            or added.length > SMALL_STRATUM
        ):
            continue
        classes.setdefault((added.kind, _size_class(added.length)), []).append(identity)
    for group in classes.values():
        if len(group) >= SMALL_STRATA_MAX:
            return group
    return []

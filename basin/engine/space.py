"""`explain_space`: what a basin's bytes are, and what would free them.

Invariants:

- It writes nothing, and reads what two markings read: names, indexes and link lists.
- Grains of strata that are not condemned count once: as needed, held or dead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basin.engine.checkpoints import due_floor
from basin.engine.mark import mark
from basin.engine.merging import never
from basin.engine.plan import Usage
from basin.engine.state import State
from basin.format.layout import STRATUM_FOLDERS, StratumKind
from basin.terms import StratumId

if TYPE_CHECKING:
    from basin.engine.core import Core


@dataclass(frozen=True, slots=True)
class StratumSpace:
    """One stratum of contents. Sizes in bytes; what is neither needed nor held is dead, or the stratum's own index."""

    id: StratumId
    folder: str
    size: int
    needed: int
    """Of grains that a name leads to."""
    held: int
    """Of grains that only dead parents lead to: free once those are gone."""
    dead: int
    condemned_ms: int
    """When it was condemned, in milliseconds since 1970; 0: it was not."""
    due_ms: int
    """From when on a prune with this handle's `grace_s` deletes it; 0: it is not condemned."""


@dataclass(frozen=True, slots=True)
class Space:
    """Where the bytes of a basin are. `strata` are those of contents, the largest waste first."""

    needed: int
    past: int
    """Of the needed ones, those that only old versions lead to: dead when history and pins let go of these."""
    held: int
    dead: int
    condemned: int
    """Of strata that a later prune deletes, whatever is in them."""
    due_ms: int
    """From when on a prune may delete all of them; 0: there are none."""
    names: int
    runs: int
    """Runs of names, whose sizes are `names`."""
    superseded: float
    """The share of entries of names that no readable position sees."""
    indexes: int
    log: int
    waiting_files: int
    """Files of strata that were removed, and stay for who still reads them."""
    grace_s: float
    history_s: float
    """Both of this handle: a compaction that is told otherwise does otherwise."""
    strata: list[StratumSpace]


def explain_space(core: Core) -> Space:
    """What is needed, held, dead, condemned and superseded, as if the history that is due were let go of.

    Cost: two markings, and three passes over the indexes. What others commit meanwhile may be missing from `past`.
    """
    core.refresh()
    marks = mark(core, never, floor=due_floor(core))
    try:
        needed = marks.usage()
        state = marks.state
        marks.hold(
            identity for identity, used in needed.items() if state.strata[identity].added.kind == StratumKind.META
        )
        kept = marks.usage()
        superseded = marks.names_waste
    finally:
        marks.close()
    grace_ms = int(core.options.grace_s * 1000)
    strata = [_stratum(state, identity, needed[identity], used, grace_ms) for identity, used in kept.items()]
    strata.sort(key=lambda one: (one.needed - one.size, one.id))
    standing = [one for one in strata if not state.strata[one.id].condemned]
    return Space(
        needed=sum(one.needed for one in standing),
        past=_past(core, {one.id: one.needed for one in standing}),
        held=sum(one.held for one in standing),
        dead=sum(one.dead for one in standing),
        condemned=sum(one.size for one in strata) - sum(one.size for one in standing),
        due_ms=max((one.due_ms for one in strata), default=0),
        names=sum(run.size for run in state.name_runs),
        runs=len(state.name_runs),
        superseded=superseded,
        indexes=sum(known.added.length for known in state.strata.values() if known.added.kind == StratumKind.INDEX),
        log=core.log.describe().get("bytes", 0),
        waiting_files=len(state.retired),
        grace_s=core.options.grace_s,
        history_s=core.options.history_s,
        strata=strata,
    )


def _stratum(state: State, identity: StratumId, needed: Usage, kept: Usage, grace_ms: int) -> StratumSpace:
    """`kept`: with what dead parents lead to."""
    known = state.strata[identity]
    condemned_ms = state.condemned_ms.get(known.condemned, 0) if known.condemned else 0
    return StratumSpace(
        identity,
        STRATUM_FOLDERS[StratumKind(known.added.kind)],
        known.added.length,
        needed.kept_size,
        kept.kept_size - needed.kept_size,
        kept.size - kept.kept_size,
        condemned_ms,
        condemned_ms + grace_ms if condemned_ms else 0,
    )


def _past(core: Core, needed: Mapping[StratumId, int]) -> int:
    """Bytes of `needed` that no newest version leads to."""
    marks = mark(core, never, floor=core.state.position)
    try:
        now = marks.usage()
    finally:
        marks.close()
    return sum(max(0, size - now[identity].kept_size) for identity, size in needed.items() if identity in now)

"""`explain_space`: what a basin's bytes are, and what would free them.

Invariant: it writes nothing, and reads what a marking reads: names, indexes and link lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from basin.engine.checkpoints import due_floor
from basin.engine.mark import mark
from basin.engine.merging import never
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


@dataclass(frozen=True, slots=True)
class Space:
    """Where the bytes of a basin are. `strata` are those of contents, the largest waste first."""

    needed: int
    held: int
    dead: int
    condemned: int
    """Of strata that a later prune deletes, whatever is in them."""
    names: int
    superseded: float
    """The share of entries of names that no readable position sees."""
    indexes: int
    log: int
    waiting_files: int
    """Files of strata that were removed, and stay for who still reads them."""
    strata: list[StratumSpace]


def explain_space(core: Core) -> Space:
    """What is needed, held, dead, condemned and superseded, as if the history that is due were let go of.

    Cost: one marking, and two passes over the indexes.
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
    strata = []
    for identity, used in kept.items():
        known = state.strata[identity]
        strata.append(
            StratumSpace(
                identity,
                STRATUM_FOLDERS[StratumKind(known.added.kind)],
                known.added.length,
                needed[identity].kept_size,
                used.kept_size - needed[identity].kept_size,
                used.size - used.kept_size,
                state.condemned_ms.get(known.condemned, 0) if known.condemned else 0,
            )
        )
    strata.sort(key=lambda one: (one.needed - one.size, one.id))
    standing = [one for one in strata if not state.strata[one.id].condemned]
    kinds = {identity: known.added.kind for identity, known in state.strata.items()}
    return Space(
        needed=sum(one.needed for one in standing),
        held=sum(one.held for one in standing),
        dead=sum(one.dead for one in standing),
        condemned=sum(one.size for one in strata) - sum(one.size for one in standing),
        names=sum(run.size for run in state.name_runs),
        superseded=superseded,
        indexes=sum(known.added.length for one, known in state.strata.items() if kinds[one] == StratumKind.INDEX),
        log=core.log.describe().get("bytes", 0),
        waiting_files=len(state.retired),
        strata=strata,
    )
